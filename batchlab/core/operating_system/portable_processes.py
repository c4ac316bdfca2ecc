"""Portable implementation for other processes, by the package psutil."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

import psutil

from batchlab.core.operating_system.process_types import Process, ProcessWatch

WATCH_S = 0.05
"""Seconds between two checks of the watched processes."""


def boot_id() -> str:
    """Return the id of the boot within which a start mark identifies a process.

    The start marks of macOS contain the time of day, so they identify a process in all boots.
    """
    return "portable"


def start_mark(pid: int) -> int | None:
    """Return a number that differs between processes with the same pid, or None if the process has ended."""
    try:
        process = psutil.Process(pid)
        # The hash covers the pid and the start time of the kernel. The public start time depends on the clock, and so
        # would change for a running process.
        return None if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else hash(process)
    except (psutil.NoSuchProcess, ValueError):  # psutil raises ValueError for a negative pid.
        return None


def parent_of(pid: int) -> int | None:
    """Return the pid of the parent process, or None if the process does not exist."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped the process."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def child_has_exited(pid: int) -> bool:
    """Return whether a child process has exited. The function does not reap the child, so its pid stays reserved.

    Raise ChildProcessError if the process is not a child of this process.
    """
    if parent_of(pid) != os.getpid():
        raise ChildProcessError(f"The process {pid} is not a child of this process.")
    return start_mark(pid) is None


class _Watch:
    """Pipe whose write end is closed by the thread that checks the watched processes."""

    def __init__(self, pid: int) -> None:
        mark = start_mark(pid)
        if mark is None:
            # A child process that has exited can be watched until it is reaped, as on Linux.
            if parent_of(pid) is None:
                raise ProcessLookupError(f"The process {pid} does not exist.")
            mark = 0
        self.pid, self.mark = pid, mark
        self._read_end, self._write_end = os.pipe()
        self._lock = threading.Lock()
        _watcher.add(self)

    def fileno(self) -> int:
        return self._read_end

    def send_signal(self, number: signal.Signals) -> None:
        if start_mark(self.pid) != self.mark:
            raise ProcessLookupError(f"The process {self.pid} has ended.")
        os.kill(self.pid, number)

    def end(self) -> None:
        """Make the descriptor readable."""
        with self._lock:
            if self._write_end >= 0:
                os.close(self._write_end)
                self._write_end = -1

    def close(self) -> None:
        _watcher.remove(self)
        self.end()
        with self._lock:
            if self._read_end >= 0:
                os.close(self._read_end)
                self._read_end = -1


class _Watcher:
    """Thread that runs while processes are watched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._runs = False

    def add(self, watch: _Watch) -> None:
        with self._lock:
            self._watches.add(watch)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="batchlab-watch", daemon=True).start()

    def remove(self, watch: _Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        while watches := self._current():
            for watch in watches:
                if start_mark(watch.pid) != watch.mark:
                    self.remove(watch)
                    watch.end()
            time.sleep(WATCH_S)

    def _current(self) -> list[_Watch]:
        with self._lock:
            self._runs = bool(self._watches)
            return list(self._watches)


_watcher = _Watcher()


def open_watch(pid: int) -> ProcessWatch:
    """Return a watch of the process that has the pid now. Raise ProcessLookupError without such a process."""
    return _Watch(pid)


def table() -> list[Process]:
    """Return every process of the machine that can be read."""
    processes = []
    for process in psutil.process_iter():
        # A process may exit between the listing and the reads.
        with suppress(psutil.Error, OSError):
            parent, group = process.ppid(), os.getpgid(process.pid)
            processes.append(Process(process.pid, parent, group, _resident_bytes(process)))
    return processes


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.AccessDenied:
        return 0  # The process belongs to another user.


def with_variable(variable: str) -> Iterator[tuple[int, str]]:
    """Yield the pid and the value of the environment variable of each process that has it.

    Processes of other users and of containers are left out.
    """
    for process in psutil.process_iter():
        try:
            value = process.environ().get(variable)
        except (psutil.Error, OSError):
            # The process belongs to another user, or has ended during the scan.
            continue
        if value is not None:
            yield process.pid, value


def arguments_of(pid: int) -> list[str]:
    """Return the command line of the process, or [] if the process has ended or belongs to another user."""
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, OSError):
        return []


def is_session_leader(pid: int) -> bool:
    """Return whether the process leads its session. A missing process does not lead one."""
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False


def owns_port(pids: Collection[int], port: int) -> bool:
    """Return whether one of the processes has a TCP connection with the local port `port`."""
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.Error:  # The process has ended, or belongs to another user.
            continue
        if any(connection.laddr and connection.laddr.port == port for connection in connections):
            return True
    return False


def is_in_container(pid: int, container: str) -> bool:
    """Return whether the process of this machine runs in the container.

    Only Linux runs containers without a virtual machine, so the portable implementation returns False.
    """
    del pid, container
    return False
