"""The four example jobs on the `local` backend, checked against independent computations."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from batchlab.core.model import Pool
from examples.example_data import write_claims, write_records
from tests.support import ROOT
from tests.support.grid.local_grid import LocalGrid, processes_of
from tests.support.waiting import until

EXAMPLES = ROOT / "examples"
TWO = (Pool("default", 0, 2, 1),)


@pytest.fixture(scope="module")
def backend() -> str:
    return "local"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, backend: str) -> Iterator[LocalGrid]:
    """Start the grid of all examples. After them, no process of the grid may exist."""
    grid = LocalGrid(tmp_path_factory.mktemp("examples") / "home", TWO, backend=backend)
    yield grid
    grid.stop()
    until(lambda: not processes_of(grid.home.path), 5)


def copy(name: str, folder: Path) -> Path:
    """Copy an example job with its own data folder."""
    shutil.copytree(EXAMPLES / name, folder / name, ignore=shutil.ignore_patterns("data"))
    (folder / name / "data").mkdir()
    return folder / name


def test_claims_totals_match_the_generator(grid: LocalGrid, tmp_path: Path) -> None:
    job = copy("claims", tmp_path)
    facts = write_claims(job / "data", seed=5, files=60, claims_per_file=20)
    view = grid.wait(grid.submit(job / "job.yaml", token=tmp_path.name)["id"])
    assert view["state"] == "SUCCEEDED", view["reason"]
    totals = {row["payer"]: row for row in grid.results(view, tmp_path / "out")["totals"]}
    assert set(totals) == set(facts.payers)
    for payer, truth in facts.payers.items():
        assert totals[payer]["claims"] == truth.claims
        assert totals[payer]["charge_cents"] == truth.charge_cents


def test_claims_on_the_real_files(grid: LocalGrid, tmp_path: Path, shared_data: Path) -> None:
    job = copy("claims", tmp_path)
    x12 = shared_data / "claims" / "x12"
    for file in [*x12.glob("*.837"), x12 / "x12_many_claims.txt"]:
        shutil.copy(file, job / "data" / file.with_suffix(".837").name)
    independent = sum(
        Decimal(segment.split("*")[2])
        for file in (job / "data").iterdir()
        for segment in file.read_text().replace("\n", "").split("~")
        if segment.startswith("CLM*")
    )
    view = grid.wait(grid.submit(job / "job.yaml", token=tmp_path.name)["id"])
    assert view["state"] == "SUCCEEDED", view["reason"]
    totals = grid.results(view, tmp_path / "out")["totals"]
    assert sum(row["charge_cents"] for row in totals) == independent * 100


def test_transform_keeps_every_ride(grid: LocalGrid, tmp_path: Path, shared_data: Path) -> None:
    job = copy("transform", tmp_path)
    csv = shared_data / "transform" / "taxis.csv"
    shutil.copy(csv, job / "data")
    view = grid.wait(grid.submit(job / "job.yaml", token=tmp_path.name)["id"])
    assert view["state"] == "SUCCEEDED", view["reason"]
    grid.results(view, tmp_path / "out")
    with duckdb.connect() as db:
        written = str(tmp_path / "out" / "files" / "**" / "*.parquet")
        got = db.execute(f"select count(*), count(payment) from read_parquet('{written}')").fetchone()
        want = db.execute(f"select count(*), count(payment) from read_csv('{csv}')").fetchone()
    assert got == want
    assert got is not None
    assert got[0] == 6_433
    assert got[0] - got[1] == 44


@pytest.mark.usefixtures("ffmpeg")
def test_media_keeps_every_frame(grid: LocalGrid, tmp_path: Path, shared_data: Path) -> None:
    job = copy("media", tmp_path)
    source = shared_data / "media" / "bigbuckbunny.mp4"
    shutil.copy(source, job / "data")
    view = grid.wait(grid.submit(job / "job.yaml", token=tmp_path.name)["id"])
    assert view["state"] == "SUCCEEDED", view["reason"]
    grid.results(view, tmp_path / "out")
    (joined,) = (tmp_path / "out" / "files" / "join").rglob("*.mp4")
    assert frames(joined) == frames(source)


def frames(video: Path) -> int:
    answer = subprocess.run(
        [
            "ffprobe",
            "-v",
            "error",
            "-select_streams",
            "v:0",
            "-count_frames",
            "-show_entries",
            "stream=nb_read_frames",
            "-of",
            "json",
            str(video),
        ],
        capture_output=True,
        check=True,
    )
    return int(json.loads(answer.stdout)["streams"][0]["nb_read_frames"])


@pytest.fixture
def sort_bytes() -> int:
    """Return the size of the file to sort, which is larger than a worker's memory."""
    return 100 * 1024 * 1024


def test_sort_of_one_large_file(grid: LocalGrid, tmp_path: Path, sort_bytes: int) -> None:
    job = copy("sort", tmp_path)
    write_records(job / "data", seed=3, size_bytes=sort_bytes)
    (source,) = (job / "data").iterdir()
    view = grid.wait(grid.submit(job / "job.yaml", token=tmp_path.name)["id"], within_s=180)
    assert view["state"] == "SUCCEEDED", view["reason"]
    grid.results(view, tmp_path / "out")
    (merged,) = [p for p in (tmp_path / "out" / "files" / "merge").rglob("*") if p.is_file()]
    expected = tmp_path / "expected"
    subprocess.run(["sort", "-o", expected, source], env={"LC_ALL": "C"}, check=True)
    assert subprocess.run(["cmp", merged, expected], check=False).returncode == 0
