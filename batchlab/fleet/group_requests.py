"""Base class and validation of all requests, and requests for groups, capacity, tags, activities, and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from batchlab.core.model import Activity, LifecycleState, Pool
from batchlab.core.ports import Clock, Ids, Launcher
from batchlab.fleet import instance_refresh, placement
from batchlab.fleet.api_types import (
    ABANDON,
    CONTINUE,
    LAUNCHING,
    TERMINATING,
    ActivityDetails,
    AlreadyExists,
    GroupConfig,
    GroupDetails,
    InstanceDetails,
    InstancesDistribution,
    LifecycleHook,
    LifecycleNotification,
    LimitExceeded,
    Metrics,
    Override,
    Prices,
    Process,
    ResourceInUse,
    ScalingActivityInProgress,
    Tag,
    Templates,
    ValidationError,
)
from batchlab.fleet.changes import stamp
from batchlab.fleet.engine import DRAIN_S, Engine
from batchlab.fleet.group_state import (
    ENDING,
    WARM,
    Asg,
    Group,
    Member,
    Store,
    activity_details,
    activity_id,
    instance_details,
)
from batchlab.fleet.placement import Sources
from batchlab.fleet.scaling_policies import MAX_INSTANCES, set_limits
from batchlab.fleet.termination import POLICIES, clamp

SHORTEST_LIFETIME_S = 86_400


class Requests(Engine):
    """Base class of all requests. A group may name only zones in `zones`, or any zone if `zones` is empty. The subnets
    of a group are in these zones, or in the region's zones "a" to "f".
    Target-tracking policies need `metrics`, and `alarm_period_s` is the period of their alarms. A terminated instance
    has `drain_s` seconds to finish before the launcher kills the instance. `shortest_lifetime_s` is the minimum of
    MaxInstanceLifetime, which a test may lower."""

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
        one_machine: bool = False,
    ) -> None:
        self._named_zones = tuple(zones)
        self._data_sources = Sources(templates, prices, self._named_zones or tuple(region + zone for zone in "abcdef"))
        super().__init__(
            launcher,
            clock,
            ids,
            store,
            drain_s=drain_s,
            sources=self._data_sources,
            metrics=metrics,
            alarm_period_s=alarm_period_s,
            one_machine=one_machine,
        )
        self._region, self._account = region, account
        self._shortest_lifetime_s = shortest_lifetime_s

    def take_notifications(self) -> Sequence[LifecycleNotification]:
        """Return the newest notifications of hooks since the last call, at most 1,000. A restart discards
        notifications."""
        notices = list(self._changes.notices)
        self._changes.notices.clear()
        return notices

    def _asg_group(self, name: str) -> tuple[Group, Asg]:
        group = self._groups.get(name)
        if group is None or group.asg is None:
            raise ValidationError(f"AutoScalingGroup name not found - AutoScalingGroup: {name} not found")
        return group, group.asg

    def _changeable(self, name: str) -> tuple[Group, Asg]:
        group, asg = self._asg_group(name)
        if asg.deleting:
            raise ValidationError("The AutoScaling group may not be modified while it is pending delete")
        return group, asg

    def _instance(self, instance_id: str) -> tuple[Group, Asg, Member]:
        group_and_member = self._find(instance_id)
        if group_and_member is not None:
            group, member = group_and_member
            if group.asg is not None and member.state is not LifecycleState.TERMINATED:
                return group, group.asg, member
        raise ValidationError(f"Instance Id not found - No managed instance found for instance ID: {instance_id}")

    def _instances(self, group: Group, instance_ids: Sequence[str]) -> list[Member]:
        for instance_id in instance_ids:
            member = group.members.get(instance_id)
            if member is None or member.state is LifecycleState.TERMINATED:
                raise ValidationError(
                    f"The instance {instance_id} is not part of Auto Scaling group {group.pool.name}."
                )
        return [group.members[fromkey] for fromkey in dict.fromkeys(instance_ids)]

    def _checked(self, config: GroupConfig, before: GroupConfig | None = None) -> GroupConfig:
        config = check_group(config, self._named_zones, self._shortest_lifetime_s, before)
        placement.check(config, self._data_sources)
        return config

    def _check_cooldown(self, group: Group, asg: Asg) -> None:
        if asg.cooling or self._changes.steady.now_s() < asg.cooled_s:
            newest = self._changes.log.newest(group.pool.name, 1)
            which = activity_id(newest[0]) if newest else "of a cooldown"
            raise ScalingActivityInProgress(f"Scaling activity {which} is in progress and blocks this action")

    def _activity_details(self, activity: Activity) -> ActivityDetails:
        name = activity.pool
        return activity_details(activity, self._groups.get(name), self._arn("autoScalingGroup", name, ""))

    def _arn(self, kind: str, group: str, rest: str) -> str:
        unique = uuid5(NAMESPACE_URL, f"{self._account}/{kind}/{group}/{rest}")
        place = f"arn:aws:autoscaling:{self._region}:{self._account}"
        return f"{place}:{kind}:{unique}:autoScalingGroupName/{group}{rest}"


LONGEST_LIFETIME_S = 31_536_000
HEALTH_CHECKS = ("EC2", "EBS", "ELB", "VPC_LATTICE")
MAX_TAGS = 50
MAX_WEIGHT = 999
MAX_SPOT_POOLS = 20


def check_group(
    config: GroupConfig, zones: Sequence[str], shortest_lifetime_s: int, before: GroupConfig | None = None
) -> GroupConfig:
    """Return the group's configuration in normal form. Raise ValidationError if the configuration is invalid.

    `before` is the group's present configuration. An earlier version accepted more health checks and mixed instances
    policies, so these are checked only if they change."""
    low, high = config.min_size, config.max_size
    if not 1 <= len(config.auto_scaling_group_name) <= 255:
        raise ValidationError("AutoScalingGroupName must have 1 to 255 characters.")
    if low < 0 or high > MAX_INSTANCES:
        raise ValidationError(f"Sizes must be between 0 and {MAX_INSTANCES}.")
    check_sizes(low, high)
    if not config.availability_zones and not config.vpc_zone_identifier:
        raise ValidationError("At least one Availability Zone or VPC Subnet is required.")
    wrong = [zone for zone in config.availability_zones if zones and zone not in zones]
    if wrong:
        raise ValidationError(f"Invalid availability zones: {wrong}")
    unknown = [name for name in config.termination_policies if name not in POLICIES]
    if unknown:
        raise ValidationError(f"Invalid termination policies: {unknown}")
    if before is None or config.health_check_type != before.health_check_type:
        for kind in config.health_check_type.split(","):
            one_of("HealthCheckType", kind.strip(), HEALTH_CHECKS)
    _seconds("DefaultCooldown", config.default_cooldown)
    _seconds("HealthCheckGracePeriod", config.health_check_grace_period)
    mixed = config.mixed_instances_policy
    if mixed is not None and (before is None or mixed != before.mixed_instances_policy):
        _check_weights(mixed.overrides)
        mixed = replace(mixed, instances_distribution=_distribution(mixed.instances_distribution))
    lifetime = config.max_instance_lifetime or None
    if lifetime is not None and not shortest_lifetime_s <= lifetime <= LONGEST_LIFETIME_S:
        raise ValidationError(
            f"MaxInstanceLifetime must be 0 or between {shortest_lifetime_s} and {LONGEST_LIFETIME_S} seconds."
        )
    warmup = config.default_instance_warmup
    return replace(
        config,
        mixed_instances_policy=mixed,
        max_instance_lifetime=lifetime,
        # As on AWS, -1 disables the default warm-up time.
        default_instance_warmup=None if warmup is not None and warmup < 0 else warmup,
        termination_policies=config.termination_policies or ("Default",),
    )


def check_sizes(low: int, high: int) -> None:
    if high < low:
        raise ValidationError(f"Max bound, {high}, must be greater than or equal to min bound, {low}")


def _check_weights(overrides: Sequence[Override]) -> None:
    weights = [override.weighted_capacity for override in overrides]
    if any(weight is not None for weight in weights) and None in weights:
        raise ValidationError("If one override has a WeightedCapacity, every override must have one.")
    if any(weight is not None and not 1 <= weight <= MAX_WEIGHT for weight in weights):
        raise ValidationError(f"WeightedCapacity must be between 1 and {MAX_WEIGHT}.")


def _distribution(shares: InstancesDistribution) -> InstancesDistribution:
    """Return the distribution with AWS's default of SpotInstancePools. Raise ValidationError if the distribution is
    invalid."""
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
    pools = shares.spot_instance_pools
    if shares.spot_allocation_strategy != "lowest-price":
        if pools is not None:
            raise ValidationError("SpotInstancePools is valid only with the SpotAllocationStrategy lowest-price.")
        return shares
    pools = placement.SPOT_POOLS if pools is None else pools
    if not 1 <= pools <= MAX_SPOT_POOLS:
        raise ValidationError(f"SpotInstancePools must be between 1 and {MAX_SPOT_POOLS}.")
    return replace(shares, spot_instance_pools=pools)


def check_tags(tags: Mapping[str, Tag], added: Sequence[Tag]) -> dict[str, Tag]:
    """Return a group's tags and the added tags by key. Raise a Fault if AWS does not allow the added tags."""
    keys = [tag.key for tag in added]
    if len(set(keys)) < len(keys):
        raise ValidationError("A request may contain each tag key only once.")
    if reserved := [key for key in keys if key.lower().startswith("aws:")]:
        raise ValidationError(f"The prefix aws: of a tag key is reserved for AWS: {reserved}")
    together = {**tags, **{tag.key: tag for tag in added}}
    if len(together) > MAX_TAGS:
        raise LimitExceeded(f"A group may have {MAX_TAGS} tags.")
    return together


