"""Actions on groups, instances, and tags.

`Call` is the request that an action receives. Each action calls one method of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from botocore import xform_name
from botocore.model import OperationModel, StructureShape

from batchlab.fleet.api_types import GroupConfig, GroupDetails, InstanceDetails, LifecycleHook, Tag
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.server.autoscaling_api import parameters
from batchlab.server.autoscaling_api.app import invalid
from batchlab.server.autoscaling_api.parameters import (
    MAX_ITEMS,
    Parameters,
    fields,
    other_parameters,
    page,
    parse_into,
    to_answer,
)

T = TypeVar("T")
Answer = dict[str, Any]
Action = Callable[["Call"], Answer]


@dataclass(frozen=True, slots=True)
class Call:
    """Request of one action, with the engine and the model of the operation."""

    engine: AutoScaling
    operation: OperationModel
    asked: Parameters

    @property
    def group(self) -> str:
        """Return the group's name. The model requires this parameter."""
        return str(self.asked["AutoScalingGroupName"])

    def some(self, *names: str) -> dict[str, Any]:
        """Return the given ones of these parameters, by the engine's names."""
        return {xform_name(name): self.asked[name] for name in names if name in self.asked}

    def answer(self, member: str, value: Any) -> Answer:
        """Return an answer with this member only."""
        return {member: parameters.to_answer(self._shape(member), value)}

    def paged(
        self,
        member: str,
        items: Sequence[T],
        key: Callable[[T], str],
        *,
        most: int = MAX_ITEMS,
        tell: Callable[[StructureShape, T], Answer] = parameters.to_answer,
    ) -> Answer:
        """Return one page of `items` as an answer. `tell` converts an item into an entry of the
        answer."""
        found, following = page(items, self.asked, key, most=most)
        entry = self._shape(member).member
        return {member: [tell(entry, one) for one in found], **following}

    def _shape(self, member: str) -> Any:
        shape = self.operation.output_shape
        if not isinstance(shape, StructureShape):
            raise ValueError(f"{self.operation.name} has no answer")
        return shape.members[member]


def matching(call: Call, items: Sequence[T], names: Mapping[str, Callable[[T], Sequence[str]]]) -> Sequence[T]:
    """Return the items that match all filters of the request. An item matches a filter if one of
    the filter's values is among the values that `names` returns for it. A filter named `tag:KEY`
    uses the entry "tag:" of `names`, and its values have the form `KEY=value`."""
    for one in call.asked.get("Filters", ()):
        name, wanted = one.get("Name", ""), set(one.get("Values", ()))
        if name.startswith("tag:"):
            name, wanted = "tag:", {f"{name.removeprefix('tag:')}={value}" for value in wanted}
        if name not in names:
            allowed = " ".join(sorted(known.replace("tag:", "tag:<key>") for known in names))
            raise invalid(f"Filter type {name} is not correct. Allowed Filter types are: {allowed}")
        found = names[name]
        items = [item for item in items if wanted & set(found(item))]
    return items


GROUP = "auto-scaling-group"
MAX_INSTANCES = 50
_NOT_CONFIG = {"DesiredCapacity", "LifecycleHookSpecificationList", "Tags"}


def create(call: Call) -> Answer:
    asked = call.asked
    if "InstanceId" in asked:
        raise invalid("A group is not made from an instance here: name a launch template.")
    hooks = [
        parse_into(LifecycleHook, hook, auto_scaling_group_name=call.group)
        for hook in asked.get("LifecycleHookSpecificationList", ())
    ]
    call.engine.create_auto_scaling_group(
        parse_into(GroupConfig, asked, passive=_passive(other_parameters(GroupConfig, asked))),
        desired_capacity=asked.get("DesiredCapacity"),
        tags=[parse_into(Tag, tag) for tag in asked.get("Tags", ())],
        lifecycle_hooks=hooks,
    )
    return {}


