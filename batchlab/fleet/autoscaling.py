"""Implementation of AWS's Auto Scaling API on a launcher, with AWS's names, defaults, and errors.

Requests only change the state of groups in memory. The coroutine `tick` applies the changes of requests to the
instances. The caller calls `tick` about every second, and immediately after a request. A request raises a Fault if AWS
would respond with status 400. Returned lists are complete, because the HTTP server splits lists into pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from uuid import NAMESPACE_URL, uuid5
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from batchlab.core import due_times
from batchlab.fleet import group_requests, instance_refresh, placement, scaling_policies
from batchlab.fleet import warm_pool as warm
from batchlab.fleet.api_types import (
    ActiveInstanceRefreshNotFound,
    AlreadyExists,
    DesiredConfiguration,
    GroupConfig,
    InstanceDetails,
    InstanceRefresh,
    InstanceRefreshInProgress,
    IrreversibleInstanceRefresh,
    LaunchTemplate,
    LimitExceeded,
    RefreshPreferences,
    ScalingPolicy,
    ScheduledAction,
    StepAdjustment,
    StoppableLauncher,
    ValidationError,
    WarmPool,
)
from batchlab.fleet.group_requests import GroupRequests, Requests
from batchlab.fleet.group_state import Alarm, Asg, Group, instance_details
from batchlab.fleet.instance_requests import HookRequests, InstanceRequests

MAX_POLICIES = 50
MAX_STEPS = 20
SIMPLE, STEP, TRACKING = "SimpleScaling", "StepScaling", "TargetTrackingScaling"
_TYPES = (SIMPLE, STEP, TRACKING)
ADJUSTMENTS = ("ChangeInCapacity", "ExactCapacity", "PercentChangeInCapacity")


class PolicyRequests(Requests):
    def put_scaling_policy(self, policy: ScalingPolicy) -> ScalingPolicy:
        """Create or replace a scaling policy. Return the policy with its ARN and the names of its alarms."""
        name, this = policy.auto_scaling_group_name, policy.policy_name
        _, asg = self._changeable(name)
        _check_policy(policy)
        if this not in asg.policies and len(asg.policies) >= MAX_POLICIES:
            raise LimitExceeded(f"A group may have {MAX_POLICIES} scaling policies.")
        arn = self._arn("scalingPolicy", name, f":policyName/{this}")
        alarms: tuple[str, ...] = ()
        if policy.policy_type == TRACKING:
            unique = uuid5(NAMESPACE_URL, arn)
            alarms = tuple(f"TargetTracking-{name}-Alarm{way}-{unique}" for way in ("High", "Low"))
        asg.policies[this] = replace(policy, policy_arn=arn, alarms=alarms)
        asg.alarms[this] = Alarm()
        self._save(changed=True)
        return asg.policies[this]

    def delete_policy(self, policy_name: str, *, name: str | None = None) -> None:
        """Delete a scaling policy. If `policy_name` is an ARN, `name` may be None."""
        _, asg, policy = self._policy(policy_name, name)
        del asg.policies[policy.policy_name], asg.alarms[policy.policy_name]
        self._save(changed=True)

    def describe_policies(
        self, name: str | None = None, *, policy_names: Sequence[str] = (), policy_types: Sequence[str] = ()
    ) -> Sequence[ScalingPolicy]:
        """Return scaling policies sorted by group and name. `policy_names` may contain ARNs."""
        groups = [self._asg_group(name)[0]] if name else [g for _, g in sorted(self._groups.items())]
        return [
            policy
            for group in groups
            if group.asg is not None
            for _, policy in sorted(group.asg.policies.items())
            if not policy_names or {policy.policy_name, policy.policy_arn} & set(policy_names)
            if not policy_types or policy.policy_type in policy_types
        ]

    def execute_policy(
        self,
        policy_name: str,
        *,
        name: str | None = None,
        honor_cooldown: bool = False,
        metric_value: float | None = None,
        breach_threshold: float | None = None,
    ) -> None:
        """Execute a simple or a step scaling policy. With `honor_cooldown`, raise ScalingActivityInProgress if a
        cooldown applies to a simple policy. A step policy needs the metric's value and the breach threshold."""
        group, asg, policy = self._policy(policy_name, name)
        self._changeable(group.pool.name)
        if policy.policy_type == TRACKING:
            raise ValidationError(f"A policy of type {TRACKING} cannot be executed by request.")
        if not policy.enabled:
            raise ValidationError(f"The policy {policy.policy_name} is disabled.")
        if policy.policy_type == SIMPLE:
            if honor_cooldown:
                self._check_cooldown(group, asg)
            assert policy.scaling_adjustment is not None
            self._set(group, policy, policy.scaling_adjustment, group.desired, cooldown=policy.cooldown)
        elif metric_value is None or breach_threshold is None:
            raise ValidationError("MetricValue and BreachThreshold are needed for a policy of type StepScaling.")
        else:
            self._step(group, asg, policy, metric_value - breach_threshold)
        self._save()

    def _step(self, group: Group, asg: Asg, policy: ScalingPolicy, breach: float) -> None:
        """Apply a policy's step for a breach. Scale-out is relative to the capacity that has warmed up, so two
        consecutive breaches of the same size add instances once. Scale-in waits until all instances have warmed up."""
        step = scaling_policies.step_for(policy, breach)
        if step is None:
            raise ValidationError(f"No step of the policy {policy.policy_name} contains the metric value.")
        now_s = self._changes.steady.now_s()
        warm_after_s = scaling_policies.warmup_s(asg.config, policy)
        base = scaling_policies.warm_capacity(group, warm_after_s, now_s)
        warming = scaling_policies.is_warming(group, warm_after_s, now_s)
        wanted = scaling_policies.adjust(group, policy, step.scaling_adjustment, base if warming else group.desired)
        shrinks = step.scaling_adjustment < 0 or wanted < group.desired
        if not (warming and shrinks):
            self._set(group, policy, step.scaling_adjustment, base if warming else group.desired)

    def _set(
        self, group: Group, policy: ScalingPolicy, adjustment: int, base: int, *, cooldown: int | None = None
    ) -> None:
        wanted = scaling_policies.adjust(group, policy, adjustment, base)
        cause = f"a user request executed policy {policy.policy_name}"
        self._changes.set_desired(group, wanted, cause, cooldown=cooldown)

    def _policy(self, policy_name: str, name: str | None) -> tuple[Group, Asg, ScalingPolicy]:
        groups = [self._asg_group(name)[0]] if name else list(self._groups.values())
        found = [
            (group, group.asg, policy)
            for group in groups
            if group.asg is not None
            for policy in group.asg.policies.values()
            if policy_name in (policy.policy_name, policy.policy_arn)
        ]
        if not found:
            raise ValidationError(f"ScalingPolicy not found: {policy_name}")
        if len(found) > 1:
            raise ValidationError(f"AutoScalingGroupName is needed: several groups have a policy {policy_name}.")
        return found[0]


