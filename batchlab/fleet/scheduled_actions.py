"""Scheduled actions, and changes of a group's min, max, and desired capacity.

Scheduled actions use the wall clock. If the manager was not running, a missed action runs once and
late. An action that was due while ScheduledActions was suspended does not run.

Invariant: a fleet over a launcher and an EC2 fleet refuse the same limits with the same messages.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batchlab.core.errors import Refused
from batchlab.core.model import Pool
from batchlab.core.schedules import due_times
from batchlab.fleet.api_types import Process, ScheduledAction
from batchlab.fleet.changes import Changes
from batchlab.fleet.group_features import Asg
from batchlab.fleet.group_state import Group
from batchlab.fleet.termination import clamp

MOST_INSTANCES = 99_999
"""Most instances of one group. A larger number is probably a mistake."""


def check_limits(pool: Pool, *, most: int = MOST_INSTANCES) -> str:
    """Return the pool's limits as text. Raise Refused unless 0 ≤ min ≤ max ≤ `most`."""
    limits = f"min: {pool.min_size}, max: {pool.max_size}"
    if not 0 <= pool.min_size <= pool.max_size <= most:
        raise Refused(
            f"The pool {pool.name!r} cannot have the limits {limits}.",
            remedy=f"Give it 0 ≤ min ≤ max ≤ {most}.",
        )
    return limits


def check_desired(pool: Pool, desired: int) -> None:
    """Raise Refused if `desired` is outside the pool's limits."""
    if clamp(pool, desired) != desired:
        raise Refused(
            f"desired capacity {desired} of pool {pool.name!r} is outside"
            f" [{pool.min_size}, {pool.max_size}]",
            remedy="`batchlab grid scale --min N --max N` changes the limits.",
        )


def check_decrement(pool: Pool, desired: int, leaving: int) -> None:
    """Raise Refused if `desired` minus `leaving` is below the pool's min."""
    if desired - leaving < pool.min_size:
        raise Refused(
            f"terminating {leaving} of pool {pool.name!r} would take its desired capacity"
            f" from {desired} below its min of {pool.min_size}"
        )


def set_limits(
    changes: Changes,
    group: Group,
    min_size: int | None,
    max_size: int | None,
    desired: int | None,
    *,
    cause: str,
) -> None:
    """Set the sizes that are not None, and move desired capacity into the limits.

    If min is above max, change nothing and record a failed activity, because no caller can receive
    an error.
    """
    asg = group.asg
    assert asg is not None
    low = asg.config.min_size if min_size is None else min_size
    high = asg.config.max_size if max_size is None else max_size
    if low > high:
        what = f"Could not set min: {low}, max: {high}: min is above max"
        changes.note(group.pool.name, what, changes.told(asg, cause), "Failed")
        return
    asg.config = replace(asg.config, min_size=low, max_size=high)
    group.pool = replace(group.pool, min_size=low, max_size=high)
    changes.unsaved = True
    wanted = clamp(group.pool, group.desired if desired is None else desired)
    limits = f"min: {low}, max: {high}, desired: {wanted}"
    changes.want(group, wanted, f"{cause} update of AutoScalingGroup constraints to {limits}")


def first_s(action: ScheduledAction, now_s: float) -> float | None:
    """Return when an action first runs: its start time, or its first recurrence if any."""
    if action.start_time is not None:
        return action.start_time
    return _recurs_s(action, now_s)


def _recurs_s(action: ScheduledAction, after_s: float) -> float | None:
    if not action.recurrence:
        return None
    zone = ZoneInfo(action.time_zone or "UTC")
    due_s = _next_s(action.recurrence, zone, after_s)
    late = due_s is not None and action.end_time is not None and due_s > action.end_time
    return None if late else due_s


def _next_s(expression: str, zone: ZoneInfo, after_s: float) -> float | None:
    """Return the next time of a cron expression, with AWS's rules for daylight saving.

    A time that does not exist runs an hour later, and a time that occurs twice runs the first time.
    """
    # Clock changes are shorter than 3 hours, so no earlier time can still be due.
    before = datetime.fromtimestamp(after_s, zone).replace(tzinfo=None) - timedelta(hours=3)
    try:
        times = due_times.local_times(expression, before)
    except due_times.NeverDue:
        return None
    due_s = (local.replace(tzinfo=zone).timestamp() for local in times)
    return next((at_s for at_s in due_s if at_s > after_s), None)


def run_due(changes: Changes, group: Group) -> None:
    """Run due actions in order. Remove actions that will not run again."""
    asg, now_s = group.asg, changes.now_s()
    assert asg is not None
    due = sorted((due_s, name) for name, due_s in asg.due_s.items() if due_s <= now_s)
    for _, name in due:
        action = asg.scheduled[name]
        if not group.suspended(Process.SCHEDULED_ACTIONS):
            set_limits(
                changes=changes,
                group=group,
                min_size=action.min_size,
                max_size=action.max_size,
                desired=action.desired_capacity,
                cause="a scheduled action",
            )
        again_s = _recurs_s(action, now_s)
        if again_s is None:
            forget(asg, name)
        else:
            asg.due_s[name] = again_s
        changes.unsaved = True


def forget(asg: Asg, name: str) -> None:
    del asg.scheduled[name], asg.due_s[name]
