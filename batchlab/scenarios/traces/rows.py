"""Conversion of a trace's records to rows by a column map, in the same way for every trace format.

Every record of a trace becomes a row or is reported in `odd`. A record that the reader had to correct becomes a row and
is also reported. A column name is a name from a table's header, a field of the Standard Workload Format (see
formats.SWF_FIELDS), or a key of a JSON object. Dots separate the keys of nested JSON objects.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import islice, pairwise
from math import ceil, isfinite
from pathlib import Path
from typing import NamedTuple

from batchlab.core.errors import UsageError
from batchlab.core.text import show_value
from batchlab.jobs.field_types import MAX_TASKS
from batchlab.scenarios.model.values import Anomaly

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
_NUMBER = re.compile(rf"\s*{_ONE}\s*")
_NUMBERS = re.compile(rf"\s*(?:{_ONE}(?:\s++|\Z))*")
_DIRECTIVE = re.compile("%(.)")
_LEAP_YEAR = 1972


class TimestampKind(Enum):
    """Kind of a time in a trace: a number, or a timestamp with or without a zone."""

    NUMBER = "a number"
    ZONED = "a timestamp with a zone"
    LOCAL = "a timestamp without a zone"


class Timestamp(NamedTuple):
    """Time of a record in seconds. A timestamp counts the seconds since 1970."""

    at_s: float
    kind: TimestampKind


def check_unit(unit: str) -> None:
    """Raise ValueError unless `unit` is one of UNITS or a strptime format."""
    if unit in UNITS:
        return
    if "%" not in unit:
        raise ValueError(f"the unit must be one of {', '.join(UNITS)} or a time format")
    try:
        # The unit is a valid strptime format if strptime can parse the output of strftime.
        _strptime(_EPOCH.strftime(unit), unit)
    except (ValueError, re.error) as error:
        why = error if isinstance(error, ValueError) else "it repeats a directive"
        raise ValueError(f"{unit!r} is not a strptime format: {why}") from error


def parse_number(value: object) -> float | None:
    """Return a number, or the number in a text, as a finite float. Return None for any other value."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def all_numbers(text: str) -> bool:
    """Return whether `text` contains only numbers and blanks. The check is fast, and most lines of a trace pass the
    check.
    """
    return _NUMBERS.fullmatch(text) is not None


