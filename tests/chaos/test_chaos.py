"""A job in containers, while its instances, queue, storage, database, and manager are taken away.

The faults are seeded. BATCHLAB_CHAOS_SEED selects the targets and their order, and BATCHLAB_CHAOS_TASKS the number of
tasks. The long form has 3,000 tasks.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from batchlab.core.api_types import JobView
from batchlab.core.model import Pool
from tests.support.docker.chaos import Containers, Sizes, Teller, docker, wait_for, write_job
from tests.support.docker.grid import need_containers
from tests.support.grid.local_grid import LocalGrid, outcomes

SEED = int(os.environ.get("BATCHLAB_CHAOS_SEED", "1"))
TASKS = int(os.environ.get("BATCHLAB_CHAOS_TASKS", "300"))
TASK_S = max(0.2, 420 / TASKS)
"""With this task time, six instances are busy until all faults are injected."""
MOST = 6
ZOMBIE_S = 12.0
"""The pause is longer than the visibility timeout, so another worker has the bundle when the paused worker
continues."""
NOTICE_S = 20.0
REST_S = 30.0
"""Length of a measurement of requests, in seconds."""
MEASUREMENTS = 5
"""Number of measurements in which a grid that comes to rest must become quiet."""
STORAGE_AWAY_S = float(os.environ.get("BATCHLAB_CHAOS_AWAY_S", "15"))
POOLS = (Pool("default", 0, MOST, 1, instance_type="t3.small"),)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    folder = tmp_path_factory.mktemp("chaos")
    need_containers(folder)
    grid = LocalGrid(folder / "home", POOLS, backend="localstack")
    try:
        found = Containers(grid)
        spot(found)
        yield found
    finally:
        grid.stop()


@pytest.fixture
def teller(containers: Containers) -> Iterator[Teller]:
    with Teller(containers.host) as told:
        yield told


def test_no_task_is_lost_under_any_kill(
    containers: Containers, teller: Teller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_job(tmp_path / "job", teller, TASKS, seconds=TASK_S)
    script, rng = acts(containers), random.Random(SEED)
    rng.shuffle(script)
    with Sizes(containers) as sizes:
        job = containers.grid.submit(path, token="chaos")["id"]
        for number, (name, act) in enumerate(script, 1):
            wait_for(partial(reached, teller, number * TASKS // (len(script) + 1)))
            act(rng)
            containers.done[name] += 1
        containers.undo()
        view = containers.grid.wait(job, within_s=300)
        again = check(containers, job, view, tmp_path / "out", Counter(teller.starts))
        comes_to_rest(containers)
    with capsys.disabled():
        print(f"\n{dict(containers.done)}, {again} of {TASKS} tasks ran in vain", flush=True)
    assert set(containers.done) == {name for name, _ in script}
    assert max(sizes.seen) <= MOST
    assert all(containers.is_gone(starved) for starved in containers.starved)


def test_spot_notice_hands_the_task_to_another_worker_in_time(
    containers: Containers, teller: Teller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time is measured from the notice to the start of the unfinished task on another instance (I6)."""
    grid = containers.grid
    grid.client.scale("default", min=3, desired=3)
    try:
        wait_for(lambda: in_service(grid) == 3, within_s=90)
        path = write_job(tmp_path / "job", teller, 1, seconds=NOTICE_S + 15)
        job = grid.submit(path, token="notice")["id"]
        wait_for(partial(reached, teller, 1), within_s=60)
        wait_for(lambda: bool(busy(grid)), within_s=30)
        begun_s = time.monotonic()
        containers.interrupt(busy(grid)[0], notice_s=NOTICE_S)
        wait_for(lambda: teller.starts[0] == 2, within_s=NOTICE_S + 5)
        took_s = teller.at_s[0][1] - begun_s
        with capsys.disabled():
            print(f"\na task began elsewhere {took_s:.1f} s after a notice of {NOTICE_S:g} s")
        assert took_s < NOTICE_S
        assert grid.wait(job, within_s=120)["state"] == "SUCCEEDED"
    finally:
        grid.client.scale("default", min=0, auto=True)


def test_canceled_job_starts_no_task(containers: Containers, teller: Teller, tmp_path: Path) -> None:
    """The tasks themselves report their starts (I4)."""
    grid = containers.grid
    path = write_job(tmp_path / "job", teller, 300, seconds=0.2)
    job = grid.submit(path, token="cancel")["id"]
    wait_for(partial(reached, teller, 20), within_s=90)
    grid.client.cancel(job)
    view = grid.wait(job, within_s=60)
    begun = teller.starts.total()
    time.sleep(3)
    assert view["state"] == "CANCELLED"
    assert teller.starts.total() == begun < 300


