"""From a trace's records to rows that all mean the same, whatever the format was.

Invariant: every record becomes a row, or is in `odd`; one that is changed is in both.

What is odd in a trace, in words, and how often each kind of it occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import NamedTuple

from batchlab.core.errors import UsageError
from batchlab.core.units import shown
from batchlab.jobs.field_types import MOST_TASKS
from batchlab.scenarios.model.values import Anomaly
from batchlab.scenarios.traces.columns import (
    Columns,
    ColumnSum,
    TimestampKind,
    parse_number,
    parse_timestamp,
)

LEFT_OUT = "left out"
_MOST_SHOWN = 20


class RawRecord(NamedTuple):
    """One record as its format has it."""

    line: int
    values: Mapping[str, object]


class TraceRow(NamedTuple):
    """One record: a job at `at_s`, or with `wide_s` set `jobs` of them from then on within that.

    Times are seconds on the trace's own time line; those of a file are in order.
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
    """A trace that was read: its rows in order of time, how many `records` it has, what is odd in
    it, in order of lines, and how its times are written (those of the first record that has one).
    """

    rows: tuple[TraceRow, ...]
    records: int
    odd: tuple[Anomaly, ...]
    kind: TimestampKind | None = None


class _LeftOutError(Exception):
    """Why a record cannot be used, and its value that is to blame."""

    def __init__(self, what: str, value: object = "") -> None:
        super().__init__(what)
        self.what = what
        self.detail = shown(value) if value != "" else ""


def _checked_size(number: float, *columns: str) -> float:
    """`number`, where sums of many such are still numbers."""
    if abs(number) > MOST_TASKS:
        raise _LeftOutError(f"{' and '.join(columns)} is beyond all that is counted here", number)
    return number


