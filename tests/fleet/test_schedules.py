"""Scheduled actions, and the cron expressions of their recurrence."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pytest

from batchlab.fleet import scaling_policies
from batchlab.fleet.api_types import AlreadyExists, LimitExceeded, ScheduledAction, ValidationError
from tests.support.autoscaling_group import CONFIG, GROUP, World, in_aws

NEW_YORK = "America/New_York"


def action(name: str = "peak", **facts: Any) -> ScheduledAction:
    return ScheduledAction(GROUP, name, **facts)


def runs(expression: str, after: str, count: int = 3, zone: str = "UTC") -> list[str]:
    """Return the next times of a cron expression in UTC, from `after` in UTC."""
    rule = action(recurrence=expression, time_zone=zone)

    def following() -> Any:
        at_s = datetime.fromisoformat(after).replace(tzinfo=UTC).timestamp()
        while (at := scaling_policies.first_s(rule, at_s)) is not None:
            yield datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
            at_s = at

    return list(islice(following(), count))


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("30 6 * * *", "2026-01-01T06:30", ["2026-01-02 06:30", "2026-01-03 06:30"]),
        ("*/20 23 * * *", "2026-01-01T23:20", ["2026-01-01 23:40", "2026-01-02 23:00"]),
        ("0 0 1 1,JUL *", "2026-01-01T00:00", ["2026-07-01 00:00", "2027-01-01 00:00"]),
        ("0 9 * * MON-FRI", "2026-11-27T09:00", ["2026-11-30 09:00", "2026-12-01 09:00"]),
        ("0 9 * * 0", "2026-11-26T00:00", ["2026-11-29 09:00", "2026-12-06 09:00"]),
        ("0 9 * * 7", "2026-11-26T00:00", ["2026-11-29 09:00", "2026-12-06 09:00"]),
        ("0 0 13 * FRI", "2026-11-12T00:00", ["2026-11-13 00:00", "2026-11-20 00:00"]),
        ("0 0 29 2 *", "2026-01-01T00:00", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("5-15/5,40 * * * *", "2026-01-01T00:10", ["2026-01-01 00:15", "2026-01-01 00:40"]),
        ("0 0 31 2 *", "2026-01-01T00:00", []),
    ],
)
def test_due_times_of_cron_expressions(expression: str, after: str, expected: list[str]) -> None:
    assert runs(expression, after, 2) == expected


def test_cron_follows_the_clocks_of_its_zone() -> None:
    """On 8 March 2026, the clocks of New York jump from 02:00 to 03:00. On 1 November, the time 01:00 comes twice."""
    spring = runs("30 2 * * *", "2026-03-07T00:00", 3, NEW_YORK)
    assert spring == ["2026-03-07 07:30", "2026-03-08 07:30", "2026-03-09 06:30"]
    autumn = runs("30 1 * * *", "2026-10-31T00:00", 3, NEW_YORK)
    assert autumn == ["2026-10-31 05:30", "2026-11-01 05:30", "2026-11-02 06:30"]


@pytest.mark.parametrize(
    "wrong", ["* * * *", "60 * * * *", "* * * FOO *", "5-1 * * * *", "*/0 * * * *", "a * * * *", " "]
)
def test_invalid_cron_expression_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"fields|Bad (minute|month)"):
        scaling_policies.first_s(action(recurrence=wrong), 0.0)


# --- Actions --------------------------------------------------------------------------------------


@in_aws
async def test_an_action_runs_once_at_its_time(w: World) -> None:
    await w.group(1)
    at_s = w.clock.now_s() + 100.0
    w.asg.put_scheduled_update_group_action(action(start_time=at_s, desired_capacity=3))
    (listed,) = w.asg.describe_scheduled_actions(GROUP)
    assert listed.start_time == at_s
    assert listed.scheduled_action_arn.endswith(f"autoScalingGroupName/{GROUP}:scheduledActionName/peak")
    await w.tick(99.0)
    assert w.view().desired_capacity == 1
    await w.tick(1.0)
    assert w.view().desired_capacity == 3
    assert "a scheduled action update of AutoScalingGroup constraints to min: 0, max: 10, desired: 3" in (
        w.activities()[0].cause
    )
    assert w.asg.describe_scheduled_actions(GROUP) == []
    await w.resize(1)
    await w.tick(1_000.0)
    assert w.view().desired_capacity == 1


@in_aws
async def test_a_recurring_action_runs_until_its_end(w: World) -> None:
    """The clock starts at 22:30."""
    await w.group(0)
    end_s = w.clock.now_s() + 3 * 86_400
    w.asg.put_scheduled_update_group_action(action(recurrence="0 23 * * *", desired_capacity=2, end_time=end_s))
    for _ in range(3):
        await w.tick(1_800.0)
        assert w.view().desired_capacity == 2
        await w.resize(0)
        await w.tick(84_600.0)
        assert w.view().desired_capacity == 0
    assert w.asg.describe_scheduled_actions(GROUP) == []


@in_aws
async def test_a_recurring_action_runs_first_at_its_start(w: World) -> None:
    await w.group(0)
    start_s = w.clock.now_s() + 60.0
    w.asg.put_scheduled_update_group_action(action(recurrence="0 23 * * *", start_time=start_s, desired_capacity=1))
    await w.tick(60.0)
    assert w.view().desired_capacity == 1
    (listed,) = w.asg.describe_scheduled_actions(GROUP)
    assert listed.start_time == start_s - 60.0 + 1_800.0


@in_aws
async def test_limits_move_too_and_desired_capacity_with_them(w: World) -> None:
    await w.group(2)
    now_s = w.clock.now_s()
    w.asg.put_scheduled_update_group_action(action("low", start_time=now_s + 1, max_size=1))
    w.asg.put_scheduled_update_group_action(action("high", start_time=now_s + 2, min_size=3, max_size=5))
    await w.tick(1.0)
    assert (w.view().config.max_size, w.view().desired_capacity) == (1, 1)
    await w.tick(1.0)
    assert (w.view().config.min_size, w.view().desired_capacity) == (3, 3)


@in_aws
async def test_contradictory_limits_are_reported_without_effect(w: World) -> None:
    await w.group(2)
    w.asg.put_scheduled_update_group_action(action(start_time=w.clock.now_s() + 1, min_size=99))
    await w.tick(1.0)
    assert w.view().config.min_size == 0
    failed = w.activities()[0]
    assert failed.status_code == "Failed"
    assert "min: 99, max: 10" in failed.description


@in_aws
async def test_actions_due_during_a_suspension_are_skipped(w: World) -> None:
    await w.group(0)
    now_s = w.clock.now_s()
    for name, after_s in (("first", 10.0), ("second", 30.0)):
        w.asg.put_scheduled_update_group_action(
            action(name, start_time=now_s + after_s, desired_capacity=int(after_s / 10))
        )
    w.asg.suspend_processes(GROUP, ["ScheduledActions"])
    await w.tick(20.0)
    w.asg.resume_processes(GROUP)
    await w.tick(1.0)
    assert w.view().desired_capacity == 0
    await w.tick(9.0)
    assert w.view().desired_capacity == 3


@in_aws
async def test_overdue_actions_run_late_and_in_order(w: World) -> None:
    await w.group(0)
    now_s = w.clock.now_s()
    for name, after_s in (("b", 10.0), ("a", 20.0)):
        w.asg.put_scheduled_update_group_action(
            action(name, start_time=now_s + after_s, desired_capacity=int(after_s / 10))
        )
    w.clock.time_s += 1_000.0
    w.restart()
    await w.tick()
    assert w.view().desired_capacity == 2


@in_aws
async def test_actions_are_replaced_listed_and_deleted(w: World) -> None:
    await w.group()
    now_s = w.clock.now_s()
    w.asg.put_scheduled_update_group_action(action("b", start_time=now_s + 9, min_size=1))
    w.asg.put_scheduled_update_group_action(action("b", start_time=now_s + 5, min_size=1))
    w.asg.put_scheduled_update_group_action(action("a", start_time=now_s + 9, min_size=1))
    listed = w.asg.describe_scheduled_actions(GROUP)
    assert [one.scheduled_action_name for one in listed] == ["b", "a"]
    assert w.asg.describe_scheduled_actions(start_time=now_s + 6) == listed[1:]
    assert w.asg.describe_scheduled_actions(end_time=now_s + 6) == listed[:1]
    assert w.asg.describe_scheduled_actions(scheduled_action_names=["a", "c"]) == listed[1:]
    with pytest.raises(AlreadyExists):
        w.asg.put_scheduled_update_group_action(action("c", start_time=now_s + 9, min_size=1))
    w.asg.delete_scheduled_action(GROUP, "a")
    with pytest.raises(ValidationError, match="not found"):
        w.asg.delete_scheduled_action(GROUP, "a")
    for n in range(124):
        w.asg.put_scheduled_update_group_action(action(f"n{n}", start_time=now_s + 100 + n, min_size=1))
    with pytest.raises(LimitExceeded):
        w.asg.put_scheduled_update_group_action(action("more", start_time=now_s + 50, min_size=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start_time": 1.0, "min_size": 1}, "start time is in the past"),
        ({"min_size": 1}, "StartTime or Recurrence"),
        ({"recurrence": "0 0 * * *"}, "At least one"),
        ({"recurrence": "0 0 * *", "min_size": 1}, "recurrence string"),
        ({"recurrence": "0 0 L * *", "min_size": 1}, "recurrence string"),
        ({"recurrence": "0 0 * * *", "min_size": -1}, "negative"),
        ({"recurrence": "0 0 * * *", "min_size": 2, "max_size": 1}, "Max bound, 1, must be greater than or equal to"),
        ({"recurrence": "0 0 * * *", "min_size": 1, "time_zone": "Mars/North"}, "time zone"),
        ({"recurrence": "0 0 * * *", "min_size": 1, "end_time": 5.0}, "end time"),
        ({"recurrence": "0 0 31 2 *", "min_size": 1}, "does not occur"),
    ],
)
def test_an_action_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    w = World()
    w.asg.create_auto_scaling_group(replace(CONFIG))
    with pytest.raises(ValidationError, match=message):
        w.asg.put_scheduled_update_group_action(action(**wrong))
