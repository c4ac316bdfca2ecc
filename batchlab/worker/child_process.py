"""The worker's end of a warm child process: its pipes, its board, and its death.

Invariant: nothing here blocks the event loop, and a child that has ended is always waited for,
its process group killed first.

The warm children of one worker, idle and busy.

Invariant: there are never more of them than slots, and a child only ever serves one code folder.
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
from itertools import takewhile
from pathlib import Path
from typing import Any

from batchlab.core.errors import BackendError
from batchlab.worker.child import EXIT_PIPE_LOST, RequestLine
from batchlab.worker.process_table import kill_family
from batchlab.worker.shared_memory import BOOTING, Board

_READ_BYTES = 1 << 18
_REAP_STEP_S = 0.002
_WORDS = (["ok"], ["failed"], ["import"], ["end"])


def _is_answer(line: Any) -> bool:
    return type(line) is list and line[:1] in _WORDS


def _parsed(line: bytearray) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class ChildProcess:
    """One child, bound to one folder of code. Ended by `kill`, forgotten by `close`."""

    def __init__(self, folder: Path, digest: str, code: Path | None) -> None:
        """Start it; it boots while the first request is already on its way. OSError."""
        self.digest = digest
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._read_s = 0.0
        self._eof = False
        self.spoilt = False
        """A handler wrote into the pipe; answers are good up to there."""
        self._closed = False
        self._unsent = bytearray()
        folder.mkdir(parents=True, exist_ok=True)
        self.board = Board(folder / "board", create=True)
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        # Never written to: its end is the news.
        life, self._life = os.pipe()
        theirs = (requests, answers, life)
        try:
            with (folder / "boot.log").open("wb") as log:
                # Not in a thread: a parent-death signal would mean the end of that thread.
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "batchlab.worker.child",
                        *map(str, theirs),
                        str(folder / "board"),
                        str(code or ""),
                    ],
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
        """Its process id, which is that of its process group too."""
        return self._process.pid

    # --- Talking ---

    def send(self, line: RequestLine) -> None:
        """Hand over a request; what the pipe does not take at once follows by itself."""
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
            self._unsent.clear()  # it is dead, which the end of its answers tells
        self._loop.remove_writer(self._requests)

    async def answers(self, wait_s: float, *, gather_s: float) -> list[Any]:
        """Lines that have come, [] where none has come within `wait_s` or the child has ended.

        Those of `gather_s` since the last ones were read come together.
        """
        # A wake-up costs as much as ten tiny tasks.
        gap_s = self._loop.time() - self._read_s
        if gap_s < gather_s:
            await asyncio.sleep(gather_s - gap_s)
        if not self._read():
            await self._readable(_REAP_STEP_S if self._eof else wait_s)
            if not self._read():
                return self._lines()
        self._read_s = self._loop.time()
        return self._lines()

    def _read(self) -> bool:
        """Whether something new has come."""
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
        """Wait for news, or as long; after the end of the pipe, only as long."""
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
        if not newline or self.spoilt:
            return []
        self._buffer = bytearray(rest)
        try:
            lines = json.loads(b"[" + whole.replace(b"\n", b",") + b"]")
        except ValueError:
            lines = [_parsed(line) for line in whole.split(b"\n")]
        good = list(takewhile(_is_answer, lines))
        self.spoilt = len(good) < len(lines)
        return good

    # --- Ending ---

    @property
    def ended(self) -> bool:
        """Whether it has died; its answers are then complete once `answers` gave none."""
        if self._process.returncode is not None:
            return True
        # Not waited for yet: until its group is killed, its number must stay its own.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, look) is not None

    async def kill(self) -> tuple[int, list[Any]]:
        """End it and its descendants at once; returns its exit code and its last answers.

        An exit code of its own from before is kept. Safe to call again.
        """
        if self._process.returncode is None:
            kill_family(self.pid)
            while self._process.poll() is None:  # noqa: ASYNC110 - SIGCHLD is not ours to take
                await asyncio.sleep(_REAP_STEP_S)
        if not self._closed:
            # A descendant that got away may hold the pipe open, so its end is not waited for.
            while self._read():
                pass
            self._close()
        return self._process.returncode, self._lines()

    def _close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._answers)
        self._loop.remove_writer(self._requests)
        for fd in (self._answers, self._requests, self._life):
            os.close(fd)

    def close(self) -> None:
        """Remove its files; after `kill`."""
        self.board.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # a few bytes that `close` tries again

    def check_booted(self, code: int) -> None:
        """BackendError where it died before it could do anything: no task is to blame."""
        if self.board.task == BOOTING:
            said = (self._folder / "boot.log").read_text(errors="replace").strip()[-500:]
            raise BackendError(f"A task process could not start ({describe_exit(code)}): {said}")


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def describe_exit(code: int) -> str:
    """`exit 3`, `exit -11 (SIGSEGV)`."""
    if code >= 0:
        return f"exit {code}"
    try:
        return f"exit {code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"exit {code}"


def describe_crash(code: int, times: int) -> str:
    """What a task did whose process has ended so, and how often it was SIGKILLed before."""
    if code == EXIT_PIPE_LOST:
        return "closed the file descriptors of its process"
    told = f"killed its process: {describe_exit(code)}"
    if code == -signal.SIGKILL:
        told += f" {times} times" if times else ""
        told += "; the machine may have run out of memory"
    return told


def monotonic_s() -> float:
    """The clock of the boards: the system's, whatever Clock the worker was given."""
    return time.monotonic()


class Children:
    """Hands out one child per run."""

    def __init__(self, folder: Path, slots: int) -> None:
        """`folder` gets a small folder for each child."""
        self.closed = False
        self._folder = folder
        self._slots = slots
        self._idle: list[ChildProcess] = []
        self._busy: list[ChildProcess] = []
        self._started = 0
        self._quiet = asyncio.Event()

    async def take(self, digest: str, code: Path | None) -> ChildProcess:
        """A warm child for this code, else a fresh one. OSError where none can be started."""
        for child in reversed(self._idle):
            if child.digest == digest and not child.ended:
                self._idle.remove(child)
                self._busy.append(child)
                return child
        while self._idle and len(self._idle) + len(self._busy) >= self._slots:
            await self.bury(self._idle[0])
        self._started += 1
        place = self._folder / f"{os.getpid()}-{self._started}"
        child = ChildProcess(place, digest, code)
        self._busy.append(child)
        return child

    def give_back(self, child: ChildProcess) -> None:
        """It waits for its next request."""
        self._busy.remove(child)
        self._idle.append(child)
        self._tell()

    async def bury(self, child: ChildProcess) -> None:
        """End it, whatever it does."""
        for group in (self._idle, self._busy):
            if child in group:
                group.remove(child)
        await child.kill()
        child.close()
        self._tell()

    def _tell(self) -> None:
        if not self._busy:
            self._quiet.set()

    async def close(self) -> None:
        """End them all. Runs that are under way see `closed` and end as if they were killed."""
        self.closed = True
        while self._busy:
            self._quiet.clear()
            await self._quiet.wait()
        for child in tuple(self._idle):
            await self.bury(child)