def update(call: Call) -> Answer:
    changes = fields(GroupConfig, call.asked)
    del changes["auto_scaling_group_name"]
    if passive := _passive(other_parameters(GroupConfig, call.asked)):
        changes["passive"] = _merged(_one(call, call.group), passive)
    desired = call.asked.get("DesiredCapacity")
    call.engine.update_auto_scaling_group(call.group, changes, desired_capacity=desired)
    return {}


def _passive(asked: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, json.dumps(value)) for name, value in asked.items() if name not in _NOT_CONFIG)


def _merged(group: GroupDetails, new: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple({**dict(group.config.passive), **dict(new)}.items())


def _one(call: Call, name: str) -> GroupDetails:
    group_detailses = call.engine.describe_auto_scaling_groups([name])
    if not group_detailses:
        raise invalid("AutoScalingGroup name not found - null")
    return group_detailses[0]


def delete(call: Call) -> Answer:
    force = call.asked.get("ForceDelete", False)
    call.engine.delete_auto_scaling_group(call.group, force_delete=force)
    return {}


def describe(call: Call) -> Answer:
    groups = call.engine.describe_auto_scaling_groups(call.asked.get("AutoScalingGroupNames", ()))
    answer = call.paged("AutoScalingGroups", matching(call, groups, _FILTERS), name_of, tell=_group)
    if not call.asked.get("IncludeInstances", True):
        for group in answer["AutoScalingGroups"]:
            group["Instances"] = []
    return answer


_FILTERS: Mapping[str, Callable[[GroupDetails], Sequence[str]]] = {
    "tag-key": lambda group: [tag.key for tag in group.tags],
    "tag-value": lambda group: [tag.value for tag in group.tags],
    "tag:": lambda group: [f"{tag.key}={tag.value}" for tag in group.tags],
}


def name_of(group: GroupDetails) -> str:
    return group.config.auto_scaling_group_name


def _group(shape: StructureShape, group: GroupDetails) -> dict[str, Any]:
    passive = {name: json.loads(text) for name, text in group.config.passive}
    known = {name: value for name, value in passive.items() if name in shape.members}
    return {
        **known,
        **to_answer(shape, group.config),
        **to_answer(shape, group),
        "Tags": [_tag(name_of(group), tag) for tag in group.tags],
        "SuspendedProcesses": [
            {"ProcessName": str(process), "SuspensionReason": reason} for process, reason in group.suspended_processes
        ],
    }


def _tag(group: str, tag: Tag) -> dict[str, Any]:
    return {
        "ResourceId": group,
        "ResourceType": GROUP,
        "Key": tag.key,
        "Value": tag.value,
        "PropagateAtLaunch": tag.propagate_at_launch,
    }


# --- Capacity and processes -----------------------------------------------------------------------


def set_desired_capacity(call: Call) -> Answer:
    call.engine.set_desired_capacity(call.group, call.asked["DesiredCapacity"], **call.some("HonorCooldown"))
    return {}


def suspend_processes(call: Call) -> Answer:
    call.engine.suspend_processes(call.group, call.asked.get("ScalingProcesses", ()))
    return {}


def resume_processes(call: Call) -> Answer:
    call.engine.resume_processes(call.group, call.asked.get("ScalingProcesses", ()))
    return {}


def describe_activities(call: Call) -> Answer:
    activities = call.engine.describe_scaling_activities(
        call.asked.get("AutoScalingGroupName"), **call.some("ActivityIds")
    )
    activities = matching(call, activities, {"Status": lambda activity: [activity.status_code]})
    return call.paged("Activities", activities, lambda activity: activity.activity_id)


# --- Instances ------------------------------------------------------------------------------------


def describe_instances(call: Call) -> Answer:
    instance_detailses = call.engine.describe_auto_scaling_instances(call.asked.get("InstanceIds", ()))
    return call.paged(
        "AutoScalingInstances",
        instance_detailses,
        lambda instance: instance.instance_id,
        most=MAX_INSTANCES,
        tell=_instance,
    )


def _instance(shape: StructureShape, instance: InstanceDetails) -> dict[str, Any]:
    # AWS writes this value in capitals here, but not in DescribeAutoScalingGroups.
    return {**to_answer(shape, instance), "HealthStatus": instance.health_status.upper()}


def terminate(call: Call) -> Answer:
    activity = call.engine.terminate_instance_in_auto_scaling_group(
        call.asked["InstanceId"], **call.some("ShouldDecrementDesiredCapacity")
    )
    return call.answer("Activity", activity)


def set_health(call: Call) -> Answer:
    call.engine.set_instance_health(
        call.asked["InstanceId"], call.asked["HealthStatus"], **call.some("ShouldRespectGracePeriod")
    )
    return {}


def set_protection(call: Call) -> Answer:
    call.engine.set_instance_protection(call.group, _instances(call), **call.some("ProtectedFromScaleIn"))
    return {}


def enter_standby(call: Call) -> Answer:
    activities = call.engine.enter_standby(call.group, _instances(call), **call.some("ShouldDecrementDesiredCapacity"))
    return call.answer("Activities", activities)


def exit_standby(call: Call) -> Answer:
    return call.answer("Activities", call.engine.exit_standby(call.group, _instances(call)))


def attach(call: Call) -> Answer:
    call.engine.attach_instances(call.group, _instances(call))
    return {}


def detach(call: Call) -> Answer:
    activities = call.engine.detach_instances(
        call.group, _instances(call), **call.some("ShouldDecrementDesiredCapacity")
    )
    return call.answer("Activities", activities)


def _instances(call: Call) -> Sequence[str]:
    instances: Sequence[str] = call.asked.get("InstanceIds", ())
    if len(instances) > MAX_INSTANCES:
        raise invalid(f"At most {MAX_INSTANCES} instances may be named at a time.")
    return instances


# --- Tags -----------------------------------------------------------------------------------------


def put_tags(call: Call) -> Answer:
    for group, tags in _by_group(call).items():
        call.engine.create_or_update_tags(group, [parse_into(Tag, tag) for tag in tags])
    return {}


def delete_tags(call: Call) -> Answer:
    for group, tags in _by_group(call).items():
        call.engine.delete_tags(group, [tag["Key"] for tag in tags])
    return {}


def _by_group(call: Call) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for tag in call.asked["Tags"]:
        if tag.get("ResourceType") != GROUP or not tag.get("ResourceId"):
            raise invalid(f"A tag must have a ResourceId, and {GROUP} for its ResourceType.")
        found.setdefault(tag["ResourceId"], []).append(tag)
    for group in found:
        _one(call, group)
    return found


def describe_tags(call: Call) -> Answer:
    pairs = [_tag(name_of(group), tag) for group in call.engine.describe_auto_scaling_groups() for tag in group.tags]
    pairs = list(matching(call, pairs, _TAG_FILTERS))
    return call.paged("Tags", pairs, lambda tag: f"{tag['ResourceId']} {tag['Key']}", tell=lambda _, tag: tag)


_TAG_FILTERS: Mapping[str, Callable[[dict[str, Any]], Sequence[str]]] = {
    GROUP: lambda tag: [tag["ResourceId"]],
    "key": lambda tag: [tag["Key"]],
    "value": lambda tag: [tag["Value"]],
    "propagate-at-launch": lambda tag: ["true" if tag["PropagateAtLaunch"] else "false"],
}

ACTIONS: Mapping[str, Action] = {
    "AttachInstances": attach,
    "CreateAutoScalingGroup": create,
    "CreateOrUpdateTags": put_tags,
    "DeleteAutoScalingGroup": delete,
    "DeleteTags": delete_tags,
    "DescribeAutoScalingGroups": describe,
    "DescribeAutoScalingInstances": describe_instances,
    "DescribeScalingActivities": describe_activities,
    "DescribeTags": describe_tags,
    "DetachInstances": detach,
    "EnterStandby": enter_standby,
    "ExitStandby": exit_standby,
    "ResumeProcesses": resume_processes,
    "SetDesiredCapacity": set_desired_capacity,
    "SetInstanceHealth": set_health,
    "SetInstanceProtection": set_protection,
    "SuspendProcesses": suspend_processes,
    "TerminateInstanceInAutoScalingGroup": terminate,
    "UpdateAutoScalingGroup": update,
}
