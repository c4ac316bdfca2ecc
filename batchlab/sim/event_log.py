"""Event log of the effects of port calls, sorted by time, and a lenient reader of bundles in messages.

Invariant: a line of the log depends only on the values in the line, never on addresses, hash seeds, or folder names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from batchlab.core.model import Bundle
from batchlab.core.protocol import json_format, object_keys

MAX_VALUE_LENGTH = 72
"""Maximum length in characters of a value in the log.

The log has only the start and the hash of a longer value.
"""


class EventLog:
    """Log of lines, each with a virtual time in seconds. `time` returns the current virtual time."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.lines: list[str] = []

    def add(self, actor: str, event: str) -> None:
        self.lines.append(f"{self._time():.6f} {actor} {event}")

    def text(self) -> str:
        """Return all lines of the log, each ended by a newline."""
        return "".join(f"{line}\n" for line in self.lines)

    def digest(self) -> str:
        """Return the SHA-256 of the log's text, in hexadecimal."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def brief(value: object) -> str:
    """Return `value` as one short line of text that is the same in every process."""
    text = canonical(value)
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    return f"{text[: MAX_VALUE_LENGTH - 12]}…#{_hash(text.encode())}"


def canonical(value: Any) -> str:
    """Return the repr of a value with sorted sets, hashed large bytes, and only the last part of paths.

    Python's `repr` shows addresses, and its order of sets depends on the hash seed.
    """
    if value is None or isinstance(value, str | int | float):
        # A str or int enum is shown by its value, so that a renamed member does not change the log.
        return repr(value.value if isinstance(value, Enum) else value)
    if isinstance(value, bytes):
        return repr(value) if len(value) <= MAX_VALUE_LENGTH else f"{len(value)} bytes#{_hash(value)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{canonical(k)}: {canonical(v)}' for k, v in value.items())}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(canonical, value)))}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(canonical, value))}]"
    return _canonical_object(value)


def _canonical_object(value: Any) -> str:
    if isinstance(value, PurePath):
        return repr(value.name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Fields with default values are omitted to keep the lines short.
        fields = [
            f"{f.name}={canonical(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.repr and getattr(value, f.name) != f.default
        ]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, BaseException):
        return f"{type(value).__name__}({str(value)!r})"
    return f"<{type(value).__name__}>"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()


Name = tuple[str, str, str]
"""Name of a bundle: job, stage, and bundle id."""


def name_of_bundle(bundle: Bundle) -> Name:
    return bundle.job, bundle.stage, bundle.id


def doc_of(body: str) -> dict[str, Any]:
    """Return the JSON object of a message, or an empty dict if the message is not a JSON object."""
    try:
        doc = json.loads(body)
    except (ValueError, RecursionError):
        return {}  # Lying workers send malformed messages on purpose.
    return doc if isinstance(doc, dict) else {}


def bundle_in(doc: Mapping[str, Any]) -> Bundle | None:
    """Return the bundle in a task message, or None if the bundle is missing or malformed."""
    try:
        return json_format.bundle_from_json(doc["b"])
    except Exception:  # noqa: BLE001 - a malformed message may cause any error
        return None


@lru_cache(maxsize=4096)
def name_in(body: str) -> Name | None:
    bundle = bundle_in(doc_of(body))
    return None if bundle is None else name_of_bundle(bundle)


def reported_in(doc: Mapping[str, Any]) -> list[Name]:
    """Return the bundles whose outcomes an event reports."""
    try:
        bundles = [json_format.bundle_from_json(completion["b"]) for completion in doc.get("c", ())]
        bundles += [json_format.bundle_from_json(outcome["bundle"]) for outcome in doc.get("o", ())]
        keys = map(object_keys.outcome_key, doc.get("k", ()))
        return [*map(name_of_bundle, bundles), *((key.job, key.stage, key.bundle) for key in keys if key)]
    except Exception:  # noqa: BLE001 - a malformed message may cause any error
        return []
