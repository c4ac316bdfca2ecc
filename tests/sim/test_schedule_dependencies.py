"""Runs of a schedule that wait for the latest run of another schedule."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import Failure, FailureKind, JobId
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import RunState, Schedule, When
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt
from batchlab.sim.world import World
from tests.support.sim.scenes import in_world, kill_manager
from tests.support.sim.schedule_scenes import (
    BRISK,
    added,
    ask,
    begins,
    definition,
    in_time,
    jobs,
    states,
    template,
    until,
)

HOURLY = "0 * * * *"
REPORT = template(id=JobId("report-template"), name="report")


async def _both(world: World, condition: str = "", cron: str = HOURLY) -> None:
    """Add the schedule `nightly`, and a schedule that waits for it. The waiting schedule is the first by name."""
    begins(world, "2026-03-02T09:58:30")
    await added(world, definition(HOURLY))
    await added(world, definition(cron, name="a-report", job="report", after=(f"nightly{condition}",)), REPORT)


async def _schedule(world: World, name: str) -> Schedule:
    found = await ask(world, lambda s: s.get(name))
    assert isinstance(found, Schedule)
    return found


@pytest.mark.parametrize("kills", [False, True])
def test_a_run_waits_for_the_run_at_the_same_due_time(kills: bool) -> None:
    async def act(world: World) -> None:
        await _both(world)
        await until(world, "2026-03-02T10:00:30")
        if kills:
            kill_manager(world)
            await asyncio.sleep(30.0)
        (run,) = (await _schedule(world, "a-report")).runs
        (first,) = (await _schedule(world, "nightly")).runs
        assert (run.state, run.after) == ("running", (f"{first.job}:succeeded",))
        await until(world, "2026-03-02T10:08:00")
        assert states(await _schedule(world, "a-report")) == ["10:00 SUCCEEDED"]
        records = [await world.ledger.job(JobId(one.job or "")) for one in (first, run)]
        starts = [min(at_s for at_s, job, _, _ in world.starts if job == record.job.id) for record in records]
        assert starts[1] - starts[0] > 100.0
        assert len(await world.ledger.jobs(limit=10)) == 2

    in_time(act, run_s=100.0)


@pytest.mark.parametrize(("condition", "result"), [("", "REFUSED"), (":ended", "SUCCEEDED")])
def test_a_failed_run_of_the_other_schedule_counts_by_the_condition(condition: str, result: str) -> None:
    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.job.name == "report":
            return ScriptedAttempt(1.0, {"n": 1})
        return ScriptedAttempt(1.0, failure=Failure(scene.task, FailureKind.EXCEPTION, "it fails"))

    async def act(world: World) -> None:
        await _both(world, condition, "5 * * * *")
        await until(world, "2026-03-02T10:08:00")
        schedule = await _schedule(world, "a-report")
        assert states(schedule) == [f"10:05 {result}"]
        assert ("must succeed, and ended FAILED" in schedule.runs[0].reason) == (result == "REFUSED")

    in_world(act, script=script, manager_settings=BRISK, schedules=True)


def test_the_first_run_does_not_wait_and_a_met_condition_is_left_out() -> None:
    async def act(world: World) -> None:
        await _both(world, cron="59,5 9-10 * * *")
        await until(world, "2026-03-02T10:08:00")
        schedule = await _schedule(world, "a-report")
        assert states(schedule) == ["09:59 SUCCEEDED", "10:05 SUCCEEDED"]
        assert [run.after for run in schedule.runs] == [(), ()]

    in_time(act)


def test_schedules_do_not_wait_in_a_circle() -> None:
    async def act(world: World) -> None:
        await _both(world)
        circle = definition(HOURLY, after=("a-report:ended",))
        with pytest.raises(UsageError, match="Schedule nightly would wait for itself"):
            await ask(world, lambda s: s.add(circle, template(), replacing=True))
        own = definition(when=When(HOURLY), name="own", after=("own",))
        with pytest.raises(UsageError, match="would wait for itself"):
            await ask(world, lambda s: s.add(own, template(), replacing=False))

    in_time(act)


def test_a_schedule_for_which_another_one_waits_is_not_deleted() -> None:
    async def act(world: World) -> None:
        await _both(world)
        refused = await ask(world, lambda s: s.remove("nightly"))
        assert isinstance(refused, Refused)
        assert refused.message == "Schedule a-report waits for schedule nightly."
        await ask(world, lambda s: s.remove("a-report"))
        assert not isinstance(await ask(world, lambda s: s.remove("nightly")), Refused)

    in_time(act)


def test_a_run_is_skipped_if_the_schedule_for_which_it_waits_cannot_be_read() -> None:
    async def act(world: World) -> None:
        await _both(world)
        await world.objects.put(object_keys.schedule("nightly"), b'{"v": 99}')
        kill_manager(world)
        await until(world, "2026-03-02T10:02:00")
        (run,) = (await _schedule(world, "a-report")).runs
        assert run.state is RunState.SKIPPED
        assert run.reason == "the schedule nightly, for which it waits, cannot be read"
        assert await jobs(world) == []

    in_time(act)
