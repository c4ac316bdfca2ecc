"""Attacks of a worker that always claims to be idle or busy, to delay a job or to keep an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import pytest

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.model import BundleId, JobState, Pool
from batchlab.core.ports import Depth, Outgoing
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import with_proofs
from batchlab.core.protocol.messages import Beat, Events, HeldBundle, events_message
from batchlab.manager.unresponsive_workers import NO_WORK_TAKEN, UNKNOWN_WORK
from batchlab.sim.world import SimWorker, World
from tests.support.sim import scenes

ONE = (Pool("default", 0, 1, 1),)
LONG_S = 2_000.0
QUEUE = object_keys.tasks_queue("default")


async def liar_of(world: World) -> SimWorker:
    """Return the first worker of the world, and stop it from receiving messages."""
    while not world.workers:
        await asyncio.sleep(0.1)
    liar = next(iter(world.workers.values()))
    world.watch.trust.on_corruption(liar.actor)
    liar.rights.deaf = True
    return liar


async def beat(world: World, liar: SimWorker, held: Iterable[HeldBundle], number: int, name: str = "") -> None:
    """Send a heartbeat that reports one bundle, with the proofs of the jobs in `held`, under the worker name `name`."""
    who, held = liar.who, tuple(held)
    one = Beat(
        worker=name or who.worker,
        instance=who.instance,
        pool=who.pool,
        at_s=world.clock.now_s(),
        slots=1,
        busy=1,
        held=held,
        number=number,
        key=who.key,
    )
    text = events_message(Events(beats=(one,)))
    if held:
        assert world.manager is not None
        keys = {h.job: await world.manager.ports.keys.stored(h.job) for h in held}
        text = with_proofs(text, keys, lambda job: keys[job])
    await world.queue.send(object_keys.EVENTS, [Outgoing(text)])


async def claim_for_ever(world: World, liar: SimWorker, held: Iterable[HeldBundle], name: str = "") -> None:
    for number in range(10**6, 2 * 10**6):
        await beat(world, liar, held, number, name)
        await asyncio.sleep(10.0)


async def causes(world: World) -> str:
    assert world.manager is not None
    return "\n".join(activity.cause for activity in await world.manager.ports.fleet.activities())


async def comes_down(world: World) -> None:
    async with asyncio.timeout(LONG_S):
        while (await world.groups())[0].desired or (await world.groups())[0].instances:
            await asyncio.sleep(5.0)


def test_worker_that_claims_to_be_idle_does_not_delay_a_job() -> None:
    """The only instance of a pool reports that it is idle, and does not receive messages."""

    async def act(world: World) -> str:
        made = scenes.job(scenes.stage(scenes.A))
        await scenes.submitted(world, made)
        await liar_of(world)
        await scenes.ended_well(world, made)
        return await causes(world)

    assert NO_WORK_TAKEN in scenes.in_world(act, script=scenes.takes(1.0), pools=ONE)


@pytest.mark.parametrize("of_a_job", [False, True])
def test_worker_that_claims_to_be_busy_does_not_keep_its_instance(of_a_job: bool) -> None:
    """An instance reports forever that it runs a bundle. The report names either no bundle or a bundle of an ended job
    that the worker has received. Scale-in must not spare the instance for this report."""

    async def act(world: World) -> str:
        made = scenes.job(scenes.stage(scenes.A), items=1)
        await scenes.submitted(world, made)
        await scenes.ended(world, made)
        liar = await liar_of(world)
        held = HeldBundle(QUEUE, "1.1", made.id, scenes.A, BundleId("00000000-00000000.0.1"), True)
        lying = liar.actor.spawn(claim_for_ever(world, liar, [held] * of_a_job), name="lies")
        await comes_down(world)
        lying.cancel()
        return await causes(world)

    assert UNKNOWN_WORK in scenes.in_world(act, script=scenes.takes(1.0), pools=ONE)


@pytest.mark.parametrize("of_the_manager", [False, True])
def test_name_of_a_busy_worker_proves_nothing(of_the_manager: bool) -> None:
    """An instance reports forever that it is busy, under the name of an honest worker whose outcomes are counted. Every
    worker may read that name in the outcomes."""

    async def act(world: World) -> str:
        made = scenes.job(scenes.stage(scenes.A), items=400)
        await scenes.submitted(world, made)
        while len(world.workers) < 2:
            await asyncio.sleep(0.1)
        liar = await liar_of(world)
        honest = next(worker for worker in world.workers.values() if worker is not liar)
        await asyncio.sleep(60.0)
        name = "manager" if of_the_manager else honest.who.worker
        lying = liar.actor.spawn(claim_for_ever(world, liar, [], name), name="lies")
        async with asyncio.timeout(LONG_S):
            while UNKNOWN_WORK not in await causes(world):
                await asyncio.sleep(5.0)
        lying.cancel()
        return await causes(world)

    pools = (Pool("default", 2, 2, 1),)
    found = scenes.in_world(act, script=scenes.takes(20.0), pools=pools)
    assert found.count(UNKNOWN_WORK) == 1


def test_worker_with_one_long_task_keeps_its_instance() -> None:
    """One outstanding bundle proves to the manager that the worker is busy."""

    async def act(world: World) -> int:
        await scenes.ends_well(world, scenes.job(scenes.stage(scenes.A), items=1))
        return len(world.workers)

    assert scenes.in_world(act, script=scenes.takes(LONG_S), pools=ONE) == 1


def test_unusable_messages_do_not_keep_an_idle_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue stays full of messages that no worker can run, while another instance is idle. Only
    a due bundle that no worker holds counts as waiting work."""

    async def full(_original: Callable[..., Awaitable[Depth]], *_: object) -> Depth:
        return Depth(visible=10, in_flight=0, delayed=0)

    async def act(world: World) -> int:
        await scenes.ends_well(world, scenes.job(scenes.stage(scenes.A), items=1))
        return len(world.workers)

    scenes.around(monkeypatch, SimQueue, "depth", full)
    pools = (Pool("default", 2, 2, 1),)
    assert scenes.in_world(act, script=scenes.takes(LONG_S), pools=pools) == 2


def test_a_job_that_only_the_bucket_has_counts_as_work() -> None:
    """A manager died after it had sent a job's first bundles and before it wrote the job to the ledger. The instance
    that runs one of the bundles is not replaced, and the next manager finds the job."""

    async def act(world: World) -> tuple[int, JobState]:
        made = scenes.job(scenes.stage(scenes.A), items=1)
        manager = await scenes.leader(world)
        await scenes.submitted(world, made)
        while not manager.registry.busy("default"):
            await asyncio.sleep(0.5)
        await world.ledger.forget()
        await manager._adoption.drop_all()
        assert not manager.lives
        ended = await scenes.ended(world, made, within_s=2 * LONG_S)
        return len(world.workers), ended.state

    found = scenes.in_world(act, script=scenes.takes(LONG_S), pools=ONE)
    assert found == (1, JobState.SUCCEEDED)
