"""The worker's end of a warm child process: its pipes, its board, and its death.

Invariant: nothing here blocks the event loop, and a child that has ended is always waited for,
its process group killed first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from batchlab.errors import BackendError
from batchlab.worker.board import BOOTING, Board
from batchlab.worker.child import Job
from batchlab.worker.processes import kill_family

_READ_BYTES = 1 << 18
_REAP_STEP_S = 0.002
_LEAVE_S = 0.2


class ChildProcess:
    """One child, bound to one folder of code. Made by `start`, ended by `kill` or `leave`."""

    def __init__(self, folder: Path, digest: str, code: Path | None) -> None:
        """Start it; it boots while the first request is already on its way. OSError."""
        self.digest = digest
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._eof = False
        folder.mkdir(parents=True)
        self.board = Board(folder / "board", create=True)
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        # Never written to: its end is the news.
        life, self._life = os.pipe()
        theirs = (requests, answers, life)
        try:
            with (folder / "boot.log").open("wb") as log:
                # Started from the loop's own thread: the parent-death signal means the thread.
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "batchlab.worker.child"),
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
        self._unsent = b""
        self._loop.add_reader(self._answers, self._readable)

    @property
    def pid(self) -> int:
        """Its process id, which is that of its process group too."""
        return self._process.pid

    # --- Talking ---

    def send(self, job: Job) -> None:
        """Hand over a request; what the pipe does not take at once follows by itself."""
        self._unsent += json.dumps(job).encode() + b"\n"
        self._writable()

    def _writable(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._requests, self._unsent) :]
        except BlockingIOError:
            self._loop.add_writer(self._requests, self._writable)
            return
        except BrokenPipeError:
            self._unsent = b""  # it is dead, which the end of its answers tells
        self._loop.remove_writer(self._requests)

    def _readable(self) -> None:
        try:
            data = os.read(self._answers, _READ_BYTES)
        except BlockingIOError:
            return
        self._buffer += data
        if not data:
            self._eof = True
            self._loop.remove_reader(self._answers)
        self._news.set()

    async def answers(self, wait_s: float) -> list[Any]:
        """Lines that have come, [] where none has come within `wait_s` or the child has ended.

        ValueError where they are not ours: a handler wrote into the pipe.
        """
        if not self._eof:
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                return []
            self._news.clear()
        return self._lines()

    def _lines(self) -> list[Any]:
        whole, newline, rest = self._buffer.rpartition(b"\n")
        if not newline:
            return []
        self._buffer = bytearray(rest)
        return list(json.loads(b"[" + whole.replace(b"\n", b",") + b"]"))

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
            while self._process.poll() is None:
                await asyncio.sleep(_REAP_STEP_S)
            # A descendant that got away may hold the pipe open, so its end is not waited for.
            while not self._eof:
                size = len(self._buffer)
                self._readable()
                if len(self._buffer) == size:
                    break
            self._close()
        try:
            last = self._lines()
        except ValueError:
            last = []  # the handler wrote into the pipe; the rest of the answers went with it
        return self._process.returncode, last

    def _close(self) -> None:
        self._loop.remove_reader(self._answers)
        self._loop.remove_writer(self._requests)
        for fd in (self._answers, self._requests, self._life):
            os.close(fd)

    async def leave(self) -> None:
        """Let an idle child go: it ends when its pipe closes, or is killed soon after."""
        deadline_s = self._loop.time() + _LEAVE_S
        if self._process.returncode is None:
            os.close(self._requests)
            self._requests = os.open(os.devnull, os.O_WRONLY)
        while not self.ended and self._loop.time() < deadline_s:
            await asyncio.sleep(_REAP_STEP_S)
        await self.kill()

    def check_booted(self, code: int) -> None:
        """BackendError where it died before it could do anything: no task is to blame."""
        if self.board.task == BOOTING:
            said = (self._folder / "boot.log").read_text(errors="replace").strip()[-500:]
            raise BackendError(f"A task process could not start ({describe_exit(code)}): {said}")


def describe_exit(code: int) -> str:
    """`exit 3`, `exit -11 (SIGSEGV)`."""
    if code >= 0:
        return f"exit {code}"
    try:
        return f"exit {code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"exit {code}"


def monotonic_s() -> float:
    """The clock of the boards: the system's, whatever Clock the worker was given."""
    return time.monotonic()
