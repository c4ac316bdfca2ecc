"""Index of a job's tasks and bundles, built from the ledger's rows of bundles.

Invariants: the index reads each row of the ledger once, and does not use outcomes. The memory of the index grows with
the number of bundles and not with the number of tasks. A query begins at a given task, so a page late in a list takes
as long as the first page.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import merge
from typing import NamedTuple

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, StageName, TaskMetrics, TaskSet
from batchlab.core.ports import BundleResult, TaskRanges
from batchlab.manager.retry_rounds import RetriedTasks
from batchlab.server.time_buckets import RESULTS, TimeBuckets

MAX_FIGURES = 2_000
"""Maximum number of tasks of a job whose figures are cached."""


class TaskState(StrEnum):
    """State of a task in a list. The order of the states is the order in which a user looks for them."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class IndexedBundle(NamedTuple):
    """Row of a bundle in the index. `tasks` is the number of tasks, and `state` is the worst result of a task."""

    stage: StageName
    first: int
    last: int
    tasks: int
    attempt: int
    round: int
    seq: int
    worker: str
    started_s: float
    ended_s: float
    state: str

    @property
    def name(self) -> str:
        """Return the id of the bundle."""
        return f"{self.first:08d}-{self.last:08d}.{self.round}.{self.attempt}"

    def bundle(self, job: JobId) -> Bundle:
        """Return a bundle with the id of this row. The bundle has only the first and the last task."""
        ends = TaskSet.from_indices({self.first, self.last})
        return Bundle(job, self.stage, ends, self.attempt, self.round)


class RunningBundle(NamedTuple):
    """A bundle that a worker runs since the epoch time `since_s`, according to the worker's heartbeat."""

    bundle: Bundle
    worker: str
    since_s: float


class ListedTask(NamedTuple):
    """A task with its state. `row` is the number of the bundle with the task's result, or -1."""

    stage: StageName
    task: int
    state: TaskState
    row: int = -1
    running: RunningBundle | None = None


Figures = tuple[float | None, TaskMetrics]
"""Run time in seconds and metrics of a task."""
_Segment = tuple[int, int, TaskState, int]
"""First task, task after the last task, state, and the number of the bundle's row."""


