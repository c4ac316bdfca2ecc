"""What the model demands of parameters (required, lengths, ranges, patterns, enums), checked with
AWS's own wording of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

from batchlab.asg.fault import invalid

_PAIR = re.compile(r"\\u(D[89AB][0-9A-F]{2})\\u(D[C-F][0-9A-F]{2})", re.IGNORECASE)


def check(operation: OperationModel, asked: Mapping[str, Any]) -> None:
    """Fault that names every constraint that `asked` does not satisfy."""
    shape = operation.input_shape
    if not isinstance(shape, StructureShape):
        return
    if wrong := list(_structure(shape, asked, "")):
        number = f"{len(wrong)} validation error{'s' if len(wrong) > 1 else ''} detected: "
        raise invalid(number + "; ".join(wrong))


def _structure(shape: StructureShape, asked: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, member in shape.members.items():
        # AWS writes paths as its Java classes name their fields.
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
    told = "null" if value is None else f"'{_told(value)}'"
    return f"Value {told} at '{place}' failed to satisfy constraint: {constraint}"


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
    """The model's patterns are Java's, which writes what is beyond U+FFFF as two halves."""
    return re.compile(_PAIR.sub(_joined, pattern))


def _joined(pair: re.Match[str]) -> str:
    high, low = int(pair[1], 16), int(pair[2], 16)
    return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08X}"