def test_killed_storage_loses_nothing(
    containers: Containers, teller: Teller, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LocalStack is killed twice while tasks run. Docker starts LocalStack again, and the job succeeds (I1, I2)."""
    grid, tasks = containers.grid, 120
    path = write_job(tmp_path / "job", teller, tasks, seconds=1.0)
    job = grid.submit(path, token="killed")["id"]
    for begun in (20, 60):
        wait_for(partial(reached, teller, begun))
        containers.kill(containers.service("localstack"))
    view = grid.wait(job, within_s=300)
    again = check(containers, job, view, tmp_path / "out", Counter(teller.starts), tasks=tasks)
    with capsys.disabled():
        print(f"\n{again} of {tasks} tasks ran again after two kills of LocalStack")


def test_grid_at_rest_sends_few_requests(containers: Containers) -> None:
    """The count includes the requests of the manager."""
    grid, workers = containers.grid, 2
    grid.client.scale("default", min=workers, desired=workers)
    try:
        wait_for(lambda: in_service(grid) == workers, within_s=90)
        measured = []
        for _ in range(MEASUREMENTS):
            begun = docker("exec", containers.service("localstack"), "date", "+%s").strip()
            time.sleep(REST_S)
            log = docker("logs", "--since", begun, containers.service("localstack"), stderr=True)
            requests = Counter(re.findall(r" AWS (\w+\.\w+)", log))
            measured.append(requests)
            if 0 < requests.total() * 60 / REST_S / workers < 10:
                return
        pytest.fail(f"the grid did not come to rest: {measured}")
    finally:
        grid.client.scale("default", min=0, auto=True)


def acts(containers: Containers) -> list[tuple[str, Callable[[random.Random], None]]]:
    """Return the faults to inject. The two kinds of crash occur twice, and every other fault once."""

    def one(rng: random.Random) -> str:
        """Return the container of a random instance."""
        deadline_s = time.monotonic() + 60
        while not (found := containers.instances()):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        return rng.choice(sorted(found.values()))

    def zombie(rng: random.Random) -> None:
        container = one(rng)
        containers.pause(container)
        containers.later(ZOMBIE_S, partial(containers.unpause, container))

    def cut_off(rng: random.Random) -> None:
        container = one(rng)
        containers.cut_off(container)
        containers.later(ZOMBIE_S, partial(containers.reconnect, container))

    def notice(rng: random.Random) -> None:
        one(rng)
        instance = rng.choice(sorted(containers.instances()))
        containers.interrupt(instance, notice_s=15)

    def storage(_: random.Random) -> None:
        container = containers.service("localstack")
        containers.pause(container)
        containers.later(STORAGE_AWAY_S, partial(containers.unpause, container))

    return [
        ("instance killed", lambda rng: containers.kill(one(rng))),
        ("instance killed", lambda rng: containers.kill(one(rng))),
        ("instance frozen", zombie),
        ("instance cut off", cut_off),
        ("instance starved of memory", lambda rng: containers.starve(one(rng))),
        ("Spot notice", notice),
        ("queue purged", lambda _: containers.grid.purge()),
        ("LocalStack frozen", storage),
        ("LocalStack killed", lambda _: containers.kill(containers.service("localstack"))),
        ("PostgreSQL restarted", lambda _: containers.restart("postgres")),
        ("manager killed", lambda _: containers.kill(containers.service("manager"))),
        ("Auto Scaling killed", lambda _: containers.kill(containers.service("asg"))),
    ]


def check(containers: Containers, job: str, view: JobView, out: Path, told: Counter[int], *, tasks: int = TASKS) -> int:
    """Check invariants I1, I2, I3, and I7, and return the number of discarded runs."""
    grid = containers.grid
    assert view["state"] == "SUCCEEDED", (view, containers.done)
    results = grid.results(view, out)
    assert results["total"] == [3 * sum(range(tasks))]
    committed: Counter[int] = Counter()
    for outcome in outcomes(grid, job):
        if outcome["bundle"]["s"] == "triple":
            committed.update(t for start, stop in outcome["succeeded"] for t in range(start, stop))
    assert committed == Counter(dict.fromkeys(range(tasks), 1))
    before = counts(grid, job)
    assert before["triple"] == (tasks, tasks, 0, 0)
    grid.client.rebuild()
    assert counts(grid, job) == before
    return told.total() - len(told)


def counts(grid: LocalGrid, job: str) -> dict[str, tuple[int, ...]]:
    return {
        stage["name"]: (stage["planned"] or 0, stage["succeeded"], stage["failed"], stage["cancelled"])
        for stage in grid.client.job(job)["stages"]
    }


def comes_to_rest(containers: Containers) -> None:
    """Check invariant I5: after the work, the group returns to its minimum, and no container remains."""
    wait_for(lambda: not containers.instances(), within_s=90)


def spot(containers: Containers) -> None:
    """Make the instances Spot instances, which can be interrupted."""
    path = containers.grid.home.backend_folder("localstack") / "templates.toml"
    path.write_text(path.read_text().replace("slots =", 'market = "spot"\nslots ='))


def in_service(grid: LocalGrid) -> int:
    pools = grid.client.grid()["pools"]
    return sum(one["state"] == "InService" for pool in pools for one in pool["instances"])


def busy(grid: LocalGrid) -> list[str]:
    """Return the instances that run a bundle."""
    pools = grid.client.grid()["pools"]
    return [one["id"] for pool in pools for one in pool["instances"] if one["busy"]]


def reached(teller: Teller, tasks: int) -> bool:
    return len(teller.starts) >= tasks
