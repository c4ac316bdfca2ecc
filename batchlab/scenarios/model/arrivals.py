"""Synthetic arrival processes with constant rates, bursts, daily and monthly profiles, steps, and ramps.

All sources except `FixedTimes` are Poisson processes with a variable rate. The event times of a process with rate one
are mapped through the integral of the variable rate (Cinlar 1975), so the draw is exact. Rates are in jobs per hour,
and times are in seconds from the start of the scenario. A day in a profile always has 24 hours.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from math import isfinite, sqrt
from random import Random
from typing import Self

from batchlab.scenarios.model.values import Anomaly, Arrival

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEEK_FORMS = "monday, tue, or monday 06:30"

_WEEK = re.compile(r"\s*([a-z]{3,9})(?:\s+(\d{1,2}):(\d{2}))?\s*", re.IGNORECASE)


def parse_week_time_s(text: str) -> float:
    """Return the seconds from Monday 00:00 to a time such as `tue 06:30`.

    Raise ValueError if the text does not have the format `tue 06:30`.
    """
    if match := _WEEK.fullmatch(text):
        name, hour, minute = match.groups(default="0")
        days = [i for i, day in enumerate(WEEKDAYS) if name.lower() in (day, day[:3])]
        if days and int(hour) < 24 and int(minute) < 60:
            return days[0] * DAY_S + int(hour) * HOUR_S + int(minute) * 60.0
    raise ValueError(f"{text!r} is not a time of the week ({WEEK_FORMS})")


def split_by_hour(from_s: float, until_s: float, offset_s: float = 0.0) -> Iterator[tuple[float, float, int]]:
    """Split the time span at every full hour into (start, end, hour).

    Hour 0 begins `offset_s` seconds before time 0.
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
    """Return whether the day is a weekday and not a holiday."""
    return day.weekday() < 5 and day not in holidays


def count_working_days(day: date, step: int, holidays: Container[date] = ()) -> int:
    """Count the working days after `day` in the month of `day`, or the working days before `day` if `step` is -1."""
    count = 0
    other = day + timedelta(step)
    while other.month == day.month:
        count += is_working_day(other, holidays)
        other += timedelta(step)
    return count


MAX_JOBS = 1_000_000
"""Maximum number of jobs, because a scenario with more jobs is probably a mistake."""
MAX_BURSTS = 1_000_000
"""Maximum number of bursts, because a source with more bursts is probably a mistake."""

Segment = tuple[float, float, float, float]
"""Segment of a rate: start, end, hourly rate at the start, and hourly rate at the end.

The rate is linear within a segment.
"""


def _poisson_times(segments: Iterable[Segment], random: Random) -> Iterator[float]:
    due = random.expovariate(1.0)
    for start_s, end_s, first, last in segments:
        length_s, first_s, last_s = end_s - start_s, first / HOUR_S, last / HOUR_S
        area = length_s * (first_s + last_s) / 2
        slope = (last_s - first_s) / length_s if length_s > 0 else 0.0
        while due < area:
            # The formula is the root of first·x + slope·x²/2 = due, in a form that is numerically stable for all
            # slopes.
            rate_s = sqrt(max(first_s**2 + 2 * slope * due, 0.0))
            moment_s = start_s + 2 * due / (first_s + rate_s)
            if moment_s >= end_s:
                break
            yield moment_s
            due += random.expovariate(1.0)
        # `max` keeps the difference at 0 or above, because rounding errors could make the difference negative.
        due = max(due - area, 0.0)


