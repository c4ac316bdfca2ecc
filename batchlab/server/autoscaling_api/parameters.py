"""Parameters of requests and answers.

`check` tests the model's constraints (required, lengths, ranges, patterns, enums) and reports
violations in AWS's words. `parse_into` and `to_answer` convert between AWS's parameters and the engine's
dataclasses, field by field. A field has AWS's name in snake case, as botocore writes it. Only types
that differ in structure from AWS have a conversion of their own. `page` splits long answers by
MaxRecords and NextToken.
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

from batchlab.fleet.api_types import MixedInstancesPolicy, TargetTracking, WarmPool
from batchlab.server.autoscaling_api.app import Fault, invalid

_PAIR = re.compile(r"\\u(D[89AB][0-9A-F]{2})\\u(D[C-F][0-9A-F]{2})", re.IGNORECASE)


def check(operation: OperationModel, asked: Mapping[str, Any]) -> None:
    """Raise a Fault that lists every constraint that `asked` violates."""
    shape = operation.input_shape
    if not isinstance(shape, StructureShape):
        return
    if wrong := list(_structure(shape, asked, "")):
        number = f"{len(wrong)} validation error{'s' if len(wrong) > 1 else ''} detected: "
        raise invalid(number + "; ".join(wrong))


def _structure(shape: StructureShape, asked: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, member in shape.members.items():
        # AWS writes these paths with the field names of its Java classes.
        place = f"{path}{name[0].lower()}{name[1:]}"
        if name in asked:
            yield from _value(member, asked[name], place)
        elif name in shape.required_members:
            yield _wrong(None, place, "Member must not be null")


def _value(shape: Shape, value: Any, place: str) -> Iterator[str]:
    if isinstance(shape, StructureShape):
        yield from _structure(shape, value, f"{place}.")
    elif isinstance(shape, ListShape):
        yield from _size(shape, value, place)
        for number, one in enumerate(value, 1):
            yield from _value(shape.member, one, f"{place}.{number}.member")
    elif isinstance(shape, MapShape):
        yield from _size(shape, value, place)
        for key, one in value.items():
            yield from _value(shape.key, key, f"{place}.{key}.key")
            yield from _value(shape.value, one, f"{place}.{key}.value")
    elif shape.type_name == "string":
        yield from _string(shape, value, place)
    elif shape.type_name in ("integer", "long", "float", "double"):
        yield from _range(shape, value, place, value, "value")


def _string(shape: Shape, value: str, place: str) -> Iterator[str]:
    yield from _size(shape, value, place)
    pattern = shape.metadata.get("pattern")
    if pattern and not _compiled(pattern).fullmatch(value):
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
    text = "null" if value is None else f"'{_told(value)}'"
    return f"Value {text} at '{place}' failed to satisfy constraint: {constraint}"


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_told, value))}]"
    return str(value)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern. The model has Java patterns, which write characters above U+FFFF
    as surrogate pairs."""
    return re.compile(_PAIR.sub(_joined, pattern))


def _joined(pair: re.Match[str]) -> str:
    high, low = int(pair[1], 16), int(pair[2], 16)
    return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08X}"


T = TypeVar("T")
Parameters = Mapping[str, Any]


# --- From AWS's parameters to dataclasses ---------------------------------------------------------


def parse_into(kind: type[T], asked: Parameters, **more: Any) -> T:
    """Create the dataclass from `more` and from the parameters that are its fields. Raise Fault if
    the engine needs a parameter that is optional in AWS's model and was not given."""
    found = {**fields(kind, asked), **more}
    whole: Any = kind
    for name in _needed(whole):
        if name not in found:
            raise invalid(f"Parameter {name} of {kind.__name__} must be specified.")
    return kind(**found)


def fields(kind: type, asked: Parameters) -> dict[str, Any]:
    """Return the parameters that are fields of the dataclass, by field name."""
    hints = _hints(kind)
    named = {xform_name(name): value for name, value in asked.items()}
    return {name: _field(hints[name], value) for name, value in named.items() if name in hints}


def other_parameters(kind: type, asked: Parameters) -> dict[str, Any]:
    """Return the parameters that are not fields of the dataclass."""
    return {name: value for name, value in asked.items() if xform_name(name) not in _hints(kind)}


@cache
def _needed(kind: Any) -> list[str]:
    """Return the fields without a default."""
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
        return tuple(_field(inner, one) for one in value)
    if isinstance(value, dict):
        kind: Any = next(one for one in (hint, *get_args(hint)) if is_dataclass(one))
        return parse_into(kind, _GIVEN.get(kind, dict)(value))
    if isinstance(value, str) and int in (hint, *get_args(hint)):
        # Weights are strings in requests.
        return int(value)
    return value


