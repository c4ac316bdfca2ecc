"""The ends of executors: shutdown, deletion, the end of Python, the end of the grid, or a signal."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from batchlab import Grid
from batchlab.client.futures import BrokenGridExecutor
from batchlab.core.model import Pool
from batchlab.runtime.home import Home
from tests.support.grid.executor_functions import HeldUp
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import processes_of
from tests.support.grid.python_api import newest, warm_grid
from tests.support.processes import is_sleeping
from tests.support.waiting import until
from tests.system.test_python_api_lifecycle import ended, output, start


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(home: Path) -> Iterator[Grid]:
    with warm_grid(home) as grid:
        yield grid


def wait_for(gate: Path, value: Any = None) -> Any:
    """Wait for the gate. Workers call this function."""
    while not gate.exists():
        time.sleep(0.01)
    return value


# --- shutdown ------------------------------------------------------------------------------------


def test_after_shutdown_no_call_is_taken(grid: Grid) -> None:
    executor = grid.executor()
    assert executor.submit(pow, 2, 5).result() == 32
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    for take in (executor.submit, executor.map):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            take(pow, [2], [5])


def test_shutdown_waits_for_what_was_submitted(grid: Grid) -> None:
    executor = grid.executor()
    calls = [executor.submit(time.sleep, 0.02) for _ in range(50)]
    mapped = executor.map(abs, range(-5, 5))
    executor.shutdown()
    assert all(call.done() for call in calls)
    assert list(mapped) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]


def test_shutdown_without_waiting_leaves_the_calls_to_their_end(grid: Grid, tmp_path: Path) -> None:
    executor = grid.executor()
    call = executor.submit(wait_for, tmp_path / "gate", 3)
    executor.shutdown(wait=False)
    assert not call.done()
    (tmp_path / "gate").touch()
    assert call.result() == 3


def test_shutdown_can_cancel_pending_calls(grid: Grid, tmp_path: Path) -> None:
    gate, seen = tmp_path / "gate", tmp_path / "seen"
    seen.mkdir()

    def note(i: int) -> int:
        (seen / str(i)).touch()
        return int(wait_for(gate, i))

    executor = grid.executor()
    calls = [executor.submit(note, i) for i in range(50)]
    until(lambda: len(list(seen.iterdir())) == 2)
    job = newest(grid)
    executor.shutdown(wait=False, cancel_futures=True)
    until(lambda: grid.client.job(job)["state"] == "PAUSED")
    assert not any(call.done() for call in calls if call.running())
    gate.touch()
    executor.shutdown()
    begun = {int(one.name) for one in seen.iterdir()}
    assert {i for i, call in enumerate(calls) if not call.cancelled()} == begun
    assert all(calls[i].result() == i for i in begun)
    assert len(begun) < 30


def test_shutdown_can_cancel_what_has_not_been_sent(grid: Grid) -> None:
    executor = grid.executor()
    held_up = HeldUp()
    first = executor.submit(abs, held_up)
    until(first.running)
    calls = [executor.submit(abs, i) for i in range(20)]
    calls[0].cancel()
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(call.cancelled() for call in calls)
    assert cf.wait(calls, timeout=0).done == set(calls)
    held_up.let_go.set()
    executor.shutdown()
    assert first.done()


def test_a_call_that_is_cancelled_at_once_does_not_hold_up_shutdown(grid: Grid) -> None:
    executor = grid.executor()
    executor.submit(int).result()
    executor.submit(int).cancel()
    executor.shutdown()


def test_a_callback_may_shut_its_executor_down(grid: Grid) -> None:
    executor = grid.executor()
    down = threading.Event()

    def shut(_: object) -> None:
        executor.shutdown()
        down.set()

    executor.submit(abs, -1).add_done_callback(shut)
    assert down.wait(20)
    executor.shutdown()


@pytest.mark.parametrize("cancel", [False, True])
def test_submission_during_shutdown_is_refused_or_completed(grid: Grid, *, cancel: bool) -> None:
    executor = grid.executor()
    calls: list[list[Future[int]]] = [[] for _ in range(4)]
    refused: list[str] = []

    def use(mine: list[Future[int]]) -> None:
        try:
            while len(mine) < 50_000:
                mine.append(executor.submit(abs, -len(mine)))
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=use, args=(mine,)) for mine in calls]
    for thread in threads:
        thread.start()
    until(lambda: all(len(mine) > 10 for mine in calls))
    executor.shutdown(cancel_futures=cancel)
    for thread in threads:
        thread.join()
    assert refused == ["cannot schedule new futures after shutdown"] * 4
    for mine in calls:
        assert all(call.done() for call in mine)
        left = [(i, call) for i, call in enumerate(mine) if not call.cancelled()]
        assert all(call.result() == i for i, call in left)
        assert cancel or len(left) == len(mine)


def test_a_block_waits_for_its_calls(grid: Grid) -> None:
    with grid.executor() as executor:
        calls = [executor.submit(abs, -i) for i in range(10)]
    assert all(call.done() for call in calls)


# --- The end of the grid -------------------------------------------------------------------------


def test_closing_the_grid_breaks_its_executors(tmp_path: Path) -> None:
    with Grid("local", home=tmp_path, workers=1) as grid:
        executor = grid.executor()
        assert executor.submit(abs, -1).result() == 1
        calls = [executor.submit(time.sleep, 60) for _ in range(3)]
        until(calls[-1].running)
    errors = [call.exception(timeout=10) for call in calls]
    assert [type(error) for error in errors] == [BrokenGridExecutor] * 3
    assert len(set(map(id, errors))) == 3
    with pytest.raises(BrokenExecutor, match="closed"):
        executor.submit(abs, -1)
    with pytest.raises(BrokenExecutor, match="closed"):
        executor.map(abs, [-1])
    executor.shutdown(cancel_futures=True)
    assert not processes_of(tmp_path)


def test_executor_breaks_when_the_manager_is_gone_for_good(bring_up: Bring) -> None:
    # The grid starts without workers, because workers end only some time after their manager.
    there = bring_up((Pool("default", 0, 0, 1),))
    with Grid("local", home=there.home.path) as grid:
        executor = grid.executor()
        calls = [executor.submit(time.sleep, 60) for _ in range(3)]
        until(calls[-1].running)
        until(lambda: bool(grid.client.jobs(active=True)))
        record = there.home.record()
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        os.waitpid(record.pid, 0)
        for call in calls:
            with pytest.raises(BrokenExecutor, match="does not answer"):
                call.result(timeout=60)
        with pytest.raises(BrokenExecutor, match="does not answer"):
            executor.submit(abs, -1)
        executor.shutdown()


def test_executor_continues_when_its_manager_is_killed(tmp_path: Path) -> None:
    with Grid("local", home=tmp_path, workers=1) as grid, grid.executor() as executor:
        call = executor.submit(wait_for, tmp_path / "gate", 5)
        try:
            until(lambda: any(job["stages"][0]["running"] for job in grid.client.jobs()), 60)
            record = Home(tmp_path).record()
            assert record is not None
            os.kill(record.pid, signal.SIGKILL)
        finally:
            (tmp_path / "gate").touch()  # otherwise, the block would not end
        assert call.result() == 5
        assert executor.submit(abs, -1).result() == 1


def test_a_grid_that_is_forgotten_on_its_own_thread_is_closed(tmp_path: Path) -> None:
    """The thread that releases the last reference closes the grid, so the grid's own thread must not wait for
    itself."""
    grid = Grid("local", home=tmp_path, workers=1)
    link, forgotten = grid._link, threading.Event()

    async def hold(_: Grid) -> None:
        await asyncio.to_thread(forgotten.wait)

    held = link.start(hold(grid))
    del grid
    assert processes_of(tmp_path)
    forgotten.set()
    held.result()
    until(lambda: not processes_of(tmp_path))


# --- The end of Python ---------------------------------------------------------------------------


def late_calls(grid: str, last: str) -> str:
    """Return a script that ends while its calls run."""
    return f"""
        from batchlab import Grid
        from time import sleep
        def late(i):
            sleep(0.2)
            return i
        grid = Grid("local", {grid})
        executor = grid.executor(name="late")
        for i in range(3):
            executor.submit(late, i).add_done_callback(lambda call: print(call.result()))
        executor.map(late, [1])
        {last}
    """


def test_submitted_calls_complete_before_python_exits(grid: Grid, home: Path, tmp_path: Path) -> None:
    script = late_calls(f"home={str(home)!r}", "executor.shutdown(wait=False)")
    assert sorted(output(tmp_path, script)) == ["\n", "\n", "\n", "0", "1", "2"]
    states = {job["state"] for job in grid.client.jobs() if job["name"] == "late"}
    assert states == {"SUCCEEDED"}


def test_unreferenced_grid_runs_until_its_calls_complete(tmp_path: Path) -> None:
    script = late_calls('home="home", workers=1', "del grid, executor")
    assert sorted(output(tmp_path, script).split()) == ["0", "1", "2"]
    until(lambda: not processes_of(tmp_path / "home"), 5)
    assert set(ended(tmp_path / "home")) == {"SUCCEEDED"}


def test_nothing_can_be_submitted_while_python_ends(grid: Grid, home: Path, tmp_path: Path) -> None:
    script = f"""
        import atexit
        @atexit.register
        def last():
            try:
                executor.submit(abs, -1)
            except RuntimeError as error:
                print("refused")
        from batchlab import Grid
        grid = Grid("local", home={str(home)!r})
        executor = grid.executor()
        def again(call):
            try:
                executor.submit(abs, -2)
            except RuntimeError as error:
                print(error)
        from time import sleep
        executor.submit(sleep, 1).add_done_callback(again)
    """
    assert grid.client.health()["leader"]
    assert output(tmp_path, script).splitlines() == [
        "cannot schedule new futures after interpreter shutdown",
        "refused",
    ]


def test_a_forked_process_is_refused_and_does_no_harm(grid: Grid, home: Path, tmp_path: Path) -> None:
    script = f"""
        import os, warnings
        warnings.simplefilter("ignore")  # of forking with threads
        from batchlab import Grid
        from concurrent.futures import BrokenExecutor
        with Grid("local", home={str(home)!r}) as grid, grid.executor() as executor:
            call = executor.submit(abs, -7)
            child = os.fork()
            if not child:
                try:
                    executor.submit(abs, -1)
                except BrokenExecutor as error:
                    print(error, flush=True)
                executor.shutdown()
                os._exit(0)
            os.waitpid(child, 0)
            print(call.result(), executor.submit(abs, -8).result())
    """
    assert grid.client.health()["leader"]
    printed = output(tmp_path, script).splitlines()
    assert "closed in this process" in printed[0]
    assert printed[1:] == ["7 8"]


def test_ctrl_c_in_a_block_cancels_its_calls(grid: Grid, home: Path, tmp_path: Path) -> None:
    """An interrupted program must not leave its calls running."""
    script = f"""
        import faulthandler
        from batchlab import Grid
        from time import sleep
        faulthandler.dump_traceback_later(25)
        with Grid("local", home={str(home)!r}) as grid:
            with grid.executor(name="interrupted") as executor:
                calls = [executor.submit(sleep, 60) for _ in range(100)]
                print(executor.submit(abs, -1).running(), flush=True)
                calls[0].result()
    """
    with start(tmp_path, script) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        until(lambda: any(one["name"] == "interrupted" for one in grid.client.jobs()))
        # A signal that arrives just before a thread waits for a lock does not wake the thread. CPython checks for
        # signals before the wait.
        until(lambda: is_sleeping(process.pid))
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired as late:
            process.kill()
            pytest.fail(f"still there: {late.stderr!r}")
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    jobs = [one["id"] for one in grid.client.jobs() if one["name"] == "interrupted"]
    assert {grid.wait(job).state for job in jobs} == {"CANCELLED"}


def test_ctrl_c_while_a_result_is_awaited_leaves_the_executor_usable(grid: Grid) -> None:
    with grid.executor() as executor:
        call = executor.submit(time.sleep, 1)
        main = threading.get_ident()
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            call.result()
        assert executor.submit(abs, -1).result() == 1
        assert call.result() is None


def test_an_interrupted_block_cancels_its_calls(grid: Grid) -> None:
    calls: list[Future[None]] = []

    def use() -> None:
        with grid.executor() as executor:
            calls.append(executor.submit(time.sleep, 60))
            until(calls[0].running)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    with pytest.raises(CancelledError):
        calls[0].result()
