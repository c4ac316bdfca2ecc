"""The Python API as notebooks and short scripts use it: cells that run twice, modules beside the script, options of
calls, and shared values.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab import Grid, Pool, Shared, TaskFailed
from batchlab.core.errors import UsageError
from batchlab.runtime.home import Home
from tests.support.grid.local_grid import processes_of
from tests.support.grid.python_api import newest, warm_grid
from tests.support.waiting import until
from tests.system.test_python_api_lifecycle import output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(home: Path) -> Iterator[Grid]:
    with warm_grid(home) as grid:
        yield grid


# --- The first cell ------------------------------------------------------------------------------


def test_the_first_cell_of_a_notebook_runs_again(tmp_path: Path) -> None:
    grid = Grid("local", home=tmp_path, workers=1)
    before = Home(tmp_path).record()
    assert list(grid.map(len, ["a"])) == [1]
    grid = Grid("local", home=tmp_path, workers=1)
    gc.collect()
    assert list(grid.map(len, ["bb"])) == [2]
    assert Home(tmp_path).record() == before
    grid.close()
    assert not processes_of(tmp_path)


def test_grid_objects_of_a_process_share_the_started_grid(tmp_path: Path) -> None:
    first = Grid("local", home=tmp_path, workers=1)
    second = Grid("local", home=tmp_path)
    first.close()
    assert list(second.map(len, ["a"])) == [1]
    second.close()
    assert not processes_of(tmp_path)


def test_other_pools_are_refused_in_one_sentence(grid: Grid, home: Path) -> None:
    with pytest.raises(UsageError, match=r"^A grid with other pools is up in .* \(default 2-2x1\), .*cannot be set"):
        Grid("local", home=home, workers=3)
    with Grid("local", home=home, workers=2, warm=True) as other:
        assert list(other.map(len, ["a"])) == [1]
    assert list(grid.map(len, ["a"])) == [1]


# --- Modules beside the script -------------------------------------------------------------------


def test_an_import_inside_a_function_finds_the_modules_beside_the_script(
    grid: Grid, home: Path, tmp_path: Path
) -> None:
    """The script itself does not import the modules, so the modules are not pickled with the function."""
    (tmp_path / "helper.py").write_text("from parts.area import area\ndef double(x):\n    return 2 * area(x)\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").touch()
    (tmp_path / "parts" / "area.py").write_text("from . import unit\ndef area(x):\n    return x * unit.SIDE\n")
    (tmp_path / "parts" / "unit.py").write_text("SIDE = 5\n")
    script = f"""
        import importlib
        from batchlab import Grid

        def compute(x):
            import json, helper
            return json.loads(str(helper.double(x)))

        with Grid("local", home={str(home)!r}) as grid, grid.executor() as executor:
            print(list(grid.map(compute, [1, 2])), executor.submit(compute, 3).result())
            with open("helper.py", "w") as file:
                file.write("def double(x): return -x")
            print(list(grid.map(compute, [1, 2])), executor.submit(compute, 3).result())
    """
    assert grid.client.health()["leader"]
    assert output(tmp_path, script).splitlines() == ["[10, 20] 30", "[-1, -2] -3"]


# --- Exceptions ----------------------------------------------------------------------------------


class OutOfStock(Exception):
    def __init__(self, article: str, *, left: int) -> None:
        super().__init__(f"{left} of {article} left")
        self.left = left

    def __reduce__(self) -> tuple[object, ...]:
        return _out_of_stock, (self.left,)


def _out_of_stock(left: int) -> OutOfStock:
    return OutOfStock("pens", left=left)


def test_a_failed_task_is_caught_by_the_users_type(grid: Grid) -> None:
    def order(count: int) -> int:
        if count > 2:
            raise OutOfStock("pens", left=2)
        return {1: 1}[count]

    with pytest.raises(OutOfStock) as caught:
        list(grid.map(order, [1, 3]))
    error: BaseException = caught.value
    assert isinstance(error, TaskFailed)
    assert (error.task, vars(error)["left"]) == (1, 2)
    assert "2 of pens left" in error.traceback
    assert isinstance(error.__cause__, OutOfStock)
    missing, _ = grid.map(order, [2, 1], return_exceptions=True)
    assert isinstance(missing, TaskFailed)
    assert isinstance(missing, KeyError)


def test_large_exception_has_only_its_text(grid: Grid) -> None:
    def fail(_: int) -> None:
        raise ValueError("x" * 100_000)

    with pytest.raises(TaskFailed) as caught:
        list(grid.map(fail, [1]))
    assert type(caught.value) is TaskFailed


# --- Options of calls ----------------------------------------------------------------------------


def test_coroutine_functions_run_to_their_end(grid: Grid) -> None:
    async def double(x: int) -> int:
        await asyncio.sleep(0.01)
        return 2 * x

    assert list(grid.map(double, [1, 2])) == [2, 4]
    assert list(grid.starmap(double, [[3]])) == [6]
    with grid.executor() as executor:
        assert executor.submit(double, 4).result() == 8  # type: ignore[comparison-overlap]
        assert list(executor.map(double, [5])) == [10]  # type: ignore[comparison-overlap]


def test_calls_name_their_pool_and_their_slots(tmp_path: Path) -> None:
    pools = [Pool("default", 0, 1, 1), Pool("wide", 1, 1, 2)]

    def busy(_: int) -> float:
        time.sleep(0.2)
        return time.monotonic()

    with Grid("local", home=tmp_path, pools=pools) as grid:
        assert list(grid.map(len, ["a"], pool="wide", slots=2)) == [1]
        (stage,) = grid.client.job(newest(grid))["stages"]
        assert stage["pool"] == "wide"
        ended_s = sorted(grid.map(busy, range(2), pool="wide", slots=2, bundle=1))
        assert ended_s[1] - ended_s[0] >= 0.2
        with grid.executor(pool="wide", slots=2) as executor:
            assert executor.submit(len, "bb").result() == 2
            assert executor._max_workers == 1
        for wrong in ({"pool": "none"}, {"slots": 2}, {"slots": 0}):
            with pytest.raises(UsageError, match=r"pool|slots"):
                grid.map(len, ["a"], **wrong)


def test_progress_counts_the_tasks(grid: Grid, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(grid.map(abs, range(20), name="count", progress=True)) == list(range(20))
    shown = capfd.readouterr().err
    assert shown.startswith("\rcount: ")
    assert shown.endswith("\rcount: 20 of 20 tasks\n")


def test_output_of_tasks_is_shown(grid: Grid, capfd: pytest.CaptureFixture[str]) -> None:
    def speak(x: int) -> int:
        print(f"this is {x}\x1b[31m")
        if x == 2:
            raise ValueError(x)
        return x

    assert len(list(grid.map(speak, range(3), show_output=True, return_exceptions=True))) == 3
    assert sorted(capfd.readouterr().out.splitlines()) == [f"[map/{x}] this is {x}\\x1b[31m" for x in range(3)]
    assert list(grid.map(speak, [0])) == [0]
    with grid.executor(show_output=True) as executor:
        assert executor.submit(speak, 5).result() == 5
    assert capfd.readouterr().out == "[map/0] this is 5\\x1b[31m\n"


# --- Shared values -------------------------------------------------------------------------------


class Loaded:
    """A value that counts how often a process loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        with (self.folder / str(os.getpid())).open("a") as file:
            file.write("x")


