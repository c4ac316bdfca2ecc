"""JSON Lines: one object a line, such as the jobs of a record; and a whole record as it is written.

Of a whole record the jobs are read, and an odd one's line is its number among them. Their times are
those of the run; where that was compressed, they are stretched again.

The Standard Workload Format of the Parallel Workloads Archive (version 2.2, swf.html there).

Lines that begin with ';' are the header and comments; every other line is one job of 18 fields,
with -1 where a value is unknown. Times are seconds and may be fractions; a run time of 0 is legal.

Tables of text: comma, tab, semicolon or anything else between fields, with or without a header.

Every line is one record: a quoted field does not go over the end of its line. So a quote that is
never closed spoils one record, and not all that follow.

The lines of a trace, plain or gzip, whatever its name says.

Invariant: a file that breaks off or is no UTF-8 is read as far as it goes, and said to be odd.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from batchlab.core.errors import UsageError
from batchlab.core.units import shown
from batchlab.scenarios import record
from batchlab.scenarios.model.values import Anomaly
from batchlab.scenarios.traces.columns import (
    RECORD_COLUMNS,
    SWF_COLUMNS,
    Columns,
    all_numbers,
    parse_number,
)
from batchlab.scenarios.traces.rows import (
    LEFT_OUT,
    RawRecord,
    RowMapper,
    TraceContent,
    check_columns,
    list_names,
    skip_blank_lines,
)

_CHUNK = 1 << 18
_FEW = 64
"""Bytes by which text that is no UTF-8 is told."""
_GZIP = b"\x1f\x8b"
_DAMAGED = "the file is damaged from here"
_CHECKS = ("incorrect data check", "incorrect length check")
"""What zlib says where all was unpacked and the sums at the end are others."""


class _ReadProblem(NamedTuple):
    """Why a file is not read further. `whole`: what came before it is as it was written."""

    what: str
    done: str = LEFT_OUT
    detail: str = ""
    whole: bool = True


class _UnreadableError(Exception):
    """All that can be read of a file has been."""

    def __init__(self, trouble: _ReadProblem) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


def read_lines(path: Path, odd: list[Anomaly]) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of every line; what is odd is added to `odd`.

    UsageError where the file cannot be read.
    """
    number = 0
    rest = end = b""
    try:
        for chunk in _chunks(path):
            end = end or _line_end(chunk, path)
            *whole, rest = (rest + chunk).split(end)
            for line in whole:
                number += 1
                yield number, _decode(line, number, path, odd)
    except _UnreadableError as error:
        trouble = error.trouble
        # What was cut may still look like a number.
        rest = rest if trouble.whole else b""
        at = number + 1 + bool(rest)
        odd.append(Anomaly(str(path), at, trouble.what, trouble.done, trouble.detail))
    if rest:
        yield number + 1, _decode(rest, number + 1, path, odd)


def _line_end(chunk: bytes, path: Path) -> bytes:
    """By the file's first piece; UsageError where it is text that is no UTF-8 all through."""
    wide = len(chunk) >= _FEW and not (any(chunk[:_FEW:2]) and any(chunk[1:_FEW:2]))
    if wide or chunk.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise UsageError(
            f"The trace {path} is UTF-16, and only UTF-8 is read.",
            remedy="Convert it, for example with `iconv -f UTF-16 -t UTF-8`.",
        )
    return b"\r" if b"\r" in chunk and b"\n" not in chunk else b"\n"


def read_unpacked(path: Path) -> bytes:
    """The whole file, as far as it goes; UsageError where it cannot be read."""
    found = bytearray()
    try:
        for chunk in _chunks(path):
            found += chunk
    except _UnreadableError:
        return bytes(found)
    return bytes(found)


def _decode(line: bytes, number: int, path: Path, odd: list[Anomaly]) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        odd.append(Anomaly(str(path), number, "not UTF-8", "its other characters were read"))
        return line.decode(errors="replace").rstrip("\r")


def _chunks(path: Path) -> Iterator[bytes]:
    """The file piece by piece, unpacked; _UnreadableError where no more of it can be read."""
    try:
        with path.open("rb") as file:
            chunk = file.read(_CHUNK)
            if chunk.startswith(_GZIP):
                yield from _gzip_members(file, chunk)
                return
            while chunk:
                yield chunk
                chunk = file.read(_CHUNK)
    except OSError as error:
        raise UsageError(
            f"The trace {path} cannot be read: {error.strerror or error}.",
            remedy="Name a file that is there; a scenario's paths are relative to its own folder.",
        ) from error


