"""Actions on hooks, policies, scheduled actions, instance refreshes, and warm pools, and the table
of all actions.

Invariant: an action contains no rule of Auto Scaling. It calls a method of the engine, and converts
parameters whose structure differs from AWS's.
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
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.fleet.policy_requests import ADJUSTMENTS
from batchlab.fleet.termination import PLAIN, POLICIES
from batchlab.server.autoscaling_api import groups
from batchlab.server.autoscaling_api.app import Fault, invalid
from batchlab.server.autoscaling_api.groups import Action, Answer, Call
from batchlab.server.autoscaling_api.parameters import Parameters, fields, other_parameters, parse_into
from batchlab.server.autoscaling_api.query_protocol import Act

MAX_WARM = 50

# --- Lifecycle hooks ------------------------------------------------------------------------------


def put_hook(call: Call) -> Answer:
    """Create or update a hook. Parameters that are not given keep their value, as in AWS's
    PutLifecycleHook."""
    lifecycle_hooks = call.engine.describe_lifecycle_hooks(call.group, [call.asked["LifecycleHookName"]])
    hook = (
        replace(lifecycle_hooks[0], **fields(LifecycleHook, call.asked))
        if lifecycle_hooks
        else parse_into(LifecycleHook, call.asked)
    )
    call.engine.put_lifecycle_hook(hook)
    return {}


def delete_hook(call: Call) -> Answer:
    call.engine.delete_lifecycle_hook(call.group, call.asked["LifecycleHookName"])
    return {}


def describe_hooks(call: Call) -> Answer:
    hooks = call.engine.describe_lifecycle_hooks(call.group, call.asked.get("LifecycleHookNames", ()))
    return call.answer("LifecycleHooks", hooks)


def complete(call: Call) -> Answer:
    call.engine.complete_lifecycle_action(
        call.group,
        call.asked["LifecycleHookName"],
        call.asked["LifecycleActionResult"],
        **call.some("InstanceId", "LifecycleActionToken"),
    )
    return {}


def heartbeat(call: Call) -> Answer:
    call.engine.record_lifecycle_action_heartbeat(
        call.group, call.asked["LifecycleHookName"], **call.some("InstanceId", "LifecycleActionToken")
    )
    return {}


# --- Scaling policies -----------------------------------------------------------------------------


def put_policy(call: Call) -> Answer:
    policy = call.engine.put_scaling_policy(parse_into(ScalingPolicy, call.asked))
    # The list of alarms is empty, because the engine reads the metric itself, without CloudWatch.
    return {"PolicyARN": policy.policy_arn, "Alarms": []}


def delete_policy(call: Call) -> Answer:
    call.engine.delete_policy(call.asked["PolicyName"], name=call.asked.get("AutoScalingGroupName"))
    return {}


def describe_policies(call: Call) -> Answer:
    policies = call.engine.describe_policies(
        call.asked.get("AutoScalingGroupName"), **call.some("PolicyNames", "PolicyTypes")
    )
    return call.paged("ScalingPolicies", policies, lambda policy: policy.policy_arn)


def execute_policy(call: Call) -> Answer:
    call.engine.execute_policy(
        call.asked["PolicyName"],
        name=call.asked.get("AutoScalingGroupName"),
        **call.some("HonorCooldown", "MetricValue", "BreachThreshold"),
    )
    return {}


# --- Scheduled actions ----------------------------------------------------------------------------


def put_scheduled(call: Call) -> Answer:
    _schedule(call, call.asked)
    return {}


def _schedule(call: Call, asked: Parameters) -> None:
    """Create or update a scheduled action. Fields that are not given keep their value."""
    changes = fields(ScheduledAction, asked)
    if "Time" in asked:
        # `Time` is the former name of `StartTime`.
        changes.setdefault("start_time", asked["Time"].timestamp())
    name = asked["ScheduledActionName"]
    scheduled_actions = call.engine.describe_scheduled_actions(call.group, scheduled_action_names=[name])
    old = scheduled_actions[0] if scheduled_actions else ScheduledAction(call.group, name)
    if {"recurrence", "time_zone"} & changes.keys():
        # The start time of a described action is its next run according to the old recurrence.
        old = replace(old, start_time=None)
    call.engine.put_scheduled_update_group_action(replace(old, **changes))


def put_many_scheduled(call: Call) -> Answer:
    failed = []
    for asked in call.asked["ScheduledUpdateGroupActions"]:
        try:
            _schedule(call, asked)
        except EngineFault as fault:
            failed.append(_failed(asked["ScheduledActionName"], fault))
    return {"FailedScheduledUpdateGroupActions": failed}


def delete_many_scheduled(call: Call) -> Answer:
    failed = []
    for name in call.asked["ScheduledActionNames"]:
        try:
            call.engine.delete_scheduled_action(call.group, name)
        except EngineFault as fault:
            failed.append(_failed(name, fault))
    return {"FailedScheduledActions": failed}


def _failed(name: str, fault: EngineFault) -> dict[str, str]:
    return {"ScheduledActionName": name, "ErrorCode": fault.code, "ErrorMessage": fault.message}


def delete_scheduled(call: Call) -> Answer:
    call.engine.delete_scheduled_action(call.group, call.asked["ScheduledActionName"])
    return {}


def describe_scheduled(call: Call) -> Answer:
    times = {name: at.timestamp() for name, at in call.some("StartTime", "EndTime").items()}
    actions = call.engine.describe_scheduled_actions(
        call.asked.get("AutoScalingGroupName"), **call.some("ScheduledActionNames"), **times
    )
    return call.paged("ScheduledUpdateGroupActions", actions, lambda action: action.scheduled_action_arn)


# --- Instance refresh -----------------------------------------------------------------------------


def start_refresh(call: Call) -> Answer:
    more: dict[str, Any] = call.some("Strategy")
    if "DesiredConfiguration" in call.asked:
        more["desired_configuration"] = parse_into(DesiredConfiguration, call.asked["DesiredConfiguration"])
    wanted = call.asked.get("Preferences", {})
    if unknown := other_parameters(RefreshPreferences, wanted):
        raise invalid(f"Preferences that are not served here: {', '.join(sorted(unknown))}.")
    preferences = parse_into(RefreshPreferences, wanted)
    found = call.engine.start_instance_refresh(call.group, preferences=preferences, **more)
    return {"InstanceRefreshId": found}


def cancel_refresh(call: Call) -> Answer:
    return {"InstanceRefreshId": call.engine.cancel_instance_refresh(call.group)}


def roll_back_refresh(call: Call) -> Answer:
    return {"InstanceRefreshId": call.engine.rollback_instance_refresh(call.group)}


def describe_refreshes(call: Call) -> Answer:
    refreshes = call.engine.describe_instance_refreshes(call.group, call.asked.get("InstanceRefreshIds", ()))
    return call.paged("InstanceRefreshes", refreshes, lambda refresh: refresh.instance_refresh_id)


# --- Warm pool ------------------------------------------------------------------------------------


def put_warm_pool(call: Call) -> Answer:
    warm_pool, _ = call.engine.describe_warm_pool(call.group)
    changes = fields(WarmPool, call.asked)
    if changes.get("max_group_prepared_capacity") == -1:
        changes["max_group_prepared_capacity"] = None
    if policy := call.asked.get("InstanceReusePolicy"):
        changes["reuse_on_scale_in"] = policy.get("ReuseOnScaleIn", False)
    call.engine.put_warm_pool(call.group, replace(warm_pool or WarmPool(), **changes))
    return {}


def delete_warm_pool(call: Call) -> Answer:
    call.engine.delete_warm_pool(call.group, **call.some("ForceDelete"))
    return {}


def describe_warm_pool(call: Call) -> Answer:
    pool, instances = call.engine.describe_warm_pool(call.group)
    answer = call.paged("Instances", instances, lambda instance: instance.instance_id, most=MAX_WARM)
    return {**answer, **call.answer("WarmPoolConfiguration", pool)} if pool else answer


ACTIONS: Mapping[str, Action] = {
    "BatchDeleteScheduledAction": delete_many_scheduled,
    "BatchPutScheduledUpdateGroupAction": put_many_scheduled,
    "CancelInstanceRefresh": cancel_refresh,
    "CompleteLifecycleAction": complete,
    "DeleteLifecycleHook": delete_hook,
    "DeletePolicy": delete_policy,
    "DeleteScheduledAction": delete_scheduled,
    "DeleteWarmPool": delete_warm_pool,
    "DescribeInstanceRefreshes": describe_refreshes,
    "DescribeLifecycleHooks": describe_hooks,
    "DescribePolicies": describe_policies,
    "DescribeScheduledActions": describe_scheduled,
    "DescribeWarmPool": describe_warm_pool,
    "ExecutePolicy": execute_policy,
    "PutLifecycleHook": put_hook,
    "PutScalingPolicy": put_policy,
    "PutScheduledUpdateGroupAction": put_scheduled,
    "PutWarmPool": put_warm_pool,
    "RecordLifecycleActionHeartbeat": heartbeat,
    "RollbackInstanceRefresh": roll_back_refresh,
    "StartInstanceRefresh": start_refresh,
}


_LIMITS = {"MaxNumberOfAutoScalingGroups": 500, "MaxNumberOfLaunchConfigurations": 200}
"""AWS's default limits of an account. The engine does not have them."""


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
    # The endpoint collects no group metrics, so the list is empty.
    "DescribeMetricCollectionTypes": _always({"Metrics": [], "Granularities": []}),
    "DescribeScalingProcessTypes": _always({"Processes": [{"ProcessName": str(process)} for process in Process]}),
    "DescribeTerminationPolicyTypes": _always({"TerminationPolicyTypes": sorted(POLICIES.keys() - {PLAIN})}),
}


def act(engine: AutoScaling, changed: Callable[[], None]) -> Act:
    """Return the function that performs the actions on this engine. It calls `changed` after each
    action that may change something, so that the engine ticks soon."""

    async def do(operation: OperationModel, asked: Parameters) -> Answer:
        action = ALL_ACTIONS.get(operation.name)
        if action is None:
            raise Fault("NotImplemented", f"{operation.name} is not served here.")
        try:
            return action(Call(engine, operation, asked))
        except EngineFault as fault:
            raise Fault(fault.code, fault.message) from fault
        finally:
            if not operation.name.startswith("Describe"):
                changed()

    return do
