"""Scaling policies, scheduled actions, and limits of a group's capacity.

Target tracking changes capacity in proportion to a metric, fast for scale-out and slowly for scale-in. As on AWS, a
target-tracking policy has two alarms. The high alarm fires after 3 periods above the target, and the low alarm fires
after 15 periods below 90% of the target. Any policy may scale out, but the group scales in only if all policies agree.
Without metric data, a policy does not change desired capacity.

Scheduled actions use the wall clock. After a restart, a missed scheduled action runs once and late. A scheduled action
that was due while ScheduledActions was suspended does not run.

Invariant: a fleet on a launcher and an EC2 fleet refuse the same limits with the same messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batchlab.core import due_times
from batchlab.core.errors import Refused
from batchlab.core.model import LifecycleState, Pool
from batchlab.fleet.api_types import (
    GroupConfig,
    Metrics,
    Process,
    ScalingPolicy,
    ScheduledAction,
    StepAdjustment,
    TargetTracking,
)
from batchlab.fleet.changes import Changes
from batchlab.fleet.group_state import COUNTED, Alarm, Asg, Group, Member, weigh
from batchlab.fleet.termination import clamp


def warmup_s(config: GroupConfig, policy: ScalingPolicy) -> int:
    """Return the policy's warm-up time. For a policy without a warm-up time, return the group's default warm-up time.
    If the group does not have a default warm-up time, return the group's default cooldown."""
    if policy.estimated_instance_warmup is not None:
        return policy.estimated_instance_warmup
    if config.default_instance_warmup is not None:
        return config.default_instance_warmup
    return config.default_cooldown


def warm_capacity(group: Group, warm_after_s: float, now_s: float) -> int:
    """Return the units of capacity of InService instances that have warmed up."""
    return weigh([member for member in group.staying() if _warm(member, warm_after_s, now_s)])


def is_warming(group: Group, warm_after_s: float, now_s: float) -> bool:
    """Return whether any instance is starting or warming up, which prevents scale-in."""
    staying = [member for member in group.staying() if member.state in COUNTED]
    return any(not _warm(member, warm_after_s, now_s) for member in staying)


def _warm(member: Member, warm_after_s: float, now_s: float) -> bool:
    since_s = member.asg.in_service_s
    in_service = member.state is LifecycleState.IN_SERVICE and since_s is not None
    return in_service and since_s is not None and now_s - since_s >= warm_after_s


def adjust(group: Group, policy: ScalingPolicy, adjustment: int, base: int) -> int:
    """Return the desired capacity after a policy's adjustment of `base` units, within the group's limits."""
    if policy.adjustment_type == "ExactCapacity":
        return clamp(group.pool, adjustment)
    change = adjustment
    if policy.adjustment_type == "PercentChangeInCapacity":
        change = _percent(base, adjustment, policy.min_adjustment_magnitude or 0)
    return clamp(group.pool, base + change)


def _percent(base: int, percent: int, least: int) -> int:
    """Return a percentage of `base`, rounded towards zero. The magnitude of the result is at least `least`, and at
    least 1 unless the exact result is 0."""
    exact = abs(base * percent) / 100
    size = max(int(exact), 1 if exact else 0, least)
    return size if percent > 0 else -size


def step_for(policy: ScalingPolicy, breach: float) -> StepAdjustment | None:
    """Return the step whose interval contains the breach, or None. A step above the threshold includes its lower bound,
    and a step below the threshold includes its upper bound."""
    for step in policy.step_adjustments:
        low, high = step.metric_interval_lower_bound, step.metric_interval_upper_bound
        if breach >= 0:
            inside = (low is None or low <= breach) and (high is None or breach < high)
        else:
            inside = (low is None or low < breach) and (high is None or breach <= high)
        if inside:
            return step
    return None


HIGH_PERIODS = 3
LOW_PERIODS = 15
LOW_SHARE = 0.9


