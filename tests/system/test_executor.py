"""`grid.executor()`, compared with the executors of concurrent.futures: calls, results, and futures."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from batchlab import File, Grid
from batchlab.client.executor import GridExecutor
from batchlab.core.errors import UsageError
from tests.support.grid.executor_functions import Counting, Gate, capture
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


# --- submit --------------------------------------------------------------------------------------


def test_a_call_has_the_result_of_its_function(executor: GridExecutor) -> None:
    assert executor.submit(pow, 2, 8).result() == 256


def test_arguments_arrive_unchanged(executor: GridExecutor) -> None:
    assert executor.submit(capture, 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})
    assert executor.submit(capture).result() == ((), {})
    assert executor.submit(capture, (1,)).result() == (((1,),), {})
    assert executor.submit(capture, ((1,), {})).result() == ((((1,), {}),), {})
    assert executor.submit(capture, [1, {"$file": None}], b"\0").result() == (([1, {"$file": None}], b"\0"), {})
    strange = (float("inf"), "\ud800", 10**5000, None, True)
    assert executor.submit(capture, *strange).result() == (strange, {})


def test_the_function_is_given_by_position_only(executor: GridExecutor) -> None:
    submit: Callable[..., Any] = executor.submit
    with pytest.raises(TypeError):
        submit(fn=capture, arg=1)
    with pytest.raises(TypeError):
        submit(arg=1)


def test_lambdas_closures_methods_and_partials_run(executor: GridExecutor) -> None:
    offset = 5
    calls = [
        executor.submit(lambda x: x + offset, 1),
        executor.submit("{}!".format, "a"),
        executor.submit(partial(pow, 2), 3),
        executor.submit([3, 1, 2].index, 1),
        executor.submit(Path, "a"),
    ]
    assert [call.result() for call in calls] == [6, "a!", 8, 1, Path("a")]


def test_each_call_gets_its_callable_as_it_was_sent(executor: GridExecutor) -> None:
    """As with processes, a call does not see another call's changes to the callable."""
    counting = Counting()
    assert [executor.submit(counting).result() for _ in range(3)] == [1, 1, 1]
    assert [call.result() for call in [executor.submit(counting) for _ in range(20)]] == [1] * 20
    assert counting.count == 0


