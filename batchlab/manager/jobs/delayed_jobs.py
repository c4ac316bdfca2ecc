"""When jobs that wait for a time begin: those in SCHEDULED, by the wall clock.

Invariant: none begins before its time by the clock as it is now, unless that was set back by more
than `SET_BACK_S` since the job was first seen: then it begins so much after the wait it had then.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, JobState
from batchlab.manager.state import LiveJob, Ports, move

SET_BACK_S = 60.0
"""A wall clock that is set back by more than this does not hold up what is scheduled."""


class Starts:
    """Of the jobs that one manager conducts."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._due_s: dict[JobId, float] = {}
        """Monotonic; when each job that was first seen SCHEDULED is to start."""

    def see(self, job: JobDef) -> None:
        """A job is SCHEDULED; what was first seen of it counts."""
        self._due_s.setdefault(job.id, self._starts_s(job))

    def forget(self, job: JobId) -> None:
        """It has ended."""
        self._due_s.pop(job, None)

    async def look(self, lives: Mapping[JobId, LiveJob]) -> None:
        """Begin those whose time has come."""
        now_s = self._ports.clock.monotonic_s()
        for live in list(lives.values()):
            if live.record.state is JobState.SCHEDULED:
                late_s = now_s - self._due_s.get(live.id, now_s)
                if late_s > SET_BACK_S or self._starts_s(live.job) <= now_s:
                    await move(self._ports, live, JobState.SUBMITTED)
                    live.poke.set()

    def _starts_s(self, job: JobDef) -> float:
        """When the job is to start, on the monotonic clock, by what the wall clock says now."""
        clock = self._ports.clock
        return clock.monotonic_s() + (job.start_at_s or 0.0) - clock.now_s()
