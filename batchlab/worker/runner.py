"""Interface between the worker's protocol and the code that runs tasks.

The worker's loop selects, commits, and forwards bundles. A Runner only runs them. The same loop
works with warm child processes, real handlers inside the simulator, and simulated durations.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Json, Ran
from batchlab.core.protocol.seals import UNSEALED, CommitKey


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
