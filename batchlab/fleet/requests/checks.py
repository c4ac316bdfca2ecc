"""What AWS refuses before it changes anything; the messages are AWS's where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.fleet.api import (
    ABANDON,
    CONTINUE,
    LAUNCHING,
    TERMINATING,
    GroupConfig,
    InstancesDistribution,
    LifecycleHook,
    Process,
)
from batchlab.fleet.faults import ValidationError
from batchlab.fleet.limits import MOST_INSTANCES
from batchlab.fleet.termination import POLICIES

LONGEST_LIFETIME_S = 31_536_000


def group(config: GroupConfig, zones: Sequence[str], shortest_lifetime_s: int) -> GroupConfig:
    """The configuration in its normal form."""
    low, high = config.min_size, config.max_size
    if not 1 <= len(config.auto_scaling_group_name) <= 255:
        raise ValidationError("AutoScalingGroupName must have 1 to 255 characters.")
    if low < 0 or high > MOST_INSTANCES:
        raise ValidationError(f"Sizes must be between 0 and {MOST_INSTANCES}.")
    if high < low:
        raise ValidationError(
            f"Max bound, {high}, must be greater than or equal to min bound, {low}"
        )
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
            f"MaxInstanceLifetime must be 0 or between {shortest_lifetime_s} and"
            f" {LONGEST_LIFETIME_S} seconds."
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
    one_of(
        "OnDemandAllocationStrategy",
        shares.on_demand_allocation_strategy,
        ("prioritized", "lowest-price"),
    )
    one_of(
        "SpotAllocationStrategy",
        shares.spot_allocation_strategy,
        (
            "lowest-price",
            "capacity-optimized",
            "capacity-optimized-prioritized",
            "price-capacity-optimized",
        ),
    )


def desired(config: GroupConfig, capacity: int) -> None:
    """Within the limits."""
    if not config.min_size <= capacity <= config.max_size:
        raise ValidationError(
            f"Desired capacity:{capacity} must be between the specified min"
            f" size:{config.min_size} and max size:{config.max_size}"
        )


def hook(one: LifecycleHook) -> None:
    """Its transition, its timeout and its default result."""
    one_of("LifecycleTransition", one.lifecycle_transition, (LAUNCHING, TERMINATING))
    if not 30 <= one.heartbeat_timeout <= 7200:
        raise ValidationError("HeartbeatTimeout must be between 30 and 7200 seconds.")
    result("DefaultResult", one.default_result)


def result(name: str, value: str) -> None:
    one_of(name, value, (CONTINUE, ABANDON))


def processes(names: Sequence[str]) -> list[Process]:
    """These processes, all where none is named."""
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
