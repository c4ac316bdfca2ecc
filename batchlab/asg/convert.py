"""Between parameters by AWS's names and the engine's frozen values, field by field.

A field has AWS's name in snake case, as botocore writes it. Only where the engine's value is built
otherwise than AWS's structure does a type have a conversion of its own, here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from botocore import xform_name
from botocore.model import ListShape, Shape, StructureShape

from batchlab.asg.fault import invalid
from batchlab.fleet.api import MixedInstancesPolicy, TargetTracking, WarmPool

T = TypeVar("T")
Asked = Mapping[str, Any]


# --- From the wire --------------------------------------------------------------------------------


def given(kind: type[T], asked: Asked, **more: Any) -> T:
    """A value of the dataclass from those parameters that are fields of it, and `more`; Fault
    where one is missing that AWS's model leaves to choice and the engine needs."""
    found = {**fields(kind, asked), **more}
    whole: Any = kind
    for name in _needed(whole):
        if name not in found:
            raise invalid(f"Parameter {name} of {kind.__name__} must be specified.")
    return kind(**found)


def fields(kind: type, asked: Asked) -> dict[str, Any]:
    """The fields of the dataclass that the parameters have, by name."""
    hints = _hints(kind)
    named = {xform_name(name): value for name, value in asked.items()}
    return {name: _field(hints[name], value) for name, value in named.items() if name in hints}


def rest(kind: type, asked: Asked) -> dict[str, Any]:
    """The parameters that are no fields of the dataclass."""
    return {name: value for name, value in asked.items() if xform_name(name) not in _hints(kind)}


@cache
def _needed(kind: Any) -> list[str]:
    """The fields that have no default."""
    return [
        field.name
        for field in dataclass_fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _field(hint: Any, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, list):
        inner = get_args(hint)[0]
        return tuple(_field(inner, one) for one in value)
    if isinstance(value, dict):
        kind: Any = next(one for one in (hint, *get_args(hint)) if is_dataclass(one))
        return given(kind, _GIVEN.get(kind, dict)(value))
    if isinstance(value, str) and int in (hint, *get_args(hint)):
        # Weights are text on the wire.
        return int(value)
    return value


def _mixed_given(asked: Asked) -> Asked:
    template = asked.get("LaunchTemplate", {})
    return {
        "LaunchTemplate": template.get("LaunchTemplateSpecification", {}),
        "Overrides": template.get("Overrides", []),
        "InstancesDistribution": asked.get("InstancesDistribution", {}),
    }


def _tracking_given(asked: Asked) -> Asked:
    found = dict(asked)
    if predefined := found.pop("PredefinedMetricSpecification", None):
        found["PredefinedMetricType"] = predefined["PredefinedMetricType"]
    if customized := found.pop("CustomizedMetricSpecification", None):
        found["CustomizedMetricSpecification"] = json.dumps(customized)
    return found


_GIVEN: dict[Any, Callable[[Asked], Asked]] = {
    MixedInstancesPolicy: _mixed_given,
    TargetTracking: _tracking_given,
}


# --- To the wire ----------------------------------------------------------------------------------


def told(shape: Shape, value: Any) -> Any:
    """The value as an answer of the shape. None and "" are left out unless the shape needs them,
    and so are members that the value has no field for."""
    if isinstance(shape, StructureShape):
        special = _TOLD.get(type(value))
        return special(shape, value) if special else _structure(shape, value)
    if isinstance(shape, ListShape):
        return [told(shape.member, one) for one in value]
    if shape.type_name == "timestamp":
        return datetime.fromtimestamp(value, UTC)
    return str(value) if shape.type_name == "string" else value


def _structure(shape: StructureShape, value: Any) -> dict[str, Any]:
    found = {}
    for name, member in shape.members.items():
        one = getattr(value, xform_name(name), None)
        if one is not None and (one != "" or name in shape.required_members):
            found[name] = told(member, one)
    return found


def _mixed_told(shape: StructureShape, value: MixedInstancesPolicy) -> dict[str, Any]:
    template: Any = shape.members["LaunchTemplate"]
    names = template.members
    return {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": told(
                names["LaunchTemplateSpecification"], value.launch_template
            ),
            "Overrides": told(names["Overrides"], value.overrides),
        },
        "InstancesDistribution": told(
            shape.members["InstancesDistribution"], value.instances_distribution
        ),
    }


def _tracking_told(_: StructureShape, value: TargetTracking) -> dict[str, Any]:
    found: dict[str, Any] = {
        "TargetValue": value.target_value,
        "DisableScaleIn": value.disable_scale_in,
    }
    if value.predefined_metric_type:
        metric = {"PredefinedMetricType": value.predefined_metric_type}
        found["PredefinedMetricSpecification"] = metric
    if value.customized_metric_specification:
        found["CustomizedMetricSpecification"] = json.loads(value.customized_metric_specification)
    return found


def _warm_told(shape: StructureShape, value: WarmPool) -> dict[str, Any]:
    reuse = {"ReuseOnScaleIn": value.reuse_on_scale_in}
    return {**_structure(shape, value), "InstanceReusePolicy": reuse}


_TOLD: dict[type, Callable[[StructureShape, Any], dict[str, Any]]] = {
    MixedInstancesPolicy: _mixed_told,
    TargetTracking: _tracking_told,
    WarmPool: _warm_told,
}