def parse_timestamp(value: object, unit: str) -> Timestamp | None:
    """Return the time in `value`, or None if `value` is not a time.

    A timestamp without a zone is read as UTC. A number is a time in the unit `unit`. A text is in ISO 8601 or in the
    strptime format `unit`. In ISO 8601, a space may replace the T, and a fraction may have any number of digits.
    """
    if unit in UNITS:
        number = parse_number(value)
        if number is not None:
            return Timestamp(number * UNITS[unit], TimestampKind.NUMBER)
    if not isinstance(value, str):
        return None
    try:
        text = value.strip()
        moment = datetime.fromisoformat(text) if unit in UNITS else _strptime(text, unit)
    except ValueError:
        return None
    kind = TimestampKind.ZONED if moment.tzinfo else TimestampKind.LOCAL
    return Timestamp(((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH).total_seconds(), kind)


def _strptime(text: str, form: str) -> datetime:
    directives = set(_DIRECTIVE.findall(form))
    if "d" in directives and not directives & {"Y", "y", "G"}:
        # For a text without a year, strptime assumes the year 1900, which does not have a 29 February. Python 3.15
        # refuses formats with a day and without a year.
        text, form = f"{_LEAP_YEAR} {text}", f"%Y {form}"
    return datetime.strptime(text, form)  # noqa: DTZ007 - the caller asks for the zone


@dataclass(frozen=True, slots=True)
class ColumnSum:
    """Number that is derived from a record: the sum of the record's `columns`, divided by `per`.

    `ColumnSum(("duration_ms",), per=1000)` gives seconds. `ColumnSum(("input", "shuffle"), per=64 * 2**20)` gives tasks
    of 64 MiB each. A record may lack the columns if `needed` is False.
    """

    columns: tuple[str, ...]
    per: float = 1.0
    needed: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("there must be at least one column")
        if not (isfinite(self.per) and self.per > 0):
            raise ValueError(f"per must be a number above 0, not {self.per}")


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns from which the values of a record are read.

    Values without a column come from the job's template. `at` is the column of the arrival time, which is a number or a
    timestamp. `minus` is a column of seconds that are subtracted from the arrival time, for traces that record the ends
    of jobs. `unit` is the unit of a number in `at` (one of UNITS), or a strptime format for timestamps that are not in
    ISO
    8601. A strptime format contains a %. If `count` is a column, each record is an interval of `every_s` seconds from
          `at`, and `count` times `scale` jobs arrive in the interval. If `every_s` is omitted, an interval has the
          length of the most common gap between records. `tasks` is the number of a job's root tasks, rounded up to at
          least one, and `task_s` is the time of each root task. `label`, `tenant`, and `template` are text columns.
    """

    at: str
    minus: str = ""
    unit: str = "s"
    count: str = ""
    every_s: float | None = None
    scale: float = 1.0
    tasks: ColumnSum | None = None
    task_s: ColumnSum | None = None
    label: str = ""
    tenant: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if not self.at:
            raise ValueError("a trace needs a column with the arrival time")
        check_unit(self.unit)
        if self.every_s is not None and not (isfinite(self.every_s) and self.every_s > 0):
            raise ValueError(f"an interval must be longer than 0 s, not {self.every_s}")
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a number above 0, not {self.scale}")

    def used_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that a trace must have."""
        numbers = (name for number in self._sums() for name in number.columns)
        return _distinct(*self.needed_columns(), *numbers, self.label, self.tenant)

    def needed_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that every record must have."""
        numbers = (name for number in self._sums() if number.needed for name in number.columns)
        return _distinct(self.at, self.minus, self.count, self.template, *numbers)

    def _sums(self) -> tuple[ColumnSum, ...]:
        return tuple(number for number in (self.tasks, self.task_s) if number)


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


SWF_COLUMNS = Columns("submit", task_s=ColumnSum(("run",)), label="job")
"""Columns of the Standard Workload Format.

Each job of the log becomes a job of the scenario, and each task of the job takes the job's run time.
"""

RECORD_COLUMNS = Columns(
    "due_s", tasks=ColumnSum(("tasks",), needed=False), label="label", tenant="tenant", template="template"
)
"""Columns of the jobs in a record of a forecast or a replay. Lines in other JSON Lines files may have fewer fields."""


LEFT_OUT = "left out"
_MAX_SHOWN = 20


class RawRecord(NamedTuple):
    """Record of a trace with the field names of the trace's format."""

    line: int
    values: Mapping[str, object]


class TraceRow(NamedTuple):
    """Record of a trace: one job at `at_s`, or `jobs` jobs in the `wide_s` seconds after `at_s`.

    Times in a row are seconds on the trace's own time line. The rows of a file are in order of time.
    """

    line: int
    at_s: float
    jobs: float = 1.0
    wide_s: float | None = None
    tasks: int | None = None
    task_s: float | None = None
    label: str = ""
    tenant: str = ""
    template: str = ""


@dataclass(frozen=True, slots=True)
class TraceContent:
    """Content of a trace: rows in order of time, number of records, problems by line, and form of the times."""

    rows: tuple[TraceRow, ...]
    records: int
    odd: tuple[Anomaly, ...]
    kind: TimestampKind | None = None


class _LeftOutError(Exception):
    """A record cannot be used because one of its values is invalid."""

    def __init__(self, what: str, value: object = "") -> None:
        super().__init__(what)
        self.what = what
        self.detail = show_value(value) if value != "" else ""


def _check_size(number: float, *columns: str) -> float:
    """Return `number`, or raise _LeftOutError if sums of many numbers of this size could overflow."""
    if abs(number) > MAX_TASKS:
        raise _LeftOutError(f"{' and '.join(columns)} is too large", number)
    return number


class RowMapper:
    """Converter of records to rows by a column map. `unknown` is the number that stands for a missing value."""

    def __init__(self, path: Path, columns: Columns, odd: list[Anomaly], *, unknown: float | None = None) -> None:
        self._file = str(path)
        self._columns = columns
        self._odd = odd
        self._unknown = unknown
        self._kind: TimestampKind | None = None

    def reading(self, records: Iterable[RawRecord | None]) -> TraceContent:
        """Convert all records to rows.

        A None in `records` stands for a record that was already skipped and reported. Raise UsageError if the length of
        the records' intervals cannot be derived.
        """
        rows: list[TraceRow] = []
        count, before_s = 0, float("-inf")
        for record in records:
            count += 1
            if record is None:
                continue
            try:
                row = self._row(record)
            except _LeftOutError as error:
                self.note(record.line, error.what, LEFT_OUT, error.detail)
                continue
            # If the column map has `minus`, the order of records is not checked, because a trace that is sorted by end
            # times need not be sorted by start times.
            if row.at_s < before_s and not self._columns.minus:
                self.note(record.line, "earlier than the record before it", "put in order of time")
            before_s = row.at_s
            rows.append(row)
        rows.sort(key=lambda row: row.at_s)
        if self._columns.count and rows:
            rows = self._intervals(rows)
        self._odd.sort(key=lambda odd: odd.line)
        return TraceContent(tuple(rows), count, tuple(self._odd), self._kind)

    def note(self, line: int, what: str, done: str, detail: str = "") -> None:
        self._odd.append(Anomaly(self._file, line, what, done, detail))

    def _row(self, fields: RawRecord) -> TraceRow:
        columns = self._columns
        at_s = self._moment(fields)
        if columns.minus:
            at_s -= _check_size(self._number(fields, columns.minus), columns.minus)
        template = self._text(fields, columns.template)
        if columns.template and not template:
            raise _LeftOutError(f"{columns.template} is missing")
        return TraceRow(
            fields.line,
            at_s,
            _check_size(self._number(fields, columns.count), columns.count) if columns.count else 1.0,
            None,
            self._tasks(fields, columns.tasks),
            self._seconds(fields, columns.task_s),
            self._text(fields, columns.label),
            self._text(fields, columns.tenant),
            template,
        )

    def _moment(self, fields: RawRecord) -> float:
        name = self._columns.at
        value = fields.values.get(name)
        if value is None or value == "":
            raise _LeftOutError(f"{name} is missing")
        read = parse_timestamp(value, self._columns.unit)
        if read is None:
            raise _LeftOutError(f"{name} is not a time", value)
        at_s, kind = read
        if self._unknown is not None and at_s < 0:
            raise self._below(name, at_s)
        first = self._kind = self._kind or kind
        if kind is first:
            return _check_size(at_s, name)
        # A time in another form than the first time cannot be placed on the time line of the other records.
        if kind is TimestampKind.NUMBER:
            raise _LeftOutError(f"{name} is a number, unlike the first", value)
        if first is TimestampKind.NUMBER:
            raise _LeftOutError(f"{name} is a timestamp, unlike the first", value)
        self.note(
            fields.line,
            f"{name} {'has a' if kind is TimestampKind.ZONED else 'has no'} zone, unlike the first",
            "what has none is read as UTC",
            show_value(value),
        )
        return at_s

    def _below(self, name: str, number: float) -> _LeftOutError:
        if number == self._unknown:
            return _LeftOutError(f"{name} is unknown ({number:g})")
        return _LeftOutError(f"{name} is below 0", number)

    def _number(self, fields: RawRecord, name: str) -> float:
        value = fields.values.get(name)
        if value is None or value == "":
            raise _LeftOutError(f"{name} is missing")
        number = parse_number(value)
        if number is None:
            raise _LeftOutError(f"{name} is not a number", value)
        if number < 0:
            raise self._below(name, number)
        return number

    def _sum(self, record: RawRecord, columns: ColumnSum | None) -> float | None:
        if columns is None or not (columns.needed or any(column in record.values for column in columns.columns)):
            return None
        if len(columns.columns) == 1:
            return self._number(record, columns.columns[0]) / columns.per
        return sum(self._number(record, name) for name in columns.columns) / columns.per

    def _seconds(self, record: RawRecord, columns: ColumnSum | None) -> float | None:
        number = self._sum(record, columns)
        return number if columns is None or number is None else _check_size(number, *columns.columns)

    def _tasks(self, record: RawRecord, columns: ColumnSum | None) -> int | None:
        number = self._sum(record, columns)
        if columns is None or number is None:
            return None
        if number > MAX_TASKS:
            raise _LeftOutError("more tasks than a job may have", float(f"{number:g}"))
        if number == 0 and columns.per == 1:
            self.note(record.line, f"{' and '.join(columns.columns)} is 0", "counted as one task")
        return max(1, ceil(number))

    def _text(self, fields: RawRecord, name: str) -> str:
        value = fields.values.get(name) if name else None
        if value is None or (self._unknown is not None and parse_number(value) == self._unknown):
            return ""
        return str(value).strip()

    def _intervals(self, rows: list[TraceRow]) -> list[TraceRow]:
        every_s = self._columns.every_s
        if not every_s:
            gaps = Counter(round(b.at_s - a.at_s, 3) for a, b in pairwise(rows) if b.at_s > a.at_s)
            if not gaps:
                raise UsageError(
                    f"The length of the intervals of {self._file} cannot be derived from its records.",
                    remedy="Write it, for example every: 5m.",
                )
            every_s = gaps.most_common(1)[0][0]
        # The comparison has a tolerance, because the fraction of a timestamp may be rounded.
        slack_s = every_s / 1000
        intervals: list[TraceRow] = []
        for row, after in pairwise(rows):
            gap_s = after.at_s - row.at_s
            detail = f"{gap_s:g} s, not {every_s:g} s"
            if gap_s > every_s + slack_s:
                self.note(row.line, "the next record is late", "nothing arrives in the gap", detail)
            elif gap_s < every_s - slack_s:
                self.note(row.line, "the next record is early", "its interval ends there", detail)
            intervals.append(row._replace(wide_s=min(gap_s, every_s)))
        return [*intervals, *(row._replace(wide_s=every_s) for row in rows[-1:])]


def check_columns(used: Iterable[str], columns: Sequence[str], path: Path) -> None:
    """Raise UsageError for a column that is missing or that occurs twice."""
    for name in used:
        times = columns.count(name)
        if times == 1:
            continue
        fault = "has no column" if not times else f"has {times} columns called"
        raise UsageError(f"The trace {path} {fault} {name!r}.", remedy=f"Its columns are: {list_names(columns)}.")


def list_names(names: Sequence[str]) -> str:
    """Return the names as one text. If `names` has many entries, the text lists only the first names."""
    clear = (name if name.isprintable() and len(name) <= 40 else show_value(name) for name in names)
    first = ", ".join(islice(clear, _MAX_SHOWN))
    return f"{first} and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else first


def skip_blank_lines(numbered: Iterable[tuple[int, str]], path: Path, odd: list[Anomaly]) -> Iterable[tuple[int, str]]:
    """Skip blank lines. The function reports blank lines between records, but not blank lines at the end."""
    blank: list[int] = []
    for number, line in numbered:
        if not line or line.isspace():
            blank.append(number)
            continue
        odd.extend(Anomaly(str(path), at, "a blank line", "skipped") for at in blank)
        blank.clear()
        yield number, line


@dataclass(frozen=True, slots=True)
class AnomalyKind:
    """Records of one trace file that have the same problem."""

    file: str
    what: str
    done: str
    count: int
    first_line: int


def summarize(odds: Iterable[Anomaly]) -> tuple[AnomalyKind, ...]:
    """Group the problems by file and kind, and return the most frequent group first."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for odd in odds:
        lines.setdefault((odd.file, odd.what, odd.done), []).append(odd.line)
    kinds = [AnomalyKind(*key, len(numbers), min(numbers)) for key, numbers in lines.items()]
    return tuple(sorted(kinds, key=lambda kind: (kind.file, -kind.count, kind.first_line)))


def describe(odd: Anomaly) -> str:
    """Return one sentence about the problem, with the file and line."""
    detail = f" ({odd.detail})" if odd.detail else ""
    return f"{odd.file}:{odd.line}: {odd.what}{detail}: {odd.done}"
