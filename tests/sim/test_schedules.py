"""Schedules in virtual time. Each due time runs once, in spite of kills, missed times, and clock changes."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.schedules import Missed, Overlap, Schedule, When, token_of
from batchlab.sim.world import World
from tests.support.sim.scenes import kill_manager, leader
from tests.support.sim.schedule_scenes import (
    BERLIN,
    BRISK,
    HOUR,
    LORD_HOWE,
    MINUTE,
    UNHURRIED,
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

# --- Due times -----------------------------------------------------------------------------------


def test_schedule_runs_at_each_due_time_and_records_each_end() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:12:00")
        schedule = await shown(world)
        assert states(schedule) == ["10:00 SUCCEEDED", "10:05 SUCCEEDED", "10:10 SUCCEEDED"]
        for run in schedule.runs:
            assert run.job
            record = await world.ledger.job(run.job)
            assert record.job.token == run.token == token_of(schedule, run.due_s)
            assert run.started_s is not None
            assert 0 <= run.started_s - run.due_s < 2 * BRISK.tick_s
            assert run.ended_s == record.ended_s
            assert run.tasks == 1

    in_time(act)


SPRING_B, SPRING_L = "2026-03-28T23:30", "2026-10-03T14:50"
AUTUMN_B, AUTUMN_L = "2026-10-24T23:30", "2026-04-04T13:50"
"""Times shortly before the clock changes in spring and autumn. In Berlin, 02:00 to 03:00 is skipped in spring and
repeated in autumn. On Lord Howe Island, 02:00 to 02:30 is skipped, and 01:30 to 02:00 is repeated."""


@pytest.mark.parametrize(
    ("zone", "begin", "hours", "cron", "due"),
    [
        (BERLIN, SPRING_B, 27, "30 2 * * *", "29 03:00+0200, 30 02:30+0200"),
        (LORD_HOWE, SPRING_L, 27, "15 2 * * *", "04 02:30+1100, 05 02:15+1100"),
        (BERLIN, AUTUMN_B, 27, "30 2 * * *", "25 02:30+0200, 26 02:30+0100"),
        (LORD_HOWE, AUTUMN_L, 27, "45 1 * * *", "05 01:45+1100, 06 01:45+1030"),
        # An expression with * as its minute or hour follows the clock.
        (BERLIN, SPRING_B, 3, "0 * 29 * *", "29 01:00+0100, 29 03:00+0200, 29 04:00+0200"),
        (BERLIN, AUTUMN_B, 3, "0 * 25 * *", "25 02:00+0200, 25 02:00+0100, 25 03:00+0100"),
        (LORD_HOWE, AUTUMN_L, 3, "*/30 1 5 * *", "05 01:00+1100, 05 01:30+1100, 05 01:30+1030"),
        (LORD_HOWE, SPRING_L, 3, "*/20 3 4 * *", "04 03:00+1100, 04 03:20+1100, 04 03:40+1100"),
    ],
)
def test_clock_change_is_handled_as_by_cron(zone: str, begin: str, hours: int, cron: str, due: str) -> None:
    async def act(world: World) -> None:
        begins(world, begin)
        await added(world, definition(cron, zone))
        await asyncio.sleep(hours * HOUR + 5 * MINUTE)
        runs = (await shown(world)).runs
        ran = [f"{datetime.fromtimestamp(run.due_s, ZoneInfo(zone)):%d %H:%M%z}" for run in runs]
        assert ran[: due.count(",") + 1] == due.split(", ")
        assert len(await jobs(world)) == len(runs)

    in_time(act, **UNHURRIED)


def test_once_is_once() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:00:00")
        at_s = world.clock.now_s() + HOUR
        await added(world, definition(when=When(at_s=at_s)))
        await asyncio.sleep(3 * HOUR)
        schedule = await shown(world)
        assert states(schedule) == ["10:00 SUCCEEDED"]
        assert schedule.next_s() is None
        past = definition(when=When(at_s=at_s), name="past")
        with pytest.raises(UsageError, match="past"):
            await ask(world, lambda s: s.add(past, template(), replacing=False))

    in_time(act, **UNHURRIED)


# --- Death ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(8))
def test_a_manager_killed_around_a_due_time_leaves_one_run_of_it(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager dies directly before or after its n-th call of the bucket from then on."""

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T09:59:59.9")
        manager = await leader(world)
        put, seen = manager.ports.objects.put, 0

        async def dying(*args: Any, **kwargs: Any) -> str:
            nonlocal seen
            seen += 1
            if seen == call // 2 + 1 and call % 2 == 0:
                kill_manager(world)
            answer = await put(*args, **kwargs)
            if seen == call // 2 + 1 and call % 2 == 1:
                kill_manager(world)
            await asyncio.sleep(0)
            return answer

        monkeypatch.setattr(manager.ports.objects, "put", dying)
        await until(world, "2026-03-02T10:07:00")
        assert world.managers == 2
        assert states(await shown(world)) == ["10:00 SUCCEEDED", "10:05 SUCCEEDED"]
        assert await jobs(world) == ["2026-03-02T10:00:00+00:00", "2026-03-02T10:05:00+00:00"]
        assert len(world.starts) == len({start[1:] for start in world.starts}) == 2

    in_time(act)


