"""What has been read of a job's failures, grouped by their stages and fingerprints."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchlab.views import FailureView

Cause = tuple[str, str]
"""A stage and a fingerprint."""


@dataclass(slots=True)
class Groups:
    """Of one round: the tasks of each cause, and the failure that was heard of first. `seq`
    is of the last outcome that was read. Adding the same again changes nothing."""

    round: int
    seq: int = 0
    tasks: dict[Cause, set[int]] = field(default_factory=dict)
    first: dict[Cause, FailureView] = field(default_factory=dict)

    def add(self, failure: FailureView) -> None:
        cause = failure["stage"], failure["fingerprint"]
        self.tasks.setdefault(cause, set()).add(failure["task"])
        self.first.setdefault(cause, failure)
