"""GPUs of instances in simulated worlds: exclusive use, capacity, and some worlds with all faults."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Failure, FailureKind, JobId, Pool
from batchlab.fleet.engine import Engine
from batchlab.manager import fleet_commands
from batchlab.manager.admission import admit
from batchlab.sim import trial
from batchlab.sim.actors import Violated
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Slots
from tests.sim.mutants.kit import check_worlds
from tests.support.sim.scenes import (
    A,
    B,
    ended,
    ended_well,
    in_world,
    job,
    kill_manager,
    leader,
    stage,
    submitted,
    takes,
)

POOL = Pool("default", 0, 3, slots=4, gpus=1)
TRAIN = job(stage(A, gpus=1, bundle=1), items=9)


def _busiest(world: World) -> int:
    """Return the maximum number of tasks that ran at once."""
    starts = world.watch.starts
    return max(
        sum(other.at_s <= start.at_s < (other.ended_s or start.at_s + 1) for other in starts) for start in starts
    )


def test_one_task_at_a_time_runs_on_each_gpu() -> None:
    async def act(world: World) -> None:
        await submitted(world, TRAIN)
        await ended_well(world, TRAIN)
        assert world.watch.gpus.starts == 9
        assert _busiest(world) == 3, "three instances with one GPU each, although they have 12 slots"

    in_world(act, script=takes(60.0), pools=(POOL,))


def test_tasks_without_gpus_use_the_other_slots() -> None:
    """A bundle that waits for a GPU does not block bundles that need none."""
    pool = replace(POOL, max_size=1)
    plain = job(stage(B, bundle=1), items=30, id=JobId("plain"), token="plain")

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(100.0 if scene.stage.gpus else 10.0, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await asyncio.gather(submitted(world, TRAIN), submitted(world, plain))
        await ended(world, plain)
        assert world.clock.monotonic_s() < 400.0, "9 tasks on the GPU take 900 s"
        await ended_well(world, TRAIN)

    in_world(act, script=script, pools=(pool,))


def test_a_gpu_is_free_again_after_crashes_and_failures() -> None:
    """The tasks fail, kill their worker, or succeed, and the only GPU of each instance serves the next task."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task == 3 and scene.bundle.attempt == 1 and not scene.bundle.losses:
            return ScriptedAttempt(5.0, kills_worker=True)
        if scene.task == 1 and scene.bundle.attempt == 1:
            failure = Failure(scene.task, FailureKind.TIMEOUT, "too long")
            return ScriptedAttempt(5.0, failure=failure)
        return ScriptedAttempt(5.0, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await submitted(world, replace(TRAIN, max_failures=2))
        await asyncio.sleep(10.0)
        kill_manager(world)
        await leader(world)
        await ended_well(world, TRAIN)

    in_world(act, script=script, pools=(replace(POOL, max_size=1),))


def test_a_stage_that_needs_several_gpus_gets_them_at_once() -> None:
    pool = replace(POOL, max_size=1, gpus=2)
    both = job(stage(A, gpus=2, bundle=1), items=3, id=JobId("both"), token="both")

    async def act(world: World) -> None:
        await asyncio.gather(submitted(world, TRAIN), submitted(world, both))
        await asyncio.gather(ended(world, both), ended(world, TRAIN))
        await ended_well(world, TRAIN)

    in_world(act, script=takes(20.0), pools=(pool,))


@pytest.mark.parametrize(
    ("made", "text", "remedy"),
    [
        (TRAIN, "asks for 1 GPU per task, but an instance of pool 'default' has 0", "enough GPUs: big, gpu."),
        (job(stage(A, gpus=2, pool="gpu")), "asks for 2 GPUs per task, but an instance of pool 'gpu' has 1", "big."),
        (job(stage(A, gpus=9, pool="big")), "asks for 9 GPUs per task", "--pool default:0-1x8,gpus=1"),
    ],
)
def test_a_stage_that_no_instance_can_run_is_refused(made: JobDef, text: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=text) as refused:
        admit(made, {"default": 4, "gpu": 4, "big": 4}, gpus={"gpu": 1, "big": 8})
    assert remedy in refused.value.remedy


def test_requests_for_gpus_are_granted_in_order() -> None:
    async def act() -> None:
        slots = Slots(4, gpus=2)
        first, both, third, plain = (slots.request(1, gpus) for gpus in (1, 2, 1, 0))
        assert first.done()
        assert not both.done()
        assert not third.done()
        assert plain.done()
        assert slots.take(first) == (0,)
        slots.release(1, (0,))
        assert both.done()
        assert not third.done()
        assert slots.take(both) == (0, 1)
        slots.refuse(third)
        slots.release(1, (1, 0))
        assert slots.free_gpus == [0, 1]

    asyncio.run(act())


def test_a_free_gpu_is_not_kept_from_the_first_request_by_slots() -> None:
    """A request that has a free GPU waits for slots, and later requests without GPUs do not overtake it."""

    async def act() -> None:
        slots = Slots(2, gpus=1)
        held = slots.request(1)
        wide = slots.request(2, 1)
        later = slots.request(1)
        assert held.done()
        assert not wide.done()
        assert not later.done()
        slots.release(1)
        assert wide.done()
        assert not later.done()

    asyncio.run(act())


@pytest.mark.parametrize("seed", [7, 16, 29, 123, 387, 593])
def test_worlds_with_gpus_keep_every_promise_under_any_faults(seed: int) -> None:
    check_worlds([seed], "gpus")


def test_worlds_of_other_weathers_have_no_gpus() -> None:
    assert not any(pool.gpus for seed in range(20) for pool in trial.plan_of(seed, trial.ALL).pools)
    assert any(one.gpus for made in trial.plan_of(7, trial.GPUS).jobs for one in made.stages)


ONE = (replace(POOL, max_size=1), Pool("plain", 0, 4, slots=4))
"""Pools whose instances run on one machine with one GPU."""


def test_a_larger_maximum_does_not_bypass_the_check_of_shared_gpus() -> None:
    """The instances of one machine would use the same GPUs, so only one instance has GPUs."""

    async def act(world: World) -> None:
        manager = await leader(world)
        with pytest.raises(UsageError, match="several instances would use the same GPUs"):
            await fleet_commands.scale(manager, "default", max_size=2)
        assert manager.pools["default"].max_size == 1
        assert (await fleet_commands.group(manager, "default")).pool.max_size == 1
        await fleet_commands.scale(manager, "plain", max_size=6)

    in_world(act, script=takes(1.0), pools=ONE, one_machine=True)


CHAIN = job(stage(A, bundle=1), stage(B, after=(A,), gpus=1, bundle=1), items=4)
"""The manager does not count the bundles of `B` against the GPUs, because the workers send them."""


async def _replace_while_busy(world: World) -> None:
    """End the busy instance of the pool, and ask for a new instance at once."""
    await submitted(world, CHAIN)
    while not world.watch.gpus.starts:
        await asyncio.sleep(1.0)
    manager = await leader(world)
    await fleet_commands.drain(manager, "default")
    await fleet_commands.scale(manager, "default", auto=True)
    await ended_well(world, CHAIN)


def test_an_instance_of_one_machine_waits_for_the_gpus_of_an_ending_instance() -> None:
    async def act(world: World) -> None:
        await _replace_while_busy(world)
        gpu_starts = [start for start in world.watch.starts if start.stage == B]
        assert len({start.actor for start in gpu_starts}) >= 2

    in_world(act, script=takes(15.0), pools=ONE, one_machine=True)


def test_shared_gpus_are_checked_in_all_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fleet that does not wait, the new instance runs a task on the GPU of the ending instance."""
    monkeypatch.setattr(Engine, "_uses_gpus", lambda *_: False)
    with pytest.raises(Violated, match="gives the GPUs \\[0\\] to a second task"):
        in_world(_replace_while_busy, script=takes(15.0), pools=ONE, one_machine=True)


def test_a_machine_whose_instance_is_lost_gets_a_new_one() -> None:
    async def act(world: World) -> None:
        await submitted(world, TRAIN)
        while world.watch.gpus.starts < 2:
            await asyncio.sleep(1.0)
        (worker,) = world.workers.values()
        worker.kill("power loss")
        await ended_well(world, TRAIN)

    in_world(act, script=takes(20.0), pools=ONE, one_machine=True)