class TaskIndex:
    """Index of the ended tasks of a job's round, which reads the ledger up to the seq `seq`."""

    def __init__(self, job: JobDef, retried: RetriedTasks) -> None:
        self.retried = retried
        self.mended = retried.mended()
        self.seq = 0
        self.succeeded = 0
        self.lock = asyncio.Lock()
        """Lock that is held while the ledger is read."""
        self.figures: dict[tuple[int, int], Figures] = {}
        """Figures of recently listed tasks by the seq of the outcome and the task, for the next page or update."""
        self.workers: list[str] = []
        self._worker_numbers: dict[str, int] = {}
        self._submitted_s = job.submitted_s
        self._stages = [stage.name for stage in job.stages]
        self._stage_numbers = {name: number for number, name in enumerate(self._stages)}
        # The rows of the bundles. Each array is a column.
        self._seqs = array("q")
        self._firsts, self._lasts, self._tasks = array("q"), array("q"), array("q")
        self._stage_of, self._attempts, self._rounds = array("l"), array("l"), array("l")
        self._worker_of, self._results = array("l"), array("b")
        self._started_s, self._ended_s = array("d"), array("d")
        self.buckets = TimeBuckets()
        """Bundles by worker and time, for a timeline with many bundles."""
        self._segments: dict[tuple[StageName, TaskState], list[tuple[int, int, int]]] = {}
        self._unsorted: set[tuple[StageName, TaskState]] = set()

    def __len__(self) -> int:
        return len(self._seqs)

    def add(self, results: Iterable[BundleResult], now_s: float) -> None:
        """Add folded bundles in the order of their seqs. `now_s` is the latest time that a bundle may have."""
        row, workers = len(self), self._worker_numbers
        for result in results:
            seq, stage, tasks, attempt, round_, worker, started_s, ended_s, *states, retried = result
            succeeded, failed, cancelled = states
            number = workers.get(worker)
            if number is None:
                number = workers[worker] = len(self.workers)
                self.workers.append(worker)
            self._seqs.append(seq)
            self._firsts.append(tasks[0][0])
            self._lasts.append(tasks[-1][1] - 1)
            self._tasks.append(count := _count(tasks))
            self._stage_of.append(self._stage_numbers[stage])
            self._attempts.append(attempt)
            self._rounds.append(round_)
            self._worker_of.append(number)
            self._results.append(worst := 3 if failed else 2 if cancelled else 1 if retried else 0)
            self._started_s.append(started_s)
            self._ended_s.append(ended_s)
            begin_s = min(max(started_s, self._submitted_s), now_s)
            self.buckets.add(number, begin_s, min(max(ended_s, begin_s), now_s), count, worst)
            if succeeded:
                self.succeeded += _count(succeeded)
                self._put(stage, TaskState.SUCCEEDED, succeeded, row)
            if failed:
                self._put(stage, TaskState.FAILED, self._remaining(result, failed), row)
            if cancelled:
                self._put(stage, TaskState.CANCELLED, self._remaining(result, cancelled), row)
            self.seq = seq
            row += 1

    def _remaining(self, result: BundleResult, tasks: TaskRanges) -> TaskRanges:
        tried = TaskSet(tuple([(start, stop) for start, stop in tasks]))
        return self.retried.remaining(result.round, result.stage, tried).ranges

    def _put(self, stage: StageName, state: TaskState, tasks: TaskRanges, row: int) -> None:
        if not tasks:
            return
        key = stage, state
        segments = self._segments.get(key)
        if segments is None:
            segments = self._segments[key] = []
        elif tasks[0][0] < segments[-1][0]:
            self._unsorted.add(key)
        for start, stop in tasks:
            segments.append((start, stop, row))

    def segments(self, stage: StageName, state: TaskState) -> Sequence[tuple[int, int, int]]:
        """Return the ranges of the stage's tasks with a result, sorted, each with the number of its bundle."""
        key = stage, state
        segments = self._segments.get(key, [])
        if key in self._unsorted:
            segments.sort()
            self._unsorted.discard(key)
        return segments

    def tasks(self, stage: StageName, state: TaskState) -> TaskSet:
        return TaskSet.union([TaskSet(((start, stop),)) for start, stop, _ in self.segments(stage, state)])

    def bundle(self, row: int) -> IndexedBundle:
        """Return the row of a bundle by its number."""
        return IndexedBundle(
            self._stages[self._stage_of[row]],
            self._firsts[row],
            self._lasts[row],
            self._tasks[row],
            self._attempts[row],
            self._rounds[row],
            self._seqs[row],
            self.workers[self._worker_of[row]],
            self._started_s[row],
            self._ended_s[row],
            RESULTS[self._results[row]],
        )

    def workers_with(self, text: str) -> frozenset[int]:
        """Return the numbers of the workers whose names contain `text`."""
        return frozenset(number for number, name in enumerate(self.workers) if text in name)

    def worker_of(self, row: int) -> int:
        return self._worker_of[row]

    def attempt_seq(self, stage: StageName, task: int, attempt: int) -> int:
        """Return the seq of the last outcome with this attempt of the task, or 0 if no outcome has the attempt."""
        wanted = self._stage_numbers[stage]
        for row in reversed(range(len(self))):
            if (
                self._firsts[row] <= task <= self._lasts[row]
                and self._stage_of[row] == wanted
                and self._attempts[row] == attempt
            ):
                return self._seqs[row]
        return 0

    def keep_figures(self, seq: int, task: int, figures: Figures) -> None:
        """Cache the figures of a task, and drop the oldest figures above the limit."""
        self.figures[seq, task] = figures
        while len(self.figures) > MAX_FIGURES:
            del self.figures[next(iter(self.figures))]


def _count(tasks: TaskRanges) -> int:
    count = 0
    for start, stop in tasks:
        count += stop - start
    return count


def _place(segments: Sequence[tuple[int, int, int]], task: int) -> int:
    """Return the position of the segment that contains the task, or else of the next segment."""
    place = bisect_right(segments, task, key=lambda segment: segment[0]) - 1
    return place if place >= 0 and segments[place][1] > task else place + 1