def _likely_minimum(mean: float) -> float:
    """Return the value that is six standard deviations below the mean of a Poisson variable."""
    return max(0.0, mean - 6 * sqrt(mean))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PoissonProcess(ABC):
    """Base class of arrival sources that are Poisson processes with a variable rate."""

    template: str
    from_s: float = 0.0
    until_s: float
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.from_s < self.until_s and isfinite(self.until_s)):
            raise ValueError(
                f"from ({self.from_s:g} s) must not be negative, and until ({self.until_s:g} s) must be after from"
            )
        for rate in self.numbers():
            if not (isfinite(rate) and rate >= 0):
                raise ValueError(f"a rate must be a number of at least 0, not {rate}")

    @abstractmethod
    def numbers(self) -> Iterable[float]:
        """Return all rates and factors of the process. Negative rates and factors are invalid."""

    @abstractmethod
    def segments(self, random: Random) -> Iterable[Segment]:
        """Return the arrival rate as consecutive segments of time."""

    def arrivals(self, random: Random) -> Iterator[Arrival]:
        for moment_s in _poisson_times(self.segments(random), random):
            yield Arrival(moment_s / self.speed, self.template)

    def at_least(self) -> float:
        """Return a lower bound of the number of jobs.

        The number of jobs is below the bound with a probability of one in a billion.
        """
        segments = self.segments(Random(0))  # noqa: S311 - these rates are not random
        return _likely_minimum(sum((end - start) * (first + last) / 2 for start, end, first, last in segments) / HOUR_S)

    def odd(self) -> tuple[Anomaly, ...]:
        return ()

    def compress(self, factor: float) -> Self:
        return replace(self, speed=self.speed * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson(_PoissonProcess):
    """Arrival process with independent arrivals and a constant mean rate."""

    per_hour: float

    def numbers(self) -> Iterable[float]:
        return (self.per_hour,)

    def segments(self, random: Random) -> Iterable[Segment]:  # noqa: ARG002
        return ((self.from_s, self.until_s, self.per_hour, self.per_hour),)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOff(_PoissonProcess):
    """Arrival process with bursts.

    The rate is `per_hour` in on periods and `idle_per_hour` in off periods, and the first period is an on period.
    Periods last `on_s` and `off_s` seconds on average and are exponentially distributed. With `regular`, each period
    has exactly the average length.
    """

    per_hour: float
    on_s: float
    off_s: float
    idle_per_hour: float = 0.0
    regular: bool = False

    def numbers(self) -> Iterable[float]:
        return self.per_hour, self.idle_per_hour

    def __post_init__(self) -> None:
        # super() does not work in a dataclass with slots, because the decorator creates a new class.
        _PoissonProcess.__post_init__(self)
        for length_s in (self.on_s, self.off_s):
            if not (isfinite(length_s) and length_s > 0):
                raise ValueError(f"on and off must be durations above 0, not {length_s}")
        if self.until_s - self.from_s > MAX_BURSTS * (self.on_s + self.off_s):
            raise ValueError(f"there would be more than {MAX_BURSTS:,} bursts until then")

    def at_least(self) -> float:
        least = min(self.per_hour, self.idle_per_hour)
        return _likely_minimum((self.until_s - self.from_s) * least / HOUR_S)

    def segments(self, random: Random) -> Iterator[Segment]:
        start_s, is_on = self.from_s, True
        while start_s < self.until_s:
            length_s = self.on_s if is_on else self.off_s
            if not self.regular:
                length_s = random.expovariate(1 / length_s)
            end_s = min(start_s + length_s, self.until_s)
            rate = self.per_hour if is_on else self.idle_per_hour
            yield start_s, end_s, rate, rate
            start_s, is_on = end_s, not is_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(_PoissonProcess):
    """Arrival process with an hourly and weekly profile.

    `daily` has a rate for each hour of the day, and `weekly` has a factor for each day from Monday. With `per_hour`,
    the values of `daily` and `weekly` are weights, and `per_hour` is the mean rate over a week. `begins_s` is the
    scenario's start in seconds after Monday 00:00.
    """

    daily: tuple[float, ...]
    weekly: tuple[float, ...] = (1.0,) * 7
    per_hour: float | None = None
    begins_s: float = 0.0

    def __post_init__(self) -> None:
        _PoissonProcess.__post_init__(self)
        if len(self.daily) != 24 or len(self.weekly) != 7:
            raise ValueError(f"a profile has 24 hours and 7 days, not {len(self.daily)} and {len(self.weekly)}")
        if not (isfinite(self.begins_s) and self.begins_s >= 0):
            raise ValueError(f"the week cannot begin {self.begins_s} s after Monday 00:00")
        if self.per_hour is not None and not (sum(self.daily) and sum(self.weekly)):
            raise ValueError("a profile of zeros alone cannot have a mean")

    def numbers(self) -> Iterable[float]:
        return (*self.daily, *self.weekly, self.per_hour or 0.0)

    def segments(self, random: Random) -> Iterator[Segment]:  # noqa: ARG002
        scale = 1.0
        if self.per_hour is not None:
            scale = self.per_hour * 24 * 7 / (sum(self.daily) * sum(self.weekly))
        for start_s, end_s, hour in split_by_hour(self.from_s, self.until_s, self.begins_s):
            rate = scale * self.daily[hour % 24] * self.weekly[hour // 24 % 7]
            yield start_s, end_s, rate, rate


@dataclass(frozen=True, slots=True, kw_only=True)
class MonthEnd(_PoissonProcess):
    """Arrival process with a calendar profile.

    The rate is `per_hour` on an ordinary working day, and a multiple of `per_hour` around the turn of a month. `last`
    has the factors of the month's last working days, the last day first. `first` has the factors of the month's first
    working days, and `off` is the factor of weekends and `holidays`. `daily` has weights for the 24 hours of a day. The
    scenario starts on the day `begins` at 00:00.
    """

    per_hour: float
    begins: date
    last: tuple[float, ...] = (6.0, 4.0, 2.0)
    first: tuple[float, ...] = (3.0,)
    off: float = 0.1
    holidays: frozenset[date] = frozenset()
    daily: tuple[float, ...] = (1.0,) * 24

    def __post_init__(self) -> None:
        _PoissonProcess.__post_init__(self)
        if len(self.daily) != 24 or not sum(self.daily):
            raise ValueError("daily must be 24 numbers, not all of them 0")

    def numbers(self) -> Iterable[float]:
        return (self.per_hour, *self.last, *self.first, self.off, *self.daily)

    def factor(self, day: date) -> float:
        """Return the day's rate relative to the rate of an ordinary working day."""
        if not is_working_day(day, self.holidays):
            return self.off
        after = count_working_days(day, 1, self.holidays)
        if after < len(self.last):
            return self.last[after]
        before = count_working_days(day, -1, self.holidays)
        return self.first[before] if before < len(self.first) else 1.0

    def segments(self, random: Random) -> Iterator[Segment]:  # noqa: ARG002
        scale = self.per_hour * 24 / sum(self.daily)
        day, factor = -1, 1.0
        for start_s, end_s, hour in split_by_hour(self.from_s, self.until_s):
            if hour // 24 != day:
                day = hour // 24
                factor = self.factor(self.begins + timedelta(day))
            rate = scale * factor * self.daily[hour % 24]
            yield start_s, end_s, rate, rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(_PoissonProcess):
    """Poisson process with a rate of `per_hour` that changes at the times in `steps`."""

    per_hour: float
    steps: tuple[tuple[float, float], ...]
    """Steps of the arrival rate as pairs of (start time, jobs per hour), in order of time."""

    def __post_init__(self) -> None:
        _PoissonProcess.__post_init__(self)
        moments = [at_s for at_s, _ in self.steps]
        if moments != sorted(moments):
            raise ValueError("steps must be in order of time")

    def numbers(self) -> Iterable[float]:
        return (self.per_hour, *(number for step in self.steps for number in step))

    def segments(self, random: Random) -> Iterator[Segment]:  # noqa: ARG002
        start_s, rate = self.from_s, self.per_hour
        for at_s, after in (*self.steps, (self.until_s, 0.0)):
            end_s = min(at_s, self.until_s)
            if end_s > start_s:
                yield start_s, end_s, rate, rate
                start_s = end_s
            rate = after


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp(_PoissonProcess):
    """Poisson process with a rate that changes linearly from `per_hour` to `to_per_hour`."""

    per_hour: float
    to_per_hour: float

    def numbers(self) -> Iterable[float]:
        return self.per_hour, self.to_per_hour

    def segments(self, random: Random) -> Iterable[Segment]:  # noqa: ARG002
        return ((self.from_s, self.until_s, self.per_hour, self.to_per_hour),)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedTimes:
    """Arrival source with fixed arrival times."""

    template: str
    moments: tuple[tuple[float, int], ...]
    """Arrivals as pairs of (time, number of jobs)."""
    speed: float = 1.0

    def __post_init__(self) -> None:
        for at_s, count in self.moments:
            if not (isfinite(at_s) and at_s >= 0):
                raise ValueError(f"a moment must not be before the beginning, as {at_s:g} s is")
            if count < 0:
                raise ValueError(f"no job can arrive {count} times")

    def at_least(self) -> float:
        return sum(count for _, count in self.moments)

    def arrivals(self, random: Random) -> Iterator[Arrival]:  # noqa: ARG002
        for at_s, count in sorted(self.moments):
            for _ in range(count):
                yield Arrival(at_s / self.speed, self.template)

    def odd(self) -> tuple[Anomaly, ...]:
        return ()

    def compress(self, factor: float) -> Self:
        return replace(self, speed=self.speed * factor)


Synthetic = _PoissonProcess | FixedTimes
"""All types of arrival sources except traces."""
