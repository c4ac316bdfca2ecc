"""Simple and step scaling: from a policy to a desired capacity, by AWS's rules of rounding."""

from __future__ import annotations

from batchlab.fleet.api import GroupConfig, ScalingPolicy, StepAdjustment
from batchlab.fleet.decisions import clamp
from batchlab.fleet.state import COUNTED, Group, Member, weigh
from batchlab.model import LifecycleState


def warmup_s(config: GroupConfig, policy: ScalingPolicy) -> int:
    """Seconds in service after which an instance counts: the policy's own, else the group's, else
    the default cooldown."""
    if policy.estimated_instance_warmup is not None:
        return policy.estimated_instance_warmup
    if config.default_instance_warmup is not None:
        return config.default_instance_warmup
    return config.default_cooldown


def warm_capacity(group: Group, warm_after_s: float, now_s: float) -> int:
    """Units that are in service and have warmed up."""
    return weigh([member for member in group.staying() if _warm(member, warm_after_s, now_s)])


def is_warming(group: Group, warm_after_s: float, now_s: float) -> bool:
    """Whether any instance is starting or warming up: then nothing is scaled in."""
    staying = [member for member in group.staying() if member.state in COUNTED]
    return any(not _warm(member, warm_after_s, now_s) for member in staying)


def _warm(member: Member, warm_after_s: float, now_s: float) -> bool:
    since_s = member.bond.in_service_s
    in_service = member.state is LifecycleState.IN_SERVICE and since_s is not None
    return in_service and since_s is not None and now_s - since_s >= warm_after_s


def adjusted(group: Group, policy: ScalingPolicy, adjustment: int, base: int) -> int:
    """Desired capacity after this adjustment of `base` units, within the group's limits."""
    if policy.adjustment_type == "ExactCapacity":
        return clamp(group.pool, adjustment)
    change = adjustment
    if policy.adjustment_type == "PercentChangeInCapacity":
        change = _percent(base, adjustment, policy.min_adjustment_magnitude or 0)
    return clamp(group.pool, base + change)


def _percent(base: int, percent: int, least: int) -> int:
    """Towards zero, but never to zero; at least so many where a least is given."""
    exact = abs(base * percent) / 100
    size = max(int(exact), 1 if exact else 0, least)
    return size if percent > 0 else -size


def step_for(policy: ScalingPolicy, breach: float) -> StepAdjustment | None:
    """The step in whose interval the breach lies: above the threshold the lower bound belongs to
    it, below the threshold the upper one."""
    for step in policy.step_adjustments:
        low, high = step.metric_interval_lower_bound, step.metric_interval_upper_bound
        if breach >= 0:
            inside = (low is None or low <= breach) and (high is None or breach < high)
        else:
            inside = (low is None or low < breach) and (high is None or breach <= high)
        if inside:
            return step
    return None
