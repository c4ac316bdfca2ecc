"""Checks and conversions of the parameters of AWS's requests and answers.

`check` tests the constraints of botocore's model (required, lengths, ranges, patterns, enums) and reports violations in
AWS's words. `parse_into` and `to_answer` convert between AWS's parameters and the engine's dataclasses. A field of a
dataclass has AWS's name in snake case, as botocore writes it. A type whose structure differs from AWS's structure has
its own conversion functions. `page` splits long answers by MaxRecords and NextToken.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from botocore import xform_name
from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

from batchlab.fleet.api_types import MixedInstancesPolicy, ScalingPolicy, TargetTracking, WarmPool
from batchlab.server.autoscaling_api.app import Fault, invalid

_PAIR = re.compile(r"\\u(D[89AB][0-9A-F]{2})\\u(D[C-F][0-9A-F]{2})", re.IGNORECASE)


def check(operation: OperationModel, parameters: Mapping[str, Any]) -> None:
    """Raise a Fault that lists every constraint that the parameters violate."""
    shape = operation.input_shape
    if not isinstance(shape, StructureShape):
        return
    if errors := list(_structure(shape, parameters, "")):
        number = f"{len(errors)} validation error{'s' if len(errors) > 1 else ''} detected: "
        raise invalid(number + "; ".join(errors))


def _structure(shape: StructureShape, values: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, member in shape.members.items():
        # AWS writes the paths of parameters with the field names of its Java classes.
        place = f"{path}{name[0].lower()}{name[1:]}"
        if name in values:
            yield from _value(member, values[name], place)
        elif name in shape.required_members:
            yield _wrong(None, place, "Member must not be null")


def _value(shape: Shape, value: Any, place: str) -> Iterator[str]:
    if isinstance(shape, StructureShape):
        yield from _structure(shape, value, f"{place}.")
    elif isinstance(shape, ListShape):
        yield from _size(shape, value, place)
        for number, item in enumerate(value, 1):
            yield from _value(shape.member, item, f"{place}.{number}.member")
    elif isinstance(shape, MapShape):
        yield from _size(shape, value, place)
        for key, item in value.items():
            yield from _value(shape.key, key, f"{place}.{key}.key")
            yield from _value(shape.value, item, f"{place}.{key}.value")
    elif shape.type_name == "string":
        yield from _string(shape, value, place)
    elif shape.type_name in ("integer", "long", "float", "double"):
        yield from _range(shape, value, place, value, "value")


def _string(shape: Shape, value: str, place: str) -> Iterator[str]:
    yield from _size(shape, value, place)
    pattern = shape.metadata.get("pattern")
    if pattern and not _compile(pattern).fullmatch(value):
        yield _wrong(value, place, f"Member must satisfy regular expression pattern: {pattern}")
    enum = shape.metadata.get("enum")
    if enum and value not in enum:
        yield _wrong(value, place, f"Member must satisfy enum value set: [{', '.join(enum)}]")


def _size(shape: Shape, value: Any, place: str) -> Iterator[str]:
    return _range(shape, value, place, len(value), "length")


def _range(shape: Shape, value: Any, place: str, number: float, what: str) -> Iterator[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and number < least:
        yield _wrong(value, place, f"Member must have {what} greater than or equal to {least}")
    if most is not None and number > most:
        yield _wrong(value, place, f"Member must have {what} less than or equal to {most}")


def _wrong(value: Any, place: str, constraint: str) -> str:
    text = "null" if value is None else f"'{_text(value)}'"
    return f"Value {text} at '{place}' failed to satisfy constraint: {constraint}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for a pattern in botocore's model.

    The patterns in the model are Java patterns, which write characters above U+FFFF as surrogate pairs.
    """
    return re.compile(_PAIR.sub(_join, pattern))


def _join(pair: re.Match[str]) -> str:
    high, low = int(pair[1], 16), int(pair[2], 16)
    return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08X}"


T = TypeVar("T")
Parameters = Mapping[str, Any]


# --- From AWS's parameters to dataclasses ---------------------------------------------------------


def parse_into(kind: type[T], parameters: Parameters, **more: Any) -> T:
    """Create an instance of `kind` from `more` and from the parameters that are fields of the dataclass.

    Raise Fault if a field without a default is missing, because AWS's model allows requests without some of these
    fields.
    """
    values = {**fields(kind, parameters), **more}
    dataclass: Any = kind
    for name in _required_parameters(dataclass):
        if name not in values:
            raise invalid(f"Parameter {name} of {kind.__name__} must be specified.")
    return kind(**values)


def fields(kind: type, parameters: Parameters) -> dict[str, Any]:
    """Return the parameters that are fields of the dataclass, by field name."""
    hints = _hints(kind)
    named = {xform_name(name): value for name, value in parameters.items()}
    return {name: _field(hints[name], value) for name, value in named.items() if name in hints}


def other_parameters(kind: type, parameters: Parameters) -> dict[str, Any]:
    """Return the parameters that are not fields of the dataclass."""
    return {name: value for name, value in parameters.items() if xform_name(name) not in _hints(kind)}


@cache
def _required_parameters(kind: Any) -> list[str]:
    """Return the names of the dataclass fields that do not have a default."""
    return [
        field.name for field in dataclass_fields(kind) if field.default is MISSING and field.default_factory is MISSING
    ]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _field(hint: Any, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, list):
        inner = get_args(hint)[0]
        return tuple(_field(inner, item) for item in value)
    if isinstance(value, dict):
        kind: Any = next(candidate for candidate in (hint, *get_args(hint)) if is_dataclass(candidate))
        return parse_into(kind, _PARSERS.get(kind, dict)(value))
    if isinstance(value, str) and int in (hint, *get_args(hint)):
        # AWS's requests contain weights as strings.
        if not value.isdecimal():
            raise invalid(f"The weight '{value}' is not a whole number.")
        return int(value)
    return value


