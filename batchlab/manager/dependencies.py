"""Dependencies between jobs: the conditions that must hold before a job begins.

Invariant: a job without a plan begins only when the conditions of all its dependencies hold at the same time. The
ledger records the end of a job after the bucket has the end, so a condition never holds too early. The manager reads a
dependency when the job is adopted and when the dependency ends, and not at each tick.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from batchlab.core.errors import NotFound, Refused
from batchlab.core.job_definition import Condition, Dependency, JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.ports import JobRecord
from batchlab.manager.context import Context, Part


class Dependencies(Part):
    def __init__(self, context: Context, find: Callable[[JobId], Awaitable[JobRecord]]) -> None:
        """`find` returns the record of a job, or raises NotFound."""
        super().__init__(context)
        self._find = find

    async def unmet(self, job: JobDef) -> tuple[Dependency, ...]:
        """Return the dependencies whose condition does not hold now. Raise Refused if a dependency does not exist, or
        has ended without the success that the job requires."""
        return tuple([dependency for dependency in job.after if not await self._holds(dependency)])

    async def _holds(self, dependency: Dependency) -> bool:
        job = dependency.job
        live = self._lives.get(job)
        if live is not None and not live.ended.is_set():
            return False
        try:
            state = (await self._find(job)).state
        except NotFound as error:
            raise Refused(
                f"Job {job} is a dependency and does not exist on this grid.",
                remedy="Submit the job with other dependencies. `batchlab job list` shows the jobs of the grid.",
            ) from error
        if state.ended and dependency.condition is Condition.SUCCEEDED and state is not JobState.SUCCEEDED:
            raise Refused(
                f"Job {job} is a dependency that must succeed, and ended {state}.",
                remedy=f"`batchlab job retry {job}` runs its remaining tasks.",
            )
        return state.ended