@dataclass(frozen=True)
class TaskList:
    """Tasks of a job at one moment.

    `planned` has the number of tasks of each stage, or None if the number is unknown. `running` has the bundles that
    workers run, by stage.
    """

    job: JobDef
    index: TaskIndex
    planned: Mapping[StageName, int | None]
    has_ended: bool
    running: Mapping[StageName, Sequence[RunningBundle]] = field(default_factory=dict)

    def tasks(
        self,
        stages: Collection[StageName],
        state: TaskState | None = None,
        worker: str = "",
        begin: tuple[StageName, int] | None = None,
    ) -> Iterator[ListedTask]:
        """Yield the tasks of the stages from the task `begin` on.

        `state` selects tasks in one state, and `worker` selects tasks whose worker's name contains this text.
        """
        numbers = self.index.workers_with(worker) if worker else frozenset()
        is_reached = begin is None
        for stage in self.job.stages:
            is_first = begin is not None and stage.name == begin[0]
            is_reached = is_reached or is_first
            if not is_reached or stage.name not in stages:
                continue
            first = begin[1] if begin is not None and is_first else 0
            running = self.running.get(stage.name, ())
            for start, stop, found, ref in self._segments(stage, first, state):
                run = running[ref] if found is TaskState.RUNNING else None
                row = ref if run is None else -1
                has_worker = worker in run.worker if run else row >= 0 and self.index.worker_of(row) in numbers
                if worker and not has_worker:
                    continue
                for task in range(start, stop):
                    yield ListedTask(stage.name, task, found, row, run)

    def state(self, stage: StageName, task: int) -> ListedTask | None:
        """Return the task with its state, or None if the stage does not have the task."""
        found = next(self.tasks([stage], begin=(stage, task)), None)
        return found if found and found.task == task else None

    def _segments(self, stage: StageDef, first: int, state: TaskState | None) -> Iterator[_Segment]:
        if state in (TaskState.SUCCEEDED, TaskState.FAILED):
            yield from self._indexed(stage.name, first, state)
        elif state is TaskState.RUNNING:
            yield from self._running(stage.name, first)
        else:
            yield from (one for one in self._every(stage, first) if state in (None, one[2]))

    def _indexed(self, stage: StageName, first: int, state: TaskState) -> Iterator[_Segment]:
        segments = self.index.segments(stage, state)
        for place in range(_place(segments, first), len(segments)):
            start, stop, row = segments[place]
            yield max(start, first), stop, state, row

    def _running(self, stage: StageName, first: int) -> Iterator[_Segment]:
        found = [
            (max(start, first), stop, TaskState.RUNNING, number)
            for number, running in enumerate(self.running.get(stage, ()))
            for start, stop in running.bundle.tasks.ranges
            if stop > first
        ]
        at = first
        for start, stop, state, number in sorted(found):
            if stop > at:  # a task that two workers run is listed once
                yield max(start, at), stop, state, number
                at = stop

    def _every(self, stage: StageDef, first: int) -> Iterator[_Segment]:
        """Yield all segments of a stage. A gap between the segments contains tasks without a result and worker."""
        lost = self._lost(stage)
        known = merge(
            self._indexed(stage.name, first, TaskState.SUCCEEDED),
            self._indexed(stage.name, first, TaskState.FAILED),
            self._indexed(stage.name, first, TaskState.CANCELLED),
            self._running(stage.name, first),
            ((max(start, first), stop, TaskState.CANCELLED, -1) for start, stop in lost.ranges if stop > first),
        )
        rest = TaskState.CANCELLED if self.has_ended else TaskState.WAITING
        at = first
        for start, stop, state, ref in known:
            if start > at:
                yield at, start, rest, -1
            if stop > at:
                yield max(start, at), stop, state, ref
                at = stop
        if at < (planned := self.planned.get(stage.name) or 0):
            yield at, planned, rest, -1

    def _lost(self, stage: StageDef) -> TaskSet:
        """Return the tasks of a chained stage that cannot run, because the task before failed or was canceled."""
        if not stage.chained or self.has_ended:
            return TaskSet()
        before = self.job.stage(stage.after[0])
        results = [self.index.tasks(before.name, state) for state in (TaskState.FAILED, TaskState.CANCELLED)]
        return TaskSet.union([*results, self._lost(before)])
