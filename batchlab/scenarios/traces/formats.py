"""Readers of trace files in JSON Lines, whole records, the Standard Workload Format, and tables of text.

Trace files may be compressed with gzip. If a file is damaged, truncated, or not in UTF-8, the readers read as much as
possible and report the problem. The Standard Workload Format is defined by the Parallel Workloads Archive (version 2.2,
page swf.html). Every line of a table is one record, so an unclosed quote affects only one record.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from batchlab.core.errors import UsageError
from batchlab.core.text import show_value
from batchlab.scenarios import record
from batchlab.scenarios.model.values import Anomaly
from batchlab.scenarios.traces.rows import (
    LEFT_OUT,
    RECORD_COLUMNS,
    SWF_COLUMNS,
    Columns,
    RawRecord,
    RowMapper,
    TraceContent,
    all_numbers,
    check_columns,
    list_names,
    parse_number,
    skip_blank_lines,
)

_CHUNK = 1 << 18
_UTF16_PROBE_BYTES = 64
"""Number of bytes at the start of a file that are checked for UTF-16."""
_GZIP = b"\x1f\x8b"
_DAMAGED = "the file is damaged from here"
_PRESENT_READ = "those that are there were read"
_CHECKS = ("incorrect data check", "incorrect length check")
"""Error messages of zlib for complete data with a wrong checksum or length."""


class _ReadProblem(NamedTuple):
    """Reason why a reader does not read the rest of a trace file. `intact` is True if the data before the problem is
    intact.
    """

    what: str
    done: str = LEFT_OUT
    detail: str = ""
    intact: bool = True


class _UnreadableError(Exception):
    """The rest of a trace file cannot be read."""

    def __init__(self, problem: _ReadProblem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def read_lines(path: Path, odd: list[Anomaly]) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line, and add problems in the file to `odd`. Line numbers start at 1.

    Raise UsageError if the file cannot be read.
    """
    number = 0
    rest = separator = b""
    try:
        for chunk in _chunks(path):
            separator = separator or _line_separator(chunk, path)
            *lines, rest = (rest + chunk).split(separator)
            for line in lines:
                number += 1
                yield number, _decode(line, number, path, odd)
    except _UnreadableError as error:
        problem = error.problem
        # The last line is dropped if the data is damaged, because a truncated value could still look like a number.
        rest = rest if problem.intact else b""
        odd.append(Anomaly(str(path), number + 1 + bool(rest), problem.what, problem.done, problem.detail))
    if rest:
        yield number + 1, _decode(rest, number + 1, path, odd)


def _line_separator(chunk: bytes, path: Path) -> bytes:
    """Return the line separator that occurs in the first chunk of a file. Raise UsageError for a file in UTF-16."""
    start = chunk[:_UTF16_PROBE_BYTES]
    is_wide = len(start) == _UTF16_PROBE_BYTES and not (any(start[::2]) and any(start[1::2]))
    if is_wide or chunk.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise UsageError(
            f"The trace {path} is UTF-16, and only UTF-8 is read.",
            remedy="Convert it, for example with `iconv -f UTF-16 -t UTF-8`.",
        )
    return b"\r" if b"\r" in chunk and b"\n" not in chunk else b"\n"


def read_unpacked(path: Path) -> bytes:
    """Return the readable part of the file. Raise UsageError if the file cannot be opened."""
    data = bytearray()
    with suppress(_UnreadableError):
        for chunk in _chunks(path):
            data += chunk
    return bytes(data)


