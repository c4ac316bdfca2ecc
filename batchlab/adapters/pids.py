"""Processes that are known beyond the life of whoever started them (Linux).

Invariant: a pid counts only together with the kernel's start time and boot id, so a recycled
number is never mistaken for the process that had it.
"""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """Start times count from the boot of the kernel, so they identify a process within one only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def stat(pid: int) -> list[bytes]:
    """The fields of a process's stat from the third on, empty where there is no such process."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    # The second field is the name in parentheses, and may hold parentheses and blanks.
    return content.rpartition(b")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When a process started, field 22: clock ticks since boot. None unless it lives."""
    fields = stat(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def lives(pid: int, ticks: int, boot: str) -> bool:
    """Whether the process that had this number, start time and boot still runs."""
    return boot == boot_id() and start_ticks(pid) == ticks


def hold(pid: int, ticks: int, boot: str) -> int | None:
    """A pidfd of that process, for the caller to close; None where it does not run any more."""
    # Of a number that a thread of another process has by now the kernel gives no pidfd.
    if not lives(pid, ticks, boot):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Only now that the pidfd holds on to whatever has the number: before, it could change.
    if not lives(pid, ticks, boot):
        os.close(pidfd)
        return None
    return pidfd


def exit_code(pid: int) -> int | None:
    """How a child of this process has ended, as subprocess gives it, waited for; its number is free
    then. None where it is no child of ours."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)