def _mixed_given(asked: Parameters) -> Parameters:
    template = asked.get("LaunchTemplate", {})
    return {
        "LaunchTemplate": template.get("LaunchTemplateSpecification", {}),
        "Overrides": template.get("Overrides", []),
        "InstancesDistribution": asked.get("InstancesDistribution", {}),
    }


def _tracking_given(asked: Parameters) -> Parameters:
    found = dict(asked)
    if predefined := found.pop("PredefinedMetricSpecification", None):
        found["PredefinedMetricType"] = predefined["PredefinedMetricType"]
    if customized := found.pop("CustomizedMetricSpecification", None):
        found["CustomizedMetricSpecification"] = json.dumps(customized)
    return found


_GIVEN: dict[Any, Callable[[Parameters], Parameters]] = {
    MixedInstancesPolicy: _mixed_given,
    TargetTracking: _tracking_given,
}


# --- From dataclasses to answers ------------------------------------------------------------------


def to_answer(shape: Shape, value: Any) -> Any:
    """Convert the value into an answer of the shape. None and "" are left out unless the shape
    requires them. Members without a field in the value are left out."""
    if isinstance(shape, StructureShape):
        special = _TOLD.get(type(value))
        return special(shape, value) if special else _answer_structure(shape, value)
    if isinstance(shape, ListShape):
        return [to_answer(shape.member, one) for one in value]
    if shape.type_name == "timestamp":
        return datetime.fromtimestamp(value, UTC)
    return str(value) if shape.type_name == "string" else value


def _answer_structure(shape: StructureShape, value: Any) -> dict[str, Any]:
    found = {}
    for name, member in shape.members.items():
        one = getattr(value, xform_name(name), None)
        if one is not None and (one != "" or name in shape.required_members):
            found[name] = to_answer(member, one)
    return found


def _mixed_told(shape: StructureShape, value: MixedInstancesPolicy) -> dict[str, Any]:
    template: Any = shape.members["LaunchTemplate"]
    names = template.members
    return {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": to_answer(names["LaunchTemplateSpecification"], value.launch_template),
            "Overrides": to_answer(names["Overrides"], value.overrides),
        },
        "InstancesDistribution": to_answer(shape.members["InstancesDistribution"], value.instances_distribution),
    }


def _tracking_told(_: StructureShape, value: TargetTracking) -> dict[str, Any]:
    found: dict[str, Any] = {"TargetValue": value.target_value, "DisableScaleIn": value.disable_scale_in}
    if value.predefined_metric_type:
        metric = {"PredefinedMetricType": value.predefined_metric_type}
        found["PredefinedMetricSpecification"] = metric
    if value.customized_metric_specification:
        found["CustomizedMetricSpecification"] = json.loads(value.customized_metric_specification)
    return found


def _warm_told(shape: StructureShape, value: WarmPool) -> dict[str, Any]:
    reuse = {"ReuseOnScaleIn": value.reuse_on_scale_in}
    return {**_answer_structure(shape, value), "InstanceReusePolicy": reuse}


_TOLD: dict[type, Callable[[StructureShape, Any], dict[str, Any]]] = {
    MixedInstancesPolicy: _mixed_told,
    TargetTracking: _tracking_told,
    WarmPool: _warm_told,
}


MAX_ITEMS = 100
DEFAULT_ITEMS = 50


def page(
    items: Sequence[T], asked: Mapping[str, Any], key: Callable[[T], str], *, most: int = MAX_ITEMS
) -> tuple[Sequence[T], dict[str, Any]]:
    """Return the requested page, and its NextToken if more items follow.

    `key` identifies an item. A token contains the key and the number of the last item. The next
    page starts after that item, or at its number if the item no longer exists.
    """
    size = asked.get("MaxRecords", min(DEFAULT_ITEMS, most))
    if not 1 <= size <= most:
        raise invalid(f"MaxRecords must be between 1 and {most}.")
    start = 0
    if token := asked.get("NextToken"):
        last, number = _read(token)
        keys = [key(item) for item in items]
        start = keys.index(last) + 1 if last in keys else number
    found = items[start : start + size]
    if start + size >= len(items):
        return found, {}
    return found, {"NextToken": _token(key(found[-1]), start + size - 1)}


def _token(last: str, number: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([last, number]).encode()).decode()


def _read(token: str) -> tuple[str, int]:
    try:
        last, number = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if not isinstance(last, str) or not isinstance(number, int) or number < 0:
            raise TypeError(token)
    except (ValueError, TypeError) as error:
        raise Fault("InvalidNextToken", f"The token '{token}' is invalid.") from error
    return last, number
