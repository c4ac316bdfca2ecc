"""The seam between the worker's protocol and the place where user code runs.

The worker loop decides what runs, commits and forwards; a Runner only runs it. The same loop
drives warm child processes, real handlers inside the simulator, and simulated durations.
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
    """One execution of a bundle, ready to run: `items` has one input per index of `bundle.tasks`.

    Items are encoded values (`protocol.values`): inline JSON, or references to objects that the
    runner fetches. `budget_s` asks to start no further task once that long has passed (the first
    task always starts); None runs them all.
    """

    job: JobDef
    stage: StageDef
    bundle: Bundle
    execution: str
    items: Sequence[Json]
    budget_s: float | None = None
    key: CommitKey = UNSEALED
    """The commit key of the job: the names of files and logs are sealed with it."""


@dataclass(frozen=True, slots=True)
class Peek:
    """What a running task has printed so far: from byte `start` of the execution's log, in which
    its output begins at byte `log_at`."""

    task: int
    log_at: int
    start: int
    data: bytes


@dataclass(slots=True)
class Handle:
    """Steering of one `Runner.run` from outside, shared by both sides.

    `until_s` (monotonic) is how long it may go on starting tasks without a fresh look at the job's
    control object; the worker keeps moving it. `stop` asks to start no further task; `kill` to
    end the running one at once too (it then yields no `Ran`). `running` is the task that runs
    now, None between tasks. `log` and `log_spans` are filled when the run has ended (see Outcome).
    `peek(n)` reads the last n bytes at most of what the running task has printed, None between
    tasks; a runner without a log has none.
    """

    stop: bool = False
    kill: bool = False
    running: int | None = None
    until_s: float = math.inf
    log: str = ""
    log_spans: list[tuple[int, int, int]] = field(default_factory=list)
    peek: Callable[[int], Peek | None] | None = None


class Runner(Protocol):
    """Where tasks run."""

    def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """Run the tasks in order, one at a time, yielding each soon after it ends.

        Ends early after `handle.stop`, `handle.kill`, or when the budget is used up; tasks never
        yielded were not run to an end. Never raises for what user code does: that is a Failure.
        Port errors (BackendError) do propagate; the worker then gives the bundle back.
        """

    async def close(self) -> None:
        """End every child process and remove scratch files."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Folders of one instance: unpacked code by hash, and one folder per execution."""

    root: Path

    def code(self, digest: str) -> Path:
        return self.root / "code" / digest

    def execution(self, name: str) -> Path:
        return self.root / "run" / name