def _parse_mixed(parameters: Parameters) -> Parameters:
    template = parameters.get("LaunchTemplate", {})
    return {
        "LaunchTemplate": template.get("LaunchTemplateSpecification", {}),
        "Overrides": template.get("Overrides", []),
        "InstancesDistribution": parameters.get("InstancesDistribution", {}),
    }


def _parse_tracking(parameters: Parameters) -> Parameters:
    flat = dict(parameters)
    if predefined := flat.pop("PredefinedMetricSpecification", None):
        flat["PredefinedMetricType"] = predefined["PredefinedMetricType"]
    if customized := flat.pop("CustomizedMetricSpecification", None):
        flat["CustomizedMetricSpecification"] = json.dumps(customized)
    return flat


_PARSERS: dict[Any, Callable[[Parameters], Parameters]] = {
    MixedInstancesPolicy: _parse_mixed,
    TargetTracking: _parse_tracking,
}


# --- From dataclasses to answers ------------------------------------------------------------------


def to_answer(shape: Shape, value: Any) -> Any:
    """Convert the value into an answer of the shape. The answer omits None, "", and members without a field in the
    value, except a required member with the value "".
    """
    if isinstance(shape, StructureShape):
        return _WRITERS.get(type(value), _answer_structure)(shape, value)
    if isinstance(shape, ListShape):
        return [to_answer(shape.member, item) for item in value]
    if shape.type_name == "timestamp":
        return datetime.fromtimestamp(value, UTC)
    return str(value) if shape.type_name == "string" else value


def _answer_structure(shape: StructureShape, value: Any) -> dict[str, Any]:
    answer = {}
    for name, member in shape.members.items():
        item = getattr(value, xform_name(name), None)
        if item is not None and (item != "" or name in shape.required_members):
            answer[name] = to_answer(member, item)
    return answer


def _write_mixed(shape: StructureShape, value: MixedInstancesPolicy) -> dict[str, Any]:
    template: Any = shape.members["LaunchTemplate"]
    names = template.members
    return {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": to_answer(names["LaunchTemplateSpecification"], value.launch_template),
            "Overrides": to_answer(names["Overrides"], value.overrides),
        },
        "InstancesDistribution": to_answer(shape.members["InstancesDistribution"], value.instances_distribution),
    }


def _write_tracking(_: StructureShape, value: TargetTracking) -> dict[str, Any]:
    answer: dict[str, Any] = {"TargetValue": value.target_value, "DisableScaleIn": value.disable_scale_in}
    if value.predefined_metric_type:
        answer["PredefinedMetricSpecification"] = {"PredefinedMetricType": value.predefined_metric_type}
    if value.customized_metric_specification:
        answer["CustomizedMetricSpecification"] = json.loads(value.customized_metric_specification)
    return answer


def alarms(policy: ScalingPolicy) -> list[dict[str, str]]:
    """Return the alarms of a target-tracking policy. The engine evaluates these alarms itself, without CloudWatch."""
    region, account = policy.policy_arn.split(":")[3:5]
    place = f"arn:aws:cloudwatch:{region}:{account}:alarm"
    return [{"AlarmName": name, "AlarmARN": f"{place}:{name}"} for name in policy.alarms]


def _write_policy(shape: StructureShape, value: ScalingPolicy) -> dict[str, Any]:
    return {**_answer_structure(shape, value), "Alarms": alarms(value)}


def _write_warm_pool(shape: StructureShape, value: WarmPool) -> dict[str, Any]:
    reuse = {"InstanceReusePolicy": {"ReuseOnScaleIn": True}} if value.reuse_on_scale_in else {}
    return {**_answer_structure(shape, value), **reuse}


_WRITERS: dict[type, Callable[[StructureShape, Any], dict[str, Any]]] = {
    MixedInstancesPolicy: _write_mixed,
    ScalingPolicy: _write_policy,
    TargetTracking: _write_tracking,
    WarmPool: _write_warm_pool,
}


MAX_ITEMS = 100
DEFAULT_ITEMS = 50


def page(
    items: Sequence[T], parameters: Parameters, key: Callable[[T], str], *, most: int = MAX_ITEMS
) -> tuple[Sequence[T], dict[str, Any]]:
    """Return the requested page of items, and the NextToken of the page if more items follow.

    The function `key` returns the identity of an item. A NextToken contains the key and the index of the last item of a
    page. The next page starts after the item with the key in the token. If the item no longer exists, the next page
    starts at the index in the token.
    """
    size = parameters.get("MaxRecords", min(DEFAULT_ITEMS, most))
    if not 1 <= size <= most:
        raise invalid(f"MaxRecords must be between 1 and {most}.")
    start = 0
    if token := parameters.get("NextToken"):
        try:
            last, number = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
            if not isinstance(last, str) or not isinstance(number, int) or number < 0:
                raise TypeError(token)
        except (ValueError, TypeError) as error:
            raise Fault("InvalidNextToken", f"The token '{token}' is invalid.") from error
        keys = [key(item) for item in items]
        start = keys.index(last) + 1 if last in keys else number
    found = items[start : start + size]
    if start + size >= len(items):
        return found, {}
    next_token = json.dumps([key(found[-1]), start + size - 1]).encode()
    return found, {"NextToken": base64.urlsafe_b64encode(next_token).decode()}
