"""Two thousand tasks on a grid, during which workers, the manager, the queue, and the disk are taken away.

Every task writes a line to a file outside of the grid when it starts, so repeated runs are counted independently of the
tested grid.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from batchlab.core.api_types import JobView
from batchlab.core.errors import BackendError
from batchlab.core.model import BundleId, JobId, Pool, StageName
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.settlement import LOSS_LIMIT
from tests.support import mounts
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid, outcomes
from tests.support.waiting import until

FOUR = (Pool("default", 0, 4, 2),)
TASKS = 2000
DISK_BYTES = 96 * 1024 * 1024
FULL_S = 4.0
WAIT_S = 240.0

WORK = """\
import os, time

def triple(item):
    with open({starts!r}, "a") as file:
        file.write(f"{{item}}\\n")
    time.sleep({seconds})
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
    """A job on a grid, and the faults that were injected into it."""

    grid: LocalGrid
    starts: Path
    job: str = ""
    done: Counter[str] = field(default_factory=Counter)

    def submit(self, folder: Path, tasks: int, *, seconds: float) -> None:
        """Submit `tasks` tasks of `seconds` each, and their sum."""
        folder.mkdir()
        work = WORK.format(starts=str(self.starts), seconds=seconds)
        (folder / "work.py").write_text(work)
        (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(tasks)))
        (folder / "job.yaml").write_text(JOB)
        self.starts.touch()
        self.job = self.grid.submit(folder / "job.yaml")["id"]

    def begun(self) -> int:
        """Return the number of tasks that have begun at least once."""
        return len(set(self.starts.read_text().split()))

    def may_lose_a_worker(self) -> bool:
        """Return whether every unfinished task may lose another worker without being marked as poison. The grid marks a
        task as poison by the number of its starts."""
        return asyncio.run(self._all_innocent())

    async def _all_innocent(self) -> bool:
        objects, stage = self.grid.objects, f"jobs/{self.job}/triple"
        try:
            pages = objects.list(f"{stage}/starts/")
            begun = Counter([one.key.split("/")[4] async for page in pages for one in page])
            job, key = JobId(self.job), await CommitKeys(objects).stored(JobId(self.job))
            for bundle, times in begun.items():
                name = object_keys.outcome_of(job, StageName("triple"), BundleId(bundle), key)
                if times >= LOSS_LIMIT - 1 and await objects.head(name) is None:
                    return False
        except BackendError:
            return False  # the bucket is not available, so the answer is unknown
        return True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a separate file system that can be filled. The mount needs root."""
    with mounts.small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


def kill_each_second(trial: Trial, stop: threading.Event) -> None:
    """Kill one worker with SIGKILL in every second in which a new task has begun, until `stop` is set.

    On a very busy machine, workers do not start within seconds, and a fixed rate of kills would prevent all progress.
    """
    before = 0
    while not stop.wait(1.0):
        begun = trial.begun()
        # The oldest worker is killed, because the kill of a starting worker would only slow the test down.
        for pid in sorted(trial.grid.workers().values())[:1]:
            if begun > before and trial.may_lose_a_worker():
                with suppress(ProcessLookupError):  # the worker has just ended by itself
                    os.kill(pid, signal.SIGKILL)
                    trial.done["workers killed"] += 1
                    before = begun


def fill(disk: Path) -> None:
    """Fill the disk completely for a while."""
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
    """Check that every result exists once and was committed once, and return the number of discarded runs."""
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


def do_harm(trial: Trial, harm: Sequence[tuple[str, Callable[[], object]]], tasks: int) -> None:
    """Kill workers while the tasks run, inject the other faults one by one, and return once every task has begun."""
    stop = threading.Event()
    killer = threading.Thread(target=kill_each_second, args=(trial, stop))
    killer.start()
    try:
        for number, (name, act) in enumerate(harm, 1):
            until(partial(has_begun, trial, number * tasks // (len(harm) + 1)), WAIT_S)
            act()
            trial.done[name] += 1
        until(partial(has_begun, trial, tasks), WAIT_S)
    finally:
        stop.set()
        killer.join()


def report(trial: Trial, again: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{dict(trial.done)}, {again} runs thrown away", flush=True)


def test_two_thousand_tasks_survive_kills_a_purge_and_a_full_disk(
    small_disk: Path, bring_up: Bring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No task is lost or committed twice, whatever is killed."""
    grid = bring_up(FOUR, folder=small_disk / "home")
    trial = Trial(grid, tmp_path / "starts")
    trial.submit(tmp_path / "job", TASKS, seconds=0.05)
    harm: list[tuple[str, Callable[[], object]]] = [
        ("managers killed", grid.kill_manager),
        ("queues purged", grid.purge),
        ("managers killed", grid.kill_manager),
        ("disks filled", lambda: fill(small_disk)),
        ("managers killed", grid.kill_manager),
    ]
    do_harm(trial, harm, TASKS)
    view = grid.wait(trial.job, within_s=120)
    again = check(trial, view, tmp_path / "out", TASKS)
    report(trial, again, capsys)
    assert trial.done["managers killed"] == 3
    assert trial.done["workers killed"] >= 5
    assert again > 0, "kills in the middle of bundles must have cost some runs"


def has_begun(trial: Trial, tasks: int) -> bool:
    return trial.begun() >= tasks
