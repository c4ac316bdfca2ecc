"""Base class and validation of all requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import NAMESPACE_URL, uuid5

from batchlab.core.model import LifecycleState
from batchlab.core.ports import Clock, Ids, Launcher
from batchlab.fleet.api_types import (
    ABANDON,
    CONTINUE,
    LAUNCHING,
    TERMINATING,
    GroupConfig,
    InstancesDistribution,
    LifecycleHook,
    LifecycleNotification,
    Metrics,
    Prices,
    Process,
    ScalingActivityInProgress,
    Templates,
    ValidationError,
)
from batchlab.fleet.engine import DRAIN_S, Engine
from batchlab.fleet.group_state import Asg, Group, Member, Store, activity_id
from batchlab.fleet.placement import Sources
from batchlab.fleet.scaling_policies import MAX_INSTANCES
from batchlab.fleet.termination import POLICIES

SHORTEST_LIFETIME_S = 86_400


class Requests(Engine):
    """Common part of all requests. A group that names only subnets uses `zones`. Target-tracking policies need
    `metrics`, and the period of their alarms is `alarm_period_s`. A terminated instance has `drain_s` to stop.
    `shortest_lifetime_s` is the minimum of MaxInstanceLifetime, which a test may lower."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: Store,
        *,
        templates: Templates,
        metrics: Metrics | None = None,
        prices: Prices | None = None,
        zones: Sequence[str] = (),
        region: str = "us-east-1",
        account: str = "000000000000",
        drain_s: float = DRAIN_S,
        alarm_period_s: float = 60.0,
        shortest_lifetime_s: int = SHORTEST_LIFETIME_S,
    ) -> None:
        self._data_sources = Sources(templates, prices, tuple(zones))
        super().__init__(
            launcher,
            clock,
            ids,
            store,
            drain_s=drain_s,
            sources=self._data_sources,
            metrics=metrics,
            alarm_period_s=alarm_period_s,
        )
        self._region, self._account = region, account
        self._shortest_lifetime_s = shortest_lifetime_s

    def take_notifications(self) -> Sequence[LifecycleNotification]:
        """Return notifications of hooks since the last call, at most the newest 1,000. They are not saved."""
        notices = list(self._changes.notices)
        self._changes.notices.clear()
        return notices

    def _asg_group(self, name: str) -> tuple[Group, Asg]:
        checked_group = self._groups.get(name)
        if checked_group is None or checked_group.asg is None:
            raise ValidationError(f"AutoScalingGroup name not found - AutoScalingGroup: {name} not found")
        return checked_group, checked_group.asg

    def _changeable(self, name: str) -> tuple[Group, Asg]:
        checked_group, asg = self._asg_group(name)
        if asg.deleting:
            raise ValidationError("The AutoScaling group may not be modified while it is pending delete")
        return checked_group, asg

    def _instance(self, instance_id: str) -> tuple[Group, Asg, Member]:
        found = self._find(instance_id)
        if found is not None:
            checked_group, member = found
            if checked_group.asg is not None and member.state is not LifecycleState.TERMINATED:
                return checked_group, checked_group.asg, member
        raise ValidationError(f"Instance Id not found - No managed instance found for instance ID: {instance_id}")

    def _instances(self, checked_group: Group, instance_ids: Sequence[str]) -> list[Member]:
        for one in instance_ids:
            member = checked_group.members.get(one)
            if member is None or member.state is LifecycleState.TERMINATED:
                raise ValidationError(
                    f"The instance {one} is not part of Auto Scaling group {checked_group.pool.name}."
                )
        return [checked_group.members[fromkey] for fromkey in dict.fromkeys(instance_ids)]

    def _check_cooldown(self, checked_group: Group, asg: Asg) -> None:
        if asg.cooling or self._changes.steady.now_s() < asg.cooled_s:
            newest = self._changes.log.newest(checked_group.pool.name, 1)
            which = activity_id(newest[0]) if newest else "of a cooldown"
            raise ScalingActivityInProgress(f"Scaling activity {which} is in progress and blocks this action")

    def _arn(self, kind: str, checked_group: str, rest: str) -> str:
        unique = uuid5(NAMESPACE_URL, f"{self._account}/{kind}/{checked_group}/{rest}")
        place = f"arn:aws:autoscaling:{self._region}:{self._account}"
        return f"{place}:{kind}:{unique}:autoScalingGroupName/{checked_group}{rest}"


