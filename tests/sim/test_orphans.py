"""The end of a fleet without a manager, and the return of a manager."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Denied, Throttled, Unreachable
from batchlab.core.model import JobState, LifecycleState, Pool, ScheduledEnd
from batchlab.core.protocol import leader_beat, object_keys
from batchlab.core.protocol.leader_beat import ROUNDS, UNLIMITED_ROUND_S, LeaderBeat
from batchlab.manager import fleet_commands
from batchlab.manager.adoption import Adoption
from batchlab.sim.world import World
from tests.sim.mutants.kit import check_worlds
from tests.support.sim.scenes import UNHURRIED, A, ended, in_world, job, leader, stage, submitted, takes

ORPHAN_S = 300.0
POOL = Pool("default", 1, 4, 1, boot_s=10.0)
SETTINGS: dict[str, Any] = {**UNHURRIED, "manager_settings": replace(UNHURRIED["manager_settings"], orphan_s=ORPHAN_S)}


def scene(act: Callable[[World], Awaitable[None]], *, run_s: float = 20.0) -> None:
    async def served(world: World) -> None:
        service = asyncio.create_task(world.serve_groups())
        await act(world)
        service.cancel()

    in_world(served, script=takes(run_s), pools=(POOL,), **SETTINGS)


def kill_managers(world: World) -> None:
    world.may_start.clear()
    for process in list(world.manager_processes):
        process.actor.kill()


async def fleet_end(world: World, within_s: float) -> float:
    """Wait until no instance runs, and return the passed seconds."""
    begun_s = world.clock.monotonic_s()
    while world.running_instances():
        await asyncio.sleep(1.0)
        assert world.clock.monotonic_s() - begun_s <= within_s, world.running_instances()
    return world.clock.monotonic_s() - begun_s


def test_a_fleet_without_a_manager_ends_after_its_bundles() -> None:
    """The instances are busy and protected when the manager ends, for longer than the limit."""
    run_s = 2.5 * ORPHAN_S

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=2)
        await submitted(world, made)
        manager = await leader(world)
        while not any(one.protected for view in await manager.ports.fleet.describe() for one in view.instances):
            await asyncio.sleep(1.0)
        kill_managers(world)
        took_s = await fleet_end(world, 2 * run_s + 2 * ORPHAN_S)
        assert took_s > ORPHAN_S
        assert world.ends == 1
        world.may_start.set()
        record = await ended(world, made, within_s=2 * run_s + 600)
        assert record.state is JobState.SUCCEEDED
        manager = await leader(world)
        (view,) = await manager.ports.fleet.describe()
        assert (view.pool.min_size, view.pool.max_size) == (POOL.min_size, POOL.max_size)

    scene(act, run_s=run_s)


def test_a_fleet_does_not_end_while_a_manager_leads_or_is_replaced() -> None:
    async def act(world: World) -> None:
        await leader(world)
        for _ in range(5):
            await asyncio.sleep(2 * ORPHAN_S)
            kill_managers(world)
            await asyncio.sleep(ORPHAN_S / 2)
            world.may_start.set()
            await leader(world)
        assert world.ends == 0
        assert len(world.running_instances()) == POOL.min_size

    scene(act)


def test_a_suspended_leader_restores_the_limits_and_the_capacity_of_its_user() -> None:
    async def act(world: World) -> None:
        manager = await leader(world)
        await fleet_commands.scale(manager, POOL.name, min_size=2, desired=3)
        await asyncio.sleep(60.0)
        world.manager_processes[0].actor.freeze()
        await fleet_end(world, 2 * ORPHAN_S)
        world.manager_processes[0].actor.thaw()
        await asyncio.sleep(ORPHAN_S / ROUNDS + 60.0)
        assert world.manager is manager
        (view,) = await manager.ports.fleet.describe()
        assert (view.pool.min_size, view.pool.max_size, view.desired) == (2, POOL.max_size, 3)
        assert sum(one.state is LifecycleState.IN_SERVICE for one in view.instances) == 3

    scene(act)


def test_a_manager_whose_boot_fails_does_not_keep_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Managers start again and again, and each cannot read its ledger to the end. The fleet ends and stays ended."""
    adopt = Adoption.adopt_active

    async def fail(_: Adoption) -> None:
        raise Unreachable("The ledger does not respond.")

    async def act(world: World) -> None:
        await leader(world)
        monkeypatch.setattr(Adoption, "adopt_active", fail)
        kill_managers(world)
        world.may_start.set()
        before = world.managers
        await fleet_end(world, 2 * ORPHAN_S)
        await asyncio.sleep(2 * ORPHAN_S)
        assert world.managers > before + 10
        assert not world.running_instances()
        monkeypatch.setattr(Adoption, "adopt_active", adopt)
        manager = await leader(world)
        await asyncio.sleep(60.0)
        (view,) = await manager.ports.fleet.describe()
        assert (view.pool.min_size, view.pool.max_size) == (POOL.min_size, POOL.max_size)
        assert len(world.running_instances()) == POOL.min_size

    scene(act)


