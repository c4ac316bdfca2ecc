"""Instances that never start. Each try is billed, so the manager stops launching and reports the reason."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest

from batchlab.adapters.memory.launcher import SimInstance
from batchlab.core.model import Instance, JobState, LifecycleState, Pool
from batchlab.manager import fleet_commands
from batchlab.manager.autoscaler import MAX_PAUSE_S
from batchlab.server import job_facts
from batchlab.server.wait_reasons import why
from batchlab.sim.world import World
from tests.support.sim.scenes import UNHURRIED, A, around, ended, in_world, job, leader, stage, submitted, takes

POOL = Pool("default", 0, 4, 1, boot_s=30.0)
PAUSE_S = 200.0
SLOWLY: dict[str, Any] = {
    **UNHURRIED,
    "manager_settings": replace(UNHURRIED["manager_settings"], tick_s=10.0, boot_pause_s=PAUSE_S),
}


@dataclass
class Broken:
    """An instance whose boot has ended without a worker."""

    ended: str | None = "exit 1: the release cannot be fetched"

    def stop(self, grace_s: float) -> None:
        """Do nothing, because the instance has already stopped."""

    def kill(self, reason: str) -> None:
        """Do nothing, because the instance is already dead."""


class Machines:
    """A switch that makes all later boots in the world fail until `mend` is called."""

    def __init__(self, world: World) -> None:
        self.launched: list[float] = []
        self._whole = world.launcher._start
        self._launcher = world.launcher
        world.launcher.launched = lambda _pool, _instance: self.launched.append(world.clock.monotonic_s())
        self.break_all()

    def break_all(self) -> None:
        def start(_pool: Pool, _instance: str) -> SimInstance:
            return Broken()

        self._launcher._start = start

    def mend(self) -> None:
        self._launcher._start = self._whole


def scene(act: Callable[[World], Awaitable[None]], pool: Pool = POOL) -> None:
    in_world(act, script=takes(20.0), pools=(pool,), **SLOWLY)


def test_failing_launches_become_rare_and_resume_after_the_repair() -> None:
    async def act(world: World) -> None:
        machines = Machines(world)
        made = job(stage(A), items=40)
        await submitted(world, made)
        await asyncio.sleep(2.5 * 3600.0)
        first = len([at for at in machines.launched if at < 200.0])
        assert first == POOL.max_size, "the first wave, and nothing in place of it"
        tries = machines.launched[first:]
        gaps = [later - at for at, later in pairwise(tries)]
        # The tolerance is a quarter of the boot time plus the duration of a tick.
        assert gaps[0] == pytest.approx(2 * PAUSE_S + POOL.boot_s, abs=20)
        assert gaps[1] == pytest.approx(4 * PAUSE_S + POOL.boot_s, abs=20)
        assert gaps[-1] == pytest.approx(MAX_PAUSE_S + POOL.boot_s, abs=20)
        manager = await leader(world)
        answer = why(await job_facts.gather(manager, made.id))
        assert "instances of pool default ended before their worker had reported" in answer
        assert "exit 1: the release cannot be fetched; launching is stopped" in answer
        assert "grid scale default --auto" in answer
        machines.mend()
        record = await ended(world, made, within_s=MAX_PAUSE_S + 600)
        assert record.state is JobState.SUCCEEDED
        assert not manager.autoscaler.launch_breaker.trouble("default")
        assert len(machines.launched) <= first + len(tries) + POOL.max_size

    scene(act)


def test_reported_repair_ends_the_wait() -> None:
    async def act(world: World) -> None:
        machines = Machines(world)
        made = job(stage(A), items=4)
        await submitted(world, made)
        await asyncio.sleep(1800.0)
        machines.mend()
        await fleet_commands.scale(await leader(world), "default", auto=True)
        await ended(world, made, within_s=240)

    scene(act)


def test_capacity_set_by_hand_is_held_back_and_restored() -> None:
    async def act(world: World) -> None:
        machines = Machines(world)
        manager = await leader(world)
        await fleet_commands.scale(manager, "default", desired=3)
        await asyncio.sleep(3600.0)
        assert (await fleet_commands.group(manager, "default")).desired <= 1
        assert len(machines.launched) < 10
        machines.mend()
        await asyncio.sleep(MAX_PAUSE_S + 300)
        assert (await fleet_commands.group(manager, "default")).desired == 3

    scene(act)


def test_working_types_of_a_pool_continue() -> None:
    async def act(world: World) -> None:
        manager = await leader(world)
        made = job(stage(A), items=300)
        await submitted(world, made)
        while len(manager.registry.busy("default")) < POOL.max_size:
            await asyncio.sleep(1.0)
        working = set(manager.registry.busy("default"))
        machines = Machines(world)
        await fleet_commands.scale(manager, "default", max_size=12)
        await asyncio.sleep(900.0)
        assert manager.autoscaler.launch_breaker.trouble("default")
        assert len(machines.launched) < 14
        there = {instance.id for instance in (await fleet_commands.group(manager, "default")).instances}
        assert working <= there, "nobody who works is sent off"
        assert (await ended(world, made)).state is JobState.SUCCEEDED

    scene(act)


def test_minimum_size_is_not_held_back_but_reported() -> None:
    async def act(world: World) -> None:
        Machines(world)
        await asyncio.sleep(1800.0)
        manager = await leader(world)
        assert (await fleet_commands.group(manager, "default")).desired == 1
        assert "launching is stopped" in manager.autoscaler.launch_breaker.trouble("default")

    scene(act, replace(POOL, min_size=1))


def test_booting_instances_beside_failed_ones_are_awaited() -> None:
    """A Spot wave ends as many booting instances as a pool needs to stop launching. Before, the other instances of the
    same launch were ended too."""
    pool = replace(POOL, max_size=8, boot_s=120.0)

    async def act(world: World) -> None:
        manager = await leader(world)
        await fleet_commands.scale(manager, "default", desired=8)
        await asyncio.sleep(30.0)
        booting = [instance.id for instance in (await fleet_commands.group(manager, "default")).instances]
        assert len(booting) == 8
        assert not manager.registry.workers
        for name in booting[:3]:
            world.launcher.crash(name, "taken by the market")
        await asyncio.sleep(30.0)
        assert manager.autoscaler.launch_breaker.trouble("default")
        there = {instance.id for instance in (await fleet_commands.group(manager, "default")).instances}
        assert set(booting[3:]) <= there
        await asyncio.sleep(300.0)
        assert set(booting[3:]) <= manager.registry.workers.keys()
        assert not manager.autoscaler.launch_breaker.trouble("default")

    scene(act, pool)


def test_worker_that_reported_and_died_had_started() -> None:
    """Before, a worker that died between two looks at the fleet counted as one that had never started."""

    async def act(world: World) -> None:
        manager = await leader(world)
        for number in range(4):
            await fleet_commands.scale(manager, "default", desired=1)
            while not manager.registry.workers:
                await asyncio.sleep(0.5)
            (name,) = manager.registry.workers
            world.launcher.crash(name, f"killed {number}")
            await asyncio.sleep(60.0)
            await fleet_commands.scale(manager, "default", desired=0)
            await asyncio.sleep(60.0)
        assert not manager.autoscaler.launch_breaker.trouble("default")

    scene(act)


def test_instances_that_are_no_longer_wanted_are_not_failures() -> None:
    """The instances of a canceled job are terminated while they boot."""

    async def act(world: World) -> None:
        manager = await leader(world)
        for _ in range(5):
            await fleet_commands.scale(manager, "default", desired=2)
            await asyncio.sleep(10.0)
            await fleet_commands.scale(manager, "default", desired=0)
            await asyncio.sleep(10.0)
        assert not manager.autoscaler.launch_breaker.trouble("default")

    scene(act)


def test_booting_instance_missing_from_one_answer_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, only instances in service were accepted again. The booting instance reached the timeout of its launch
    hook and was replaced."""

    async def act(world: World) -> None:
        manager = await leader(world)
        fleet = manager.ports.fleet
        missed: list[str] = []

        async def tick(real: Any) -> list[Instance]:
            dead = list(await real())
            for view in await fleet.describe():
                booting = [instance for instance in view.instances if instance.state is LifecycleState.PENDING]
                if booting and not missed:
                    missed.append(booting[0].id)
                    dead.append(replace(booting[0], state=LifecycleState.TERMINATED))
            return dead

        around(monkeypatch, fleet, "tick", tick)
        await fleet_commands.scale(manager, "default", desired=1)
        await asyncio.sleep(2 * POOL.boot_s)
        assert len(missed) == 1
        assert list(manager.registry.workers) == missed
        (one,) = (await fleet_commands.group(manager, "default")).instances
        assert one.state is LifecycleState.IN_SERVICE

    scene(act)
