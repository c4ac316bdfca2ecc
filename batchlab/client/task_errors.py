"""Errors of failed tasks that are also errors of the user's own type.

Invariant: an exception that a worker pickled is unpickled only in the process that submitted its job with the Python
API, as the results of that job are. If the exception cannot be unpickled, the TaskFailed has its text.
"""

from __future__ import annotations

import base64
import pickle
from functools import lru_cache
from typing import Any

from batchlab.core.errors import TaskFailed
from batchlab.core.model import Failure, Outcome
from batchlab.worker import exception_pickling


def unpickle(data: bytes) -> BaseException | None:
    """Return the exception that a worker pickled, or None if it cannot be unpickled in this process."""
    try:
        error = pickle.loads(data)  # noqa: S301 - pickled by a worker of the caller's own job
    except Exception:  # noqa: BLE001 - unpickling runs the code of the exception's class
        return None
    return error if isinstance(error, BaseException) else None


def cause_of(outcome: Outcome, failure: Failure) -> BaseException | None:
    """Return the exception that the task raised, or None if it cannot be unpickled in this process."""
    if failure.pickled.startswith(exception_pickling.SAME_TYPE_PREFIX):
        return _similar(outcome, failure)
    try:
        return unpickle(base64.b64decode(failure.pickled, validate=True)) if failure.pickled else None
    except ValueError:
        return None


def _similar(outcome: Outcome, failure: Failure) -> BaseException | None:
    """Return an exception with the failure's text and with the type of another task's exception."""
    other = failure.pickled.removeprefix(exception_pickling.SAME_TYPE_PREFIX)
    found = next((one for one in outcome.failed if str(one.task) == other and one.task != failure.task), None)
    if found is None or found.pickled.startswith(exception_pickling.SAME_TYPE_PREFIX):
        return None
    cause = cause_of(outcome, found)
    try:
        text = failure.reason.removeprefix(f"{failure.error}: ")
        return cause and exception_pickling.create(type(cause), (text,))
    except Exception:  # noqa: BLE001 - the type of an exception group refuses a text
        return None


_NOT_COMBINED = (TaskFailed, StopIteration, StopAsyncIteration)
"""Types of causes that do not become a type of the error. A StopIteration would end the generator that raises it."""


def combine(error: TaskFailed, cause: BaseException) -> TaskFailed:
    """Return an error that has the message of `error`, and the types and attributes of both errors.

    The attributes of the user's type have priority, and `task_failed` is `error` itself. Some types cannot be combined,
    such as types that do not inherit from Exception. Then return `error` with its cause.
    """
    combined = error
    if isinstance(cause, Exception) and not isinstance(cause, _NOT_COMBINED) and not isinstance(error, type(cause)):
        try:
            kinds: Any = type(error), type(cause)
            combined = exception_pickling.create(_combined_type(*kinds), cause.args)
            exception_pickling.set_members(combined, exception_pickling.members(cause))
            own = {name: value for name, value in vars(error).items() if not hasattr(cause, name)}
            combined.__dict__.update({**own, **vars(cause), "task_failed": error})
            combined.args = cause.args
        except Exception:  # noqa: BLE001 - the user's type may do anything when it is subclassed or created
            combined = error
    combined.__cause__ = cause
    return combined


class _Combined:
    """First base of the types that inherit from a user's type and from TaskFailed."""

    task_failed: TaskFailed
    __cause__: BaseException

    def __init_subclass__(cls) -> None:
        """Hide the combined type from the hook of the user's type, such as a registry of its subclasses."""

    def __str__(self) -> str:
        return str(self.task_failed)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.task_failed, exception_pickling.pickled(self.__cause__))


def _restore(error: TaskFailed, pickled: bytes) -> TaskFailed:
    cause = unpickle(pickled)
    return combine(error, cause) if cause else error


@lru_cache(maxsize=256)
def _combined_type(kind: type[TaskFailed], cause: type[Exception]) -> type[TaskFailed]:
    return type(f"{kind.__name__}_{cause.__name__}", (_Combined, cause, kind), {"__module__": kind.__module__})
