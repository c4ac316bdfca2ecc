"""The Python API as notebooks and short scripts use it: cells that run twice, modules beside the script, options of
calls, and shared values.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchlab import File, Grid, Pool, Shared, TaskFailed
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
    with pytest.raises(UsageError, match=r"^A grid with other pools is up in .* \(default:2-2x1\), .*cannot be set"):
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


def test_a_module_of_the_caller_has_one_copy_on_a_worker(grid: Grid, home: Path, tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "{{name}}.py").write_text("class {{ name }}: pass\n")
    (package / "goods.py").write_text("SEEN = []\nclass Box: pass\nclass Broken(Exception): pass\n")
    (package / "work.py").write_text(
        "from . import goods\n"
        "def check(box):\n"
        "    from .goods import Box, SEEN\n"
        "    from shop.goods import Broken\n"
        "    SEEN.append(box)\n"
        "    if box is None:\n"
        "        raise Broken('no box')\n"
        "    return isinstance(box, Box), Box is goods.Box, goods.SEEN[-1] is box, box\n"
    )
    script = f"""
        from batchlab import Grid
        from shop.goods import Box, Broken
        from shop.work import check

        with Grid("local", home={str(home)!r}) as grid, grid.executor() as executor:
            [(*same, box)] = grid.map(check, [Box()])
            print(same, type(box) is Box)
            print(executor.submit(check, Box()).result()[:3])
            for call in (lambda: list(grid.map(check, [None])), executor.submit(check, None).result):
                try:
                    call()
                except Broken as error:
                    print(error.args)
    """
    assert grid.client.health()["leader"]
    assert output(tmp_path, script).splitlines() == [
        "[True, True, True] True",
        "(True, True, True)",
        "('no box',)",
        "('no box',)",
    ]


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


class Refused(Exception):
    """An exception whose constructor takes other arguments than `args`, and with an attribute that TaskFailed has."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.task = "upload"


def test_exceptions_keep_their_type_and_attributes(grid: Grid) -> None:
    def fail(code: int) -> None:
        raise Refused(code, "x" * 100_000 if code == 1 else "no")

    errors: list[Any] = list(grid.map(fail, [0, 1], return_exceptions=True, bundle=2))
    assert [(type(error.__cause__), error.code, error.task) for error in errors] == [
        (Refused, 0, "upload"),
        (Refused, 1, "upload"),
    ]
    assert errors[0].args == ("no",)
    assert type(errors[0]) is type(errors[1])
    assert [error.task_failed.task for error in errors] == [0, 1]
    with grid.executor() as executor, pytest.raises(Refused, match="no") as caught:
        executor.submit(fail, 404).result()
    assert caught.value.code == 404


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
            for refuse in (lambda **wrong: grid.map(len, ["a"], **wrong), grid.executor):
                with pytest.raises(UsageError, match=r"Its pools are default, wide|slots"):
                    refuse(**wrong)


def test_an_unknown_option_is_refused(grid: Grid) -> None:
    call: Any
    for call in (partial(grid.starmap, pow, [(2, 3)]), partial(grid.map, abs, [1]), grid.executor):
        with pytest.raises(TypeError, match="unexpected keyword argument 'bundel'"):
            call(bundel=1)


def test_progress_counts_the_tasks(grid: Grid, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(grid.map(abs, range(20), name="count", progress=True)) == list(range(20))
    shown = capfd.readouterr().err
    assert shown.startswith("\rcount: ")
    assert shown.endswith("\rcount: 20 of 20 tasks\n")


def test_progress_and_output_are_on_lines_of_their_own(grid: Grid) -> None:
    both = io.StringIO()
    with redirect_stdout(both), redirect_stderr(both):
        list(grid.map(print, range(3), name="count", bundle=1, show_output=True, progress=True))
    lines = [line.rpartition("\r")[2] for line in both.getvalue().split("\n")[:-1]]
    assert sorted(lines) == [*(f"[map/{x}] {x}" for x in range(3)), "count: 3 of 3 tasks"]


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
    stored = values_in(home)
    shared = grid.put((Loaded(tmp_path), os.urandom(3_000_000)))
    assert len(values_in(home)) == len(stored) + 1
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
    with pytest.raises(UsageError, match=r"shared value refers to File.*Pass the File as an item"):
        grid.put({"file": File(__file__)})


def values_in(home: Path) -> list[Path]:
    return list((home / "objects" / "code" / "values").rglob("*.pkl"))


def test_a_shared_value_is_deleted_when_its_last_reference_or_its_grid_is_closed(
    grid: Grid, home: Path, tmp_path: Path
) -> None:
    stored = len(values_in(home))
    with grid.put([5]) as shared, Grid("local", home=home) as other:
        assert grid.put([5]).digest == shared.digest == other.put([5]).digest
        assert len(values_in(home)) == stored + 2
        assert list(grid.map(lambda i: shared.value[i], [0])) == [5]
        grid.put([6])
        other.put([7])
        other.close()
        assert len(values_in(home)) == stored + 2
    assert len(values_in(home)) == stored + 2
    with grid.put([5]) as again, grid.put([8]):
        assert list(grid.map(lambda i: again.value[i], [0])) == [5]
    assert len(values_in(home)) == stored + 2
    with pytest.raises(UsageError, match="is closed"):
        grid.map(lambda i: shared.value[i], [0])
    script = f"""
        from batchlab import Grid
        grid = Grid("local", home={str(home)!r})
        table = grid.put([9])
        print(list(grid.map(lambda i: table.value[i], [0])))
    """
    assert output(tmp_path, script) == "[9]\n"
    assert len(values_in(home)) == stored + 2


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