def test_files_travel_both_ways(executor: GridExecutor, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text")

    def shout(file: File, *, suffix: str) -> File:
        Path("out.txt").write_text(file.read_text().upper() + suffix)
        return File("out.txt")

    call = executor.submit(shout, File(tmp_path / "in.txt"), suffix="!")
    assert call.result().read_text() == "SOME TEXT!"
    with pytest.raises(UsageError, match=r"nowhere\.txt does not exist"):
        executor.submit(shout, File(tmp_path / "nowhere.txt"), suffix="").result()


def test_large_arguments_and_results_make_the_trip(executor: GridExecutor) -> None:
    data = [bytes([i]) * 1_000_000 for i in range(8)]
    calls = [executor.submit(lambda one: one[::-1] + b"!", one) for one in data]
    assert [call.result() for call in calls] == [one + b"!" for one in data]
    assert executor.submit(len, "x" * 500_000).result() == 500_000


def test_many_calls_cost_a_few_jobs(grid: Grid, executor: GridExecutor) -> None:
    before = len(grid.client.jobs(limit=1000))
    calls = [executor.submit(abs, -i) for i in range(5000)]
    assert [call.result() for call in calls] == list(range(5000))
    assert len(grid.client.jobs(limit=1000)) - before < 50


def test_a_function_is_sent_once_for_all_its_calls(grid: Grid, executor: GridExecutor) -> None:
    ballast = os.urandom(100_000).hex()

    def weigh(i: int) -> int:
        return len(ballast) + i

    assert list(executor.map(weigh, range(500))) == [200_000 + i for i in range(500)]
    bucket = grid._link.home.objects
    parts = (bucket / "jobs" / newest(grid)).rglob("*part-*")
    assert sum(part.stat().st_size for part in parts) < 50_000


def test_several_threads_submit_at_the_same_time(executor: GridExecutor) -> None:
    results: dict[int, list[int]] = {}

    def use(k: int) -> None:
        calls = [executor.submit(lambda x: x * k, i) for i in range(100)]
        results[k] = [call.result() for call in calls]

    threads = [threading.Thread(target=use, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [x * k for x in range(100)] for k in range(4)}


def test_calls_submitted_by_a_callback_run(executor: GridExecutor) -> None:
    second: Future[Future[int]] = Future()
    executor.submit(abs, -1).add_done_callback(
        lambda first: second.set_result(executor.submit(abs, -1 - first.result()))
    )
    assert second.result().result() == 2


def test_a_call_may_make_calls_of_its_own(grid: Grid, executor: GridExecutor) -> None:
    def outer(home: str, n: int) -> int:
        with Grid("local", home=home) as again, again.executor() as inner:
            return sum(inner.map(abs, range(-n, 0)))

    assert executor.submit(outer, str(grid._link.home.path), 10).result() == 55


def test_an_executor_does_not_travel(executor: GridExecutor) -> None:
    error = executor.submit(lambda: executor.submit(abs, -1)).exception()
    assert isinstance(error, TypeError)
    assert "executor cannot be pickled" in str(error)


def test_number_of_workers_is_readable(executor: GridExecutor) -> None:
    assert executor._max_workers == 2


# --- map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 3, 40, 50])
def test_map_gives_what_the_builtin_gives(executor: GridExecutor, chunksize: int) -> None:
    mapped = executor.map(pow, range(40), range(50), chunksize=chunksize)
    assert list(mapped) == list(map(pow, range(40), range(50)))


def test_map_refuses_a_chunksize_below_one(executor: GridExecutor) -> None:
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(pow, range(4), range(4), chunksize=-1)


def test_map_draws_its_arguments_at_once_and_runs_unasked(executor: GridExecutor, tmp_path: Path) -> None:
    drawn = []

    def items() -> Iterator[Path]:
        for name in "abc":
            drawn.append(name)
            yield tmp_path / name

    mapped = executor.map(Path.touch, items())
    assert drawn == ["a", "b", "c"]
    until(lambda: len(list(tmp_path.iterdir())) == 3)
    assert list(mapped) == [None] * 3


def test_map_with_a_buffersize_draws_no_further_ahead(executor: GridExecutor) -> None:
    drawn = []

    def items() -> Iterator[int]:
        for i in range(20):
            drawn.append(i)
            yield i

    results = executor.map(abs, items(), buffersize=3)
    assert drawn == [0, 1, 2]
    assert next(results) == 0
    assert drawn == [0, 1, 2, 3]
    assert list(results) == list(range(1, 20))
    assert list(executor.map(abs, items(), buffersize=50)) == list(range(20))
    with pytest.raises(ValueError, match="buffersize must be None or > 0"):
        executor.map(abs, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize must be an integer or None"):
        executor.map(abs, [1], buffersize=cast(Any, 1.5))


def test_map_raises_a_calls_exception_in_its_place(executor: GridExecutor) -> None:
    results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(results), next(results)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_map_raises_after_its_timeout(executor: GridExecutor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with pytest.raises(TimeoutError):
        next(executor.map(gate.wait, [1], timeout=0))
    gate.open()
    assert list(executor.map(gate.wait, [1, 2], timeout=60)) == [1, 2]


def test_map_keeps_no_reference_to_a_returned_result(executor: GridExecutor) -> None:
    for made in executor.map(lambda _: Counting(), range(5)):
        seen = weakref.ref(made)
        del made
        until(partial(is_gone, seen))


def is_gone(seen: weakref.ref[Any]) -> bool:
    return seen() is None


def test_a_map_that_is_left_early_does_not_run_on(grid: Grid, executor: GridExecutor, tmp_path: Path) -> None:
    """An iterator that is closed early must cancel its job."""

    def note(i: int) -> None:
        (tmp_path / str(i)).touch()
        time.sleep(0.05)

    results = cast(Generator[None, None, None], executor.map(note, range(1000)))
    next(results)
    job = newest(grid)
    results.close()
    executor.shutdown()
    assert grid.wait(job).state == "CANCELLED"
    assert len(list(tmp_path.iterdir())) < 1000


# --- Futures -------------------------------------------------------------------------------------


def test_future_follows_its_call(executor: GridExecutor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    call = executor.submit(gate.wait, 7)
    assert isinstance(call, Future)
    assert not call.done()
    with pytest.raises(TimeoutError):
        call.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        call.exception(timeout=0.01)
    until(call.running)
    gate.open()
    assert call.exception() is None
    assert call.result() == 7
    assert call.done()
    assert not call.running()
    assert not call.cancel()
    assert not call.cancelled()


def test_callbacks_run_once_on_another_thread(executor: GridExecutor) -> None:
    seen: list[tuple[Any, int]] = []
    good, bad = executor.submit(abs, -1), executor.submit(divmod, 1, 0)
    for call in (good, bad):
        call.add_done_callback(lambda one: seen.append((one, threading.get_ident())))
    cf.wait([good, bad])
    until(lambda: len(seen) == 2)
    assert {id(one) for one, _ in seen} == {id(good), id(bad)}
    assert threading.get_ident() not in {thread for _, thread in seen}
    good.add_done_callback(lambda one: seen.append((one, threading.get_ident())))
    assert seen[2] == (good, threading.get_ident())


def test_failing_callback_does_not_affect_others(executor: GridExecutor, caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: BaseException, _: Any) -> None:
        raise error

    for error in (ValueError("mine"), SystemExit(3)):
        executor.submit(abs, -1).add_done_callback(partial(fail, error))
    assert executor.submit(abs, -2).result() == 2
    # A failure is counted before its text is available, and either call may end first.
    until(lambda: "ValueError: mine" in caplog.text and "SystemExit" in caplog.text)
    assert len(caplog.records) == 2


def test_wait_returns_when_it_shall(executor: GridExecutor, tmp_path: Path) -> None:
    gate, second = Gate(tmp_path), Gate(tmp_path, "second")
    late = executor.submit(gate.wait)
    early = executor.submit(abs, -1)
    done, left = cf.wait([early, late], return_when=cf.FIRST_COMPLETED)
    assert (done, left) == ({early}, {late})
    done, left = cf.wait([early, early, late], timeout=0.01)
    assert (done, left) == ({early}, {late})
    bad = executor.submit(lambda: divmod(second.wait(1), 0))
    second.open()
    done, left = cf.wait([bad, late], return_when=cf.FIRST_EXCEPTION)
    assert (done, left) == ({bad}, {late})
    gate.open()
    done, left = cf.wait([bad, late, early])
    assert (done, left) == ({bad, late, early}, set())


def test_as_completed_yields_each_future_once_on_completion(executor: GridExecutor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    late = executor.submit(gate.wait)
    early = [executor.submit(abs, i) for i in range(20)]
    coming = cf.as_completed([late, *early, *early])
    assert {next(coming) for _ in early} == set(early)
    with pytest.raises(TimeoutError):
        list(cf.as_completed([late], timeout=0))
    gate.open()
    assert list(coming) == [late]


def test_an_event_loop_runs_calls_in_it(executor: GridExecutor) -> None:
    async def use() -> list[Any]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, pow, 2, i) for i in range(10)]
        bad = loop.run_in_executor(executor, divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            await bad
        return await asyncio.gather(*calls)

    assert asyncio.run(use()) == [2**i for i in range(10)]


def test_event_loop_may_cancel_and_continue(executor: GridExecutor, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def use() -> int:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.run_in_executor(executor, gate.wait), 0.1)
        gate.open()
        return await asyncio.wrap_future(executor.submit(abs, -3))

    assert asyncio.run(use()) == 3


def test_call_with_a_dropped_future_is_not_retained(executor: GridExecutor) -> None:
    counting = Counting()
    gone = weakref.ref(counting)
    executor.submit(counting)
    del counting
    until(lambda: gone() is None)
