"""Stragglers on a grid of real processes: a task that hangs, and a worker that is frozen.

Each task writes a line to a file outside of the grid when it starts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import family
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.support.processes import is_running
from tests.support.waiting import until

TASKS, LAST = 20, 19
WITHIN_S = 90.0

WORK = """\
import os, time
from pathlib import Path

HERE = Path({here!r})

def triple(item):
    with (HERE / "starts").open("a") as file:
        file.write(f"{{item}} {{os.getpid()}}\\n")
    if item == 19:
        try:
            (HERE / "first").touch(exist_ok=False)
            time.sleep(3600)
        except FileExistsError:
            pass
    time.sleep(0.1)
    return item * 3
"""

JOB = """\
name: stragglers
input: {{files: items.jsonl, split: items}}
stages:
  - {{name: triple, python: work:triple, bundle: 1, speculative_copies: {copies}}}
"""


def prepared(folder: Path, *, copies: bool = True) -> Path:
    """Write a job whose last task hangs in its first run, and return the path of the job file."""
    folder.mkdir()
    (folder / "work.py").write_text(WORK.format(here=str(folder)))
    (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(TASKS)))
    (folder / "job.yaml").write_text(JOB.format(copies=str(copies).lower()))
    return folder / "job.yaml"


def runs(folder: Path) -> list[int]:
    """Return the process of each start of the last task."""
    lines = (folder / "starts").read_text().splitlines() if (folder / "starts").exists() else []
    return [int(pid) for item, pid in map(str.split, lines) if int(item) == LAST]


def worker_of(grid: LocalGrid, pid: int) -> int:
    (worker,) = [worker for worker in grid.workers().values() if pid in family(worker)]
    return worker


def brought_up(bring_up: Bring, home: Path) -> LocalGrid:
    home.mkdir()
    (home / "settings.toml").write_text("[manager]\ncopy_after_s = 1.0\n")
    return bring_up((Pool("default", 3, 3, 1),), home)


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_task_that_hangs_ends_with_its_copy(bring_up: Bring, tmp_path: Path) -> None:
    """The worker of the hanging task is well, so only a copy can end the job. The worker kills the hanging process."""
    grid, folder = brought_up(bring_up, tmp_path / "home"), tmp_path / "job"
    view = grid.submit(prepared(folder))
    until(lambda: len(runs(folder)) == 1, WITHIN_S)
    (hanging,) = runs(folder)
    os.kill(hanging, signal.SIGSTOP)
    ended = grid.wait(view["id"], within_s=WITHIN_S)
    assert ended["state"] == "SUCCEEDED"
    assert grid.results(ended, tmp_path / "out") == {"triple": [3 * item for item in range(TASKS)]}
    assert len(runs(folder)) == 2
    until(lambda: not is_running(hanging), WITHIN_S)


def test_a_frozen_worker_does_no_harm_after_it_continues(bring_up: Bring, tmp_path: Path) -> None:
    grid, folder = brought_up(bring_up, tmp_path / "home"), tmp_path / "job"
    view = grid.submit(prepared(folder))
    until(lambda: len(runs(folder)) == 1, WITHIN_S)
    (task,) = runs(folder)
    worker = worker_of(grid, task)
    with frozen([worker, task]):
        ended = grid.wait(view["id"], within_s=WITHIN_S)
    assert ended["state"] == "SUCCEEDED"
    until(lambda: not is_running(task), WITHIN_S)
    assert worker in grid.workers().values()
    assert grid.results(ended, tmp_path / "out") == {"triple": [3 * item for item in range(TASKS)]}
    assert grid.client.job(view["id"])["stages"][0]["succeeded"] == TASKS
