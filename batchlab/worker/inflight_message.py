"""Data that the parts of a worker share: identity, settings, slots, and in-flight messages.

The worker's loop selects, commits, and forwards bundles, and a Runner runs their tasks. The same worker loop works with
warm child processes, with real handlers inside the simulator, and with simulated durations.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, Json, Ran
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Message, Objects, Queue, Replies
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey
from batchlab.core.service_settings import WorkerSettings
from batchlab.core.tracing import NO_TRACER, Tracer

if TYPE_CHECKING:
    from batchlab.worker.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Work:
    """One execution of a bundle, with everything that a runner needs.

    `items` has one input for each index in `bundle.tasks`. Items are encoded values (`protocol.values`): inline JSON,
    or references to objects that the runner fetches. The first task of the bundle always starts, and no further task
    starts after `budget_s`. All tasks run if `budget_s` is None.
    """

    job: JobDef
    stage: StageDef
    bundle: Bundle
    execution: str
    items: Sequence[Json]
    budget_s: float | None = None
    key: CommitKey = UNSEALED
    """Commit key of the job, which seals the names of files and logs."""
    gpus: tuple[int, ...] = ()
    """Numbers of the instance's GPUs that the tasks of the bundle use."""


@dataclass(frozen=True, slots=True)
class Peek:
    """Recent output of a running task, from byte `start` of the execution's log.

    The output of the task begins at byte `log_at`.
    """

    task: int
    log_at: int
    start: int
    data: bytes


@dataclass(slots=True)
class Handle:
    """Control of one `Runner.run`, which the worker and the runner share.

    The worker sets `stop`, `kill`, and `until_s`. No further task starts after `stop` is set. The runner kills the
    running task after `kill` is set, and yields no `Ran` for the killed task. No task starts after the monotonic time
    `until_s`, which increases with each read of the job's control object.

    The runner sets the fields other than `stop`, `kill`, and `until_s`. `running` is the running task, or None between
    tasks. At the end of the run, the runner sets `log` and `log_spans` (see `Outcome`). `peek(n)` returns at most the
    last n bytes of the running task's output, or None between tasks. `peek` is None without a log.
    """

    stop: bool = False
    kill: bool = False
    running: int | None = None
    until_s: float = math.inf
    log: str = ""
    log_spans: list[tuple[int, int, int]] = field(default_factory=list)
    peek: Callable[[int], Peek | None] | None = None

    def end(self) -> None:
        """Stop the run and kill the running task."""
        self.stop = self.kill = True


class Runner(Protocol):
    """Runner of the tasks of bundles."""

    def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """Run the tasks of a bundle in order, one at a time, and yield each result soon after its task ends.

        A run ends early after `handle.stop`, after `handle.kill`, or when the time budget is used up. If `run` does not
        yield a result for a task, the task did not run to its end. An error of user code becomes a Failure in the
        task's result. A BackendError of a port propagates to the worker, which then returns the bundle to the queue.
        """

    async def close(self) -> None:
        """Kill every child process and remove scratch files."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Scratch folders of one instance: unpacked code by digest, and one folder per execution."""

    root: Path

    def code(self, digest: str) -> Path:
        return self.root / "code" / digest

    def execution(self, name: str) -> Path:
        return self.root / "run" / name


