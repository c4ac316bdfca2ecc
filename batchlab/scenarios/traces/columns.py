"""Which column of a trace says what: the one map that all formats share.

A column is named as the format has it: by the header of a table, by the fields' names of the
Standard Workload Format (see `swf.FIELDS`), by the keys of a JSON object, dotted where nested.

Timestamps as traces write them.
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
    """How a moment was written."""

    NUMBER = "a number"
    ZONED = "a timestamp with a zone"
    LOCAL = "a timestamp without a zone"


class Timestamp(NamedTuple):
    """Seconds on one time line: since 1970, where it was no number."""

    at_s: float
    kind: TimestampKind


def check_unit(unit: str) -> None:
    """ValueError where `unit` is neither one of UNITS nor a format that strptime could read."""
    if unit in UNITS:
        return
    if "%" not in unit:
        raise ValueError(f"the unit must be one of {', '.join(UNITS)} or a time format")
    try:
        # What it writes it must be able to read.
        _strptime(_EPOCH.strftime(unit), unit)
    except (ValueError, re.error) as error:
        why = error if isinstance(error, ValueError) else "a directive is there twice"
        raise ValueError(f"{unit!r} is no format that strptime can read: {why}") from error


def parse_number(value: object) -> float | None:
    """A finite number, from a number or its text; None for anything else."""
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
    """Whether `text` is nothing but numbers with blanks between them, a quick look for most."""
    return _NUMBERS.fullmatch(text) is not None


def parse_timestamp(value: object, unit: str) -> Timestamp | None:
    """A timestamp without a zone is read as UTC, which may be off by its zone. None where `value`
    is no time.

    A number counts in `unit`, a text is ISO 8601 (a space may stand for the T, and a fraction have
    any digits), or what the strptime format `unit` says.
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
        # strptime would take 1900, which has no 29 February, and from Python 3.15 on refuse.
        text, form = f"{_LEAP_YEAR} {text}", f"%Y {form}"
    return datetime.strptime(text, form)  # noqa: DTZ007 - the caller asks for the zone


@dataclass(frozen=True, slots=True)
class ColumnSum:
    """A number of a record: the sum of its `columns`, divided by `per`.

    `Take(("duration_ms",), per=1000)` is seconds; `Take(("input", "shuffle"), per=64 * 2**20)`
    is tasks of 64 MiB each. Where it is not `needed`, a record without any of them is as good.
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
    """What is taken from a record, and from where; what is not, the job's template says.

    `at` is when it arrives, a number or a timestamp; `minus` a column of seconds before that, for
    traces that note when something ended. `unit` is that of a number in `at`, one of
    moments.UNITS, or a format of strptime (with a %) for timestamps that are not ISO 8601.

    With `count` a record is no job but an interval from `at` on, `every_s` long, in which as many
    arrive, times `scale`; None: as long as records are mostly apart.

    `tasks` are a job's root tasks, rounded up, at least one; `task_s` what each of them takes.
    `label`, `tenant` and `template` are columns of text.
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
            raise ValueError("a trace needs a column that says when")
        check_unit(self.unit)
        if self.every_s is not None and not (isfinite(self.every_s) and self.every_s > 0):
            raise ValueError(f"an interval must be longer than 0 s, not {self.every_s}")
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a number above 0, not {self.scale}")

    def used(self) -> tuple[str, ...]:
        """The columns that a trace must have."""
        numbers = (name for take in self._takes() for name in take.columns)
        return _distinct(*self.needed(), *numbers, self.label, self.tenant)

    def needed(self) -> tuple[str, ...]:
        """Those without which a record is of no use."""
        found = [self.at, self.minus, self.count, self.template]
        for take in self._takes():
            found += take.columns if take.needed else ()
        return _distinct(*found)

    def _takes(self) -> tuple[ColumnSum, ...]:
        return tuple(take for take in (self.tasks, self.task_s) if take)


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


SWF_COLUMNS = Columns("submit", task_s=ColumnSum(("run",)), label="job")
"""A job of the log is a job of the scenario, each of its tasks as long as its run time."""

RECORD_COLUMNS = Columns(
    "due_s",
    tasks=ColumnSum(("tasks",), needed=False),
    label="label",
    tenant="tenant",
    template="template",
)
"""The jobs of a record, as a forecast or a replay writes it; lines of one's own may say less."""
