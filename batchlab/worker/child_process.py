"""The worker's side of warm child processes: pipes, exit, kill, limits, and the pool of child processes.

Invariants: no call of this module blocks the worker's event loop, and an ended child is reaped after its process group
is killed. A kill ends the process group and all descendants whose parent processes still exist, so a program of a task
does not outlive the task. A worker has at most as many children as slots, and a child runs only handlers of one code
folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from batchlab.core.errors import BackendError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import FailureKind
from batchlab.core.operating_system.processes import child_has_exited, kill_family, table
from batchlab.core.text import signal_name
from batchlab.worker.child import EXIT_PIPE_LOST, RequestLine
from batchlab.worker.shared_memory import BOOTING, IMPORTING, ChildState


class Sampler:
    """Resident memory per process group. One read of the process table serves all calls within `fresh_s` seconds."""

    def __init__(self, monotonic_s: Callable[[], float], fresh_s: float) -> None:
        self._monotonic_s = monotonic_s
        self._fresh_s = fresh_s
        self._at_s = float("-inf")
        self._groups: dict[int, int] = {}

    def resident_bytes(self, group: int, since_s: float) -> int:
        """Return the sum of the group's resident memory, measured after `since_s`.

        Shared memory pages count once for each process.
        """
        now_s = self._monotonic_s()
        if now_s - self._at_s >= self._fresh_s or self._at_s < since_s:
            self._at_s = now_s
            self._groups = {}
            for process in table():
                self._groups[process.group] = self._groups.get(process.group, 0) + process.resident_bytes
        return self._groups.get(group, 0)


_READ_BYTES = 1 << 18
_REAP_STEP_S = 0.002
_WORDS = ("ok", "failed", "import", "end")


def _is_answer(line: Any) -> bool:
    return type(line) is list and bool(line) and line[0] in _WORDS


def _parse(line: bytearray) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class ChildProcess:
    """Child process of a worker. Its first request binds the child to one folder of code.

    Call `kill` to end the process, and then `close` to remove its files.
    """

    def __init__(self, folder: Path, digest: str | None) -> None:
        """Start the child process without waiting for its start-up. A process that cannot start raises OSError."""
        self.digest = digest
        """Digest of the code that the child runs, or None before the child's first request."""
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._read_s = 0.0
        self._eof = False
        self.corrupted = False
        """Whether a handler wrote into the pipe of answers. Only answers before the handler's write are valid."""
        self._closed = False
        self._unsent = bytearray()
        folder.mkdir(parents=True, exist_ok=True)
        self.board = ChildState(folder / "board", create=True)
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        # Nothing is written to the life pipe. The end of the life pipe tells the child that the worker has exited.
        life, self._life = os.pipe()
        theirs = (requests, answers, life)
        try:
            with (folder / "boot.log").open("wb") as log:
                # The child is started in the main thread, because a parent-death signal is sent when the starting
                # thread ends.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "batchlab.worker.child", *map(str, theirs), str(folder / "board")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    pass_fds=theirs,
                    start_new_session=True,
                )
        except OSError:
            for fd in (self._requests, self._answers, self._life):
                os.close(fd)
            self.board.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        os.set_blocking(self._answers, False)
        os.set_blocking(self._requests, False)

    @property
    def pid(self) -> int:
        """Id of the child process, which is also the id of its process group."""
        return self._process.pid

    # --- Requests and answers ---

    def send(self, line: RequestLine) -> None:
        """Send a request to the child. If the pipe is full, the event loop writes the rest of the request later."""
        self._unsent += json.dumps(line).encode() + b"\n"
        self._writable()

    def _writable(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._requests, self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._requests, self._writable)
            return
        except BrokenPipeError:
            self._unsent.clear()  # The pipe is broken because the child is dead, which `answers` reports.
        self._loop.remove_writer(self._requests)

    async def answers(self, wait_s: float, *, gather_s: float) -> list[Any]:
        """Return the lines received within `wait_s`, or [] if no line arrived or the child ended.

        Lines that arrive within `gather_s` of the previous read are returned together.
        """
        # Answers are read in batches, because a wake-up of the event loop costs as much as ten tiny tasks.
        pause_s = max(0.0, gather_s - (self._loop.time() - self._read_s))
        if pause_s:
            await asyncio.sleep(pause_s)
        if not self._read():
            await self._readable(_REAP_STEP_S if self._eof else wait_s - pause_s)
            if not self._read():
                return self._lines()
        self._read_s = self._loop.time()
        return self._lines()

    def _read(self) -> bool:
        """Read from the pipe into the buffer, and return whether new data arrived."""
        if self._eof:
            return False
        try:
            data = os.read(self._answers, _READ_BYTES)
        except BlockingIOError:
            return False
        self._buffer += data
        self._eof = not data
        return True

    async def _readable(self, wait_s: float) -> None:
        """Wait up to `wait_s` for data from the child. After the end of the pipe, the wait always takes `wait_s`."""
        woken = self._loop.create_future()
        timer = self._loop.call_later(wait_s, _wake, woken)
        if not self._eof:
            self._loop.add_reader(self._answers, _wake, woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._loop.remove_reader(self._answers)

    def _lines(self) -> list[Any]:
        whole, newline, rest = self._buffer.rpartition(b"\n")
        if not newline or self.corrupted:
            return []
        self._buffer = bytearray(rest)
        try:
            lines = json.loads(b"[" + whole.replace(b"\n", b",") + b"]")
        except ValueError:
            lines = [_parse(line) for line in whole.split(b"\n")]
        answers = list(takewhile(_is_answer, lines))
        self.corrupted = len(answers) < len(lines)
        return answers

    # --- Ending ---

    @property
    def ended(self) -> bool:
        """Whether the child process has exited.

        The answers of an exited child are complete once `answers` returns [].
        """
        if self._process.returncode is not None:
            return True
        # The check does not reap an exited child, because the child's id must stay reserved until its process group is
        # killed.
        return child_has_exited(self.pid)

    async def kill(self) -> tuple[int, list[Any]]:
        """Kill the child process and its descendants. `kill` returns the exit code of the child and its last answers.

        The exit code is the child's own if the child exited before the kill. Repeated calls of `kill` are safe.
        """
        if self._process.returncode is None:
            try:
                kill_family(self.pid)
            finally:
                self._process.kill()  # The child ends and is reaped even if its descendants cannot be listed.
                while self._process.poll() is None:  # noqa: ASYNC110 - SIGCHLD belongs to the caller
                    await asyncio.sleep(_REAP_STEP_S)
        # A surviving descendant may hold the pipe open, so `kill` does not wait for the pipe's end.
        while not self._closed and self._read():
            pass
        return self._process.returncode, self._lines()

    def close(self) -> None:
        """Close the pipes and remove the files of the child process. The caller must call `kill` before `close`."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._answers)
        self._loop.remove_writer(self._requests)
        for fd in (self._answers, self._requests, self._life):
            os.close(fd)
        self.board.close()
        # The folder is small, and closing the runner removes remaining files.
        shutil.rmtree(self._folder, ignore_errors=True)

    def check_booted(self, code: int) -> None:
        """Raise BackendError if the process died during start-up, which is not the fault of a task."""
        if self.board.task == BOOTING:
            output = (self._folder / "boot.log").read_text(errors="replace").strip()[-500:]
            raise BackendError(f"A task process could not start ({describe_exit(code)}): {output}")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def describe_exit(code: int) -> str:
    """Return an exit code as text, for example `exit 3` or `exit -11 (SIGSEGV)`."""
    return f"exit {code}" if code >= 0 else f"exit {code} ({signal_name(-code)})"


def describe_crash(code: int, times: int) -> str:
    """Return the reason of a crash with exit code `code` after `times` deaths by SIGKILL."""
    if code == EXIT_PIPE_LOST:
        return "closed the file descriptors of its process"
    text = f"killed its process: {describe_exit(code)}"
    if code == -signal.SIGKILL:
        text += f" {times} times" if times else ""
        text += "; the machine may have run out of memory"
    return text


def monotonic_s() -> float:
    """Return the system's monotonic time, which the shared memory uses.

    The `Clock` of a worker may differ from the system's monotonic time.
    """
    return time.monotonic()


class Children:
    """Pool of warm child processes, idle and busy. Each run of a bundle uses one child."""

    def __init__(self, folder: Path, slots: int) -> None:
        """Create a small folder for each child below `folder`."""
        self.closed = False
        self._folder = folder
        self._slots = slots
        self._idle: list[ChildProcess] = []
        self._busy: list[ChildProcess] = []
        self._started = 0
        self._has_no_busy = asyncio.Event()

    def start_spares(self) -> None:
        """Start a child for each slot, so that the first bundles do not wait for the start-up of their children.

        A child that cannot start raises OSError.
        """
        while len(self._idle) + len(self._busy) < self._slots:
            self._idle.append(self._start(None))

    async def acquire(self, digest: str) -> ChildProcess:
        """Return an idle child for the code, or start a child. A child that cannot start raises OSError."""
        usable = [child for child in self._idle if child.digest in (digest, None) and not child.ended]
        if usable:
            # A child that has run the code before has already imported the modules of the code.
            child = max(reversed(usable), key=lambda one: one.digest is not None)
            child.digest = digest
            self._idle.remove(child)
            self._busy.append(child)
            return child
        while self._idle and len(self._idle) + len(self._busy) >= self._slots:
            await self.kill(self._idle[0])
        child = self._start(digest)
        self._busy.append(child)
        return child

    def _start(self, digest: str | None) -> ChildProcess:
        self._started += 1
        return ChildProcess(self._folder / f"{os.getpid()}-{self._started}", digest)

    def release(self, child: ChildProcess) -> None:
        """Make a child available for the next run."""
        self._busy.remove(child)
        self._idle.append(child)
        self._notify()

    async def kill(self, child: ChildProcess) -> None:
        """Kill an idle or busy child, and remove its files."""
        for group in (self._idle, self._busy):
            if child in group:
                group.remove(child)
        try:
            await child.kill()
        finally:
            child.close()
            self._notify()

    def _notify(self) -> None:
        if not self._busy:
            self._has_no_busy.set()

    async def close(self) -> None:
        """Kill all children of the pool. Active runs see `closed`, and end as if their children were killed."""
        self.closed = True
        while self._busy:
            self._has_no_busy.clear()
            await self._has_no_busy.wait()
        for child in tuple(self._idle):
            await self.kill(child)


TICK_S = 0.04
"""Seconds between two checks of a running child."""

_IMPORT_S = 60.0
"""Time limit in seconds for loading a handler. A longer timeout of the stage replaces the time limit for loading."""


class Termination(NamedTuple):
    """Reason to end the process of `task` (or IMPORTING).

    A Termination names its task, because another task may be running when the process is killed.
    """

    task: int
    kind: FailureKind
    reason: str
    ran_s: float

    @property
    def sentence(self) -> str:
        """Text of the task failure that the Termination causes."""
        return f"Loading the handler {self.reason}." if self.task == IMPORTING else self.reason


class WatchedProcess(Protocol):
    """Process that runs tasks, and the shared memory page with its running task."""

    @property
    def pid(self) -> int: ...

    @property
    def board(self) -> ChildState: ...


class MemorySampler(Protocol):
    def resident_bytes(self, group: int, since_s: float) -> int:
        """Return the resident memory of the process group, measured after the monotonic time `since_s`."""


class Limits:
    """Time and memory limits of the tasks of one stage."""

    def __init__(self, stage: StageDef, sampler: MemorySampler) -> None:
        self._timeout_s = stage.timeout_s
        self._memory_bytes = stage.memory_bytes
        self._sampler = sampler

    def wait_s(self, child: WatchedProcess) -> float:
        """Return the seconds until the next check of the child."""
        task, since_s = child.board.running()
        if task < 0 or self._timeout_s is None:
            return TICK_S
        return min(TICK_S, max(0.001, since_s + self._timeout_s - monotonic_s()))

    def broken_termination(self, child: WatchedProcess) -> Termination | None:
        """Return a Termination if the running task exceeds a limit, else None."""
        task, since_s = child.board.running()
        ran_s = monotonic_s() - since_s
        if task == IMPORTING and self._timeout_s is not None:
            limit_s = max(self._timeout_s, _IMPORT_S)
            reason = f"took longer than {limit_s:g} s"
            return Termination(task, FailureKind.TIMEOUT, reason, ran_s) if ran_s > limit_s else None
        if task < 0:
            return None
        if self._timeout_s is not None and ran_s >= self._timeout_s:
            reason = f"ran longer than its timeout of {self._timeout_s:g} s"
            return Termination(task, FailureKind.TIMEOUT, reason, ran_s)
        # A read of the process table costs more than a short task, so memory is checked only for tasks that have run
        # for a while.
        if self._memory_bytes is None or ran_s < TICK_S / 2:
            return None
        if self._sampler.resident_bytes(child.pid, since_s) > self._memory_bytes:
            reason = f"used more than its memory limit of {self._memory_bytes / 2**20:g} MiB"
            return Termination(task, FailureKind.MEMORY, reason, ran_s)
        return None
