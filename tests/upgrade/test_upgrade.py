"""The data of an earlier batchlab, which this version reads, reports, and continues.

tests/upgrade contains a grid's folder of each earlier version, which tests/upgrade/make.py has written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.upgrade.make import HOME, TASKS, TOLD, TOTAL

KEPT = sorted(Path(__file__).resolve().parent.glob("*.tar.xz"))
SAME = ("id", "name", "reason", "round", "priority", "tags", "submitted_s", "started_s", "ended_s")


@dataclass(frozen=True)
class Kept:
    """The folder of a grid from that version, and the version's output about its jobs."""

    home: Path
    told: dict[str, Any]

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the jobs by name."""
        return {one["name"]: one for one in self.told["jobs"]}


@pytest.fixture(params=KEPT, ids=lambda path: path.name.partition(".")[0])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return Kept(tmp_path / HOME, json.loads((tmp_path / TOLD).read_text()))


def test_stored_data_of_earlier_releases_exists() -> None:
    assert len(KEPT) >= 2
    assert all(path.stat().st_size < 100_000 for path in KEPT)


def test_work_of_an_earlier_release_continues(kept: Kept, bring_up: Bring, tmp_path: Path) -> None:
    grid = bring_up(folder=kept.home)
    now = {job["name"]: job for job in grid.client.jobs()}
    assert set(now) == {"ended", "paused", "working"}
    for name, told in kept.jobs.items():
        assert now[name]["id"] == told["id"]
    same(kept.jobs["ended"], now["ended"])
    assert now["paused"]["state"] == "PAUSED"

    results = grid.results(now["ended"], tmp_path / "ended")
    (line,) = kept.told["total"].splitlines()
    assert results["total"] == [json.loads(line)["value"]] == [TOTAL]
    (failure,) = grid.client.failures(now["ended"]["id"])
    assert failure["task"] == 7
    assert "seven" in failure["reason"]

    # A running job continues by itself, and a paused job continues after a resume.
    grid.client.resume(now["paused"]["id"])
    for name in ("working", "paused"):
        view = grid.wait(now[name]["id"])
        assert view["state"] == "SUCCEEDED", view
        assert view["stages"][0]["succeeded"] == TASKS - 1
        assert grid.results(view, tmp_path / name)["total"] == [TOTAL]

    before = sorted(grid.client.jobs(), key=lambda one: one["id"])
    assert grid.client.rebuild() == 3
    for one, again in zip(before, sorted(grid.client.jobs(), key=lambda one: one["id"]), strict=True):
        same(one, again)
    if kept.told["schedules"]:
        (schedule,) = grid.client.schedules()["schedules"]
        assert schedule["cron"] == "0 2 1 1 *"
    reported(grid, kept, tmp_path)


def same(before: Any, now: Any) -> None:
    """Check that the output about a job is unchanged."""
    assert {name: now[name] for name in SAME} == {name: before[name] for name in SAME}
    assert now["state"] == before["state"]
    counts = ("name", "pool", "planned", "succeeded", "failed", "cancelled")
    told = [[{name: stage[name] for name in counts} for stage in one["stages"]] for one in (before, now)]
    assert told[0] == told[1]


def reported(grid: LocalGrid, kept: Kept, tmp_path: Path) -> None:
    """Check the existing report of the ended job, or write one now."""
    page, job = tmp_path / "run.html", kept.jobs["ended"]["id"]
    tables = grid.home.objects / "reports" / job
    assert bool(list(tables.rglob("*.parquet"))) is kept.told["reports"]
    done = subprocess.run(
        [sys.executable, "-m", "batchlab", "report", "html", job, "--out", str(page),
         "--home", str(kept.home)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert job in page.read_text()
    assert list(tables.rglob("*.parquet"))
