"""Types and errors of AWS's Auto Scaling API, and protocols of the data sources that Auto Scaling groups need.

Every field has AWS's name in snake case (`botocore.xform_name`), AWS's default, and AWS's unit. Durations are in
seconds, times are in seconds since the epoch, and percentages are from 0 to 100. Fields that AWS omits from a response
are None. The name of an error class is AWS's error code. An error has the text of AWS's error message if this text is
known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Protocol, runtime_checkable

from batchlab.core.errors import Refused
from batchlab.core.model import LifecycleState, Machine, Market

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"
CONTINUE = "CONTINUE"
ABANDON = "ABANDON"
HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"


class Process(StrEnum):
    """Processes of a group that SuspendProcesses can suspend."""

    LAUNCH = "Launch"
    TERMINATE = "Terminate"
    ADD_TO_LOAD_BALANCER = "AddToLoadBalancer"
    ALARM_NOTIFICATION = "AlarmNotification"
    AZ_REBALANCE = "AZRebalance"
    HEALTH_CHECK = "HealthCheck"
    INSTANCE_REFRESH = "InstanceRefresh"
    REPLACE_UNHEALTHY = "ReplaceUnhealthy"
    SCHEDULED_ACTIONS = "ScheduledActions"


@dataclass(frozen=True, slots=True)
class LaunchTemplate:
    """Reference to a launch template. `version` is a number, `$Latest`, `$Default`, or "" for an omitted version, which
    means `$Default`."""

    launch_template_id: str = ""
    launch_template_name: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Override:
    """An instance type of a mixed instances group. `weighted_capacity` is in units of capacity."""

    instance_type: str
    weighted_capacity: int | None = None
    launch_template_specification: LaunchTemplate | None = None


@dataclass(frozen=True, slots=True)
class InstancesDistribution:
    """Distribution of a mixed instances group over markets and instance types."""

    on_demand_allocation_strategy: str = "prioritized"
    on_demand_base_capacity: int = 0
    on_demand_percentage_above_base_capacity: int = 100
    spot_allocation_strategy: str = "lowest-price"
    spot_instance_pools: int | None = None
    """Number of Spot capacity pools. None means 2 Spot capacity pools if the allocation strategy is lowest-price."""
    spot_max_price: str = ""


@dataclass(frozen=True, slots=True)
class MixedInstancesPolicy:
    """Mixed instances policy. `launch_template` is AWS's nested `launch_template.launch_template_specification`."""

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
    """Parameters of CreateAutoScalingGroup and UpdateAutoScalingGroup, except desired capacity.

    Exactly one of `launch_template`, `mixed_instances_policy`, and `launch_configuration_name` is set. `passive` has
    parameters that are stored and returned without further effect, such as load balancers, as pairs of AWS's name and
    JSON text.
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
    """An instance in the responses of DescribeAutoScalingGroups and DescribeAutoScalingInstances."""

    instance_id: str
    auto_scaling_group_name: str
    instance_type: str
    availability_zone: str
    lifecycle_state: LifecycleState
    health_status: str
    protected_from_scale_in: bool
    launch_template: LaunchTemplate | None = None
    launch_configuration_name: str = ""
    weighted_capacity: int | None = None
    market: Market = Market.ON_DEMAND
    launched_s: float = 0.0
    note: str = ""
    """Reason of the instance's state. AWS does not have the field `note`."""


@dataclass(frozen=True, slots=True)
class GroupDetails:
    """A group in the response of DescribeAutoScalingGroups."""

    config: GroupConfig
    auto_scaling_group_arn: str
    service_linked_role_arn: str
    desired_capacity: int
    created_time: float
    instances: tuple[InstanceDetails, ...]
    """Instances of the group, as on AWS without Terminated instances and instances of the warm pool."""
    suspended_processes: tuple[tuple[Process, str], ...] = ()
    """Suspended processes with AWS's SuspensionReason."""
    tags: tuple[Tag, ...] = ()
    status: str | None = None
    """Status "Delete in progress" while ForceDelete waits for the end of the group's instances, or None."""
    warm_pool_configuration: WarmPool | None = None
    warm_pool_size: int | None = None
    predicted_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class ActivityDetails:
    """A scaling activity in AWS's wording. `status_code` is one of AWS's ScalingActivityStatusCode values."""

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
    auto_scaling_group_arn: str = ""
    auto_scaling_group_state: str = "InService"
    """State of the activity's group: InService, or Deleted."""


