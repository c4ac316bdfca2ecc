"""What has been read of a job's failures, grouped by their stages and fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchlab.views import FailureView

Cause = tuple[str, str]
"""A stage and a fingerprint."""

MOST_CAUSES = 500
"""Most groups of a job. Failures of further causes are one group for each stage."""
OTHERS = "others"
"""The fingerprint of that group."""


@dataclass(slots=True)
class Groups:
    """Of one round: the tasks of each cause, and the failure that was heard of first. `seq`
    is of the last outcome that was read. Adding the same again changes nothing."""

    round: int
    seq: int = 0
    tasks: dict[Cause, set[int]] = field(default_factory=dict)
    first: dict[Cause, FailureView] = field(default_factory=dict)

    @property
    def others(self) -> Mapping[str, set[int]]:
        """The tasks of further causes, by stage."""
        return {stage: tasks for (stage, cause), tasks in self.tasks.items() if cause == OTHERS}

    def add(self, failure: FailureView) -> None:
        cause = failure["stage"], failure["fingerprint"]
        if cause not in self.first and len(self.first) >= MOST_CAUSES:
            cause = failure["stage"], OTHERS
            reason = f"other causes, the first: {failure['reason'] or failure['error']}"
            failure = {**failure, "fingerprint": OTHERS, "reason": reason}
        self.tasks.setdefault(cause, set()).add(failure["task"])
        self.first.setdefault(cause, failure)
