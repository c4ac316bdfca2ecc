"""Actions on groups, instances, and tags, and the request that an action receives.

Most actions only pass their parameters to the engine. `forward` creates an action that only passes parameters, from the
names of the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from botocore import xform_name
from botocore.model import OperationModel, StructureShape

from batchlab.fleet.api_types import (
    GroupConfig,
    GroupDetails,
    InstanceDetails,
    InstancesDistribution,
    LaunchTemplate,
    LifecycleHook,
    MixedInstancesPolicy,
    Tag,
)
from batchlab.fleet.autoscaling import AutoScaling
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

GROUP_NAME = "AutoScalingGroupName"
MAX_INSTANCES = 50
_ENGINE_NAMES = {GROUP_NAME: "name"}
"""Names in the engine of AWS's parameters, if the engine's name is not AWS's name in snake case."""


@dataclass(frozen=True, slots=True)
class Call:
    """Request of one action, with the engine and the model of the operation."""

    engine: AutoScaling
    operation: OperationModel
    parameters: Parameters

    @property
    def group(self) -> str:
        """Return the group's name, which botocore's model requires in every request on a group."""
        return str(self.parameters[GROUP_NAME])

    def optional(self, *names: str) -> dict[str, Any]:
        """Return the parameters in `names` that the request contains, by their names in the engine."""
        return {
            _ENGINE_NAMES.get(name, xform_name(name)): self.parameters[name]
            for name in names
            if name in self.parameters
        }

    def answer(self, member: str, value: Any) -> Answer:
        """Return an answer with the single member `member`."""
        return {member: to_answer(self._shape(member), value)}

    def to_page(
        self,
        member: str,
        items: Sequence[T],
        key: Callable[[T], str],
        *,
        most: int = MAX_ITEMS,
        convert: Callable[[StructureShape, T], Answer] = to_answer,
    ) -> Answer:
        """Return one page of `items` as an answer. The function `convert` returns the answer's entry for an item."""
        found, following = page(items, self.parameters, key, most=most)
        entry = self._shape(member).member
        return {member: [convert(entry, item) for item in found], **following}

    def _shape(self, member: str) -> Any:
        shape = self.operation.output_shape
        if not isinstance(shape, StructureShape):
            raise ValueError(f"{self.operation.name} has no answer")
        return shape.members[member]


def forward(*positional: str, optional: Sequence[str] = (), answer: str = "") -> Action:
    """Return an action that calls the engine's method with the name of the operation.

    The engine gets the parameters `positional` as positional arguments. The parameters `optional` that the request
    contains are passed as keyword arguments. `answer` is the member of the answer that has the method's result.
    """

    def action(call: Call) -> Answer:
        if len(call.parameters.get("InstanceIds", ())) > MAX_INSTANCES:
            raise invalid(f"At most {MAX_INSTANCES} instances may be named at a time.")
        method = getattr(call.engine, xform_name(call.operation.name))
        # A positional parameter that a request may omit is always a list.
        arguments = [call.parameters.get(name, ()) for name in positional]
        result = method(*arguments, **call.optional(*optional))
        return call.answer(answer, result) if answer else {}

    return action


def matching(call: Call, items: Sequence[T], names: Mapping[str, Callable[[T], Sequence[str]]]) -> Sequence[T]:
    """Return the items that match all filters of the request.

    An item matches a filter if one of the filter's values is among the values that `names` returns for the item. A
    filter named `tag:KEY` uses the entry "tag:" of `names`, whose values have the form `KEY=value`.
    """
    for condition in call.parameters.get("Filters", ()):
        name, wanted = condition.get("Name", ""), set(condition.get("Values", ()))
        if name.startswith("tag:"):
            name, wanted = "tag:", {f"{name.removeprefix('tag:')}={value}" for value in wanted}
        if name not in names:
            allowed = " ".join(sorted(key.replace("tag:", "tag:<key>") for key in names))
            raise invalid(f"Filter type {name} is not correct. Allowed Filter types are: {allowed}")
        values = names[name]
        items = [item for item in items if wanted & set(values(item))]
    return items


GROUP = "auto-scaling-group"
_NOT_CONFIG = {"DesiredCapacity", "LifecycleHookSpecificationList", "Tags"}


