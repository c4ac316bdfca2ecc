"""Due times of schedules: cron expressions with five fields in a time zone, or one moment.

Invariant: the due times of an expression depend only on the expression and its zone, and not on the current time. The
rules of cron apply to clock changes. If a clock change skips a fixed time of day, the due time is the first minute
after the change. If a clock change repeats a fixed time of day, the first occurrence is due. A cron expression with `*`
as its minute or hour follows the clock. Such an expression is due twice in a repeated hour, and not due in a skipped
hour.

`local_times` is the only reader of cron expressions, and uses cronsim. Each caller of `local_times` decides how to
treat a local time that a clock change skips or repeats. Schedules follow cron's rules for clock changes. Scheduled
actions follow the rules of Auto Scaling (`fleet/scaling_policies.py`).
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
    """Error for a well-formed cron expression whose day does not occur in any of its months, such as February 30."""


def local_times(expression: str, after: datetime) -> Iterator[datetime]:
    """Return the due times of a cron expression after `after`, in order and as local times.

    The local times are naive if `after` is naive, and have the zone of `after` otherwise.

    The sequence of local times ends if no further local time follows within fifty years. Raise ValueError with the name
    of the invalid field if the expression is not valid. Raise NeverDue if the expression is valid but never due.
    """
    from cronsim import CronSim, CronSimError

    fields = expression.split()
    if len(fields) != FIELDS:
        # Refuse six fields, because cronsim would read the first of six fields as seconds.
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
"""Maximum length of a cron expression in characters. A longer cron expression is probably a mistake."""
_NEVER = "Write five fields: minute, hour, day of month, month, weekday, such as '0 2 * * 1-5'."
_FIRST_WINDOW_S = 3600.0


@lru_cache(maxsize=256)
def zone_of(name: str) -> ZoneInfo:
    """Return the IANA time zone `name`. Raise UsageError if the time zone does not exist."""
    try:
        return ZoneInfo(name)
    # OSError is the error for a name that is a folder of the time zone database
    except (KeyError, ValueError, OSError) as error:
        raise UsageError(
            f"The time zone {name!r} does not exist.", remedy="Write an IANA name such as Europe/Berlin or UTC."
        ) from error


def check(expression: str, zone: str) -> None:
    """Raise UsageError if the cron expression or the time zone is not valid, or if the expression is never due."""
    known = zone_of(zone)
    fields = len(expression.split())
    if fields != FIELDS:
        raise UsageError(
            f"The cron expression {expression[:60]!r} has {count(fields, 'field')}, not {FIELDS}.", remedy=_NEVER
        )
    if len(expression) > _LONGEST:
        raise UsageError(f"A cron expression has at most {_LONGEST} characters.", remedy="Write ranges and steps.")
    if next_after(expression, known, 0.0) is None:
        raise UsageError(f"The cron expression {expression!r} is never due.", remedy=_NEVER)


def next_after(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """Return the first due time after `after_s` (epoch seconds), or None if no due time follows within fifty years.

    Raise UsageError if the expression is not valid.
    """
    minute, hour, *_ = expression.split()
    if minute.startswith("*") or hour.startswith("*"):
        return _by_the_clock(expression, zone, after_s)
    moments = _cron(expression, datetime.fromtimestamp(after_s, zone))
    for moment in moments:
        # If `after_s` is in an hour that a clock change repeats, the sequence starts in the first occurrence of the
        # hour.
        if moment.timestamp() > after_s:
            return moment.timestamp()
    return None


def due_times(expression: str, zone: ZoneInfo, after_s: float) -> Iterator[float]:
    """Yield every due time of a cron expression after `after_s`, in order."""
    while (found := next_after(expression, zone, after_s)) is not None:
        yield found
        after_s = found


def latest(expression: str, zone: ZoneInfo, after_s: float, until_s: float, most: int) -> tuple[list[float], bool]:
    """Return the last due times in (after_s, until_s], in order, and whether earlier due times were omitted.

    At most `most` due times are returned. The duration of the search for due times does not depend on the length of the
    interval (after_s, until_s].
    """
    window_s = _FIRST_WINDOW_S
    while True:
        begin_s = max(after_s, until_s - window_s)
        times: list[float] = []
        for due_s in due_times(expression, zone, begin_s):
            if due_s > until_s:
                break
            times.append(due_s)
        if len(times) > most or begin_s == after_s:
            return times[-most:], len(times) > most
        window_s *= 2


def of_local(naive: datetime, zone: ZoneInfo) -> float:
    """Return the epoch second of a local time, with cron's rules for a fixed time of day at clock changes."""
    local = naive.replace(tzinfo=zone)
    while local.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != naive:
        naive = naive.replace(second=0, microsecond=0) + timedelta(minutes=1)
        local = naive.replace(tzinfo=zone)
    return local.timestamp()


def text_of_time(at_s: float, zone: ZoneInfo) -> str:
    """Return the local time in a zone as text, such as `2026-03-29 03:00:00 CEST`."""
    return datetime.fromtimestamp(at_s, zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def iso(at_s: float, zone: ZoneInfo | None = None) -> str:
    """Return a time as text, such as `2026-03-29T03:00:00+02:00`. Without `zone`, the text is in UTC and ends in Z."""
    if zone is None:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return datetime.fromtimestamp(at_s, zone).isoformat(timespec="seconds")


# --- Expressions that follow the clock ------------------------------------------------------------


def _by_the_clock(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """Return the next due time of a cron expression that follows the clock.

    The function searches each span between two clock changes separately, because a span has one offset from UTC.
    Without separate spans, cronsim would miss half an hour of due times if the clock changes by half an hour.
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
        start_s = change_s - 1  # the minute of the clock change itself may be due


def _change(after_s: float, until_s: float, zone: ZoneInfo, offset: timedelta) -> float | None:
    """Return the first second in (after_s, until_s] whose UTC offset differs from `offset`, or None."""
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
        raise UsageError(f"{expression[:60]!r} is not a cron expression: {error}.", remedy=_NEVER) from error
