"""Results of `Grid.map` and of job files. The results of a job are read in parts.

Invariant: the result of each task is returned once. A MapResults object has only a few outcomes in memory, even for a
large job or a slow caller. A JobResult reads results on request, in task order.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.client.grid_link import POLL_S, Link
from batchlab.client.http import Client
from batchlab.client.task_errors import cause_of, combine
from batchlab.core.api_types import OutcomeView
from batchlab.core.errors import BackendError, JobFailed, TaskFailed, UsageError
from batchlab.core.job_definition import task_name
from batchlab.core.model import Failure, JobId, JobState, Json, Outcome, StageName
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.core.task_context import File
from batchlab.jobs import attempts, results
from batchlab.jobs.results import Fetched, Listed
from batchlab.runtime import home
from batchlab.worker import materialization

if TYPE_CHECKING:
    from batchlab.core.api_types import FailureView, JobView

MAX_FETCHES = 4
"""Maximum number of outcomes that are fetched at the same time."""
GAP_S = 0.2
GAP_SHARE = 0.1
"""Pause between two polls of a job, as a share of the time since the first poll.

The pause between two polls is at most `GAP_S` seconds, and is shorter if few tasks remain. Without a pause between
polls, the manager would answer a poll for each new outcome of a busy job.
"""
VALUES_AT_ONCE = 16
"""Number of large values and files that are fetched at the same time."""

Run = tuple[int, list[Json | TaskFailed]]
"""Results of consecutive tasks, as a tuple of the number of the first task, and the encoded value or failure of each
task.
"""


class MapResults:
    """Results of one call of `Grid.map`, as encoded values."""

    def __init__(
        self,
        link: Link,
        job: str,
        count: int,
        *,
        ordered: bool,
        on_poll: Callable[[int], None] | None = None,
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> None:
        """`on_poll` receives the number of ended tasks after each poll, and `on_outcome` receives each outcome before
        its results are yielded.
        """
        self._on_poll = on_poll
        self._on_outcome = on_outcome
        self._link = link
        self._job = job
        self._count = count
        self._ordered = ordered
        self._after: int | None = None
        self._ended = 0
        """Number of ended tasks in all outcomes that the manager has listed."""
        self._began_s = self._answered_s = link.clock.monotonic_s()
        self._listed: list[tuple[float, int, OutcomeView]] = []
        """Heap of outcomes to fetch, as tuples (rank, seq, view). The rank is the outcome's first task in task order,
        and otherwise the seq.
        """
        self._fetching: list[tuple[float, int, Future[Outcome]]] = []
        """Heap of outcomes that are being fetched, as tuples (rank, seq, future)."""

    def runs(self) -> Iterator[Run]:
        """Yield every task's result once, in task order or in the order of arrival."""
        ready: list[Run] = []
        returned = 0
        while returned < self._count:
            needed = returned if self._ordered else math.inf
            if ready and ready[0][0] <= needed:
                run = heappop(ready)
                returned += len(run[1])
                yield run
            elif outcome := self._next(needed):
                for run in _runs(outcome):
                    heappush(ready, run)
            else:
                self._poll(returned)

    def cancel(self) -> None:
        """Cancel the running fetches of outcomes, because the caller does not need more results."""
        for _, _, future in self._fetching:
            future.cancel()

    def _next(self, needed: float) -> Outcome | None:
        """Return the next outcome that may contain a needed result.

        Return None if the listed outcomes cannot contain a needed result. `needed` is the next task in task order, or
        infinity if the result of any task is needed.
        """
        listed, fetching = self._listed, self._fetching
        while listed and (len(fetching) < MAX_FETCHES or listed[0][0] <= needed < fetching[0][0]):
            at, seq, view = heappop(listed)
            heappush(fetching, (at, seq, self._link.start(fetch_outcome(self._link, view))))
        if not fetching or fetching[0][0] > needed:
            return None
        outcome = heappop(fetching)[2].result()
        if self._on_outcome:
            self._on_outcome(outcome)
        return outcome

    def _poll(self, returned: int) -> None:
        """Wait for further outcomes of the job. Raise JobFailed if the job has ended without outcomes for all tasks."""
        now_s = self._link.clock.monotonic_s
        left = (self._count - self._ended) / self._ended if self._ended else math.inf
        pause_s = gap_s(self._answered_s - self._began_s, left)
        time.sleep(max(0.0, self._answered_s + pause_s - now_s()))
        page = self._link.call(lambda client: client.outcomes(self._job, after=self._after, wait_s=POLL_S))
        self._answered_s = now_s()
        for view in page["outcomes"]:
            self._after = view["seq"]
            self._ended += view["failed"] + sum(stop - start for start, stop in view["tasks"])
            # An outcome without ended tasks contains no results, because all tasks of the outcome are retried, split
            # off, or canceled.
            if view["tasks"] or view["failed"]:
                # If tasks failed, use the number of the bundle's first task, because the view does not list the failed
                # tasks.
                first = int(view["bundle"].partition("-")[0]) if view["failed"] else view["tasks"][0][0]
                heappush(self._listed, (first if self._ordered else view["seq"], view["seq"], view))
        if self._on_poll:
            self._on_poll(self._ended)
        if page["ended"] and not page["outcomes"]:
            job = self._link.call(lambda client: client.job(self._job))
            reason = f" ({job['reason']})" if job["reason"] else ""
            raise JobFailed(f"Job {self._job} ended {job['state']}{reason} with {returned} of {self._count} results.")


