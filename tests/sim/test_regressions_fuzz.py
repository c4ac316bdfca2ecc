"""Bugs that random worlds have found, each in its smallest scene.

Each docstring describes the behavior before the fix.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from batchlab.core import commit
from batchlab.core.errors import Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, Failure, FailureKind, JobState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.ports import AddJob, Finish, MoveJob, SetControl
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.json_format import ControlCommand, control_to_bytes
from batchlab.manager import fleet_commands, ledger_rebuild
from batchlab.sim import invariants
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.users import bring_items
from batchlab.sim.world import EPOCH_S, MANAGER, World
from tests.support.sim.scenes import (
    A,
    B,
    C,
    around,
    around_change,
    ended,
    ended_well,
    ends_well,
    in_world,
    job,
    kill_manager,
    leader,
    stage,
    submitted,
    takes,
)


def test_copies_that_run_side_by_side_do_not_condemn_their_task() -> None:
    """Before, each start counted as the death of a worker. If enough copies of a task ran, the next copy marked the
    task as FAILED for killing its workers, although no worker had died."""

    async def act(world: World) -> None:
        made = job(stage(A), items=1)
        await submitted(world, made)
        while not world.starts:
            await asyncio.sleep(1)
        live = (await leader(world)).lives[made.id]
        (one,) = live.all_outstanding()
        copies = [replace(one.bundle, losses=1)] * 6
        await (await leader(world)).coordinator.send(live.job, copies)
        await ended_well(world, made)
        assert len(world.starts) >= 4

    in_world(act, script=takes(300.0), pools=(Pool("default", 6, 6, 1),))


def test_manual_request_spares_instances_that_became_busy() -> None:
    """The group learns at each tick which instances are busy. Before, a manual capacity between two ticks ended a busy
    instance although an idle one existed."""

    async def act(world: World) -> None:
        manager = await leader(world)
        while len(manager.registry.idle("default")) < 4:
            await asyncio.sleep(1)
        made = job(stage(A, bundle=1), items=3)
        await submitted(world, made)
        while len(manager.registry.busy("default")) < 3:
            await asyncio.sleep(0.1)
        (idle,) = manager.registry.idle("default")
        await world.ask(lambda m: fleet_commands.scale(m, "default", min_size=0, desired=3), "scale")
        await ended_well(world, made)
        assert len(world.starts) == 3
        assert [name for name, one in world.workers.items() if one.ended] == [idle]

    seldom = replace(MANAGER, tick_s=30.0)
    pools = (Pool("default", 4, 4, 1),)
    in_world(act, script=takes(40.0), pools=pools, manager_settings=seldom)


def test_a_scheduled_job_starts_although_the_answer_to_its_move_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the second try got the answer that the job had already moved. The manager therefore believed that the job
    was SCHEDULED, and never conducted it."""

    async def act(world: World) -> None:
        lost: list[JobState] = []

        async def move_job(real: Any, change: MoveJob) -> object:
            answer = await real(change)
            if change.state is JobState.SUBMITTED and not lost:
                lost.append(change.state)
                raise Unreachable("The connection was reset.")
            return answer

        around_change(monkeypatch, world.ledger, MoveJob, move_job)
        await ends_well(world, job(stage(A), items=3, start_at_s=EPOCH_S + 30))
        assert lost

    in_world(act, script=takes(1.0))


def test_a_cancellation_is_not_forgotten_by_a_read_that_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager read a job from the ledger, and acknowledged the user's cancellation meanwhile. Before, the older
    read replaced the cancellation: no worker ran the job, and it never ended."""

    async def act(world: World) -> None:
        async def read(original: Any, *args: Any) -> object:
            record = await original(*args)
            await asyncio.sleep(3)
            return record

        around(monkeypatch, world.ledger, "job", read)
        made = job(stage(A), items=1)
        await submitted(world, made)
        live = (await leader(world)).lives[made.id]
        while not live.outstanding:
            await asyncio.sleep(0.1)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        async with asyncio.timeout(100):
            assert (await world.ended(made.id)).state is JobState.CANCELLED

    in_world(act, script=takes(1.0))


def test_retry_right_after_the_end_is_coordinated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager had ended the job in the ledger, but had not received the answer yet. Before, the manager confused
    the new round with the ended one, and the job never ended."""

    async def act(world: World) -> None:
        async def finish(original: Any, change: Finish) -> object:
            answer = await original(change)
            await asyncio.sleep(5)
            return answer

        around_change(monkeypatch, world.ledger, Finish, finish)
        made = job(stage(A), items=3)
        await submitted(world, made)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await world.ask(lambda m: m.job_commands.retry(made.id), "retry")
        await ended_well(world, made)
        assert world.managers == 1

    in_world(act, script=takes(5.0))