def _check_policy(policy: ScalingPolicy) -> None:
    group_requests.one_of("PolicyType", policy.policy_type, _TYPES)
    if policy.policy_type == TRACKING:
        tracking = policy.target_tracking_configuration
        if tracking is None or tracking.target_value <= 0:
            raise ValidationError("TargetTrackingConfiguration needs a TargetValue above 0.")
        metrics = (tracking.predefined_metric_type, tracking.customized_metric_specification)
        if sum(map(bool, metrics)) != 1:
            raise ValidationError("TargetTrackingConfiguration needs exactly one metric.")
        return
    group_requests.one_of("AdjustmentType", policy.adjustment_type, ADJUSTMENTS)
    if policy.policy_type == SIMPLE and policy.scaling_adjustment is None:
        raise ValidationError("ScalingAdjustment is needed for a policy of type SimpleScaling.")
    if policy.policy_type == STEP:
        _check_steps(policy.step_adjustments)


def _check_steps(steps: Sequence[StepAdjustment]) -> None:
    """Raise ValidationError unless the intervals of the steps adjoin each other and reach infinity where AWS requires
    it."""
    if not 1 <= len(steps) <= MAX_STEPS:
        raise ValidationError(f"1 to {MAX_STEPS} StepAdjustments are needed for a policy of type StepScaling.")
    intervals = sorted(
        (
            -math.inf if step.metric_interval_lower_bound is None else step.metric_interval_lower_bound,
            math.inf if step.metric_interval_upper_bound is None else step.metric_interval_upper_bound,
        )
        for step in steps
    )
    for low, high in intervals:
        if low >= high or (low, high) == (-math.inf, math.inf):
            raise ValidationError(
                "The upper bound of a step must be greater than its lower bound, and one of them must be specified."
            )
    if any(high != low for (_, high), (low, _) in pairwise(intervals)):
        raise ValidationError("The ranges of StepAdjustments must not overlap or have a gap.")
    if -math.inf < intervals[0][0] < 0:
        raise ValidationError("With a negative lower bound, one step must have no lower bound.")
    if 0 < intervals[-1][1] < math.inf:
        raise ValidationError("With a positive upper bound, one step must have no upper bound.")


