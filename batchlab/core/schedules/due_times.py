"""When a schedule is due: cron with five fields in a time zone, or one moment.

Invariant: the due times of an expression are a function of it and its zone alone, whatever moment
they are looked at from. cron's own rules hold where clocks change: a fixed time of day that is left
out is due at the first minute after, one that comes twice is due the first time; what has `*` as
its minute or hour follows the clock, so it is due twice there, and not at all where there is none.

Cron with five fields: the local times that an expression names, read by cronsim.

This is the only reader of cron expressions. Callers decide what happens to a local time that a
clock change skips or repeats: schedules follow cron (below), scheduled actions follow Auto Scaling
(fleet/scheduled_actions.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from batchlab.core.errors import UsageError
from batchlab.core.text import count

FIELDS = 5


class NeverDue(ValueError):
    """Well formed, but for a day that none of its months has."""


def local_times(expression: str, after: datetime) -> Iterator[datetime]:
    """The times after `after`, in order, naive as it is or in its zone; they end where there is
    none within fifty years. ValueError, naming the field, where it is no expression; NeverDue."""
    from cronsim import CronSim, CronSimError

    fields = expression.split()
    if len(fields) != FIELDS:
        # With a sixth cronsim would take the first for seconds.
        noun = "field" if len(fields) == 1 else "fields"
        raise ValueError(f"it has {len(fields)} {noun}, not {FIELDS}")
    try:
        return iter(CronSim(expression, after))
    except CronSimError as error:
        minute, hour, day, month, weekday = fields
        with suppress(CronSimError):
            CronSim(f"{minute} {hour} {day} * {weekday}", after)
            CronSim(f"{minute} {hour} * {month} {weekday}", after)
            raise NeverDue(str(error)) from error
        raise ValueError(str(error)) from error


_DAY_S = 86_400
_LONGEST = 200
"""Characters of an expression: more is a slip."""
_NEVER = "Write five fields: minute, hour, day of month, month, weekday, such as '0 2 * * 1-5'."
_FIRST_WINDOW_S = 3600.0


@lru_cache(maxsize=256)
def zone_of(name: str) -> ZoneInfo:
    """The IANA time zone of that name; UsageError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # a folder of the database is an OSError
        raise UsageError(
            f"There is no time zone {name!r}.",
            remedy="Write an IANA name such as Europe/Berlin or UTC.",
        ) from error


def check(expression: str, zone: str) -> None:
    """UsageError where it is no cron expression, never due, or the zone is none."""
    known = zone_of(zone)
    fields = len(expression.split())
    if fields != FIELDS:
        raise UsageError(
            f"The cron expression {expression[:60]!r} has {count(fields, 'field')}, not {FIELDS}.",
            remedy=_NEVER,
        )
    if len(expression) > _LONGEST:
        raise UsageError(
            f"A cron expression has at most {_LONGEST} characters.",
            remedy="Write ranges and steps.",
        )
    if next_after(expression, known, 0.0) is None:
        raise UsageError(f"The cron expression {expression!r} is never due.", remedy=_NEVER)


def next_after(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """The first due time after `after_s` (epoch seconds), None where there is none within fifty
    years; UsageError where the expression is none."""
    minute, hour, *_ = expression.split()
    if minute.startswith("*") or hour.startswith("*"):
        return _by_the_clock(expression, zone, after_s)
    moments = _cron(expression, datetime.fromtimestamp(after_s, zone))
    for moment in moments:
        # From a moment within an hour that comes twice, it begins with the first pass once more.
        if moment.timestamp() > after_s:
            return moment.timestamp()
    return None


def due_times(expression: str, zone: ZoneInfo, after_s: float) -> Iterator[float]:
    """Every due time after `after_s`, in order."""
    while (found := next_after(expression, zone, after_s)) is not None:
        yield found
        after_s = found


def latest(
    expression: str, zone: ZoneInfo, after_s: float, until_s: float, most: int
) -> tuple[list[float], bool]:
    """The last due times after `after_s` and not after `until_s`, in order, at most `most` of them;
    and whether there were more. It takes no longer for a year than for a week."""
    window_s = _FIRST_WINDOW_S
    while True:
        begin_s = max(after_s, until_s - window_s)
        found: list[float] = []
        for due_s in due_times(expression, zone, begin_s):
            if due_s > until_s:
                break
            found.append(due_s)
        if len(found) > most or begin_s == after_s:
            return found[-most:], len(found) > most
        window_s *= 2


def of_local(naive: datetime, zone: ZoneInfo) -> float:
    """The epoch second of a local time, taken as cron takes a fixed one."""
    local = naive.replace(tzinfo=zone)
    while local.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != naive:
        naive = naive.replace(second=0, microsecond=0) + timedelta(minutes=1)
        local = naive.replace(tzinfo=zone)
    return local.timestamp()


def shown(at_s: float, zone: ZoneInfo) -> str:
    """`2026-03-29 03:00:00 CEST`."""
    return datetime.fromtimestamp(at_s, zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def iso(at_s: float, zone: ZoneInfo | None = None) -> str:
    """`2026-03-29T03:00:00+02:00`; in UTC, with a Z, unless there is a zone."""
    if zone is None:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return datetime.fromtimestamp(at_s, zone).isoformat(timespec="seconds")


# --- By the clock --------------------------------------------------------------------------------


def _by_the_clock(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """In spans between two changes of the clock, each of which has one offset from UTC.

    cronsim by itself goes by whole hours here, and loses half an hour of due times where the clock
    changes by half an hour.
    """
    offset = _offset(after_s, zone)
    start_s = after_s
    while True:
        local = datetime.fromtimestamp(start_s, UTC).replace(tzinfo=None) + offset
        found = next(_cron(expression, local), None)
        if found is None:
            return None
        due_s = (found - offset).replace(tzinfo=UTC).timestamp()
        change_s = _change(after_s, due_s, zone, offset)
        if change_s is None:
            return due_s
        after_s, offset = change_s, _offset(change_s, zone)
        start_s = change_s - 1  # that minute itself may be due


def _change(after_s: float, until_s: float, zone: ZoneInfo, offset: timedelta) -> float | None:
    """The first second after `after_s`, and not after `until_s`, that has another offset."""
    low_s = int(after_s)
    while low_s < until_s:
        high_s = min(low_s + _DAY_S, int(until_s))
        if _offset(high_s, zone) != offset:
            while high_s - low_s > 1:
                middle_s = (low_s + high_s) // 2
                if _offset(middle_s, zone) == offset:
                    low_s = middle_s
                else:
                    high_s = middle_s
            return float(high_s)
        low_s = high_s
    return None


def _offset(at_s: float, zone: ZoneInfo) -> timedelta:
    return datetime.fromtimestamp(at_s, zone).utcoffset() or timedelta()


def _cron(expression: str, after: datetime) -> Iterator[datetime]:
    try:
        return local_times(expression, after)
    except ValueError as error:
        raise UsageError(
            f"{expression[:60]!r} is no cron expression: {error}.", remedy=_NEVER
        ) from error