LONGEST_LIFETIME_S = 31_536_000


def checked_group(config: GroupConfig, zones: Sequence[str], shortest_lifetime_s: int) -> GroupConfig:
    """Return the validated configuration in its normal form."""
    low, high = config.min_size, config.max_size
    if not 1 <= len(config.auto_scaling_group_name) <= 255:
        raise ValidationError("AutoScalingGroupName must have 1 to 255 characters.")
    if low < 0 or high > MAX_INSTANCES:
        raise ValidationError(f"Sizes must be between 0 and {MAX_INSTANCES}.")
    if high < low:
        raise ValidationError(f"Max bound, {high}, must be greater than or equal to min bound, {low}")
    if not config.availability_zones and not config.vpc_zone_identifier:
        raise ValidationError("At least one Availability Zone or VPC Subnet is required.")
    wrong = [zone for zone in config.availability_zones if zones and zone not in zones]
    if wrong:
        raise ValidationError(f"Invalid availability zones: {wrong}")
    unknown = [name for name in config.termination_policies if name not in POLICIES]
    if unknown:
        raise ValidationError(f"Invalid termination policies: {unknown}")
    _seconds("DefaultCooldown", config.default_cooldown)
    _seconds("HealthCheckGracePeriod", config.health_check_grace_period)
    if config.mixed_instances_policy is not None:
        _shares(config.mixed_instances_policy.instances_distribution)
    lifetime = config.max_instance_lifetime or None
    if lifetime is not None and not shortest_lifetime_s <= lifetime <= LONGEST_LIFETIME_S:
        raise ValidationError(
            f"MaxInstanceLifetime must be 0 or between {shortest_lifetime_s} and {LONGEST_LIFETIME_S} seconds."
        )
    warmup = config.default_instance_warmup
    return replace(
        config,
        max_instance_lifetime=lifetime,
        # AWS's -1 turns the setting off.
        default_instance_warmup=None if warmup is not None and warmup < 0 else warmup,
        termination_policies=config.termination_policies or ("Default",),
    )


def _shares(shares: InstancesDistribution) -> None:
    percentage = shares.on_demand_percentage_above_base_capacity
    if not 0 <= percentage <= 100:
        raise ValidationError("OnDemandPercentageAboveBaseCapacity must be between 0 and 100.")
    _seconds("OnDemandBaseCapacity", shares.on_demand_base_capacity)
    one_of("OnDemandAllocationStrategy", shares.on_demand_allocation_strategy, ("prioritized", "lowest-price"))
    one_of(
        "SpotAllocationStrategy",
        shares.spot_allocation_strategy,
        ("lowest-price", "capacity-optimized", "capacity-optimized-prioritized", "price-capacity-optimized"),
    )


def check_desired(config: GroupConfig, capacity: int) -> None:
    if not config.min_size <= capacity <= config.max_size:
        raise ValidationError(
            f"Desired capacity:{capacity} must be between the specified min"
            f" size:{config.min_size} and max size:{config.max_size}"
        )


def check_hook(one: LifecycleHook) -> None:
    one_of("LifecycleTransition", one.lifecycle_transition, (LAUNCHING, TERMINATING))
    if not 30 <= one.heartbeat_timeout <= 7200:
        raise ValidationError("HeartbeatTimeout must be between 30 and 7200 seconds.")
    check_result("DefaultResult", one.default_result)


def check_result(name: str, value: str) -> None:
    one_of(name, value, (CONTINUE, ABANDON))


def parse_processes(names: Sequence[str]) -> list[Process]:
    """Return the named processes, or all if none is named."""
    known = [str(process) for process in Process]
    for name in names:
        if name not in known:
            raise ValidationError(f"Unknown process type: {name}")
    return [Process(name) for name in names or known]


def _seconds(name: str, value: int) -> None:
    if value < 0:
        raise ValidationError(f"{name} must not be negative.")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValidationError(f"Invalid {name}: {value}. Valid values are: [{', '.join(allowed)}]")