def test_shared_value_is_stored_once_and_loaded_once_in_each_process(grid: Grid, home: Path, tmp_path: Path) -> None:
    stored = set((home / "objects" / "code").iterdir())
    shared = grid.put((Loaded(tmp_path), os.urandom(3_000_000)))
    assert len(set((home / "objects" / "code").iterdir()) - stored) == 1
    size = shared.size
    assert size > 3_000_000

    def measure(i: int) -> int:
        return len(shared.value[1]) + i

    def sum_up(first: Shared[tuple[Loaded, bytes]], i: int) -> int:
        return len(first.value[1]) + i

    expected = [3_000_000 + i for i in range(30)]
    assert list(grid.map(measure, range(30))) == expected
    assert list(grid.starmap(sum_up, [(shared, i) for i in range(30)])) == expected
    with grid.executor(initializer=lambda: len(shared.value)) as executor:
        assert list(executor.map(measure, range(30))) == expected
        assert executor.submit(sum_up, shared, i=1).result() == expected[1]
        assert executor.submit(lambda: shared).result().digest == shared.digest
    loads = {one.name: one.read_text() for one in tmp_path.iterdir()}
    loads.pop(str(os.getpid()), None)
    assert loads
    assert set(loads.values()) == {"x"}
    large = [one for one in (home / "objects").rglob("*") if one.is_file() and one.stat().st_size > 1_000_000]
    assert {one.name for one in large} >= {f"{shared.digest}.pkl"}
    assert sum(one.stat().st_size > size for one in large if one.stat().st_mtime > time.time() - 60) == 0
    assert shared.value[1][:1]


def test_shared_values_have_limits(grid: Grid) -> None:
    shared = grid.put([1])
    with pytest.raises(UsageError, match="refers to another shared value"):
        grid.put([shared])
    with pytest.raises(UsageError, match="cannot be pickled"):
        grid.put(threading.Lock())


def test_a_large_function_is_stored_once_with_a_warning(grid: Grid, home: Path) -> None:
    ballast = os.urandom(1_500_000)

    def weigh(i: int) -> int:
        return len(ballast) + i

    def stored() -> set[Path]:
        return {one for one in (home / "objects").rglob("*") if one.is_file() and one.stat().st_size > 1_000_000}

    before = stored()
    with grid.executor() as executor:
        with pytest.warns(UserWarning, match=r"weigh takes 1\.5 MB when pickled.*Grid\.put"):
            assert executor.submit(weigh, 0).result() == 1_500_000
        for i in range(1, 5):
            assert executor.submit(weigh, i).result() == 1_500_000 + i
    assert len(stored() - before) == 1


# --- Logs ----------------------------------------------------------------------------------------


def test_a_program_that_logs_at_info_sees_no_polls(home: Path, grid: Grid, tmp_path: Path) -> None:
    script = f"""
        import logging, sys, time
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        from batchlab import Grid
        with Grid("local", home={str(home)!r}) as grid, grid.executor() as executor:
            print(executor.submit(time.sleep, 0.5).result(), list(grid.map(len, ["a"])))
        logging.getLogger("httpx").info("HTTP Request: %s %s", "GET", "http://elsewhere/")
    """
    assert grid.client.health()["leader"]
    assert output(tmp_path, script).splitlines() == ["None [1]", "INFO:httpx:HTTP Request: GET http://elsewhere/"]


def test_map_submits_before_the_first_result_is_read(grid: Grid, tmp_path: Path) -> None:
    results = grid.map(Path.touch, [tmp_path / "a"])
    until(lambda: (tmp_path / "a").exists())
    assert list(results) == [None]
