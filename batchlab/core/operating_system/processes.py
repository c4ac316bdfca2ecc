"""Processes of the machine: identity, end, tree, memory, and connections.

A process is identified by its pid, its start mark, and the boot id, so a reused pid is never mistaken for the earlier
process. A process that has exited counts as ended, even if its parent has not reaped it.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from batchlab.core.operating_system import PORTABLE_VARIABLE
from batchlab.core.operating_system.process_types import Process, ProcessWatch

if sys.platform == "linux" and not os.environ.get(PORTABLE_VARIABLE):
    from batchlab.core.operating_system.linux_processes import (
        arguments_of,
        boot_id,
        child_has_exited,
        is_in_container,
        is_session_leader,
        is_stopped,
        open_watch,
        owns_port,
        parent_of,
        start_mark,
        table,
        with_variable,
    )
else:
    from batchlab.core.operating_system.portable_processes import (
        arguments_of,
        boot_id,
        child_has_exited,
        is_in_container,
        is_session_leader,
        is_stopped,
        open_watch,
        owns_port,
        parent_of,
        start_mark,
        table,
        with_variable,
    )

__all__ = [
    "Process",
    "ProcessWatch",
    "arguments_of",
    "boot_id",
    "child_has_exited",
    "exit_code",
    "family",
    "is_alive",
    "is_in_container",
    "is_stopped",
    "kill_family",
    "kill_group",
    "open_watch",
    "owns_port",
    "parent_of",
    "session_leader",
    "start_mark",
    "table",
    "watch",
    "with_variable",
]


def is_alive(pid: int, mark: int, boot: str) -> bool:
    """Return whether the process with this pid, start mark, and boot id is running."""
    return boot == boot_id() and start_mark(pid) == mark


def session_leader(variable: str, value: str) -> int | None:
    """Return the pid of the process that leads a session and has the environment variable, or None without one.

    Child processes inherit an environment, so only the session's leader is the process that got the variable first.
    """
    return next((pid for pid, found in with_variable(variable) if found == value and is_session_leader(pid)), None)


def watch(pid: int, mark: int, boot: str) -> ProcessWatch | None:
    """Return a watch of that process for the caller to close, or None if the process is not running."""
    # If the pid now belongs to a thread of another process, the kernel does not return a pidfd.
    if not is_alive(pid, mark, boot):
        return None
    try:
        watching = open_watch(pid)
    except ProcessLookupError:
        return None
    # The process is checked again after the watch exists, because its pid could be reused before.
    if not is_alive(pid, mark, boot):
        watching.close()
        return None
    return watching


def exit_code(pid: int) -> int | None:
    """Wait for a child process, release its pid, and return its exit code in the form of `subprocess`.

    Return None if the process is not a child of this process.
    """
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)


def family(leader: int) -> set[int]:
    """Return the ids of the process, its process group, and the descendants of both."""
    processes = table()
    members = {leader} | {p.pid for p in processes if p.group == leader}
    while descendants := {p.pid for p in processes if p.parent in members and p.pid not in members}:
        members |= descendants
    return members


def kill_family(leader: int) -> None:
    """Send SIGKILL to the process group `leader` and to its descendants in other groups.

    Processes of other users, such as those that `sudo` starts, continue to run.
    `leader` must not be reaped before the kill, because another process may reuse the id of a reaped process.
    """
    doomed = family(leader)
    kill_group(leader)
    for pid in doomed - {leader}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kill_group(leader: int) -> None:
    """Send SIGKILL to the process group `leader`. Ignore a group without a running process.
    Processes of other users continue to run, and no error is raised.

    `leader` must not be reaped before the kill, unless the group still has members.
    """
    # A group whose processes have all exited, and are not reaped, is not an error on Linux. macOS raises
    # PermissionError.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
