"""The debuggers that a task can be run under: none, pdb, or an IDE by debugpy.

Invariant: whatever the debugger does, the task's exception is still the one that it raised.
Imported by the process that runs the task: standard library only, and debugpy where it is asked
for.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from batchlab.client.debug.task_folder import Told
from batchlab.worker import handlers

HOST = "127.0.0.1"


class Debugger:
    """None: the task just runs."""

    def begin(self, told: Told) -> None:
        """The handler has been loaded, and is about to be called."""

    @contextmanager
    def around(self, told: Told) -> Iterator[None]:
        """Around the handler's call."""
        del told
        yield

    def failed(self, error: BaseException | None) -> None:
        """The task has raised it; None where no code of the user's was running."""


class Pdb(Debugger):
    """Python's own: at the exception, and with `at_start` at the handler's first line too."""

    def __init__(self, *, at_start: bool) -> None:
        self._at_start = at_start

    def begin(self, told: Told) -> None:
        if self._at_start and _code(told) is None:
            _say("There is no first line to stop at: the handler is not a function of Python.")

    @contextmanager
    def around(self, told: Told) -> Iterator[None]:
        code = _code(told) if self._at_start else None
        if code is None:
            yield
            return
        sys.settrace(_Stop(code))
        try:
            yield
        finally:
            sys.settrace(None)

    def failed(self, error: BaseException | None) -> None:
        if error is None or error.__traceback__ is None:
            return
        import pdb

        _say(
            f"Post-mortem of {type(error).__name__}: `p` shows values, `u` and `d` go up and down "
            "the stack, `q` leaves."
        )
        pdb.post_mortem(error.__traceback__)


class _Stop:
    """Hands over to pdb when the function begins."""

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
    """debugpy: waits until an IDE is attached, which knows its own breakpoints."""

    def __init__(self, port: int, *, at_start: bool) -> None:
        self._port = port
        self._at_start = at_start

    def begin(self, told: Told) -> None:
        debugpy = importlib.import_module("debugpy")
        debugpy.listen((HOST, self._port))
        code = told.request["code"]
        _say(
            f"Waiting for an IDE to attach at {HOST}:{self._port}; the code is in "
            f"{code or 'the function that was submitted'}."
        )
        debugpy.wait_for_client()
        if self._at_start:
            debugpy.breakpoint()


def choose(*, pdb: bool, at_start: bool, port: int | None) -> Debugger:
    """The debugger that was asked for."""
    if port is not None:
        return Ide(port, at_start=at_start)
    return Pdb(at_start=at_start) if pdb or at_start else Debugger()


def _code(told: Told) -> CodeType | None:
    """That of the user's function, below what decorates it."""
    handler = told.request["handler"]
    if not handler:
        return None
    found = inspect.unwrap(handlers.find(handler, told.request["function"]))
    if not inspect.isfunction(found) and not inspect.ismethod(found):
        found = getattr(type(found), "__call__", None)  # noqa: B004 - its code, not whether it is
    code = getattr(found, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - of a program of its own
