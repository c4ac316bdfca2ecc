"""Warm child process that runs user code, with the tasks of one bundle per request.

Invariant: the answer of a task is in the pipe before the next task starts, and the shared memory has the running task's
index. A crash of the child process fails at most the task that caused the crash. The module imports only the standard
library and a few light modules, because the start-up of a child delays the first task.

Requests and answers are lines of JSON. The answer to a task is ["ok", task, run_s, value, extra] or ["failed", task,
run_s, fault, extra]. If the handler cannot be loaded, the only answer is ["import", fault, extra]. The last line of
each request is ["end", why].
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any, TypedDict

from batchlab.core.operating_system import end_with_pipe, peak_bytes, resident_bytes
from batchlab.worker import handlers, task_log
from batchlab.worker.shared_memory import IMPORTING, ChildState
from batchlab.worker.task_executor import ExecutionRequest, TaskExecutor, TaskResult

EXIT_PIPE_LOST = 81
"""Exit code of a child process that cannot answer because a task closed the child's pipes."""

_READ_BYTES = 1 << 16
"""Size of the buffer for a read of a pipe. A pipe holds 64 KiB, and a larger buffer would be mapped for each read."""
_MIN_MEASURED_S = 0.005
"""Run time from which a task is measured. A measurement takes about 50 µs, which is 1% of this run time."""


class RequestLine(TypedDict):
    """One request to a child process: the tasks to run, and the limits after which no further task starts."""

    request: ExecutionRequest
    items: list[tuple[int, Any]]
    log: str
    left_s: float | None
    """Seconds during which tasks may start, or None without a time limit."""
    must_start: bool
    """Whether the first task starts even if `left_s` is used up."""
    memory_bytes: int | None
    gpus: str | None
    """Value of CUDA_VISIBLE_DEVICES, or None to leave the variable unchanged."""


class Child:
    """Loop of a child process, which runs requests until the pipe of requests is closed."""

    def __init__(self, requests: int, answers: int, board: ChildState) -> None:
        self._requests = requests
        self._answers = answers
        self._inodes = os.fstat(requests).st_ino, os.fstat(answers).st_ino
        self._board = board
        self._pid = os.getpid()
        self._libc = ctypes.CDLL(None)
        self._out = Output()
        self._has_code = False
        """Whether the code folder is in the module search path. All requests have the same code folder."""
        self._meter = TaskMeter()
        self._last = b""
        """Answer of the last task of a request, until the answer is written together with the end of the request."""

    def serve(self) -> None:
        rest = b""
        while True:
            self._board.rest()
            line, rest = self._line(rest)
            if not line:
                return
            why = self._run_request(json.loads(line))
            self._out.detach()
            self._check_requests()
            self._answer(f'["end","{why}"]')

    def _line(self, data: bytes) -> tuple[bytes, bytes]:
        pieces = [data]
        while b"\n" not in pieces[-1]:
            piece = os.read(self._requests, _READ_BYTES)
            if not piece:
                return b"", b""
            pieces.append(piece)
        line, _, rest = b"".join(pieces).partition(b"\n")
        return line, rest

    def _run_request(self, line: RequestLine) -> str:
        """Run the tasks of a request, and return the reason why the request ended."""
        left_s = line["left_s"]
        deadline_s = float("inf") if left_s is None else time.monotonic() + left_s
        self._out.attach(line["log"], line["request"]["cwd"])
        log_at = self._out.size()
        self._board.mark(IMPORTING, time.monotonic(), log_at)
        if line["gpus"] is not None:
            # The variable is set before the handler is imported, because an import may initialize CUDA.
            os.environ["CUDA_VISIBLE_DEVICES"] = line["gpus"]
        if (code := line["request"]["code"]) and not self._has_code:
            sys.path.insert(0, code)
            self._has_code = True
        try:
            executor = TaskExecutor(line["request"])
        except handlers.Problem as problem:
            self._exit_if_forked()
            span = (log_at, self._out.settle(log_at))
            self._answer(json.dumps(["import", problem.fault, {"span": span}]))
            return "import"
        self._exit_if_forked()
        # The process state is read after the handler is loaded, so that settings made by the handler's modules stay.
        process_state = ProcessState()
        self._meter.begin_request()
        memory = MemoryGrowth(line["memory_bytes"])
        must_start = line["must_start"]
        for number, (task, item) in enumerate(line["items"], 1):
            self._board.rest()
            now_s = time.monotonic()
            if not self._board.may_start():
                return "stop"
            if now_s >= deadline_s and not must_start:
                return "budget"
            if memory.worn_out():
                return "worn out"
            must_start = False
            log_at = self._task(executor, task, item, log_at, is_last=number == len(line["items"]))
            process_state.restore()
        return "done"

    def _task(self, executor: TaskExecutor, task: int, item: Any, log_at: int, *, is_last: bool) -> int:
        """Run one task and write the task's answer. Return the log offset of the next task's output.

        The answer of the last task is written with the end of the request, so that the worker wakes up only once.
        """
        extra: dict[str, Any] = {}
        done: TaskResult | None = None
        self._meter.start()
        started_s = time.monotonic()
        self._board.mark(task, started_s, log_at)
        try:
            done = executor.run(task, item)
        except BaseException as error:  # noqa: BLE001 - any exception is a failure of the task
            run_s = time.monotonic() - started_s
            self._exit_if_forked()
            word, text = "failed", json.dumps(executor.explain(task, error))
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
        if executor.touched:
            extra["folder"] = True
        if run_s >= _MIN_MEASURED_S:
            extra["metrics"] = self._meter.measure(done, executor.program_memory_bytes)
        answer = f'["{word}",{task},{run_s:.6f},{text},{json.dumps(extra) if extra else "null"}]'
        if is_last:
            self._last = answer.encode() + b"\n"
        else:
            self._answer(answer)
        return end

    def _exit_if_forked(self) -> None:
        # A handler that forks may return in both processes, but only the original process may answer.
        if os.getpid() != self._pid:
            os._exit(0)

    def _answer(self, text: str) -> None:
        self._last += text.encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        # A handler may have closed the pipe of answers, and a later call of `open` may have reused the pipe's file
        # descriptor. The process exits to avoid a write into a user's file.
        data, self._last = self._last, b""
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
            pass  # The process exits if the pipe of requests is closed, as if its descriptor had been reused.
        # The exit does not fail any task, because every task of the request has answered. Another child serves the next
        # request.
        self._flush()
        os._exit(EXIT_PIPE_LOST)