MAX_ACTIONS = 125
# Syntax of cron fields that AWS documents. cronsim also accepts other syntax, such as the last day of a month.
_TERM = r"(\*|(\d+|[A-Z]{3})(-(\d+|[A-Z]{3}))?)(/\d+)?"
_FIELD = re.compile(rf"{_TERM}(,{_TERM})*", re.ASCII | re.IGNORECASE)


class ScheduleRequests(Requests):
    def put_scheduled_update_group_action(self, action: ScheduledAction) -> None:
        """Create or replace a scheduled action. As on AWS, two scheduled actions of a group need different times."""
        name, this = action.auto_scaling_group_name, action.scheduled_action_name
        _, asg = self._changeable(name)
        self._check_action(asg, action)
        due_s = scaling_policies.first_s(action, self._changes.now_s())
        if due_s is None:
            raise ValidationError("The recurrence does not occur before the end time.")
        if any(at_s == due_s for other, at_s in asg.due_s.items() if other != this):
            raise AlreadyExists("There is already a scheduled action at this time.")
        arn = self._arn("scheduledUpdateGroupAction", name, f":scheduledActionName/{this}")
        asg.scheduled[this] = replace(action, scheduled_action_arn=arn)
        asg.due_s[this] = due_s
        self._save(changed=True)

    def _check_action(self, asg: Asg, action: ScheduledAction) -> None:
        now_s = self._changes.now_s()
        sizes = (action.min_size, action.max_size, action.desired_capacity)
        if all(size is None for size in sizes):
            raise ValidationError("At least one of MinSize, MaxSize and DesiredCapacity must be provided.")
        if any(size is not None and size < 0 for size in sizes):
            raise ValidationError("Sizes must not be negative.")
        if action.min_size is not None and action.max_size is not None:
            group_requests.check_sizes(action.min_size, action.max_size)
        if action.start_time is None and not action.recurrence:
            raise ValidationError("Either StartTime or Recurrence must be provided.")
        if action.start_time is not None and action.start_time < now_s:
            raise ValidationError("Given start time is in the past")
        if action.end_time is not None and action.end_time < max(now_s, action.start_time or 0):
            raise ValidationError("Given end time is in the past or before the start time")
        try:
            if action.recurrence:
                _check_recurrence(action.recurrence, now_s)
            ZoneInfo(action.time_zone or "UTC")
        except ZoneInfoNotFoundError as error:
            raise ValidationError(f"Invalid time zone: {action.time_zone}") from error
        except ValueError as error:
            raise ValidationError(f"Given recurrence string:{error} is invalid") from error
        exists = action.scheduled_action_name in asg.scheduled
        if not exists and len(asg.scheduled) >= MAX_ACTIONS:
            raise LimitExceeded(f"A group may have {MAX_ACTIONS} scheduled actions.")

    def delete_scheduled_action(self, name: str, scheduled_action_name: str) -> None:
        """Delete a scheduled action. Raise ValidationError if the scheduled action does not exist."""
        _, asg = self._changeable(name)
        if scheduled_action_name not in asg.scheduled:
            raise ValidationError(f"Scheduled action name not found: {scheduled_action_name}")
        scaling_policies.remove_action(asg, scheduled_action_name)
        self._save(changed=True)

    def describe_scheduled_actions(
        self,
        name: str | None = None,
        *,
        scheduled_action_names: Sequence[str] = (),
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Sequence[ScheduledAction]:
        """Return scheduled actions that will run again, sorted by their next run. As on AWS, `start_time` of a returned
        action is the action's next run. `start_time` and `end_time` select actions by their next run, and are ignored
        if names are given."""
        groups = [self._asg_group(name)[0]] if name else list(self._groups.values())
        actions = []
        for asg in (group.asg for group in groups if group.asg is not None):
            for this, due_s in asg.due_s.items():
                within = (start_time or 0.0) <= due_s <= (due_s if end_time is None else end_time)
                if this in scheduled_action_names if scheduled_action_names else within:
                    actions.append((due_s, this, replace(asg.scheduled[this], start_time=due_s)))
        return [action for _, _, action in sorted(actions, key=lambda item: item[:2])]


def _check_recurrence(expression: str, now_s: float) -> None:
    """Raise ValueError if `expression` is not a cron expression."""
    for field in expression.split():
        if not _FIELD.fullmatch(field):
            raise ValueError(f"{field!r} is not a cron field")
    with suppress(due_times.NeverDue):
        due_times.local_times(expression, datetime.fromtimestamp(now_s, UTC))


DEFAULT_PREFERENCES = RefreshPreferences()
_STEPLESS = ("", "$Latest", "$Default")


class RefreshRequests(Requests):
    def start_instance_refresh(
        self,
        name: str,
        *,
        strategy: str = "Rolling",
        preferences: RefreshPreferences = DEFAULT_PREFERENCES,
        desired_configuration: DesiredConfiguration | None = None,
    ) -> str:
        """Start an instance refresh, and return the refresh id. Raise InstanceRefreshInProgress if another refresh is
        active."""
        group, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress(
                "An Instance Refresh is already in progress and blocks the execution of this Instance Refresh."
            )
        if strategy != "Rolling":
            raise ValidationError(f"The strategy {strategy} is not supported; Rolling is.")
        _check_preferences(preferences, desired_configuration)
        if desired_configuration is not None:
            wanted = placement.apply(
                asg.config, desired_configuration.launch_template, desired_configuration.mixed_instances_policy
            )
            wanted = self._checked(placement.resolve(wanted, self._data_sources.templates), asg.config)
            desired_configuration = DesiredConfiguration(wanted.launch_template, wanted.mixed_instances_policy)
        started = InstanceRefresh(
            self._changes.ids.fresh("refresh"),
            name,
            "Pending",
            self._changes.now_s(),
            preferences=preferences,
            desired_configuration=desired_configuration,
        )
        instance_refresh.begin(self._changes, group, asg, started, self._data_sources)
        self._save()
        return started.instance_refresh_id

    def cancel_instance_refresh(self, name: str) -> str:
        """Cancel the active instance refresh, and return the refresh id. The group completes started replacements."""
        _, asg = self._changeable(name)
        if asg.rolling is None:
            raise _no_refresh(name)
        instance_refresh.cancel(self._changes, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def rollback_instance_refresh(self, name: str) -> str:
        """Roll back the active instance refresh, and return the refresh id. Raise IrreversibleInstanceRefresh if the
        refresh lacks a desired configuration, or if the version of the group's own template is not fixed."""
        group, asg = self._changeable(name)
        if asg.rolling is None:
            raise _no_refresh(name)
        if asg.rolling.refresh.desired_configuration is None:
            raise IrreversibleInstanceRefresh(
                "The instance refresh has no desired configuration, so there is nothing to undo."
            )
        own = _template_of_group(asg.config)
        if own is not None and own.version in _STEPLESS:
            version = own.version or "$Default"
            raise IrreversibleInstanceRefresh(f"The group's own launch template version is {version}, which moves.")
        instance_refresh.roll_back(self._changes, group, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def describe_instance_refreshes(self, name: str, refresh_ids: Sequence[str] = ()) -> Sequence[InstanceRefresh]:
        """Return instance refreshes of the group, newest first."""
        _, asg = self._asg_group(name)
        running = [asg.rolling.refresh] if asg.rolling else []
        return [
            instance_refresh
            for instance_refresh in running + asg.refreshes
            if not refresh_ids or instance_refresh.instance_refresh_id in refresh_ids
        ]


def _template_of_group(config: GroupConfig) -> LaunchTemplate | None:
    mixed = config.mixed_instances_policy
    return mixed.launch_template if mixed else config.launch_template


def _no_refresh(name: str) -> ActiveInstanceRefreshNotFound:
    return ActiveInstanceRefreshNotFound(
        f"No in progress or pending Instance Refresh found for Auto Scaling group {name}"
    )


def _check_preferences(preferences: RefreshPreferences, wanted: DesiredConfiguration | None) -> None:
    low, high = preferences.min_healthy_percentage, preferences.max_healthy_percentage
    if not 0 <= low <= 100 <= high <= 200 or high - low > 100:
        raise ValidationError(
            "MinHealthyPercentage must be between 0 and 100, MaxHealthyPercentage between 100 and"
            " 200, and they must not be more than 100 apart."
        )
    steps = preferences.checkpoint_percentages
    if list(steps) != sorted(set(steps)) or any(not 0 < step <= 100 for step in steps):
        raise ValidationError("CheckpointPercentages must rise, from 1 to 100.")
    choices = (
        (preferences.scale_in_protected_instances, ("Refresh", "Ignore", "Wait")),
        (preferences.standby_instances, ("Terminate", "Ignore", "Wait")),
    )
    for value, allowed in choices:
        if value not in allowed:
            raise ValidationError(f"{value} is none of {', '.join(allowed)}.")
    if preferences.auto_rollback and wanted is None:
        raise ValidationError("AutoRollback needs a desired configuration.")


class WarmPoolRequests(Requests):
    def put_warm_pool(self, name: str, warm_pool: WarmPool) -> None:
        """Create or change the group's warm pool. Instances in the warm pool keep their state."""
        group, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress("The warm pool cannot be changed while an instance refresh is in progress.")
        group_requests.one_of("PoolState", warm_pool.pool_state, tuple(warm.RESTED))
        prepared = warm_pool.max_group_prepared_capacity
        # As on AWS, -1 disables MaxGroupPreparedCapacity.
        prepared = None if prepared is not None and prepared < 0 else prepared
        if warm_pool.min_size < 0:
            raise ValidationError("MinSize must not be negative.")
        if prepared is not None and prepared < max(warm_pool.min_size, asg.config.min_size):
            raise ValidationError(
                "MaxGroupPreparedCapacity must not be less than the MinSize of the warm pool or that of the group."
            )
        if warm_pool.pool_state != "Running" and not isinstance(self._launcher, StoppableLauncher):
            raise ValidationError(
                f"This endpoint's instances cannot be {warm_pool.pool_state.lower()}; give the warm"
                " pool the PoolState Running."
            )
        if self._shares_gpus(group):
            raise ValidationError(
                "The instances of this machine share its GPUs, so a group with GPUs cannot have a warm pool."
            )
        asg.warm_pool = replace(warm_pool, max_group_prepared_capacity=prepared, status=None)
        self._save(changed=True)

    def delete_warm_pool(self, name: str, *, force_delete: bool = False) -> None:
        """Delete the warm pool. With `force_delete`, the request terminates the instances of the warm pool. Without
        `force_delete`, the next tick terminates the instances of the warm pool."""
        group, asg = self._changeable(name)
        if asg.warm_pool is None:
            raise ValidationError(f"No warm pool found for Auto Scaling group {name}")
        asg.warm_pool = replace(asg.warm_pool, status="PendingDelete")
        self._changes.unsaved = True
        if force_delete:
            warm.trim(self._changes, group, asg)
        self._save()

    def describe_warm_pool(self, name: str) -> tuple[WarmPool | None, Sequence[InstanceDetails]]:
        """Return the configuration and the instances of the group's warm pool. Without a warm pool, the configuration
        is None."""
        group, asg = self._asg_group(name)
        return asg.warm_pool, [instance_details(group, member) for member in warm.members(group)]


class AutoScaling(
    GroupRequests, InstanceRequests, HookRequests, PolicyRequests, ScheduleRequests, RefreshRequests, WarmPoolRequests
):
    """All requests of AWS's Auto Scaling API, with AWS's names in snake case."""
