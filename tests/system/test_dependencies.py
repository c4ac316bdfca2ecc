"""A job that waits for another job, whose manager is killed in the meantime, on `local` and on `ministack`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.core.errors import Refused
from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.model import JobId, Pool
from tests.support.aws.emulators import ministack_python
from tests.support.grid.fixtures import Bring

TWO = (Pool("default", 0, 2, 1),)

WORK = """\
import os, time

def first(item):
    while not os.path.exists({go!r}):
        time.sleep(0.05)
    if open({go!r}).read():
        raise ValueError("it fails")
    return item

def later(item):
    assert os.path.exists({go!r})
    return item
"""

JOB = """\
name: NAME
input: {files: items.jsonl, split: items}
stages: [{name: NAME, python: "work:NAME", retry: {attempts: 1}}]
"""


def _job(folder: Path, name: str) -> Path:
    home = folder / name
    home.mkdir()
    (home / "work.py").write_text(WORK.format(go=str(folder / "go")))
    (home / "items.jsonl").write_text("1\n2\n")
    (home / "job.yaml").write_text(JOB.replace("NAME", name))
    return home / "job.yaml"


@pytest.mark.parametrize("backend", ["local", "ministack"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_killed_manager_forgets_no_dependency(bring_up: Bring, tmp_path: Path, backend: str, fails: bool) -> None:
    if backend == "ministack":
        ministack_python()
    grid = bring_up(TWO, backend=backend)
    first = grid.submit(_job(tmp_path, "first"), "first")["id"]
    job = grid.prepared(_job(tmp_path, "later"))
    waiting = grid.client.submit(replace(job, after=(Dependency(JobId(first)),)))["id"]
    ended = Dependency(JobId(first), Condition.ENDED)
    anyway = grid.client.submit(replace(grid.prepared(tmp_path / "later/job.yaml", "u"), after=(ended,)))["id"]
    grid.wait(waiting, until=lambda view: view["state"] == "PENDING")
    grid.wait(first, until=lambda view: view["stages"][0]["running"] > 0)
    grid.kill_manager()
    grid.wait(waiting, until=lambda view: f"waits for job {first}" in grid.client.why(waiting))
    assert grid.client.job(waiting)["started_s"] is None
    (tmp_path / "go").write_text("fail" if fails else "")
    grid.kill_manager()
    views = [grid.wait(job) for job in (first, waiting, anyway)]
    states = [view["state"] for view in views]
    assert states == (["FAILED", "FAILED", "SUCCEEDED"] if fails else ["SUCCEEDED"] * 3)
    begun = [view["started_s"] for view in views[1:] if view["started_s"]]
    assert len(begun) == (1 if fails else 2)
    assert min(begun) >= max(stage["last_end_s"] or 0.0 for stage in views[0]["stages"])
    if fails:
        assert f"job {first} is a dependency that must succeed, and ended FAILED" in views[1]["reason"]


def test_the_python_api_submits_a_job_after_another(tmp_path: Path) -> None:
    (tmp_path / "go").write_text("")
    paths = [_job(tmp_path, name) for name in ("first", "later")]
    with Grid("local", home=tmp_path / "home", workers=2) as grid:
        first = grid.submit(paths[0])
        later = grid.submit(paths[1], after=[first])
        assert grid.wait(later).state == "SUCCEEDED"
        assert grid.wait(first).state == "SUCCEEDED"
        assert grid.client.job(later)["after"] == [{"job": first, "condition": "succeeded"}]
        with pytest.raises(Refused, match="nobody is a dependency and does not exist"):
            grid.submit(paths[1], after="nobody:ended")
