"""The warm child process in which user code runs, a bundle's tasks at a time.

Invariant: a task's answer is in the pipe before the next task starts, and the board names the
running one, so whatever kills this process costs at most the task that killed it. Imports the
standard library and a few light modules of ours only: start-up is part of every first task.

Lines of JSON: a request in; out come ["ok", task, run_s, value, extra] or ["failed", task, run_s,
fault, extra] for each task, instead of them ["import", fault, extra] where the handler cannot be
loaded, and ["end", why] last.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any, TypedDict

from batchlab.worker import handlers, task_log
from batchlab.worker.shared_memory import IMPORTING, Board
from batchlab.worker.task_executor import Bench, Request

EXIT_PIPE_LOST = 81
"""Exit code of a child that cannot answer any more, because a task closed its files."""

_PR_SET_PDEATHSIG = 1


class RequestLine(TypedDict):
    """What a child is asked for at once: tasks in order, and how long further ones may start."""

    request: Request
    items: list[tuple[int, Any]]
    log: str
    left_s: float | None
    """Seconds until no further task may start, None without such a limit."""
    must_start: bool
    """The first task starts whatever `left_s` says."""
    memory_bytes: int | None


class Child:
    """Serves requests until the pipe is closed."""

    def __init__(self, requests: int, answers: int, board: Board) -> None:
        self._requests = requests
        self._answers = answers
        self._inodes = os.fstat(requests).st_ino, os.fstat(answers).st_ino
        self._board = board
        self._pid = os.getpid()
        self._libc = ctypes.CDLL(None)
        self._out = Output()

    def serve(self) -> None:
        rest = b""
        while True:
            self._board.rest()
            line, rest = self._line(rest)
            if not line:
                return
            why = self._serve_line(json.loads(line))
            self._out.detach()
            self._check_requests()
            self._answer(f'["end","{why}"]')

    def _line(self, data: bytes) -> tuple[bytes, bytes]:
        pieces = [data]
        while b"\n" not in pieces[-1]:
            piece = os.read(self._requests, 1 << 20)
            if not piece:
                return b"", b""
            pieces.append(piece)
        line, _, rest = b"".join(pieces).partition(b"\n")
        return line, rest

    def _serve_line(self, asked: RequestLine) -> str:
        left_s = asked["left_s"]
        deadline_s = float("inf") if left_s is None else time.monotonic() + left_s
        self._out.attach(asked["log"], asked["request"]["cwd"])
        log_at = self._out.size()
        self._board.mark(IMPORTING, time.monotonic(), log_at)
        try:
            bench = Bench(asked["request"])
        except handlers.Problem as problem:
            self._exit_if_forked()
            span = (log_at, self._out.settle(log_at))
            self._answer(json.dumps(["import", problem.fault, {"span": span}]))
            return "import"
        self._exit_if_forked()
        # Taken after loading: what a module sets for itself stays.
        habits = Habits()
        memory = Memory(asked["memory_bytes"])
        must_start = asked["must_start"]
        for task, item in asked["items"]:
            self._board.rest()
            now_s = time.monotonic()
            if not self._board.may_start():
                return "stop"
            if now_s >= deadline_s and not must_start:
                return "budget"
            if memory.worn_out():
                return "worn out"
            must_start = False
            log_at = self._task(bench, task, item, log_at)
            habits.restore()
        return "done"

    def _task(self, bench: Bench, task: int, item: Any, log_at: int) -> int:
        """Run one task and answer; returns where the next one's output begins."""
        extra: dict[str, Any] = {}
        started_s = time.monotonic()
        self._board.mark(task, started_s, log_at)
        try:
            done = bench.run(task, item)
        except BaseException as error:  # noqa: BLE001 - every way to fail is the task's failure
            run_s = time.monotonic() - started_s
            self._exit_if_forked()
            word, text = "failed", json.dumps(bench.explain(error))
        else:
            run_s = time.monotonic() - started_s
            self._exit_if_forked()
            word, text = "ok", done.text
            if done.uploads:
                extra["uploads"] = done.uploads
        self._libc.fflush(None)
        end = self._out.settle(log_at)
        if end > log_at:
            extra["span"] = (log_at, end)
        if bench.touched:
            extra["folder"] = True
        self._answer(
            f'["{word}",{task},{run_s:.6f},{text},{json.dumps(extra) if extra else "null"}]'
        )
        return end

    def _exit_if_forked(self) -> None:
        # A handler that forks and returns twice would answer twice.
        if os.getpid() != self._pid:
            os._exit(0)

    def _answer(self, text: str) -> None:
        # A handler may have closed our pipes, and a later open may have got their numbers: ending
        # is better than writing into a file of the user's.
        data = text.encode() + b"\n"
        try:
            if os.fstat(self._answers).st_ino != self._inodes[1]:
                os._exit(EXIT_PIPE_LOST)
            while data:
                data = data[os.write(self._answers, data) :]
        except OSError:
            os._exit(EXIT_PIPE_LOST)

    def _check_requests(self) -> None:
        try:
            if os.fstat(self._requests).st_ino == self._inodes[0]:
                return
        except OSError:
            pass  # closed, which is as bad as reused
        # Every task has answered, so nobody is blamed: another child takes the next request.
        os._exit(EXIT_PIPE_LOST)


