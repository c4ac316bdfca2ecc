"""Facts about processes for tests, on every POSIX system."""

from __future__ import annotations

from pathlib import Path

import psutil

from batchlab.core.operating_system.processes import start_mark, table


def is_running(pid: int) -> bool:
    """Return whether the process runs. A zombie does not count as running."""
    return start_mark(pid) is not None


def is_sleeping(pid: int) -> bool:
    """Return whether the process waits, as the kernel reports."""
    return psutil.Process(pid).status() == psutil.STATUS_SLEEPING


def children(pid: int) -> set[int]:
    return {process.pid for process in table() if process.parent == pid}


def command_line(pid: int) -> list[str]:
    """Return the words of the process's command line, or an empty list for a process that has ended."""
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def environment(pid: int) -> dict[str, str]:
    """Return the environment of a child process. A process that has just started may not have its environment yet."""
    return psutil.Process(pid).environ()


def open_files() -> int:
    """Return the number of open file descriptors of this process."""
    return len(list(Path("/dev/fd").iterdir()))
