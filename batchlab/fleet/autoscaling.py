"""AWS's Auto Scaling API over a launcher: its vocabulary, its defaults, its errors.

Requests change the state and return; `tick` carries it out. Call it about every second, and at
once after a request. Every method raises a Fault (see `faults`) where AWS would answer 400.
Lists come whole: paging belongs to the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchlab.fleet.api import (
    ActivityDetails,
    DesiredConfiguration,
    GroupConfig,
    GroupDetails,
    InstanceDetails,
    InstanceRefresh,
    LifecycleHook,
    LifecycleNotification,
    Metadata,
    RefreshPreferences,
    ScalingPolicy,
    ScheduledAction,
    Tag,
    WarmPool,
)
from batchlab.fleet.sources import Metrics, Prices, Templates
from batchlab.fleet.state import Store
from batchlab.model import Instance
from batchlab.ports import Clock, Ids, Launcher


class AutoScaling:
    """Auto Scaling groups; `tick` is the only coroutine."""

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
        drain_s: float = 30.0,
        alarm_period_s: float = 60.0,
    ) -> None:
        """`zones` are used by a group that names only subnets. `metrics` None takes what
        `put_metric_value` was given. An alarm of a target-tracking policy looks every
        `alarm_period_s`. A terminated instance has `drain_s` to stop."""
        raise NotImplementedError

    async def tick(self) -> Sequence[Instance]:
        """Converge one step; returns the instances found dead since the last call. BackendError
        where the launcher or the store fails; the next tick goes on from there."""
        raise NotImplementedError

    def take_notifications(self) -> Sequence[LifecycleNotification]:
        """Instances that have begun to wait in a hook since the last call."""
        raise NotImplementedError

    # Groups

    def create_auto_scaling_group(
        self,
        config: GroupConfig,
        *,
        desired_capacity: int | None = None,
        tags: Sequence[Tag] = (),
        lifecycle_hooks: Sequence[LifecycleHook] = (),
    ) -> None:
        """Desired capacity None is min. AlreadyExists, ValidationError."""
        raise NotImplementedError

    def update_auto_scaling_group(
        self, name: str, changes: Mapping[str, Any], *, desired_capacity: int | None = None
    ) -> None:
        """`changes` has fields of GroupConfig by name, only those that were given. Desired
        capacity follows new limits."""
        raise NotImplementedError

    def delete_auto_scaling_group(self, name: str, *, force_delete: bool = False) -> None:
        """ResourceInUse or ScalingActivityInProgress without `force_delete`; with it, instances
        are ended without their hooks, and the group is gone when they are."""
        raise NotImplementedError

    def describe_auto_scaling_groups(self, names: Sequence[str] = ()) -> Sequence[GroupDetails]:
        """All, or those of these names that exist, by name."""
        raise NotImplementedError

    def describe_auto_scaling_instances(
        self, instance_ids: Sequence[str] = ()
    ) -> Sequence[InstanceDetails]:
        """All, warm ones included, or those of these ids that exist."""
        raise NotImplementedError

    def set_desired_capacity(
        self, name: str, desired_capacity: int, *, honor_cooldown: bool = False
    ) -> None:
        """ScalingActivityInProgress where a cooldown is honoured that still runs."""
        raise NotImplementedError

    def create_or_update_tags(self, name: str, tags: Sequence[Tag]) -> None:
        raise NotImplementedError

    def delete_tags(self, name: str, keys: Sequence[str]) -> None:
        raise NotImplementedError

    def describe_scaling_activities(
        self, name: str | None = None, *, activity_ids: Sequence[str] = ()
    ) -> Sequence[ActivityDetails]:
        """Newest first."""
        raise NotImplementedError

    def suspend_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        """All processes where none is named."""
        raise NotImplementedError

    def resume_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        raise NotImplementedError

    # Instances

    def terminate_instance_in_auto_scaling_group(
        self, instance_id: str, *, should_decrement_desired_capacity: bool
    ) -> ActivityDetails:
        raise NotImplementedError

    def set_instance_health(
        self, instance_id: str, health_status: str, *, should_respect_grace_period: bool = True
    ) -> None:
        raise NotImplementedError

    def set_instance_protection(
        self, name: str, instance_ids: Sequence[str], *, protected_from_scale_in: bool
    ) -> None:
        raise NotImplementedError

    def enter_standby(
        self, name: str, instance_ids: Sequence[str], *, should_decrement_desired_capacity: bool
    ) -> Sequence[ActivityDetails]:
        raise NotImplementedError

    def exit_standby(self, name: str, instance_ids: Sequence[str]) -> Sequence[ActivityDetails]:
        raise NotImplementedError

    def attach_instances(self, name: str, instance_ids: Sequence[str]) -> None:
        """Always a ValidationError: there are no instances outside a group here."""
        raise NotImplementedError

    def detach_instances(
        self, name: str, instance_ids: Sequence[str], *, should_decrement_desired_capacity: bool
    ) -> Sequence[ActivityDetails]:
        """Always a ValidationError: what no group owns would be ended as an orphan."""
        raise NotImplementedError

    # Lifecycle hooks

    def put_lifecycle_hook(self, hook: LifecycleHook) -> None:
        """A hook that exists keeps what is not given; the wire merges (describe first)."""
        raise NotImplementedError

    def delete_lifecycle_hook(self, name: str, lifecycle_hook_name: str) -> None:
        """Instances that wait in it go on as if it had timed out with its default result."""
        raise NotImplementedError

    def describe_lifecycle_hooks(
        self, name: str, hook_names: Sequence[str] = ()
    ) -> Sequence[LifecycleHook]:
        raise NotImplementedError

    def complete_lifecycle_action(
        self,
        name: str,
        lifecycle_hook_name: str,
        lifecycle_action_result: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        """By instance or by token, one of them is needed."""
        raise NotImplementedError

    def record_lifecycle_action_heartbeat(
        self,
        name: str,
        lifecycle_hook_name: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        raise NotImplementedError

    # Scaling policies and schedules

    def put_scaling_policy(self, policy: ScalingPolicy) -> ScalingPolicy:
        """The policy with its ARN."""
        raise NotImplementedError

    def delete_policy(self, policy_name: str, *, name: str | None = None) -> None:
        """`policy_name` may be an ARN, then the group's name is not needed."""
        raise NotImplementedError

    def describe_policies(
        self,
        name: str | None = None,
        *,
        policy_names: Sequence[str] = (),
        policy_types: Sequence[str] = (),
    ) -> Sequence[ScalingPolicy]:
        raise NotImplementedError

    def execute_policy(
        self,
        policy_name: str,
        *,
        name: str | None = None,
        honor_cooldown: bool = False,
        metric_value: float | None = None,
        breach_threshold: float | None = None,
    ) -> None:
        raise NotImplementedError

    def put_metric_value(self, name: str, policy_name: str, value: float) -> None:
        """The newest value of a target-tracking policy's metric."""
        raise NotImplementedError

    def put_scheduled_update_group_action(self, action: ScheduledAction) -> None:
        raise NotImplementedError

    def delete_scheduled_action(self, name: str, scheduled_action_name: str) -> None:
        raise NotImplementedError

    def describe_scheduled_actions(
        self,
        name: str | None = None,
        *,
        scheduled_action_names: Sequence[str] = (),
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Sequence[ScheduledAction]:
        raise NotImplementedError

    # Instance refresh

    def start_instance_refresh(
        self,
        name: str,
        *,
        strategy: str = "Rolling",
        preferences: RefreshPreferences = RefreshPreferences(),
        desired_configuration: DesiredConfiguration | None = None,
    ) -> str:
        """The refresh's id."""
        raise NotImplementedError

    def cancel_instance_refresh(self, name: str) -> str:
        raise NotImplementedError

    def rollback_instance_refresh(self, name: str) -> str:
        raise NotImplementedError

    def describe_instance_refreshes(
        self, name: str, refresh_ids: Sequence[str] = ()
    ) -> Sequence[InstanceRefresh]:
        """Newest first."""
        raise NotImplementedError

    # Warm pool

    def put_warm_pool(self, name: str, warm_pool: WarmPool) -> None:
        raise NotImplementedError

    def delete_warm_pool(self, name: str, *, force_delete: bool = False) -> None:
        raise NotImplementedError

    def describe_warm_pool(self, name: str) -> tuple[WarmPool | None, Sequence[InstanceDetails]]:
        raise NotImplementedError

    # Spot, and what an instance reads about itself

    def interrupt(self, instance_id: str, *, notice_s: float = 120.0) -> None:
        """A Spot interruption: the instance is ended by force when the notice is over."""
        raise NotImplementedError

    def rebalance(self, instance_id: str) -> None:
        """A rebalance recommendation."""
        raise NotImplementedError

    def metadata(self, instance_id: str) -> Metadata:
        """What the metadata service shows to the instance; ValidationError where it is unknown."""
        raise NotImplementedError
