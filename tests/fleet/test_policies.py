"""Scaling policies: simple, step, and target tracking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from batchlab.core.model import Pool
from batchlab.fleet.api_types import (
    LimitExceeded,
    ScalingActivityInProgress,
    ScalingPolicy,
    StepAdjustment,
    TargetTracking,
    ValidationError,
)
from batchlab.fleet.group_state import Group
from batchlab.fleet.scaling_policies import adjust, step_for
from tests.support.autoscaling_group import CONFIG, GROUP, World, in_aws

WARM_AT_ONCE = replace(CONFIG, default_instance_warmup=0)
MINUTE_S = 60.0


def simple(adjustment: int, kind: str = "ChangeInCapacity", **facts: Any) -> ScalingPolicy:
    return ScalingPolicy(GROUP, "simple", adjustment_type=kind, scaling_adjustment=adjustment, **facts)


def stepped(*steps: tuple[float | None, float | None, int], **facts: Any) -> ScalingPolicy:
    adjustments = tuple(StepAdjustment(by, low, high) for low, high, by in steps)
    return ScalingPolicy(
        auto_scaling_group_name=GROUP,
        policy_name="steps",
        policy_type="StepScaling",
        adjustment_type="ChangeInCapacity",
        step_adjustments=adjustments,
        **facts,
    )


def tracking(target: float = 50.0, name: str = "cpu", **facts: Any) -> ScalingPolicy:
    wanted = TargetTracking(
        target, predefined_metric_type="ASGAverageCPUUtilization", disable_scale_in=facts.pop("disable_scale_in", False)
    )
    return ScalingPolicy(GROUP, name, "TargetTrackingScaling", target_tracking_configuration=wanted, **facts)


def desired(w: World) -> int:
    return w.view().desired_capacity


# --- Simple ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "adjustment", "least", "base", "expected"),
    [
        ("ChangeInCapacity", 3, None, 4, 7),
        ("ChangeInCapacity", -9, None, 4, 0),
        ("ExactCapacity", 2, None, 4, 2),
        ("ExactCapacity", 99, None, 4, 10),
        ("PercentChangeInCapacity", 50, None, 5, 7),
        ("PercentChangeInCapacity", 5, None, 4, 5),
        ("PercentChangeInCapacity", -5, None, 4, 3),
        ("PercentChangeInCapacity", -60, None, 4, 2),
        ("PercentChangeInCapacity", 25, 2, 4, 6),
    ],
)
def test_adjustments_are_rounded_as_aws_does(
    kind: str, adjustment: int, least: int | None, base: int, expected: int
) -> None:
    policy = simple(adjustment, kind, min_adjustment_magnitude=least)
    assert adjust(Group(Pool("g", 0, 10), base), policy, adjustment, base) == expected


@in_aws
async def test_a_simple_policy_is_executed_by_name_or_arn(w: World) -> None:
    await w.group(1)
    arn = w.asg.put_scaling_policy(simple(2)).policy_arn
    w.asg.execute_policy("simple", name=GROUP)
    assert desired(w) == 3
    w.asg.execute_policy(arn)
    assert desired(w) == 5
    await w.tick()
    assert "a user request executed policy simple changing the desired capacity from 3 to 5" in (
        w.activities()[0].cause
    )
    w.asg.execute_policy("simple")
    assert desired(w) == 7
    w.asg.create_auto_scaling_group(replace(CONFIG, auto_scaling_group_name="second"))
    w.asg.put_scaling_policy(replace(simple(2), auto_scaling_group_name="second"))
    with pytest.raises(ValidationError, match="AutoScalingGroupName is needed"):
        w.asg.execute_policy("simple")
    with pytest.raises(ValidationError, match="ScalingPolicy not found: other"):
        w.asg.execute_policy("other", name=GROUP)


@in_aws
async def test_a_policys_own_cooldown_takes_the_groups_place(w: World) -> None:
    await w.group(1)
    w.asg.put_scaling_policy(simple(1, cooldown=10))
    w.asg.execute_policy("simple", name=GROUP)
    await w.tick(times=2)
    with pytest.raises(ScalingActivityInProgress):
        w.asg.execute_policy("simple", name=GROUP, honor_cooldown=True)
    w.asg.execute_policy("simple", name=GROUP)
    await w.tick(times=2)
    await w.tick(10.0)
    w.asg.execute_policy("simple", name=GROUP, honor_cooldown=True)
    assert desired(w) == 4


# --- Step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("breach", "by"), [(0.0, 1), (9.9, 1), (10.0, 2), (99.0, 2), (-5.0, -1), (-10.0, -3)])
def test_bounds_belong_to_the_step_nearer_the_threshold(breach: float, by: int) -> None:
    policy = stepped((0, 10, 1), (10, None, 2), (-10, 0, -1), (None, -10, -3))
    step = step_for(policy, breach)
    assert step is not None
    assert step.scaling_adjustment == by


@in_aws
async def test_a_step_policy_takes_the_step_of_the_breach(w: World) -> None:
    await w.group(1, WARM_AT_ONCE)
    w.asg.put_scaling_policy(stepped((0, 10, 1), (10, None, 3)))
    w.asg.execute_policy("steps", name=GROUP, metric_value=75.0, breach_threshold=60.0)
    assert desired(w) == 4
    with pytest.raises(ValidationError, match="No step of the policy steps contains the metric value"):
        w.asg.execute_policy("steps", name=GROUP, metric_value=50.0, breach_threshold=60.0)
    with pytest.raises(ValidationError, match="MetricValue and BreachThreshold"):
        w.asg.execute_policy("steps", name=GROUP)


@in_aws
async def test_breaches_while_instances_warm_up_add_only_what_is_missing(w: World) -> None:
    await w.group(2)
    w.asg.put_scaling_policy(stepped((0, 10, 1), (10, None, 3), (None, 0, -1), estimated_instance_warmup=100))
    await w.tick(100.0)

    def breach(by: float) -> int:
        w.asg.execute_policy("steps", name=GROUP, metric_value=60.0 + by, breach_threshold=60.0)
        return desired(w)

    assert breach(5.0) == 3
    await w.tick(times=2)
    assert breach(5.0) == 3, "the one that warms up is the one that was wanted"
    assert breach(20.0) == 5, "a larger step, counted from what is warm"
    await w.tick(times=2)
    assert breach(-5.0) == 5, "nothing is scaled in while instances warm up"
    await w.tick(100.0)
    assert breach(-5.0) == 4


# --- Target tracking ------------------------------------------------------------------------------


async def metric(w: World, value: float, minutes: int, name: str = "cpu") -> list[int]:
    """Set the metric to a value, and return the desired capacity after each of the next `minutes` minutes."""
    seen = []
    for _ in range(minutes):
        w.metrics.put(name, value)
        await w.tick(MINUTE_S)
        seen.append(desired(w))
    return seen


@in_aws
async def test_capacity_follows_the_metric_in_proportion(w: World) -> None:
    await w.group(2, WARM_AT_ONCE)
    policy = w.asg.put_scaling_policy(tracking(50.0))
    assert await metric(w, 80.0, 4) == [2, 2, 2, 4], "3 periods above, then 2 × 80 / 50 rounded up"
    told = next(a for a in w.activities() if "ALARM" in a.cause)
    assert f"a monitor alarm {policy.alarms[0]} in state ALARM triggered policy cpu" in told.cause
    assert policy.alarms[0].startswith("TargetTracking-g-AlarmHigh-")


@in_aws
async def test_a_policy_acts_once_a_period_however_often_it_is_looked_at(w: World) -> None:
    """New instances must have time to change the metric."""
    await w.group(1, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    assert (await metric(w, 60.0, 4))[-1] == 2
    await w.tick(5.0, times=11)
    assert desired(w) == 2
    await w.tick(5.0)
    assert desired(w) == 3


@in_aws
async def test_scale_in_takes_fifteen_periods_below_nine_tenths(w: World) -> None:
    await w.group(4, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    assert await metric(w, 46.0, 30) == [4] * 30
    assert await metric(w, 20.0, 16) == [4] * 15 + [2]


@in_aws
async def test_one_value_in_between_starts_the_count_anew(w: World) -> None:
    await w.group(4, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    assert await metric(w, 20.0, 14) == [4] * 14
    await metric(w, 48.0, 1)
    assert await metric(w, 20.0, 15) == [4] * 15


@in_aws
async def test_scale_in_can_be_left_out(w: World) -> None:
    await w.group(4, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0, disable_scale_in=True))
    assert set(await metric(w, 1.0, 40)) == {4}


@in_aws
async def test_without_data_nothing_happens(w: World) -> None:
    await w.group(4, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    w.metrics.put("cpu", 1.0)
    await w.tick(MINUTE_S, times=60)
    assert desired(w) == 4


@in_aws
async def test_instances_that_warm_up_are_not_counted_and_stop_scale_in(w: World) -> None:
    await w.group(2, replace(CONFIG, default_instance_warmup=1_800))
    await w.tick(1_800.0)
    w.asg.put_scaling_policy(tracking(50.0))
    assert await metric(w, 100.0, 7) == [2, 2, 2, 4, 4, 4, 4], "2 × 100 / 50 stays 4"
    assert await metric(w, 10.0, 25) == [4] * 25, "15 are enough otherwise"
    assert min(await metric(w, 10.0, 10)) == 1


@in_aws
async def test_any_policy_scales_out_and_only_all_scale_in(w: World) -> None:
    await w.group(4, WARM_AT_ONCE)
    for name in ("cpu", "net"):
        w.asg.put_scaling_policy(tracking(50.0, name))

    async def both(first: float, second: float, minutes: int) -> int:
        for _ in range(minutes):
            w.metrics.put("cpu", first)
            await metric(w, second, 1, "net")
        return desired(w)

    assert await both(10.0, 48.0, 30) == 4
    assert await both(10.0, 24.0, 16) == 2
    assert await both(10.0, 90.0, 4) == 4


@in_aws
async def test_a_policy_that_is_disabled_or_suspended_does_nothing(w: World) -> None:
    await w.group(2, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0, enabled=False))
    assert set(await metric(w, 100.0, 10)) == {2}
    w.asg.put_scaling_policy(tracking(50.0))
    w.asg.suspend_processes(GROUP, ["AlarmNotification"])
    assert set(await metric(w, 100.0, 10)) == {2}
    w.asg.resume_processes(GROUP)
    assert (await metric(w, 100.0, 4))[-1] == 4


@in_aws
async def test_the_limits_bound_what_is_tracked(w: World) -> None:
    await w.group(2, replace(WARM_AT_ONCE, min_size=1, max_size=3))
    w.asg.put_scaling_policy(tracking(50.0))
    assert (await metric(w, 500.0, 5))[-1] == 3
    assert (await metric(w, 0.0, 20))[-1] == 1


@in_aws
async def test_an_alarm_survives_a_restart(w: World) -> None:
    await w.group(2, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    await metric(w, 100.0, 3)
    w.restart()
    assert await metric(w, 100.0, 1) == [4]


@dataclass
class Gauge:
    reading: float | None = None

    def value(self, policy: ScalingPolicy) -> float | None:
        wanted = policy.target_tracking_configuration
        assert wanted is not None
        assert wanted.predefined_metric_type == "ASGAverageCPUUtilization"
        return self.reading


@in_aws
async def test_metric_of_a_target_policy_may_have_a_source(w: World) -> None:
    gauge = Gauge(100.0)
    w.options.update(metrics=gauge, alarm_period_s=1.0)
    w.restart()
    await w.group(1, WARM_AT_ONCE)
    w.asg.put_scaling_policy(tracking(50.0))
    await w.tick(1.0, times=4)
    assert desired(w) == 2
    gauge.reading = None
    await w.tick(1.0, times=60)
    assert desired(w) == 2
    gauge.reading = 1.0
    await w.tick(1.0, times=17)
    assert desired(w) == 1


# --- Put, describe, delete ------------------------------------------------------------------------


@in_aws
async def test_policies_are_put_described_and_deleted(w: World) -> None:
    await w.group()
    one, two = w.asg.put_scaling_policy(tracking()), w.asg.put_scaling_policy(simple(1))
    assert two.policy_arn.endswith(f"autoScalingGroupName/{GROUP}:policyName/simple")
    assert w.asg.describe_policies(GROUP) == [one, two] == w.asg.describe_policies()
    assert w.asg.describe_policies(GROUP, policy_names=[two.policy_arn, "x"]) == [two]
    assert w.asg.describe_policies(policy_types=["SimpleScaling"]) == [two]
    w.asg.delete_policy(two.policy_arn)
    w.asg.delete_policy("cpu", name=GROUP)
    assert w.asg.describe_policies() == []
    for n in range(50):
        w.asg.put_scaling_policy(replace(simple(1), policy_name=f"n{n}"))
    with pytest.raises(LimitExceeded):
        w.asg.put_scaling_policy(simple(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(simple(1), policy_type="PredictiveScaling"), "PolicyType"),
        (replace(simple(1), adjustment_type="Double"), "AdjustmentType"),
        (replace(simple(1), scaling_adjustment=None), "ScalingAdjustment"),
        (stepped(), "StepAdjustments"),
        (stepped(*((n, n + 1, 1) for n in range(-21, 0))), "1 to 20 StepAdjustments"),
        (stepped((None, None, 1)), "one of them must be specified"),
        (stepped((5, 5, 1)), "greater than its lower bound"),
        (stepped((0, 20, 1), (10, None, 2)), "overlap"),
        (stepped((0, 10, 1), (20, None, 2)), "gap"),
        (stepped((0, None, 1), (5, None, 2)), "overlap"),
        (stepped((-10, 0, -1), (0, None, 1)), "no lower bound"),
        (stepped((0, 10, 1)), "no upper bound"),
        (tracking(0.0), "TargetValue"),
        (replace(tracking(), target_tracking_configuration=TargetTracking(5.0)), "one metric"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: ScalingPolicy, message: str) -> None:
    w = World()
    w.asg.create_auto_scaling_group(CONFIG)
    with pytest.raises(ValidationError, match=message):
        w.asg.put_scaling_policy(wrong)


@in_aws
async def test_unsupported_policies_are_refused(w: World) -> None:
    await w.group()
    w.asg.put_scaling_policy(tracking())
    w.asg.put_scaling_policy(simple(1, enabled=False))
    for name in ("cpu", "simple"):
        with pytest.raises(ValidationError, match=r"cannot be executed|is disabled"):
            w.asg.execute_policy(name, name=GROUP)
