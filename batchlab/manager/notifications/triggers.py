"""The moments of a job that somebody may want to hear of while it goes on.

Invariant: read off what the manager has in memory anyway. A job stands still only while it could
move: not while it runs somewhere, nor while it waits for what its user, its retry rule or a cap
has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from batchlab.core.model import Control, JobId, JobState
from batchlab.core.notifications import Target
from batchlab.core.ports import Clock
from batchlab.manager.state import LiveJob, Seen


@dataclass(slots=True)
class _Stand:
    """How far a job was when it was last seen to move."""

    marker: tuple[int, ...]
    since_s: float


class Moments:
    """Of the jobs that one manager conducts."""

    def __init__(
        self,
        clock: Clock,
        workers: Mapping[str, Seen],
        cap_of: Callable[[LiveJob], str] = lambda _: "",
    ) -> None:
        """`cap_of` names the caps that hold for a job: another one is another moment."""
        self._clock = clock
        self._workers = workers
        self._cap_of = cap_of
        self._stands: dict[JobId, _Stand] = {}

    def keep(self, jobs: Collection[JobId]) -> None:
        """Forget all others."""
        for gone in self._stands.keys() - jobs:
            del self._stands[gone]

    def forget(self, job: JobId) -> None:
        """It has ended."""
        self._stands.pop(job, None)

    def of(self, live: LiveJob, target: Target, stood_s: float) -> Iterator[tuple[str, str]]:
        """What `target` wants to hear of the job as it is: a moment, and what makes it another one
        than the last of its kind. `stood_s` is the job's, where the target asks for that."""
        failed = sum(one.counts.failed for one in live.stages.values())
        if target.wants("failures") and failed >= target.failures:
            yield "failures", str(target.failures)
        if target.wants("capped") and live.capped:
            yield "capped", self._cap_of(live)
        if target.wants("stuck") and stood_s >= target.stuck_s:
            yield "stuck", ".".join(map(str, self._stands[live.id].marker))

    def stood_s(self, live: LiveJob) -> float:
        """For how long nothing of the job has moved that should."""
        now_s = self._clock.monotonic_s()
        counts = [one.counts for one in live.stages.values()]
        marker = (
            live.round,
            sum(one.planned is not None for one in counts),
            sum(one.terminal + one.retried for one in counts),
        )
        stand = self._stands.setdefault(live.id, _Stand(marker, now_s))
        if stand.marker != marker or self._moves(live, now_s):
            stand.marker, stand.since_s = marker, now_s
        return now_s - stand.since_s

    def _moves(self, live: LiveJob, now_s: float) -> bool:
        """Whether it runs somewhere, or waits for what its user or its retry rule has asked for."""
        if live.record.control is not Control.RUN or live.record.state is JobState.SCHEDULED:
            return True
        if live.is_held or any(one.heard_s > now_s for one in live.all_outstanding()):
            return True
        held = (one for seen in self._workers.values() for one in seen.since_s)
        return any(one.job == live.id for one in held)