def track(changes: Changes, group: Group, asg: Asg, metrics: Metrics | None, period_s: float) -> None:
    """Evaluate all target-tracking policies and change desired capacity."""
    if group.suspended(Process.ALARM_NOTIFICATION) or asg.deleting:
        return
    now_s = changes.steady.now_s()
    policies = [p for p in asg.policies.values() if p.target_tracking_configuration and p.enabled]
    wanted: dict[str, int] = {}
    for policy in policies:
        alarm = asg.alarms[policy.policy_name]
        before = (alarm.above_since_s, alarm.below_since_s)
        value = _observe(alarm, policy, metrics, now_s)
        changes.unsaved |= before != (alarm.above_since_s, alarm.below_since_s)
        if value is not None:
            wanted[policy.policy_name] = _wanted_capacity(group, asg, policy, value, now_s)
    if not _scale_out(changes, group, asg, policies, wanted, period_s):
        _scale_in(changes, group, asg, policies, wanted, period_s)


def _observe(alarm: Alarm, policy: ScalingPolicy, metrics: Metrics | None, now_s: float) -> float | None:
    """Return the metric's value, and record the times since which the value is above or below the target."""
    value = metrics.value(policy) if metrics is not None else None
    target = _tracking(policy).target_value
    high = value is not None and value > target
    low = value is not None and value < target * LOW_SHARE
    alarm.above_since_s = (alarm.above_since_s or now_s) if high else None
    alarm.below_since_s = (alarm.below_since_s or now_s) if low else None
    return value


def _tracking(policy: ScalingPolicy) -> TargetTracking:
    assert policy.target_tracking_configuration is not None
    return policy.target_tracking_configuration


def _wanted_capacity(group: Group, asg: Asg, policy: ScalingPolicy, value: float, now_s: float) -> int:
    """Return the capacity that the metric's value requires, rounded up. The metric's value is relative to warm
    capacity, so instances that are warming up do not count."""
    ready = max(1, warm_capacity(group, warmup_s(asg.config, policy), now_s))
    return clamp(group.pool, math.ceil(ready * value / _tracking(policy).target_value))


def _due(alarm: Alarm, since_s: float | None, periods: int, now_s: float, period_s: float) -> bool:
    if since_s is None or now_s - since_s < periods * period_s:
        return False
    return alarm.acted_s is None or now_s - alarm.acted_s >= period_s


def _scale_out(
    changes: Changes, group: Group, asg: Asg, policies: Sequence[ScalingPolicy], wanted: dict[str, int], period_s: float
) -> bool:
    now_s = changes.steady.now_s()

    def due(policy: ScalingPolicy) -> bool:
        alarm = asg.alarms[policy.policy_name]
        ready = _due(alarm, alarm.above_since_s, HIGH_PERIODS, now_s, period_s)
        return ready and wanted[policy.policy_name] > group.desired

    candidates = [policy for policy in policies if policy.policy_name in wanted and due(policy)]
    if not candidates:
        return False
    most = max(candidates, key=lambda policy: wanted[policy.policy_name])
    _act(changes, group, asg, most, wanted[most.policy_name], high=True)
    return True


def _scale_in(
    changes: Changes, group: Group, asg: Asg, policies: Sequence[ScalingPolicy], wanted: dict[str, int], period_s: float
) -> None:
    now_s = changes.steady.now_s()
    candidates = [p for p in policies if not _tracking(p).disable_scale_in]
    for policy in candidates:
        alarm = asg.alarms[policy.policy_name]
        if policy.policy_name not in wanted or not _due(
            alarm=alarm, since_s=alarm.below_since_s, periods=LOW_PERIODS, now_s=now_s, period_s=period_s
        ):
            return
        if is_warming(group, warmup_s(asg.config, policy), now_s):
            return
    most = max(candidates, key=lambda policy: wanted[policy.policy_name], default=None)
    if most is not None and wanted[most.policy_name] < group.desired:
        _act(changes, group, asg, most, wanted[most.policy_name], high=False)


def _act(changes: Changes, group: Group, asg: Asg, policy: ScalingPolicy, desired: int, *, high: bool) -> None:
    asg.alarms[policy.policy_name].acted_s = changes.steady.now_s()
    name = policy.alarms[0 if high else 1]
    cause = f"a monitor alarm {name} in state ALARM triggered policy {policy.policy_name}"
    changes.set_desired(group, desired, cause)


MAX_INSTANCES = 99_999
"""Maximum number of instances of one group. A larger maximum size is probably a mistake."""


