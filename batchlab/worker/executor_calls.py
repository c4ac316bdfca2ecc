"""An executor's calls as a worker makes them: what a call raises travels as a value.

Invariant: for the grid the task of a call succeeds unless its process dies. A call's exception is
its caller's business, and comes back as the object it is. Unpickled by child processes: standard
library and cloudpickle only.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

from batchlab.worker import handlers

_SHARED = (FunctionType, BuiltinFunctionType, type)

_prepared = ""
"""Whose initializer this process has run last."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A call's exception: in one line, as a traceback, and pickled where that is possible.

    `initializer` says that the call was not made, because the initializer raised this.
    """

    told: str
    traceback: str
    pickled: bytes | None
    initializer: bool = False


@dataclass(frozen=True, slots=True)
class Initializer:
    """A pickled call without arguments, run before the first call of `owner` in a process."""

    owner: str
    pickled: bytes


class Calls:
    """The handler of an executor's job.

    An item is [function, argument, …] with plain arguments, or [function, (args, kwargs)]. The
    function may be a number: its place among `functions`, those that several calls share, pickled.
    """

    def __init__(self, functions: Sequence[bytes], initializer: Initializer | None) -> None:
        self._functions = functions
        self._initializer = initializer
        self._loaded: dict[int, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (self._functions, self._initializer)

    def __call__(self, item: list[Any]) -> Any:
        ready = False
        try:
            self._prepare()
            ready = True
            function, *args = item
            if type(function) is int:
                function = self._function(function)
            if len(args) == 1 and type(args[0]) is tuple:
                return function(*args[0][0], **args[0][1])
            return function(*args)
        except BaseException as error:  # noqa: BLE001 - all of them are the caller's
            return _raised(error, initializer=not ready)

    def _prepare(self) -> None:
        global _prepared
        # Processes are shared: where another executor's has run in between, ours runs again.
        if self._initializer and self._initializer.owner != _prepared:
            pickle.loads(self._initializer.pickled)()  # noqa: S301 - the user's own code
            _prepared = self._initializer.owner

    def _function(self, number: int) -> Callable[..., Any]:
        if number in self._loaded:
            return self._loaded[number]
        function: Callable[..., Any] = pickle.loads(self._functions[number])  # noqa: S301 - as above
        # Any other callable may keep something from call to call, and shall be as it was sent.
        if isinstance(function, _SHARED):
            self._loaded[number] = function
        return function


class Starred:
    """`function(*item)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "")

    def __call__(self, item: Sequence[Any]) -> Any:
        return self.function(*item)


class Timed:
    """`function()`, and for how many seconds it ran."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self) -> tuple[Any, float]:
        began_s = time.perf_counter()
        result = self.function()
        return result, time.perf_counter() - began_s


def _raised(error: BaseException, *, initializer: bool) -> Raised:
    fault = handlers.explain(error)
    return Raised(fault["reason"], fault["traceback"], _pickled(error), initializer)


def _pickled(error: BaseException) -> bytes | None:
    import cloudpickle  # takes as long as Python's start, and few calls raise

    try:
        data: bytes = cloudpickle.dumps(error)
    except Exception:  # noqa: BLE001 - an exception may carry anything, and its text says enough
        return None
    return data