def _decode(line: bytes, number: int, path: Path, odd: list[Anomaly]) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        odd.append(Anomaly(str(path), number, "not UTF-8", "its other characters were read"))
        return line.decode(errors="replace").rstrip("\r")


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the unpacked file in chunks. Raise _UnreadableError if the rest of the file cannot be read."""
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
    """Unpack the members of a gzip file. Zero bytes may follow each member."""
    while data.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=31)
        while data and not unpacker.eof:
            yield from _decompress(unpacker, data)
            data = unpacker.unused_data or file.read(_CHUNK)
        if not unpacker.eof:
            yield unpacker.flush()
            raise _UnreadableError(_ReadProblem(_DAMAGED, detail="it breaks off", intact=False))
        while data and not (data := data.lstrip(b"\0")):
            data = file.read(_CHUNK)
        if len(data) == 1:
            data += file.read(1)
    if data:
        raise _UnreadableError(_ReadProblem("bytes that are no gzip follow its end"))


def _decompress(unpacker: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """Yield the unpacked `data` in pieces of limited size."""
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
    """Unpack damaged data byte by byte, because zlib drops the whole output of a call that fails."""
    for at in range(len(data)):
        try:
            piece = unpacker.decompress(data[at : at + 1])
        except zlib.error:
            return
        yield piece


def _problem_of(error: zlib.error) -> _ReadProblem:
    if any(check in str(error) for check in _CHECKS):
        return _ReadProblem("the file's checksum is wrong here", "what is before was read, and may be spoilt")
    return _ReadProblem(_DAMAGED, detail=str(error), intact=False)


_RECORD_KEYS = frozenset({"scenario", "jobs", "version"})


def read_jsonl(path: Path, columns: Columns = RECORD_COLUMNS) -> TraceContent:
    """Read a file in JSON Lines or a whole record of a run.

    In a record of a run, the number of a job serves as the job's line number. Raise UsageError if the file cannot be
    read, or if all records lack a required column.
    """
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd)
    numbered = iter(skip_blank_lines(read_lines(path, odd), path, odd))
    first = list(islice(numbered, 1))
    if first and _is_a_record(first[0][1], path):
        return mapper.reading(_record_jobs(record.parse(read_unpacked(path), path), columns, mapper))
    return mapper.reading(_json_lines(chain(first, numbered), path, columns, mapper))


def _is_a_record(line: str, path: Path) -> bool:
    """Return whether the first line belongs to a whole record of a run.

    A record of a run has many lines, or one line if the record was reformatted.
    """
    if line.strip() == "{":
        return isinstance(_parse_json(read_unpacked(path)), dict)
    document = _parse_json(line)
    return isinstance(document, dict) and document.keys() >= _RECORD_KEYS


def _record_jobs(run: record.Record, columns: Columns, mapper: RowMapper) -> Iterator[RawRecord]:
    names = [field.name for field in fields(record.JobRun)]
    for number, job in enumerate(run.jobs, 1):
        values = {name: getattr(job, name) for name in names}
        # The reader multiplies the times of a compressed run by the compression factor.
        times = {
            name: value * run.compressed for name, value in values.items() if name.endswith("_s") and value is not None
        }
        yield RawRecord(number, _selected_values(values | times, number, columns, mapper))


def _json_lines(
    numbered: Iterator[tuple[int, str]], path: Path, columns: Columns, mapper: RowMapper
) -> Iterator[RawRecord | None]:
    # In a file that is read with RECORD_COLUMNS, only the time column is required.
    missing = set(columns.used_columns()) - set(RECORD_COLUMNS.used_columns())
    keys: list[str] = []
    for number, line in numbered:
        document = _parse_json(line)
        if not isinstance(document, dict):
            mapper.note(number, "not a JSON object", LEFT_OUT, show_value(line))
            yield None
            continue
        values = _selected_values(document, number, columns, mapper)
        keys = keys or list(document)
        missing -= values.keys()
        yield RawRecord(number, values)
    if missing and keys:
        raise UsageError(
            f"No record of the trace {path} has {min(missing)!r}.", remedy=f"The first one has: {list_names(keys)}."
        )


def _parse_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _selected_values(
    document: Mapping[str, Any], number: int, columns: Columns, mapper: RowMapper
) -> dict[str, object]:
    values = {name: value for name in columns.used_columns() if (value := _value(document, name)) is not None}
    if columns.tasks == RECORD_COLUMNS.tasks and "tasks" not in values and "planned" in document:
        values["tasks"] = document["planned"]
        mapper.note(number, "no count of its first stage's tasks", "that of all stages was taken")
    return values


def _value(document: Mapping[str, Any], name: str) -> object:
    if name in document:
        return document[name]
    value: Any = document
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


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
"""Names of the 18 fields of the Standard Workload Format, in order.