def check_limits(pool: Pool, *, most: int = MAX_INSTANCES) -> str:
    """Return the pool's limits as text. Raise Refused unless 0 ≤ min ≤ max ≤ `most`."""
    limits = f"min: {pool.min_size}, max: {pool.max_size}"
    if not 0 <= pool.min_size <= pool.max_size <= most:
        raise Refused(
            f"The pool {pool.name!r} cannot have the limits {limits}.", remedy=f"Give it 0 ≤ min ≤ max ≤ {most}."
        )
    return limits


def check_desired(pool: Pool, desired: int) -> None:
    """Raise Refused if `desired` is outside the pool's limits."""
    if clamp(pool, desired) != desired:
        raise Refused(
            f"desired capacity {desired} of pool {pool.name!r} is outside [{pool.min_size}, {pool.max_size}]",
            remedy="`batchlab grid scale --min N --max N` changes the limits.",
        )


def check_decrement(pool: Pool, desired: int, leaving: int) -> None:
    """Raise Refused if `desired` minus `leaving` is below the pool's minimum size."""
    if desired - leaving < pool.min_size:
        raise Refused(
            f"terminating {leaving} of pool {pool.name!r} would take its desired capacity"
            f" from {desired} below its min of {pool.min_size}"
        )


def set_limits(
    changes: Changes, group: Group, min_size: int | None, max_size: int | None, desired: int | None, *, cause: str
) -> None:
    """Set the sizes that are not None, and move desired capacity into the new limits. If the minimum is above the
    maximum, record a failed activity instead of an error, because a scheduled action does not have a caller."""
    asg = group.asg
    assert asg is not None
    low = asg.config.min_size if min_size is None else min_size
    high = asg.config.max_size if max_size is None else max_size
    if low > high:
        what = f"Could not set min: {low}, max: {high}: min is above max"
        changes.note(group.pool.name, what, changes.cause_text(asg, cause), "Failed")
        return
    asg.config = replace(asg.config, min_size=low, max_size=high)
    group.pool = replace(group.pool, min_size=low, max_size=high)
    changes.unsaved = True
    wanted = clamp(group.pool, group.desired if desired is None else desired)
    limits = f"min: {low}, max: {high}, desired: {wanted}"
    changes.set_desired(group, wanted, f"{cause} update of AutoScalingGroup constraints to {limits}")


def first_s(action: ScheduledAction, now_s: float) -> float | None:
    """Return the time of an action's first run, which is its start time or its first recurrence."""
    if action.start_time is not None:
        return action.start_time
    return _recurs_s(action, now_s)


def _recurs_s(action: ScheduledAction, after_s: float) -> float | None:
    if not action.recurrence:
        return None
    zone = ZoneInfo(action.time_zone or "UTC")
    due_s = _next_s(action.recurrence, zone, after_s)
    late = due_s is not None and action.end_time is not None and due_s > action.end_time
    return None if late else due_s


def _next_s(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """Return the next time of a cron expression, with AWS's rules for daylight-saving changes. A local time that does
    not exist runs an hour later, and a local time that occurs twice runs at its first occurrence."""
    # The search starts 3 hours earlier, because a daylight-saving change is shorter than 3 hours.
    before = datetime.fromtimestamp(after_s, zone).replace(tzinfo=None) - timedelta(hours=3)
    try:
        times = due_times.local_times(expression, before)
    except due_times.NeverDue:
        return None
    due_s = (local.replace(tzinfo=zone).timestamp() for local in times)
    return next((at_s for at_s in due_s if at_s > after_s), None)


def run_due(changes: Changes, group: Group) -> None:
    """Run due scheduled actions in order. Remove scheduled actions that will not run again."""
    asg, now_s = group.asg, changes.now_s()
    assert asg is not None
    due = sorted((due_s, name) for name, due_s in asg.due_s.items() if due_s <= now_s)
    for _, name in due:
        action = asg.scheduled[name]
        if not group.suspended(Process.SCHEDULED_ACTIONS):
            set_limits(
                changes=changes,
                group=group,
                min_size=action.min_size,
                max_size=action.max_size,
                desired=action.desired_capacity,
                cause="a scheduled action",
            )
        again_s = _recurs_s(action, now_s)
        if again_s is None:
            remove_action(asg, name)
        else:
            asg.due_s[name] = again_s
        changes.unsaved = True


def remove_action(asg: Asg, name: str) -> None:
    del asg.scheduled[name], asg.due_s[name]