def create(call: Call) -> Answer:
    parameters = call.parameters
    if "InstanceId" in parameters:
        raise invalid("This endpoint cannot create a group from an instance. Use a launch template.")
    hooks = [
        parse_into(LifecycleHook, hook, auto_scaling_group_name=call.group)
        for hook in parameters.get("LifecycleHookSpecificationList", ())
    ]
    call.engine.create_auto_scaling_group(
        parse_into(GroupConfig, parameters, passive=_passive(other_parameters(GroupConfig, parameters))),
        desired_capacity=parameters.get("DesiredCapacity"),
        tags=[parse_into(Tag, tag) for tag in parameters.get("Tags", ())],
        lifecycle_hooks=hooks,
    )
    return {}


def update(call: Call) -> Answer:
    changes = fields(GroupConfig, call.parameters)
    del changes["auto_scaling_group_name"]
    if passive := _passive(other_parameters(GroupConfig, call.parameters)):
        changes["passive"] = tuple({**dict(_group_of(call, call.group).config.passive), **dict(passive)}.items())
    if mixed := call.parameters.get("MixedInstancesPolicy"):
        changes["mixed_instances_policy"] = _updated_policy(_group_of(call, call.group).config, mixed)
    desired = call.parameters.get("DesiredCapacity")
    call.engine.update_auto_scaling_group(call.group, changes, desired_capacity=desired)
    return {}


def _updated_policy(config: GroupConfig, parameters: Parameters) -> MixedInstancesPolicy:
    """Return a group's mixed instances policy after an update. As on AWS, omitted properties keep their values, and a
    group without a mixed instances policy keeps its launch template.
    """
    old = config.mixed_instances_policy or MixedInstancesPolicy(config.launch_template or LaunchTemplate())
    template, before = parameters.get("LaunchTemplate", {}), old.instances_distribution
    shares = fields(InstancesDistribution, parameters.get("InstancesDistribution", {}))
    if shares.get("spot_allocation_strategy", before.spot_allocation_strategy) != before.spot_allocation_strategy:
        shares.setdefault("spot_instance_pools", None)  # Only one strategy has a number of pools.
    given = {"LaunchTemplate": template.get("LaunchTemplateSpecification"), "Overrides": template.get("Overrides")}
    kept = {
        "launch_template": _by_id(old.launch_template),
        "overrides": tuple(
            replace(override, launch_template_specification=_by_id(special))
            if (special := override.launch_template_specification)
            else override
            for override in old.overrides
        ),
    }
    new = fields(MixedInstancesPolicy, {name: value for name, value in given.items() if value is not None})
    return MixedInstancesPolicy(**{**kept, **new}, instances_distribution=replace(before, **shares))


def _by_id(template: LaunchTemplate) -> LaunchTemplate:
    """Return a stored reference to a launch template as a request has it. A request has either the id or the name."""
    return replace(template, launch_template_name="") if template.launch_template_id else template


def _passive(parameters: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, json.dumps(value)) for name, value in parameters.items() if name not in _NOT_CONFIG)


def _group_of(call: Call, name: str) -> GroupDetails:
    groups = call.engine.describe_auto_scaling_groups([name])
    if not groups:
        raise invalid("AutoScalingGroup name not found - null")
    return groups[0]


def describe(call: Call) -> Answer:
    groups = call.engine.describe_auto_scaling_groups(call.parameters.get("AutoScalingGroupNames", ()))
    answer = call.to_page("AutoScalingGroups", matching(call, groups, _FILTERS), name_of, convert=_group)
    if not call.parameters.get("IncludeInstances", True):
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


_ALWAYS = ("EnabledMetrics", "LoadBalancerNames", "TargetGroupARNs", "TrafficSources")
"""Lists that AWS returns for every group, even if they are empty."""


