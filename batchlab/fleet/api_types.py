"""Types and errors of AWS's Auto Scaling API, and the external data of a group.

Every field has AWS's name in snake case (`botocore.xform_name`), AWS's default, and AWS's unit. Durations are in
seconds, times in seconds since the epoch, and percentages from 0 to 100. Fields that AWS omits from an answer are None.
The name of an error class is AWS's error code, and the message is AWS's if it is known.
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
    """Processes of a group, which SuspendProcesses may suspend."""

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
    """Reference to a launch template. `version` is a number, `$Latest`, or `$Default`."""

    launch_template_id: str = ""
    launch_template_name: str = ""
    version: str = "$Default"


@dataclass(frozen=True, slots=True)
class Override:
    """An instance type of a mixed instances group. Its weight is in units of capacity."""

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
    """None means 2 with the strategy lowest-price."""
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
    parameters that are stored and returned without further effect (load balancers, subnets beyond their zones), as
    pairs of AWS's name and JSON text.
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
    """An instance in DescribeAutoScalingGroups and DescribeAutoScalingInstances."""

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
    """Reason of the state. AWS does not have this field."""


@dataclass(frozen=True, slots=True)
class GroupDetails:
    """A group in DescribeAutoScalingGroups."""

    config: GroupConfig
    auto_scaling_group_arn: str
    desired_capacity: int
    created_time: float
    instances: tuple[InstanceDetails, ...]
    """As on AWS, without Terminated instances and without the warm pool."""
    suspended_processes: tuple[tuple[Process, str], ...] = ()
    """Suspended processes with AWS's SuspensionReason."""
    tags: tuple[Tag, ...] = ()
    status: str | None = None
    """ "Delete in progress" while ForceDelete waits for the instances to end."""
    warm_pool_configuration: WarmPool | None = None
    warm_pool_size: int | None = None
    predicted_capacity: int | None = None


@dataclass(frozen=True, slots=True)
class ActivityDetails:
    """A scaling activity in AWS's wording. `status_code` is a ScalingActivityStatusCode."""

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


@dataclass(frozen=True, slots=True)
class LifecycleHook:
    """Parameters of PutLifecycleHook, and the resulting GlobalTimeout."""

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
        """Maximum wait of an instance in seconds, with any number of recorded heartbeats."""
        return min(172_800, 100 * self.heartbeat_timeout)


@dataclass(frozen=True, slots=True)
class LifecycleNotification:
    """Notification that an instance waits in a hook. AWS sends it to the hook's target and to EventBridge."""

    hook: LifecycleHook
    instance_id: str
    lifecycle_action_token: str
    time: float
    origin: str = "EC2"
    """ "EC2", "AutoScalingGroup", or "WarmPool"."""
    destination: str = "AutoScalingGroup"


@dataclass(frozen=True, slots=True)
class StepAdjustment:
    """Step of a step scaling policy. Bounds are relative to the breach threshold, and None means minus or plus
    infinity."""

    scaling_adjustment: int
    metric_interval_lower_bound: float | None = None
    metric_interval_upper_bound: float | None = None


@dataclass(frozen=True, slots=True)
class TargetTracking:
    """TargetTrackingConfiguration. A customized metric is JSON text."""

    target_value: float
    predefined_metric_type: str = ""
    customized_metric_specification: str = ""
    disable_scale_in: bool = False


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Parameters of PutScalingPolicy. Only responses have `policy_arn` and `alarms`."""

    auto_scaling_group_name: str
    policy_name: str
    policy_type: str = "SimpleScaling"
    """SimpleScaling, StepScaling, or TargetTrackingScaling."""
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
    """Names of the alarms of a target-tracking policy, the high one first."""


@dataclass(frozen=True, slots=True)
class ScheduledAction:
    """Parameters of PutScheduledUpdateGroupAction. `recurrence` is a cron expression with five fields in `time_zone`
    (an IANA name; UTC if empty)."""

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
    """None means the group's default warm-up, or else its health check grace period."""
    skip_matching: bool = False
    auto_rollback: bool = False
    checkpoint_percentages: tuple[int, ...] = ()
    checkpoint_delay: int = 3600
    scale_in_protected_instances: str = "Wait"
    standby_instances: str = "Wait"


