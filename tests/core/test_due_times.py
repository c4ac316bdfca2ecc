"""Due times of cron expressions, compared with a minute-by-minute walk over the calendar."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.core import due_times
from batchlab.core.errors import UsageError

CHANGES = [
    ("Europe/Berlin", "2026-03-29T00:00"),
    ("Europe/Berlin", "2026-10-25T00:00"),
    ("America/New_York", "2026-03-08T06:00"),
    ("America/New_York", "2026-11-01T05:00"),
    ("Australia/Lord_Howe", "2026-10-03T15:00"),
    ("Australia/Lord_Howe", "2026-04-04T14:30"),
    ("Africa/Casablanca", "2026-02-15T02:00"),
    ("UTC", "2026-02-28T23:00"),
]
"""Time zones, and the approximate times of their clock changes. UTC does not have clock changes."""

minutes = st.sampled_from(["*", "*/5", "*/7", "0", "30", "15,45", "10-20", "59"])
hours = st.sampled_from(["*", "*/2", "*/3", "1", "2", "3", "0,2", "1-3"])


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def between(cron: str, zone: str, after_s: float, until_s: float) -> list[float]:
    found = []
    for due_s in due_times.due_times(cron, ZoneInfo(zone), after_s):
        if due_s > until_s:
            break
        found.append(due_s)
    return found


def walked(cron: str, zone: str, after_s: float, until_s: float) -> list[float]:
    """Return the minutes in a range whose local time matches the cron expression."""
    fields = CronSim(cron, datetime(2020, 1, 1, tzinfo=UTC))
    found, tz = [], ZoneInfo(zone)
    moment_s = after_s + 60
    while moment_s <= until_s:
        local = datetime.fromtimestamp(moment_s, tz)
        if local.minute in fields.minutes and local.hour in fields.hours:
            found.append(moment_s)
        moment_s += 60
    return found


@settings(max_examples=80, deadline=None)
@given(minute=minutes, hour=hours, change=st.sampled_from(CHANGES))
def test_clock_schedules_are_due_at_each_matching_time(minute: str, hour: str, change: tuple[str, str]) -> None:
    if not (minute.startswith("*") or hour.startswith("*")):
        minute = "*/5"
    zone, middle = change
    after_s, until_s = at(middle) - 4 * 3600, at(middle) + 6 * 3600
    cron = f"{minute} {hour} * * *"
    assert between(cron, zone, after_s, until_s) == walked(cron, zone, after_s, until_s)


@settings(max_examples=80, deadline=None)
@given(
    minute=st.sampled_from(["0", "30", "15,45", "10-20", "59"]),
    hour=st.sampled_from(["1", "2", "3", "0,2", "1-3"]),
    change=st.sampled_from(CHANGES),
)
def test_fixed_times_are_due_once_a_day(minute: str, hour: str, change: tuple[str, str]) -> None:
    zone, middle = change
    begin = datetime.fromtimestamp(at(middle), ZoneInfo(zone)).replace(hour=0, minute=0)
    after_s = begin.timestamp() - 60
    until_s = after_s + 3 * 86_400
    cron = f"{minute} {hour} * * *"
    found = between(cron, zone, after_s, until_s)
    local = [datetime.fromtimestamp(one, ZoneInfo(zone)).replace(tzinfo=None) for one in found]
    assert len(set(local)) == len(local)
    fits = {datetime.fromtimestamp(one, ZoneInfo(zone)) for one in walked(cron, zone, after_s, until_s)}
    there = {fit.replace(tzinfo=None) for fit in fits}
    # The test checks all due times, and the first minute after a skipped time.
    assert there <= set(local)
    for one in set(local) - there:
        before = datetime.fromtimestamp(found[local.index(one)] - 60, ZoneInfo(zone))
        assert before.utcoffset() != datetime.fromtimestamp(found[local.index(one)], ZoneInfo(zone)).utcoffset()


@settings(max_examples=80, deadline=None)
@given(minute=minutes, hour=hours, change=st.sampled_from(CHANGES), off_s=st.integers(-6 * 3600, 6 * 3600))
def test_due_times_do_not_depend_on_the_current_time(
    minute: str, hour: str, change: tuple[str, str], off_s: int
) -> None:
    zone, middle = change
    cron = f"{minute} {hour} * * *"
    from_s, until_s = at(middle) - 86_400, at(middle) + 86_400
    whole = between(cron, zone, from_s, until_s)
    seen_s = at(middle) + off_s
    assert between(cron, zone, seen_s, until_s) == [one for one in whole if one > seen_s]
    last, more = due_times.latest(cron, ZoneInfo(zone), from_s, seen_s, 7)
    earlier = [one for one in whole if one <= seen_s]
    assert last == earlier[-7:]
    assert more == (len(earlier) > 7)


def test_a_year_of_minutes_is_not_walked_through() -> None:
    until_s = at("2026-06-01T00:00")
    found, more = due_times.latest("* * * * *", ZoneInfo("UTC"), 0.0, until_s, 100)
    assert more
    assert found == [until_s - 60 * back for back in range(99, -1, -1)]
    (first,) = islice(due_times.due_times("0 0 29 2 *", ZoneInfo("Europe/Berlin"), until_s), 1)
    assert due_times.iso(first) == "2028-02-28T23:00:00Z"


@pytest.mark.parametrize(
    ("cron", "days"),
    [
        ("0 6 L * *", ["2026-12-31", "2027-01-31", "2027-02-28"]),
        ("0 6 LW * *", ["2026-12-31", "2027-01-29", "2027-02-26"]),
        ("0 6 * * 5L", ["2026-12-25", "2027-01-29", "2027-02-26"]),
    ],
)
def test_the_end_of_a_month_as_docs_have_it(cron: str, days: list[str]) -> None:
    """31 January and 28 February 2027 are Sundays."""
    found = between(cron, "UTC", at("2026-12-01"), at("2027-03-01"))
    assert [due_times.iso(one)[:10] for one in found] == days


@pytest.mark.parametrize(
    ("cron", "zone", "told"),
    [
        ("* * * *", "UTC", "has 4 fields, not 5"),
        ("0 * * * * *", "UTC", "has 6 fields, not 5"),
        ("", "UTC", "has 0 fields"),
        ("61 * * * *", "UTC", "Bad minute"),
        ("* * * * FOO", "UTC", "Bad day-of-week"),
        ("0 0 30 2 *", "UTC", "Bad day-of-month"),
        ("@daily", "UTC", "has 1 field, not 5"),
        ("*/0 * * * *", "UTC", "Bad minute"),
        ("0 0 * * " + "1," * 200 + "1", "UTC", "at most 200 characters"),
        ("* * * * *", "Europe/Nowhere", "time zone 'Europe/Nowhere' does not exist"),
        ("* * * * *", "../../etc/passwd", "does not exist"),
        ("* * * * *", "Europe", "does not exist"),
        ("* * * * *", "", "does not exist"),
    ],
)
def test_invalid_due_time_is_a_clear_error(cron: str, zone: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        due_times.check(cron, zone)
    assert told in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("local", "zone", "utc"),
    [
        ("2026-03-29T02:30", "Europe/Berlin", "2026-03-29T01:00:00Z"),
        ("2026-10-25T02:30", "Europe/Berlin", "2026-10-25T00:30:00Z"),
        ("2026-10-04T02:10:30", "Australia/Lord_Howe", "2026-10-03T15:30:00Z"),
        ("2026-07-01T12:00:07", "Europe/Berlin", "2026-07-01T10:00:07Z"),
    ],
)
def test_a_local_time_is_taken_as_cron_takes_it(local: str, zone: str, utc: str) -> None:
    assert due_times.iso(due_times.of_local(datetime.fromisoformat(local), ZoneInfo(zone))) == utc