def check_desired(config: GroupConfig, capacity: int) -> None:
    if not config.min_size <= capacity <= config.max_size:
        raise ValidationError(
            f"Desired capacity:{capacity} must be between the specified min"
            f" size:{config.min_size} and max size:{config.max_size}"
        )


def check_hook(lifecycle_hook: LifecycleHook) -> None:
    one_of("LifecycleTransition", lifecycle_hook.lifecycle_transition, (LAUNCHING, TERMINATING))
    if not 30 <= lifecycle_hook.heartbeat_timeout <= 7200:
        raise ValidationError("HeartbeatTimeout must be between 30 and 7200 seconds.")
    check_result("DefaultResult", lifecycle_hook.default_result)


def check_result(name: str, value: str) -> None:
    one_of(name, value, (CONTINUE, ABANDON))


def parse_processes(names: Sequence[str]) -> list[Process]:
    """Return the processes of a group with the given names, or all processes if `names` is empty."""
    valid = [str(process) for process in Process]
    for name in names:
        if name not in valid:
            raise ValidationError(f"Unknown process type: {name}")
    return [Process(name) for name in names or valid]


def _seconds(name: str, value: int) -> None:
    if value < 0:
        raise ValidationError(f"{name} must not be negative.")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValidationError(f"Invalid {name}: {value}. Valid values are: [{', '.join(allowed)}]")


