"""The programs of examples/executor, and the ends of joblib's calls, on a real grid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path
from typing import Any

import joblib
import pytest

from batchlab import Grid
from batchlab.client.joblib import NAME
from batchlab.core.errors import UsageError
from tests.support import ROOT
from tests.support.grid.python_api import newest, warm_grid
from tests.support.waiting import until

FOLDER = ROOT / "examples" / "executor"
SHOWN = dict(
    re.findall(
        r"```sh\npython examples/executor/(\S+)\n```\n+```text\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL
    )
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(home: Path) -> Iterator[Grid]:
    with warm_grid(home) as grid:
        yield grid


def test_the_readme_shows_every_program() -> None:
    assert set(SHOWN) == {one.name for one in FOLDER.glob("*.py")}


@pytest.mark.parametrize("program", sorted(SHOWN))
def test_program_prints_the_documented_output(grid: Grid, home: Path, tmp_path: Path, program: str) -> None:
    assert grid.client.health()["leader"]
    run = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / program],
        cwd=tmp_path,
        env={**os.environ, "BATCHLAB_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr, run.stdout) == (0, "", SHOWN[program])
    made = grid.client.job(newest(grid))
    assert made["name"] == ("primes" if program == "primes.py" else "joblib")
    assert made["state"] == "SUCCEEDED"


def test_the_example_counts_the_same_on_threads() -> None:
    with ThreadPoolExecutor(2) as threads:
        count: Any = run_path(str(FOLDER / "primes.py"))["count"]
        assert count(threads, 1_000_000, 50_000) == int(SHOWN["primes.py"])


# --- joblib --------------------------------------------------------------------------------------


def square(i: int) -> int:
    return i * i


def test_parallel_gives_results_in_order(grid: Grid) -> None:
    with joblib.parallel_config(NAME, grid=grid):
        assert joblib.Parallel()(joblib.delayed(square)(i) for i in range(50)) == [i * i for i in range(50)]
        coming = joblib.Parallel(n_jobs=2, return_as="generator")(joblib.delayed(square)(i) for i in range(5))
        assert list(coming) == [0, 1, 4, 9, 16]


def test_parallel_counts_the_grids_workers(grid: Grid) -> None:
    with joblib.parallel_config(NAME, grid=grid):
        assert joblib.effective_n_jobs(-1) == 2
        assert joblib.effective_n_jobs(-2) == 1
        assert joblib.effective_n_jobs(7) == 7
        with pytest.raises(ValueError, match="n_jobs == 0"):
            joblib.effective_n_jobs(0)


def test_nested_parallel_stays_on_its_worker(grid: Grid) -> None:
    def outer(i: int) -> list[int]:
        inner: list[int] = joblib.Parallel(n_jobs=2)(joblib.delayed(square)(j) for j in range(i))
        return inner

    with joblib.parallel_config(NAME, grid=grid):
        assert joblib.Parallel()(joblib.delayed(outer)(i) for i in (1, 3)) == [[0], [0, 1, 4]]


def test_parallel_raises_what_a_call_raises_and_drops_the_rest(grid: Grid, tmp_path: Path) -> None:
    def note(i: int) -> None:
        if i == 0:
            raise LookupError("no luck")
        time.sleep(0.1)
        (tmp_path / str(i)).touch()

    with joblib.parallel_config(NAME, grid=grid):
        with pytest.raises(LookupError, match="no luck"):
            joblib.Parallel(n_jobs=2)(joblib.delayed(note)(i) for i in range(300))
        assert joblib.Parallel()([joblib.delayed(square)(3)]) == [9]
    until(lambda: not grid.client.jobs(active=True))
    assert len(list(tmp_path.iterdir())) < 299


def test_backend_without_a_grid_names_what_it_needs() -> None:
    with pytest.raises(UsageError, match=r"needs a grid.*grid=grid"):
        joblib.parallel_config(NAME)
