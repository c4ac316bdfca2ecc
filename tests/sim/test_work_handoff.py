"""The handover of tasks that wait behind a long task, which loses no task."""

from __future__ import annotations

import asyncio
from collections import Counter

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Pool
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import World
from tests.support.sim.scenes import A, ended_well, in_world, job, leader, stage, submitted

GIANT = 20
GIANT_S = 300.0
POOLS = (Pool("default", 2, 2, 1),)


def one_is_long(scene: AttemptInput) -> ScriptedAttempt:
    run_s = GIANT_S if scene.task == GIANT else 0.01
    return ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item))


def made() -> JobDef:
    return job(stage(A), items=60)


async def until_it_is_alone(world: World) -> str:
    """Submit the job, and return the instance in which the giant task runs in its own bundle."""
    await submitted(world, made())
    manager = await leader(world)
    async with asyncio.timeout(60):
        while True:
            await asyncio.sleep(0.5)
            for instance, seen in manager.registry.workers.items():
                if any(held.bundle == f"{GIANT:08d}-{GIANT:08d}.0.1" for held in seen.beat.held):
                    return instance


def starts_of(world: World) -> Counter[int]:
    return Counter(start.task for start in world.watch.starts)


def test_neighbours_of_a_long_task_do_not_wait_for_it() -> None:
    async def act(world: World) -> None:
        await until_it_is_alone(world)
        await ended_well(world, made())
        began_s = {start.task: start.at_s for start in world.watch.starts}
        assert max(began_s.values()) < began_s[GIANT] + 10
        assert set(starts_of(world).values()) == {1}
        rows = await world.ledger.bundles(made().id, done=True)
        assert any(GIANT in row.bundle.tasks and len(row.bundle.tasks) > 1 for row in rows), (
            "it never had neighbours, so this shows nothing"
        )

    in_world(act, script=one_is_long, pools=POOLS)


def test_a_worker_that_dies_in_a_long_task_loses_nothing_but_that() -> None:
    async def act(world: World) -> None:
        instance = await until_it_is_alone(world)
        await asyncio.sleep(60)
        world.launcher.crash(instance)
        await ended_well(world, made())
        starts = starts_of(world)
        assert starts.pop(GIANT) == 2
        assert set(starts.values()) == {1}

    in_world(act, script=one_is_long, pools=POOLS)


def test_a_worker_that_leaves_gives_back_the_long_task_alone() -> None:
    async def act(world: World) -> None:
        instance = await until_it_is_alone(world)
        manager = await leader(world)
        left_s = world.clock.monotonic_s()
        await manager.ports.fleet.terminate("default", [instance], decrement=False, cause="test")
        await ended_well(world, made())
        again = [s for s in world.watch.starts if s.task == GIANT][1:]
        assert len(again) == 1
        # The end comes as soon as the drain time is over, because the other worker is free.
        assert again[0].at_s < left_s + world.worker_settings.drain_s + 10

    in_world(act, script=one_is_long, pools=POOLS)
