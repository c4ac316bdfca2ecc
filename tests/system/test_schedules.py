"""A schedule on a real grid whose manager is killed at the due time."""

from __future__ import annotations

import time
from pathlib import Path

from batchlab.core.api_types import JobView
from batchlab.core.model import Pool
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import ENDED, LocalGrid
from tests.support.waiting import until

SOON_S = 5.0

WORK = """\
def note(item):
    with open({starts!r}, "a") as file:
        file.write("one\\n")
    return item
"""
JOB = """\
name: noted
input: {files: items.jsonl, split: items}
stages:
  - {name: note, python: work:note}
"""


def test_a_manager_killed_at_a_due_time_leaves_one_run_of_it(bring_up: Bring, tmp_path: Path) -> None:
    grid = bring_up((Pool("default", 1, 1, 1),))
    starts = tmp_path / "starts"
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "work.py").write_text(WORK.format(starts=str(starts)))
    (folder / "items.jsonl").write_text("1\n")
    (folder / "job.yaml").write_text(JOB)
    template = grid.prepared(folder / "job.yaml", token="template")
    at_s = time.time() + SOON_S
    grid.client.add_schedule({"name": "noted", "at_s": at_s}, template)
    time.sleep(max(0.0, at_s - time.time()))
    grid.kill_manager()
    until(lambda: _result(grid) == "SUCCEEDED", within_s=60)
    (run,) = grid.client.schedule("noted")["runs"]
    (job,) = grid.client.jobs()
    assert run["job"] == job["id"]
    assert run["due_s"] == at_s
    assert starts.read_text() == "one\n"
    assert _is_of_schedule(job)


def _result(grid: LocalGrid) -> str:
    runs = grid.client.schedule("noted")["runs"]
    return runs[0]["result"] if runs else ""


def _is_of_schedule(job: JobView) -> bool:
    return job["state"] in ENDED and job["tags"]["schedule"] == "noted"
