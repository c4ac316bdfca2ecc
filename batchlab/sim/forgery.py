"""The material of lies: odd values, unreadable objects, and raw JSON of messages.

Invariant: nothing here uses the product's readers or writers, so none of their checks applies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Doc = dict[str, Any]

ODD: tuple[Any, ...] = (
    *(None, True, -1, 10**9, 10**30, 1e300, -1e300, 1e18, "", "7", "\ud800", "a/b", "../..", "."),
    *([], {}, [[]], [[0, 10**12]], [[5, 1]], "x" * 5_000, "pickle:../../x", "\u0000"),
)
"""Values for which a reader must have a bound or a rule."""
UNREADABLE: tuple[str | bytes, ...] = (
    *('{"v":1}', "", "{", "[" * 5_000, '{"v":9}', "null", b"\xff\xfe"),
)
NUMBERS: tuple[Any, ...] = (10**9, 10**30, 1, 0, -1, 1e300, "7")


_OUTCOME = re.compile(r"jobs/([^/]+)/([^/]+)/outcomes/../(\d+)-(\d+)\.(\d+)\.(\d+)\..*")


def loaded(body: str) -> Doc:
    try:
        doc = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return doc if isinstance(doc, dict) else {}


def dicts(doc: Any) -> Iterator[Doc]:
    """Every object in a JSON document, outermost first."""
    if isinstance(doc, dict):
        yield doc
        for value in list(doc.values()):
            yield from dicts(value)
    elif isinstance(doc, list):
        for value in doc:
            yield from dicts(value)


def bundle_id(bundle: Doc) -> str:
    try:
        first, last = bundle["t"][0][0], bundle["t"][-1][1] - 1
        return f"{first:08d}-{last:08d}.{bundle.get('r', 0)}.{bundle['a']}"
    except (IndexError, TypeError, ValueError, KeyError):
        return "00000000-00000000.0.1"


def tasks_in(bundle: Doc) -> int:
    try:
        return min(1_000, int(sum(stop - start for start, stop in bundle["t"])))
    except (TypeError, ValueError, OverflowError):
        return 1


def some_tasks(bundle: Doc) -> list[int]:
    try:
        return list(range(bundle["t"][0][0], min(bundle["t"][0][1], bundle["t"][0][0] + 3)))
    except (IndexError, TypeError, ValueError):
        return [0]


def guesses(keys: list[str]) -> list[Doc]:
    """Bundles that may exist beside those with these outcomes: the next tasks, the next attempt,
    and the same tasks in the next stage."""
    found: list[Doc] = []
    for key in keys:
        parts = _OUTCOME.fullmatch(key)
        if parts is None:
            continue
        job, stage = parts[1], parts[2]
        first, last, round_, attempt = map(int, parts.groups()[2:])
        same: Doc = {"j": job, "s": stage, "t": [[first, last + 1]], "r": round_, "a": attempt}
        length = last + 1 - first
        found += [
            {**same, "t": [[last + 1, last + 1 + length]]},
            {**same, "a": attempt + 1},
            {**same, "s": chr(ord(stage[0]) + 1)},
        ]
    return found
