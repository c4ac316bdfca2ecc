"""Errors of failed tasks that are also errors of the user's own type.

Invariant: an exception that a worker pickled is unpickled only in the process that submitted its job with the Python
API, as the results of that job are. If the exception cannot be unpickled, the TaskFailed has its text.
"""

from __future__ import annotations

import base64
import pickle
from types import MemberDescriptorType
from typing import Any

from batchlab.core.errors import TaskFailed


def unpickle(data: bytes) -> BaseException | None:
    """Return the exception that a worker pickled, or None if it cannot be unpickled in this process."""
    try:
        error = pickle.loads(data)  # noqa: S301 - pickled by a worker of the caller's own job
    except Exception:  # noqa: BLE001 - unpickling runs the code of the exception's class
        return None
    return error if isinstance(error, BaseException) else None


def with_cause(error: TaskFailed, pickled: str) -> TaskFailed:
    """Return the TaskFailed with the user's exception as its cause, so that both types can catch it.

    `pickled` is the pickled exception in base64, or "".
    """
    try:
        cause = unpickle(base64.b64decode(pickled, validate=True)) if pickled else None
    except ValueError:
        cause = None
    return combine(error, cause) if cause else error


_NOT_COMBINED = (TaskFailed, StopIteration, StopAsyncIteration)
"""Types of causes that do not become a type of the error. A StopIteration would end the generator that raises it."""


def combine(error: TaskFailed, cause: BaseException) -> TaskFailed:
    """Return an error that has the message of `error`, the attributes of both errors, and both of their types.

    Some types cannot be combined, such as types that do not inherit from Exception. Then return `error` with its cause.
    """
    combined = error
    if isinstance(cause, Exception) and not isinstance(cause, _NOT_COMBINED):
        try:
            kind = _combined_type(error, type(cause))
            # The constructor of the user's type is not called, because its arguments are unknown. The type of an
            # exception group needs the arguments to create an object.
            combined = kind.__new__(kind, *cause.args)
            _copy_members(cause, combined)
            combined.__dict__.update({**vars(cause), **vars(error)})
            combined.args = cause.args
        except Exception:  # noqa: BLE001 - the user's type may do anything when it is subclassed or created
            combined = error
    combined.__cause__ = cause
    return combined


def _combined_type(error: TaskFailed, cause: type[Exception]) -> type[TaskFailed]:
    kind = type(error)
    body: dict[str, Any] = {"__module__": kind.__module__, "__reduce__": _reduce, "__init__": Exception.__init__}
    if issubclass(cause, BaseExceptionGroup):
        body["message"] = error.message  # An object of an exception group cannot have a message of its own.
    return type(f"{kind.__name__}_{cause.__name__}", (kind, cause), body)


def _copy_members(source: BaseException, target: BaseException) -> None:
    """Copy the attributes that are not in `__dict__`, such as `errno` of an OSError."""
    for owner in type(source).__mro__:
        for name, member in vars(owner).items():
            if isinstance(member, MemberDescriptorType) and not name.startswith("__") and hasattr(source, name):
                try:
                    setattr(target, name, getattr(source, name))
                except (AttributeError, TypeError):
                    continue  # The attribute is read-only.


def _reduce(error: TaskFailed) -> tuple[Any, ...]:
    kind = type(error).__bases__[0]
    return _rebuild, (kind, error.message, error.task, error.traceback, error.__cause__)


def _rebuild(kind: type[TaskFailed], message: str, task: int, traceback: str, cause: BaseException) -> TaskFailed:
    return combine(kind(message, task=task, traceback=traceback), cause)
