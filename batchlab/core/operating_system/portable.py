"""Portable implementation for this process, on every POSIX system.

A task's child process imports this module, so the import of the module needs only the standard library.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time

CAN_FORK = False
"""Whether a process may fork, and the fork may go on without the start of another program.

Frameworks of macOS do not work in such a fork.
"""

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
_PARENT_CHECK_S = 0.1
# Suspended time must count. On macOS, CLOCK_MONOTONIC counts suspended time, but `time.monotonic` does not.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def cpu_count() -> int:
    """Return the number of CPUs that this process may use.

    On Linux, a container or the program taskset may limit the number of CPUs.
    """
    return os.cpu_count() or 1


def since_boot_s() -> float:
    """Return the seconds since the start of the machine, including suspended time if the system counts it.

    Leases use this clock, because a lease must expire while the machine is suspended.
    """
    return time.clock_gettime(_CLOCK)


def flush_data(descriptor: int) -> None:
    """Wait until the content of a file is on disk. On macOS, the content may still be in the cache of the disk."""
    os.fsync(descriptor)


def set_process_name(name: str) -> None:
    """Show a forked process under `name` in lists of processes, where the system can do this."""


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    # A task's child process needs the value only for tasks with a memory limit, so its start does not import psutil.
    import psutil

    return psutil.Process().memory_info().rss


def peak_bytes() -> int | None:
    """Return the peak of this process's resident memory, or None if the system does not offer the peak.

    The peak is since the previous call on Linux, and of the process's life elsewhere.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def end_with_pipe(life: int) -> None:
    """Kill this process and its process group when all write ends of the pipe `life` are closed.

    This process must lead its process group. On Linux, the kernel kills the group. Elsewhere, a thread of this process
    does, so a call of C code that does not release the interpreter's lock delays the end.
    """
    os.set_blocking(life, True)
    threading.Thread(target=_kill_group_at_end, args=(life,), name="batchlab-life", daemon=True).start()


def _kill_group_at_end(life: int) -> None:
    try:
        while os.read(life, 1):
            pass
    except OSError:
        return  # A task closed the descriptor. The loss of its pipe of requests ends the process.
    os.killpg(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Kill this process with SIGKILL when its parent process ends.

    The kernel of Linux sends the signal. Elsewhere, a thread of this process does.
    """
    threading.Thread(target=_kill_without, args=(os.getppid(),), name="batchlab-parent", daemon=True).start()


def _kill_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os.kill(os.getpid(), signal.SIGKILL)
