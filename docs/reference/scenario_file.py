"""Reference page of the scenario file, made from its JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchlab.core import text
from batchlab.scenarios.model.schema import json_schema
from docs.reference import job_file

_SECTIONS = {
    "JobSpec": "`jobs`: each one",
    "StageSpec": "`stages` of a job: each one",
    "DrawTimes": "Distributions",
    "ArrivalSpec": "`arrivals`: each one",
    "TraceSpec": "`trace`",
    "ColumnsSpec": "`columns` of a trace",
    "PoolSpec": "`pools`: each one",
    "PolicySpec": "`policy`",
    "SharesSpec": "`shares`",
    "PrewarmSpec": "`prewarm`: each one",
    "FaultSpec": "`faults`: each one",
    "ExpectSpec": "`expect`",
    "BoundTimes": "A bound",
}
"""Titles of the schema's parts, in the order of the page."""

_NESTED = {
    *("GroupsSpec", "JobExpectSpec", "ShareEntrySpec", "PartTimes", "MomentSpec", "StepAt", "TakeSpec"),
    *("UniformTimes", "ExponentialTimes", "LognormalTimes", "ParetoTimes", "WeibullTimes"),
    *("PoissonSpec", "OnOffSpec", "ProfileSpec", "MonthEndSpec", "StepSpec", "RampSpec"),
}
"""Parts whose keys are rows in the table of the part that contains them."""

_SPAN = ("from", "until")
_ABOUT_SPAN = (
    "Every source except `at` and `trace` also has the keys `from` (default `0s`), the time from which jobs may\n"
    "arrive, and `until` (required), the time from which no more jobs arrive."
)
"""Keys of every random source of arrivals, which the page describes once."""

_HEAD = f"""\
<!-- Made from batchlab/scenarios/model/schema.py.
     To make it again: python -m docs.reference docs -->

# The scenario file

A scenario file is one YAML mapping: who submits which jobs at which times, the fleet that runs the
jobs, the faults that occur, and the expected results. [Scenarios](scenarios.md) is the guide, and
this page describes every key. In the tables, `poisson.per_hour` is the key `per_hour` in the mapping
`poisson`.

- A duration is {text.DURATION_FORMS}. All times are durations after the start of the scenario.
- A size is {text.SIZE_FORMS}.
- Money is in US dollars: `12 USD`.
- A distribution of numbers has the same keys as a distribution of durations.
- `retry` has the same keys as in a [job file](job-file.md).
- A scenario file is YAML 1.2, like a job file: a mapping may not repeat a key, and anchors and `<<`
  work.
"""


def parts() -> set[str]:
    """The schema's parts that the page shows."""
    return set(_SECTIONS) | _NESTED


def reference() -> str:
    """The reference page in Markdown."""
    schema = json_schema()
    parts = schema["$defs"]
    pages = [_HEAD, job_file.section("The scenario", schema)]
    for name, title in _SECTIONS.items():
        pages.append(job_file.section(title, _flat(parts[name], parts) | {"description": _description(name, parts)}))
    return "\n".join(pages)


def _description(name: str, parts: Mapping[str, Any]) -> str:
    """Return the description of a part, with a sentence on the keys that the table does not repeat."""
    about = str(parts[name]["description"])
    if name == "ArrivalSpec":
        return f"{about}\n{_ABOUT_SPAN}"
    if name == "ExpectSpec":
        *most, last = (f"`{key}`" for key in parts["JobExpectSpec"]["properties"])
        return f"{about}\n`jobs` has {', '.join(most)}, and {last} for one template."
    return about


def _flat(part: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a part, each followed by the keys of the nested parts that its value contains.

    A key that a nested part shares with the part is not repeated.
    """
    keys: dict[str, Any] = {}
    required: list[str] = []
    for key, field in part["properties"].items():
        keys[key] = field
        required += [key] if key in part.get("required", ()) else []
        for name in dict.fromkeys(_references(field)):
            if name not in _NESTED:
                continue
            inner = _flat(parts[name], parts)
            for own, one in inner["properties"].items():
                if own not in _SPAN and one != keys.get(own):
                    keys[f"{key}.{own}"] = one
                    required += [f"{key}.{own}"] if own in inner["required"] else []
    return {"properties": keys, "required": required}


def _references(field: object) -> Iterator[str]:
    """Yield the names of the schema's parts that a field refers to."""
    if isinstance(field, Mapping):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for value in field.values():
            yield from _references(value)
    elif isinstance(field, list):
        for value in field:
            yield from _references(value)