def test_lost_retry_does_not_keep_its_job_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure destroyed the ledger's record of the end of a job and a retry of the job, but not the control
    object of the retry's round. Before, each leader adopted the job and gave it up again, so the job never ended."""

    async def act(world: World) -> None:
        async def finish(real: Any, change: Finish) -> object:
            if world.managers == 1:
                kill_manager(world)
                await commit.permit_round(world.objects, change.job_id, 1, Patience(Random(1)))
                raise Unreachable("the manager has ended")
            return await real(change)

        around_change(monkeypatch, world.ledger, Finish, finish)
        made = job(stage(A), items=3)
        await submitted(world, made)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        assert world.managers == 2

    in_world(act, script=takes(5.0))


def test_job_begun_by_another_manager_is_coordinated() -> None:
    """A manager that had lost its lease without noticing reopened a job, and ended. Before, the leader had read the
    ledger earlier and missed the job, which never ended."""

    async def act(world: World) -> None:
        await leader(world)
        made = job(stage(A), items=3)
        await bring_items(world, made)
        for key, data in (
            (object_keys.spec(made.id), json_format.to_bytes(json_format.job_to_json(made))),
            (object_keys.control(made.id), control_to_bytes(ControlCommand(Control.RUN))),
        ):
            await world.objects.put(key, data, if_absent=True)
        await world.ledger.apply(AddJob(made, JobState.SUBMITTED))
        await ended_well(world, made)
        assert world.managers == 1

    in_world(act, script=takes(1.0))


def test_missing_events_queue_is_created_again() -> None:
    """The manager waited for a check in the tick, which uses only the other queues. Before, no events arrived any more.
    Jobs ended only through the reconciler, and the fleet never shrank."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=20)
        await submitted(world, made)
        while len(world.starts) < 3:
            await asyncio.sleep(1)
        await world.queue.remove(object_keys.EVENTS)
        assert (await ended(world, made, within_s=100)).state is JobState.SUCCEEDED
        async with asyncio.timeout(100):
            while any(view.instances for view in await world.groups()):
                await asyncio.sleep(1)

    in_world(act, script=takes(5.0))


def test_concurrent_rebuilds_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the first rebuild was still adopting its jobs when the second one began, and cut tasks that the second
    one had not planned yet."""

    async def act(world: World) -> None:
        begun, seen = 0, []

        async def read_rows(original: Any, *args: Any) -> object:
            nonlocal begun
            begun += 1
            return await original(*args)

        async def read(original: Any, *args: Any, **kwargs: Any) -> object:
            before = begun
            await asyncio.sleep(0.2)
            seen.append(begun == before)
            return await original(*args, **kwargs)

        around(monkeypatch, ledger_rebuild, "_rows", read_rows)
        around(monkeypatch, world.ledger, "bundles", read)  # the adoption of jobs makes this call
        made = job(stage(A, bundle=1), items=30)
        await submitted(world, made)
        while len(world.starts) < 5:
            await asyncio.sleep(1)
        asking = [world.ask(lambda m: m.rebuild_ledger(), f"rebuild {n}") for n in range(3)]
        await asyncio.gather(*asking)
        assert (begun, set(seen)) == (3, {True})
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


# --- Control words that only the bucket has ------------------------------------------------------


async def _written(world: World, made: JobDef, word: json_format.ControlCommand) -> None:
    """Write the control object of a job without the change of the ledger that follows."""
    await world.objects.put(object_keys.control(made.id), control_to_bytes(word))


@pytest.mark.parametrize("dies", [True, False])
def test_cancellation_known_only_to_workers_ends_the_job(dies: bool) -> None:
    """The manager had died or lost the lead before it changed the ledger. Before, workers ended tasks as CANCELLED and
    dropped the other messages, which the leader sent again without end. A total was planned over the remaining tasks.
    """

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), stage(B, A, gather="*"), items=30)
        await submitted(world, made)
        while len(world.starts) < 10:
            await asyncio.sleep(1)
        await _written(world, made, ControlCommand(Control.CANCEL, reason="its user had enough"))
        if dies:
            kill_manager(world)
        record = await ended(world, made)
        assert (record.state, record.reason) == (JobState.CANCELLED, "its user had enough")
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(5.0))