def _gzip_members(file: BinaryIO, data: bytes) -> Iterator[bytes]:
    """A gzip file may have several members, one after the other, and zeros behind each."""
    while data.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=31)
        while data and not unpacker.eof:
            yield from _decompress(unpacker, data)
            data = unpacker.unused_data or file.read(_CHUNK)
        if not unpacker.eof:
            yield unpacker.flush()
            raise _UnreadableError(_ReadProblem(_DAMAGED, detail="it breaks off", whole=False))
        while data and not (data := data.lstrip(b"\0")):
            data = file.read(_CHUNK)
        if len(data) == 1:
            data += file.read(1)
    if data:
        raise _UnreadableError(_ReadProblem("bytes that are no gzip follow its end"))


def _decompress(unpacker: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """What `data` unpacks to, never much at once."""
    while data:
        before = unpacker.copy()
        try:
            piece = unpacker.decompress(data, _CHUNK)
        except zlib.error as error:
            yield from _decompress_until_damage(before, data)
            raise _UnreadableError(_problem_of(error)) from error
        yield piece
        data = unpacker.unconsumed_tail


def _decompress_until_damage(unpacker: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """Byte by byte: zlib keeps back all that it has unpacked in a call that fails."""
    for at in range(len(data)):
        try:
            piece = unpacker.decompress(data[at : at + 1])
        except zlib.error:
            return
        yield piece


def _problem_of(error: zlib.error) -> _ReadProblem:
    if any(check in str(error) for check in _CHECKS):
        return _ReadProblem(
            "the file's checksum is wrong here", "what is before was read, and may be spoilt"
        )
    return _ReadProblem(_DAMAGED, detail=str(error), whole=False)


_OF_A_RECORD = frozenset({"scenario", "jobs", "version"})


def read_jsonl(path: Path, columns: Columns = RECORD_COLUMNS) -> TraceContent:
    """UsageError where the file cannot be read, or no record has one of the columns."""
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd)
    numbered = iter(skip_blank_lines(read_lines(path, odd), path, odd))
    first = list(islice(numbered, 1))
    if first and _is_a_record(first[0][1], path):
        return mapper.reading(
            _record_jobs(record.parse(read_unpacked(path), path), columns, mapper)
        )
    return mapper.reading(_json_lines(chain(first, numbered), path, columns, mapper))


def _is_a_record(line: str, path: Path) -> bool:
    """By the first line: a record is written over many, and may have been put into one."""
    if line.strip() == "{":
        return isinstance(_parse_json(read_unpacked(path)), dict)
    found = _parse_json(line)
    return isinstance(found, dict) and found.keys() >= _OF_A_RECORD


def _record_jobs(run: record.Record, columns: Columns, mapper: RowMapper) -> Iterator[RawRecord]:
    names = [field.name for field in fields(record.JobRun)]
    for number, job in enumerate(run.jobs, 1):
        found = {name: getattr(job, name) for name in names}
        for name, value in found.items():
            if name.endswith("_s") and value is not None:
                found[name] = value * run.compressed
        yield RawRecord(number, _selected_values(found, number, columns, mapper))


def _json_lines(
    numbered: Iterator[tuple[int, str]], path: Path, columns: Columns, mapper: RowMapper
) -> Iterator[RawRecord | None]:
    # Of the columns of a record only the time has to be there.
    missing = set(columns.used()) - set(RECORD_COLUMNS.used())
    keys: list[str] = []
    for number, line in numbered:
        found = _parse_json(line)
        if not isinstance(found, dict):
            mapper.note(number, "no JSON object", LEFT_OUT, shown(line))
            yield None
            continue
        values = _selected_values(found, number, columns, mapper)
        keys = keys or list(found)
        missing -= values.keys()
        yield RawRecord(number, values)
    if missing and keys:
        raise UsageError(
            f"No record of the trace {path} has {min(missing)!r}.",
            remedy=f"The first one has: {list_names(keys)}.",
        )


def _parse_json(text: str | bytes) -> Any:
    """The value of a text; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _selected_values(
    found: Mapping[str, Any], number: int, columns: Columns, mapper: RowMapper
) -> dict[str, object]:
    values: dict[str, object] = {}
    for name in columns.used():
        value = _value(found, name)
        if value is not None:
            values[name] = value
    if columns.tasks == RECORD_COLUMNS.tasks and "tasks" not in values and "planned" in found:
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


SWF_FIELDS = (
    "job",
    "submit",
    "wait",
    "run",
    "processors",
    "cpu",
    "memory",
    "requested_processors",
    "requested_time",
    "requested_memory",
    "status",
    "user",
    "group",
    "executable",
    "queue",
    "partition",
    "preceding",
    "think",
)
"""Names of the 18 fields, in order. memory and requested_memory are KB per processor."""

_UNKNOWN = -1.0
_PARTIAL = frozenset({"2", "3", "4"})
_RECORDS = re.compile(r";\s*(MaxRecords|MaxJobs)\s*:\s*(\d+)\s*", re.IGNORECASE)


def read_swf(path: Path, columns: Columns = SWF_COLUMNS) -> TraceContent:
    """UsageError where the file cannot be read or the columns are none of SWF_FIELDS."""
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd, unknown=_UNKNOWN)
    reader = _SwfReader(path, columns, mapper, odd)
    return mapper.reading(reader.records())


class _SwfReader:
    def __init__(self, path: Path, columns: Columns, mapper: RowMapper, odd: list[Anomaly]) -> None:
        check_columns(columns.used(), SWF_FIELDS, path)
        self._path = path
        self._mapper = mapper
        self._odd = odd
        self._used = frozenset(columns.used())
        self._needed = frozenset(columns.needed())
        self._promised: dict[str, tuple[int, int]] = {}

    def records(self) -> Iterator[RawRecord | None]:
        found = 0
        jobs: set[str] = set()
        for number, line in skip_blank_lines(
            read_lines(self._path, self._odd), self._path, self._odd
        ):
            if line.lstrip().startswith(";"):
                if match := _RECORDS.fullmatch(line.strip()):
                    self._promised[match[1].lower()] = (number, int(match[2]))
                continue
            found += 1
            yield self._record(number, line, jobs)
        # MaxRecords counts lines; MaxJobs does too where no job was swapped out.
        at, promised = self._promised.get("maxrecords") or self._promised.get("maxjobs", (0, found))
        if promised != found:
            self._mapper.note(
                at,
                "the header promises another number of records",
                "those that are there were read",
                f"{promised:,}, not {found:,}",
            )

    def _record(self, number: int, line: str, jobs: set[str]) -> RawRecord | None:
        parts = line.split()
        values = dict(zip(SWF_FIELDS, parts, strict=False))
        if len(parts) < len(SWF_FIELDS):
            enough = self._needed <= values.keys()
            done = "those that are there were read" if enough else LEFT_OUT
            self._mapper.note(number, "fewer than 18 fields", done, str(len(parts)))
            if not enough:
                return None
        elif len(parts) > len(SWF_FIELDS):
            self._mapper.note(
                number, "more than 18 fields", "the first 18 were read", str(len(parts))
            )
        if values.get("status") in _PARTIAL:
            self._mapper.note(
                number,
                "part of a job that was swapped out (status 2, 3 or 4)",
                "left out, since the job has a line of its own",
            )
            return None
        if parts[0] in jobs:
            self._mapper.note(number, "a job number that was there before", "kept", parts[0])
        jobs.add(parts[0])
        if not all_numbers(line):
            for name, value in values.items():
                if name not in self._used and parse_number(value) is None:
                    self._mapper.note(number, f"{name} is no number", "not needed", shown(value))
        return RawRecord(number, values)


_DELIMITERS = "\t;|,"


def read_table(
    path: Path, columns: Columns, *, names: tuple[str, ...] = (), delimiter: str = ""
) -> TraceContent:
    """`names` are those of the columns of a table without a header. Without a `delimiter` it is
    the tab, semicolon, bar or comma that the first line has most of.

    UsageError where the file cannot be read or lacks a column.
    """
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd)
    return mapper.reading(_table_records(path, columns, names, delimiter, mapper, odd))


def _table_records(
    path: Path,
    columns: Columns,
    names: tuple[str, ...],
    delimiter: str,
    mapper: RowMapper,
    odd: list[Anomaly],
) -> Iterator[RawRecord | None]:
    numbered = iter(skip_blank_lines(read_lines(path, odd), path, odd))
    header = tuple(names)
    if header:
        check_columns(columns.used(), header, path)
    for number, line in numbered:
        delimiter = delimiter or _guess_delimiter(line)
        parts = _split_line(line, delimiter)
        if not header:
            header = tuple(part.strip() for part in parts or ())
            check_columns(columns.used(), header, path)
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
        yield RawRecord(number, dict(zip(header, map(str.strip, parts), strict=False)))
    if not header:
        raise UsageError(f"The trace {path} is empty.", remedy="Name a file with records.")


def _guess_delimiter(line: str) -> str:
    found = max(_DELIMITERS, key=line.count)
    return found if found in line else ","


def _split_line(line: str, delimiter: str) -> list[str] | None:
    """The fields of one line; None where they cannot be told."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
