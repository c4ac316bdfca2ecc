"""Hours, weekdays, and the working days around a month's end.

Calendar days have 24 hours: a scenario knows no clock change.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from datetime import date, timedelta

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEEK_FORMS = "monday, tue, or monday 06:30"

_WEEK = re.compile(r"\s*([a-z]{3,9})(?:\s+(\d{1,2}):(\d{2}))?\s*", re.IGNORECASE)


def week_s(text: str) -> float:
    """Seconds from Monday 00:00 of a time such as `tue 06:30`; ValueError where it is none."""
    if match := _WEEK.fullmatch(text):
        name, hour, minute = match.groups(default="0")
        found = [i for i, day in enumerate(WEEKDAYS) if name.lower() in (day, day[:3])]
        if found and int(hour) < 24 and int(minute) < 60:
            return found[0] * DAY_S + int(hour) * HOUR_S + int(minute) * 60.0
    raise ValueError(f"{text!r} is not a time of the week ({WEEK_FORMS})")


def hours(
    from_s: float, until_s: float, offset_s: float = 0.0
) -> Iterator[tuple[float, float, int]]:
    """The span from `from_s` until `until_s` cut at every full hour: (start, end, hour).

    Hour 0 begins `offset_s` before the time 0, which is so the time of day or week at 0.
    """
    hour = int((from_s + offset_s) // HOUR_S)
    start_s = from_s
    while start_s < until_s:
        hour += 1
        end_s = min(hour * HOUR_S - offset_s, until_s)
        if end_s > start_s:
            yield start_s, end_s, hour - 1
            start_s = end_s


def is_working_day(day: date, holidays: Container[date] = ()) -> bool:
    """Monday to Friday, and no holiday."""
    return day.weekday() < 5 and day not in holidays


def working_days_left(day: date, holidays: Container[date] = ()) -> int:
    """Working days after `day` in its month; 0 on the last one."""
    return _working_days(day, 1, holidays)


def working_days_gone(day: date, holidays: Container[date] = ()) -> int:
    """Working days before `day` in its month; 0 on the first one."""
    return _working_days(day, -1, holidays)


def _working_days(day: date, step: int, holidays: Container[date]) -> int:
    found = 0
    other = day + timedelta(step)
    while other.month == day.month:
        found += is_working_day(other, holidays)
        other += timedelta(step)
    return found
