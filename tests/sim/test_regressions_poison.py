"""Start markers of suspect tasks, and which of them count against a task.

Each docstring describes the behavior before the fix.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, FailureKind, JobId, JobState, Pool, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Message
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim import invariants
from batchlab.sim.actors import CURRENT, Actor
from batchlab.sim.runtime_checks import BEGIN_S
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, TaskPlans, value_of
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Identity, InflightMessage, WorkerContext
from batchlab.worker.outbox import Outbox
from batchlab.worker.poison_detection import PoisonDetector
from tests.support.sim.scenes import A, around, ended, in_world, job, leader, stage, submitted, takes

STALE_S = 20.0


def suspect(task: int) -> Bundle:
    return Bundle(JobId("job"), A, TaskSet.from_indices([task]), losses=1)


def in_hand(bundle: Bundle, execution: str) -> InflightMessage:
    message = Message("m", "", "receipt", 1, 0.0, 0.0)
    return InflightMessage("tasks", message, TaskMessage(bundle), execution, 0.0, 0.0, "receipt")


def beginner(world: World, worker: str) -> PoisonDetector:
    patience = Patience(random.Random(1))
    context = WorkerContext(
        Identity(worker, "i-1", "default", 1),
        world.objects,
        world.queue,
        world.clock,
        patience,
        WorkerSettings(visibility_s=STALE_S),
        Outbox(world.queue, patience),
    )
    return PoisonDetector(context, asyncio.Event())


def test_withdrawn_start_marker_is_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewal of a start marker was written after its withdrawal. Before, the marker looked like the start of a
    dead worker. After three such markers, an innocent task was FAILED as poison."""
    bundle = suspect(0)

    async def act(world: World) -> None:
        renewing: list[str] = []

        async def put(real: Any, key: str, *args: Any, **options: Any) -> object:
            if key.endswith("-1.1"):
                renewing.append(key)
                await asyncio.sleep(3)
            return await real(key, *args, **options)

        around(monkeypatch, world.objects, "put", put)
        for number in range(LOSS_LIMIT):
            renewing.clear()
            suspects, inflight = beginner(world, f"w{number}"), in_hand(bundle, f"w{number}-1")
            await suspects.begin(inflight)
            keeper = asyncio.create_task(suspects.run())
            while not renewing:
                await asyncio.sleep(1)
            await suspects.withdraw(inflight)
            await asyncio.sleep(STALE_S)
            keeper.cancel()
        keys = [one.key async for page in world.objects.list("jobs/") for one in page]
        assert len(keys) == 3 * LOSS_LIMIT, "a start, a renewal, and a withdrawal of each"
        assert await beginner(world, "w").verdict(in_hand(bundle, "w-1")) is None

    in_world(act, script=takes(1.0))


def test_a_worker_killed_between_a_written_start_and_the_task_has_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task killed the worker while the start marker was being acknowledged. The grid correctly counts this
    start against the task. Before, the simulator's check counted only tasks that ran, and reported an error."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(0.1, kills_worker=True)

    async def act(world: World) -> None:
        async def put(real: Any, key: str, *args: Any, **options: Any) -> object:
            answer = await real(key, *args, **options)
            dying = CURRENT.get()
            if "/starts/" in key and dying:
                asyncio.get_running_loop().call_later(0.0, dying.kill)
            return answer

        around(monkeypatch, world.objects, "put", put)
        made = job(stage(A), items=1)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.FAILED
        assert len(world.starts) == 1
        outcomes = await invariants.outcomes_of(world.objects, made.id)
        assert [f.kind for o in outcomes for f in o.failed] == [FailureKind.LOST]
        invariants.check_failures(world, TaskPlans(1, [0.1]), made, outcomes)

    in_world(act, script=script)


def test_a_start_counts_only_where_its_worker_died_at_once() -> None:
    """A marker that was written while the task waited, or that was withdrawn, does not justify marking the task as
    poison."""

    async def act(world: World) -> None:
        bundle = suspect(0)
        await leader(world)

        async def lost(worker: str, *, after_s: float = 0.0, withdrawn: bool = False) -> int:
            actor, key = Actor(worker), object_keys.starts(bundle) + worker
            world.watch.on_call(actor, "objects.put", (key, b""), '"1"')
            if withdrawn:
                world.watch.on_call(actor, "objects.put", (f"{key}.{object_keys.WITHDRAWN}", b""), '"2"')
            await asyncio.sleep(after_s)
            world.watch.on_kill(actor)
            return world.watch.lost_starts(bundle, 0)

        assert await lost("w-waits", after_s=2 * BEGIN_S) == 0
        assert await lost("w-gives-back", withdrawn=True) == 0
        assert await lost("w-begins") == 1
        assert world.watch.lost_starts(suspect(1), 1) == 0

    in_world(act, script=takes(1.0))


@pytest.mark.parametrize("kills_after_s", [0.5, 2.0, 6.0])
def test_task_beside_a_poisonous_one_is_not_called_poison(kills_after_s: float) -> None:
    """Before, in a worker of several slots, a task that ran three times next to a poison task looked as if it had
    killed three workers."""
    poison = {3, 17, 30}

    def script(scene: AttemptInput) -> ScriptedAttempt:
        is_poison = scene.item in poison
        run_s = kills_after_s if is_poison else 3.0
        return ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item), kills_worker=is_poison)

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=40, max_failures=40)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        outcomes = await invariants.outcomes_of(world.objects, made.id)
        failed = {failure.task for outcome in outcomes for failure in outcome.failed}
        assert failed == poison

    in_world(act, script=script, pools=(Pool("default", 0, 2, 4),))


def test_bundle_that_waits_in_vain_for_a_whole_worker_releases_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a suspect that waited for all slots kept the worker from receiving, and two slots were idle until another
    task ended."""
    lasts_s = {"neighbour": 4000.0, "suspect": 3500.0}
    suspicion = InflightMessage.suspicion
    monkeypatch.setattr(
        InflightMessage,
        "suspicion",
        property(lambda inflight: 1 if inflight.bundle.job == "suspect" else suspicion.__get__(inflight)),
    )

    async def act(world: World) -> None:
        async def begun(name: str, tasks: int) -> JobDef:
            made = job(stage(A, bundle=1), items=tasks, id=JobId(name), token=name)
            await submitted(world, made)
            return made

        await begun("neighbour", 1)
        while not world.starts:
            await asyncio.sleep(1.0)
        tried = Bundle(JobId("suspect"), A, TaskSet.from_indices([0]))
        for worker in ("w-a", "w-b"):
            await world.objects.put(object_keys.starts(tried) + f"{worker}-1", b"{}")
        await begun("suspect", 1)
        while len(world.starts) < 2:
            await asyncio.sleep(1.0)
        after = await begun("after", 4)
        assert (await ended(world, after, within_s=600.0)).state is JobState.SUCCEEDED

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(lasts_s.get(scene.job.id, 3.0), value_of(scene.stage.name, scene.item))

    in_world(act, script=script, pools=(Pool("default", 1, 1, 4),))
