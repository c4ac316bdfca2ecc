"""Scheduled actions: limits and desired capacity set at a moment, once or again and again.

They go by the wall clock. What fell due while nobody looked is done late, once; what fell due
while ScheduledActions was suspended is not done.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batchlab import cron
from batchlab.fleet.api import Process, ScheduledAction
from batchlab.fleet.asg import Asg
from batchlab.fleet.changes import Changes
from batchlab.fleet.limits import set_limits
from batchlab.fleet.state import Group


def first_s(action: ScheduledAction, now_s: float) -> float | None:
    """When it runs first: at its start, else when it recurs; None where that never comes."""
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
    """As AWS has it: a time of day that the change to summer time leaves out comes an hour later,
    one that comes twice comes the first time."""
    # No change of a clock is as long, so none of the times before is still to come.
    before = datetime.fromtimestamp(after_s, zone).replace(tzinfo=None) - timedelta(hours=3)
    try:
        times = cron.local_times(expression, before)
    except cron.NeverDue:
        return None
    due_s = (local.replace(tzinfo=zone).timestamp() for local in times)
    return next((at_s for at_s in due_s if at_s > after_s), None)


def run_due(changes: Changes, group: Group) -> None:
    """Do what is due, in order; forget what will not run again."""
    asg, now_s = group.asg, changes.now_s()
    assert asg is not None
    due = sorted((due_s, name) for name, due_s in asg.due_s.items() if due_s <= now_s)
    for _, name in due:
        action = asg.scheduled[name]
        if not group.suspended(Process.SCHEDULED_ACTIONS):
            set_limits(
                *(changes, group, action.min_size, action.max_size, action.desired_capacity),
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
