"""Errors of failed tasks that are also errors of the user's own type."""

from __future__ import annotations

import base64
import pickle
import threading
import traceback
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from batchlab.client.task_errors import cause_of, combine, unpickle
from batchlab.core.errors import JobFailed, TaskFailed
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Outcome, StageName, TaskSet
from batchlab.worker import exception_pickling
from batchlab.worker.task_executor import MAX_EXCEPTIONS_BYTES, ExecutionRequest, TaskExecutor


class Priced(Exception):
    """An exception with a constructor and attributes of its own."""

    def __init__(self, price: int, *, unit: str) -> None:
        super().__init__(f"{price} {unit}")
        self.price = price
        self.message = "overridden"

    exit_code = 7

    def label(self) -> str:
        return f"price {self.price}"


class Slotted(ValueError):
    __slots__ = ("place",)

    place: int


class Sealed(Exception):
    subclasses: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        cls.subclasses.append(cls)


def failed() -> TaskFailed:
    return TaskFailed("Task map/3 failed.", task=3, traceback="Traceback of the worker")


def test_both_types_catch_the_error() -> None:
    error = combine(failed(), KeyError("a"))
    for kind in (KeyError, TaskFailed, JobFailed):
        with pytest.raises(kind):
            raise error
    assert isinstance(error.__cause__, KeyError)
    assert (error.task, error.traceback, error.message) == (3, "Traceback of the worker", "Task map/3 failed.")
    assert error.args == ("a",)
    assert str(error) == str(failed())


def test_attributes_of_the_user_have_priority() -> None:
    error: Any = combine(failed(), Priced(3, unit="USD"))
    assert (error.price, error.message, error.exit_code, error.label()) == (3, "overridden", 7, "price 3")
    assert (error.task_failed.message, error.task_failed.task) == ("Task map/3 failed.", 3)
    assert error.task == 3
    assert str(error) == str(failed())


def test_one_type_for_each_type_of_the_user() -> None:
    assert type(combine(failed(), Priced(1, unit="a"))) is type(combine(failed(), Priced(2, unit="b")))
    assert Sealed.subclasses == []
    assert isinstance(combine(failed(), Sealed("x")), Sealed)
    assert Sealed.subclasses == []


def test_attributes_outside_of_the_dictionary_are_copied() -> None:
    slotted = Slotted("text")
    slotted.place = 7
    errors: list[Any] = [combine(failed(), OSError(2, "No such file", "a.txt")), combine(failed(), slotted)]
    assert (errors[0].errno, errors[0].strerror, errors[0].filename) == (2, "No such file", "a.txt")
    assert errors[1].place == 7


@pytest.mark.parametrize(
    "cause",
    [SystemExit(3), KeyboardInterrupt(), Exception(), StopIteration(1), failed()],
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
    again: Any = pickle.loads(pickle.dumps(combine(failed(), Priced(3, unit="USD"))))
    assert (again.price, again.args) == (3, ("3 USD",))


@pytest.mark.parametrize(
    "pickled",
    [
        "",
        "no base64",
        "@",
        "@3",
        "@4",
        base64.b64encode(b"no pickle").decode(),
        base64.b64encode(pickle.dumps(5)).decode(),
    ],
)
def test_what_is_not_a_pickled_exception_is_ignored(pickled: str) -> None:
    failures = (failure(3, pickled), failure(4, "@3"))
    assert [cause_of(outcome(*failures), one) for one in failures] == [None, None]


# --- From a worker -------------------------------------------------------------------------------


class Answer(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Prefixed(Exception):
    def __init__(self, field: str) -> None:
        super().__init__(f"bad {field}")


class Unreadable(OSError):
    def __init__(self, place: str) -> None:
        super().__init__(2, "No such place", place)
        self.place = place


class Holder(ValueError):
    def __init__(self, **attributes: Any) -> None:
        super().__init__("text")
        vars(self).update(attributes)


def failure(task: int, pickled: str) -> Failure:
    return Failure(task, FailureKind.EXCEPTION, "Answer: shortened", error="Answer", pickled=pickled)


def outcome(*failures: Failure) -> Outcome:
    return Outcome(Bundle(JobId("job-1"), StageName("map"), TaskSet.span(3, 5)), "e", "w", 0.0, 1.0, failed=failures)


def sent(error: BaseException, max_bytes: int | None = None) -> Any:
    return unpickle(exception_pickling.pickled(error, max_bytes))


@pytest.mark.parametrize(
    "error", [Answer(404, "not found"), Prefixed("a"), Unreadable("x"), OSError(2, "No", "a"), KeyError("a")], ids=repr
)
def test_an_exception_arrives_whatever_its_constructor_takes(error: Exception) -> None:
    again = sent(error)
    assert type(again) is type(error)
    assert (again.args, str(again), vars(again)) == (error.args, str(error), vars(error))
    assert sent(ExceptionGroup("two", [error])).exceptions[0].args == error.args


def test_slots_arrive() -> None:
    slotted = Slotted("text")
    slotted.place = 7
    assert sent(slotted).place == 7


def test_only_the_parts_that_cannot_be_pickled_are_left_out() -> None:
    again = sent(Holder(lock=threading.Lock(), code=5))
    assert (again.args, vars(again)) == (("text",), {"code": 5})
    assert sent(ValueError(threading.Lock(), 2)).args == ("<lock>", 2)


@pytest.mark.parametrize(
    "error",
    [
        Holder(table="x" * 10_000, code=5),
        Answer(1, "y" * 10_000),
        Holder(**{f"a{n}": "z" * 500 for n in range(50)}),
        UnicodeDecodeError("utf-8", b"\xff" * 10_000, 0, 1, "bad"),
        ExceptionGroup("several", [ValueError("x" * 10_000), Answer(2, "y" * 10_000)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_large_exception_keeps_its_type(error: Exception) -> None:
    assert type(sent(error, 4000)) is type(error)


def test_every_failure_of_a_bundle_keeps_its_type() -> None:
    executor = TaskExecutor(
        ExecutionRequest(
            handler="builtins:abs",
            function=None,
            command=[],
            stdout=None,
            code="",
            params_json="{}",
            job="job-1",
            stage="map",
            attempt=1,
            folder="",
            cwd="",
            prefix="",
            objects=True,
        )
    )
    texts = [executor.explain(task, Answer(task, "x" * 10_000))["pickled"] for task in range(1000)]
    late = executor.explain(1000, Prefixed("late"))["pickled"]
    assert sum(map(len, [*texts, late])) < MAX_EXCEPTIONS_BYTES
    failures = [failure(task, text) for task, text in enumerate([*texts, late])]
    bundle = outcome(*failures)
    causes: list[Any] = [cause_of(bundle, one) for one in failures]
    assert [type(cause) for cause in causes] == [Answer] * 1000 + [Prefixed]
    assert causes[0].code == 0
    assert str(causes[999]) == "shortened"


class Long:
    """List that counts how many of its items are pickled."""

    count = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (), None, self._items()

    def _items(self) -> Iterator[bytes]:
        for _ in range(10_000):
            Long.count += 1
            yield bytes(1000)


def test_the_rest_of_a_pickle_above_the_limit_is_not_created(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Long, "count", 0)
    error = ValueError("long", Long())
    copy = unpickle(exception_pickling.pickled(error, 5000))
    assert isinstance(copy, ValueError)
    assert copy.args == ("long", "<Long>")
    assert Long.count < 1000
