"""Actions on hooks, policies, scheduled actions, instance refreshes, and warm pools, and the table of all actions.

Invariant: an action does not implement a rule of Auto Scaling. An action converts parameters whose structure in the
engine differs from AWS's structure, and calls a method of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from botocore.model import OperationModel

from batchlab.fleet.api_types import (
    LAUNCHING,
    TERMINATING,
    DesiredConfiguration,
    LifecycleHook,
    Process,
    RefreshPreferences,
    ScalingPolicy,
    ScheduledAction,
    WarmPool,
)
from batchlab.fleet.api_types import Fault as EngineFault
from batchlab.fleet.autoscaling import ADJUSTMENTS, AutoScaling
from batchlab.fleet.termination import PLAIN, POLICIES
from batchlab.server.autoscaling_api import groups
from batchlab.server.autoscaling_api.app import Fault, invalid
from batchlab.server.autoscaling_api.groups import GROUP_NAME, Action, Answer, Call, forward
from batchlab.server.autoscaling_api.parameters import Parameters, alarms, fields, other_parameters, parse_into
from batchlab.server.autoscaling_api.query_protocol import Act

MAX_WARM = 50

# --- Lifecycle hooks ------------------------------------------------------------------------------


def put_hook(call: Call) -> Answer:
    """Create or update a lifecycle hook. As on AWS, omitted parameters of an existing hook keep their values."""
    hooks = call.engine.describe_lifecycle_hooks(call.group, [call.parameters["LifecycleHookName"]])
    changes = fields(LifecycleHook, call.parameters)
    call.engine.put_lifecycle_hook(
        replace(hooks[0], **changes) if hooks else parse_into(LifecycleHook, call.parameters)
    )
    return {}


# --- Scaling policies -----------------------------------------------------------------------------


def put_policy(call: Call) -> Answer:
    policy = call.engine.put_scaling_policy(parse_into(ScalingPolicy, call.parameters))
    return {"PolicyARN": policy.policy_arn, "Alarms": alarms(policy)}


def describe_policies(call: Call) -> Answer:
    policies = call.engine.describe_policies(
        call.parameters.get("AutoScalingGroupName"), **call.optional("PolicyNames", "PolicyTypes")
    )
    return call.to_page("ScalingPolicies", policies, lambda policy: policy.policy_arn)


# --- Scheduled actions ----------------------------------------------------------------------------


def put_scheduled(call: Call) -> Answer:
    _schedule(call, call.parameters)
    return {}


def _schedule(call: Call, parameters: Parameters) -> None:
    """Create or update a scheduled action. Omitted fields of an existing scheduled action keep their values."""
    changes = fields(ScheduledAction, parameters)
    if "Time" in parameters:
        # The parameter `Time` is the former name of `StartTime`.
        changes.setdefault("start_time", parameters["Time"].timestamp())
    name = parameters["ScheduledActionName"]
    actions = call.engine.describe_scheduled_actions(call.group, scheduled_action_names=[name])
    old = actions[0] if actions else ScheduledAction(call.group, name)
    if {"recurrence", "time_zone"} & changes.keys():
        # The engine describes a scheduled action with the time of its next run as the start time. The next run follows
        # the old recurrence.
        old = replace(old, start_time=None)
    call.engine.put_scheduled_update_group_action(replace(old, **changes))


def put_many_scheduled(call: Call) -> Answer:
    failed = []
    for parameters in call.parameters["ScheduledUpdateGroupActions"]:
        try:
            _schedule(call, parameters)
        except EngineFault as fault:
            failed.append(_failure(parameters["ScheduledActionName"], fault))
    return {"FailedScheduledUpdateGroupActions": failed}


def delete_many_scheduled(call: Call) -> Answer:
    failed = []
    for name in call.parameters["ScheduledActionNames"]:
        try:
            call.engine.delete_scheduled_action(call.group, name)
        except EngineFault as fault:
            failed.append(_failure(name, fault))
    return {"FailedScheduledActions": failed}


def _failure(name: str, fault: EngineFault) -> dict[str, str]:
    return {"ScheduledActionName": name, "ErrorCode": fault.code, "ErrorMessage": fault.message}


def describe_scheduled(call: Call) -> Answer:
    times = {name: at.timestamp() for name, at in call.optional("StartTime", "EndTime").items()}
    actions = call.engine.describe_scheduled_actions(
        call.parameters.get("AutoScalingGroupName"), **call.optional("ScheduledActionNames"), **times
    )
    return call.to_page("ScheduledUpdateGroupActions", actions, lambda action: action.scheduled_action_arn)


# --- Instance refresh -----------------------------------------------------------------------------


def start_refresh(call: Call) -> Answer:
    more: dict[str, Any] = call.optional("Strategy")
    if "DesiredConfiguration" in call.parameters:
        more["desired_configuration"] = parse_into(DesiredConfiguration, call.parameters["DesiredConfiguration"])
    wanted = call.parameters.get("Preferences", {})
    if unknown := other_parameters(RefreshPreferences, wanted):
        raise invalid(f"This endpoint does not support the preferences {', '.join(sorted(unknown))}.")
    preferences = parse_into(RefreshPreferences, wanted)
    return {"InstanceRefreshId": call.engine.start_instance_refresh(call.group, preferences=preferences, **more)}


def describe_refreshes(call: Call) -> Answer:
    refreshes = call.engine.describe_instance_refreshes(call.group, call.parameters.get("InstanceRefreshIds", ()))
    return call.to_page("InstanceRefreshes", refreshes, lambda refresh: refresh.instance_refresh_id)


# --- Warm pool ------------------------------------------------------------------------------------


def put_warm_pool(call: Call) -> Answer:
    warm_pool, _ = call.engine.describe_warm_pool(call.group)
    changes = fields(WarmPool, call.parameters)
    if changes.get("max_group_prepared_capacity") == -1:
        changes["max_group_prepared_capacity"] = None
    if policy := call.parameters.get("InstanceReusePolicy"):
        changes["reuse_on_scale_in"] = policy.get("ReuseOnScaleIn", False)
    call.engine.put_warm_pool(call.group, replace(warm_pool or WarmPool(), **changes))
    return {}


def describe_warm_pool(call: Call) -> Answer:
    pool, instances = call.engine.describe_warm_pool(call.group)
    answer = call.to_page("Instances", instances, lambda instance: instance.instance_id, most=MAX_WARM)
    return {**answer, **call.answer("WarmPoolConfiguration", pool)} if pool else answer


ACTIONS: Mapping[str, Action] = {
    "BatchDeleteScheduledAction": delete_many_scheduled,
    "BatchPutScheduledUpdateGroupAction": put_many_scheduled,
    "CancelInstanceRefresh": forward(GROUP_NAME, answer="InstanceRefreshId"),
    "CompleteLifecycleAction": forward(
        GROUP_NAME, "LifecycleHookName", "LifecycleActionResult", optional=["InstanceId", "LifecycleActionToken"]
    ),
    "DeleteLifecycleHook": forward(GROUP_NAME, "LifecycleHookName"),
    "DeletePolicy": forward("PolicyName", optional=[GROUP_NAME]),
    "DeleteScheduledAction": forward(GROUP_NAME, "ScheduledActionName"),
    "DeleteWarmPool": forward(GROUP_NAME, optional=["ForceDelete"]),
    "DescribeInstanceRefreshes": describe_refreshes,
    "DescribeLifecycleHooks": forward(GROUP_NAME, "LifecycleHookNames", answer="LifecycleHooks"),
    "DescribePolicies": describe_policies,
    "DescribeScheduledActions": describe_scheduled,
    "DescribeWarmPool": describe_warm_pool,
    "ExecutePolicy": forward("PolicyName", optional=[GROUP_NAME, "HonorCooldown", "MetricValue", "BreachThreshold"]),
    "PutLifecycleHook": put_hook,
    "PutScalingPolicy": put_policy,
    "PutScheduledUpdateGroupAction": put_scheduled,
    "PutWarmPool": put_warm_pool,
    "RecordLifecycleActionHeartbeat": forward(
        GROUP_NAME, "LifecycleHookName", optional=["InstanceId", "LifecycleActionToken"]
    ),
    "RollbackInstanceRefresh": forward(GROUP_NAME, answer="InstanceRefreshId"),
    "StartInstanceRefresh": start_refresh,
}


_LIMITS = {"MaxNumberOfAutoScalingGroups": 500, "MaxNumberOfLaunchConfigurations": 200}
"""AWS's default limits of an AWS account, which the engine does not enforce."""


