"""Bugs that a review found in the handling of outages, lost messages, and malformed messages.

Each docstring describes the behavior before the fix. Bugs with requests and leaders are in test_regressions.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Throttled, Unreachable
from batchlab.core.model import BundleId, Failure, FailureKind, Instance, JobId, JobState, LifecycleState, Pool
from batchlab.core.ports import MAX_MESSAGE_BYTES, Outgoing
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import CommitKeys, jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, HeldBundle, events_message, read_events_message
from batchlab.core.retry_rule import RetryRule
from batchlab.sim import invariants
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt
from batchlab.sim.world import MANAGER, World
from tests.support.sim.scenes import (
    A,
    around,
    ended,
    ended_well,
    ends_well,
    in_world,
    job,
    leader,
    stage,
    submitted,
    takes,
)

TASKS, DEAD = object_keys.tasks_queue("default"), object_keys.dead_letters("default")


# --- Outages -------------------------------------------------------------------------------------


def test_a_minute_of_503_on_control_objects_fails_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, messages used up their receives during the outage and became dead letters, so healthy tasks ended as
    FAILED."""

    async def act(world: World) -> None:
        refused: list[float] = []

        async def get_if_changed(real: Any, *args: Any, **options: Any) -> object:
            if 15 < world.clock.monotonic_s() < 75:
                refused.append(world.clock.monotonic_s())
                raise Throttled("503 Slow Down")
            return await real(*args, **options)

        around(monkeypatch, world.objects, "get_if_changed", get_if_changed)
        await ends_well(world, job(stage(A, bundle=1), items=30))
        assert len(refused) > 20

    in_world(act, script=takes(2.0))


def test_task_with_failing_storage_is_not_called_poison() -> None:
    """Before, the task's start markers remained although the storage had failed. After three markers, the task was
    FAILED as poison, although no worker had died."""
    tries: list[int] = []

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task == 1:
            tries.append(scene.bundle.attempt)
            if len(tries) <= 4:
                raise Unreachable("The result could not be uploaded.")
        return ScriptedAttempt(0.3, 1)

    async def act(world: World) -> None:
        await ends_well(world, job(stage(A, bundle=1), items=3))
        assert tries == [1] * 5, "and none of the task's own attempts was used up"

    in_world(act, script=script)


def test_an_outage_of_the_queue_does_not_end_running_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the worker's receive gave up and ended the worker, and its running tasks ran again."""

    async def act(world: World) -> None:
        async def receive(real: Any, *args: Any, **options: Any) -> object:
            if 60 < world.clock.monotonic_s() < 260:
                raise Unreachable("SQS does not answer.")
            return await real(*args, **options)

        around(monkeypatch, world.queue, "receive", receive)
        await ends_well(world, job(stage(A), items=4))
        assert len(world.starts) == 4
        assert len(world.workers) == 1

    in_world(act, script=takes(600.0), pools=(Pool("default", 0, 1, 8),))


def test_queues_that_are_removed_are_made_again() -> None:
    """Before, every tick was skipped, so an emulator that forgot its queues stopped the grid."""

    async def act(world: World) -> None:
        made = job(stage(A), items=100)
        await submitted(world, made)
        await asyncio.sleep(20)
        for name in (object_keys.EVENTS, TASKS, DEAD):
            await world.queue.remove(name)
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        assert world.managers == 1
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


# --- Malformed and lost messages -----------------------------------------------------------------

DEEP = "[" * 100_000
NO_FIELDS = '{"v":1,"c":[{"b":"x"}],"h":[{}],"b":"x"}'
NO_STAGE = (
    '{"v":1,"b":{"j":"job","s":"nowhere","t":[[0,1]],"a":1},"c":[{"b":{"j":"job","s":"nowhere",'
    '"t":[[0,1]],"a":1},"w":"w","t0":0,"t1":1,"ok":[[0,1]],"no":[],"x":[],"run":1,"next":[],'
    '"re":0}]}'
)
NO_OUTCOME = '{"v":1,"k":["jobs/job/spec.json"]}'


@pytest.mark.parametrize("queue", [object_keys.EVENTS, TASKS, DEAD])
@pytest.mark.parametrize(
    "body",
    [DEEP, NO_FIELDS, NO_STAGE, NO_OUTCOME, "junk"],
    ids=["deep", "no fields", "no such stage", "no outcome", "no JSON"],
)
def test_a_malformed_message_is_dropped_and_the_manager_lives(queue: str, body: str) -> None:
    """Before, one such message killed every manager that read it, one after the other."""

    async def act(world: World) -> None:
        made = job(stage(A), items=60)
        await submitted(world, made)
        await asyncio.sleep(15)
        await world.queue.send(queue, [Outgoing(body)])
        await ended_well(world, made)
        assert world.managers == 1
        await _until_empty(world, object_keys.EVENTS, DEAD)
        assert (await leader(world)).trouble == ""
        assert [w.ended for w in world.workers.values() if w.ended == "killed by SIGKILL, exit -9"] == []

    in_world(act, script=takes(1.0))


async def _until_empty(world: World, *queues: str) -> None:
    async with asyncio.timeout(300):
        for name in queues:
            while (depth := await world.queue.depth(name)).visible + depth.in_flight:
                await asyncio.sleep(1)


