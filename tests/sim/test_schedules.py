"""Schedules in virtual time: each due time runs once, whatever is killed, missed or set back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from batchlab.costs import prices
from batchlab.costs.meter import Accounting, Kind
from batchlab.errors import NotFound, Refused, UsageError
from batchlab.jobdef import InputDef, JobDef, SplitBy
from batchlab.manager.manager import Manager
from batchlab.manager.schedule_requests import Schedules
from batchlab.model import JobId, JobState, Pool
from batchlab.protocol import naming
from batchlab.schedule import times
from batchlab.schedule.model import (
    Definition,
    Missed,
    Overlap,
    Run,
    RunState,
    Schedule,
    When,
    token_of,
)
from batchlab.sim.runner import Play
from batchlab.sim.world import MANAGER, WORKER, World
from tests.sim.scenes import A, in_world, kill_manager, leader, stage

INPUT = "raw/numbers.jsonl"
MINUTE = 60.0
HOUR = 3600.0
BRISK = replace(MANAGER, tick_s=5.0)
SLOW = replace(MANAGER, tick_s=60.0, wait_s=20.0, control_lease_s=60.0, lease_ttl_s=300.0)
UNHURRIED: dict[str, Any] = {
    "manager_settings": SLOW,
    "worker_settings": replace(WORKER, wait_s=20.0, control_lease_s=60.0, beat_s=60.0),
}
"""For scenes of many virtual hours, which would otherwise be mostly polling."""
BERLIN = "Europe/Berlin"
LORD_HOWE = "Australia/Lord_Howe"


def template(**changes: Any) -> JobDef:
    raw = InputDef((INPUT,), SplitBy.ITEMS)
    made = JobDef(JobId("nightly-template"), "nightly", (stage(A),), 0.0, input=raw, token="t")
    return replace(made, **changes)


def definition(cron: str = "* * * * *", zone: str = "UTC", **changes: Any) -> Definition:
    return replace(Definition("nightly", "nightly", When(cron, zone), ""), **changes)


def begins(world: World, at: str) -> None:
    """Set the world's clock before anything looks at it."""
    world.clock.jump(
        datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp() - world.clock.now_s()
    )


async def ask(world: World, call: Callable[[Schedules], Coroutine[Any, Any, Any]]) -> Any:
    def of(manager: Manager) -> Coroutine[Any, Any, Any]:
        assert manager.scheduler
        return call(manager.scheduler)

    return await world.ask(of, "schedule")


async def added(world: World, made: Definition, job: JobDef | None = None) -> None:
    await world.objects.put(INPUT, b'{"key": 1}\n')
    await leader(world)
    answer = await ask(world, lambda s: s.add(made, job or template(), replacing=False))
    assert not isinstance(answer, Exception), answer


async def shown(world: World) -> Schedule:
    found = await ask(world, lambda s: s.one("nightly"))
    assert isinstance(found, Schedule), found
    return found


def until(world: World, at: str) -> Coroutine[Any, Any, None]:
    to_s = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
    return asyncio.sleep(to_s - world.clock.now_s())


async def jobs(world: World) -> list[str]:
    """When the schedule's jobs were due, by the bucket: each has one definition."""
    found = []
    for record in await world.ledger.jobs(limit=1000):
        assert await world.objects.head(naming.spec(record.job.id))
        found.append(dict(record.job.tags)["due"])
    return sorted(found)


def states(schedule: Schedule) -> list[str]:
    """Of its runs: the time of day and what became of it."""
    zone = schedule.definition.when.tz
    return [
        f"{datetime.fromtimestamp(run.due_s, zone):%H:%M} {run.result or run.state.value}"
        for run in schedule.runs
    ]


def in_time(
    act: Callable[[World], Coroutine[Any, Any, None]], run_s: float = 1.0, **more: Any
) -> None:
    settings: dict[str, Any] = {"manager_settings": BRISK, "sql": False, "schedules": True}
    in_world(act, script=lambda _: Play(run_s, {"n": 1}), **{**settings, **more})


# --- Due times -----------------------------------------------------------------------------------


