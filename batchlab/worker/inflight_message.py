"""In-flight message of a worker, from its receive to its delete.

Interface between the worker's protocol and the code that runs tasks.

The worker's loop selects, commits, and forwards bundles. A Runner only runs them. The same loop
works with warm child processes, real handlers inside the simulator, and simulated durations.

Time settings of a worker, which a backend sets in its descriptor.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, Json, Ran
from batchlab.core.ports import MAX_VISIBILITY_S, Message
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey


@dataclass(frozen=True, slots=True)
class Work:
    """One execution of a bundle, ready to run. `items` has one input per index of `bundle.tasks`.

    Items are encoded values (`protocol.values`): inline JSON, or references to objects that the
    runner fetches. After `budget_s`, no further task starts; the first task always starts. With
    None, all tasks run.
    """

    job: JobDef
    stage: StageDef
    bundle: Bundle
    execution: str
    items: Sequence[Json]
    budget_s: float | None = None
    key: CommitKey = UNSEALED
    """The commit key of the job, which seals the names of files and logs."""


@dataclass(frozen=True, slots=True)
class Peek:
    """Recent output of a running task, from byte `start` of the execution's log. The output of the
    task begins at byte `log_at`."""

    task: int
    log_at: int
    start: int
    data: bytes


@dataclass(slots=True)
class Handle:
    """Control of one `Runner.run`, shared by the worker and the runner.

    The worker sets three fields. No task starts after `until_s` (monotonic), which moves on with
    each read of the job's control object. With `stop`, no further task starts. With `kill`, the
    running task is also killed and yields no `Ran`.

    The runner sets the others. `running` is the running task, None between tasks. `log` and
    `log_spans` are set at the end of the run (see `Outcome`). `peek(n)` returns at most the last n
    bytes of the running task's output, or None between tasks. It is None without a log.
    """

    stop: bool = False
    kill: bool = False
    running: int | None = None
    until_s: float = math.inf
    log: str = ""
    log_spans: list[tuple[int, int, int]] = field(default_factory=list)
    peek: Callable[[int], Peek | None] | None = None


class Runner(Protocol):
    """Runs the tasks of a bundle."""

    def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """Run the tasks in order, one at a time, and yield each result soon after its task ends.

        The run ends early after `handle.stop`, `handle.kill`, or a used-up budget. Tasks without a
        result did not run to their end. An error of user code is a Failure in the result. Errors of
        ports (BackendError) propagate, and the worker then returns the bundle to the queue.
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
    """In-flight message with monotonic times. `receipt` is None if the worker may not delete the
    message, because a watchdog message replaced it or the worker returned it."""

    queue: str
    message: Message
    task: TaskMessage
    execution: str
    received_s: float
    extended_s: float
    receipt: str | None
    key: CommitKey = UNSEALED
    """The commit key of its job, set once it is verified."""
    control: Control = Control.RUN
    handle: Handle = field(default_factory=Handle)
    waiting: asyncio.Future[bool] | None = None
    slots: int = 1
    alone: bool = False
    """Its next start decides whether it is a poison task, so it must run alone."""
    running: bool = False
    committing: bool = False
    shedding: bool = False
    """The tasks behind the running task are being handed off, or have been."""
    part: Bundle | None = None
    """The remaining part of the message's bundle after the other tasks were handed off."""
    trace: str = ""
    """Parent of its spans, a traceparent; "" if its job is not traced."""
    marked_s: float | None = None
    """When the running marker of a long-running bundle was last refreshed."""
    handed_over: bool = False
    """Its watchdog message has been sent."""

    @property
    def bundle(self) -> Bundle:
        return self.part or self.task.bundle

    @property
    def suspicion(self) -> int:
        """Number of earlier deliveries that ended without an outcome."""
        again = self.message.receive_count - 1
        return self.bundle.losses + again + (1 if self.task.watchdog else 0)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Time settings in seconds.

    - `visibility_s`: visibility timeout of messages, extended after each third of it.
    - `control_lease_s`: how long tasks of a job may start after a read of its control object. A
      cancellation is acknowledged after this time.
    - `beat_s`, `idle_beat_s`: longest time between heartbeats, with and without in-flight messages.
    - `beat_gap_s`: shortest time between two heartbeats.
    - `wait_s`: long-poll time of a receive.
    - `drain_s`: time that a draining worker gives its running tasks.
    - `hand_over_s`: age at which a watchdog message replaces the message of a running bundle,
      because SQS limits the visibility to 12 h.
    - `watchdog_s`: delay of each watchdog message.
    - `quick_s`: if bundles end within this time, one further bundle per slot is prefetched. Behind
      a longer bundle, a prefetched message would be kept from an idle worker.
    """

    visibility_s: float = 30.0
    control_lease_s: float = 1.0
    beat_s: float = 10.0
    idle_beat_s: float = 60.0
    beat_gap_s: float = 0.5
    wait_s: float = 20.0
    drain_s: float = 20.0
    hand_over_s: float = MAX_VISIBILITY_S * 0.9
    watchdog_s: float = 900.0
    quick_s: float = 1.5

    @property
    def marker_s(self) -> float:
        """Seconds between two refreshes of the running marker of a handed-over bundle."""
        return self.watchdog_s / 6

    @property
    def marker_stale_s(self) -> float:
        """Age in seconds of a marker whose worker counts as dead, well above clock skew."""
        return self.watchdog_s / 2