def _group(shape: StructureShape, group: GroupDetails) -> dict[str, Any]:
    passive = {name: json.loads(text) for name, text in group.config.passive}
    return {
        **{name: [] for name in _ALWAYS},
        **to_answer(shape, group.config),
        **to_answer(shape, group),
        # An update with an empty text removes a setting.
        **{name: value for name, value in passive.items() if name in shape.members and value != ""},
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


# --- Activities and instances ----------------------------------------------------------------------


def describe_activities(call: Call) -> Answer:
    activities = call.engine.describe_scaling_activities(
        call.parameters.get(GROUP_NAME), **call.optional("ActivityIds", "IncludeDeletedGroups")
    )
    activities = matching(call, activities, {"Status": lambda activity: [activity.status_code]})
    return call.to_page("Activities", activities, lambda activity: activity.activity_id)


def describe_instances(call: Call) -> Answer:
    instances = call.engine.describe_auto_scaling_instances(call.parameters.get("InstanceIds", ()))
    return call.to_page(
        "AutoScalingInstances", instances, lambda instance: instance.instance_id, most=MAX_INSTANCES, convert=_instance
    )


def _instance(shape: StructureShape, instance: InstanceDetails) -> dict[str, Any]:
    # AWS writes the health status in capitals in DescribeAutoScalingInstances, but not in DescribeAutoScalingGroups.
    return {**to_answer(shape, instance), "HealthStatus": instance.health_status.upper()}


# --- Tags -----------------------------------------------------------------------------------------


def put_tags(call: Call) -> Answer:
    groups = _by_group(call).items()
    call.engine.create_or_update_tags({group: [parse_into(Tag, tag) for tag in tags] for group, tags in groups})
    return {}


def delete_tags(call: Call) -> Answer:
    for group, tags in _by_group(call).items():
        call.engine.delete_tags(group, [tag["Key"] for tag in tags])
    return {}


def _by_group(call: Call) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    tags: dict[str, list[Mapping[str, Any]]] = {}
    for tag in call.parameters["Tags"]:
        if tag.get("ResourceType", GROUP) != GROUP or not tag.get("ResourceId"):
            raise invalid(f"A tag must have a ResourceId, and its ResourceType may only be {GROUP}.")
        tags.setdefault(tag["ResourceId"], []).append(tag)
    for group in tags:
        _group_of(call, group)
    return tags


def describe_tags(call: Call) -> Answer:
    pairs = [_tag(name_of(group), tag) for group in call.engine.describe_auto_scaling_groups() for tag in group.tags]
    pairs = list(matching(call, pairs, _TAG_FILTERS))
    return call.to_page("Tags", pairs, lambda tag: f"{tag['ResourceId']} {tag['Key']}", convert=lambda _, tag: tag)


_TAG_FILTERS: Mapping[str, Callable[[dict[str, Any]], Sequence[str]]] = {
    GROUP: lambda tag: [tag["ResourceId"]],
    "key": lambda tag: [tag["Key"]],
    "value": lambda tag: [tag["Value"]],
    "propagate-at-launch": lambda tag: ["true" if tag["PropagateAtLaunch"] else "false"],
}

_DECREMENT = "ShouldDecrementDesiredCapacity"
ACTIONS: Mapping[str, Action] = {
    "AttachInstances": forward(GROUP_NAME, "InstanceIds"),
    "CreateAutoScalingGroup": create,
    "CreateOrUpdateTags": put_tags,
    "DeleteAutoScalingGroup": forward(GROUP_NAME, optional=["ForceDelete"]),
    "DeleteTags": delete_tags,
    "DescribeAutoScalingGroups": describe,
    "DescribeAutoScalingInstances": describe_instances,
    "DescribeScalingActivities": describe_activities,
    "DescribeTags": describe_tags,
    "DetachInstances": forward(GROUP_NAME, "InstanceIds", optional=[_DECREMENT], answer="Activities"),
    "EnterStandby": forward(GROUP_NAME, "InstanceIds", optional=[_DECREMENT], answer="Activities"),
    "ExitStandby": forward(GROUP_NAME, "InstanceIds", answer="Activities"),
    "ResumeProcesses": forward(GROUP_NAME, "ScalingProcesses"),
    "SetDesiredCapacity": forward(GROUP_NAME, "DesiredCapacity", optional=["HonorCooldown"]),
    "SetInstanceHealth": forward("InstanceId", "HealthStatus", optional=["ShouldRespectGracePeriod"]),
    "SetInstanceProtection": forward(GROUP_NAME, "InstanceIds", optional=["ProtectedFromScaleIn"]),
    "SuspendProcesses": forward(GROUP_NAME, "ScalingProcesses"),
    "TerminateInstanceInAutoScalingGroup": forward("InstanceId", optional=[_DECREMENT], answer="Activity"),
    "UpdateAutoScalingGroup": update,
}
