"""Debuggers for the local run of a task: pdb, an IDE with debugpy, or a placeholder without a debugger.

Invariant: a debugger does not change the exception that the task raises. The process that runs the task imports this
module, so the module imports only small modules, and debugpy only if the user requests debugpy.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from batchlab.client.debug.task_folder import TaskRun
from batchlab.worker import handlers

HOST = "127.0.0.1"


class Debugger:
    """Placeholder whose methods do nothing, so that the task runs without a debugger."""

    def begin(self, task_run: TaskRun) -> None:
        """Prepare the debugger just before the task's handler is called."""

    @contextmanager
    def around(self, task_run: TaskRun) -> Iterator[None]:
        """Wrap the call of the task's handler."""
        del task_run
        yield

    def on_failure(self, error: BaseException | None) -> None:
        """Inspect the exception that the task raised. `error` is None if the user's code was not running."""


class Pdb(Debugger):
    """Python's own debugger. Pdb starts at the exception, and with `at_start` also at the handler's first line."""

    def __init__(self, *, at_start: bool) -> None:
        self._at_start = at_start

    def begin(self, task_run: TaskRun) -> None:
        if self._at_start and _code(task_run) is None:
            _say("The debugger cannot stop at the first line, because the handler is not a Python function.")

    @contextmanager
    def around(self, task_run: TaskRun) -> Iterator[None]:
        code = _code(task_run) if self._at_start else None
        if code is None:
            yield
            return
        sys.settrace(_Stop(code))
        try:
            yield
        finally:
            sys.settrace(None)

    def on_failure(self, error: BaseException | None) -> None:
        if error is None or error.__traceback__ is None:
            return
        import pdb

        _say(
            f"Post-mortem of {type(error).__name__}: `p` shows values, `u` and `d` go up and down the stack, and `q` "
            "ends the debugger."
        )
        pdb.post_mortem(error.__traceback__)


class _Stop:
    """Trace function that starts pdb when the function with the code object `code` is called."""

    def __init__(self, code: CodeType) -> None:
        self._code = code

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != "call" or frame.f_code is not self._code:
            return None
        import pdb

        sys.settrace(None)
        debugger = pdb.Pdb()
        debugger.set_trace(frame)
        return debugger.trace_dispatch


class Ide(Debugger):
    """The debugger debugpy, which waits until an IDE attaches. The IDE sets its own breakpoints."""

    def __init__(self, port: int, *, at_start: bool) -> None:
        self._port = port
        self._at_start = at_start

    def begin(self, task_run: TaskRun) -> None:
        debugpy = importlib.import_module("debugpy")
        debugpy.listen((HOST, self._port))
        code = task_run.request["code"]
        _say(
            f"Waiting for an IDE to attach at {HOST}:{self._port}. The code is in "
            f"{code or 'the function that was submitted'}."
        )
        debugpy.wait_for_client()
        if self._at_start:
            debugpy.breakpoint()


def choose(*, pdb: bool, at_start: bool, port: int | None) -> Debugger:
    """Return the debugger that the options request."""
    if port is not None:
        return Ide(port, at_start=at_start)
    return Pdb(at_start=at_start) if pdb or at_start else Debugger()


def _code(task_run: TaskRun) -> CodeType | None:
    """Return the code object of the handler without the handler's decorators, or None if the code object is unknown."""
    handler = task_run.request["handler"]
    if not handler:
        return None
    function = inspect.unwrap(handlers.find(handler, task_run.request["function"]))
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        function = getattr(type(function), "__call__", None)  # noqa: B004 - reads the code of `__call__`
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - prints a message to the user