def test_job_with_an_unreported_split_matches_its_rebuilt_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the halves made all tasks terminal and the job ended, but the split was never folded (I3)."""
    kills: list[int] = []

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task == 3 and len(kills) < 2:
            kills.append(len(scene.bundle.tasks))
            return ScriptedAttempt(0.1, kills_worker=True)
        return ScriptedAttempt(0.1, 1)

    async def act(world: World) -> None:
        lost: list[BundleId] = []

        async def send(real: Any, queue: str, messages: Sequence[Outgoing]) -> object:
            if queue == object_keys.EVENTS:
                messages = [await _without_splits(world, message, lost) for message in messages]
            return await real(queue, messages)

        around(monkeypatch, world.queue, "send", send)
        await ends_well(world, job(stage(A, bundle=8), items=16))
        assert lost
        assert world.clock.monotonic_s() < MANAGER.silence_s, "before the reconciler looks for it"

    in_world(act, script=script)


async def _without_splits(world: World, message: Outgoing, lost: list[BundleId]) -> Outgoing:
    events = read_events_message(message.body)
    lost += [c.bundle.id for c in events.completions if c.follows]
    lost += [o.bundle.id for o in events.outcomes if o.follows]
    kept = replace(
        events,
        completions=tuple(c for c in events.completions if not c.follows),
        outcomes=tuple(o for o in events.outcomes if not o.follows),
    )
    jobs = jobs_in(kept)
    known = {job: await CommitKeys(world.objects).stored(job) for job in jobs}
    body = with_proofs(events_message(kept), jobs, lambda job: known[job])
    return replace(message, body=body)


# --- Workers and their bundles -------------------------------------------------------------------


JOBS = frozenset({JobId("j")})


def _beat(number: int, at_s: float, *held: HeldBundle, gone: bool = False) -> Beat:
    busy = len(held)
    return Beat("w", "i", "default", at_s, 1, busy, tuple(held), number, gone=gone)


def test_worker_with_an_earlier_clock_is_heard_and_a_late_heartbeat_revives_none() -> None:
    """Before, a busy worker counted as idle and was chosen for scale-in until its clock had caught up. An ended worker
    came back to life through a late heartbeat."""

    async def act(world: World) -> None:
        registry = (await leader(world)).registry
        there = {"i": Instance("i", "default", LifecycleState.IN_SERVICE, 0.0)}
        registry.instances.update_instances(there)
        held = HeldBundle("tasks-default", "r", JobId("j"), A, BundleId("x"), True)
        await registry.receive_beat(_beat(1, 1000.0), JOBS)
        await registry.receive_beat(_beat(2, 400.0, held), JOBS)
        assert (registry.idle("default"), registry.busy("default")) == ([], ["i"])
        await registry.receive_beat(_beat(1, 1000.0), JOBS)
        assert registry.busy("default") == ["i"], "an older one changes nothing"
        await registry.receive_beat(_beat(4, 401.0, gone=True), JOBS)
        await registry.receive_beat(_beat(3, 400.5, held), JOBS)
        assert list(registry.workers) == []

    in_world(act, script=takes(1.0))


def test_a_bundle_larger_than_the_cap_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `bundle: 60000` and a failure of every other task, the message of the retry was larger than the queue's
    limit. Before, the job hung."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task % 2 and scene.bundle.attempt == 1:
            return ScriptedAttempt(0.0, failure=Failure(scene.task, FailureKind.EXCEPTION, "no"))
        return ScriptedAttempt(0.0, 1)

    async def act(world: World) -> None:
        lengths: list[int] = []

        async def send(real: Any, queue: str, messages: Sequence[Outgoing]) -> object:
            lengths.extend(len(message.body.encode()) for message in messages)
            return await real(queue, messages)

        around(monkeypatch, world.queue, "send", send)
        rule = RetryRule(attempts=2, backoff_s=0.1)
        made = job(stage(A, bundle=60_000, retry=rule), items=settlement.CAP + 10)
        await ends_well(world, made)
        rows = await world.ledger.bundles(made.id)
        assert max(len(row.bundle.tasks) for row in rows) == settlement.CAP
        assert max(lengths) <= MAX_MESSAGE_BYTES

    in_world(act, script=script)


def test_a_stage_that_needs_several_slots_is_not_starved_by_one_that_needs_one() -> None:
    """Before, the bundle was returned repeatedly while single tasks kept one of the slots busy."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        rng = random.Random(scene.task)
        return ScriptedAttempt(2.0 if scene.job.id == "big" else rng.uniform(5, 25), 1)

    async def act(world: World) -> None:
        small = job(stage(A, bundle=1), items=200)
        big = replace(job(stage(A, slots=4, bundle=1), items=1), id=JobId("big"), token="b")
        big = replace(big, priority=9)
        await submitted(world, small)
        await asyncio.sleep(60)
        since_s = world.clock.monotonic_s()
        await submitted(world, big)
        await ended(world, big)
        (began_s,) = [s[0] for s in world.starts if s[1] == big.id]
        assert began_s - since_s < 150
        assert not (await world.ledger.job(small.id)).state.ended

    in_world(act, script=script, pools=(Pool("default", 0, 1, 4),))


def test_instances_that_boot_slowly_do_not_call_for_more_of_them() -> None:
    """Before, while no task ran, the estimated task time was the time for which the job had waited."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=40)
        await ends_well(world, made)
        assert world.manager
        activities = await world.manager.ports.fleet.activities(limit=100)
        launched = [activity for activity in activities if activity.description.startswith("Launching")]
        assert len(launched) <= 2, [activity.cause for activity in activities]

    pool = Pool("default", 0, 10, 2, boot_s=90.0)
    in_world(act, script=takes(0.05), pools=(pool,), manager_settings=replace(MANAGER, drain_target_s=120.0))
