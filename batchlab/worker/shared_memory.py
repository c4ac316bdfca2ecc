"""A page of memory that a child process and its worker share.

Invariant: the child writes what it is doing before it does it, without a system call, so that
whatever ends the child, the worker knows which task was running, and since when.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

BOOTING = -3
IMPORTING = -2
IDLE = -1

_BYTES = 4096
# Cells of 8 bytes. The child owns the first three, the worker the rest.
_TASK, _SINCE, _LOG_AT, _STOP, _UNTIL = range(5)


def boot_s() -> float:
    """Seconds since the machine started, with the time in which it was suspended where the system
    can tell: a lease must not outlast a closed lid."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Board:
    """Times are the system's monotonic clock, which all processes of a machine share. Tasks may be
    started until a time of `boot_s`."""

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        """`create` makes the file anew. OSError where that is not possible."""
        path = Path(path)
        if create:
            # Written, not truncated to size: on a full disk that fails here, with an error, and
            # not by a signal at the first access.
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            # mmap keeps a copy of the descriptor, with this offset: what a handler writes into
            # descriptors that it does not know goes behind the page.
            os.lseek(file.fileno(), 0, os.SEEK_END)
            self._map = mmap.mmap(file.fileno(), _BYTES)
        page = memoryview(self._map)
        self._ints = page.cast("q")
        self._floats = page.cast("d")
        page.release()
        if create:
            self._ints[_TASK] = BOOTING
            self._floats[_UNTIL] = float("inf")

    # --- The child's side ---

    def mark(self, task: int, since_s: float, log_at: int = 0) -> None:
        """`task` (or IMPORTING) begins; its output begins at byte `log_at` of the log."""
        self._floats[_SINCE] = since_s
        self._ints[_LOG_AT] = log_at
        self._ints[_TASK] = task

    def rest(self) -> None:
        """Nothing of the user's runs."""
        self._ints[_TASK] = IDLE

    def may_start(self) -> bool:
        """Whether another task may be started."""
        return not self._ints[_STOP] and boot_s() < self._floats[_UNTIL]

    # --- The worker's side ---

    @property
    def task(self) -> int:
        """Index of the running task, or BOOTING, IMPORTING, IDLE."""
        return self._ints[_TASK]

    @property
    def log_at(self) -> int:
        return self._ints[_LOG_AT]

    def running(self) -> tuple[int, float]:
        """The running task and since when, read so that they belong together."""
        while True:
            task, since_s = self._ints[_TASK], self._floats[_SINCE]
            if task == self._ints[_TASK]:
                return task, since_s

    def allow(self, *, stop: bool, until_s: float) -> None:
        """Whether further tasks may be started, and until when (`boot_s`)."""
        self._floats[_UNTIL] = until_s
        self._ints[_STOP] = stop

    def close(self) -> None:
        self._ints.release()
        self._floats.release()
        self._map.close()
