"""Tables of text: comma, tab, semicolon or anything else between fields, with or without a header.

Every line is one record: a quoted field does not go over the end of its line. So a quote that is
never closed spoils one record, and not all that follow.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from batchlab.errors import UsageError
from batchlab.scenario.model import Odd
from batchlab.scenario.traces.columns import Columns
from batchlab.scenario.traces.lines import lines
from batchlab.scenario.traces.rows import LEFT_OUT, Fields, Mapper, Reading, check, without_blanks

_DELIMITERS = "\t;|,"


def read(
    path: Path, columns: Columns, *, names: tuple[str, ...] = (), delimiter: str = ""
) -> Reading:
    """`names` are those of the columns of a table without a header. Without a `delimiter` it is
    the tab, semicolon, bar or comma that the first line has most of.

    UsageError where the file cannot be read or lacks a column.
    """
    odd: list[Odd] = []
    mapper = Mapper(path, columns, odd)
    return mapper.reading(_records(path, columns, names, delimiter, mapper, odd))


def _records(
    path: Path,
    columns: Columns,
    names: tuple[str, ...],
    delimiter: str,
    mapper: Mapper,
    odd: list[Odd],
) -> Iterator[Fields | None]:
    numbered = iter(without_blanks(lines(path, odd), path, odd))
    header = tuple(names)
    if header:
        check(columns.used(), header, path)
    for number, line in numbered:
        delimiter = delimiter or _delimiter(line)
        parts = _parts(line, delimiter)
        if not header:
            header = tuple(part.strip() for part in parts or ())
            check(columns.used(), header, path)
            continue
        if parts is None:
            mapper.note(number, "a quote that is not closed", LEFT_OUT)
            yield None
            continue
        if len(parts) > len(header):
            done = f"the first {len(header)} were read"
            mapper.note(number, "more fields than columns", done, str(len(parts)))
        elif len(parts) < len(header):
            done = "those that are there were read"
            mapper.note(number, "fewer fields than columns", done, str(len(parts)))
        yield Fields(number, dict(zip(header, map(str.strip, parts), strict=False)))
    if not header:
        raise UsageError(f"The trace {path} is empty.", remedy="Name a file with records.")


def _delimiter(line: str) -> str:
    found = max(_DELIMITERS, key=line.count)
    return found if found in line else ","


def _parts(line: str, delimiter: str) -> list[str] | None:
    """The fields of one line; None where they cannot be told."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