@dataclass(slots=True)
class InflightMessage:
    """In-flight message of a worker, from the receive of the message to its delete.

    The times of an in-flight message are monotonic. `receipt` is None if the worker must not delete the message.
    `receipt` is None after a watchdog message has replaced the message, or after the worker has returned the message to
    the queue.
    """

    queue: str
    message: Message
    task: TaskMessage
    execution: str
    received_s: float
    extend_at_s: float
    """Monotonic time when the worker extends the visibility timeout of the message."""
    receipt: str | None
    visible_at_s: float = math.inf
    """Monotonic time when the visibility timeout of the message ends if the worker does not extend it."""
    key: CommitKey = UNSEALED
    """Commit key of the job, set after the key has been verified."""
    definition: JobDef | None = None
    """Job of the message, set after the worker has read the job's definition."""
    items: Sequence[Json] | None = None
    """Inputs of the bundle's tasks. None stands for inputs that follow-ups must look up."""
    started_s: float = 0.0
    """Start of the run in seconds since the epoch, or 0 before the start."""
    ran: list[Ran] = field(default_factory=list)
    """Results of the tasks that have ended."""
    control: Control = Control.RUN
    handle: Handle = field(default_factory=Handle)
    waiting: asyncio.Future[bool] | None = None
    slots: int = 1
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs that the bundle holds."""
    alone: bool = False
    """Whether the next start decides if the task is poison, so that the task must run alone."""
    running: bool = False
    committing: bool = False
    reported: bool = False
    """Whether the event of the bundle's committed outcome is being sent or has been sent."""
    replied: bool = False
    """Whether the client of a direct call has the committed outcome."""
    shedding: bool = False
    """Whether the tasks behind the running task are being handed off, or have been handed off."""
    part: Bundle | None = None
    """Remaining part of the message's bundle after the other tasks were handed off."""
    trace: str = ""
    """Parent (a traceparent) of the message's spans, or "" if the message's job is not traced."""
    marked_s: float | None = None
    """Time of the last refresh of the running marker, for a long-running bundle."""
    handed_over: bool = False
    """Whether the watchdog message has been sent."""
    outcome_read_s: float = -math.inf
    """Monotonic time of the last check for another worker's outcome. A worker without a receipt makes this check."""
    is_superseded: bool = False
    """Whether another worker has committed the bundle, so that this worker stops its run."""

    @property
    def bundle(self) -> Bundle:
        return self.part or self.task.bundle

    @property
    def is_copy(self) -> bool:
        """Return whether the message is a speculative copy of a bundle that another worker holds."""
        return self.task.copy_s is not None

    @property
    def is_handing_off(self) -> bool:
        """Return whether the worker is committing the outcome of handed-off tasks."""
        return self.shedding and self.part is None

    @property
    def job(self) -> JobDef:
        assert self.definition is not None
        return self.definition

    @property
    def stage(self) -> StageDef:
        return self.job.stage(self.task.bundle.stage)

    def has_lapsed(self, now_s: float) -> bool:
        """Return whether the queue has delivered the message to another receiver, or will do so soon. `now_s` is a
        monotonic time."""
        return not self.handed_over and (self.receipt is None or now_s >= self.visible_at_s)

    def narrow(self, part: Bundle) -> None:
        """Continue with `part` of the bundle after the other tasks have been handed off."""
        if self.items is not None:
            pairs = zip(self.bundle.tasks, self.items, strict=True)
            self.items = [item for task, item in pairs if task in part.tasks]
        self.part = part

    @property
    def returned_bundle(self) -> Bundle:
        """Bundle of a fresh copy of the message, which counts earlier receives of the message as losses."""
        return replace(self.bundle, losses=self.bundle.losses + self.message.receive_count - 1)

    @property
    def suspicion(self) -> int:
        """Number of earlier deliveries of the bundle that ended without an outcome. Deliveries of a speculative copy do
        not count, because a worker may return a copy."""
        if self.is_copy:
            return 1
        again = self.message.receive_count - 1
        return self.bundle.losses + again + (1 if self.task.watchdog else 0)


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a worker. `worker` is a new id at every start, and `instance` is the id of the worker's machine."""

    worker: str
    instance: str
    pool: str
    slots: int
    key: str = field(default="", repr=False)
    """Random secret of the instance. The manager identifies its workers by the secret of their instance."""
    gpus: int = 0


@dataclass(slots=True)
class WorkerContext:
    """Ports, settings, and in-flight messages that all parts of a worker share."""

    who: Identity
    objects: Objects
    queue: Queue
    clock: Clock
    patience: Patience
    settings: WorkerSettings
    outbox: Outbox
    tracer: Tracer = NO_TRACER
    inflight: dict[str, InflightMessage] = field(default_factory=dict)
    """In-flight messages by execution id."""
    replies: Replies | None = None
    """Replies to clients on this machine, or None if clients run on other machines."""


@dataclass(slots=True, eq=False)
class _Request:
    slots: int
    gpus: int
    future: asyncio.Future[bool]


class Slots:
    """Task slots and GPUs of an instance. Requests are granted in the order of their arrival.

    A small request does not overtake a large request, because a stage that needs all slots would starve. Only a request
    without GPUs overtakes requests that wait for GPUs. When a GPU is free, no request overtakes the first request that
    needs the GPU, so the first request gets the next free slots.
    """

    def __init__(self, total: int, gpus: int = 0) -> None:
        self.total = total
        self.free = total
        self.gpus = gpus
        self.free_gpus = list(range(gpus))
        """Numbers of the GPUs that no bundle holds, in order."""
        self._requests: deque[_Request] = deque()
        self._granted: dict[asyncio.Future[bool], tuple[int, ...]] = {}

    def request(self, count: int, gpus: int = 0) -> asyncio.Future[bool]:
        """Return a future that becomes True when the caller has `count` slots, at most `total`, and `gpus` GPUs.

        `take` returns the numbers of the GPUs. `gpus` must not exceed the number of the instance's GPUs.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._requests.append(_Request(min(count, self.total), gpus, future))
        self._grant()
        return future

    def take(self, request: asyncio.Future[bool]) -> tuple[int, ...]:
        """Return the GPUs of a granted request."""
        return self._granted.pop(request, ())

    def release(self, count: int, gpus: Sequence[int] = ()) -> None:
        self.free += min(count, self.total)
        if gpus:
            self.free_gpus = sorted([*self.free_gpus, *gpus])
        self._grant()

    def refuse(self, request: asyncio.Future[bool]) -> None:
        """Resolve a request with False, unless its slots are already granted."""
        if not request.done():
            request.set_result(False)
            self._grant()

    def _grant(self) -> None:
        waiting = 0  # Number of requests at the head of the queue that wait for GPUs.
        while waiting < len(self._requests):
            request = self._requests[waiting]
            if request.future.done():  # A finished future in the queue belongs to a refused request.
                del self._requests[waiting]
                continue
            if request.gpus and (waiting or request.gpus > len(self.free_gpus)):
                waiting += 1
                continue
            if request.slots > self.free:
                return
            del self._requests[waiting]
            self.free -= request.slots
            if request.gpus:
                self._granted[request.future] = tuple(self.free_gpus[: request.gpus])
                del self.free_gpus[: request.gpus]
            request.future.set_result(True)
