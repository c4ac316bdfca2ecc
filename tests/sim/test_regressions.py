"""Bugs that a review found in user requests and in the change of leaders.

Each docstring describes the behavior before the fix. Bugs with lost messages and services are in
test_regressions_services.py.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Refused
from batchlab.core.model import Control, Failure, FailureKind, JobId, JobState
from batchlab.core.ports import AddCut, Finish, SetControl, SetPlanned
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager import ledger_rebuild
from batchlab.sim import invariants
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt
from batchlab.sim.users import bring_items
from batchlab.sim.world import EPOCH_S, World
from tests.support.sim.scenes import (
    A,
    B,
    C,
    around,
    around_change,
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


def conducting(job_id: JobId) -> int:
    """Return the number of tasks in the event loop that conduct this job."""
    return sum(task.get_name() == f"job {job_id}" for task in asyncio.all_tasks())


# --- Requests ------------------------------------------------------------------------------------


def test_cancelling_a_scheduled_job_ends_it_at_once() -> None:
    """Before, the job stayed SCHEDULED until its start time, because a scheduled job was never advanced."""

    async def act(world: World) -> None:
        made = job(stage(A), items=5, start_at_s=EPOCH_S + 20_000)
        await submitted(world, made)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        acknowledged_s = world.clock.monotonic_s()
        record = await ended(world, made)
        assert record.state is JobState.CANCELLED
        assert world.clock.monotonic_s() - acknowledged_s < 5
        assert world.starts == []
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


@pytest.mark.parametrize("slow_s", [1.5, 3.0])
def test_a_slow_resume_does_not_undo_an_acknowledged_cancel(slow_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the "run" of the resume reached the bucket after the "cancel" (I4)."""

    async def act(world: World) -> None:
        slow: list[float] = []

        async def put(real: Any, key: str, data: bytes, **options: Any) -> object:
            word = json_format.control_from_bytes(data).control if key.endswith("control.json") else None
            if word is Control.RUN and slow:
                await asyncio.sleep(slow.pop())
            return await real(key, data, **options)

        around(monkeypatch, world.objects, "put", put)
        made = job(stage(A, bundle=50), items=400)
        await submitted(world, made)
        await asyncio.sleep(20)
        await world.ask(lambda m: m.job_commands.pause(made.id), "pause")
        await asyncio.sleep(10)
        slow.append(slow_s)
        resuming = asyncio.create_task(world.ask(lambda m: m.job_commands.resume(made.id), "resume"))
        await asyncio.sleep(0.2)
        answer = await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        acknowledged_s = world.clock.monotonic_s()
        assert answer is None
        await resuming
        record = await ended(world, made)
        assert record.state is JobState.CANCELLED
        await asyncio.sleep(60)
        assert not slow
        assert not [start for start in world.starts if start[1] == made.id and start[0] > acknowledged_s]
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(0.3))


def test_resuming_a_job_that_is_not_paused_is_refused_and_sends_nothing() -> None:
    """Before, the resume was accepted, and every outstanding bundle was sent again."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=1), items=40)
        await submitted(world, made)
        manager = await leader(world)
        while not manager.lives[made.id].all_outstanding():
            await asyncio.sleep(0.5)
        before = await world.queue.depth("tasks-default")
        answer = await world.ask(lambda m: m.job_commands.resume(made.id), "resume")
        assert isinstance(answer, Refused)
        assert "not paused" in str(answer)
        after = await world.queue.depth("tasks-default")
        assert after.visible + after.in_flight <= before.visible + before.in_flight
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        assert len(world.starts) == 40
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


def test_two_submissions_at_once_with_one_token_make_one_live_job() -> None:
    """Before, both submissions were adopted. Two conductors each had half of the outstanding bundles, and one hung."""

    async def act(world: World) -> None:
        made = job(stage(A), items=40)
        await bring_items(world, made)
        await leader(world)
        await asyncio.gather(world.submit(made), world.submit(made))
        assert conducting(made.id) == 1
        await asyncio.sleep(16)
        manager = await leader(world)
        known = {one.bundle.id for one in manager.lives[made.id].all_outstanding()}
        rows = {row.bundle.id for row in await world.ledger.bundles(made.id, done=False)}
        assert known
        assert known == rows
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await asyncio.sleep(60)
        assert conducting(made.id) == 0
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(5.0))


# --- Changes of the leader -----------------------------------------------------------------------


def test_counters_are_right_when_the_leader_dies_before_feeding_a_stage_of_a_cancelled_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, the number of tasks of the next stage was never set, which caused negative counts (I2)."""

    async def act(world: World) -> None:
        died: list[int] = []

        async def set_planned(real: Any, change: SetPlanned) -> object:
            if not died:
                died.append(world.managers)
                word = json_format.ControlCommand(Control.CANCEL, JobState.CANCELLED, "cancelled by its user")
                await world.objects.put(object_keys.control(change.job_id), json_format.control_to_bytes(word))
                await world.ledger.apply(SetControl(change.job_id, Control.CANCEL, 0))
                kill_manager(world)
                await asyncio.sleep(0)
            return await real(change)

        around_change(monkeypatch, world.ledger, SetPlanned, set_planned)
        made = job(stage(A), stage(B, A), items=30)
        await submitted(world, made)
        record = await ended(world, made)
        assert (died, record.state) == ([1], JobState.CANCELLED)
        for one in (await world.ledger.rows(made.id)).stages:
            counts = one.counts
            assert counts.planned == 30
            assert min(counts.succeeded, counts.failed, counts.cancelled) >= 0
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