_LAUNCHED_FROM = ("launch_template", "mixed_instances_policy", "launch_configuration_name")
_SERVICE_ROLE = "aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
_NEVER = {"launch_template": None, "mixed_instances_policy": None, "launch_configuration_name": ""}


class GroupRequests(Requests):
    def create_auto_scaling_group(
        self,
        config: GroupConfig,
        *,
        desired_capacity: int | None = None,
        tags: Sequence[Tag] = (),
        lifecycle_hooks: Sequence[LifecycleHook] = (),
    ) -> None:
        """Create a group. A desired capacity of None means the minimum size. Raise AlreadyExists if a group of the same
        name exists."""
        name = config.auto_scaling_group_name
        if name in self._groups:
            raise AlreadyExists(
                f"AutoScalingGroup by this name already exists - A group with the name {name} already exists"
            )
        config = self._checked(placement.resolve(config, self._data_sources.templates))
        desired = config.min_size if desired_capacity is None else desired_capacity
        check_desired(config, desired)
        for hook in lifecycle_hooks:
            check_hook(hook)
        first_activity = self._changes.log.following
        asg = Asg(config, self._changes.now_s(), tags=check_tags({}, tags), first_activity=first_activity)
        asg.hooks = {hook.lifecycle_hook_name: hook for hook in lifecycle_hooks}
        group = Group(Pool(name, config.min_size, config.max_size), 0, asg=asg)
        self._groups[name] = group
        self._changes.unsaved = True
        self._changes.set_desired(group, desired, "a user request created an AutoScalingGroup", cooldown=0)
        self._save()

    def update_auto_scaling_group(
        self, name: str, changes: Mapping[str, Any], *, desired_capacity: int | None = None
    ) -> None:
        """Change the fields of GroupConfig in `changes`. Without `desired_capacity`, the group's desired capacity is
        moved into the new limits. During an instance refresh with a desired configuration, raise ValidationError for a
        change of the launch template."""
        if name not in self._groups:
            raise ValidationError("AutoScalingGroup name not found - null")
        group, asg = self._changeable(name)
        config = replace(asg.config, **changes)
        if any(key in changes for key in _LAUNCHED_FROM):
            if asg.rolling is not None and instance_refresh.has_desired_configuration(asg.rolling):
                raise ValidationError(
                    "An active instance refresh with a desired configuration exists. All configuration options derived"
                    " from the desired configuration are not available for update while the instance refresh is active."
                )
            config = placement.resolve(replace(config, **{**_NEVER, **changes}), self._data_sources.templates)
        config = self._checked(config, asg.config)
        pool = replace(group.pool, min_size=config.min_size, max_size=config.max_size)
        desired = clamp(pool, group.desired) if desired_capacity is None else desired_capacity
        check_desired(config, desired)
        asg.config = config
        group.reset_failures()
        set_limits(
            changes=self._changes,
            group=group,
            min_size=config.min_size,
            max_size=config.max_size,
            desired=desired,
            cause="a user request",
        )
        self._save()

    def delete_auto_scaling_group(self, name: str, *, force_delete: bool = False) -> None:
        """Delete a group. If the group has instances, raise ResourceInUse or ScalingActivityInProgress. With
        `force_delete`, terminate the instances without their hooks, and remove the group after all its instances have
        ended."""
        group, asg = self._asg_group(name)
        living = [m for m in group.members.values() if m.state is not LifecycleState.TERMINATED]
        if living and not force_delete:
            if all(member.state in ENDING for member in living):
                raise ScalingActivityInProgress(
                    "You cannot delete an AutoScalingGroup while there are scaling activities in"
                    " progress for that group."
                )
            raise ResourceInUse(
                "You cannot delete an AutoScalingGroup while there are instances or pending Spot"
                " instance request(s) still in the group."
            )
        asg.deleting, self._changes.unsaved = True, True
        for member in living:
            if member.state is LifecycleState.TERMINATING_WAIT:
                member.asg.waits.clear()
                self._changes.move(member, LifecycleState.TERMINATING_PROCEED)
            elif member.state not in ENDING:
                why = "a user request to delete the group"
                note = "terminated: the group is deleted"
                self._changes.retire(group, member, why=why, note=note, hooked=False)
        if not living:
            self._remove(name)
        self._save()

    def describe_auto_scaling_groups(self, names: Sequence[str] = ()) -> Sequence[GroupDetails]:
        """Return all groups, or the existing groups in `names`, sorted by name."""
        wanted = sorted(set(names) & set(self._groups)) if names else sorted(self._groups)
        return [
            self._details(group, group.asg)
            for group in (self._groups[name] for name in wanted)
            if group.asg is not None
        ]

    def _details(self, group: Group, asg: Asg) -> GroupDetails:
        name = group.pool.name
        members = [m for m in group.members.values() if m.state is not LifecycleState.TERMINATED]
        warm = [member for member in members if member.state in WARM]
        return GroupDetails(
            config=replace(asg.config, availability_zones=placement.zones_of(asg.config, self._data_sources)),
            auto_scaling_group_arn=self._arn("autoScalingGroup", name, ""),
            service_linked_role_arn=f"arn:aws:iam::{self._account}:role/{_SERVICE_ROLE}",
            desired_capacity=group.desired,
            created_time=asg.created_s,
            instances=tuple(instance_details(group, m) for m in members if m.state not in WARM),
            suspended_processes=tuple(sorted(asg.suspended.items())),
            tags=tuple(asg.tags[key] for key in sorted(asg.tags)),
            status="Delete in progress" if asg.deleting else None,
            warm_pool_configuration=asg.warm_pool,
            warm_pool_size=len(warm) if asg.warm_pool else None,
        )

    def describe_auto_scaling_instances(self, instance_ids: Sequence[str] = ()) -> Sequence[InstanceDetails]:
        """Return the existing instances in `instance_ids`, or all instances including warm instances if `instance_ids`
        is empty."""
        return [
            instance_details(group, member)
            for group, member in self._members()
            if group.asg is not None
            and member.state is not LifecycleState.TERMINATED
            and (not instance_ids or member.instance.id in instance_ids)
        ]

    def set_desired_capacity(self, name: str, desired_capacity: int, *, honor_cooldown: bool = False) -> None:
        """Set the group's desired capacity. With `honor_cooldown`, raise ScalingActivityInProgress during a
        cooldown."""
        group, asg = self._changeable(name)
        limits = (("above max", asg.config.max_size), ("below min", asg.config.min_size))
        for which, bound in limits:
            over = desired_capacity - bound
            if over > 0 if which == "above max" else over < 0:
                raise ValidationError(
                    f"New SetDesiredCapacity value {desired_capacity} is {which} value {bound}"
                    " for the AutoScalingGroup."
                )
        if honor_cooldown:
            self._check_cooldown(group, asg)
        cause = "a user request explicitly set group desired capacity"
        self._changes.set_desired(group, desired_capacity, cause)
        self._save()

    def create_or_update_tags(self, tags: Mapping[str, Sequence[Tag]]) -> None:
        """Create or replace the tags of each group in `tags`, or of no group. Raise ValidationError if a group does not
        exist."""
        groups = {name: self._changeable(name)[1] for name in tags}
        together = {name: check_tags(asg.tags, tags[name]) for name, asg in groups.items()}
        for name, asg in groups.items():
            asg.tags = together[name]
        self._save(changed=True)

    def delete_tags(self, name: str, keys: Sequence[str]) -> None:
        """Delete tags of a group, and ignore keys that do not exist."""
        _, asg = self._changeable(name)
        asg.tags = {key: tag for key, tag in asg.tags.items() if key not in keys}
        self._save(changed=True)

    def describe_scaling_activities(
        self, name: str | None = None, *, activity_ids: Sequence[str] = (), include_deleted_groups: bool = False
    ) -> Sequence[ActivityDetails]:
        """Return the last 200 activities of each group name, newest first. Activities of deleted groups are included
        only with `include_deleted_groups`."""
        if name is not None and not include_deleted_groups:
            self._asg_group(name)
        log = self._changes.log
        # Activities without a group name are about instances that do not belong to a group.
        activities = [activity for activity in log.newest(name, log.following) if activity.pool]
        return [
            detail
            for detail in map(self._activity_details, activities)
            if include_deleted_groups or detail.auto_scaling_group_state != "Deleted"
            if not activity_ids or detail.activity_id in activity_ids
        ]

    def suspend_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        """Suspend the named processes of a group, or all processes if `processes` is empty."""
        _, asg = self._changeable(name)
        at = self._changes.now_s()
        for process in parse_processes(processes):
            reason = f"User suspended at {stamp(at)}"
            asg.suspended.setdefault(process, reason)
        self._save(changed=True)

    def resume_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        group, asg = self._changeable(name)
        chosen = parse_processes(processes)
        asg.suspended = {p: reason for p, reason in asg.suspended.items() if p not in chosen}
        if Process.LAUNCH in chosen:
            group.reset_failures()
        self._changes.unsaved = True
        self._changes.scale_in(group)
        self._save()
