"""Handler for the calls of an executor, which returns the exception of a call as a value.

Invariant: the task of a call succeeds unless the process of the task dies. The caller receives the exception of a call
as the original object. The module imports only the standard library, cloudpickle, and light modules, because
child processes unpickle its classes.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

from batchlab.core.task_context import Context
from batchlab.worker import exception_pickling, handlers

_SHARED = (FunctionType, BuiltinFunctionType, type)

_prepared = ""
"""Owner (the executor) of the initializer that the process ran last."""


@dataclass(frozen=True, slots=True)
class Raised:
    """Exception of a call: as one line, as a traceback, and pickled, or b"" if its type cannot be pickled.

    `initializer` is true if the initializer raised the exception, so that the call was not made.
    """

    message: str
    traceback: str
    pickled: bytes
    initializer: bool = False


@dataclass(frozen=True, slots=True)
class Initializer:
    """Pickled function that runs in a process before the first call of the executor `owner`."""

    owner: str
    pickled: bytes


class Calls:
    """Handler of an executor's job.

    An item of the job is [function, argument, …] with plain arguments, or [function, (args, kwargs, …)], where further
    elements are the shared values that the function uses. A number in place of the function is an index of `functions`,
    which has the pickled functions that calls share.
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
                return handlers.complete(function(*args[0][0], **args[0][1]))
            return handlers.complete(function(*args))
        except BaseException as error:  # noqa: BLE001 - the caller receives every exception
            return _raised_error(error, initializer=not ready)

    def _prepare(self) -> None:
        global _prepared
        # Executors share processes, so the initializer runs again if another executor's initializer ran in between.
        if self._initializer and self._initializer.owner != _prepared:
            pickle.loads(self._initializer.pickled)()  # noqa: S301 - the user's own code
            _prepared = self._initializer.owner

    def _function(self, number: int) -> Callable[..., Any]:
        if number in self._loaded:
            return self._loaded[number]
        function: Callable[..., Any] = pickle.loads(self._functions[number])  # noqa: S301 - the user's own code
        # A callable outside of `_SHARED` may change its state during a call, so each call unpickles a new object.
        if isinstance(function, _SHARED):
            self._loaded[number] = function
        return function


class Starred:
    """Callable that calls `function(*item)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "")

    def __call__(self, item: Sequence[Any]) -> Any:
        return self.function(*item)


class WithShared:
    """Handler whose items are tuples of the function's item and of the shared values that the function uses.

    The worker fetches the shared values of an item. A pickled function itself cannot refer to objects in the bucket.
    """

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled
        self._call: handlers.Call | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return WithShared, (self._pickled,)

    def __call__(self, item: tuple[Any, ...], ctx: Context) -> Any:
        if self._call is None:
            function = pickle.loads(self._pickled)  # noqa: S301 - the user's own code
            self._call = handlers.adapt("The function", function)
        return self._call(item[0], ctx)


class Timed:
    """Callable that returns the result of `function()` and its duration in seconds."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self) -> tuple[Any, float]:
        began_s = time.perf_counter()
        result = handlers.complete(self.function())
        return result, time.perf_counter() - began_s


def _raised_error(error: BaseException, *, initializer: bool) -> Raised:
    fault = handlers.explain(error)
    return Raised(fault["reason"], fault["traceback"], exception_pickling.pickled(error), initializer)
