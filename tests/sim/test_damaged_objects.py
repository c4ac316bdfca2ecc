"""Objects that the store has truncated, lost, or changed, in fixed scenes and in random worlds."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from batchlab.core.commit import committed
from batchlab.core.model import Control, JobId, JobState, Pool, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Cut
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.manager.retry_rounds import Retry
from batchlab.sim import trial
from batchlab.sim.faults import DAMAGES, FaultKind
from batchlab.sim.random_faults import WorldFaults
from batchlab.sim.storage_faults import Damage, group_of
from batchlab.sim.world import World
from tests.sim.mutants.kit import check_worlds
from tests.support.sim import scenes

TORN, MISSING, ROTTED = DAMAGES
JOB = scenes.job(scenes.stage(scenes.A), items=4)
OTHER = scenes.job(scenes.stage(scenes.A), id=JobId("other"), token="other", items=4)


async def strike(world: World, group: str, kind: FaultKind) -> str:
    """Wait for the only object of the job in that group, damage the object, and return its key."""
    while True:
        keys = [key for key in world.objects.names() if key.startswith("jobs/job/") and group_of(key) == group]
        if keys:
            break
        await asyncio.sleep(0.01)
    (key,) = keys
    before = world.objects.content(key)
    assert before
    after = {TORN: before[:7], MISSING: None, ROTTED: bytes([before[0] ^ 1]) + before[1:]}
    world.objects.damage(key, after[kind])
    world.watch.trust.touched.add("job")
    return key


@pytest.mark.parametrize("kind", [TORN, MISSING])
def test_job_with_a_damaged_definition_fails_alone(kind: FaultKind) -> None:
    async def act(world: World) -> None:
        await scenes.submitted(world, JOB)
        key = await strike(world, "spec.json", kind)
        await scenes.submitted(world, OTHER)
        record = await scenes.ended(world, JOB)
        assert record.state is JobState.FAILED
        assert key in record.reason
        assert (await scenes.ended(world, OTHER)).state is JobState.SUCCEEDED

    scenes.in_world(act, script=scenes.takes(1.0))


@pytest.mark.parametrize("kind", [TORN, MISSING])
def test_each_bundle_of_a_job_with_a_damaged_definition_has_an_outcome(kind: FaultKind) -> None:
    """The definition may contain the first cut of a stage, so the manager reads the definition again when it ends a job
    with an unplanned stage. Before, the ledger counted the outstanding bundles as canceled, but the bucket had no
    outcome, and a worker could still commit another one."""
    two = scenes.job(scenes.stage(scenes.A), scenes.stage(scenes.B, scenes.A, gather="*"), items=4)

    async def act(world: World) -> None:
        await scenes.submitted(world, two)
        while not await world.ledger.bundles(two.id, done=False):
            await asyncio.sleep(0.1)
        await strike(world, "spec.json", kind)
        assert (await scenes.ended(world, two)).state is JobState.FAILED
        rows = await world.ledger.bundles(two.id, done=True)
        assert rows
        key = await CommitKeys(world.objects).key_of((await world.ledger.job(two.id)).job)
        for row in rows:
            assert row.completion
            outcome = await committed(world.objects, row.bundle, Patience(random.Random(1)), key)
            assert outcome, f"{row.bundle.id} is counted, and not there"
            assert outcome.cancelled == row.completion.cancelled

    # The instances boot after the manager has noticed the damage, because the bundles are silent.
    scenes.in_world(act, script=scenes.takes(1.0), pools=(Pool("default", 0, 2, 1, boot_s=600.0),))


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_word_of_a_paused_job_is_written_again(kind: FaultKind) -> None:
    """Workers run a job whose control object is missing, but do not run a job whose control object is unreadable."""

    async def act(world: World) -> None:
        await scenes.submitted(world, JOB)
        await asyncio.sleep(1.0)
        await world.ask(lambda m: m.job_commands.pause(JOB.id), "pause")
        key = await strike(world, "control.json", kind)
        await asyncio.sleep(2 * world.manager_settings.silence_s)
        data = world.objects.content(key)
        assert data
        assert Control.PAUSE.value.encode() in data
        await world.ask(lambda m: m.job_commands.resume(JOB.id), "resume")
        assert (await scenes.ended(world, JOB)).state is JobState.SUCCEEDED

    scenes.in_world(act, script=scenes.takes(30.0))


async def submitted_with_a_control_object(world: World) -> None:
    """Submit JOB, and pause and resume it, because a job without a command has no control object."""
    await scenes.submitted(world, JOB)
    await world.ask(lambda m: m.job_commands.pause(JOB.id), "pause")
    await world.ask(lambda m: m.job_commands.resume(JOB.id), "resume")


@pytest.mark.parametrize("kind", [TORN, MISSING])
def test_a_job_is_cancelled_although_its_word_is_damaged(kind: FaultKind) -> None:
    async def act(world: World) -> None:
        await submitted_with_a_control_object(world)
        await strike(world, "control.json", kind)
        await world.ask(lambda m: m.job_commands.cancel(JOB.id), "cancel")
        await strike(world, "control.json", kind)
        assert (await scenes.ended(world, JOB)).state is JobState.CANCELLED

    scenes.in_world(act, script=scenes.takes(30.0))


def test_running_job_survives_a_torn_control_object() -> None:
    async def act(world: World) -> None:
        await submitted_with_a_control_object(world)
        await strike(world, "control.json", TORN)
        assert (await scenes.ended(world, JOB)).state is JobState.SUCCEEDED

    scenes.in_world(act, script=scenes.takes(30.0))


@pytest.mark.parametrize("kind", DAMAGES)
def test_task_with_a_damaged_part_of_the_plan_fails(kind: FaultKind) -> None:
    """The name of a part contains the hash of its content, so one changed bit is noticed."""
    many = scenes.job(scenes.stage(scenes.A, bundle=1), items=40)

    async def act(world: World) -> None:
        await scenes.submitted(world, many)
        # The messages of the first bundles contain the items, so these bundles do not need the plan.
        key = await strike(world, "part", kind)
        record = await scenes.ended(world, many)
        assert record.state is JobState.FAILED
        assert key in record.reason

    scenes.in_world(act, script=scenes.takes(1.0), seed=2)


async def cancelled_and_retried(world: World) -> None:
    await scenes.submitted(world, JOB)
    await world.ask(lambda m: m.job_commands.cancel(JOB.id), "cancel")
    await scenes.ended(world, JOB)
    await world.ask(lambda m: m.job_commands.retry(JOB.id), "retry")


async def next_leader_ends_it(world: World, key: str) -> None:
    """Check that the next manager completes OTHER, and ends JOB as FAILED with the key in the reason."""
    scenes.kill_manager(world)
    await scenes.leader(world)
    await scenes.ends_well(world, OTHER)
    record = await scenes.ended(world, JOB)
    assert record.state is JobState.FAILED
    assert key in record.reason


@pytest.mark.parametrize("kind", [TORN, MISSING])
def test_job_with_a_damaged_retry_fails(kind: FaultKind) -> None:
    """A leader that cannot read the retry does not know the bundles of the round."""

    async def act(world: World) -> None:
        await cancelled_and_retried(world)
        key = await strike(world, "retries", kind)
        await next_leader_ends_it(world, key)

    scenes.in_world(act, script=scenes.takes(100.0))


def test_job_whose_retry_cuts_another_job_fails() -> None:
    """Before, the next leader failed at the cut each time that it adopted its jobs."""

    async def act(world: World) -> None:
        await cancelled_and_retried(world)
        key = object_keys.retry(JOB.id, 1)
        data = world.objects.content(key)
        assert data
        retry = Retry.from_bytes(data)
        (cut,) = retry.cuts
        foreign = replace(cut, stage=scenes.B, bundles=())
        world.objects.damage(key, replace(retry, cuts=(foreign,)).to_bytes())
        world.watch.trust.touched.add("job")
        await next_leader_ends_it(world, key)

    scenes.in_world(act, script=scenes.takes(100.0))


def test_job_with_a_foreign_cut_fails() -> None:
    many = scenes.job(scenes.stage(scenes.A, bundle=1), items=40)
    key = object_keys.cut(many.id, scenes.A, 0, 1)

    async def act(world: World) -> None:
        world.watch.trust.touched.add("job")
        misplaced = Cut(many.id, scenes.A, 0, 7, (), TaskSet())
        data = json_format.to_bytes(json_format.cut_to_json(misplaced))
        await world.objects.put(key, data, if_absent=True)
        await scenes.submitted(world, many)
        record = await scenes.ended(world, many)
        assert record.state is JobState.FAILED
        assert key in record.reason

    scenes.in_world(act, script=scenes.takes(1.0))


@pytest.mark.parametrize("kind", [TORN, MISSING])
def test_job_with_a_damaged_end_ends_again_after_a_rebuild(kind: FaultKind) -> None:
    async def act(world: World) -> None:
        await scenes.submitted(world, JOB)
        await scenes.ended(world, JOB)
        key = await strike(world, "final", kind)
        await world.ledger.forget()
        manager = await scenes.leader(world)
        rebuilt = await manager.rebuild_ledger()
        assert set(rebuilt.unreadable) == ({key} if kind is TORN else set())
        assert (await scenes.ended(world, JOB)).state is JobState.SUCCEEDED

    scenes.in_world(act, script=scenes.takes(1.0))


def test_a_submission_with_the_token_of_a_damaged_job_is_refused_by_its_name() -> None:
    async def act(world: World) -> object:
        await scenes.submitted(world, JOB)
        await strike(world, "spec.json", TORN)
        return await world.ask(lambda m: m.job_commands.submit(JOB), "submit")

    assert object_keys.spec(JOB.id) in str(scenes.in_world(act, script=scenes.takes(1.0)))


def test_only_objects_of_vulnerable_jobs_are_damaged() -> None:
    async def act(world: World) -> Damage:
        for one in (JOB, OTHER):
            await scenes.submitted(world, one)
        world.damage.vulnerable.add(JOB.id)
        rng = random.Random(1)
        for kind in DAMAGES:
            assert world.damage.strike(kind, rng)
        while world.damage.strike(TORN, rng):
            pass
        return world.damage

    damage = scenes.in_world(act, script=scenes.takes(1.0))
    assert damage.jobs == damage.touched == {"job"}
    assert {kind for kind, _ in damage.hit.values()} == set(DAMAGES)


def test_power_cut_loses_only_unacknowledged_writes() -> None:
    """The power fails while the answer to a put is in flight."""

    async def act(world: World) -> tuple[object, object]:
        loop = asyncio.get_running_loop()
        await scenes.submitted(world, JOB)
        await scenes.submitted(world, OTHER)
        known = {key for key in world.objects.names() if key not in world.watch.unsynced.before()}
        writes = loop.time()
        while not world.watch.unsynced.before():
            await asyncio.sleep(0.001)
            assert loop.time() < writes + 100.0
        lost = world.watch.unsynced.before()
        assert not known & {key for key, before in lost.items() if before is None}
        await WorldFaults(world, trial.calm(1), 1.0)._cut_power(random.Random(3))
        first = [await scenes.ended(world, one) for one in (JOB, OTHER)]
        return tuple(one.state for one in first), world.managers

    states = (JobState.SUCCEEDED, JobState.SUCCEEDED)
    assert scenes.in_world(act, script=scenes.takes(3.0)) == (states, 2)


def test_every_world_of_the_weather_may_have_damage() -> None:
    for kind in (*DAMAGES, FaultKind.UNSYNCED):
        assert {trial.weather_of(n, trial.STORAGE).rate(kind) for n in range(20)} == {trial.STORAGE.rate(kind)}


@pytest.mark.parametrize("first", range(0, 15, 5))
def test_the_promises_hold_when_the_store_damages_objects(first: int) -> None:
    """Invariants I1 to I7 hold for every other job. A job with a damaged object ends, and its reason names the
    object."""
    check_worlds(range(first, first + 5), "storage")