class RowMapper:
    """Takes from records what the columns say. `unknown` is the number that stands for none."""

    def __init__(
        self, path: Path, columns: Columns, odd: list[Anomaly], *, unknown: float | None = None
    ) -> None:
        self._file = str(path)
        self._columns = columns
        self._odd = odd
        self._unknown = unknown
        self._kind: TimestampKind | None = None

    def reading(self, records: Iterable[RawRecord | None]) -> TraceContent:
        """None is a record that was left out already, and noted.

        UsageError where the length of intervals cannot be told.
        """
        rows: list[TraceRow] = []
        found, before_s = 0, float("-inf")
        for fields in records:
            found += 1
            if fields is None:
                continue
            try:
                row = self._row(fields)
            except _LeftOutError as left:
                self.note(fields.line, left.what, LEFT_OUT, left.detail)
                continue
            # The starts of a trace in order of its ends need not be in order.
            if row.at_s < before_s and not self._columns.minus:
                self.note(fields.line, "earlier than the record before it", "put in order of time")
            before_s = row.at_s
            rows.append(row)
        rows.sort(key=lambda row: row.at_s)
        if self._columns.count and rows:
            rows = self._intervals(rows)
        self._odd.sort(key=lambda odd: odd.line)
        return TraceContent(tuple(rows), found, tuple(self._odd), self._kind)

    def note(self, line: int, what: str, done: str, detail: str = "") -> None:
        self._odd.append(Anomaly(self._file, line, what, done, detail))

    def _row(self, fields: RawRecord) -> TraceRow:
        columns = self._columns
        at_s = self._moment(fields)
        if columns.minus:
            at_s -= _checked_size(self._number(fields, columns.minus), columns.minus)
        template = self._text(fields, columns.template)
        if columns.template and not template:
            raise _LeftOutError(f"{columns.template} is missing")
        return TraceRow(
            fields.line,
            at_s,
            _checked_size(self._number(fields, columns.count), columns.count)
            if columns.count
            else 1.0,
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
            raise _LeftOutError(f"{name} is no time", value)
        at_s, kind = read
        if self._unknown is not None and at_s < 0:
            raise self._below(name, at_s)
        first = self._kind = self._kind or kind
        if kind is first:
            return _checked_size(at_s, name)
        # Nobody knows where on the time line of the others it would be.
        if kind is TimestampKind.NUMBER:
            raise _LeftOutError(f"{name} is a number, unlike the first", value)
        if first is TimestampKind.NUMBER:
            raise _LeftOutError(f"{name} is a timestamp, unlike the first", value)
        self.note(
            fields.line,
            f"{name} {'has a' if kind is TimestampKind.ZONED else 'has no'} zone, unlike the first",
            "what has none is read as UTC",
            shown(value),
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
            raise _LeftOutError(f"{name} is no number", value)
        if number < 0:
            raise self._below(name, number)
        return number

    def _sum(self, fields: RawRecord, take: ColumnSum | None) -> float | None:
        if take is None or not (take.needed or any(one in fields.values for one in take.columns)):
            return None
        if len(take.columns) == 1:
            return self._number(fields, take.columns[0]) / take.per
        return sum(self._number(fields, name) for name in take.columns) / take.per

    def _seconds(self, fields: RawRecord, take: ColumnSum | None) -> float | None:
        number = self._sum(fields, take)
        return number if take is None or number is None else _checked_size(number, *take.columns)

    def _tasks(self, fields: RawRecord, take: ColumnSum | None) -> int | None:
        number = self._sum(fields, take)
        if take is None or number is None:
            return None
        if number > MOST_TASKS:
            raise _LeftOutError("more tasks than a job may have", float(f"{number:g}"))
        if number == 0 and take.per == 1:
            self.note(fields.line, f"{' and '.join(take.columns)} is 0", "counted as one task")
        return max(1, ceil(number))

    def _text(self, fields: RawRecord, name: str) -> str:
        value = fields.values.get(name) if name else None
        if value is None or (self._unknown is not None and parse_number(value) == self._unknown):
            return ""
        return str(value).strip()

    def _intervals(self, rows: list[TraceRow]) -> list[TraceRow]:
        every_s = self._columns.every_s or self._most_common_gap(rows)
        # A timestamp's fraction may be rounded.
        slack_s = every_s / 1000
        wide: list[TraceRow] = []
        for row, after in pairwise(rows):
            gap_s = after.at_s - row.at_s
            detail = f"{gap_s:g} s, not {every_s:g} s"
            if gap_s > every_s + slack_s:
                self.note(row.line, "the next record is late", "nothing arrives in the gap", detail)
            elif gap_s < every_s - slack_s:
                self.note(row.line, "the next record is early", "its interval ends there", detail)
            wide.append(row._replace(wide_s=min(gap_s, every_s)))
        wide += [row._replace(wide_s=every_s) for row in rows[-1:]]
        return wide

    def _most_common_gap(self, rows: list[TraceRow]) -> float:
        gaps = Counter(round(b.at_s - a.at_s, 3) for a, b in pairwise(rows) if b.at_s > a.at_s)
        if not gaps:
            raise UsageError(
                f"How long the intervals of {self._file} are cannot be told from its records.",
                remedy="Say it, for example every: 5m.",
            )
        return gaps.most_common(1)[0][0]


def check_columns(used: Iterable[str], known: Sequence[str], path: Path) -> None:
    """UsageError where a column that is asked for is not there, or is there twice."""
    for name in used:
        times = known.count(name)
        if times == 1:
            continue
        fault = "has no column" if not times else f"has {times} columns called"
        raise UsageError(
            f"The trace {path} {fault} {name!r}.",
            remedy=f"Its columns are: {list_names(known)}.",
        )


def list_names(names: Sequence[str]) -> str:
    """The first of them, where there are many."""
    clear = (name if name.isprintable() and len(name) <= 40 else shown(name) for name in names)
    few = ", ".join(islice(clear, _MOST_SHOWN))
    return f"{few} and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else few


def skip_blank_lines(
    numbered: Iterable[tuple[int, str]], path: Path, odd: list[Anomaly]
) -> Iterable[tuple[int, str]]:
    """Blank lines taken out: those between records are odd, those at the end are not."""
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
    """All records of one file that are odd in the same way."""

    file: str
    what: str
    done: str
    count: int
    first_line: int


def summarize(odds: Iterable[Anomaly]) -> tuple[AnomalyKind, ...]:
    """The kinds, file by file, the most frequent first."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for odd in odds:
        found.setdefault((odd.file, odd.what, odd.done), []).append(odd.line)
    kinds = [AnomalyKind(*key, len(at), min(at)) for key, at in found.items()]
    return tuple(sorted(kinds, key=lambda kind: (kind.file, -kind.count, kind.first_line)))


def describe(odd: Anomaly) -> str:
    """One sentence with its place."""
    detail = f" ({odd.detail})" if odd.detail else ""
    return f"{odd.file}:{odd.line}: {odd.what}{detail}: {odd.done}"
