"""Schedules in virtual time: the commands of a user, and the parameters of a run."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.core.errors import NotFound, Refused, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import JobState
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import Missed, Overlap, RunState, ScheduledRun
from batchlab.sim.world import World
from tests.support.sim.scenes import kill_manager, leader
from tests.support.sim.schedule_scenes import (
    BERLIN,
    MINUTE,
    added,
    ask,
    begins,
    definition,
    in_time,
    jobs,
    shown,
    states,
    template,
    until,
)


def test_runs_due_during_a_pause_are_skipped() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *", missed=Missed.RUN_ALL, overlap=Overlap.QUEUE))
        await until(world, "2026-03-02T10:01:00")
        await ask(world, lambda s: s.pause("nightly"))
        assert isinstance(await ask(world, lambda s: s.pause("nightly")), Refused)
        kill_manager(world)
        await until(world, "2026-03-02T10:17:00")
        assert (await shown(world)).next_s() is None
        by_hand = await ask(world, lambda s: s.run_now("nightly", "mine"))
        assert by_hand[1].state is RunState.RUNNING
        await until(world, "2026-03-02T10:18:00")
        await ask(world, lambda s: s.resume("nightly"))
        await until(world, "2026-03-02T10:21:00")
        assert states(await shown(world)) == ["10:00 SUCCEEDED", "10:17 SUCCEEDED", "10:20 SUCCEEDED"]

    in_time(act)


def test_repeated_manual_run_is_one_run() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("0 * * * *"))
        for _ in range(2):
            await ask(world, lambda s: s.run_now("nightly", "mine"))
        assert len((await shown(world)).runs) == 1
        # The schedule skips a second run while the first one is running, and the request is refused.
        assert isinstance(await ask(world, lambda s: s.run_now("nightly", "other")), Refused)
        await asyncio.sleep(MINUTE)
        await ask(world, lambda s: s.run_now("nightly", "other"))
        await asyncio.sleep(MINUTE)
        runs: tuple[ScheduledRun, ...] = (await shown(world)).runs
        assert [run.result for run in runs if run.asked] == ["SUCCEEDED", "SUCCEEDED"]

    in_time(act)


def test_schedule_changes_only_on_purpose_and_keeps_its_runs() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        same = await ask(world, lambda s: s.add(definition("*/5 * * * *"), template(), replacing=False))
        assert same[1] is False
        other = definition("*/2 * * * *", source_digest="f")
        refused = await ask(world, lambda s: s.add(other, template(), replacing=False))
        assert isinstance(refused, Refused)
        assert "when it is due and the job file, or what it names" in refused.message
        await ask(world, lambda s: s.add(other, template(priority=5), replacing=True))
        await until(world, "2026-03-02T10:04:30")
        assert states(await shown(world)) == ["10:00 SUCCEEDED", "10:02 SUCCEEDED", "10:04 SUCCEEDED"]
        newest = (await world.ledger.jobs(limit=1))[0].job.job
        assert newest.priority == 5

    in_time(act)


def test_removed_schedule_frees_its_name() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:00:10")
        await ask(world, lambda s: s.remove("nightly"))
        await until(world, "2026-03-02T10:06:00")
        assert await jobs(world) == ["2026-03-02T10:00:00+00:00"]
        manager = await leader(world)
        assert manager.scheduler
        assert await manager.scheduler.all() == []
        with pytest.raises(NotFound):
            await manager.scheduler.get("nightly")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:11:00")
        schedule = await shown(world)
        assert schedule.generation == 2
        assert states(schedule) == ["10:10 SUCCEEDED"]

    in_time(act, run_s=20.0)


def test_objects_below_a_prefix_are_the_input_of_each_run() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        job = template(input=InputDef(("raw/incoming/",), SplitBy.ITEMS))
        await added(world, definition("*/5 * * * *"), job)
        await until(world, "2026-03-02T10:03:00")
        await world.objects.put("raw/incoming/a.jsonl", b"1\n2\n")
        await until(world, "2026-03-02T10:07:00")
        await world.objects.put("raw/incoming/b.jsonl", b"3\n")
        await until(world, "2026-03-02T10:12:00")
        schedule = await shown(world)
        assert states(schedule) == ["10:00 skipped", "10:05 SUCCEEDED", "10:10 SUCCEEDED"]
        assert schedule.runs[0].reason == "there was no object in raw/incoming/"
        assert [run.tasks for run in schedule.runs[1:]] == [2, 3]

    in_time(act)


def test_a_job_may_know_when_it_was_due() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        job = template(params=(("month", ""), ("rate", 2)))
        await added(world, definition("0 11 * * *", BERLIN, due_param="month"), job)
        await until(world, "2026-03-02T10:01:00")
        (rows,) = await world.ledger.jobs()
        assert dict(rows.job.job.params) == {"month": "2026-03-02T11:00:00+01:00", "rate": 2}
        assert rows.job.state is JobState.SUCCEEDED
        wrong = definition(name="wrong", due_param="nothing")
        with pytest.raises(UsageError, match="not have a parameter 'nothing'"):
            await ask(world, lambda s: s.add(wrong, job, replacing=False))

    in_time(act)


def test_job_that_no_longer_fits_the_grid_is_refused_and_reported() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        manager = await leader(world)
        del manager.pools["default"]  # the grid was started again with other pools
        await until(world, "2026-03-02T10:01:00")
        (run,) = (await shown(world)).runs
        assert (run.state, run.result) == (RunState.ENDED, "REFUSED")
        assert "names the pool 'default'" in run.reason

    in_time(act)


def test_unreadable_schedule_does_not_block_the_others() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        for name, data in {"later": b'{"v": 99}', "broken": b'{"v": 1}', "none": b"<"}.items():
            await world.objects.put(object_keys.schedule(name), data)
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]
        other = definition(name="broken")
        refused = await ask(world, lambda s: s.add(other, template(), replacing=True))
        assert isinstance(refused, Refused)
        assert "cannot read" in refused.message
        assert await world.objects.get(object_keys.schedule("broken")) == b'{"v": 1}'

    in_time(act)
