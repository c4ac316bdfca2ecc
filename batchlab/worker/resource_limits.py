"""What a running task may use, and how it is found to have used more.

Invariant: a verdict names the task it is about, for by the time its process is killed another one
may be running there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from batchlab.core.job_definition import StageDef
from batchlab.core.model import FailureKind
from batchlab.worker.child_process import monotonic_s
from batchlab.worker.shared_memory import IMPORTING, Board

TICK_S = 0.04
"""How often a running child is looked at."""

_IMPORT_S = 60.0
"""Loading a handler may take this long, or its stage's timeout where that is longer."""


class Verdict(NamedTuple):
    """What `task` (or IMPORTING) is ended for."""

    task: int
    kind: FailureKind
    reason: str
    ran_s: float

    @property
    def sentence(self) -> str:
        """The reason of the failure."""
        return f"Loading the handler {self.reason}." if self.task == IMPORTING else self.reason


class Watched(Protocol):
    """A process in which tasks run."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def board(self) -> Board:
        """Where it says what runs."""


class Memory(Protocol):
    """Says what a process, and all that it has started, takes of the machine's memory."""

    def resident_bytes(self, group: int, since_s: float) -> int:
        """At some time after `since_s` (monotonic)."""


class Limits:
    """The limits of one stage."""

    def __init__(self, stage: StageDef, sampler: Memory) -> None:
        self._timeout_s = stage.timeout_s
        self._memory_bytes = stage.memory_bytes
        self._sampler = sampler

    def wait_s(self, child: Watched) -> float:
        """How long nobody need look at the child."""
        task, since_s = child.board.running()
        if task < 0 or self._timeout_s is None:
            return TICK_S
        return min(TICK_S, max(0.001, since_s + self._timeout_s - monotonic_s()))

    def broken(self, child: Watched) -> Verdict | None:
        """Whether what runs now has gone beyond a limit."""
        task, since_s = child.board.running()
        ran_s = monotonic_s() - since_s
        if task == IMPORTING and self._timeout_s is not None:
            limit_s = max(self._timeout_s, _IMPORT_S)
            reason = f"took longer than {limit_s:g} s"
            return Verdict(task, FailureKind.TIMEOUT, reason, ran_s) if ran_s > limit_s else None
        if task < 0:
            return None
        if self._timeout_s is not None and ran_s >= self._timeout_s:
            reason = f"ran longer than its timeout of {self._timeout_s:g} s"
            return Verdict(task, FailureKind.TIMEOUT, reason, ran_s)
        # A look at /proc costs more than a short task does.
        if self._memory_bytes is None or ran_s < TICK_S / 2:
            return None
        if self._sampler.resident_bytes(child.pid, since_s) > self._memory_bytes:
            reason = f"used more than its memory limit of {self._memory_bytes / 2**20:g} MiB"
            return Verdict(task, FailureKind.MEMORY, reason, ran_s)
        return None
