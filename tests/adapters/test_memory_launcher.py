"""The features of the simulated launcher: boots in virtual time, injected faults, and replay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from batchlab.adapters.memory.launcher import MemoryState, SimLauncher
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.core.ports import KEEP_ENDED_S
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.sim.actors import CURRENT, Actor, SimClock
from batchlab.sim.event_loop import SimLoop
from tests.support.fleet import CountedIds, ScriptedInstance, in_service

SLOW = Pool("steady", max_size=1_000, boot_s=100.0)


def run(check: Callable[[SimLauncher, dict[str, float]], Awaitable[None]], seed: int = 1) -> None:
    """Run a check with a launcher and the times at which its instances booted."""
    loop = SimLoop()

    async def main() -> None:
        booted_s: dict[str, float] = {}

        def start(pool: Pool, instance: str) -> ScriptedInstance:
            booted_s[instance] = loop.time()
            return ScriptedInstance(pool, instance)

        await check(SimLauncher(start, Random(seed)), booted_s)

    loop.run(main(), limit_s=100_000)


def test_booting_takes_the_pools_time_give_or_take_a_quarter() -> None:
    async def check(launcher: SimLauncher, booted_s: dict[str, float]) -> None:
        for n in range(200):
            await launcher.launch(SLOW, f"w-{n}")
        assert set((await launcher.running()).values()) == {None}
        await asyncio.sleep(130)
        assert min(booted_s.values()) == pytest.approx(75, abs=2)
        assert max(booted_s.values()) == pytest.approx(125, abs=2)

    run(check)


def test_a_seed_replays_every_boot() -> None:
    seen: list[list[tuple[str, float]]] = []

    async def check(launcher: SimLauncher, booted_s: dict[str, float]) -> None:
        for n in range(20):
            await launcher.launch(SLOW, f"w-{n}")
        await asyncio.sleep(130)
        seen.append(list(booted_s.items()))

    for seed in (1, 1, 2):
        run(check, seed)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("how", ["terminate", "crash"])
def test_an_instance_that_ends_while_it_boots_never_starts(how: str) -> None:
    async def check(launcher: SimLauncher, booted_s: dict[str, float]) -> None:
        await launcher.launch(SLOW, "w-1")
        await asyncio.sleep(10)
        if how == "crash":
            launcher.crash("w-1", "hardware failure")
        else:
            await launcher.terminate("w-1", grace_s=60.0)
        ended = "hardware failure" if how == "crash" else "killed by SIGTERM, exit -15"
        assert await launcher.running() == {"w-1": ended}
        await asyncio.sleep(200)
        assert booted_s == {}

    run(check)


def test_a_crash_of_what_has_ended_changes_nothing() -> None:
    async def check(launcher: SimLauncher, _: dict[str, float]) -> None:
        await launcher.launch(SLOW, "w-1")
        launcher.crash("w-1", "first")
        launcher.crash("w-1", "second")
        assert await launcher.running() == {"w-1": "first"}
        with pytest.raises(KeyError):
            launcher.crash("w-2")

    run(check)


def test_an_end_is_forgotten_in_time() -> None:
    async def check(launcher: SimLauncher, _: dict[str, float]) -> None:
        await launcher.launch(SLOW, "w-1")
        launcher.crash("w-1")
        await asyncio.sleep(KEEP_ENDED_S + 1)
        assert await launcher.running() == {"w-1": "killed by SIGKILL, exit -9"}, "seen at least once"
        assert await launcher.running() == {}

    run(check)


def test_capacity_can_run_out_and_return() -> None:
    async def check(launcher: SimLauncher, _: dict[str, float]) -> None:
        launcher.refuse = lambda pool, _: f"InsufficientInstanceCapacity in {pool.name}"
        with pytest.raises(BackendError, match="InsufficientInstanceCapacity in steady"):
            await launcher.launch(SLOW, "w-1")
        launcher.refuse = lambda *_: None
        await launcher.launch(SLOW, "w-1")
        assert await launcher.running() == {"w-1": None}

    run(check)


def test_instances_do_not_die_with_the_manager_that_launched_them() -> None:
    """In the simulator too, a machine outlives its manager."""
    loop = SimLoop()

    async def main() -> None:
        owners: list[Actor | None] = []

        def start(pool: Pool, instance: str) -> ScriptedInstance:
            owners.append(CURRENT.get())
            return ScriptedInstance(pool, instance)

        launcher, manager = SimLauncher(start, Random(1)), Actor("manager")
        await manager.spawn(launcher.launch(SLOW, "w-1"))
        manager.kill()
        await asyncio.sleep(130)
        assert owners == [None]
        assert await launcher.running() == {"w-1": None}

    loop.run(main(), limit_s=1_000)


def test_a_large_fleet_scales_out_and_in_within_virtual_minutes() -> None:
    """The fleet launches a thousand instances, loses some of them, and scales in to zero."""
    loop = SimLoop()

    async def main() -> None:
        launcher = SimLauncher(ScriptedInstance, Random(1))
        fleet = ManagedFleet(launcher, SimClock(loop, 1.7e9), CountedIds(), MemoryState())
        await fleet.ensure(SLOW)
        await fleet.set_desired("steady", 1_000, cause="a peak")

        async def after(ticks: int) -> int:
            for _ in range(ticks):
                await fleet.tick()
                await asyncio.sleep(10)
                (view,) = await fleet.describe()
                for instance in view.instances:
                    if loop.time() - instance.launched_s + 1.7e9 > 125:
                        await fleet.ready(instance.id)
            (view,) = await fleet.describe()
            return len(in_service(view))

        assert await after(14) == 1_000
        for name in list(await launcher.running())[::3]:
            launcher.crash(name, "Spot interruption")
        assert await after(1) == 666
        assert await after(14) == 1_000
        await fleet.set_desired("steady", 0, cause="the end of the peak")
        assert await after(2) == 0
        assert None not in (await launcher.running()).values()

    loop.run(main(), limit_s=3_600)
