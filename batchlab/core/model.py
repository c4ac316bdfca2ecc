"""Frozen values of the grid's domain, and the transitions between states of a job.

Invariant: the functions of this module do no I/O and do not depend on the backend. The values of the domain are in one
file because all other code uses them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice, pairwise
from typing import Any, NamedTuple, NewType

JobId = NewType("JobId", str)
StageName = NewType("StageName", str)
BundleId = NewType("BundleId", str)

Json = Any
"""A JSON value (None, bool, int, float, str, or a list or dict of JSON values)."""


class JobState(StrEnum):
    """Job states that a user sees.

    Job states have the names of AWS Batch's job states if AWS Batch has a matching state.
    """

    SCHEDULED = "SCHEDULED"
    SUBMITTED = "SUBMITTED"
    PENDING = "PENDING"
    RUNNABLE = "RUNNABLE"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_ACTIVE = frozenset({JobState.PENDING, JobState.RUNNABLE, JobState.STARTING, JobState.RUNNING, JobState.PAUSED})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.SUBMITTED, JobState.CANCELLED}),
    JobState.SUBMITTED: _ACTIVE | ENDED,
    **{state: (_ACTIVE | ENDED) - {state} for state in _ACTIVE},
    # A retry reopens the tasks that did not succeed, so a job that succeeded cannot be retried.
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.PENDING}),
    JobState.CANCELLED: frozenset({JobState.PENDING}),
}


def may_move(before: JobState, after: JobState) -> bool:
    """Return whether a job may change from `before` to `after`."""
    return after in MOVES[before]


class Control(StrEnum):
    """Command to the workers in a job's control object."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Sorted set of task indices as disjoint half-open ranges.

    A set of 10⁷ consecutive task indices is stored as one range.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        last = -1
        for start, stop in self.ranges:
            if start <= last or stop <= start:
                raise ValueError(f"ranges must be sorted, disjoint and not touch: {self.ranges}")
            last = stop

    @classmethod
    def span(cls, start: int, stop: int) -> TaskSet:
        """Return all indices from `start` up to but not including `stop`."""
        return cls(((start, stop),)) if stop > start else cls()

    @classmethod
    def from_indices(cls, indices: Iterable[int]) -> TaskSet:
        """Return the set of the given indices, which may be unordered and repeated."""
        ordered = sorted(set(indices))
        if not ordered:
            return cls()
        if ordered[-1] - ordered[0] == len(ordered) - 1:
            return cls(((ordered[0], ordered[-1] + 1),))
        cuts = [i for i, (a, b) in enumerate(pairwise(ordered), start=1) if b != a + 1]
        edges = [0, *cuts, len(ordered)]
        return cls(tuple((ordered[a], ordered[b - 1] + 1) for a, b in pairwise(edges)))

    @classmethod
    def union(cls, sets: Iterable[TaskSet]) -> TaskSet:
        """Return the set of all task indices that are in at least one of `sets`."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(pair for task_set in sets for pair in task_set.ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    def __len__(self) -> int:
        count = 0
        for start, stop in self.ranges:  # a generator expression would take three times as long as a loop
            count += stop - start
        return count

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.ranges:
            yield from range(start, stop)

    def __contains__(self, index: object) -> bool:
        return any(start <= index < stop for start, stop in self.ranges) if isinstance(index, int) else False

    def __sub__(self, other: TaskSet) -> TaskSet:
        left: list[tuple[int, int]] = []
        # A small set minus a large set takes a search in the large set, and not a pass over all of its ranges.
        before = bisect_right(other.ranges, self.ranges[0]) - 1 if self.ranges else 0
        holes = islice(other.ranges, max(0, before), None)
        hole = next(holes, None)
        for start, stop in self.ranges:
            while hole and hole[1] <= start:
                hole = next(holes, None)
            while hole and hole[0] < stop:
                if hole[0] > start:
                    left.append((start, hole[0]))
                start = hole[1]
                if hole[1] >= stop:
                    break
                hole = next(holes, None)
            if start < stop:
                left.append((start, stop))
        return TaskSet(tuple(left))

    def __and__(self, other: TaskSet) -> TaskSet:
        return self - (self - other)

    @property
    def first(self) -> int:
        return self.ranges[0][0]

    @property
    def last(self) -> int:
        return self.ranges[-1][1] - 1

    def split_at(self, count: int) -> tuple[TaskSet, TaskSet]:
        """Return the set of the first `count` task indices, and the set of the remaining task indices."""
        head: list[tuple[int, int]] = []
        for i, (start, stop) in enumerate(self.ranges):
            if count <= 0:
                return TaskSet(tuple(head)), TaskSet(self.ranges[i:])
            if stop - start <= count:
                head.append((start, stop))
                count -= stop - start
            else:
                head.append((start, start + count))
                return TaskSet(tuple(head)), TaskSet(((start + count, stop), *self.ranges[i + 1 :]))
        return self, TaskSet()

    def halves(self) -> tuple[TaskSet, TaskSet]:
        """Return two parts of the set whose sizes differ by at most 1, with the larger part first."""
        return self.split_at((len(self) + 1) // 2)


class _Named:
    """Cache of a bundle's id, which is read often.

    The cache is not a field, so the cache is not compared, not part of the repr, and not pickled.
    """

    __slots__ = ("_id",)
    _id: BundleId


@dataclass(frozen=True, slots=True)
class Bundle(_Named):
    """A set of tasks of one stage that is sent as one message.

    `round` counts the user's own `job retry` calls. `attempt` counts the automatic retries within one round, from 1.
    `losses` counts earlier deliveries of the bundle that ended without an outcome. If `losses` is not 0, the next
    worker checks the bundle for poison tasks (see `worker.poison_detection`). `losses` is not part of the bundle's
    identity. `source` is the upstream bundle whose outcome has the inputs, or None if the plan has the inputs. In a
    retry, `source` may name a mended input instead (see `protocol.mended_inputs`). `due_s` (epoch) is the end of a
    retry's backoff. A manager that sends the bundle again waits until `due_s`.
    """

    job: JobId
    stage: StageName
    tasks: TaskSet
    attempt: int = 1
    round: int = 0
    losses: int = 0
    source: BundleId | None = None
    due_s: float | None = None

    @property
    def id(self) -> BundleId:
        """Return the bundle's id, which is derived from the fields of the bundle.

        Two bundles of a stage never have the same id. Two bundles of a stage with the same round and attempt share a
        task only if one bundle consists of the first or the last tasks of the other bundle. Therefore the round, the
        attempt, the first task, and the last task identify a bundle of a stage.
        """
        try:
            return self._id
        except AttributeError:
            ranges = self.tasks.ranges
            first, last = ranges[0][0], ranges[-1][1] - 1
            name = BundleId(f"{first:08d}-{last:08d}.{self.round}.{self.attempt}")
            object.__setattr__(self, "_id", name)
            return name


class FailureKind(StrEnum):
    """Kinds of failures of an attempt. A retry rule names the kinds of failures after which a task is retried."""

    EXCEPTION = "exception"
    EXIT = "exit"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"
    INPUT = "input"
    RESULT = "result"
    IMPORT = "import"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt of a task.

    `final` is true if the attempt is not retried. `reason` is one sentence for a person. Failures are grouped by
    `error`, which is the exception's class name or a similar name. `exit_code` is negative if a signal ended the
    process. `pickled` is the pickled exception of a task of the Python API in base64, or "". The text `@N` stands for
    an exception of the same type as that of task N. Only the caller of the job unpickles it.
    """

    task: int
    kind: FailureKind
    reason: str
    error: str = ""
    traceback: str = ""
    exit_code: int | None = None
    run_s: float = 0.0
    final: bool = True
    pickled: str = ""