class Output:
    """Redirection of file descriptors 1 and 2, sys.stdout, and sys.stderr to the execution's log.

    The redirected streams are line buffered, so the log has the output that a task printed before a crash.
    """

    def __init__(self) -> None:
        self._log = ""
        self._cwd = ""
        self._inode = 0
        # The stream objects stay the same when the file descriptors are redirected.
        self._streams: tuple[IO[str], IO[str]] = (_stream(1), _stream(2))
        sys.stdout, sys.stderr = self._streams

    def attach(self, log: str, cwd: str) -> None:
        self._redirect(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        os.chdir(cwd)
        # getcwd returns the kernel's name of the folder, with resolved links.
        self._log, self._cwd = log, os.getcwd()  # noqa: PTH109

    def detach(self) -> None:
        """Leave the folder of the execution, because the worker is about to remove the folder."""
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
        """Restore the output state after a task, and return the log's size.

        `settle` flushes the streams, trims the task's output to its size limit, and restores the streams, the
        descriptors, and the current folder.
        """
        out, err = self._streams
        try:
            out.flush()
            err.flush()
            if os.getcwd() != self._cwd:  # noqa: PTH109 - twice as fast as calling chdir
                os.chdir(self._cwd)
            if not (sys.stdout is out and sys.stderr is err):
                sys.stdout, sys.stderr = out, err
            first = os.fstat(1)
            if first.st_ino == self._inode == os.fstat(2).st_ino:
                is_large = first.st_size - log_at > task_log.share(log_at)
                return task_log.trim(self._log, log_at) if is_large else first.st_size
        except (OSError, ValueError):
            os.makedirs(self._cwd, exist_ok=True)  # noqa: PTH103 - the task may have removed the folder
        self.attach(self._log, self._cwd)
        return self.size()


def _stream(fd: int) -> IO[str]:
    return open(fd, "w", 1, "utf-8", "backslashreplace", closefd=False)


class ProcessState:
    """Kernel state of the child process that a task may change: the umask and alarms.

    Python's own state (modules, os.environ) is not restored, because handlers change the state of Python on purpose.
    """

    def __init__(self) -> None:
        self._umask = os.umask(0)
        os.umask(self._umask)

    def restore(self) -> None:
        os.umask(self._umask)
        # A pending alarm would signal the next task, which lacks a handler for the signal.
        signal.setitimer(signal.ITIMER_REAL, 0)


class TaskMeter:
    """Meter of the CPU time, the peak memory, and the output size of tasks."""

    def __init__(self) -> None:
        self._cpu_s = self._programs_s = 0.0
        self._has_request = False

    def begin_request(self) -> None:
        """Leave the import of the handler, with its memory and its programs, out of the first task."""
        self._programs_s = _programs_cpu_s()
        if not self._has_request:
            peak_bytes()
            self._has_request = True

    def start(self) -> None:
        """Begin to measure a task."""
        self._cpu_s = time.process_time()

    def measure(self, done: TaskResult | None, program_memory_bytes: int) -> tuple[float, int | None, int | None]:
        """Return the CPU time in seconds, the peak memory in bytes, and the size in bytes of the result `done`.

        The peak memory includes short tasks since the last measured task, because only a measurement resets the peak.
        On systems other than Linux, the peak memory includes all earlier tasks of the child process.
        """
        before_s, self._programs_s = self._programs_s, _programs_cpu_s()
        cpu_s = time.process_time() - self._cpu_s + self._programs_s - before_s
        own_bytes = peak_bytes()
        memory_bytes = None if own_bytes is None else max(own_bytes, program_memory_bytes)
        return round(cpu_s, 6), memory_bytes, _size_of(done) if done else None


def _size_of(done: TaskResult) -> int | None:
    """Return the size in bytes of a result with its files, or None if a file no longer exists."""
    try:
        return len(done.text) + sum(Path(path).stat().st_size for path, _ in done.uploads)
    except OSError:
        return None


def _programs_cpu_s() -> float:
    """Return the CPU time of programs that have ended and that the process waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class MemoryGrowth:
    """Memory growth of a child process. After too much growth, a new child process replaces the child process.

    Python seldom returns memory to the system, so the memory of earlier tasks would count for a later task.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit = limit_bytes
        self._first = resident_bytes() if limit_bytes else 0
        self._fresh = True

    def worn_out(self) -> bool:
        fresh, self._fresh = self._fresh, False
        if self._limit is None or fresh:
            return False
        return resident_bytes() - self._first > (self._limit - self._first) / 2


def main() -> None:
    """Run the child process with the arguments from `child_process.ChildProcess`."""
    requests, answers, life = (int(text) for text in sys.argv[1:4])
    board = sys.argv[4]
    for fd in (requests, answers, life):
        os.set_inheritable(fd, False)
    end_with_pipe(life)
    faulthandler.enable(2)
    sys.argv = ["batchlab"]
    Child(requests, answers, ChildState(board)).serve()
    # sys.exit would wait for threads that a handler has left running.
    os._exit(0)


if __name__ == "__main__":
    main()