@pytest.mark.parametrize("dies", [True, False])
def test_pause_known_only_to_workers_can_be_resumed(dies: bool) -> None:
    """Before, workers dropped the job's messages, and the leader sent them again without end."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=10)
        await submitted(world, made)
        while len(world.starts) < 3:
            await asyncio.sleep(1)
        await _written(world, made, ControlCommand(Control.PAUSE))
        if dies:
            kill_manager(world)
        async with asyncio.timeout(500):
            while (await world.ledger.job(made.id)).state is not JobState.PAUSED:
                await asyncio.sleep(1)
        begun = len(world.starts)
        await asyncio.sleep(300)
        assert len(world.starts) == begun
        await world.ask(lambda m: m.job_commands.resume(made.id), "resume")
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


def test_resume_known_only_to_workers_reaches_the_leader() -> None:
    """A manager that had lost its lease without noticing resumed the job. Before, the job stayed paused for the leader,
    and without a worker the leader could not learn of the resume."""

    async def act(world: World) -> None:
        made = job(stage(A), items=3)
        await submitted(world, made)
        await world.ask(lambda m: m.job_commands.pause(made.id), "pause")
        await asyncio.sleep(300)
        await _written(world, made, ControlCommand(Control.RUN))
        await world.ledger.apply(SetControl(made.id, Control.RUN, 0))
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


def test_a_cancelled_stage_is_fed_by_a_cut_that_only_the_bucket_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the next leader found the first cut when it closed the stage, but continued with older data. The next
    stage got no tasks, but 20 tasks in a ledger that was rebuilt from the bucket (I3)."""

    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), stage(C, B), items=20)

        async def put(original: Any, key: str, *args: Any, **kwargs: Any) -> object:
            answer = await original(key, *args, **kwargs)
            if key == object_keys.cut(made.id, A, 0, 0) and world.managers == 1:
                await original(object_keys.control(made.id), control_to_bytes(ControlCommand(Control.CANCEL)))
                kill_manager(world)
                await asyncio.sleep(0)
            return answer

        around(monkeypatch, world.objects, "put", put)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.CANCELLED
        counts = [(s.counts.planned, s.counts.cancelled) for s in (await world.ledger.rows(made.id)).stages]
        assert counts == [(20, 20)] * 3
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(5.0))


def test_late_pause_leaves_no_trace() -> None:
    """A manager wrote a pause and died, and then the job ended with its last task. Before, a ledger that was rebuilt
    from the bucket showed the job as paused (I3)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=1)
        await submitted(world, made)
        await ended_well(world, made)
        await _written(world, made, ControlCommand(Control.PAUSE))
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(5.0))


# --- A ledger that is cleared meanwhile ----------------------------------------------------------


def _emptied_when_read(monkeypatch: pytest.MonkeyPatch, world: World) -> list[str]:
    """Return a list. After a test adds a word to the list, the next read of ended bundles of stage A finds an empty
    ledger, which is rebuilt soon."""
    armed: list[str] = []
    rebuilds: list[asyncio.Task[object]] = []

    async def rebuild() -> object:
        await asyncio.sleep(3)
        return await world.ask(lambda m: m.rebuild_ledger(), "rebuild")

    async def bundles(original: Any, *args: Any, **kwargs: Any) -> object:
        if armed and not rebuilds and kwargs.get("stage") == A and kwargs.get("done"):
            await world.ledger.forget()
            rebuilds.append(asyncio.create_task(rebuild()))
            armed.append("emptied")
        return await original(*args, **kwargs)

    around(monkeypatch, world.ledger, "bundles", bundles)
    return armed


def test_a_retry_is_not_planned_from_an_emptied_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the retry was committed without the bundles that a stage still had to run, and the job never ended."""

    async def act(world: World) -> None:
        armed = _emptied_when_read(monkeypatch, world)
        made = job(stage(A, bundle=1), stage(B, A), items=5)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.FAILED
        armed.append("now")
        await world.ask(lambda m: m.job_commands.retry(made.id), "retry")
        await ended_well(world, made)
        assert armed == ["now", "emptied"]

    def fails_at_first(scene: AttemptInput) -> ScriptedAttempt:
        if scene.stage.name == B and not scene.bundle.round:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return ScriptedAttempt(1.0, failure=failure)
        return ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item))

    in_world(act, script=fails_at_first)


def test_a_total_is_not_planned_from_an_emptied_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the total was planned over the results in the ledger, which was empty (I1)."""

    async def act(world: World) -> None:
        armed = _emptied_when_read(monkeypatch, world)
        armed.append("now")
        made = job(stage(A, bundle=1), stage(B, A, gather="*"), items=5)
        await submitted(world, made)
        await ended_well(world, made)
        await invariants.check_results(world, made)
        assert armed == ["now", "emptied"]

    in_world(act, script=takes(1.0))