class TaskMetrics(NamedTuple):
    """Measured figures of one attempt of a task, as the worker reports them. None means that a figure is unknown.

    `cpu_s` is the CPU time in seconds, including programs that the task waited for. `memory_bytes` is the peak of the
    resident memory. `input_bytes` and `output_bytes` are the sizes of the task's input and result with their files.
    `input` is the name of the task's first input file, or "" if the input does not have a file.
    """

    cpu_s: float | None = None
    memory_bytes: int | None = None
    input_bytes: int | None = None
    output_bytes: int | None = None
    input: str = ""


class Ran(NamedTuple):
    """Result of one attempt of a task.

    If `failure` is None, the task succeeded with `value`. A task's `value` is encoded, and large values and files are
    already in the object store. The class `Ran` is a tuple for speed, because a job may have 10⁷ results.
    """

    task: int
    run_s: float
    value: Json = None
    failure: Failure | None = None
    metrics: TaskMetrics | None = None


@dataclass(frozen=True, slots=True)
class Follow:
    """A bundle that follows from an outcome, and the delay before the bundle may start."""

    bundle: Bundle
    delay_s: float = 0.0


class _Written:
    """Cache of an outcome's JSON (see `json_format.outcome_text`), which is used three times.

    The cache is not a field, so the cache is not compared, not part of the repr, and not pickled.
    """

    __slots__ = ("_text",)
    _text: str