@dataclass(frozen=True, slots=True)
class DesiredConfiguration:
    """Target configuration of an instance refresh. One of the two fields is set."""

    launch_template: LaunchTemplate | None = None
    mixed_instances_policy: MixedInstancesPolicy | None = None


@dataclass(frozen=True, slots=True)
class InstanceRefresh:
    """An instance refresh in DescribeInstanceRefreshes, with AWS's values of `status`."""

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
    """Parameters of PutWarmPool. The prepared capacity is max − desired if `max_group_prepared_capacity` is None,
    otherwise that number − desired. It is at least `min_size`."""

    min_size: int = 0
    max_group_prepared_capacity: int | None = None
    pool_state: str = "Stopped"
    reuse_on_scale_in: bool = False
    status: str | None = None
    """ "PendingDelete" while its instances are terminated."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Data of the instance metadata service, without the address and the credentials."""

    instance_id: str
    instance_type: str
    availability_zone: str
    instance_life_cycle: Market
    """`/latest/meta-data/instance-life-cycle`: on-demand or spot."""
    target_lifecycle_state: str
    """`autoscaling/target-lifecycle-state`: InService, Terminated, Standby, Warmed:Stopped, …"""
    spot_action: str = ""
    """`spot/instance-action`: terminate, or empty without an interruption (the path answers 404)."""
    spot_time: float | None = None
    """Time of the forced termination, in seconds since the epoch."""
    rebalance_time: float | None = None
    """`events/recommendations/rebalance`: time of the recommendation (epoch seconds)."""
    tags: tuple[tuple[str, str], ...] = field(default=())


class Fault(Refused):
    """A refused request. All have HTTP status 400, as on AWS."""

    code: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.code = cls.__name__


class ValidationError(Fault):
    """A parameter is wrong, or names an object that does not exist."""


class AlreadyExists(Fault):
    """A group of this name exists."""


class LimitExceeded(Fault):
    """The group has the maximum number of hooks, policies, or actions."""


class ResourceInUse(Fault):
    """The group has instances, and ForceDelete was not given."""


class ScalingActivityInProgress(Fault):
    """A cooldown or an activity in progress prevents the request."""


class InstanceRefreshInProgress(Fault):
    """Another instance refresh is in progress."""


class ActiveInstanceRefreshNotFound(Fault):
    """The group does not have an active refresh."""


class IrreversibleInstanceRefresh(Fault):
    """The instance refresh cannot be rolled back."""


@dataclass(frozen=True, slots=True)
class Template:
    """The data of a launch template version that a launch needs."""

    reference: LaunchTemplate
    instance_type: str = ""
    market: Market = Market.ON_DEMAND
    slots: int = 1
    boot_s: float = 0.0
    env: tuple[tuple[str, str], ...] = ()


class Templates(Protocol):
    """Store of launch templates. Every launch reads the store, so `$Latest` is the latest version."""

    def template(self, reference: LaunchTemplate) -> Template:
        """Return the referenced version. Raise ValidationError if it does not exist."""

    def launch_configuration(self, name: str) -> Template:
        """Return a launch configuration as a template. Raise ValidationError if it is missing."""


@runtime_checkable
class StoppableLauncher(Protocol):
    """A launcher that can stop and restart instances. `Launcher.running` includes stopped instances, and `terminate`
    ends them too."""

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        """Stop an instance, and return when it has stopped. `hibernate` keeps its memory."""

    async def start(self, instance: str) -> None:
        """Start a stopped instance, and return when it runs."""


class Metrics(Protocol):
    """Source of the metrics of target-tracking policies."""

    def value(self, policy: ScalingPolicy) -> float | None:
        """Return the newest value, or None without data."""


class Prices(Protocol):
    """Prices of instances, for the allocation strategy `lowest-price`."""

    def hourly(self, machine: Machine) -> float | None:
        """Return the dollars per hour. If it is None, the order of the overrides decides."""