def test_two_managers_that_both_believe_to_lead_run_a_due_time_once() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        first = await leader(world)
        world.start_manager()
        second = world.manager_processes[-1].manager
        # The first manager was paused, and has not noticed that another one leads.
        assert second.scheduler
        rival = asyncio.create_task(second.scheduler.run())
        await until(world, "2026-03-02T10:12:00")
        rival.cancel()
        assert first.is_leader.is_set()
        assert states(await shown(world)) == ["10:00 SUCCEEDED", "10:05 SUCCEEDED", "10:10 SUCCEEDED"]
        assert len(await jobs(world)) == 3

    in_time(act)


def test_schedules_and_runs_survive_a_lost_ledger() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        kill_manager(world)
        await world.ledger.forget()
        await asyncio.sleep(20)
        await ask_rebuild(world)
        await until(world, "2026-03-02T10:06:00")
        assert states(await shown(world)) == ["10:00 SUCCEEDED", "10:05 SUCCEEDED"]
        assert len(await jobs(world)) == 2

    in_time(act)


async def ask_rebuild(world: World) -> None:
    await world.ask(lambda manager: manager.rebuild_ledger(), "rebuild")


# --- Missed runs ---------------------------------------------------------------------------------


def missed(policy: Missed, **changes: Any) -> Schedule:
    """Return an hourly schedule after a time without a manager from 10:30 to 14:30."""
    left: list[Schedule] = []

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, definition("0 * * * *", missed=policy, **changes))
        await until(world, "2026-03-02T10:30:00")
        kill_manager(world)
        world.clock.jump(4 * HOUR - 3)  # like a laptop that sleeps
        await until(world, "2026-03-02T15:10:00")
        left.append(await shown(world))
        manager = await leader(world)
        assert manager.scheduler
        assert len(manager.scheduler.notes) == (4 if policy is Missed.RUN_ALL else 1)
        assert "missed" in manager.scheduler.notes[0]

    in_time(act, **UNHURRIED)
    return left[0]


def test_latest_missed_run_starts_once() -> None:
    schedule = missed(Missed.RUN_ONCE)
    assert states(schedule) == ["10:00 SUCCEEDED", "14:00 SUCCEEDED", "15:00 SUCCEEDED"]
    assert "4 due times were missed" in schedule.runs[1].reason


def test_all_that_was_missed_runs_one_after_the_other_though_runs_may_not_overlap() -> None:
    schedule = missed(Missed.RUN_ALL)
    runs = schedule.runs
    assert states(schedule) == [f"{hour}:00 SUCCEEDED" for hour in range(10, 16)]
    for before, after in pairwise(runs):
        assert before.ended_s is not None
        assert after.started_s is not None
        assert before.ended_s <= after.started_s


def test_missed_runs_are_skipped_on_request() -> None:
    schedule = missed(Missed.SKIP)
    assert states(schedule) == ["10:00 SUCCEEDED", "14:00 skipped", "15:00 SUCCEEDED"]


def test_runs_missed_long_ago_are_not_started() -> None:
    schedule = missed(Missed.RUN_ONCE, missed_within_s=20 * MINUTE)
    assert states(schedule) == ["10:00 SUCCEEDED", "14:00 skipped", "15:00 SUCCEEDED"]


def test_a_moment_without_a_manager_misses_nothing() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("0 * * * *", missed=Missed.SKIP))
        await until(world, "2026-03-02T09:59:59")
        kill_manager(world)
        await until(world, "2026-03-02T10:01:00")
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]

    in_time(act)


