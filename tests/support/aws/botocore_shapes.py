"""Sample values of the shapes in botocore's service models, and a check of answers against a model."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

from botocore.loaders import Loader
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

MAX_DEPTH = 14
_RICH = "aZ0 &<>\"'=+%;/?#é\u00a0\u4e2d\U0001f600\r\n\t._-"
_PLAIN = ("abcdefghij", "0123456789")
_PROTOCOL = re.compile(rb'"protocol"\s*:\s*"([^"]+)"')
_HEAD_BYTES = 4096
"""The first bytes of a model file, which contain the model's metadata."""


def service(name: str) -> ServiceModel:
    """Return the newest botocore model of the service."""
    return ServiceModel(Loader().load_service_model(name, "service-2"), name)


def query_services() -> list[str]:
    """Return the names of all services whose only protocol is the query protocol."""
    loader = Loader()
    names = loader.list_available_services("service-2")
    return [name for name in names if _protocol(loader, name) == "query"]


def _protocol(loader: Loader, name: str) -> str:
    """Return the protocol of a service from the first bytes of its model. Reading all of the hundreds of models takes
    seconds in each process of a test run."""
    version = loader.determine_latest_version(name, "service-2")
    for folder in loader.search_paths:
        path = Path(folder, name, version, "service-2.json.gz")
        if path.is_file():
            with gzip.open(path) as model:
                if found := _PROTOCOL.search(model.read(_HEAD_BYTES)):
                    return found[1].decode()
    return str(service(name).metadata["protocol"])


class Samples:
    """Random values that satisfy a service model, from one seed. `tick` is the precision of the times.

    An answer has the same text for an empty flattened list and for a missing list, so samples with `is_answer` do not
    contain empty flattened lists.
    """

    def __init__(self, seed: int, *, tick: timedelta, is_answer: bool = False) -> None:
        self._random = Random(seed)
        self._is_answer = is_answer
        self._tick = tick

    def of(self, shape: Shape, depth: int = 0) -> Any:
        """Return a value of the shape, or None if every valid value looks like a missing one."""
        if isinstance(shape, StructureShape):
            return self._structure(shape, depth)
        if isinstance(shape, ListShape):
            least = int(self._is_answer and bool(shape.serialization.get("flattened")))
            low, high = shape.metadata.get("min", least), shape.metadata.get("max", 3)
            number = self._random.randint(low, max(low, min(high, low + 3)))
            found = [self.of(shape.member, depth + 1) for _ in range(number)]
            told = [one for one in found if one is not None]
            return told if len(told) >= low else None
        if isinstance(shape, MapShape):
            pairs = [(self.of(shape.key, depth + 1), self.of(shape.value, depth + 1)) for _ in range(2)]
            return {key: value for key, value in pairs if value is not None} or None
        return self._scalar(shape)

    def _structure(self, shape: StructureShape, depth: int) -> dict[str, Any] | None:
        if depth > MAX_DEPTH:
            return None
        names = list(shape.members)
        if shape.is_tagged_union:
            names = self._random.sample(names, 1)
        found = {}
        for name in names:
            required = name in shape.required_members or shape.is_tagged_union
            if required or self._random.random() < 0.7:
                value = self.of(shape.members[name], depth + 1)
                if value is not None:
                    found[name] = value
                elif required:
                    return None
        return found or None

    def _scalar(self, shape: Shape) -> Any:
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        match shape.type_name:
            case "string":
                return self._string(shape)
            case "integer" | "long":
                low = 0 if low is None else low
                return self._random.randint(low, low + 99 if high is None else high)
            case "float" | "double":
                return self._random.uniform(low or 0, high or 1e9)
            case "boolean":
                return self._random.random() < 0.5
            case "timestamp":
                number = self._random.randint(0, timedelta(days=20_000) // self._tick)
                return datetime(1970, 1, 1, tzinfo=UTC) + number * self._tick
            case "blob":
                return self._random.randbytes(7)
        raise AssertionError(f"{shape} is of no type known here")

    def _string(self, shape: Shape) -> str:
        if enum := shape.metadata.get("enum"):
            return str(self._random.choice(enum))
        low = shape.metadata.get("min", 1)
        length = self._random.randint(low, max(low, min(shape.metadata.get("max", 12), low + 11)))
        for alphabet in (_RICH, *_PLAIN):
            text = "".join(self._random.choice(alphabet) for _ in range(length))
            if _fits(shape.metadata.get("pattern", ".*"), text):
                return text
        return "ami-" + text


def _fits(pattern: str, text: str) -> bool:
    try:
        return re.fullmatch(pattern, text, re.DOTALL) is not None
    except re.error:
        # The pattern is in Java's syntax. Auto Scaling's pattern in this syntax matches any text.
        return True


def answer_differences(operation: OperationModel, body: bytes) -> list[str]:
    """Return the differences between an answer in the query protocol and the operation's model: unknown, repeated, and
    missing members, and values of another type or outside of their constraints."""
    root = ElementTree.fromstring(body)
    shape, children = operation.output_shape, [_tag(child) for child in root]
    expected = [f"{operation.name}Result"] * (shape is not None) + ["ResponseMetadata"]
    if (_tag(root), children) != (f"{operation.name}Response", expected):
        return [f"{_tag(root)} has the elements {children}, not {expected}"]
    return [] if shape is None else list(_differences(shape, root[0], operation.name))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _differences(shape: Shape, element: ElementTree.Element, place: str) -> Iterator[str]:
    if isinstance(shape, StructureShape):
        members = {member.serialization.get("name", name): member for name, member in shape.members.items()}
        tags = Counter(map(_tag, element))
        required = {shape.members[name].serialization.get("name", name) for name in shape.required_members}
        yield from (f"{place} has no {name}" for name in sorted(required - tags.keys()))
        yield from (f"{place} has an unknown member {name}" for name in sorted(tags.keys() - members.keys()))
        yield from (f"{place} has {count} members {name}" for name, count in tags.items() if count > 1)
        for child in element:
            if member := members.get(_tag(child)):
                yield from _differences(member, child, f"{place}.{_tag(child)}")
    elif isinstance(shape, ListShape):
        for child in element:
            if _tag(child) != shape.member.serialization.get("name", "member"):
                yield f"{place} has an entry {_tag(child)}"
            yield from _differences(shape.member, child, place)
        yield from _out_of_range(shape, len(element), place)
    else:
        yield from _scalar_differences(shape, element, place)


_READERS: Mapping[str, Callable[[str], object]] = {
    "boolean": {"true": True, "false": False}.__getitem__,
    "double": float,
    "float": float,
    "integer": int,
    "long": int,
    "string": str,
    "timestamp": datetime.fromisoformat,
}


def _scalar_differences(shape: Shape, element: ElementTree.Element, place: str) -> Iterator[str]:
    text = element.text or ""
    try:
        value = _READERS[shape.type_name](text)
    except (KeyError, ValueError):
        yield f"{place} is {text!r}, not a {shape.type_name}"
        return
    if len(element):
        yield f"{place} has elements"
    enum = shape.metadata.get("enum")
    if enum and text not in enum:
        yield f"{place} is {text!r}, not one of {enum}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _out_of_range(shape, value, place)
    elif shape.type_name == "string":
        yield from _out_of_range(shape, len(text), place)
        if not _fits(shape.metadata.get("pattern", ".*"), text):
            yield f"{place} is {text!r}, which does not match {shape.metadata['pattern']}"


def _out_of_range(shape: Shape, number: float, place: str) -> Iterator[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if (low is not None and number < low) or (high is not None and number > high):
        yield f"{place} is outside of {low} to {high}: {number}"
