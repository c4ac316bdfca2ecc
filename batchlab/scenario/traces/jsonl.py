"""JSON Lines: one object a line, such as the jobs of a record; and a whole record as it is written.

Of a whole record the jobs are read, and an odd one's line is its number among them. Their times are
those of the run; where that was compressed, they are stretched again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

from batchlab.errors import UsageError
from batchlab.scenario import record
from batchlab.scenario.model import Odd
from batchlab.scenario.traces.columns import RUNS, Columns
from batchlab.scenario.traces.lines import lines, unpacked
from batchlab.scenario.traces.rows import (
    LEFT_OUT,
    Fields,
    Mapper,
    Reading,
    shown_names,
    without_blanks,
)
from batchlab.spec.units import shown

_OF_A_RECORD = frozenset({"scenario", "jobs", "version"})


def read(path: Path, columns: Columns = RUNS) -> Reading:
    """UsageError where the file cannot be read, or no record has one of the columns."""
    odd: list[Odd] = []
    mapper = Mapper(path, columns, odd)
    numbered = iter(without_blanks(lines(path, odd), path, odd))
    first = list(islice(numbered, 1))
    if first and _is_a_record(first[0][1], path):
        return mapper.reading(_jobs(record.parse(unpacked(path), path), columns, mapper))
    return mapper.reading(_objects(chain(first, numbered), path, columns, mapper))


def _is_a_record(line: str, path: Path) -> bool:
    """By the first line: a record is written over many, and may have been put into one."""
    if line.strip() == "{":
        return isinstance(_parsed(unpacked(path)), dict)
    found = _parsed(line)
    return isinstance(found, dict) and found.keys() >= _OF_A_RECORD


def _jobs(run: record.Record, columns: Columns, mapper: Mapper) -> Iterator[Fields]:
    names = [field.name for field in fields(record.JobRun)]
    for number, job in enumerate(run.jobs, 1):
        found = {name: getattr(job, name) for name in names}
        for name, value in found.items():
            if name.endswith("_s") and value is not None:
                found[name] = value * run.compressed
        yield Fields(number, _values(found, number, columns, mapper))


def _objects(
    numbered: Iterator[tuple[int, str]], path: Path, columns: Columns, mapper: Mapper
) -> Iterator[Fields | None]:
    # Of the columns of a record only the time has to be there.
    missing = set(columns.used()) - set(RUNS.used())
    keys: list[str] = []
    for number, line in numbered:
        found = _parsed(line)
        if not isinstance(found, dict):
            mapper.note(number, "no JSON object", LEFT_OUT, shown(line))
            yield None
            continue
        values = _values(found, number, columns, mapper)
        keys = keys or list(found)
        missing -= values.keys()
        yield Fields(number, values)
    if missing and keys:
        raise UsageError(
            f"No record of the trace {path} has {min(missing)!r}.",
            remedy=f"The first one has: {shown_names(keys)}.",
        )


def _parsed(text: str | bytes) -> Any:
    """The value of a text; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(
    found: Mapping[str, Any], number: int, columns: Columns, mapper: Mapper
) -> dict[str, object]:
    values: dict[str, object] = {}
    for name in columns.used():
        value = _value(found, name)
        if value is not None:
            values[name] = value
    if columns.tasks == RUNS.tasks and "tasks" not in values and "planned" in found:
        values["tasks"] = found["planned"]
        mapper.note(number, "no count of its first stage's tasks", "that of all stages was taken")
    return values


def _value(found: Mapping[str, Any], name: str) -> object:
    if name in found:
        return found[name]
    inner: Any = found
    for part in name.split("."):
        if not isinstance(inner, dict):
            return None
        inner = inner.get(part)
    return inner
