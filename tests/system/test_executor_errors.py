"""Calls of an executor that are canceled or fail, and the events that break an executor."""

from __future__ import annotations

import concurrent.futures as cf
import gc
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path
from pickle import PicklingError
from typing import Any, NoReturn, cast

import pytest

from batchlab import Grid
from batchlab.client.executor import GridExecutor
from batchlab.client.futures import RemoteTraceback, WorkerDied
from batchlab.core.errors import TaskFailed, UsageError
from tests.support.grid.executor_functions import Gate, HeldUp, capture
from tests.support.grid.python_api import newest, warm_grid
from tests.support.waiting import until


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with warm_grid(tmp_path_factory.mktemp("grid")) as grid:
        yield grid


@pytest.fixture
def executor(grid: Grid) -> Iterator[GridExecutor]:
    with grid.executor() as executor:
        yield executor


# --- Cancelling ----------------------------------------------------------------------------------


def test_a_call_that_has_not_been_sent_is_cancelled(executor: GridExecutor) -> None:
    held_up = HeldUp()
    first = executor.submit(abs, held_up)
    until(first.running)
    waiting = executor.submit(abs, -1)
    told: list[Any] = []
    waiting.add_done_callback(told.append)
    assert waiting.cancel()
    assert waiting.cancelled()
    assert told == [waiting]
    with pytest.raises(CancelledError):
        waiting.result()
    held_up.let_go.set()
    assert cf.wait([waiting], timeout=20).done == {waiting}
    assert first.result() == 0


def test_a_call_that_was_sent_ends_with_its_result(executor: GridExecutor, tmp_path: Path) -> None:
    """A sent call cannot be canceled. `cancel` returns False for a call that may have begun, and the call then ends
    with its result."""
    gate = Gate(tmp_path)
    calls = [executor.submit(gate.wait, i) for i in range(30)]
    until(lambda: all(call.running() for call in calls))
    assert not any(call.cancel() for call in calls)
    assert not any(call.cancelled() for call in calls)
    gate.open()
    assert not cf.wait(calls, timeout=20).not_done
    assert not any(call.cancel() or call.cancelled() for call in calls)
    assert [call.result() for call in calls] == list(range(30))


def test_future_ends_as_cancel_returned(executor: GridExecutor, tmp_path: Path) -> None:
    """Some calls were sent and some were not. Each future ends as `cancel` returned."""
    gate, seen, held_up = Gate(tmp_path), tmp_path / "seen", HeldUp()
    seen.mkdir()

    def note(i: int, _: object = None) -> int:
        (seen / str(i)).touch()
        gate.wait()
        return i

    calls = [executor.submit(note, i) for i in range(4)]
    until(lambda: all(call.running() for call in calls))
    calls.append(executor.submit(note, 4, held_up))
    until(calls[4].running)
    calls += [executor.submit(note, i) for i in range(5, 9)]
    answers = [call.cancel() for call in calls[2:7]]
    assert answers == [False, False, False, True, True]
    held_up.let_go.set()
    gate.open()
    assert not cf.wait(calls, timeout=20).not_done
    assert [call.cancelled() for call in calls] == [False] * 5 + [True] * 2 + [False] * 2
    assert {int(one.name) for one in seen.iterdir()} == {0, 1, 2, 3, 4, 7, 8}
    for call in calls[5:7]:
        assert call.cancel()
        for ask in (call.result, call.exception):
            with pytest.raises(CancelledError):
                ask()


