"""Cron with five fields, as scheduled actions have it: minute, hour, day of month, month, weekday.

Each field is `*`, a number, a name (JAN, MON), a range, a step or a list of those. Where both days
are given, either will do, as in cron. Sunday is 0 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_FURTHEST_DAYS = 9 * 366
"""29 February may be eight years away."""


@dataclass(frozen=True, slots=True)
class Cron:
    """A parsed expression; `either` says that one of the two days is enough."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either: bool

    def next_after(self, after_s: float, zone: ZoneInfo) -> float | None:
        """The first moment after `after_s` (seconds of the epoch), None where there is none.

        A time of day that the change to summer time leaves out runs an hour later, one that comes
        twice runs the first time.
        """
        day = datetime.fromtimestamp(after_s, zone).date()
        for _ in range(_FURTHEST_DAYS):
            if self._on(day.day, day.month, day.isoweekday() % 7):
                for hour in self.hours:
                    for minute in self.minutes:
                        local = datetime(*(day.year, day.month, day.day, hour, minute), tzinfo=zone)
                        if local.timestamp() > after_s:
                            return local.timestamp()
            day += timedelta(days=1)
        return None

    def _on(self, day: int, month: int, weekday: int) -> bool:
        if month not in self.months:
            return False
        in_days, in_weekdays = day in self.days, weekday in self.weekdays
        return in_days or in_weekdays if self.either else in_days and in_weekdays


@lru_cache(maxsize=256)
def parse(expression: str) -> Cron:
    """ValueError, naming the field, where it is none."""
    fields = expression.split()
    if len(fields) != 5:
        raise ValueError(f"{expression!r} has {len(fields)} fields, not 5")
    minute, hour, day, month, weekday = fields
    weekdays = {one % 7 for one in _field(weekday, 0, 7, WEEKDAYS, 0)}
    return Cron(
        tuple(sorted(_field(minute, 0, 59))),
        tuple(sorted(_field(hour, 0, 23))),
        frozenset(_field(day, 1, 31)),
        frozenset(_field(month, 1, 12, MONTHS, 1)),
        frozenset(weekdays),
        either=not day.startswith("*") and not weekday.startswith("*"),
    )


def _field(text: str, low: int, high: int, names: tuple[str, ...] = (), first: int = 0) -> set[int]:
    def number(word: str) -> int:
        if word.upper() in names:
            return names.index(word.upper()) + first
        if not word.isdigit() or not low <= int(word) <= high:
            raise ValueError(f"{word!r} in {text!r} is not within {low}–{high}")
        return int(word)

    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and (not step.isdigit() or int(step) < 1):
            raise ValueError(f"{step!r} in {text!r} is no step")
        begin, dash, end = span.partition("-")
        if span == "*":
            start, stop = low, high
        elif dash:
            start, stop = number(begin), number(end)
        else:
            start = number(begin)
            stop = high if slash else start
        if stop < start:
            raise ValueError(f"{span!r} in {text!r} goes backwards")
        values |= set(range(start, stop + 1, int(step or 1)))
    return values
