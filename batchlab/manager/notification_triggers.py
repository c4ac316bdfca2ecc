"""Triggers for notifications about live jobs: failures, a cost cap, and a standstill.

Invariant: triggers read only data in memory. A job stands still only if it could make progress: not
while a worker runs it, and not while it waits for its user, its retry delay, or a cap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from batchlab.core.model import Control, JobId, JobState
from batchlab.core.notifications import Target
from batchlab.core.ports import Clock
from batchlab.manager.state import LiveJob, WorkerStatus


@dataclass(slots=True)
class _LastProgress:
    """Position of a job when its last progress was seen."""

    marker: tuple[int, ...]
    since_s: float


class NotificationTriggers:
    """Triggers of the jobs that one manager conducts."""

    def __init__(
        self,
        clock: Clock,
        workers: Mapping[str, WorkerStatus],
        cap_of: Callable[[LiveJob], str] = lambda _: "",
    ) -> None:
        """`cap_of` names the caps of a job. A change of the name triggers again."""
        self._clock = clock
        self._workers = workers
        self._cap_of = cap_of
        self._stands: dict[JobId, _LastProgress] = {}

    def keep(self, jobs: Collection[JobId]) -> None:
        """Forget all other jobs."""
        for gone in self._stands.keys() - jobs:
            del self._stands[gone]

    def forget(self, job: JobId) -> None:
        self._stands.pop(job, None)

    def of(self, live: LiveJob, target: Target, stood_s: float) -> Iterator[tuple[str, str]]:
        """Yield what has triggered for `target`: the moment, and a key that distinguishes it from
        earlier ones of its kind. `stood_s` is the job's standstill, if the target wants it."""
        failed = sum(one.counts.failed for one in live.stages.values())
        if target.wants("failures") and failed >= target.failures:
            yield "failures", str(target.failures)
        if target.wants("capped") and live.capped:
            yield "capped", self._cap_of(live)
        if target.wants("stuck") and stood_s >= target.stuck_s:
            yield "stuck", ".".join(map(str, self._stands[live.id].marker))

    def stood_s(self, live: LiveJob) -> float:
        """Return the seconds since the job's last progress."""
        now_s = self._clock.monotonic_s()
        counts = [one.counts for one in live.stages.values()]
        marker = (
            live.round,
            sum(one.planned is not None for one in counts),
            sum(one.terminal + one.retried for one in counts),
        )
        stand = self._stands.setdefault(live.id, _LastProgress(marker, now_s))
        if stand.marker != marker or self._moves(live, now_s):
            stand.marker, stand.since_s = marker, now_s
        return now_s - stand.since_s

    def _moves(self, live: LiveJob, now_s: float) -> bool:
        """Return whether a worker runs the job, or the job waits for its user or its retry
        delay."""
        if live.record.control is not Control.RUN or live.record.state is JobState.SCHEDULED:
            return True
        if live.is_held or any(one.heard_s > now_s for one in live.all_outstanding()):
            return True
        held = (one for seen in self._workers.values() for one in seen.since_s)
        return any(one.job == live.id for one in held)
