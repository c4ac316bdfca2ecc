"""The Python API on a real local grid: functions that are mapped over items, and job files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from batchlab import File, Grid
from batchlab.core.errors import JobFailed, TaskFailed, UsageError
from batchlab.core.model import JobState
from batchlab.core.retry_rule import RetryRule
from tests.support.grid.python_api import newest, warm_grid
from tests.support.waiting import until


@dataclass(frozen=True)
class Point:
    x: int
    tags: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(home: Path) -> Iterator[Grid]:
    with warm_grid(home) as grid:
        yield grid


def test_results_are_in_item_order(grid: Grid) -> None:
    assert list(grid.map(lambda x: x * x, range(300))) == [x * x for x in range(300)]


def test_results_are_in_order_if_later_ones_complete_first(grid: Grid) -> None:
    assert list(grid.map(napping(), [0.3, 0.0, 0.1, 0.0], bundle=1)) == [0.3, 0.0, 0.1, 0.0]


def test_unordered_results_are_yielded_as_completed(grid: Grid) -> None:
    items = [3.0, *range(-20, 0)]
    results = list(grid.map(napping(), items, bundle=1, ordered=False))
    assert results.index(3.0) >= 10
    assert sorted(results) == sorted(items)


def napping() -> Callable[[float], float]:
    def nap(s: float) -> float:
        time.sleep(max(0.0, s))
        return s

    return nap


def test_any_object_round_trips(grid: Grid) -> None:
    items: list[Any] = [
        None,
        True,
        -1,
        10**30,
        1.5,
        float("inf"),
        "text",
        "\ud800",
        b"\0\xff",
        (1, (2,)),
        {1, 2},
        frozenset({3}),
        {"$file": 1, 2: [None]},
        [],
        range(3),
        Point(1, ("a",)),
        [Point(2)],
        complex(1, 2),
        Path("a/b"),
        int,
    ]
    results = list(grid.map(lambda x: x, items))
    assert results == items
    assert [type(result) for result in results] == [type(item) for item in items]


def test_a_closure_and_a_method_run_on_the_workers(grid: Grid) -> None:
    offset, table = 5, {1: "one"}

    def function(x: int) -> Any:
        return x + offset, table.get(x)

    assert list(grid.map(function, [0, 1])) == [(5, None), (6, "one")]
    assert list(grid.map("{}!".format, ["a"])) == ["a!"]
    assert list(grid.map(partial(pow, 2), [3])) == [8]


def test_a_handler_may_ask_for_its_context(grid: Grid) -> None:
    assert list(grid.map(lambda item, ctx: (item, ctx.task), "ab")) == [("a", 0), ("b", 1)]


def test_empty_map_creates_no_job(grid: Grid) -> None:
    before = len(grid.client.jobs())
    assert list(grid.map(lambda x: x, [])) == []
    assert len(grid.client.jobs()) == before


def test_items_may_come_from_a_generator_in_this_thread(grid: Grid) -> None:
    drawn: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(12_000):
            drawn.add(threading.get_ident())
            yield i

    assert list(grid.map(lambda x: x, items())) == list(range(12_000))
    assert drawn == {threading.get_ident()}


def test_error_in_the_item_generator_is_raised_and_nothing_remains(grid: Grid, home: Path) -> None:
    def items() -> Iterator[int]:
        yield from range(20_000)  # more items than a submission can contain
        raise LookupError("no more")

    # Results are available a moment before the end of their job is written.
    until(lambda: not grid.client.jobs(active=True))
    before = objects(home)
    with pytest.raises(LookupError, match="no more"):
        grid.map(lambda x: x, items())
    assert objects(home) == before


def objects(home: Path) -> set[Path]:
    """Return the objects of jobs. Objects of functions are shared between jobs."""
    kinds = ("jobs", "raw")
    return {p for kind in kinds for p in (home / "objects" / kind).rglob("*") if p.is_file()}


# --- Failing -------------------------------------------------------------------------------------


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three is bad")
    return x


def test_a_failed_task_raises_in_its_place_with_the_remote_traceback(grid: Grid) -> None:
    results = grid.map(fail_at_three, range(6))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TaskFailed, match=r"Task map/3 of job fail-at-three-.* three is bad") as caught:
        next(results)
    assert caught.value.task == 3
    assert f'File "{__file__}"' in caught.value.traceback
    assert 'raise ValueError("three is bad")' in caught.value.traceback
    assert "ValueError: three is bad" in str(caught.value)
    assert list(results) == []


def test_failed_task_does_not_hide_other_results(grid: Grid) -> None:
    """A failed task must not hide the results of other tasks."""
    results = list(grid.map(fail_at_three, range(6), return_exceptions=True))
    failed = results.pop(3)
    assert results == [0, 1, 2, 4, 5]
    assert isinstance(failed, TaskFailed)
    assert failed.task == 3
    assert grid.wait(newest(grid)).state is JobState.SUCCEEDED


def test_failures_are_listed_once_in_either_order(grid: Grid) -> None:
    def odd(x: int) -> int:
        if x % 2:
            raise ValueError(x)
        return x

    for ordered in (True, False):
        results = list(grid.map(odd, range(60), ordered=ordered, return_exceptions=True))
        told = [result.task if isinstance(result, TaskFailed) else result for result in results]
        assert sorted(told) == list(range(60))
        assert told == sorted(told) or not ordered


def test_an_argument_that_cannot_be_pickled_is_named_before_anything_is_queued(grid: Grid, home: Path) -> None:
    # Results are returned before their job has ended.
    until(lambda: not grid.client.jobs(active=True))
    jobs, before = len(grid.client.jobs()), objects(home)
    with pytest.raises(UsageError, match=r"Item 1 cannot be sent .*_thread\.lock"):
        grid.map(lambda x: x, [1, threading.Lock()])
    assert len(grid.client.jobs()) == jobs
    assert objects(home) == before


def test_a_function_that_cannot_be_pickled_is_named(grid: Grid) -> None:
    lock = threading.Lock()

    def guarded(x: int) -> int:
        with lock:
            return x

    with pytest.raises(UsageError, match=r"function .*guarded cannot be sent .*_thread\.lock"):
        grid.map(guarded, [1])


def test_a_result_that_cannot_be_pickled_fails_its_task_by_name(grid: Grid) -> None:
    """An unpicklable result becomes a failure with a reason, and the job does not hang (I7)."""
    with pytest.raises(TaskFailed, match=r"Task map/0 .*_thread\.lock") as caught:
        list(grid.map(lambda _: threading.Lock(), [1]))
    assert caught.value.task == 0


def test_function_without_an_item_gets_no_internal_key(grid: Grid) -> None:
    with pytest.raises(TaskFailed, match=r"failed: The function cannot .*, and takes \(\)"):
        list(grid.map(lambda: 1, [1]))


def test_task_has_the_attempts_of_its_rule(grid: Grid, tmp_path: Path) -> None:
    def flaky(name: str) -> int:
        with (tmp_path / name).open("a+") as file:
            file.write("x")
            file.seek(0)
            tries = len(file.read())
        if tries < 2:
            raise OSError("not yet")
        return tries

    with pytest.raises(TaskFailed, match="not yet"):
        list(grid.map(flaky, ["a"]))
    rule = RetryRule(attempts=2, backoff_s=0.01)
    assert list(grid.map(flaky, ["b", "c"], retry=rule)) == [2, 2]

    def always(_: int) -> None:
        raise OSError("never")

    with pytest.raises(TaskFailed, match="failed 2 times, the last time: OSError: never"):
        list(grid.map(always, [1], retry=rule))


def test_a_task_that_runs_too_long_fails(grid: Grid) -> None:
    with pytest.raises(TaskFailed, match=r"timeout of 0\.2 s"):
        list(grid.map(lambda s: time.sleep(s), [30], timeout_s=0.2))


@pytest.mark.parametrize("wrong", [{"timeout_s": 0}, {"bundle": 0}, {"retry": -1}, {"name": "No Name"}])
def test_arguments_that_make_no_sense_are_refused(grid: Grid, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        grid.map(lambda x: x, [1], **wrong)
    with pytest.raises(UsageError, match="is not a function"):
        grid.map(cast(Any, 5), [1])


# --- Large and many ------------------------------------------------------------------------------


def test_large_items_and_large_results_make_the_trip(grid: Grid) -> None:
    items = [bytes([i]) * 1_000_000 for i in range(20)]
    assert list(grid.map(lambda b: b[::-1] + b"!", items)) == [item + b"!" for item in items]
    assert list(grid.map(len, ["x" * 200_000])) == [200_000]


def test_files_travel_both_ways(grid: Grid, home: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text")

    def shout(file: File, ctx: Any) -> Any:
        out = ctx.save(file.read_bytes().upper(), "out.txt")
        return {"out": out, "in": file, "read at": str(file.path)}

    (result,) = grid.map(shout, [File(tmp_path / "in.txt")])
    assert result["out"].read_text() == "SOME TEXT"
    assert result["in"].read_text() == "some text"
    # The worker and this process read the files of a local bucket directly.
    for path in (Path(result["read at"]), result["in"].path, result["out"].path):
        assert path.is_relative_to(home / "objects")
    assert list(grid.map(lambda f: f.read_text(), [result["out"]])) == ["SOME TEXT"]
    with pytest.raises(UsageError, match=r"Item 0 .*nowhere\.txt does not exist"):
        grid.map(len, [File(tmp_path / "nowhere.txt")])


def test_two_threads_map_at_the_same_time(grid: Grid) -> None:
    results: dict[int, list[int]] = {}

    def use(k: int) -> None:
        results[k] = list(grid.map(lambda x: x * k, range(500)))

    threads = [threading.Thread(target=use, args=(k,)) for k in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [x * k for x in range(500)] for k in (2, 3)}


def test_items_of_a_map_may_come_from_another_map(grid: Grid) -> None:
    inner = grid.map(lambda x: x + 1, range(50))
    assert list(grid.map(lambda x: x * 2, inner)) == [2 * (x + 1) for x in range(50)]


def test_ten_thousand_tiny_tasks_do_not_cost_a_round_trip_each(grid: Grid) -> None:
    def measure() -> float:
        started_s = time.monotonic()
        assert sum(grid.map(lambda x: x, range(10_000))) == sum(range(10_000))
        return time.monotonic() - started_s

    # The calls take half a second on an idle machine with two cores. A round trip per call would take a minute.
    assert min(measure() for _ in range(3)) < 4


# --- Leaving early -------------------------------------------------------------------------------


def test_closing_the_iterator_early_cancels_the_job(grid: Grid, tmp_path: Path) -> None:
    """A job must not continue after its submitter has left."""

    def note(i: int) -> None:
        (tmp_path / str(i)).touch()
        time.sleep(0.05)

    results = grid.map(note, range(400))
    next(results)
    results.close()
    ended = grid.wait(newest(grid))
    assert ended.state is JobState.CANCELLED
    assert len(list(tmp_path.iterdir())) < 400


@pytest.mark.parametrize("started", [True, False])
def test_an_iterator_that_is_dropped_cancels_its_job(grid: Grid, *, started: bool) -> None:
    results = grid.map(lambda _: time.sleep(0.05), range(400))
    job = newest(grid)
    if started:
        next(results)
    del results
    assert grid.wait(job).state is JobState.CANCELLED


def test_a_failure_cancels_what_is_left(grid: Grid) -> None:
    def fail_or_sleep(i: int) -> None:
        if i == 0:
            raise ValueError("first")
        time.sleep(0.05)

    with pytest.raises(TaskFailed, match="first"):
        list(grid.map(fail_or_sleep, range(400)))
    assert grid.wait(newest(grid)).state is JobState.CANCELLED


def test_job_canceled_elsewhere_raises(grid: Grid) -> None:
    results = grid.map(lambda _: time.sleep(0.05), range(400))
    next(results)
    grid.client.cancel(newest(grid))
    with pytest.raises(JobFailed, match=r"ended CANCELLED .* of 400 results"):
        list(results)
