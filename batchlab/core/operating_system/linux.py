"""Implementation for this process on Linux. The module `portable` documents the functions.

A task's child process imports this module, so the module imports only the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def content(path: str) -> bytes:
    """Return the content of a file of the kernel."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


# For other systems, the type checker skips the rest of this module.
assert sys.platform == "linux"

CAN_FORK = True

_PR_SET_PDEATHSIG = 1


def cpu_count() -> int:
    return len(os.sched_getaffinity(0))


def since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def flush_data(descriptor: int) -> None:
    os.fdatasync(descriptor)


def set_process_name(name: str) -> None:
    with open("/proc/self/comm", "w") as file:  # noqa: PTH123 - a task's process does not need pathlib here
        file.write(name)


def resident_bytes() -> int:
    return int(content("/proc/self/statm").split()[1]) * PAGE_BYTES


def peak_bytes() -> int | None:
    """Return the peak since the previous call, because Linux can reset the peak."""
    try:
        status = content("/proc/self/status")
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
    except OSError:
        return None
    _, _, rest = status.partition(b"VmHWM:")
    return int(rest.split(None, 1)[0]) * 1024 if rest else None


def end_with_pipe(life: int) -> None:
    # The kernel can signal the end of a pipe to the whole process group. A parent-death signal is the fallback for
    # kernels that do not signal the end of a pipe. A parent-death signal reaches only the child process, so programs
    # that a task started would survive. The child does not use the parent-death signal in addition to the signal of the
    # pipe.
    try:
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        end_with_parent()
    os.set_blocking(life, False)
    try:
        os.read(life, 1)
    except BlockingIOError:
        return  # An open write end of the pipe means that the worker is alive.
    os._exit(0)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