def gap_s(watched_s: float, left: float = math.inf, *, most_s: float = GAP_S) -> float:
    """Return the pause in seconds between the answer to a poll and the next poll. `watched_s` is the time from the
    beginning of the watch to the answer, and `left` is the ratio of remaining tasks to ended tasks.
    """
    return min(most_s, GAP_SHARE * watched_s * min(1.0, max(0.0, left)))


async def fetch_outcome(link: Link, view: OutcomeView) -> Outcome:
    """Return the outcome that an OutcomeView describes.

    If the OutcomeView does not contain the outcome itself, fetch the outcome from the bucket.
    """
    if view["outcome"]:
        outcome = json_format.outcome_from_json(view["outcome"])
    else:
        get = partial(link.objects.get, view["key"])
        outcome = json_format.outcome_from_json(json_format.loads(await link.patience(get)))
    key, bundle = object_keys.outcome_key(view["key"]), outcome.bundle
    if key is None or (key.job, key.stage, key.bundle) != (bundle.job, bundle.stage, bundle.id):
        raise BackendError(f"The outcome {view['key']} belongs to another bundle.")
    return outcome


async def outcomes(link: Link, views: Sequence[OutcomeView]) -> AsyncIterator[Outcome]:
    """Yield the outcomes that contain ended tasks. Up to MAX_FETCHES outcomes are fetched in parallel."""
    with_results = [view for view in views if view["tasks"] or view["failed"]]
    for first in range(0, len(with_results), MAX_FETCHES):
        batch = (fetch_outcome(link, view) for view in with_results[first : first + MAX_FETCHES])
        for outcome in await asyncio.gather(*batch):
            yield outcome


def _runs(outcome: Outcome) -> Iterator[Run]:
    at = 0
    for start, stop in outcome.succeeded.ranges:
        yield start, list(outcome.values[at : at + stop - start])
        at += stop - start
    for failure in outcome.failed:
        if failure.final:
            error, cause = task_failure(outcome, failure), cause_of(outcome, failure)
            yield failure.task, [combine(error, cause) if cause else error]


def task_failure(outcome: Outcome, failure: Failure, kind: type[TaskFailed] = TaskFailed) -> TaskFailed:
    """Return the error for a task's permanent failure."""
    attempt = outcome.bundle.attempt
    times = f" {attempt} times, the last time" if attempt > 1 else ""
    name = task_name(outcome.bundle.stage, failure.task)
    return kind(
        f"Task {name} of job {outcome.bundle.job} failed{times}: {failure.reason}",
        task=failure.task,
        traceback=failure.traceback,
    )


# --- Decoding ------------------------------------------------------------------------------------


def decode_all(
    link: Link, where: str, stage: str, tasks: Sequence[int], encoded: Sequence[Json | TaskFailed], own: JobObjects
) -> Iterator[Any]:
    """Yield the decoded results of the tasks `tasks` of a stage. Files and large values are fetched into the folder
    `where`.

    A TaskFailed in `encoded` is yielded unchanged. For a value that cannot be read, a TaskFailed is yielded. Pickled
    objects are unpickled only for a job of the Python API.
    """
    if not any(type(value) is dict or type(value) is list for value in encoded):
        yield from encoded
        return
    for first in range(0, len(encoded), VALUES_AT_ONCE):
        stop = first + VALUES_AT_ONCE
        batch = dict(zip(tasks[first:stop], encoded[first:stop], strict=True))
        references = [(task, value) for task, value in batch.items() if next(values.references(value), None)]
        if references:
            folder = link.folder / where
            inputs = materialization.Inputs(link.objects, folder, asyncio.to_thread, own, link.files)
            batch |= dict(link.run(inputs.fetch(references)))
        for task, value in batch.items():
            yield _decode(stage, task, value, pickles=own.is_python)


