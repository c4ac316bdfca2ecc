"""Time and memory limits of running tasks.

Invariant: a verdict names its task, because another task may be running in the process by the time
the process is killed.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from batchlab.core.job_definition import StageDef
from batchlab.core.model import FailureKind
from batchlab.worker.child_process import monotonic_s
from batchlab.worker.shared_memory import IMPORTING, ChildState

TICK_S = 0.04
"""Seconds between two checks of a running child."""

_IMPORT_S = 60.0
"""Time limit for loading a handler. A longer timeout of the stage replaces it."""


class Termination(NamedTuple):
    """The reason why `task` (or IMPORTING) is ended."""

    task: int
    kind: FailureKind
    reason: str
    ran_s: float

    @property
    def sentence(self) -> str:
        """The reason as the text of a failure."""
        return f"Loading the handler {self.reason}." if self.task == IMPORTING else self.reason


class WatchedProcess(Protocol):
    """A process that runs tasks."""

    @property
    def pid(self) -> int:
        """The process id."""

    @property
    def board(self) -> ChildState:
        """The shared memory that names the running task."""


class MemorySampler(Protocol):
    """Measurement of the memory of a process group."""

    def resident_bytes(self, group: int, since_s: float) -> int:
        """Return the memory of the group, measured after `since_s` (monotonic)."""


class Limits:
    """Limits of one stage."""

    def __init__(self, stage: StageDef, sampler: MemorySampler) -> None:
        self._timeout_s = stage.timeout_s
        self._memory_bytes = stage.memory_bytes
        self._sampler = sampler

    def wait_s(self, child: WatchedProcess) -> float:
        """Return the seconds until the next check of the child."""
        task, since_s = child.board.running()
        if task < 0 or self._timeout_s is None:
            return TICK_S
        return min(TICK_S, max(0.001, since_s + self._timeout_s - monotonic_s()))

    def broken(self, child: WatchedProcess) -> Termination | None:
        """Return a verdict if the running task exceeds a limit, else None."""
        task, since_s = child.board.running()
        ran_s = monotonic_s() - since_s
        if task == IMPORTING and self._timeout_s is not None:
            limit_s = max(self._timeout_s, _IMPORT_S)
            reason = f"took longer than {limit_s:g} s"
            return (
                Termination(task, FailureKind.TIMEOUT, reason, ran_s) if ran_s > limit_s else None
            )
        if task < 0:
            return None
        if self._timeout_s is not None and ran_s >= self._timeout_s:
            reason = f"ran longer than its timeout of {self._timeout_s:g} s"
            return Termination(task, FailureKind.TIMEOUT, reason, ran_s)
        # Reading /proc costs more than a short task, so memory is checked only after a while.
        if self._memory_bytes is None or ran_s < TICK_S / 2:
            return None
        if self._sampler.resident_bytes(child.pid, since_s) > self._memory_bytes:
            reason = f"used more than its memory limit of {self._memory_bytes / 2**20:g} MiB"
            return Termination(task, FailureKind.MEMORY, reason, ran_s)
        return None