def test_it_runs_at_each_due_time_and_says_how_each_ended() -> None:
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
"""02:00 to 03:00 are left out, or come twice, in Berlin; 02:00 to 02:30 are left out, and 01:30 to
02:00 come twice, on Lord Howe Island."""


@pytest.mark.parametrize(
    ("zone", "begin", "hours", "cron", "due"),
    [
        (BERLIN, SPRING_B, 27, "30 2 * * *", "29 03:00+0200, 30 02:30+0200"),
        (LORD_HOWE, SPRING_L, 27, "15 2 * * *", "04 02:30+1100, 05 02:15+1100"),
        (BERLIN, AUTUMN_B, 27, "30 2 * * *", "25 02:30+0200, 26 02:30+0100"),
        (LORD_HOWE, AUTUMN_L, 27, "45 1 * * *", "05 01:45+1100, 06 01:45+1030"),
        # What has * as its minute or hour goes by the clock.
        (BERLIN, SPRING_B, 3, "0 * 29 * *", "29 01:00+0100, 29 03:00+0200, 29 04:00+0200"),
        (BERLIN, AUTUMN_B, 3, "0 * 25 * *", "25 02:00+0200, 25 02:00+0100, 25 03:00+0100"),
        (LORD_HOWE, AUTUMN_L, 3, "*/30 1 5 * *", "05 01:00+1100, 05 01:30+1100, 05 01:30+1030"),
        (LORD_HOWE, SPRING_L, 3, "*/20 3 4 * *", "04 03:00+1100, 04 03:20+1100, 04 03:40+1100"),
    ],
)
def test_where_the_clock_changes_a_manager_does_as_cron_does(
    zone: str, begin: str, hours: int, cron: str, due: str
) -> None:
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
def test_a_manager_killed_around_a_due_time_leaves_one_run_of_it(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies right before or after the n-th thing that it does with the bucket from then on."""

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
        assert len(world.starts) == len({one[1:] for one in world.starts}) == 2

    in_time(act)


def test_two_managers_that_both_believe_to_lead_run_a_due_time_once() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        first = await leader(world)
        world.start_manager()
        second = world.posts[-1].manager
        # As after a pause of the first, which it has not noticed yet.
        assert second.scheduler
        rival = asyncio.create_task(second.scheduler.run())
        await until(world, "2026-03-02T10:12:00")
        rival.cancel()
        assert first.is_leader.is_set()
        assert states(await shown(world)) == [
            "10:00 SUCCEEDED",
            "10:05 SUCCEEDED",
            "10:10 SUCCEEDED",
        ]
        assert len(await jobs(world)) == 3

    in_time(act)


def test_a_lost_ledger_keeps_the_schedules_and_their_runs() -> None:
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


# --- What was missed -----------------------------------------------------------------------------


def missed(policy: Missed, **changes: Any) -> Schedule:
    """What is left of a schedule, due each hour, after no manager was there from 10:30 to 14:30."""
    left: list[Schedule] = []

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, definition("0 * * * *", missed=policy, **changes))
        await until(world, "2026-03-02T10:30:00")
        kill_manager(world)
        world.clock.jump(4 * HOUR - 3)  # as a laptop that sleeps
        await until(world, "2026-03-02T15:10:00")
        left.append(await shown(world))
        manager = await leader(world)
        assert manager.scheduler
        assert len(manager.scheduler.notes) == (4 if policy is Missed.RUN_ALL else 1)
        assert "missed" in manager.scheduler.notes[0]

    in_time(act, **UNHURRIED)
    return left[0]


def test_of_what_was_missed_the_latest_runs_once() -> None:
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


def test_what_was_missed_is_skipped_where_it_is_to_be() -> None:
    schedule = missed(Missed.SKIP)
    assert states(schedule) == ["10:00 SUCCEEDED", "14:00 skipped", "15:00 SUCCEEDED"]


def test_what_was_missed_too_long_ago_is_not_made_up_for() -> None:
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
    """Due each minute from 10:00, with runs of 150 s, looked at at 10:09."""
    left: list[Schedule] = []

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:59:30")
        await added(world, definition("0-4 10 * * *", overlap=policy))
        await until(world, "2026-03-02T10:20:00")
        left.append(await shown(world))

    in_time(act, run_s=150.0)
    return left[0]


def test_a_run_that_comes_too_soon_is_skipped() -> None:
    schedule = overlapped(Overlap.SKIP)
    assert states(schedule) == [
        *("10:00 SUCCEEDED", "10:01 skipped", "10:02 skipped", "10:03 SUCCEEDED", "10:04 skipped")
    ]
    assert schedule.runs[1].reason == "the run of 2026-03-02 10:00:00 UTC had not ended"


def test_runs_that_come_too_soon_wait_in_order() -> None:
    schedule = overlapped(Overlap.QUEUE)
    assert states(schedule) == [f"10:0{minute} SUCCEEDED" for minute in range(5)]
    for before, after in pairwise(schedule.runs):
        assert before.ended_s is not None
        assert after.started_s is not None
        assert before.ended_s <= after.started_s


def test_a_run_takes_the_place_of_the_one_before_once_that_has_ended() -> None:
    schedule = overlapped(Overlap.REPLACE)
    assert states(schedule) == [
        *("10:00 CANCELLED", "10:01 CANCELLED", "10:02 CANCELLED", "10:03 CANCELLED"),
        "10:04 SUCCEEDED",
    ]
    for before, after in pairwise(schedule.runs):
        assert before.ended_s is not None
        assert after.started_s is not None
        assert before.ended_s <= after.started_s


def test_a_replacement_is_gone_on_with_after_a_death_of_the_manager() -> None:
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
        assert {
            f"2026-03-02T{at}:00+00:00" for at in ("09:00", "09:50", "10:00", "10:10", "10:20")
        } <= set(due)
        assert len(world.starts) == len({one[1:] for one in world.starts}) == len(due)
        assert all(run.result == "SUCCEEDED" for run in schedule.runs)

    in_time(act, **UNHURRIED)


def test_what_a_clock_ahead_has_skipped_runs_once_the_clock_is_right() -> None:
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


def test_one_due_time_comes_although_the_clock_was_set_back_by_a_day() -> None:
    """As a job that waits for its time (docs/decisions/0019)."""

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:00:00")
        await added(world, definition(when=When(at_s=world.clock.now_s() + HOUR)))
        await asyncio.sleep(HOUR / 2)
        world.clock.jump(-24 * HOUR)
        await asyncio.sleep(HOUR)
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]
        writes = world.objects._writes
        await asyncio.sleep(HOUR)
        assert world.objects._writes == writes
        await asyncio.sleep(24 * HOUR)
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]

    in_time(act, **UNHURRIED)


# --- What a person may do ------------------------------------------------------------------------


def test_what_falls_due_while_it_is_paused_is_not_run() -> None:
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
        assert states(await shown(world)) == [
            "10:00 SUCCEEDED",
            "10:17 SUCCEEDED",
            "10:20 SUCCEEDED",
        ]

    in_time(act)


def test_a_run_by_hand_is_one_however_often_it_is_asked_for() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("0 * * * *"))
        for _ in range(2):
            await ask(world, lambda s: s.run_now("nightly", "mine"))
        assert len((await shown(world)).runs) == 1
        # The other one is to be skipped while this one runs, and who asks is told so.
        assert isinstance(await ask(world, lambda s: s.run_now("nightly", "other")), Refused)
        await asyncio.sleep(MINUTE)
        await ask(world, lambda s: s.run_now("nightly", "other"))
        await asyncio.sleep(MINUTE)
        runs: tuple[Run, ...] = (await shown(world)).runs
        assert [run.result for run in runs if run.asked] == ["SUCCEEDED", "SUCCEEDED"]

    in_time(act)


def test_a_schedule_is_changed_only_where_that_is_meant_and_keeps_its_runs() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        same = await ask(
            world, lambda s: s.add(definition("*/5 * * * *"), template(), replacing=False)
        )
        assert same[1] is False
        other = definition("*/2 * * * *", fingerprint="f")
        refused = await ask(world, lambda s: s.add(other, template(), replacing=False))
        assert isinstance(refused, Refused)
        assert "when it is due and the job file, or what it names" in refused.message
        await ask(world, lambda s: s.add(other, template(priority=5), replacing=True))
        await until(world, "2026-03-02T10:04:30")
        assert states(await shown(world)) == [
            *("10:00 SUCCEEDED", "10:02 SUCCEEDED", "10:04 SUCCEEDED")
        ]
        newest = (await world.ledger.jobs(limit=1))[0].job
        assert newest.priority == 5

    in_time(act)


def test_a_schedule_that_was_removed_is_gone_and_its_name_free() -> None:
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
            await manager.scheduler.one("nightly")
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:11:00")
        schedule = await shown(world)
        assert schedule.generation == 2
        assert states(schedule) == ["10:10 SUCCEEDED"]

    in_time(act, run_s=20.0)


def test_objects_below_a_prefix_are_each_runs_input_and_none_is_no_run() -> None:
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
        (record,) = await world.ledger.jobs()
        assert dict(record.job.params) == {"month": "2026-03-02T11:00:00+01:00", "rate": 2}
        assert record.state is JobState.SUCCEEDED
        wrong = definition(name="wrong", due_param="nothing")
        with pytest.raises(UsageError, match="no parameter 'nothing'"):
            await ask(world, lambda s: s.add(wrong, job, replacing=False))

    in_time(act)


def test_a_job_that_the_grid_cannot_run_any_more_is_refused_and_told() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        manager = await leader(world)
        del manager.pools["default"]  # as a grid that was brought up again with others
        await until(world, "2026-03-02T10:01:00")
        (run,) = (await shown(world)).runs
        assert (run.state, run.result) == (RunState.ENDED, "REFUSED")
        assert "names the pool 'default'" in run.reason

    in_time(act)


def test_a_schedule_that_nobody_can_read_does_not_hold_up_the_others() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        for name, data in {"later": b'{"v": 99}', "broken": b'{"v": 1}', "none": b"<"}.items():
            await world.objects.put(naming.schedule(name), data)
        await added(world, definition("*/5 * * * *"))
        await until(world, "2026-03-02T10:01:00")
        assert states(await shown(world)) == ["10:00 SUCCEEDED"]
        other = definition(name="broken")
        refused = await ask(world, lambda s: s.add(other, template(), replacing=True))
        assert isinstance(refused, Refused)
        assert "cannot read" in refused.message
        assert await world.objects.get(naming.schedule("broken")) == b'{"v": 1}'

    in_time(act)


# --- Pre-warming ---------------------------------------------------------------------------------

WIDE = (Pool("default", 0, 6, 1, instance_type="m7i.large", boot_s=20.0),)
BOOK = prices.load()


def rates(kind: Kind) -> float:
    return BOOK.instance_usd_h(kind.type, kind.market).high


async def desired(world: World) -> int:
    (view,) = await world.groups()
    return view.desired


def warm(capacity: int | None = None, **changes: Any) -> Definition:
    return definition("0 10 * * *", prewarm_s=10 * MINUTE, capacity=capacity, **changes)


def test_the_fleet_is_warm_before_the_peak_says_why_and_is_given_back() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, warm(4))
        await until(world, "2026-03-02T09:49:50")
        assert await desired(world) == 0
        await until(world, "2026-03-02T09:52:00")
        (view,) = await world.groups()
        assert view.desired == len(view.instances) == 4
        manager = await leader(world)
        causes = [one.cause for one in await manager.ports.fleet.activities()]
        told = "schedule nightly is due at 2026-03-02 10:00:00 UTC: 4 as it asks for"
        assert any(told in cause for cause in causes), causes
        await until(world, "2026-03-02T09:59:59")
        assert await desired(world) == 4
        await until(world, "2026-03-02T10:03:00")
        (run,) = (await shown(world)).runs
        assert run.result == "SUCCEEDED"
        assert await desired(world) == 0

    in_time(act, pools=WIDE)


@pytest.mark.parametrize("paused", [True, False])
def test_capacity_is_given_back_where_no_job_comes(paused: bool) -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        empty = template(input=InputDef(("raw/nothing/",), SplitBy.ITEMS))
        await added(world, warm(4), empty)
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 4
        if paused:
            await ask(world, lambda s: s.pause("nightly"))
            await until(world, "2026-03-02T09:57:00")
        else:
            await until(world, "2026-03-02T10:01:00")
        assert await desired(world) == 0

    in_time(act, pools=WIDE)


def test_unless_said_it_is_what_the_last_runs_used_and_before_that_what_their_tasks_ask_for() -> (
    None
):
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        keys = tuple(f"raw/{number}" for number in range(30))
        for key in keys:
            await world.objects.put(key, b"data")
        twice = warm(None, when=When("0 10,11 * * *"))
        await added(world, twice, template(input=InputDef(keys)))
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 3  # 30 tasks of a second in 10 s
        await until(world, "2026-03-02T10:30:00")
        (run,) = (await shown(world)).runs
        assert run.tasks == 30
        (used,) = dict(run.peak).values()
        assert used > 3  # they take 40 s each
        await until(world, "2026-03-02T10:55:00")
        assert await desired(world) == used

    in_time(act, run_s=40.0, pools=WIDE)


def test_the_limit_of_the_pool_and_what_is_set_by_hand_hold() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, warm(50))
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 6
        manager = await leader(world)
        causes = [one.cause for one in await manager.ports.fleet.activities()]
        assert any("of which its limit leaves 6" in cause for cause in causes)
        manager.autoscaler.held["default"] = 2
        await manager.ports.fleet.set_desired("default", 2, cause="by hand")
        await until(world, "2026-03-02T09:57:00")
        assert await desired(world) == 2

    in_time(act, pools=WIDE)


@pytest.mark.parametrize("whose", ["grid", "job"])
def test_a_cap_on_cost_is_not_passed_for_a_warm_fleet(whose: str) -> None:
    # 6 instances for 10 minutes and more cost over 0.1 USD.
    cap = 0.05

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        job = template(max_cost_usd=cap) if whose == "job" else template()
        await added(world, warm(6), job)
        await until(world, "2026-03-02T09:55:00")
        assert 1 <= await desired(world) < 6
        manager = await leader(world)
        causes = [one.cause for one in await manager.ports.fleet.activities()]
        assert any("a cap on cost pays for" in cause for cause in causes)
        await until(world, "2026-03-02T09:59:50")
        assert 1 <= await desired(world) < 6
        await until(world, "2026-03-02T10:10:00")
        assert manager.spending
        assert manager.spending.meter.total.usd(rates) <= cap

    max_cost_usd = cap if whose == "grid" else None
    in_time(act, pools=WIDE, accounting=Accounting(rates, max_cost_usd=max_cost_usd))


# --- What it costs -------------------------------------------------------------------------------


def test_while_nothing_is_due_nothing_is_asked_of_the_bucket() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:00:00")
        await added(world, definition("0 0 1 1 *"))
        manager = await leader(world)
        await asyncio.sleep(MINUTE)
        asked: list[str] = []
        assert manager.scheduler
        for name in ("put", "get", "head", "get_if_changed"):
            inner = getattr(world.objects, name)

            async def counted(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                asked.append(args[0])
                return await inner(*args, **kwargs)

            setattr(world.objects, name, counted)
        await asyncio.sleep(HOUR)
        assert [key for key in asked if key.startswith("grid/")] == []

    in_time(act, **UNHURRIED)


def test_a_due_time_costs_two_writes_of_its_schedule() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        written: list[str] = []
        world.objects.written = lambda key, *_: written.append(key)
        await until(world, "2026-03-02T10:04:00")
        assert written.count(naming.schedule("nightly")) == 2

    in_time(act, watched=False)


def test_times_are_shown_in_the_zone_and_in_utc() -> None:
    at_s = datetime(2026, 3, 29, 1, tzinfo=UTC).timestamp()
    assert times.iso(at_s) == "2026-03-29T01:00:00Z"
    assert times.iso(at_s, ZoneInfo(BERLIN)) == "2026-03-29T03:00:00+02:00"
    assert times.shown(at_s, ZoneInfo(BERLIN)) == "2026-03-29 03:00:00 CEST"