def test_call_canceled_elsewhere_raises(grid: Grid, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with grid.executor(name="victim") as executor:
        call = executor.submit(gate.wait)
        until(lambda: any(job["name"] == "victim" for job in grid.client.jobs()))
        grid.client.cancel(newest(grid))
        with pytest.raises(Exception, match=r"Job victim-\w+ ended CANCELLED .*before the call"):
            call.result()
        assert executor.submit(abs, -1).result() == 1


# --- Errors --------------------------------------------------------------------------------------


class Mine(Exception):
    """An exception whose signature does not accept the arguments of the base class."""

    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a, self.b = a, b


def fail() -> NoReturn:
    try:
        raise LookupError("before")
    except LookupError:
        raise RuntimeError(123) from None  # a remark


def test_exception_of_a_call_has_the_workers_traceback(executor: GridExecutor) -> None:
    error = executor.submit(fail).exception()
    assert type(error) is RuntimeError
    assert error.args == (123,)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert f'File "{__file__}"' in error.__cause__.tb
    assert "raise RuntimeError(123) from None  # a remark" in error.__cause__.tb
    told = "".join(traceback.format_exception(error))
    assert "raise RuntimeError(123) from None  # a remark" in told


def test_exceptions_of_the_users_own_arrive_as_they_are(executor: GridExecutor) -> None:
    def own(kind: type[Exception]) -> NoReturn:
        error = kind("text")
        error.add_note("noted")
        raise error

    class Local(Exception):
        pass

    error = executor.submit(own, Local).exception()
    assert type(error) is Local
    assert error.__notes__ == ["noted"]


def test_exception_keeps_its_type_if_its_constructor_or_its_arguments_are_unusual(executor: GridExecutor) -> None:
    def own() -> NoReturn:
        raise Mine(1, b=2)

    def locked() -> NoReturn:
        raise ValueError(threading.Lock(), "text")

    with pytest.raises(Mine, match="1 and 2") as caught:
        executor.submit(own).result()
    assert (caught.value.a, caught.value.b) == (1, 2)
    assert "raise Mine(1, b=2)" in str(caught.value.__cause__)
    error = executor.submit(locked).exception()
    assert type(error) is ValueError
    assert error.args == ("<lock>", "text")


def test_exception_whose_type_cannot_be_pickled_is_described(executor: GridExecutor) -> None:
    def fail() -> NoReturn:
        lock = threading.Lock()

        class Locked(Exception):
            def hold(self) -> object:
                return lock

        raise Locked("held")

    with pytest.raises(TaskFailed, match="Locked: held") as caught:
        executor.submit(fail).result()
    assert 'raise Locked("held")' in caught.value.traceback


def test_leaving_by_sys_exit_is_the_calls_exception(executor: GridExecutor) -> None:
    error = executor.submit(sys.exit, 3).exception()
    assert isinstance(error, SystemExit)
    assert error.code == 3


class Bad:
    """An object that raises or ends the process when it is pickled or unpickled."""

    def __init__(self, at: str, how: Callable[[], Any]) -> None:
        self.at, self.how = at, how

    def __reduce__(self) -> Any:
        if self.at == "pickle":
            return self.how()
        return self.how, ()


def refuse() -> NoReturn:
    raise PicklingError("not me")


def die() -> NoReturn:
    os._exit(7)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_an_argument_that_cannot_be_pickled_fails_its_own_call(executor: GridExecutor) -> None:
    calls = [executor.submit(capture, one) for one in (1, Bad("pickle", refuse), 2)]
    locked = executor.submit(capture, threading.Lock())
    closure = executor.submit(lambda: locked)
    assert calls[0].result() == ((1,), {})
    assert calls[2].result() == ((2,), {})
    with pytest.raises(PicklingError, match="not me"):
        calls[1].result()
    with pytest.raises(TypeError, match=r"_thread\.lock") as caught:
        locked.result()
    assert "could not be sent" in caught.value.__notes__[0]
    assert isinstance(closure.exception(), TypeError)
    assert isinstance(executor.submit(cast(Any, 5)).exception(), TypeError)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param((capture, Bad("unpickle", refuse)), TaskFailed, id="error-in-argument"),
        pytest.param((lambda: Bad("pickle", refuse),), TaskFailed, id="error-in-result"),
        pytest.param((capture, Bad("unpickle", die)), WorkerDied, id="exit-in-argument"),
        pytest.param((lambda: Bad("pickle", die),), WorkerDied, id="exit-in-result"),
        pytest.param((die,), WorkerDied, id="exit"),
        pytest.param((crash,), WorkerDied, id="crash"),
    ],
)
def test_a_call_that_cannot_be_made_fails_alone(
    executor: GridExecutor, call: tuple[Any, ...], error: type[Exception]
) -> None:
    """The failing call does not hang, and its neighbors have their results (I7)."""
    before = [executor.submit(abs, -i) for i in range(5)]
    bad = executor.submit(*call)
    after = [executor.submit(abs, -i) for i in range(5)]
    with pytest.raises(error):
        bad.result()
    assert [one.result() for one in before + after] == [*range(5), *range(5)]


