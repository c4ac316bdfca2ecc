"""Scheduled actions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from batchlab import cron
from batchlab.fleet import schedules
from batchlab.fleet.api import ScheduledAction
from batchlab.fleet.asg import Asg
from batchlab.fleet.faults import AlreadyExists, LimitExceeded, ValidationError
from batchlab.fleet.requests.base import Requests

MOST_ACTIONS = 125
# What cron itself has, and AWS tells of; cronsim reads more, such as the last day of a month.
_TERM = r"(\*|(\d+|[A-Z]{3})(-(\d+|[A-Z]{3}))?)(/\d+)?"
_FIELD = re.compile(rf"{_TERM}(,{_TERM})*", re.ASCII | re.IGNORECASE)


class ScheduleRequests(Requests):
    """As AWS's API reference says, under the same names. Times are seconds of the epoch."""

    def put_scheduled_update_group_action(self, action: ScheduledAction) -> None:
        """Create or replace; AWS allows no two of a group at the same time."""
        name, this = action.auto_scaling_group_name, action.scheduled_action_name
        _, asg = self._changeable(name)
        self._check(asg, action)
        due_s = schedules.first_s(action, self._changes.now_s())
        if due_s is None:
            raise ValidationError("The recurrence does not occur before the end time.")
        if any(at_s == due_s for other, at_s in asg.due_s.items() if other != this):
            raise AlreadyExists("There is already a scheduled action at this time.")
        arn = self._arn("scheduledUpdateGroupAction", name, f":scheduledActionName/{this}")
        asg.scheduled[this] = replace(action, scheduled_action_arn=arn)
        asg.due_s[this] = due_s
        self._changes.unsaved = True
        self._save()

    def _check(self, asg: Asg, action: ScheduledAction) -> None:
        now_s = self._changes.now_s()
        sizes = (action.min_size, action.max_size, action.desired_capacity)
        if all(size is None for size in sizes):
            raise ValidationError(
                "At least one of MinSize, MaxSize and DesiredCapacity must be provided."
            )
        if any(size is not None and size < 0 for size in sizes):
            raise ValidationError("Sizes must not be negative.")
        if action.start_time is None and not action.recurrence:
            raise ValidationError("Either StartTime or Recurrence must be provided.")
        if action.start_time is not None and action.start_time < now_s:
            raise ValidationError("Given start time is in the past")
        if action.end_time is not None and action.end_time < max(now_s, action.start_time or 0):
            raise ValidationError("Given end time is in the past or before the start time")
        try:
            if action.recurrence:
                _check_recurrence(action.recurrence, now_s)
            ZoneInfo(action.time_zone or "UTC")
        except ZoneInfoNotFoundError as error:
            raise ValidationError(f"Invalid time zone: {action.time_zone}") from error
        except ValueError as error:
            raise ValidationError(f"Given recurrence string:{error} is invalid") from error
        known = action.scheduled_action_name in asg.scheduled
        if not known and len(asg.scheduled) >= MOST_ACTIONS:
            raise LimitExceeded(f"A group may have {MOST_ACTIONS} scheduled actions.")

    def delete_scheduled_action(self, name: str, scheduled_action_name: str) -> None:
        """ValidationError where there is none."""
        _, asg = self._changeable(name)
        if scheduled_action_name not in asg.scheduled:
            raise ValidationError(f"Scheduled action name not found: {scheduled_action_name}")
        schedules.forget(asg, scheduled_action_name)
        self._changes.unsaved = True
        self._save()

    def describe_scheduled_actions(
        self,
        name: str | None = None,
        *,
        scheduled_action_names: Sequence[str] = (),
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Sequence[ScheduledAction]:
        """Those that have not run for the last time, by when they run next; `start_time` of a
        recurring one is its next run, as AWS shows it. The two times bound that and are not heard
        where names are given."""
        groups = [self._named(name)[0]] if name else list(self._groups.values())
        found = []
        for asg in (group.asg for group in groups if group.asg is not None):
            for this, due_s in asg.due_s.items():
                within = (start_time or 0.0) <= due_s <= (due_s if end_time is None else end_time)
                if this in scheduled_action_names if scheduled_action_names else within:
                    found.append((due_s, this, replace(asg.scheduled[this], start_time=due_s)))
        return [action for _, _, action in sorted(found, key=lambda one: one[:2])]


def _check_recurrence(expression: str, now_s: float) -> None:
    """ValueError where it is no cron expression."""
    for field in expression.split():
        if not _FIELD.fullmatch(field):
            raise ValueError(f"{field!r} is no field of cron")
    with suppress(cron.NeverDue):
        cron.local_times(expression, datetime.fromtimestamp(now_s, UTC))
