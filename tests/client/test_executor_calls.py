"""An executor's call, which is packed here, run by a worker, and whose error is raised here again."""

from __future__ import annotations

import functools
import importlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.client.futures import Batch, Call, CallFuture, Packed, Packer, RemoteTraceback, revive
from batchlab.client.submission import ObjectPickler
from batchlab.core.errors import TaskFailed
from batchlab.core.model import JobId
from batchlab.core.protocol import values
from batchlab.manager.stage_plans import PART_ITEMS
from batchlab.worker.executor_calls import Calls, Initializer, Raised, Timed

JOB = JobId("job-1")


def capture(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call(CallFuture(), function, args, kwargs)


def no_file(_: object) -> NoReturn:
    raise AssertionError("there is no file")


def made(packed: Packed) -> list[Any]:
    """Return the results that a worker would compute from the packed calls."""
    handler = pickle.loads(packed.handler)
    return [
        handler([values.decode(part, no_file, pickles=True) for part in item] if type(item) is list else item)
        for chunk in packed.chunks
        for item in chunk.items
    ]


@pytest.fixture(scope="module")
def pickler() -> ObjectPickler:
    return ObjectPickler()


@pytest.fixture
def packer(pickler: ObjectPickler) -> Packer:
    return Packer(pickler)


# --- Modules -------------------------------------------------------------------------------------


def test_an_interrupted_check_of_modules_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the functions of the module are pickled by name, and workers cannot import the module."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "module_of_the_user.py").write_text("def function(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_of_the_user")
    pickler = ObjectPickler()
    with monkeypatch.context() as patches:
        patches.setattr(subprocess, "run", interrupt)
        for _ in range(2):  # the first check itself imports modules
            with pytest.raises(KeyboardInterrupt):
                pickler.check_modules()
    pickled = pickler.function(module.function).data
    monkeypatch.delitem(sys.modules, "module_of_the_user")
    (tmp_path / "module_of_the_user.py").unlink()
    assert pickle.loads(pickled)() is None


# --- Packing -------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
# Larger values do not test more, and take a hundred times as long.
ANY = st.recursive(PLAIN | st.binary(), lambda inner: st.lists(inner) | st.tuples(inner), max_leaves=10)


@given(st.lists(st.tuples(st.lists(ANY), st.dictionaries(st.text(), ANY)), max_size=5))
def test_arguments_arrive_as_they_were_given(
    pickler: ObjectPickler, arguments: list[tuple[list[Any], dict[str, Any]]]
) -> None:
    packed = Packer(pickler).pack(JOB, [call(capture, *a, **k) for a, k in arguments])
    assert made(packed) == [(tuple(args), kwargs) for args, kwargs in arguments]
    assert not packed.rejected


def test_function_of_several_calls_is_stored_once(packer: Packer) -> None:
    packed = packer.pack(JOB, [call(capture, i) for i in range(3)] + [call(abs, -1)])
    items = packed.chunks[0].items
    assert items[:3] == [[0, 0], [0, 1], [0, 2]]
    assert values.kind(items[3][0]) == "$pickle"
    assert made(packed)[3] == 1


def test_function_that_was_sent_before_is_stored_once(packer: Packer) -> None:
    assert values.kind(packer.pack(JOB, [call(capture)]).chunks[0].items[0][0]) == "$pickle"
    assert packer.pack(JOB, [call(capture)]).chunks[0].items == [[0]]


def test_only_the_unpicklable_call_is_rejected(packer: Packer) -> None:
    calls = [
        call(capture, 1),
        call(capture, threading.Lock()),
        call(threading.Lock().acquire),
        call(5),  # type: ignore[arg-type]
        call(capture, 2),
    ]
    packed = packer.pack(JOB, calls)
    assert packed.futures == [calls[0].future, calls[4].future]
    assert made(packed) == [((1,), {}), ((2,), {})]
    assert [future for future, _ in packed.rejected] == [one.future for one in calls[1:4]]
    assert [type(error) for _, error in packed.rejected] == [TypeError] * 3


def test_many_calls_are_cut_into_chunks_that_name_their_first(packer: Packer) -> None:
    calls = [call(abs, i) for i in range(PART_ITEMS + 1)]
    calls.insert(0, call(abs, threading.Lock()))
    packed = packer.pack(JOB, calls)
    assert [(chunk.first, len(chunk.items)) for chunk in packed.chunks] == [(0, PART_ITEMS), (PART_ITEMS, 1)]


def test_nothing_that_can_be_sent_makes_no_chunk(packer: Packer) -> None:
    assert packer.pack(JOB, [call(abs, threading.Lock())]).chunks == []


# --- On a worker ---------------------------------------------------------------------------------


class Mine(Exception):
    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"{a} and {b}")


def fail(error: BaseException) -> NoReturn:
    raise error


def raised_by(function: Callable[..., Any], *args: Any) -> Raised:
    raised = Calls([], None)([function, *args])
    assert isinstance(raised, Raised)
    return raised


@pytest.mark.parametrize("error", [ValueError("a", 1), SystemExit(3), KeyboardInterrupt(), Mine(1, b=2)])
def test_exception_of_a_call_is_raised_in_the_client(error: BaseException) -> None:
    again = revive(raised_by(fail, error))
    assert (type(again), again.args) == (type(error), error.args)
    assert isinstance(again.__cause__, RemoteTraceback)
    assert "raise error" in str(again.__cause__)


def test_unpicklable_exception_is_described() -> None:
    lock = threading.Lock()

    class Locked(Exception):
        def hold(self) -> object:
            return lock

    again = revive(raised_by(fail, Locked("held")))
    assert isinstance(again, TaskFailed)
    assert "Locked: held" in str(again)
    assert "raise error" in again.traceback


def test_pickle_that_is_not_an_exception_is_not_raised() -> None:
    assert isinstance(revive(Raised("told", "", pickle.dumps("text"))), TaskFailed)


def test_only_stateless_functions_are_reused() -> None:
    kept: list[int] = []
    counting = functools.partial(kept.append, 1)
    calls = Calls([pickle.dumps(counting), pickle.dumps(capture)], None)
    assert calls([0]) is None
    assert calls._function(0) is not calls._function(0)
    assert calls._function(1) is calls._function(1)


DONE: list[str] = []


def note(owner: str) -> None:
    DONE.append(owner)


def test_the_initializer_runs_before_the_first_call_of_its_owner() -> None:
    DONE.clear()

    def of(owner: str) -> Calls:
        return Calls([], Initializer(owner, pickle.dumps(functools.partial(note, owner))))

    for owner in ("a", "a", "b", "a"):
        assert of(owner)([abs, -1]) == 1
    assert DONE == ["a", "b", "a"]


def test_an_initializer_that_raises_is_tried_before_each_call() -> None:
    broken = Initializer("broken", pickle.dumps(functools.partial(divmod, 1, 0)))
    for _ in range(2):
        raised = Calls([], broken)([abs, -1])
        assert isinstance(raised, Raised)
        assert raised.initializer
        assert raised.message.startswith("ZeroDivisionError")


def test_timed_call_reports_its_duration() -> None:
    result, took_s = Timed(functools.partial(abs, -2))()
    assert result == 2
    assert took_s > 0


# --- Futures and batches -------------------------------------------------------------------------


def a_batch(count: int) -> tuple[Batch, list[CallFuture], list[Batch]]:
    looked: list[Batch] = []
    batch = Batch(looked.append)
    batch.calls = [call(abs, i) for i in range(count)]
    return batch, [one.future for one in batch.calls], looked


def test_a_call_is_cancelled_for_sure_until_it_is_claimed() -> None:
    batch, futures, looked = a_batch(3)
    assert futures[1].cancel()
    assert [one.future for one in batch.claim()] == [futures[0], futures[2]]
    assert list(batch.open.values()) == [futures[0], futures[2]]
    assert [future.running() for future in futures] == [True, False, True]
    assert not futures[0].cancel()
    assert not futures[0].cancelled()
    assert not looked


def test_a_batch_is_looked_at_once_nothing_of_it_is_wanted() -> None:
    batch, futures, looked = a_batch(3)
    batch.claim()
    batch.settle(futures[0])
    futures[0].set_result(0)
    futures[1].disown()
    futures[1].disown()
    assert not batch.abandoned
    futures[2].disown()
    assert batch.abandoned
    assert looked == [batch]


def test_the_last_wanted_result_leaves_a_batch_that_is_not_wanted() -> None:
    batch, futures, looked = a_batch(2)
    batch.claim()
    futures[0].disown()
    assert not batch.abandoned
    batch.settle(futures[1])
    assert batch.abandoned
    assert not looked  # the thread checks for abandoned batches after each result


def test_a_withdrawn_call_counts_as_cancelled() -> None:
    batch, (future,), _ = a_batch(1)
    told: list[Any] = []
    future.add_done_callback(told.append)
    batch.claim()
    batch.settle(future)
    future.withdraw()
    assert told == [future]
    assert future.cancelled()
    assert future.cancel()
    for ask in (future.result, future.exception):
        with pytest.raises(CancelledError):
            ask()