The fields memory and requested_memory are in KB per processor.
"""

_UNKNOWN = -1.0
_PARTIAL = frozenset({"2", "3", "4"})
_RECORDS = re.compile(r";\s*(MaxRecords|MaxJobs)\s*:\s*(\d+)\s*", re.IGNORECASE)


def read_swf(path: Path, columns: Columns = SWF_COLUMNS) -> TraceContent:
    """Read a file in the Standard Workload Format.

    Raise UsageError if the file cannot be read or a column is unknown.
    """
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd, unknown=_UNKNOWN)
    reader = _SwfReader(path, columns, mapper, odd)
    return mapper.reading(reader.records())


class _SwfReader:
    def __init__(self, path: Path, columns: Columns, mapper: RowMapper, odd: list[Anomaly]) -> None:
        check_columns(columns.used_columns(), SWF_FIELDS, path)
        self._path = path
        self._mapper = mapper
        self._odd = odd
        self._used = frozenset(columns.used_columns())
        self._needed = frozenset(columns.needed_columns())
        self._promised: dict[str, tuple[int, int]] = {}

    def records(self) -> Iterator[RawRecord | None]:
        count = 0
        jobs: set[str] = set()
        for number, line in skip_blank_lines(read_lines(self._path, self._odd), self._path, self._odd):
            if line.lstrip().startswith(";"):
                if match := _RECORDS.fullmatch(line.strip()):
                    self._promised[match[1].lower()] = (number, int(match[2]))
                continue
            count += 1
            yield self._record(number, line, jobs)
        # The header MaxRecords is the number of lines. The header MaxJobs is also the number of lines, unless jobs were
        # swapped out.
        at, promised = self._promised.get("maxrecords") or self._promised.get("maxjobs", (0, count))
        if promised != count:
            what = "the header promises another number of records"
            self._mapper.note(at, what, _PRESENT_READ, f"{promised:,}, not {count:,}")

    def _record(self, number: int, line: str, jobs: set[str]) -> RawRecord | None:
        parts = line.split()
        values = dict(zip(SWF_FIELDS, parts, strict=False))
        if len(parts) < len(SWF_FIELDS):
            enough = self._needed <= values.keys()
            done = _PRESENT_READ if enough else LEFT_OUT
            self._mapper.note(number, "fewer than 18 fields", done, str(len(parts)))
            if not enough:
                return None
        elif len(parts) > len(SWF_FIELDS):
            self._mapper.note(number, "more than 18 fields", "the first 18 were read", str(len(parts)))
        if values.get("status") in _PARTIAL:
            what = "part of a job that was swapped out (status 2, 3 or 4)"
            self._mapper.note(number, what, "left out, since the job has a line of its own")
            return None
        if parts[0] in jobs:
            self._mapper.note(number, "a repeated job number", "kept", parts[0])
        jobs.add(parts[0])
        if not all_numbers(line):
            for name, value in values.items():
                if name not in self._used and parse_number(value) is None:
                    self._mapper.note(number, f"{name} is not a number", "not needed", show_value(value))
        return RawRecord(number, values)


_DELIMITERS = "\t;|,"


def read_table(path: Path, columns: Columns, *, names: tuple[str, ...] = (), delimiter: str = "") -> TraceContent:
    """Read a text file that contains a table.

    `names` are the column names of a table without a header. If `delimiter` is omitted, the most frequent of tab,
    semicolon, bar, and comma in the first line is used.

    Raise UsageError if the file cannot be read or lacks a column.
    """
    odd: list[Anomaly] = []
    mapper = RowMapper(path, columns, odd)
    return mapper.reading(_table_records(path, columns, names, delimiter, mapper, odd))


def _table_records(
    path: Path, columns: Columns, names: tuple[str, ...], delimiter: str, mapper: RowMapper, odd: list[Anomaly]
) -> Iterator[RawRecord | None]:
    header = tuple(names)
    if header:
        check_columns(columns.used_columns(), header, path)
    for number, line in skip_blank_lines(read_lines(path, odd), path, odd):
        if not delimiter:
            likely = max(_DELIMITERS, key=line.count)
            delimiter = likely if likely in line else ","
        parts = _split_line(line, delimiter)
        if not header:
            header = tuple(part.strip() for part in parts or ())
            check_columns(columns.used_columns(), header, path)
            continue
        if parts is None:
            mapper.note(number, "a quote that is not closed", LEFT_OUT)
            yield None
            continue
        if len(parts) > len(header):
            mapper.note(number, "more fields than columns", f"the first {len(header)} were read", str(len(parts)))
        elif len(parts) < len(header):
            mapper.note(number, "fewer fields than columns", _PRESENT_READ, str(len(parts)))
        yield RawRecord(number, dict(zip(header, map(str.strip, parts), strict=False)))
    if not header:
        raise UsageError(f"The trace {path} is empty.", remedy="Name a file with records.")


def _split_line(line: str, delimiter: str) -> list[str] | None:
    """Split a line into fields, or return None for an unclosed quote."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