# --- Overlap -------------------------------------------------------------------------------------


def overlapped(policy: Overlap) -> Schedule:
    """Return a schedule that is due each minute from 10:00, with runs of 150 s, at 10:09."""
    left: list[Schedule] = []

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:59:30")
        await added(world, definition("0-4 10 * * *", overlap=policy))
        await until(world, "2026-03-02T10:20:00")
        left.append(await shown(world))

    in_time(act, run_s=150.0)
    return left[0]


def test_overlapping_run_is_skipped() -> None:
    schedule = overlapped(Overlap.SKIP)
    assert states(schedule) == ["10:00 SUCCEEDED", "10:01 skipped", "10:02 skipped", "10:03 SUCCEEDED", "10:04 skipped"]
    assert schedule.runs[1].reason == "the run of 2026-03-02 10:00:00 UTC had not ended"


def test_overlapping_runs_wait_in_order() -> None:
    schedule = overlapped(Overlap.QUEUE)
    assert states(schedule) == [f"10:0{minute} SUCCEEDED" for minute in range(5)]
    for before, after in pairwise(schedule.runs):
        assert before.ended_s is not None
        assert after.started_s is not None
        assert before.ended_s <= after.started_s


def test_a_run_takes_the_place_of_the_one_before_once_that_has_ended() -> None:
    schedule = overlapped(Overlap.REPLACE)
    assert states(schedule) == [
        "10:00 CANCELLED",
        "10:01 CANCELLED",
        "10:02 CANCELLED",
        "10:03 CANCELLED",
        "10:04 SUCCEEDED",
    ]
    for before, after in pairwise(schedule.runs):
        assert before.ended_s is not None
        assert after.started_s is not None
        assert before.ended_s <= after.started_s


def test_replacement_continues_after_the_managers_death() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:59:30")
        await added(world, definition("0,1 10 * * *", overlap=Overlap.REPLACE))
        await until(world, "2026-03-02T10:01:01")
        kill_manager(world)
        await until(world, "2026-03-02T10:10:00")
        assert states(await shown(world)) == ["10:00 CANCELLED", "10:01 SUCCEEDED"]

    in_time(act, run_s=150.0)


# --- The clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("back_s", [30.0, 20 * MINUTE, 3 * HOUR])
def test_a_clock_that_is_set_back_runs_nothing_twice_and_loses_nothing(back_s: float) -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T08:58:00")
        await added(world, definition("*/10 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        world.clock.jump(-back_s)
        await until(world, "2026-03-02T10:25:00")
        schedule = await shown(world)
        due = await jobs(world)
        assert len(due) == len(set(due))
        assert {f"2026-03-02T{at}:00+00:00" for at in ("09:00", "09:50", "10:00", "10:10", "10:20")} <= set(due)
        assert len(world.starts) == len({start[1:] for start in world.starts}) == len(due)
        assert all(run.result == "SUCCEEDED" for run in schedule.runs)

    in_time(act, **UNHURRIED)


def test_run_skipped_by_a_fast_clock_starts_after_its_correction() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, definition("0 * * * *"))
        await until(world, "2026-03-02T10:30:00")
        world.clock.jump(4 * HOUR)
        await asyncio.sleep(5 * MINUTE)
        assert states(await shown(world))[1:] == ["14:00 SUCCEEDED"]
        world.clock.jump(-4 * HOUR)
        await until(world, "2026-03-02T15:30:00")
        found = await jobs(world)
        assert found == [f"2026-03-02T{hour}:00:00+00:00" for hour in range(10, 16)]

    in_time(act, **UNHURRIED)


def test_due_time_starts_once_after_the_clock_goes_back_a_day() -> None:
    """A job that waits for its start time behaves in the same way (docs/contributing/decisions/0019)."""

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:00:00")
        await added(world, definition(when=When(at_s=world.clock.now_s() + HOUR)))
        await asyncio.sleep(HOUR / 2)
        world.clock.jump(-24 * HOUR)
        await asyncio.sleep(HOUR)
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]
        writes = world.objects.writes
        await asyncio.sleep(HOUR)
        assert world.objects.writes == writes
        await asyncio.sleep(24 * HOUR)
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]

    in_time(act, **UNHURRIED)
