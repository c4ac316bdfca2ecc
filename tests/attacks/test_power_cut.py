"""Power cuts on `local`, after which a grid still has everything that it has acknowledged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local import objects as local_files
from batchlab.adapters.local.objects import LocalObjects
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.adapters.local.state_files import StateFile
from batchlab.adapters.memory.launcher import SimLauncher
from batchlab.adapters.sql import open_sqlite
from batchlab.core.atomic_write import Sync
from batchlab.core.errors import Refused
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, JobState, Json, Pool, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Ledger
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.schedules import Definition, When
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.manager.manager import LEASE, Manager
from batchlab.manager.state import Ports
from batchlab.runtime.home import Home
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, ScriptedRunner
from batchlab.worker.inflight_message import Identity
from batchlab.worker.loop import Worker
from tests.support.attacks.disk_image import Gate, cut, mounted, needs_loop
from tests.support.server.api import Machine

pytestmark = pytest.mark.slow

SQUARE, TOTAL = StageName("square"), StageName("total")
ITEMS: list[Json] = [*range(8)]
STAGES = (
    StageDef(SQUARE, handler="m:square", bundle=2),
    StageDef(TOTAL, after=(SQUARE,), gather="*", handler="m:total"),
)
POOL, SPARE = Pool("default", 0, 2, 2), Pool("spare", 0, 1000, 1)
MANAGER = ManagerSettings(
    control_lease_s=0.05, tick_s=0.1, silence_s=1.5, visibility_s=1.0, wait_s=0.2, lease_ttl_s=5.0
)
WORKER = WorkerSettings(visibility_s=1.0, control_lease_s=0.05, wait_s=0.2, drain_s=1.0)
CUTS = 30
BACK_S = 60.0
"""The seconds that a restarted grid has to end its jobs on a busy machine."""


@dataclass
class Acknowledged:
    """The changes that the grid has acknowledged to its user or to a worker so far."""

    submitted: set[JobId] = field(default_factory=set)
    cancelled: set[JobId] = field(default_factory=set)
    ended: dict[JobId, JobState] = field(default_factory=dict)
    outcomes: dict[str, bytes] = field(default_factory=dict)
    schedules: set[str] = field(default_factory=set)
    desired: int = 0
    token: str = ""


class Recorded(LocalObjects):
    """A bucket that records the committed outcomes."""

    def __init__(self, root: Path, sync: Sync, told: Acknowledged) -> None:
        super().__init__(root, sync)
        self._told = told

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = await super().put(key, data, if_absent=if_absent, if_match=if_match)
        if object_keys.is_outcome(key):
            self._told.outcomes[key] = data
        return etag


@dataclass
class InProcess:
    """A grid of one process with the adapters of `local`."""

    home: Home
    ports: Ports
    ledger: Ledger
    manager: Manager


@asynccontextmanager
async def grid_in(folder: Path, sync: Sync, told: Acknowledged) -> AsyncIterator[InProcess]:
    """Start a leader and two workers."""
    home, clock, ids = Home(folder), WallClock(), RandomIds()
    home.make()
    told.token = home.token()
    objects = Recorded(home.objects, sync, told)
    queue = SqliteQueue(home.queue_file, clock)
    ledger = open_sqlite(home.ledger_file, sync)
    launcher = SimLauncher(lambda pool, instance: Machine(), random.Random(1))
    fleet = ManagedFleet(launcher, clock, ids, StateFile(home.fleet / "groups.json"))
    patience = Patience(random.Random(2))
    ports = Ports(objects, queue, fleet, ledger, clock, ids, patience)
    await ledger.release(LEASE, "manager")  # the next manager of a folder does the same
    manager = Manager(ports, MANAGER, [POOL], "manager", schedules=True)
    running = [asyncio.create_task(manager.run())]
    crew = []
    try:
        await manager.is_leader.wait()
        for n in range(2):
            runner = ScriptedRunner(_play, clock, lambda _: lambda: None, lambda: None)
            who = Identity(f"w-{n}", f"i-{n}", POOL.name, POOL.slots)
            crew.append(Worker(who, objects, queue, clock, runner, patience, WORKER))
            running.append(asyncio.create_task(crew[-1].run()))
        yield InProcess(home, ports, ledger, manager)
    finally:
        for worker in crew:
            worker.drain()
        await asyncio.gather(*running[1:])
        running[0].cancel()
        await asyncio.wait(running)
        await queue.close()
        await ledger.close()


def _play(scene: AttemptInput) -> ScriptedAttempt:
    value = sum(scene.item) if scene.stage.name == TOTAL else scene.item**2
    return ScriptedAttempt(0.01, value)


# --- The user ------------------------------------------------------------------------------------


async def use(grid: InProcess, told: Acknowledged) -> None:
    """Submit and cancel jobs, add schedules, and scale the fleet until the task is canceled."""
    await grid.ports.fleet.ensure(SPARE)
    async with asyncio.TaskGroup() as users:
        users.create_task(_submit(grid, told))
        users.create_task(_keep_schedules(grid, told))
        users.create_task(_scale(grid, told))


async def _submit(grid: InProcess, told: Acknowledged) -> None:
    number = 0
    async with asyncio.TaskGroup() as watching:
        while True:
            number += 1
            token = str(number)
            job = JobDef(
                object_keys.job_id("squares", token),
                name="squares",
                stages=STAGES,
                submitted_s=grid.ports.clock.now_s(),
                items=len(ITEMS),
                token=token,
            )
            await grid.manager.job_commands.submit(job, ITEMS)
            told.submitted.add(job.id)
            watching.create_task(_watch(grid, told, job.id))
            if number % 5 == 0:
                with suppress(Refused):  # the job has ended already
                    await grid.manager.job_commands.cancel(job.id)
                    told.cancelled.add(job.id)
            await asyncio.sleep(0.05)


async def _watch(grid: InProcess, told: Acknowledged, job: JobId) -> None:
    while not (state := (await grid.ledger.job(job)).state).ended:
        await asyncio.sleep(0.02)
    told.ended[job] = state


async def _keep_schedules(grid: InProcess, told: Acknowledged) -> None:
    assert grid.manager.scheduler
    number = 0
    while True:
        number += 1
        name = f"nightly-{number}"
        template = JobDef(JobId(f"{name}-template"), name, STAGES, 0.0, items=1, token="t")
        definition = Definition(name, name, When("0 2 1 1 *", "UTC"), "")
        await grid.manager.scheduler.add(definition, template, replacing=False)
        told.schedules.add(name)
        await asyncio.sleep(0.1)


async def _scale(grid: InProcess, told: Acknowledged) -> None:
    for desired in range(1, SPARE.max_size):
        await grid.ports.fleet.set_desired(SPARE.name, desired, cause="the user")
        told.desired = desired
        await asyncio.sleep(0.1)


# --- After the power cut -------------------------------------------------------------------------


async def check_comes_back(folder: Path, told: Acknowledged) -> None:
    """Check that all acknowledged changes exist, that a grid starts, and that each task has one result at the end."""
    home = Home(folder)
    torn = [info.key for info in local_files.walk(home.objects, "", "") if local_files.damage(home.objects, info.key)]
    assert torn == []
    _check_outcomes(home, told)
    async with grid_in(folder, Sync.JOBS, again := Acknowledged()) as grid:
        assert again.token == told.token
        groups = {group.pool.name: group for group in await grid.ports.fleet.describe()}
        if told.desired:
            # The change after the last acknowledged one may be written too.
            assert groups[SPARE.name].desired in (told.desired, told.desired + 1)
        assert grid.manager.scheduler
        kept = {one.name for one in await grid.manager.scheduler.all()}
        assert told.schedules <= kept
        async with asyncio.timeout(BACK_S):
            for job in sorted(told.submitted):
                await _watch(grid, again, job)
    _check_outcomes(home, told)
    for job in told.submitted:
        state = again.ended[job]
        assert state is told.ended.get(job, state)
        assert state in ((JobState.CANCELLED,) if job in told.cancelled else JobState)
        if state is JobState.SUCCEEDED:
            _check_results(home, job)


def _check_outcomes(home: Home, told: Acknowledged) -> None:
    for key, data in told.outcomes.items():
        assert (home.objects / key).read_bytes() == data


def _check_results(home: Home, job: JobId) -> None:
    """Check invariant I1: each task has one result."""
    found: dict[tuple[str, int], Json] = {}
    for path in sorted((home.objects / "jobs" / job).rglob("outcomes/*/*.json")):
        outcome = json_format.outcome_from_json(json_format.loads(path.read_bytes()))
        for task, value in zip(outcome.succeeded, outcome.values, strict=True):
            assert (outcome.bundle.stage, task) not in found
            found[outcome.bundle.stage, task] = value
    squares = {(SQUARE, n): n**2 for n in range(len(ITEMS))}
    assert found == {**squares, (TOTAL, 0): sum(squares.values())}


# --- The tests -----------------------------------------------------------------------------------


async def _cut_often(tmp_path: Path, gate: Gate, sync: Sync, cuts: int) -> list[tuple[Path, Acknowledged]]:
    """Use a grid, and cut its power at random moments, `cuts` times in all."""
    rng, told, found = random.Random(32), Acknowledged(), []
    image = tmp_path / "disk.img"
    with mounted(image, tmp_path / "live") as disk:
        async with grid_in(disk / "grid", sync, told) as grid:
            using = asyncio.create_task(use(grid, told))
            while len(told.ended) < 2:
                await asyncio.sleep(0.01)
            for number in range(cuts):
                await asyncio.sleep(rng.uniform(0.01, 0.15))
                assert not using.done(), using.exception()
                copy = tmp_path / f"cut-{number}.img"
                with gate.closed():
                    cut(image, copy)
                    found.append((copy, deepcopy(told)))
            using.cancel()
            await asyncio.wait([using])
    return found


@needs_loop
def test_acknowledged_writes_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power is cut at 30 random moments of running jobs."""
    gate = Gate(monkeypatch)
    few = asyncio.Semaphore(6)

    async def come_back(image: Path, told: Acknowledged) -> None:
        async with few:
            with mounted(image, image.with_suffix("")) as disk:
                await check_comes_back(disk / "grid", told)
            image.unlink()

    async def act() -> None:
        cuts = await _cut_often(tmp_path, gate, Sync.JOBS, CUTS)
        assert cuts[-1][1].cancelled
        async with asyncio.TaskGroup() as back:
            for image, told in cuts:
                back.create_task(come_back(image, told))

    asyncio.run(act())


@needs_loop
def test_a_grid_that_does_not_wait_for_the_disk_loses_what_it_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check must fail for a grid that never syncs, which shows that the check can fail."""
    gate = Gate(monkeypatch)

    async def act() -> None:
        with ExitStack() as disks:
            ((image, told),) = await _cut_often(tmp_path, gate, Sync.NONE, 1)
            disk = disks.enter_context(mounted(image, tmp_path / "after"))
            with pytest.raises((AssertionError, FileNotFoundError)):
                _check_outcomes(Home(disk / "grid"), told)

    asyncio.run(act())
