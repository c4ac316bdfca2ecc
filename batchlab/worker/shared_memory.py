"""Memory page shared by a child process and its worker.

Invariant: the child records each step before the step begins, without a system call. After any end of the child, the
worker therefore knows the running task and its start time.
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
    """Return the seconds since the machine started, including suspended time if the system counts it.

    A lease must expire while the machine is suspended.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class ChildState:
    """State of a child process in a shared page.

    Times are of the system's monotonic clock, which all processes of a machine share. Only the time until which tasks
    may start is a time of `boot_s`.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        """Map the file, and create it first with `create`. Raise OSError on failure."""
        path = Path(path)
        if create:
            # The bytes are written, so a full disk causes an error here. A truncated file would cause a signal at the
            # first access.
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            # mmap keeps a copy of the descriptor with this offset. If a handler writes into an unknown descriptor, the
            # data is appended after the page.
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
        """Record that `task` (or IMPORTING) starts and that its log begins at byte `log_at`."""
        self._floats[_SINCE] = since_s
        self._ints[_LOG_AT] = log_at
        self._ints[_TASK] = task

    def rest(self) -> None:
        """Record that no user code runs."""
        self._ints[_TASK] = IDLE

    def may_start(self) -> bool:
        """Return whether another task may start."""
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
        """Return the running task and its start time, read consistently."""
        while True:
            task, since_s = self._ints[_TASK], self._floats[_SINCE]
            if task == self._ints[_TASK]:
                return task, since_s

    def allow(self, *, stop: bool, until_s: float) -> None:
        """Set whether and until when (a time of `boot_s`) further tasks may start."""
        self._floats[_UNTIL] = until_s
        self._ints[_STOP] = stop

    def close(self) -> None:
        self._ints.release()
        self._floats.release()
        self._map.close()
