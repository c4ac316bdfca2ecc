"""The nouns of AWS's Auto Scaling API as frozen values.

Every field has AWS's name in snake case (`botocore.xform_name`), AWS's default and AWS's unit:
durations are seconds, moments are seconds of the epoch, percentages are 0–100. What AWS leaves
out of an answer is None here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from batchlab.core.model import LifecycleState, Market

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"
CONTINUE = "CONTINUE"
ABANDON = "ABANDON"
HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"


class Process(StrEnum):
    """What a group does by itself, and what SuspendProcesses may stop."""

    LAUNCH = "Launch"
    TERMINATE = "Terminate"
    ADD_TO_LOAD_BALANCER = "AddToLoadBalancer"
    ALARM_NOTIFICATION = "AlarmNotification"
    AZ_REBALANCE = "AZRebalance"
    HEALTH_CHECK = "HealthCheck"
    INSTANCE_REFRESH = "InstanceRefresh"
    REPLACE_UNHEALTHY = "ReplaceUnhealthy"
    SCHEDULED_ACTIONS = "ScheduledActions"


# --- Groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaunchTemplate:
    """A launch template by reference; `version` is a number, `$Latest` or `$Default`."""

    launch_template_id: str = ""
    launch_template_name: str = ""
    version: str = "$Default"


@dataclass(frozen=True, slots=True)
class Override:
    """One instance type that a mixed group may use; a weight counts in units of capacity."""

    instance_type: str
    weighted_capacity: int | None = None
    launch_template_specification: LaunchTemplate | None = None


@dataclass(frozen=True, slots=True)
class InstancesDistribution:
    """How a mixed group is shared out over markets and types."""

    on_demand_allocation_strategy: str = "prioritized"
    on_demand_base_capacity: int = 0
    on_demand_percentage_above_base_capacity: int = 100
    spot_allocation_strategy: str = "lowest-price"
    spot_instance_pools: int | None = None
    """2 where the strategy is lowest-price and nothing else is said."""
    spot_max_price: str = ""


@dataclass(frozen=True, slots=True)
class MixedInstancesPolicy:
    """AWS nests `launch_template.launch_template_specification`; here the two are one."""

    launch_template: LaunchTemplate
    overrides: tuple[Override, ...] = ()
    instances_distribution: InstancesDistribution = InstancesDistribution()


@dataclass(frozen=True, slots=True)
class Tag:
    key: str
    value: str = ""
    propagate_at_launch: bool = False


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """What CreateAutoScalingGroup sets and UpdateAutoScalingGroup changes, but desired capacity.

    Exactly one of `launch_template`, `mixed_instances_policy` and `launch_configuration_name` is
    given. `passive` are parameters that are kept, given back and otherwise without effect (load
    balancers, subnets beyond their zones), as pairs of AWS's name and JSON text.
    """

    auto_scaling_group_name: str
    min_size: int
    max_size: int
    launch_template: LaunchTemplate | None = None
    mixed_instances_policy: MixedInstancesPolicy | None = None
    launch_configuration_name: str = ""
    default_cooldown: int = 300
    availability_zones: tuple[str, ...] = ()
    vpc_zone_identifier: str = ""
    health_check_type: str = "EC2"
    health_check_grace_period: int = 0
    termination_policies: tuple[str, ...] = ("Default",)
    new_instances_protected_from_scale_in: bool = False
    capacity_rebalance: bool = False
    max_instance_lifetime: int | None = None
    default_instance_warmup: int | None = None
    passive: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceDetails:
    """An instance as DescribeAutoScalingGroups and DescribeAutoScalingInstances show it."""

    instance_id: str
    auto_scaling_group_name: str
    instance_type: str
    availability_zone: str
    lifecycle_state: LifecycleState
    health_status: str
    protected_from_scale_in: bool
    launch_template: LaunchTemplate | None = None
    """With the number of the version that was launched."""
    launch_configuration_name: str = ""
    weighted_capacity: int | None = None
    market: Market = Market.ON_DEMAND
    launched_s: float = 0.0
    note: str = ""
    """How it came to this state, in words; no field of AWS's."""


@dataclass(frozen=True, slots=True)
class GroupDetails:
    """A group as DescribeAutoScalingGroups shows it."""

    config: GroupConfig
    auto_scaling_group_arn: str
    desired_capacity: int
    created_time: float
    instances: tuple[InstanceDetails, ...]
    """Without Terminated ones, and without those of the warm pool, as on AWS."""
    suspended_processes: tuple[tuple[Process, str], ...] = ()
    """Each with AWS's SuspensionReason."""
    tags: tuple[Tag, ...] = ()
    status: str | None = None
    """ "Delete in progress" while ForceDelete waits for its instances."""
    warm_pool_configuration: WarmPool | None = None
    warm_pool_size: int | None = None
    predicted_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class ActivityDetails:
    """A scaling activity in AWS's words; `status_code` is AWS's ScalingActivityStatusCode."""

    activity_id: str
    auto_scaling_group_name: str
    description: str
    cause: str
    start_time: float
    status_code: str
    end_time: float | None = None
    status_message: str = ""
    progress: int = 0
    details: str = "{}"


