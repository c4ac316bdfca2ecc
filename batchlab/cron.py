"""Cron with five fields: the local times that an expression names, read by cronsim.

Invariant: the one reader of cron. What becomes of a time that a change of the clock leaves out or
repeats is its callers' rule: cron's own for schedules (schedule/times.py), Auto Scaling's for
scheduled actions (fleet/schedules.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

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
