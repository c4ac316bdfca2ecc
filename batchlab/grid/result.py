"""What came of a job that was run from a job file.

Invariant: results are read when they are asked for, some at a time, in task order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab import results
from batchlab.errors import JobFailed, TaskFailed, UsageError
from batchlab.grid.incoming import decoded
from batchlab.grid.link import Link
from batchlab.model import JobState, Json, StageName
from batchlab.results import Fetched, Listed

if TYPE_CHECKING:
    from batchlab.views import FailureView, JobView

AT_ONCE = 256
SHOWN_FAILURES = 100


class JobResult:
    """A job that has ended. Its results can be read while the grid is open."""

    def __init__(self, link: Link, view: JobView) -> None:
        self._link = link
        self.view = view
        self.fetched: Fetched | None = None
        """What was written, where the job was run with `out`."""
        self.failures: list[FailureView] = []
        """Tasks that failed for good, the first 100."""
        if any(stage["failed"] for stage in view["stages"]):
            self.failures = link.call(
                lambda client: client.failures(view["id"], limit=SHOWN_FAILURES)
            )

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
        """TaskFailed with its first failure, else JobFailed, unless the job SUCCEEDED."""
        if self.state is JobState.SUCCEEDED:
            return
        told = f"Job {self.id} ended {self.state}: {self.reason}."
        for first in self.failures:
            raise TaskFailed(told, task=first["task"], traceback=first["traceback"])
        raise JobFailed(told)

    def results(self, stage: str | None = None) -> Iterator[Any]:
        """Values of `stage` in task order, else of the final stages one after the other; tasks
        that did not succeed have none. UsageError for a stage that there is not."""
        link = self._link
        job = link.run(results.definition(link.objects, self.id, link.patience))
        names = [one.name for one in job.stages]
        if stage is not None and stage not in names:
            raise UsageError(
                f"Job {self.id} has no stage {stage!r}.", remedy=f"It has {', '.join(names)}."
            )
        chosen = results.final_stages(job) if stage is None else [StageName(stage)]
        return self._values(job, chosen)
