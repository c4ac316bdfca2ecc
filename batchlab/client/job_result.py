"""Result of a job that was run from a job file.

Invariant: the object reads results on request, in parts, and in task order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.client.grid_link import Link
from batchlab.client.http import Client
from batchlab.client.results import decoded
from batchlab.core.errors import JobFailed, TaskFailed, UsageError
from batchlab.core.model import JobId, JobState, Json, StageName
from batchlab.core.protocol.references import Own
from batchlab.jobs import attempts, results
from batchlab.jobs.results import Fetched, Listed
from batchlab.runtime import home

if TYPE_CHECKING:
    from batchlab.core.api_types import FailureView, JobView

T = TypeVar("T")

AT_ONCE = 256
SHOWN_FAILURES = 100


class JobResult:
    """A job that has ended. Its results can be read while the grid is open."""

    def __init__(self, owner: object, link: Link, view: JobView) -> None:
        """`owner` closes `link` when no reference to it exists. The reference here keeps it
        open."""
        self._owner = owner
        self._link = link
        self.view = view
        self.fetched: Fetched | None = None
        """The written results, if the job was run with `out`."""
        self.failures: list[FailureView] = []
        """The first 100 tasks that failed permanently."""
        if any(stage["failed"] for stage in view["stages"]):
            self.failures = link.call(
                lambda client: client.failures(view["id"], limit=SHOWN_FAILURES)
            )

    def __repr__(self) -> str:
        return f"<JobResult {self.id} {self.state}>"

    @property
    def id(self) -> str:
        return self.view["id"]

    @property
    def state(self) -> JobState:
        return JobState(self.view["state"])

    @property
    def reason(self) -> str:
        return self.view["reason"]

    def raise_for_state(self) -> None:
        """Raise an error unless the job SUCCEEDED: TaskFailed with its first failure, or
        JobFailed."""
        if self.state is JobState.SUCCEEDED:
            return
        told = f"Job {self.id} ended {self.state}: {self.reason}."
        for first in self.failures:
            raise TaskFailed(told, task=first["task"], traceback=first["traceback"])
        raise JobFailed(told)

    def results(self, stage: str | None = None) -> Iterator[Any]:
        """Return the values of `stage` in task order.

        Without `stage`, return the values of all final stages, one stage after the other. Tasks
        that did not succeed are skipped. Raise UsageError for an unknown stage."""
        link = self._link
        job = link.run(attempts.definition(link.objects, JobId(self.id), link.patience))
        names = [one.name for one in job.stages]
        if stage is not None and stage not in names:
            raise UsageError(
                f"Job {self.id} has no stage {stage!r}.", remedy=f"It has {', '.join(names)}."
            )
        chosen = results.final_stages(job) if stage is None else [StageName(stage)]
        return self._values(chosen, Own.of(job))

    def _values(self, stages: Sequence[StageName], own: Own) -> Iterator[Any]:
        link = self._link
        for stage in stages:
            coming = self._encoded(stage, list_outcomes(link, self.id))
            while some := link.run(_some(coming, AT_ONCE)):
                tasks, encoded = zip(*some, strict=True)
                where = f"{self.id}/{stage}"
                for value in decoded(link, where, stage, tasks, encoded, own):
                    if isinstance(value, TaskFailed):
                        raise value
                    yield value

    async def _encoded(
        self, stage: StageName, listing: Sequence[Listed]
    ) -> AsyncIterator[tuple[int, Json]]:
        objects, patience = self._link.objects, self._link.patience
        chosen = results.of_stage(stage, listing)
        async for pair in results.in_task_order(objects, chosen, patience):
            yield pair

    def fetch(self, out: Path) -> Fetched:
        """Write the final stages' results and their files into the folder `out`."""
        link = self._link
        listing = list_outcomes(link, self.id)
        self.fetched = link.run(
            results.fetch(link.objects, self.view, listing, out, patience=link.patience)
        )
        home.note(link.home, self.id, self.fetched.read_bytes)
        return self.fetched


def list_outcomes(link: Link, job: str) -> list[Listed]:
    """Return all outcomes of a job that has ended."""
    return results.listed(lambda after: link.call(partial(Client.outcomes, job=job, after=after)))


async def _some(values: AsyncIterator[T], count: int) -> list[T]:
    found: list[T] = []
    async for one in values:
        found.append(one)
        if len(found) == count:
            break
    return found