@dataclass(frozen=True, slots=True)
class LifecycleHook:
    """Parameters of PutLifecycleHook, and the GlobalTimeout derived from the parameters."""

    auto_scaling_group_name: str
    lifecycle_hook_name: str
    lifecycle_transition: str
    heartbeat_timeout: int = 3600
    default_result: str = ABANDON
    notification_target_arn: str = ""
    role_arn: str = ""
    notification_metadata: str = ""

    @property
    def global_timeout(self) -> int:
        """Maximum time in seconds that an instance waits in the hook, even if heartbeats are recorded."""
        return min(172_800, 100 * self.heartbeat_timeout)


@dataclass(frozen=True, slots=True)
class LifecycleNotification:
    """Notification that an instance waits in a hook. AWS sends lifecycle notifications to the hook's target and to
    EventBridge."""

    hook: LifecycleHook
    instance_id: str
    lifecycle_action_token: str
    time: float
    origin: str = "EC2"
    """Origin of the instance: "EC2", "AutoScalingGroup", or "WarmPool"."""
    destination: str = "AutoScalingGroup"


@dataclass(frozen=True, slots=True)
class StepAdjustment:
    """Step of a step scaling policy. Bounds of a step are relative to the breach threshold. A bound of None means minus
    or plus infinity."""

    scaling_adjustment: int
    metric_interval_lower_bound: float | None = None
    metric_interval_upper_bound: float | None = None


@dataclass(frozen=True, slots=True)
class TargetTracking:
    """TargetTrackingConfiguration of a scaling policy. `customized_metric_specification` is JSON text."""

    target_value: float
    predefined_metric_type: str = ""
    customized_metric_specification: str = ""
    disable_scale_in: bool = False


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Parameters of PutScalingPolicy. Only policies in responses have `policy_arn` and `alarms`."""

    auto_scaling_group_name: str
    policy_name: str
    policy_type: str = "SimpleScaling"
    """Type of the policy: SimpleScaling, StepScaling, or TargetTrackingScaling."""
    adjustment_type: str = ""
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
    """Names of the two alarms of a target-tracking policy, the high alarm first."""


@dataclass(frozen=True, slots=True)
class ScheduledAction:
    """Parameters of PutScheduledUpdateGroupAction. `recurrence` is a cron expression with five fields in `time_zone`.
    `time_zone` is an IANA name, or empty for UTC."""

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


@dataclass(frozen=True, slots=True)
class RefreshPreferences:
    min_healthy_percentage: int = 90
    max_healthy_percentage: int = 100
    instance_warmup: int | None = None
    """Warm-up time of new instances in seconds. None means the group's default warm-up time. If the group does not have
    a default warm-up time, None means the group's health check grace period."""
    skip_matching: bool = False
    auto_rollback: bool = False
    checkpoint_percentages: tuple[int, ...] = ()
    checkpoint_delay: int = 3600
    scale_in_protected_instances: str = "Wait"
    standby_instances: str = "Wait"


@dataclass(frozen=True, slots=True)
class DesiredConfiguration:
    """Target configuration of an instance refresh. Exactly one field of a DesiredConfiguration is set."""

    launch_template: LaunchTemplate | None = None
    mixed_instances_policy: MixedInstancesPolicy | None = None


@dataclass(frozen=True, slots=True)
class InstanceRefresh:
    """An instance refresh in the response of DescribeInstanceRefreshes, with AWS's values of `status`."""

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