def _decode(stage: str, task: int, encoded: Json | Failure | TaskFailed, *, pickles: bool) -> Any:
    if isinstance(encoded, Failure):
        name = task_name(stage, task)
        return TaskFailed(f"The result of task {name} cannot be fetched: {encoded.reason}", task=task)
    try:
        return values.decode(encoded, _file, pickles=pickles)
    except Exception as error:  # noqa: BLE001 - unpickling runs arbitrary code
        name = task_name(stage, task)
        task_failed = TaskFailed(
            f"The result of task {name} cannot be read here: {type(error).__name__}: {error}", task=task
        )
        task_failed.__cause__ = error
        return task_failed


def _file(reference: Json) -> File:
    return File.fetched(reference["$file"], reference["name"], reference["origin"])


T = TypeVar("T")

MAX_VALUES_READ = 256
SHOWN_FAILURES = 100


class JobResult:
    """Result of a job that has ended. The values of the job's tasks can be read while the Grid object is open."""

    def __init__(self, owner: object, link: Link, view: JobView) -> None:
        """When the last reference to `owner` is dropped, `owner` closes `link`. The JobResult keeps a reference to
        `owner`.
        """
        self._owner = owner
        self._link = link
        self.view = view
        self.fetched: Fetched | None = None
        """Summary of the results that `fetch` has written to a folder, or None before `fetch`."""
        self.failures: list[FailureView] = []
        """Failures of the first 100 tasks of the job that failed permanently."""
        if any(stage["failed"] for stage in view["stages"]):
            self.failures = link.call(lambda client: client.failures(view["id"], limit=SHOWN_FAILURES))

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
        """Raise an error unless the job's state is SUCCEEDED.

        If a task failed, the error is TaskFailed with the first failure. Otherwise, the error is JobFailed.
        """
        if self.state is JobState.SUCCEEDED:
            return
        text = f"Job {self.id} ended {self.state}: {self.reason}."
        for first in self.failures:
            raise TaskFailed(text, task=first["task"], traceback=first["traceback"])
        raise JobFailed(text)

    def results(self, stage: str | None = None) -> Iterator[Any]:
        """Return the values of `stage` in task order.

        If `stage` is None, return the values of all final stages, one stage after the other. Tasks that did not succeed
        are skipped. Raise UsageError for an unknown stage.
        """
        link = self._link
        job = link.run(attempts.definition(link.objects, JobId(self.id), link.patience))
        names = [stage_def.name for stage_def in job.stages]
        if stage is not None and stage not in names:
            raise UsageError(f"Job {self.id} does not have a stage {stage!r}.", remedy=f"It has {', '.join(names)}.")
        chosen = results.final_stages(job) if stage is None else [StageName(stage)]
        return self._values(chosen, JobObjects.of_job(job))

    def _values(self, stages: Sequence[StageName], own: JobObjects) -> Iterator[Any]:
        link = self._link
        for stage in stages:
            listing = results.of_stage(stage, list_outcomes(link, self.id))
            pairs = results.in_task_order(link.objects, listing, link.patience)
            while part := link.run(_next_values(pairs, MAX_VALUES_READ)):
                tasks, encoded = zip(*part, strict=True)
                for value in decode_all(link, f"{self.id}/{stage}", stage, tasks, encoded, own):
                    if isinstance(value, TaskFailed):
                        raise value
                    yield value

    def fetch(self, out: Path) -> Fetched:
        """Write the results of the final stages and the files of these results into the folder `out`."""
        link = self._link
        listing = list_outcomes(link, self.id)
        self.fetched = link.run(results.fetch(link.objects, self.view, listing, out, patience=link.patience))
        home.record_fetch(link.home, self.id, self.fetched.read_bytes)
        return self.fetched


def list_outcomes(link: Link, job: str) -> list[Listed]:
    """Return the list of all outcomes of a job that has ended."""
    return results.list_results(lambda after: link.call(partial(Client.outcomes, job=job, after=after)))


async def _next_values(iterator: AsyncIterator[T], count: int) -> list[T]:
    values: list[T] = []
    async for value in iterator:
        values.append(value)
        if len(values) == count:
            break
    return values