def test_a_job_stopped_for_a_wrong_plan_ends_failed_with_the_reason_though_the_leader_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, the next leader saw only "cancel", and reported that the user had canceled the job."""

    async def act(world: World) -> None:
        died: list[int] = []

        async def set_control(real: Any, change: SetControl) -> object:
            answer = await real(change)
            if not died:
                died.append(world.managers)
                kill_manager(world)
                await asyncio.sleep(0)
            return answer

        around_change(monkeypatch, world.ledger, SetControl, set_control)
        made = job(stage(A), items=5)
        await world.submit(made)  # the items of the job are missing
        record = await ended(world, made)
        assert (died, record.state) == ([1], JobState.FAILED)
        assert world.managers == 2
        assert "has items of its own, but neither" in record.reason
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


def test_a_retry_is_finished_by_the_next_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the job hung in its new round. The ledger had reopened the job, but did not contain a bundle to run."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.bundle.round == 0:
            return ScriptedAttempt(0.1, failure=Failure(scene.task, FailureKind.EXCEPTION, "no"))
        return ScriptedAttempt(0.1, 1)

    async def act(world: World) -> None:
        died: list[int] = []
        asked_s: list[float | None] = []
        retried_s: list[float | None] = []

        async def add_cut(real: Any, change: AddCut) -> object:
            if change.cut.round == 1 and not died:
                died.append(world.managers)
                asked_s.append(change.cut.at_s)
                kill_manager(world)
                await asyncio.sleep(0)
            return await real(change)

        async def finish(real: Any, change: Finish) -> object:
            manager = await leader(world)
            retried_s.append(manager.lives[made.id].retried_s)
            return await real(change)

        around_change(monkeypatch, world.ledger, AddCut, add_cut)
        around_change(monkeypatch, world.ledger, Finish, finish)
        made = job(stage(A), items=5)
        await submitted(world, made)
        assert (await ended(world, made)).state is JobState.FAILED
        await world.ask(lambda m: m.job_commands.retry(made.id), "retry")
        record = await ended(world, made)
        assert (died, record.state, record.round) == ([1], JobState.SUCCEEDED, 1)
        assert retried_s == [None, *asked_s], "the next leader knows when it was asked for"
        await invariants.check_all(world, [made.id])

    in_world(act, script=script)


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_managers_with_different_clocks_do_not_steal_the_lease(off_s: float) -> None:
    """Before, the managers took the lease from each other forever, and neither shrank the fleet (seed 223 of the
    simulator)."""

    async def act(world: World) -> None:
        first = await leader(world)
        world.start_manager()
        standby = world.manager_processes[-1]
        standby.clock.off_s += off_s
        await asyncio.sleep(600)
        assert first.is_leader.is_set()
        assert not standby.manager.is_leader.is_set()
        kill_manager(world)
        await asyncio.sleep(30)
        assert standby.manager.is_leader.is_set(), "it waits for the lease by its own watch"

    in_world(act, script=takes(0.5))


def test_the_lead_is_taken_over_although_the_clock_was_set_back_by_an_hour() -> None:
    """Before, the dead leader's lease seemed valid for another hour, and no manager led until then."""

    async def act(world: World) -> None:
        made = job(stage(A), items=100)
        await submitted(world, made)
        await asyncio.sleep(15)
        world.clock.jump(-3600)
        kill_manager(world)
        killed_s = world.clock.monotonic_s()
        await asyncio.sleep(5)
        manager = await leader(world)
        assert manager.owner == "manager-2"
        assert world.clock.monotonic_s() - killed_s < 30
        await ended_well(world, made)

    in_world(act, script=takes(0.5))


