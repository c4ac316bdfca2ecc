"""Source of arrivals from a trace.

The trace's first job, or the job `from_s` seconds after the first job, arrives at `starts_s`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from math import floor, isfinite
from pathlib import Path
from random import Random
from typing import Self

from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Anomaly, Arrival
from batchlab.scenarios.traces import formats
from batchlab.scenarios.traces.rows import (
    RECORD_COLUMNS,
    SWF_COLUMNS,
    Columns,
    TimestampKind,
    TraceContent,
    TraceRow,
    describe,
)


class TraceFormat(StrEnum):
    SWF = "swf"
    TABLE = "table"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Arrivals from the trace at `path`, as jobs of `template`.

    If `template` is empty, each record names its template. If `columns` is omitted, the columns of the format apply
    (`SWF_COLUMNS` or `RECORD_COLUMNS`). A table always needs `columns`. `names` and `delimiter` apply only to tables.
    The source uses the records from `from_s` until `until_s` seconds after the trace's first job, up to `limit` jobs.
    `speed` is the factor by which the scenario was compressed.
    """

    template: str
    path: Path
    format: TraceFormat
    columns: Columns | None = None
    names: tuple[str, ...] = ()
    delimiter: str = ""
    from_s: float = 0.0
    until_s: float | None = None
    limit: int | None = None
    starts_s: float = 0.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        until_s = float("inf") if self.until_s is None else self.until_s
        if not (0 <= self.from_s < until_s and isfinite(self.from_s)):
            raise ValueError(
                f"from ({self.from_s:g} s) must not be negative, and until ({until_s:g} s) must be after from"
            )
        if not (isfinite(self.starts_s) and self.starts_s >= 0):
            raise ValueError(f"a trace cannot start {self.starts_s:g} s into the scenario")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"a limit of {self.limit} leaves nothing of a trace")
        if self.columns is None and self.format is TraceFormat.TABLE:
            raise ValueError("a table needs a map of its columns")
        if not self.template and not self._map().template:
            raise ValueError("neither the arrival nor a column names the job")

    def arrivals(self, random: Random) -> Iterator[Arrival]:
        """Yield the arrivals. Raise UsageError if the trace cannot be read or does not have a valid record."""
        reading = self.reading()
        if not reading.rows:
            raise self._useless(reading)
        sent = 0
        for at_s, row in self._place(reading.rows, random):
            if self.until_s is not None and at_s >= self.until_s:
                return
            if at_s < self.from_s:
                continue
            if sent == self.limit:
                return
            sent += 1
            yield Arrival(
                (at_s - self.from_s + self.starts_s) / self.speed,
                self.template or row.template,
                row.tasks,
                None if row.task_s is None else row.task_s / self.speed,
                row.label,
                row.tenant,
            )

    def odd(self) -> tuple[Anomaly, ...]:
        """Return the problems of the whole trace, even if the source uses only a part of the trace."""
        return self.reading().odd

    def begins(self) -> str:
        """Return the time at second 0 of the scenario in ISO 8601.

        The time has a zone only if the trace has zones. Return "" if the times of the trace are numbers.
        """
        reading = self.reading()
        if not reading.rows or reading.kind not in (TimestampKind.ZONED, TimestampKind.LOCAL):
            return ""
        at_s = round(reading.rows[0].at_s + self.from_s - self.starts_s)
        try:
            moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
        except OverflowError:
            return ""
        text = moment.replace(tzinfo=None).isoformat()
        return f"{text}Z" if reading.kind is TimestampKind.ZONED else text

    def compress(self, factor: float) -> Self:
        return replace(self, speed=self.speed * factor)

    def reading(self) -> TraceContent:
        """Read the whole trace. Raise UsageError if the trace cannot be read."""
        stamp = (0, 0)
        with suppress(OSError):
            state = self.path.stat()
            stamp = (state.st_mtime_ns, state.st_size)
        columns = replace(self._map(), template="") if self.template else self._map()
        return _read_cached(self.path, self.format, columns, self.names, self.delimiter, stamp)

    def _useless(self, content: TraceContent) -> UsageError:
        if not content.records:
            return UsageError(f"The trace {self.path} has no records.", remedy="Name a file with records.")
        remedy = "Check its format and the map of its columns."
        if any(anomaly.what == f"{self._map().at} is not a time" for anomaly in content.odd):
            remedy += (
                ' A date that is not like 2026-10-31 18:05:00 needs its format, such as unit: "%d.%m.%Y %H:%M:%S".'
            )
        first = f" The first problem is: {describe(content.odd[0])}." if content.odd else ""
        return UsageError(
            f"None of the {content.records:,} records of the trace {self.path} can be used.{first}", remedy=remedy
        )

    def _map(self) -> Columns:
        return self.columns or (RECORD_COLUMNS if self.format is TraceFormat.JSONL else SWF_COLUMNS)

    def _place(self, rows: tuple[TraceRow, ...], random: Random) -> Iterator[tuple[float, TraceRow]]:
        begin_s = rows[0].at_s
        scale = self._map().scale
        total, sent = 0.0, 0
        for row in rows:
            if row.wide_s is None:
                yield row.at_s - begin_s, row
                continue
            # Fractions of jobs are carried over to the next row, so that the total number of jobs is right for small
            # scales.
            total += row.jobs * scale
            due = floor(total + 1e-9) - sent
            sent += due
            for moment_s in _random_times(due, row.wide_s, random):
                yield row.at_s - begin_s + moment_s, row


def _random_times(count: int, wide_s: float, random: Random) -> Iterator[float]:
    """Yield `count` uniform random times within `wide_s` seconds, in order of time. The function does not store the
    times.

    The largest of k uniform random numbers has the same distribution as the k-th root of one uniform random number.
    """
    rest = 1.0
    for k in range(count, 0, -1):
        rest *= random.random() ** (1 / k)
        yield wide_s * (1 - rest)


@lru_cache(maxsize=4)
def _read_cached(
    path: Path,
    form: TraceFormat,
    columns: Columns,
    names: tuple[str, ...],
    delimiter: str,
    stamp: tuple[int, int],  # noqa: ARG001 - a file that has changed is read again
) -> TraceContent:
    if form is TraceFormat.SWF:
        return formats.read_swf(path, columns)
    if form is TraceFormat.JSONL:
        return formats.read_jsonl(path, columns)
    return formats.read_table(path, columns, names=names, delimiter=delimiter)
