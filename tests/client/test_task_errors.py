"""Errors of failed tasks that are also errors of the user's own type."""

from __future__ import annotations

import base64
import pickle
import traceback
from typing import Any

import pytest

from batchlab.client.task_errors import combine, with_cause
from batchlab.core.errors import JobFailed, TaskFailed


class Priced(Exception):
    """An exception with a constructor and attributes of its own."""

    def __init__(self, price: int, *, unit: str) -> None:
        super().__init__(f"{price} {unit}")
        self.price = price
        self.message = "overridden"


class Slotted(ValueError):
    __slots__ = ("place",)

    place: int


class Sealed(Exception):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("no subclasses")


def failed() -> TaskFailed:
    return TaskFailed("Task map/3 failed.", task=3, traceback="Traceback of the worker")


def test_both_types_catch_the_error() -> None:
    error = combine(failed(), Priced(3, unit="USD"))
    for kind in (Priced, TaskFailed, JobFailed):
        with pytest.raises(kind):
            raise error
    assert isinstance(error.__cause__, Priced)
    assert (error.task, error.traceback, error.message) == (3, "Traceback of the worker", "Task map/3 failed.")
    assert str(error) == str(failed())
    assert vars(error)["price"] == 3


def test_attributes_outside_of_the_dictionary_are_copied() -> None:
    slotted = Slotted("text")
    slotted.place = 7
    errors: list[Any] = [combine(failed(), OSError(2, "No such file", "a.txt")), combine(failed(), slotted)]
    assert (errors[0].errno, errors[0].strerror, errors[0].filename) == (2, "No such file", "a.txt")
    assert errors[1].place == 7


@pytest.mark.parametrize(
    "cause",
    [SystemExit(3), KeyboardInterrupt(), Sealed("x"), StopIteration(1), failed()],
    ids=lambda cause: type(cause).__name__,
)
def test_a_type_that_cannot_be_combined_is_only_the_cause(cause: BaseException) -> None:
    error = combine(failed(), cause)
    assert type(error) is TaskFailed
    assert error.__cause__ is cause


@pytest.mark.parametrize(
    "cause",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ExceptionGroup("two", [ValueError(1)]),
        KeyError("a"),
        ImportError("x", name="y"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_types_with_constructors_of_their_own_are_combined(cause: Exception) -> None:
    error = combine(failed(), cause)
    assert isinstance(error, type(cause))
    assert str(error) == str(failed())
    assert "Task map/3 failed." in "".join(traceback.format_exception(error))


def test_combined_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(combine(failed(), KeyError("a"))))
    assert isinstance(error, KeyError)
    assert isinstance(error, TaskFailed)
    assert (error.task, error.message, repr(error.__cause__)) == (3, "Task map/3 failed.", "KeyError('a')")


@pytest.mark.parametrize(
    "pickled", ["", "no base64", base64.b64encode(b"no pickle").decode(), base64.b64encode(pickle.dumps(5)).decode()]
)
def test_what_is_not_a_pickled_exception_is_ignored(pickled: str) -> None:
    error = with_cause(failed(), pickled)
    assert type(error) is TaskFailed
    assert error.__cause__ is None
