"""Index of a job's tasks and bundles, built from the ledger's rows of bundles.

Invariants: the index uses each row of the ledger once, and does not use outcomes. The memory of the index grows with
the number of bundles and not with the number of tasks. A query begins at a given task, so a page late in a list takes
as long as the first page.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import merge
from typing import NamedTuple

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, StageName, TaskMetrics, TaskSet
from batchlab.core.ports import BundleRecord
from batchlab.manager.retry_rounds import RetriedTasks

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
_RESULTS = ("succeeded", "retried", "cancelled", "failed")
"""Results of bundles, from the best to the worst."""


class TaskIndex:
    """Index of the ended tasks of a job's round, which reads the ledger up to the seq `seq`."""

    def __init__(self, job: JobDef, retried: RetriedTasks) -> None:
        self.retried = retried
        self.seq = 0
        self.succeeded = 0
        self.lock = asyncio.Lock()
        """Lock that is held while the ledger is read."""
        self.figures: dict[tuple[int, int], Figures] = {}
        """Figures of recently listed tasks by the seq of the outcome and the task, for the next page or update."""
        self.workers: list[str] = []
        self._worker_numbers: dict[str, int] = {}
        self._stages = [stage.name for stage in job.stages]
        self._stage_numbers = {name: number for number, name in enumerate(self._stages)}
        self._whole = {name: array("q") for name in ("first", "last", "tasks", "seq")}
        self._small = {name: array("l") for name in ("stage", "attempt", "round", "worker", "state")}
        self._times = {name: array("d") for name in ("started_s", "ended_s")}
        self._segments: dict[tuple[StageName, TaskState], list[tuple[int, int, int]]] = {}
        self._unsorted: set[tuple[StageName, TaskState]] = set()

    def __len__(self) -> int:
        return len(self._whole["seq"])

    def add(self, record: BundleRecord) -> None:
        """Add a folded bundle. The bundles must be added in the order of their seq."""
        bundle, done = record.bundle, record.completion
        if done is None or record.seq is None:
            return
        self.seq = record.seq
        number = self._worker_numbers.setdefault(done.worker, len(self.workers))
        if number == len(self.workers):
            self.workers.append(done.worker)
        state = 3 if done.failed else 2 if done.cancelled else 1 if done.retried else 0
        whole, small, times = self._whole, self._small, self._times
        row = len(self)
        for column, value in zip(
            whole.values(), (bundle.tasks.first, bundle.tasks.last, len(bundle.tasks), record.seq), strict=True
        ):
            column.append(value)
        place = self._stage_numbers[bundle.stage]
        for column_, value in zip(small.values(), (place, bundle.attempt, bundle.round, number, state), strict=True):
            column_.append(value)
        times["started_s"].append(done.started_s)
        times["ended_s"].append(done.ended_s)
        self.succeeded += len(done.succeeded)
        self._put(bundle.stage, TaskState.SUCCEEDED, done.succeeded, row)
        if done.failed:
            self._put(bundle.stage, TaskState.FAILED, self.retried.remaining(bundle, done.failed), row)
        if done.cancelled:
            self._put(bundle.stage, TaskState.CANCELLED, self.retried.remaining(bundle, done.cancelled), row)

    def _put(self, stage: StageName, state: TaskState, tasks: TaskSet, row: int) -> None:
        if not tasks:
            return
        key = stage, state
        segments = self._segments.setdefault(key, [])
        if segments and tasks.first < segments[-1][0]:
            self._unsorted.add(key)
        segments += [(start, stop, row) for start, stop in tasks.ranges]

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
        whole, small, times = self._whole, self._small, self._times
        return IndexedBundle(
            self._stages[small["stage"][row]],
            whole["first"][row],
            whole["last"][row],
            whole["tasks"][row],
            small["attempt"][row],
            small["round"][row],
            whole["seq"][row],
            self.workers[small["worker"][row]],
            times["started_s"][row],
            times["ended_s"][row],
            _RESULTS[small["state"][row]],
        )

    def workers_with(self, text: str) -> frozenset[int]:
        """Return the numbers of the workers whose names contain `text`."""
        return frozenset(number for number, name in enumerate(self.workers) if text in name)

    def worker_of(self, row: int) -> int:
        return self._small["worker"][row]

    def by_start(self) -> list[int]:
        """Return the numbers of all rows, sorted by the start of the bundle."""
        return sorted(range(len(self)), key=self._times["started_s"].__getitem__)

    def find(self, stage: StageName, task: int) -> int:
        """Return the number of the bundle with the task's result, or -1 if the task has no result."""
        for state in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED):
            segments = self.segments(stage, state)
            place = _place(segments, task)
            if place < len(segments) and segments[place][0] <= task < segments[place][1]:
                return segments[place][2]
        return -1

    def attempt_seq(self, stage: StageName, task: int, attempt: int) -> int:
        """Return the seq of the last outcome with this attempt of the task, or 0 if no outcome has the attempt."""
        wanted = self._stage_numbers[stage]
        stages, attempts = self._small["stage"], self._small["attempt"]
        first, last = self._whole["first"], self._whole["last"]
        for row in reversed(range(len(self))):
            if first[row] <= task <= last[row] and stages[row] == wanted and attempts[row] == attempt:
                return self._whole["seq"][row]
        return 0

    def keep_figures(self, seq: int, task: int, figures: Figures) -> None:
        """Cache the figures of a task, and drop the oldest figures above the limit."""
        self.figures[seq, task] = figures
        while len(self.figures) > MAX_FIGURES:
            del self.figures[next(iter(self.figures))]


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