@dataclass(frozen=True, slots=True)
class WarmPool:
    """Parameters of PutWarmPool. The size of the warm pool is `max_group_prepared_capacity` minus desired capacity, and
    at least `min_size`. If `max_group_prepared_capacity` is None, the group's maximum size is used instead."""

    min_size: int = 0
    max_group_prepared_capacity: int | None = None
    pool_state: str = "Stopped"
    reuse_on_scale_in: bool = False
    status: str | None = None
    """Status "PendingDelete" while the instances of the warm pool are terminated, or None."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Data that the instance metadata service returns for an instance, without address and credentials."""

    instance_id: str
    instance_type: str
    availability_zone: str
    instance_life_cycle: Market
    """Value of `/latest/meta-data/instance-life-cycle`: on-demand or spot."""
    target_lifecycle_state: str
    """Value of `autoscaling/target-lifecycle-state`, for example InService, Terminated, or Warmed:Stopped."""
    spot_action: str = ""
    """Value of `spot/instance-action`: terminate, or "" without an interruption. For "", the metadata service returns
    404."""
    spot_time: float | None = None
    """Time when the Spot interruption terminates the instance, in seconds since the epoch."""
    rebalance_time: float | None = None
    """Value of `events/recommendations/rebalance`: time of the recommendation in seconds since the epoch."""
    tags: tuple[tuple[str, str], ...] = field(default=())


class Fault(Refused):
    """Error for a refused request. Every Fault has HTTP status 400, as on AWS."""

    code: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.code = cls.__name__


class ValidationError(Fault):
    """Error for a parameter that is invalid or names an object that does not exist."""


class AlreadyExists(Fault):
    """Error for the creation of a group or an action that conflicts with an existing group or action."""


class LimitExceeded(Fault):
    """Error for a group that has the maximum number of hooks, policies, or actions."""


class ResourceInUse(Fault):
    """Error for the deletion of a group that has instances, if the request does not set ForceDelete."""


class ScalingActivityInProgress(Fault):
    """Error for a request that a cooldown or an activity in progress prevents."""


class InstanceRefreshInProgress(Fault):
    """Error for a request that an instance refresh in progress prevents."""


class ActiveInstanceRefreshNotFound(Fault):
    """Error for a request that requires an active instance refresh."""


class IrreversibleInstanceRefresh(Fault):
    """Error for the rollback of an instance refresh that cannot be rolled back."""


@dataclass(frozen=True, slots=True)
class Template:
    """Data that a launch reads from a launch template version."""

    reference: LaunchTemplate
    instance_type: str = ""
    market: Market = Market.ON_DEMAND
    slots: int = 1
    boot_s: float = 0.0
    env: tuple[tuple[str, str], ...] = ()
    gpus: int = 0


class Templates(Protocol):
    """Store of launch templates. Every launch reads the store, so `$Latest` is the latest version."""

    def template(self, reference: LaunchTemplate) -> Template:
        """Return the referenced template version. Raise ValidationError if the version does not exist."""

    def launch_configuration(self, name: str) -> Template:
        """Return a launch configuration as a template. Raise ValidationError if the launch configuration does not
        exist."""


@runtime_checkable
class StoppableLauncher(Protocol):
    """A launcher that can stop and restart instances. `Launcher.running` includes stopped instances, and `terminate`
    also ends stopped instances."""

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        """Stop an instance, and return when the instance has stopped. `hibernate` preserves the memory of the
        instance."""

    async def start(self, instance: str) -> None:
        """Start a stopped instance, and return when the instance runs."""


class Metrics(Protocol):
    """Source of the metrics of target-tracking policies."""

    def value(self, policy: ScalingPolicy) -> float | None:
        """Return the newest value of the policy's metric, or None without data."""


class Prices(Protocol):
    """Prices of instances, for the allocation strategy `lowest-price`."""

    def hourly(self, machine: Machine) -> float | None:
        """Return the price of an instance in USD per hour, or None if the price is unknown. Without prices, the order
        of the overrides decides which instance type is launched."""