def test_the_ledger_may_be_rebuilt_at_any_time_while_a_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, cuts or folds between the clearing and the replay made earlier cuts look known. The ledger lost their
    bundles, and the job hung or broke I3."""

    async def act(world: World) -> None:
        cutting = asyncio.Event()

        async def add_cut(real: Any, change: AddCut) -> object:
            if not cutting.is_set():
                cutting.set()
                await asyncio.sleep(0.5)  # the rebuild begins before this cut is in the ledger
            return await real(change)

        async def read_rows(real: Any, *args: Any) -> object:
            answer = await real(*args)
            await asyncio.sleep(1.5)  # this cut is written before the rebuild reads the bucket
            return answer

        around_change(monkeypatch, world.ledger, AddCut, add_cut)
        around(monkeypatch, ledger_rebuild, "_rows", read_rows)
        made = job(stage(A, bundle=2), stage(B, A), stage(C, B, gather="key"), items=120)
        await submitted(world, made)
        for at_s in (3.0, 9.0, 17.3, 24.1, 31.7):
            await asyncio.sleep(at_s - world.clock.monotonic_s())
            cutting.clear()
            with suppress(TimeoutError):  # at the end, no tasks are left to cut
                await asyncio.wait_for(cutting.wait(), 2)
            assert not (await world.ledger.job(made.id)).state.ended
            assert (await (await leader(world)).rebuild_ledger()).jobs == 1
            assert conducting(made.id) == 1
        record = await ended(world, made)
        assert (record.state, world.managers) == (JobState.SUCCEEDED, 1)
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(0.5))


# --- Vanished inputs -----------------------------------------------------------------------------


def test_tasks_with_vanished_inputs_fail_with_a_reason_and_other_jobs_continue() -> None:
    """Before, the manager met the missing part repeatedly, and no job was cut any more (I7)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=100)
        other = replace(job(stage(A), items=20), id=JobId("other"), token="o")
        await submitted(world, made)
        await asyncio.sleep(25)
        async for page in world.objects.list(f"jobs/{made.id}/a/plan/"):
            await world.objects.delete([info.key for info in page if "part-" in info.key])
        kill_manager(world)  # this manager remembers the parts, but the next one does not
        await submitted(world, other)
        record = await ended(world, made)
        assert record.state is JobState.FAILED
        assert "its input no longer exists" in record.reason
        assert (await ended(world, other)).state is JobState.SUCCEEDED
        (counts,) = [s.counts for s in (await world.ledger.rows(made.id)).stages]
        assert counts.succeeded > 0
        assert counts.failed > 0
        await invariants.check_all(world, [made.id, other.id])

    in_world(act, script=takes(1.0))


def test_a_gather_over_results_that_have_vanished_fails_its_job_with_a_reason() -> None:
    """Before, the planning met the missing outcome repeatedly, without an end (I7)."""

    async def act(world: World) -> None:
        deleted: list[str] = []
        made = job(stage(A), stage(B, A, gather="key"), items=30)
        await submitted(world, made)
        while not deleted:
            await asyncio.sleep(0.5)
            async for page in world.objects.list(f"jobs/{made.id}/a/outcomes/"):
                deleted += [info.key for info in page]
        await world.objects.delete(deleted[:1])
        record = await ended(world, made)
        assert record.state is JobState.FAILED
        assert "results of stage a have vanished" in record.reason

    in_world(act, script=takes(1.0))


def test_a_gather_over_a_large_result_that_has_vanished_fails_its_job_with_a_reason() -> None:
    """Before, the planning met the missing object repeatedly, without an end (I7)."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(0.5, {"$value": "files/job/a/gone.json"})

    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A, gather="key"), items=3)
        await submitted(world, made)
        record = await ended(world, made)
        assert record.state is JobState.FAILED
        assert "results of stage a have vanished" in record.reason
        await invariants.check_all(world, [made.id])

    in_world(act, script=script)
