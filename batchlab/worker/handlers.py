"""Loading of user handlers, and descriptions of their exceptions.

Invariant: every exception of user code becomes a failure with a reason. The module imports only the standard library
and light modules, because every child process imports the module.
"""

from __future__ import annotations

import importlib
import pickle
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CoroutineType, FunctionType, ModuleType
from typing import Any

from batchlab.core.task_context import Context

Call = Callable[[Any, Context], Any]
Fault = dict[str, Any]
"""The fields of a `model.Failure` except the task, in the form that a child process sends."""

_PACKAGE_FOLDER = str(Path(__file__).resolve().parent.parent) + "/"
_MAX_REASON_LENGTH = 400
_MAX_TRACEBACK_LENGTH = 12_000


class Problem(Exception):
    """Failure of a task with a known kind and reason."""

    def __init__(self, kind: str, reason: str, *, error: str = "", code: int | None = None) -> None:
        super().__init__(reason)
        self.fault = fault(kind, reason, error=error, exit_code=code)


def fault(kind: str, reason: str, *, error: str = "", traceback: str = "", exit_code: int | None = None) -> Fault:
    """Return the fields of a Failure. Long texts are shortened, and unprintable characters are escaped."""
    return {
        "kind": kind,
        "reason": _visible(" ".join(_clip(reason, _MAX_REASON_LENGTH).split())),
        "error": _visible(error),
        "traceback": "\n".join(map(_visible, _clip(traceback, _MAX_TRACEBACK_LENGTH).split("\n"))),
        "exit_code": exit_code,
    }


def _visible(text: str) -> str:
    """Escape unprintable characters in `text`, for example lone surrogates, color codes, and NUL."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def _clip(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit // 3
    return f"{text[:head]} [...] {text[head - limit :]}"


# --- Loading -------------------------------------------------------------------------------------


def load(handler: str, function: str | None) -> Call:
    """Load the handler `module:function`, or the function pickled in the file `function`.

    The returned callable always takes the arguments (item, ctx). A handler that cannot be loaded raises Problem of kind
    "import".
    """
    try:
        return _load_pickled(handler, function) if function else _load(handler, None)
    except Problem:
        raise
    except BaseException as error:  # User code runs during the import and may raise any exception.
        raise _import_problem("the function" if function else handler, error) from error


def _load(handler: str, function: str | None) -> Call:
    target = find(handler, function)
    if not callable(target):
        raise Problem("import", f"{handler} is not a function: its type is {type(target).__name__}.")
    # The handler name of a pickled function is an object key, which users do not know.
    return adapt("The function" if function else handler, target)


# The parameters of a pickled function are read once, because this takes longer than a short task.
_load_pickled = lru_cache(maxsize=4)(_load)


def find(handler: str, function: str | None) -> Any:
    """Return the object that `handler` names, or the object pickled in the file `function`.

    Exceptions of the user's code propagate.
    """
    return _unpickle(function) if function else _import(handler)


def _import(handler: str) -> Any:
    module_name, _, name = handler.partition(":")
    target: Any = importlib.import_module(module_name)
    for part in name.split("."):
        if not hasattr(target, part):
            raise Problem(
                "import",
                f"The module {module_name} has no function {name!r}{_existing_functions(target)}.",
                error="AttributeError",
            )
        target = getattr(target, part)
    return target


def _existing_functions(module: Any) -> str:
    if not isinstance(module, ModuleType):
        return ""
    functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
    own = [name for name, function in functions.items() if function.__module__ == module.__name__]
    return f"; it has {', '.join(sorted(own)[:10])}" if own else "; it defines no function"


@lru_cache(maxsize=4)
def _unpickle(path: str) -> Any:
    import cloudpickle  # noqa: F401 - unpickling a function needs cloudpickle

    return pickle.loads(Path(path).read_bytes())  # noqa: S301 - the job's own code


def _import_problem(handler: str, error: BaseException) -> Problem:
    module = handler.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        is_own = error.name.partition(".")[0] == module.partition(".")[0]
        reason = (
            f"There is no module {error.name!r}: add it to the job's code folder."
            if is_own
            else f"Loading {handler} needs the module {error.name!r}: install it on the workers, "
            "or add it to the job's code folder."
        )
    elif isinstance(error, SystemExit):
        reason = (
            f"Loading {handler} called sys.exit({error.code!r}): keep what a script does under "
            "`if __name__ == '__main__'`."
        )
    else:
        reason = f"Loading {handler} failed: {_one_line(error)}"
    problem = Problem("import", reason, error=type(error).__name__)
    problem.fault["traceback"] = user_traceback(error)
    return problem


def adapt(handler: str, function: Callable[..., Any]) -> Call:
    """Return a function with the arguments (item, ctx) that calls `function`.

    `handler` is the name of the function in an error. Raise Problem of kind "import" if the function takes other
    arguments.
    """
    # `inspect` is imported late, because its import is slow and the start-up of a child does not need it.
    import inspect

    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return lambda item, _: function(item)  # `inspect` cannot read the parameters of compiled functions.
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_place = [p for p in parameters if p.kind in places]
    required = [p for p in by_place if p.default is p.empty]
    stray = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is p.empty]
    any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if len(required) > 2 or stray or not (by_place or any_number):
        raise Problem(
            "import",
            f"{handler} cannot be called as a handler: it must take (item) or (item, ctx), "
            f"and takes {inspect.signature(function)}.",
        )
    # A second parameter with a default is the user's own option, unless its name is "ctx" or "context".
    if len(required) == 2 or (len(by_place) > 1 and by_place[1].name in ("ctx", "context")):
        return function
    return lambda item, _: function(item)


def complete(value: Any) -> Any:
    """Return the result of a call. If the call has returned a coroutine, run the coroutine to its end."""
    if type(value) is not CoroutineType:
        return value
    import asyncio  # asyncio is imported late, because most functions do not need it.

    return asyncio.run(value)


# --- Failures ------------------------------------------------------------------------------------


def explain(error: BaseException) -> Fault:
    """Return the description of a handler's exception."""
    try:
        return _explain(error)
    except BaseException as second:  # noqa: BLE001 - an exception's own __str__ may do anything
        what = f"{type(error).__name__} (describing it raised {type(second).__name__})"
        return fault("exception", what, error=type(error).__name__)


def _explain(error: BaseException) -> Fault:
    if isinstance(error, Problem):
        return error.fault
    if isinstance(error, SystemExit):
        number = error.code if isinstance(error.code, int) else int(error.code is not None)
        return fault(
            "exit",
            f"called sys.exit({'' if error.code is None else repr(error.code)})",
            error="SystemExit",
            traceback=user_traceback(error),
            exit_code=number,
        )
    return fault("exception", _one_line(error), error=type(error).__name__, traceback=user_traceback(error))


def _one_line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        # The text of a SyntaxError has the file and line number, but not the source code.
        return f"{type(error).__name__}: {error}"
    lines = traceback.format_exception_only(type(error), error)
    return " ".join("".join(lines).split())


def user_traceback(error: BaseException) -> str:
    """Return the traceback of an exception with only the user's frames."""
    whole = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    todo: list[traceback.TracebackException | None] = [whole]
    while todo:
        part = todo.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        part.stack[:] = [f for f in part.stack if not f.filename.startswith((_PACKAGE_FOLDER, "<frozen importlib"))]
        todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    return "".join(whole.format())
