"""Scaling policies: put, describe, delete, execute; the metric of target tracking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import NAMESPACE_URL, uuid5

from batchlab.fleet import scaling
from batchlab.fleet.api import ScalingPolicy
from batchlab.fleet.asg import Alarm, Asg
from batchlab.fleet.faults import LimitExceeded, ValidationError
from batchlab.fleet.requests import checks
from batchlab.fleet.requests.base import Requests
from batchlab.fleet.state import Group

MOST_POLICIES = 50
SIMPLE, STEP, TRACKING = "SimpleScaling", "StepScaling", "TargetTrackingScaling"
_TYPES = (SIMPLE, STEP, TRACKING)
ADJUSTMENTS = ("ChangeInCapacity", "ExactCapacity", "PercentChangeInCapacity")


class PolicyRequests(Requests):
    """As AWS's API reference says, under the same names."""

    def put_scaling_policy(self, policy: ScalingPolicy) -> ScalingPolicy:
        """The policy with its ARN and, for target tracking, the names of its alarms."""
        name, this = policy.auto_scaling_group_name, policy.policy_name
        _, asg = self._changeable(name)
        _check(policy)
        if this not in asg.policies and len(asg.policies) >= MOST_POLICIES:
            raise LimitExceeded(f"A group may have {MOST_POLICIES} scaling policies.")
        arn = self._arn("scalingPolicy", name, f":policyName/{this}")
        alarms: tuple[str, ...] = ()
        if policy.policy_type == TRACKING:
            unique = uuid5(NAMESPACE_URL, arn)
            alarms = tuple(f"TargetTracking-{name}-Alarm{way}-{unique}" for way in ("High", "Low"))
        asg.policies[this] = replace(policy, policy_arn=arn, alarms=alarms)
        asg.alarms[this] = Alarm()
        self._changes.unsaved = True
        self._save()
        return asg.policies[this]

    def delete_policy(self, policy_name: str, *, name: str | None = None) -> None:
        """`policy_name` may be an ARN, then the group's name is not needed."""
        _, asg, policy = self._policy(policy_name, name)
        del asg.policies[policy.policy_name], asg.alarms[policy.policy_name]
        self._changes.unsaved = True
        self._save()

    def describe_policies(
        self,
        name: str | None = None,
        *,
        policy_names: Sequence[str] = (),
        policy_types: Sequence[str] = (),
    ) -> Sequence[ScalingPolicy]:
        """By group and name; `policy_names` may be ARNs."""
        groups = [self._named(name)[0]] if name else [g for _, g in sorted(self._groups.items())]
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
        """A simple or a step policy, at once; ScalingActivityInProgress where a simple one honours
        a cooldown. A step policy needs the metric's value and the threshold it breaches."""
        group, asg, policy = self._policy(policy_name, name)
        self._changeable(group.pool.name)
        if policy.policy_type == TRACKING:
            raise ValidationError(f"A policy of type {TRACKING} cannot be executed by request.")
        if not policy.enabled:
            raise ValidationError(f"The policy {policy.policy_name} is disabled.")
        if policy.policy_type == SIMPLE:
            if honor_cooldown:
                self._honour_cooldown(group, asg)
            assert policy.scaling_adjustment is not None
            self._set(
                *(group, policy, policy.scaling_adjustment, group.desired),
                cooldown=policy.cooldown,
            )
        elif metric_value is None or breach_threshold is None:
            raise ValidationError(
                "MetricValue and BreachThreshold are needed for a policy of type StepScaling."
            )
        else:
            self._step(group, asg, policy, metric_value - breach_threshold)
        self._save()

    def _step(self, group: Group, asg: Asg, policy: ScalingPolicy, breach: float) -> None:
        """Out from what has warmed up, so that two breaches in a row of the same size add once; in
        only where nothing warms up."""
        step = scaling.step_for(policy, breach)
        if step is None:
            return
        now_s = self._changes.steady.now_s()
        warm_after_s = scaling.warmup_s(asg.config, policy)
        base = scaling.warm_capacity(group, warm_after_s, now_s)
        warming = scaling.is_warming(group, warm_after_s, now_s)
        wanted = scaling.adjusted(
            group, policy, step.scaling_adjustment, base if warming else group.desired
        )
        shrinks = step.scaling_adjustment < 0 or wanted < group.desired
        if not (warming and shrinks):
            self._set(group, policy, step.scaling_adjustment, base if warming else group.desired)

    def _set(
        self,
        group: Group,
        policy: ScalingPolicy,
        adjustment: int,
        base: int,
        *,
        cooldown: int | None = None,
    ) -> None:
        wanted = scaling.adjusted(group, policy, adjustment, base)
        cause = f"a user request executed policy {policy.policy_name}"
        self._changes.want(group, wanted, cause, cooldown=cooldown)

    def _policy(self, policy_name: str, name: str | None) -> tuple[Group, Asg, ScalingPolicy]:
        if not name and not policy_name.startswith("arn:"):
            raise ValidationError("AutoScalingGroupName is needed unless PolicyName is an ARN.")
        groups = [self._named(name)[0]] if name else list(self._groups.values())
        for group in groups:
            for policy in group.asg.policies.values() if group.asg else ():
                if policy_name in (policy.policy_name, policy.policy_arn):
                    assert group.asg is not None
                    return group, group.asg, policy
        raise ValidationError(f"ScalingPolicy not found: {policy_name}")


def _check(policy: ScalingPolicy) -> None:
    checks.one_of("PolicyType", policy.policy_type, _TYPES)
    if policy.policy_type == TRACKING:
        tracking = policy.target_tracking_configuration
        if tracking is None or tracking.target_value <= 0:
            raise ValidationError("TargetTrackingConfiguration needs a TargetValue above 0.")
        metrics = (tracking.predefined_metric_type, tracking.customized_metric_specification)
        if sum(map(bool, metrics)) != 1:
            raise ValidationError("TargetTrackingConfiguration needs exactly one metric.")
        return
    checks.one_of("AdjustmentType", policy.adjustment_type, ADJUSTMENTS)
    if policy.policy_type == SIMPLE and policy.scaling_adjustment is None:
        raise ValidationError("ScalingAdjustment is needed for a policy of type SimpleScaling.")
    if policy.policy_type == STEP and not policy.step_adjustments:
        raise ValidationError("StepAdjustments are needed for a policy of type StepScaling.")