def _limits(call: Call) -> Answer:
    number = len(call.engine.describe_auto_scaling_groups())
    return {**_LIMITS, "NumberOfAutoScalingGroups": number, "NumberOfLaunchConfigurations": 0}


def _always(answer: Answer) -> Action:
    return lambda _: answer


ALL_ACTIONS: Mapping[str, Action] = {
    **groups.ACTIONS,
    **ACTIONS,
    "DescribeAccountLimits": _limits,
    "DescribeAdjustmentTypes": _always({"AdjustmentTypes": [{"AdjustmentType": name} for name in ADJUSTMENTS]}),
    "DescribeLifecycleHookTypes": _always({"LifecycleHookTypes": [LAUNCHING, TERMINATING]}),
    # The endpoint does not collect group metrics, so the lists of metrics and granularities are empty.
    "DescribeMetricCollectionTypes": _always({"Metrics": [], "Granularities": []}),
    "DescribeScalingProcessTypes": _always({"Processes": [{"ProcessName": str(process)} for process in Process]}),
    "DescribeTerminationPolicyTypes": _always({"TerminationPolicyTypes": sorted(POLICIES.keys() - {PLAIN})}),
}


def act(engine: AutoScaling, changed: Callable[[], None]) -> Act:
    """Return the function that performs the actions on `engine`.

    The returned function calls `changed` after each action except Describe actions, so that the engine ticks soon.
    """

    async def perform(operation: OperationModel, parameters: Parameters) -> Answer:
        action = ALL_ACTIONS.get(operation.name)
        if action is None:
            raise Fault("NotImplemented", f"This endpoint does not support {operation.name}.")
        try:
            return action(Call(engine, operation, parameters))
        except EngineFault as fault:
            raise Fault(fault.code, fault.message) from fault
        finally:
            if not operation.name.startswith("Describe"):
                changed()

    return perform