class Output:
    """File descriptors 1 and 2, sys.stdout and sys.stderr: all of them the execution's log.

    Line buffered, so that what a task printed before it crashed is there to be read.
    """

    def __init__(self) -> None:
        self._log = ""
        self._cwd = ""
        self._inode = 0
        # They stay the same whatever is behind the descriptors.
        self._streams: tuple[IO[str], IO[str]] = (_stream(1), _stream(2))
        sys.stdout, sys.stderr = self._streams

    def attach(self, log: str, cwd: str) -> None:
        self._redirect(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        os.chdir(cwd)
        # As the kernel names it, whatever links lead there.
        self._log, self._cwd = log, os.getcwd()  # noqa: PTH109

    def detach(self) -> None:
        """Let go of the execution's folder: it is about to be removed."""
        os.chdir("/")
        self._redirect(os.open(os.devnull, os.O_WRONLY))

    def _redirect(self, fd: int) -> None:
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        if fd > 2:
            os.close(fd)
        self._inode = os.fstat(1).st_ino
        out, err = self._streams
        if sys.stdout is not out or sys.stderr is not err or out.closed or err.closed:
            self._streams = sys.stdout, sys.stderr = _stream(1), _stream(2)

    def size(self) -> int:
        return os.fstat(1).st_size

    def settle(self, log_at: int) -> int:
        """After a task: what it printed is in the log, cut to its share, and what it did to the
        streams, the descriptors or the current folder is undone. Returns the log's size."""
        out, err = self._streams
        try:
            out.flush()
            err.flush()
            if os.getcwd() != self._cwd:  # noqa: PTH109 - half of what it takes to go there
                os.chdir(self._cwd)
            if not (sys.stdout is out and sys.stderr is err):
                sys.stdout, sys.stderr = out, err
            first = os.fstat(1)
            if first.st_ino == self._inode == os.fstat(2).st_ino:
                return (
                    task_log.trim(self._log, log_at)
                    if self._large(first, log_at)
                    else first.st_size
                )
        except (OSError, ValueError):
            os.makedirs(self._cwd, exist_ok=True)  # noqa: PTH103 - it may have removed the folder
        self.attach(self._log, self._cwd)
        return self.size()

    def _large(self, info: os.stat_result, log_at: int) -> bool:
        return info.st_size - log_at > task_log.share(log_at)


def _stream(fd: int) -> IO[str]:
    return open(fd, "w", 1, "utf-8", "backslashreplace", closefd=False)


class Habits:
    """What the kernel keeps for this process and a task may have changed: its umask, its alarms.

    Python's own state (modules, os.environ) is left alone: handlers keep things there on purpose.
    """

    def __init__(self) -> None:
        self._umask = os.umask(0)
        os.umask(self._umask)

    def restore(self) -> None:
        os.umask(self._umask)
        # Or it would ring for the next task, which has no handler for it.
        signal.setitimer(signal.ITIMER_REAL, 0)


class Memory:
    """Whether this process should make room for a fresh one between two tasks.

    Python seldom gives memory back, so that a task would be charged for its predecessors.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit = limit_bytes
        self._first = _resident() if limit_bytes else 0
        self._fresh = True

    def worn_out(self) -> bool:
        fresh, self._fresh = self._fresh, False
        if self._limit is None or fresh:
            return False
        return _resident() - self._first > (self._limit - self._first) / 2


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def die_with(life: int) -> None:
    """End this process and its descendants when the worker ends, however it ends."""
    # The kernel signals the pipe's end to the whole process group. The parent-death signal is only
    # for kernels that cannot: it reaches this process alone, and may come first, and then the
    # pipe's end finds nobody left to pass it on to the programs that a task has started.
    try:
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_blocking(life, False)
    try:
        os.read(life, 1)
    except BlockingIOError:
        return  # nothing to read, but somebody could write: the worker lives
    os._exit(0)


def main() -> None:
    """Started by child_process.ChildProcess only."""
    requests, answers, life = (int(text) for text in sys.argv[1:4])
    board, code = sys.argv[4:6]
    for fd in (requests, answers, life):
        os.set_inheritable(fd, False)
    die_with(life)
    faulthandler.enable(2)
    sys.argv = ["batchlab"]
    if code:
        sys.path.insert(0, code)
    Child(requests, answers, Board(board)).serve()
    # Not sys.exit: threads that a handler left behind would be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