def test_a_result_that_cannot_be_read_here_fails_its_call(executor: GridExecutor) -> None:
    bad = executor.submit(lambda: Bad("unpickle", refuse_at(os.getpid())))
    with pytest.raises(TaskFailed, match="cannot be read here: PicklingError: not me"):
        bad.result()
    assert executor.submit(abs, -1).result() == 1


def refuse_at(pid: int) -> Callable[[], Any]:
    def anywhere_but_there() -> Any:
        return pid if os.getpid() == pid else refuse()

    return anywhere_but_there


def test_dead_worker_breaks_the_executor_for_every_caller(executor: GridExecutor) -> None:
    with pytest.raises(BrokenExecutor, match="exit 7") as caught:
        executor.submit(die).result()
    assert isinstance(caught.value, TaskFailed)
    with pytest.raises(WorkerDied, match="SIGSEGV"):
        executor.submit(crash).result()


# --- The initializer -----------------------------------------------------------------------------

STATE = "none"


def prepare(state: str, marks: Path | None = None) -> None:
    os.environ["EXECUTOR_STATE"] = state
    if marks:
        with marks.open("a") as file:
            file.write(f"{os.getpid()}\n")


def state(_: Any = None) -> tuple[str | None, int]:
    return os.environ.get("EXECUTOR_STATE"), os.getpid()


def test_the_initializer_runs_once_in_each_process(grid: Grid, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with grid.executor(initializer=prepare, initargs=("mine", marks)) as executor:
        results = list(executor.map(state, range(100)))
    assert {text for text, _ in results} == {"mine"}
    assert sorted(marks.read_text().split()) == sorted({str(pid) for _, pid in results})


def test_executors_that_share_processes_keep_their_states_apart(grid: Grid) -> None:
    first = grid.executor(initializer=prepare, initargs=("first",))
    second = grid.executor(initializer=prepare, initargs=("second",))
    with first, second:
        for _ in range(3):
            for executor, text in ((first, "first"), (second, "second")):
                assert {got for got, _ in executor.map(state, range(8))} == {text}


def test_an_initializer_that_raises_breaks_the_executor(grid: Grid) -> None:
    def fail() -> NoReturn:
        raise ValueError("no luck")

    executor = grid.executor(initializer=fail)
    calls = [executor.submit(abs, -i) for i in range(3)]
    for call in calls:
        with pytest.raises(BrokenExecutor, match="initializer raised ValueError: no luck"):
            call.result()
    with pytest.raises(BrokenExecutor, match="no luck") as caught:
        executor.submit(abs, -1)
    assert isinstance(caught.value.__cause__, ValueError)
    executor.shutdown()
    with grid.executor() as other:
        assert other.submit(abs, -1).result() == 1


def test_an_initializer_must_be_one(grid: Grid) -> None:
    with pytest.raises(TypeError, match="initializer must be a callable"):
        grid.executor(initializer=cast(Any, 5))
    with pytest.raises(UsageError, match="cannot be sent"):
        grid.executor(initializer=print, initargs=[threading.Lock()])


# --- Threads -------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("batchlab-executor")]


def test_an_idle_executor_has_no_thread_and_a_dropped_one_leaves_nothing(grid: Grid) -> None:
    executor = grid.executor()
    executor.submit(abs, -1).result()
    until(lambda: not threads())
    assert executor.submit(abs, -1).result() == 1
    gone = weakref.ref(executor._dispatch)
    call = executor.submit(abs, -5)
    del executor
    assert call.result() == 5
    until(lambda: not threads())
    until(lambda: gc.collect() >= 0 and gone() is None)
