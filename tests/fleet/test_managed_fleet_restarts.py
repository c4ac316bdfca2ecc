"""ManagedFleet with crashes of its manager, and its limits in random histories (I5)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from batchlab.adapters.local.state_files import StateFile
from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError, Refused
from batchlab.core.model import GroupView
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.fleet.group_state import COUNTED, KEEP_ACTIVITIES
from tests.support.fleet import CountedIds, ManualClock, TableLauncher, counted, in_service, names
from tests.support.managed_fleet import POOL, USER, Crash, World, in_a_world

# --- A manager that crashes -----------------------------------------------------------------------


@in_a_world
async def test_restarted_manager_continues(w: World) -> None:
    chosen = await w.launch(3)
    await w.tick()
    await w.fleet.protect("p", chosen[:1], on=True)
    await w.tick()
    before = await w.view(), await w.fleet.activities()
    w.restart()
    assert (await w.view(), await w.fleet.activities()) == before
    assert await w.tick() == []
    assert (await w.view(), await w.fleet.activities()) == before
    assert w.launcher.launched == chosen


@in_a_world
async def test_death_during_the_managers_absence_is_reported_and_replaced(w: World) -> None:
    chosen = await w.launch(2)
    w.launcher.crash(chosen[0], "exited while no manager was running")
    w.restart()
    assert names(await w.tick()) == chosen[:1]
    assert len(counted(await w.view())) == 2


@in_a_world
async def test_a_death_is_reported_again_to_a_manager_that_may_have_missed_it(w: World) -> None:
    (name,) = await w.launch(1)
    w.launcher.crash(name)
    assert names(await w.tick()) == [name]
    assert await w.tick() == []
    w.restart()
    assert names(await w.tick()) == [name]
    assert await w.tick() == []


@in_a_world
async def test_no_instance_runs_that_the_saved_state_does_not_know(w: World) -> None:
    """A crash of the manager must not leave orphans. A crash at any moment of a launch does not lose an instance."""

    async def dies(_: str) -> None:
        # All launches of a tick start together, so the test removes the other instances.
        for name in w.launcher.launched[2:]:
            w.launcher.known.pop(name, None)
        raise Crash

    w.launcher.on_launch = dies
    await w.fleet.ensure(POOL)
    await w.fleet.set_desired("p", 4, cause=USER)
    with pytest.raises(BaseExceptionGroup) as crash:
        await w.tick()
    assert crash.group_contains(Crash)
    w.launcher.on_launch = TableLauncher.on_launch
    w.restart()
    await w.tick()
    assert w.launcher.terminated == []
    assert len(counted(await w.view())) == 4
    living = [name for name, how in w.launcher.known.items() if how is None]
    assert sorted(living) == sorted(counted(await w.view()))


@in_a_world
async def test_draining_instance_is_asked_again_after_a_restart(w: World) -> None:
    """The kill timer ended with the manager, so without a new request the instance could drain forever."""
    (name,) = await w.launch(1)
    w.launcher.deaf = True
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.tick()
    w.restart()
    await w.tick()
    assert w.launcher.terminated == [(name, 30.0)] * 2


@in_a_world
async def test_an_orphan_is_terminated_once_and_noted(w: World) -> None:
    """An orphan is an instance that no manager knows."""
    w.launcher.known["w-stranger"] = None
    w.launcher.deaf = True
    await w.launch(1)
    await w.tick()
    assert [name for name, _ in w.launcher.terminated] == ["w-stranger"]
    (activity,) = await w.fleet.activities("")
    assert activity.description == "Terminating orphaned instance: w-stranger"
    assert len(counted(await w.view())) == 1


@in_a_world
async def test_remains_of_a_failed_launch_are_terminated(w: World) -> None:
    async def times_out(_: str) -> None:
        raise BackendError("no answer in time")

    w.launcher.on_launch = times_out
    assert await w.launch(1) == []
    (zombie,) = w.launcher.launched
    w.launcher.on_launch = TableLauncher.on_launch
    await w.tick()
    assert [name for name, _ in w.launcher.terminated] == [zombie]
    assert len(counted(await w.view())) == 1


@in_a_world
async def test_nothing_is_launched_that_could_not_be_saved(w: World) -> None:
    await w.fleet.ensure(POOL)
    await w.fleet.set_desired("p", 2, cause=USER)
    w.store.full = True
    with pytest.raises(BackendError, match="no space"):
        await w.tick()
    assert w.launcher.launched == []


@in_a_world
async def test_a_quiet_tick_writes_nothing(w: World) -> None:
    await w.launch(2)
    await w.tick()
    before = w.store.load()
    await w.tick(10.0)
    assert w.store.load() is before


@in_a_world
async def test_last_200_activities_of_each_pool_are_stored(w: World) -> None:
    other = replace(POOL, name="other")
    await w.fleet.ensure(other)
    await w.fleet.ensure(POOL)
    for n in range(300):
        await w.fleet.set_desired("p", n % 2, cause=f"request {n}")
    w.restart()
    kept = await w.fleet.activities("p", limit=1_000)
    assert len(kept) == KEEP_ACTIVITIES
    assert len(await w.fleet.activities("other")) == 1
    await w.fleet.set_desired("p", 0, cause="one more")
    (newest,) = await w.fleet.activities("p", limit=1)
    assert newest.id == kept[0].id + 1


def test_a_state_file_holds_what_was_saved_last(tmp_path: Path) -> None:
    store = StateFile(tmp_path / "fleet" / "state.json")
    assert store.load() is None
    store.save(b"one")
    store.save(b"two")
    assert StateFile(tmp_path / "fleet" / "state.json").load() == b"two"
    assert [path.name for path in (tmp_path / "fleet").iterdir()] == ["state.json"]


def test_unusable_state_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    store = StateFile(tmp_path / "state.json")
    with pytest.raises(BackendError, match="cannot be read"):
        store.load()
    with pytest.raises(BackendError, match="cannot be written"):
        store.save(b"x")


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"format": 99}'])
def test_a_state_that_cannot_be_understood_is_not_taken_for_an_empty_one(data: bytes) -> None:
    store = MemoryState()
    store.save(data)
    with pytest.raises(BackendError, match="saved state cannot be read"):
        ManagedFleet(TableLauncher(), ManualClock(), CountedIds(), store)


# --- I5 over random histories ---------------------------------------------------------------------


def _check_i5(view: GroupView) -> None:
    """Check that desired capacity is within its limits, and that a group exceeds its maximum only if every instance is
    protected."""
    active = [i for i in view.instances if i.state in COUNTED]
    assert view.pool.min_size <= view.desired <= view.pool.max_size
    assert len(active) <= view.pool.max_size or all(i.protected for i in active)


async def _random_step(w: World, rng: Random) -> None:
    view = await w.view()
    some = rng.sample(view.instances, k=min(len(view.instances), rng.randint(0, 3)))
    chosen = [instance.id for instance in some]
    match rng.randrange(10):
        case 0:
            await w.fleet.set_desired("p", rng.randint(-1, 9), cause=USER)
        case 1:
            on = rng.random() < 0.5
            await w.fleet.terminate("p", chosen, decrement=on, cause=USER)
        case 2:
            for name in chosen:
                w.launcher.known[name] = w.launcher.known.get(name) or "exit -9"
        case 3:
            await w.fleet.protect("p", chosen, on=rng.random() < 0.6)
        case 4:
            low = rng.randint(0, 4)
            await w.fleet.ensure(replace(POOL, min_size=low, max_size=low + rng.randint(0, 5)))
        case 5:
            w.restart()
        case 6:
            w.launcher.refuse = rng.choice(["", "", "no capacity"])
            w.launcher.deaf = rng.random() < 0.3
        case 7:
            for name in chosen:
                await w.fleet.set_health(name, healthy=rng.random() < 0.3, cause="a whim")
        case _:
            for name in chosen:
                await w.fleet.ready(name)
            await w.tick(rng.choice([0.0, 0.5, 5.0, 70.0]))


async def _settle(w: World) -> None:
    """End all faults, let every worker report, and check that the group converges."""
    w.launcher.refuse, w.launcher.deaf = "", False
    for name, how in w.launcher.known.items():
        # The launcher has killed the instances that ignored the request to end.
        if how is None and any(name == asked for asked, _ in w.launcher.terminated):
            w.launcher.known[name] = "exit -9"
    for _ in range(8):
        await w.fleet.protect("p", in_service(await w.view()), on=False)
        await w.tick(61.0)
        for name in counted(await w.view()):
            await w.fleet.ready(name)


@pytest.mark.parametrize("block", range(8))
def test_limits_hold_and_the_group_converges_in_any_history(block: int) -> None:
    """The test runs 200 random histories of requests, faults, and restarts (I5)."""

    async def history(seed: int) -> None:
        rng, w = Random(seed), World()

        async def amid_a_tick(_: str) -> None:
            _check_i5(await w.view())

        w.launcher.on_launch = w.launcher.on_terminate = amid_a_tick
        await w.fleet.ensure(replace(POOL, min_size=rng.randint(0, 2), max_size=rng.randint(2, 6)))
        for _ in range(60):
            with suppress(Refused):
                await _random_step(w, rng)
            _check_i5(await w.view())
        await _settle(w)
        view = await w.view()
        _check_i5(view)
        living = [name for name, how in w.launcher.known.items() if how is None]
        assert len(in_service(view)) == view.desired
        assert sorted(living) == sorted(in_service(view)), "nothing else runs"

    for seed in range(block * 25, block * 25 + 25):
        asyncio.run(history(seed))
