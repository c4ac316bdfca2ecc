"""Column map of a trace, and timestamps.

A column is named as in its format: by a table's header, by a field of the Standard Workload Format
(see formats.SWF_FIELDS), or by a key of a JSON object, with dots for nested objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from math import isfinite
from typing import NamedTuple

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
_NUMBER = re.compile(rf"\s*{_ONE}\s*")
_NUMBERS = re.compile(rf"\s*(?:{_ONE}(?:\s++|\Z))*")
_DIRECTIVE = re.compile("%(.)")
_LEAP_YEAR = 1972


class TimestampKind(Enum):
    """Form of a timestamp."""

    NUMBER = "a number"
    ZONED = "a timestamp with a zone"
    LOCAL = "a timestamp without a zone"


class Timestamp(NamedTuple):
    """Time in seconds. Timestamps count from 1970."""

    at_s: float
    kind: TimestampKind


def check_unit(unit: str) -> None:
    """Raise ValueError unless `unit` is one of UNITS or a strptime format."""
    if unit in UNITS:
        return
    if "%" not in unit:
        raise ValueError(f"the unit must be one of {', '.join(UNITS)} or a time format")
    try:
        # A valid format can parse its own output.
        _strptime(_EPOCH.strftime(unit), unit)
    except (ValueError, re.error) as error:
        why = error if isinstance(error, ValueError) else "it repeats a directive"
        raise ValueError(f"{unit!r} is not a strptime format: {why}") from error


def parse_number(value: object) -> float | None:
    """Return a finite number from a number or a text, or None."""
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
    """Return whether `text` contains only numbers and blanks.

    This check is fast and covers most lines.
    """
    return _NUMBERS.fullmatch(text) is not None


def parse_timestamp(value: object, unit: str) -> Timestamp | None:
    """Parse a timestamp, or return None. A timestamp without a zone is read as UTC.

    A number counts in `unit`. A text is in ISO 8601 (a space may replace the T, and a fraction may
    have any number of digits) or in the strptime format `unit`.
    """
    if unit in UNITS:
        number = parse_number(value)
        if number is not None:
            return Timestamp(number * UNITS[unit], TimestampKind.NUMBER)
    if not isinstance(value, str):
        return None
    try:
        text = value.strip()
        read = datetime.fromisoformat(text) if unit in UNITS else _strptime(text, unit)
    except ValueError:
        return None
    if read.tzinfo is None:
        return Timestamp((read.replace(tzinfo=UTC) - _EPOCH).total_seconds(), TimestampKind.LOCAL)
    return Timestamp((read - _EPOCH).total_seconds(), TimestampKind.ZONED)


def _strptime(text: str, form: str) -> datetime:
    directives = set(_DIRECTIVE.findall(form))
    if "d" in directives and not directives & {"Y", "y", "G"}:
        # strptime assumes 1900, which has no 29 February; Python 3.15 refuses such formats.
        text, form = f"{_LEAP_YEAR} {text}", f"%Y {form}"
    return datetime.strptime(text, form)  # noqa: DTZ007 - the caller asks for the zone


@dataclass(frozen=True, slots=True)
class ColumnSum:
    """Number of a record: the sum of its `columns`, divided by `per`.

    `ColumnSum(("duration_ms",), per=1000)` gives seconds. `ColumnSum(("input", "shuffle"), per=64 *
    2**20)` gives tasks of 64 MiB each. Unless it is `needed`, a record may lack these columns.
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
    """Columns from which each value of a record is read. The job's template has the other values.

    `at` is the arrival time, a number or a timestamp. `minus` is a column of seconds that is
    subtracted from it, for traces that record ends. `unit` is the unit of a number in `at`, one of
    UNITS, or a strptime format (with a %) for timestamps that are not in ISO 8601.

    With `count`, a record is an interval of `every_s` from `at` in which `count` times `scale` jobs
    arrive. Without `every_s`, the most common gap between records is the length.

    `tasks` is the number of a job's root tasks, rounded up to at least one, and `task_s` is the
    time of each. `label`, `tenant`, and `template` are text columns.
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

    def used(self) -> tuple[str, ...]:
        """Return the columns that a trace must have."""
        numbers = (name for take in self._takes() for name in take.columns)
        return _distinct(*self.needed(), *numbers, self.label, self.tenant)

    def needed(self) -> tuple[str, ...]:
        """Return the columns that every record must have."""
        found = [self.at, self.minus, self.count, self.template]
        for take in self._takes():
            found += take.columns if take.needed else ()
        return _distinct(*found)

    def _takes(self) -> tuple[ColumnSum, ...]:
        return tuple(take for take in (self.tasks, self.task_s) if take)


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


SWF_COLUMNS = Columns("submit", task_s=ColumnSum(("run",)), label="job")
"""Each job of the log becomes a job of the scenario, and each of its tasks takes the job's run
time.
"""

RECORD_COLUMNS = Columns(
    "due_s",
    tasks=ColumnSum(("tasks",), needed=False),
    label="label",
    tenant="tenant",
    template="template",
)
"""The jobs of a record of a forecast or a replay. Lines in other files may have fewer fields."""
