"""Two thousand tasks on a grid whose workers, manager, queue and disk are taken away under it.

Every task writes a line to a file of its own world when it starts, so that what ran twice is
counted by somebody else than the grid that is on trial.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.adapters.sqlite_queue import SqliteQueue
from batchlab.model import Pool
from batchlab.protocol import naming
from batchlab.views import JobView
from tests.integration.conftest import Bring
from tests.integration.local_grid import LocalGrid, outcomes

FOUR = (Pool("default", 0, 4, 2),)
TASKS = 2000
DISK_BYTES = 96 * 1024 * 1024
FULL_S = 4.0

WORK = """\
import os, time

def triple(item):
    with open({starts!r}, "a") as file:
        file.write(f"{{item}}\\n")
    time.sleep(0.05)
    return item * 3

def total(values):
    return sum(values)
"""

JOB = """\
name: kills
input: {files: items.jsonl, split: items}
stages:
  - {name: triple, python: work:triple}
  - {name: total, python: work:total, gather: all}
"""


@dataclass
class Trial:
    """A job on a grid, and what has been done to it."""

    grid: LocalGrid
    starts: Path
    job: str = ""
    done: Counter[str] = field(default_factory=Counter)

    def submit(self, folder: Path, tasks: int) -> None:
        folder.mkdir()
        (folder / "work.py").write_text(WORK.format(starts=str(self.starts)))
        (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(tasks)))
        (folder / "job.yaml").write_text(JOB)
        self.starts.touch()
        self.job = self.grid.submit(folder / "job.yaml")["id"]

    def has_begun(self, tasks: int) -> bool:
        """Whether so many tasks have begun at least once."""
        return len(set(self.starts.read_text().split())) >= tasks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be filled; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        if os.environ.get("CI"):
            pytest.fail("CI promises root, but no file system can be mounted")
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def kill_each_second(trial: Trial, stop: threading.Event) -> None:
    """SIGKILL one worker every second, until told to stop."""
    while not stop.wait(1.0):
        # The oldest: a new one that dies before it is up would only slow the test down.
        for pid in sorted(trial.grid.workers().values())[:1]:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
                trial.done["workers killed"] += 1


def fill(disk: Path) -> None:
    """Leave no byte free for a while."""
    full = disk / "full"
    try:
        with full.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
    except OSError:
        deadline_s = time.monotonic() + FULL_S
        while time.monotonic() < deadline_s:
            time.sleep(0.1)
    finally:
        full.unlink()


def check(trial: Trial, view: JobView, out: Path, tasks: int) -> int:
    """Every result there once, none lost, none committed twice; how many runs were thrown away."""
    grid = trial.grid
    assert view["state"] == "SUCCEEDED", (view["reason"], trial.done)
    results = grid.results(view, out)
    assert results["total"] == [3 * sum(range(tasks))]
    committed: Counter[int] = Counter()
    found: dict[int, int] = {}
    for outcome in outcomes(grid, trial.job):
        if outcome["bundle"]["s"] == "triple":
            ids = [t for start, stop in outcome["succeeded"] for t in range(start, stop)]
            committed.update(ids)
            found |= dict(zip(ids, outcome["values"], strict=True))
    assert committed == Counter(dict.fromkeys(range(tasks), 1))
    assert found == {task: task * 3 for task in range(tasks)}
    ran = Counter(int(line) for line in trial.starts.read_text().split())
    assert set(ran) == set(range(tasks))
    return ran.total() - tasks


def report(trial: Trial, again: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{dict(trial.done)}, {again} runs thrown away", flush=True)


def test_two_thousand_tasks_survive_kills_a_purge_and_a_full_disk(
    small_disk: Path, bring_up: Bring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers pains 2, 4 and 6: nothing lost, nothing committed twice, whatever is killed."""
    grid = bring_up(FOUR, folder=small_disk / "home")
    trial = Trial(grid, tmp_path / "starts")
    trial.submit(tmp_path / "job", TASKS)
    harm: list[tuple[str, Callable[[], object]]] = [
        ("managers killed", grid.kill_manager),
        ("queues purged", lambda: purge(grid)),
        ("managers killed", grid.kill_manager),
        ("disks filled", lambda: fill(small_disk)),
        ("managers killed", grid.kill_manager),
    ]
    stop = threading.Event()
    killer = threading.Thread(target=kill_each_second, args=(trial, stop))
    killer.start()
    try:
        for number, (name, act) in enumerate(harm, 1):
            wait_for(partial(trial.has_begun, number * TASKS // (len(harm) + 1)))
            act()
            trial.done[name] += 1
        wait_for(partial(trial.has_begun, TASKS))
    finally:
        stop.set()
        killer.join()
    view = grid.wait(trial.job, within_s=120)
    again = check(trial, view, tmp_path / "out", TASKS)
    report(trial, again, capsys)
    assert trial.done["managers killed"] == 3
    assert trial.done["workers killed"] >= 5
    assert again > 0, "kills in the middle of bundles must have cost some runs"


def purge(grid: LocalGrid) -> None:
    async def drop() -> None:
        queue = SqliteQueue(grid.home.queue_file, WallClock())
        try:
            await queue.purge(naming.tasks_queue("default"))
        finally:
            await queue.close()

    asyncio.run(drop())


def wait_for(condition: Callable[[], bool], within_s: float = 240.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
