"""Memory page that a child process and its worker share.

Invariant: the child records each step before the step begins, without a system call. After any end of the child, the
worker knows the running task and its start time from the page.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from batchlab.core.operating_system import since_boot_s

BOOTING = -3
IMPORTING = -2
IDLE = -1

_BYTES = 4096
# The page has cells of 8 bytes. The child writes the first three cells, and the worker writes the other cells.
_TASK, _SINCE, _LOG_AT, _STOP, _UNTIL = range(5)


class ChildState:
    """State of a child process in a shared page.

    Times in the page are of the system's monotonic clock, which all processes of a machine share. Only the time until
    which tasks may start is a time of `since_boot_s`.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        """Map the file of the page. If `create` is true, create the file first. A failure raises OSError."""
        path = Path(path)
        if create:
            # All bytes of the page are written, so a full disk causes an error. A file that is only truncated to its
            # size would cause a signal at the first access.
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            # mmap keeps a copy of the file descriptor with the offset at the end of the file. If a handler writes into
            # the unknown descriptor, the data is appended after the page.
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
        """Record that `task` (or IMPORTING) starts, and that its log begins at byte `log_at`."""
        self._floats[_SINCE] = since_s
        self._ints[_LOG_AT] = log_at
        self._ints[_TASK] = task

    def rest(self) -> None:
        """Record that the child is idle and does not run user code."""
        self._ints[_TASK] = IDLE

    def may_start(self) -> bool:
        """Return whether another task may start."""
        return not self._ints[_STOP] and since_boot_s() < self._floats[_UNTIL]

    # --- The worker's side ---

    @property
    def task(self) -> int:
        """Index of the running task, or one of BOOTING, IMPORTING, and IDLE."""
        return self._ints[_TASK]

    @property
    def log_at(self) -> int:
        return self._ints[_LOG_AT]

    def running(self) -> tuple[int, float]:
        """Return the running task and its start time, which belong to the same moment."""
        while True:
            task, since_s = self._ints[_TASK], self._floats[_SINCE]
            if task == self._ints[_TASK]:
                return task, since_s

    def allow(self, *, stop: bool, until_s: float) -> None:
        """Set whether further tasks may start, and until which time of `since_boot_s`."""
        self._floats[_UNTIL] = until_s
        self._ints[_STOP] = stop

    def close(self) -> None:
        self._ints.release()
        self._floats.release()
        self._map.close()