@dataclass(frozen=True, slots=True)
class Outcome(_Written):
    """Result of one execution of a bundle, which the worker commits with a conditional PUT.

    `values` has the encoded results and `run_s` has the run times in seconds of the tasks in `succeeded`, in order.
    Tasks of the bundle that are not in `succeeded`, `failed`, or `cancelled` are in one of `follows`. `execution` is
    part of the keys of the execution's files and logs.
    """

    bundle: Bundle
    execution: str
    worker: str
    started_s: float
    ended_s: float
    succeeded: TaskSet = TaskSet()
    values: tuple[Json, ...] = ()
    run_s: tuple[float, ...] = ()
    failed: tuple[Failure, ...] = ()
    cancelled: TaskSet = TaskSet()
    follows: tuple[Follow, ...] = ()
    log: str = ""
    log_spans: tuple[tuple[int, int, int], ...] = ()
    """Position in the log object of the output of each task, as (task, first byte, last byte + 1)."""
    metrics: tuple[tuple[int, TaskMetrics], ...] = ()
    """Tasks with measured attempts, each with its metrics. Short attempts are not measured."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An outcome without its values. Workers send completions to the events queue, and the ledger folds the
    completions.
    """

    bundle: Bundle
    worker: str
    started_s: float
    ended_s: float
    succeeded: TaskSet
    failed: TaskSet
    cancelled: TaskSet
    run_s: float
    follows: tuple[Follow, ...] = ()
    retried: int = 0
    """Number of failed attempts in the outcome that are retried."""


@dataclass(frozen=True, slots=True)
class StageCounts:
    """Counters of a stage in the ledger. `planned` is None until the stage's plan is committed."""

    stage: StageName
    planned: int | None = None
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    run_s: float = 0.0
    """Total run time in seconds of the tasks that succeeded."""
    first_start_s: float | None = None
    last_end_s: float | None = None

    @property
    def terminal(self) -> int:
        return self.succeeded + self.failed + self.cancelled

    @property
    def ended(self) -> bool:
        return self.planned is not None and self.terminal >= self.planned

    @property
    def mean_s(self) -> float | None:
        """Return the mean run time of a task in seconds, or None before the first success."""
        return self.run_s / self.succeeded if self.succeeded else None


class LifecycleState(StrEnum):
    """Lifecycle states of an instance, with the names that EC2 Auto Scaling uses."""

    PENDING = "Pending"
    PENDING_WAIT = "Pending:Wait"
    PENDING_PROCEED = "Pending:Proceed"
    IN_SERVICE = "InService"
    ENTERING_STANDBY = "EnteringStandby"
    STANDBY = "Standby"
    WARMED_PENDING = "Warmed:Pending"
    WARMED_PENDING_WAIT = "Warmed:Pending:Wait"
    WARMED_PENDING_PROCEED = "Warmed:Pending:Proceed"
    WARMED_RUNNING = "Warmed:Running"
    WARMED_STOPPED = "Warmed:Stopped"
    WARMED_HIBERNATED = "Warmed:Hibernated"
    TERMINATING = "Terminating"
    TERMINATING_WAIT = "Terminating:Wait"
    TERMINATING_PROCEED = "Terminating:Proceed"
    TERMINATED = "Terminated"


class Market(StrEnum):
    """Purchase options of an instance, with the names that EC2 uses."""

    ON_DEMAND = "on-demand"
    SPOT = "spot"


@dataclass(frozen=True, slots=True)
class Machine:
    """Type, zone, and market that a group chose for an instance.

    A field is empty if the group did not choose a value for the field.
    """

    type: str = ""
    """Name of an instance type in the catalog."""
    zone: str = ""
    """Availability zone."""
    market: Market = Market.ON_DEMAND


@dataclass(frozen=True, slots=True)
class Instance:
    """One member of an Auto Scaling group."""

    id: str
    pool: str
    state: LifecycleState
    launched_s: float
    healthy: bool = True
    protected: bool = False
    """Scale-in protection: the group does not terminate a protected instance when the desired capacity falls."""
    note: str = ""
    machine: Machine = Machine()


@dataclass(frozen=True, slots=True)
class Activity:
    """One scaling activity with its cause. Lists of activities have the newest activity first."""

    id: int
    pool: str
    at_s: float
    description: str
    cause: str
    status: str = "Successful"
    ended_s: float | None = None
    """End of the activity, or None while the activity is in progress."""
    message: str = ""
    """Reason why the activity failed, or "" if the activity did not fail."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A named Auto Scaling group of identical workers."""

    name: str
    min_size: int = 0
    max_size: int = 2
    slots: int = 1
    """Task slots per instance."""
    boot_s: float = 0.0
    """Expected time in seconds from launch to InService. `boot_s` is only a forecast and does not delay an instance."""
    env: tuple[tuple[str, str], ...] = field(default=())
    instance_type: str = ""
    """Name of an instance type in the catalog, or "" if the backend does not have instance types."""
    gpus: int = 0
    """GPUs per instance."""
    image: str = ""
    """Container image in which the pool's workers run, or "" for the backend's own environment."""


@dataclass(frozen=True, slots=True)
class GroupView:
    """Description of an Auto Scaling group."""

    pool: Pool
    desired: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True, slots=True)
class ScheduledEnd:
    """Result of a change of a group's scheduled action.

    `existed` is True if the group had the action before. `problem` is a sentence about a suspended process of the
    group, or "". The group does not perform the action if `is_performed` is False.
    """

    existed: bool
    problem: str = ""
    is_performed: bool = True