# --- Lifecycle hooks ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LifecycleHook:
    """PutLifecycleHook's parameters, and GlobalTimeout, which follows from them."""

    auto_scaling_group_name: str
    lifecycle_hook_name: str
    lifecycle_transition: str
    """LAUNCHING or TERMINATING."""
    heartbeat_timeout: int = 3600
    default_result: str = ABANDON
    notification_target_arn: str = ""
    role_arn: str = ""
    notification_metadata: str = ""

    @property
    def global_timeout(self) -> int:
        """Seconds an instance may wait at most, however many heartbeats are recorded."""
        return min(172_800, 100 * self.heartbeat_timeout)


@dataclass(frozen=True, slots=True)
class LifecycleNotification:
    """That an instance waits in a hook: what AWS sends to the hook's target and to EventBridge."""

    hook: LifecycleHook
    instance_id: str
    lifecycle_action_token: str
    time: float
    origin: str = "EC2"
    """Or "AutoScalingGroup", "WarmPool"."""
    destination: str = "AutoScalingGroup"


# --- Scaling policies and schedules ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepAdjustment:
    """Bounds are relative to the breach threshold; None is minus or plus infinity."""

    scaling_adjustment: int
    metric_interval_lower_bound: float | None = None
    metric_interval_upper_bound: float | None = None


@dataclass(frozen=True, slots=True)
class TargetTracking:
    """TargetTrackingConfiguration. The metric is a predefined one, or a customized one that is
    carried as JSON text and understood by whoever supplies its value."""

    target_value: float
    predefined_metric_type: str = ""
    customized_metric_specification: str = ""
    disable_scale_in: bool = False


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """PutScalingPolicy's parameters; `policy_arn` and `alarms` are filled in by the answer."""

    auto_scaling_group_name: str
    policy_name: str
    policy_type: str = "SimpleScaling"
    """Or StepScaling, TargetTrackingScaling."""
    adjustment_type: str = ""
    """ChangeInCapacity, ExactCapacity, PercentChangeInCapacity."""
    min_adjustment_magnitude: int | None = None
    scaling_adjustment: int | None = None
    cooldown: int | None = None
    step_adjustments: tuple[StepAdjustment, ...] = ()
    metric_aggregation_type: str = ""
    estimated_instance_warmup: int | None = None
    target_tracking_configuration: TargetTracking | None = None
    enabled: bool = True
    policy_arn: str = ""
    alarms: tuple[str, ...] = ()
    """Names of the alarms of a target-tracking policy, the high one first."""


@dataclass(frozen=True, slots=True)
class ScheduledAction:
    """PutScheduledUpdateGroupAction's parameters. `recurrence` is cron with five fields, read in
    `time_zone` (an IANA name; UTC where empty)."""

    auto_scaling_group_name: str
    scheduled_action_name: str
    start_time: float | None = None
    end_time: float | None = None
    recurrence: str = ""
    time_zone: str = ""
    min_size: int | None = None
    max_size: int | None = None
    desired_capacity: int | None = None
    scheduled_action_arn: str = ""


# --- Instance refresh -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RefreshPreferences:
    min_healthy_percentage: int = 90
    max_healthy_percentage: int = 100
    instance_warmup: int | None = None
    """None takes the group's default warm-up, then its health check grace period."""
    skip_matching: bool = False
    auto_rollback: bool = False
    checkpoint_percentages: tuple[int, ...] = ()
    checkpoint_delay: int = 3600
    scale_in_protected_instances: str = "Wait"
    """Or Refresh, Ignore."""
    standby_instances: str = "Wait"
    """Or Terminate, Ignore."""


@dataclass(frozen=True, slots=True)
class DesiredConfiguration:
    """What a refresh moves the group to; one of the two."""

    launch_template: LaunchTemplate | None = None
    mixed_instances_policy: MixedInstancesPolicy | None = None


@dataclass(frozen=True, slots=True)
class InstanceRefresh:
    """A refresh as DescribeInstanceRefreshes shows it; `status` in AWS's words."""

    instance_refresh_id: str
    auto_scaling_group_name: str
    status: str
    start_time: float
    percentage_complete: int = 0
    instances_to_update: int = 0
    end_time: float | None = None
    status_reason: str = ""
    preferences: RefreshPreferences = RefreshPreferences()
    desired_configuration: DesiredConfiguration | None = None
    strategy: str = "Rolling"


# --- Warm pool ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WarmPool:
    """PutWarmPool's parameters. The prepared capacity is max − desired where
    `max_group_prepared_capacity` is None, else that number − desired, and at least `min_size`."""

    min_size: int = 0
    max_group_prepared_capacity: int | None = None
    pool_state: str = "Stopped"
    """Or Running, Hibernated."""
    reuse_on_scale_in: bool = False
    status: str | None = None
    """ "PendingDelete" while it empties."""


# --- What an instance reads about itself ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the instance metadata service shows beyond the address and the credentials."""

    instance_id: str
    instance_type: str
    availability_zone: str
    instance_life_cycle: Market
    """`/latest/meta-data/instance-life-cycle`: on-demand or spot."""
    target_lifecycle_state: str
    """`autoscaling/target-lifecycle-state`: InService, Terminated, Standby, Warmed:Stopped, …"""
    spot_action: str = ""
    """`spot/instance-action`: terminate; empty where there is none (the path answers 404)."""
    spot_time: float | None = None
    """Epoch seconds at which it is ended by force."""
    rebalance_time: float | None = None
    """`events/recommendations/rebalance`: epoch seconds at which it was recommended."""
    tags: tuple[tuple[str, str], ...] = field(default=())
