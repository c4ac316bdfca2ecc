"""Drawn arrivals, which have the declared rate of each hour and the burstiness of their kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from math import inf, sqrt
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.scenarios.model.arrivals import (
    DAY_S,
    HOUR_S,
    FixedTimes,
    MonthEnd,
    OnOff,
    Poisson,
    Profile,
    Ramp,
    Step,
    count_working_days,
    parse_week_time_s,
    split_by_hour,
)
from batchlab.scenarios.model.values import Source
from tests.support.properties import PROPERTY
from tests.support.scenarios.burstiness import cv2, gaps

DAILY = tuple(float(hour) for hour in range(24))
WEEKLY = (1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0)
ONE_OF_EACH: list[Source] = [
    Poisson(template="j", per_hour=60, from_s=1000.0, until_s=50_000.0),
    OnOff(template="j", per_hour=100, on_s=600, off_s=1200, from_s=1000.0, until_s=50_000.0),
    Profile(template="j", daily=DAILY, per_hour=60, from_s=1000.0, until_s=50_000.0),
    MonthEnd(template="j", per_hour=60, begins=date(2026, 1, 30), from_s=1e3, until_s=5e4),
    Step(template="j", per_hour=5, steps=((20_000.0, 100.0),), from_s=1000.0, until_s=50_000.0),
    Ramp(template="j", per_hour=0, to_per_hour=100, from_s=1000.0, until_s=50_000.0),
]


def times(source: Source, seed: int = 1) -> list[float]:
    return [arrival.at_s for arrival in source.arrivals(Random(seed))]


def near(count: float, expected: float) -> bool:
    """Return whether a count is within four standard deviations of a Poisson count."""
    return abs(count - expected) <= 4 * sqrt(expected) + 1e-9


def by_hour(moments: Sequence[float]) -> Counter[int]:
    return Counter(int(at // HOUR_S) for at in moments)


@pytest.mark.parametrize("source", ONE_OF_EACH, ids=lambda one: type(one).__name__)
def test_all_are_in_order_in_their_span_and_repeat(source: Source) -> None:
    found = times(source)
    assert len(found) > 100
    assert found == sorted(found) == times(source)
    assert found != times(source, seed=2)
    assert found[0] >= 1000
    assert found[-1] < 50_000
    assert not list(source.odd())
    assert {arrival.template for arrival in source.arrivals(Random(1))} == {"j"}


@pytest.mark.parametrize("source", ONE_OF_EACH, ids=lambda one: type(one).__name__)
def test_compressed_they_are_the_same_and_sooner(source: Source) -> None:
    fast = times(source.compress(3.0).compress(20.0))
    assert fast == pytest.approx([at / 60 for at in times(source)])


def test_poisson_has_its_rate_and_no_memory() -> None:
    found = times(Poisson(template="j", per_hour=100, until_s=400 * HOUR_S))
    assert near(len(found), 40_000)
    assert cv2(gaps(found)) == pytest.approx(1.0, abs=0.05)
    busy = by_hour(found)
    counts = [busy[hour] for hour in range(400)]
    # The variance of a Poisson count is its mean. The variance of 400 counts is known to 7%.
    assert cv2(counts) * 100 == pytest.approx(1.0, abs=0.28)


def test_on_and_off_is_burstier_than_poisson_at_the_same_mean() -> None:
    source = OnOff(template="j", per_hour=100, on_s=900, off_s=2700, until_s=4000 * HOUR_S)
    found = times(source)
    # Each hour has about one period of either kind, so the share of busy time is known to about 3%.
    assert len(found) / 4000 == pytest.approx(25, rel=0.08)
    # The formula is for an interrupted Poisson process (Kuczura 1973): 1 + 2·rate·r_on/(r_on + r_off)², in hours.
    assert cv2(gaps(found)) == pytest.approx(1 + 2 * 100 * 4 / (4 + 4 / 3) ** 2, rel=0.12)


def test_on_off_arrivals_keep_their_hours() -> None:
    source = OnOff(
        template="j", per_hour=600, idle_per_hour=60, on_s=HOUR_S, off_s=3 * HOUR_S, regular=True, until_s=400 * HOUR_S
    )
    counts = by_hour(times(source))
    busy = sum(count for hour, count in counts.items() if hour % 4 == 0)
    assert near(busy, 60_000)
    assert near(counts.total() - busy, 18_000)


def test_a_daily_profile_has_its_rate_in_every_hour_of_the_day() -> None:
    daily = tuple(10.0 * hour for hour in range(24))
    found = times(Profile(template="j", daily=daily, until_s=50 * DAY_S))
    counts = Counter(hour % 24 for hour in by_hour(found).elements())
    assert counts[0] == 0
    assert all(near(counts[hour], 50 * 10 * hour) for hour in range(24))


def test_a_weekly_profile_has_its_factor_on_every_day() -> None:
    source = Profile(
        template="j", daily=(10.0,) * 24, weekly=WEEKLY, begins_s=parse_week_time_s("wed"), until_s=20 * 7 * DAY_S
    )
    days = Counter(int(at // DAY_S + 2) % 7 for at in times(source))
    assert days[6] == 0
    assert all(near(days[day], 20 * 240 * WEEKLY[day]) for day in range(7))


def test_a_profile_of_weights_has_its_mean_over_a_week() -> None:
    source = Profile(template="j", daily=DAILY, weekly=WEEKLY, per_hour=50, until_s=30 * 7 * DAY_S)
    assert near(len(times(source)), 50 * 24 * 7 * 30)


def test_a_profile_may_begin_within_an_hour() -> None:
    daily = (0.0,) * 7 + (6000.0,) + (0.0,) * 16
    source = Profile(template="j", daily=daily, begins_s=parse_week_time_s("mon 06:30"), until_s=DAY_S)
    found = times(source)
    assert near(len(found), 6000)
    assert 1800 <= found[0] <= 1810
    assert 5390 <= found[-1] < 5400


def test_month_end_is_the_last_working_days() -> None:
    """January 2026 ends on a Saturday, so its last working days are Friday 30, 29, and 28."""
    source = MonthEnd(
        template="j",
        per_hour=100,
        begins=date(2026, 1, 26),
        until_s=8 * DAY_S,
        last=(6.0, 4.0, 2.0),
        first=(3.0,),
        off=0.1,
    )
    counts = Counter(int(at // DAY_S) for at in times(source))
    expected = (1.0, 1.0, 2.0, 4.0, 6.0, 0.1, 0.1, 3.0)
    assert all(near(counts[day], 2400 * factor) for day, factor in enumerate(expected))


def test_month_end_arrivals_respect_holidays_and_hours() -> None:
    """Thursday 31 December is the last working day, and the next one is Monday 4 January."""
    office = tuple(1.0 if 8 <= hour < 18 else 0.0 for hour in range(24))
    source = MonthEnd(
        template="j",
        per_hour=100,
        begins=date(2026, 12, 31),
        until_s=6 * DAY_S,
        holidays=frozenset({date(2027, 1, 1)}),
        daily=office,
    )
    counts = by_hour(times(source))
    assert {hour % 24 for hour in counts} == set(range(8, 18))
    days = Counter(hour // 24 for hour in counts.elements())
    assert all(near(days[day], n) for day, n in enumerate((14_400, 240, 240, 240, 7200, 2400)))


def test_a_step_changes_the_rate_at_its_moment() -> None:
    source = Step(
        template="j",
        per_hour=0,
        steps=((10 * HOUR_S, 1000.0), (20 * HOUR_S, 100.0), (90 * HOUR_S, 7.0)),
        until_s=40 * HOUR_S,
    )
    found = times(source)
    assert 10 * HOUR_S <= found[0] < 10.1 * HOUR_S
    assert near(sum(at < 20 * HOUR_S for at in found), 10_000)
    assert near(sum(at >= 20 * HOUR_S for at in found), 2000)
    late = Step(template="j", per_hour=50, steps=((HOUR_S, 900.0),), from_s=DAY_S, until_s=2 * DAY_S)
    assert near(len(times(late)), 24 * 900)


@pytest.mark.parametrize(("first", "last"), [(0.0, 400.0), (400.0, 0.0), (100.0, 300.0)])
def test_a_ramp_grows_evenly(first: float, last: float) -> None:
    found = times(Ramp(template="j", per_hour=first, to_per_hour=last, until_s=100 * HOUR_S))
    assert near(len(found), 20_000)
    for quarter in range(4):
        rate = first + (last - first) * (quarter + 0.5) / 4
        within = sum(quarter * 25 <= at / HOUR_S < (quarter + 1) * 25 for at in found)
        assert near(within, 25 * rate)


def test_at_is_exact() -> None:
    source = FixedTimes(template="j", moments=((3600.0, 2), (0.0, 1), (7200.0, 0)))
    assert times(source) == [0.0, 3600.0, 3600.0]
    assert times(source.compress(60)) == [0.0, 60.0, 60.0]


@PROPERTY
@given(st.floats(0, 3e6), st.floats(1, 3e5), st.floats(0, 7e5))
def test_hours_tile_the_span(from_s: float, length_s: float, offset_s: float) -> None:
    tiles = list(split_by_hour(from_s, from_s + length_s, offset_s))
    assert tiles[0][0] == from_s
    assert tiles[-1][1] == from_s + length_s
    for (_, end, hour), (start, _, after) in pairwise(tiles):
        assert end == start
        assert after == hour + 1
    for start, end, hour in tiles:
        middle = ((start + end) / 2 + offset_s) / HOUR_S
        assert hour + 0.5 == pytest.approx(middle, abs=0.5001)


def test_times_of_the_week() -> None:
    assert parse_week_time_s("Monday") == 0
    assert parse_week_time_s("tue 06:30") == DAY_S + 6.5 * HOUR_S
    assert parse_week_time_s(" SUN 23:59 ") == 7 * DAY_S - 60
    for wrong in ("", "someday", "mon 24:00", "mon 6", "tues"):
        with pytest.raises(ValueError, match="not a time of the week"):
            parse_week_time_s(wrong)


def test_working_days() -> None:
    assert count_working_days(date(2026, 1, 30), 1) == 0
    assert count_working_days(date(2026, 1, 26), 1) == 4
    assert count_working_days(date(2026, 1, 26), 1, {date(2026, 1, 30)}) == 3
    assert count_working_days(date(2026, 2, 2), -1) == 0
    assert count_working_days(date(2026, 2, 10), -1) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(template="j", per_hour=-1, until_s=10.0), "a rate must be"),
        (lambda: Poisson(template="j", per_hour=1, from_s=10.0, until_s=10.0), "must be after"),
        (lambda: Poisson(template="j", per_hour=1, until_s=inf), "must be after"),
        (lambda: OnOff(template="j", per_hour=1, on_s=0, off_s=1, until_s=9.0), "above 0"),
        (lambda: Profile(template="j", daily=(1.0,), until_s=9.0), "24 hours and 7 days"),
        (lambda: Profile(template="j", daily=(0.0,) * 24, per_hour=1, until_s=9.0), "zeros alone"),
        (lambda: Profile(template="j", daily=DAILY, begins_s=-1, until_s=9.0), "cannot begin"),
        (
            lambda: MonthEnd(template="j", per_hour=1, begins=date(2026, 1, 1), daily=(), until_s=9.0),
            "must be 24 numbers",
        ),
        (lambda: Step(template="j", per_hour=1, steps=((2.0, 1.0), (1.0, 1.0)), until_s=9.0), "in order of time"),
        (lambda: FixedTimes(template="j", moments=((-1.0, 1),)), "before the beginning"),
        (lambda: FixedTimes(template="j", moments=((1.0, -1),)), "arrive -1 times"),
    ],
)
def test_invalid_arrival_process_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
