"""The bundles that a message speaks of, read as loosely as the watch can.

Invariant: a message that cannot be read speaks of no bundle, and raises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from batchlab.model import Bundle
from batchlab.protocol import naming, wire

Name = tuple[str, str, str]
"""(job, stage, bundle id)."""


def name_of_bundle(bundle: Bundle) -> Name:
    return bundle.job, bundle.stage, bundle.id


def doc_of(body: str) -> Mapping[str, Any]:
    """The JSON of a message; empty where it is none."""
    try:
        doc = json.loads(body)
    except (ValueError, RecursionError):
        return {}  # scenes send malformed ones on purpose
    return doc if isinstance(doc, dict) else {}


def bundle_in(doc: Mapping[str, Any]) -> Bundle | None:
    """The bundle that a task message carries; None where it is none of ours."""
    try:
        return wire.bundle_from_json(doc["b"])
    except Exception:  # noqa: BLE001 - as above
        return None


@lru_cache(maxsize=4096)
def name_in(body: str) -> Name | None:
    """The name of that bundle."""
    bundle = bundle_in(doc_of(body))
    return None if bundle is None else name_of_bundle(bundle)


def told_in(doc: Mapping[str, Any]) -> list[Name]:
    """The bundles of whose outcomes an event tells."""
    try:
        told = [wire.bundle_from_json(one["b"]) for one in doc.get("c", ())]
        told += [wire.bundle_from_json(one["bundle"]) for one in doc.get("o", ())]
        keys = map(naming.outcome_key, doc.get("k", ()))
        return [
            *map(name_of_bundle, told),
            *((key.job, key.stage, key.bundle) for key in keys if key),
        ]
    except Exception:  # noqa: BLE001 - as above
        return []