def test_failed_postponement_is_reported_and_repeated(caplog: pytest.LogCaptureFixture) -> None:
    async def act(world: World) -> None:
        manager = await leader(world)
        end, fleet = manager.fleet_end, manager.ports.fleet
        assert not end.trouble(POOL.name)
        original = fleet.schedule_end

        async def refuse(pool: str, after_s: float | None) -> ScheduledEnd:
            raise Throttled("Pool 'default': Rate exceeded (Throttling).")

        fleet.schedule_end = refuse  # type: ignore[method-assign]
        await asyncio.sleep(ORPHAN_S / ROUNDS + 1.0)
        left_s = end.left_s(POOL.name)
        assert left_s is not None
        assert left_s < ORPHAN_S * (1 - 1 / ROUNDS)
        assert f"the pool ends in {left_s:.0f} s: Pool 'default': Rate exceeded" in end.trouble(POOL.name)
        assert "cannot be changed" in caplog.text
        fleet.schedule_end = original  # type: ignore[method-assign]
        await asyncio.sleep(ORPHAN_S / ROUNDS)
        assert not end.trouble(POOL.name)
        assert (end.left_s(POOL.name) or 0.0) > ORPHAN_S * (1 - 2 / ROUNDS)
        assert world.ends == 0

    scene(act)


def test_the_limits_are_restored_without_the_permission_to_postpone_the_end() -> None:
    """The role of the manager loses a permission while the action exists, and the manager leads on."""

    async def act(world: World) -> None:
        manager = await leader(world)
        fleet, calls = manager.ports.fleet, 0

        async def refuse(pool: str, after_s: float | None) -> ScheduledEnd:
            nonlocal calls
            calls += 1
            raise Denied("Pool 'default': the role may not describe scheduled actions (AccessDenied).")

        fleet.schedule_end = refuse  # type: ignore[method-assign]
        world.manager_settings = replace(world.manager_settings, orphan_s=1e9)  # The end is expected here.
        await asyncio.sleep(2 * ORPHAN_S)
        assert world.ends == 1
        (view,) = await fleet.describe()
        assert (view.pool.min_size, view.pool.max_size, view.desired) == (POOL.min_size, POOL.max_size, POOL.min_size)
        assert calls <= 2 * ROUNDS + 1, "a missing permission is not tried again sooner than usual"
        # Without an action, the group would replace each worker that ends, so the workers stay.
        kill_managers(world)
        running = world.running_instances()
        assert len(running) == POOL.min_size
        await asyncio.sleep(4 * ORPHAN_S)
        assert world.running_instances() == running

    scene(act)


def test_workers_stay_after_a_change_of_the_setting_to_0(caplog: pytest.LogCaptureFixture) -> None:
    """The action was performed before the next manager, which has `orphan_s` 0, starts."""

    async def act(world: World) -> None:
        await leader(world)
        kill_managers(world)
        await fleet_end(world, 2 * ORPHAN_S)
        world.manager_settings = replace(world.manager_settings, orphan_s=0.0)
        world.may_start.set()
        manager = await leader(world)
        await asyncio.sleep(30.0)
        beat = leader_beat.from_bytes(await world.objects.get(object_keys.LEADER))
        assert beat.orphan_s == 0
        # A call of an earlier leader arrives late.
        await manager.ports.fleet.schedule_end(POOL.name, 10 * ORPHAN_S)
        await world.objects.put(object_keys.LEADER, LeaderBeat("manager-1", 99, ORPHAN_S).to_bytes())
        await asyncio.sleep(UNLIMITED_ROUND_S + 10.0)
        assert not world.has_scheduled_ends()
        assert leader_beat.from_bytes(await world.objects.get(object_keys.LEADER)).orphan_s == 0

    scene(act)
    assert caplog.messages.count("the scheduled action of an earlier manager is removed") == 1


@pytest.mark.parametrize("first", range(0, 24, 6))
def test_worlds_without_a_manager_come_to_rest(first: int) -> None:
    check_worlds(range(first, first + 6), "orphans")
