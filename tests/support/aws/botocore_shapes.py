"""Sample values of the shapes in botocore's service models."""

from __future__ import annotations

import gzip
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from botocore.loaders import Loader
from botocore.model import ListShape, MapShape, ServiceModel, Shape, StructureShape

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
