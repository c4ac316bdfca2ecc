"""Records of every change of a group: activities, notices, and terminated instances.

Activities of a plain pool have a short form. Activities of an Auto Scaling group have AWS's
wording: sentences that begin with a time and are separated by two spaces.

The `SteadyClock` gives times that are valid after a restart and never go back. The monotonic clock
starts again with every process, and the wall clock may jump, so it adds the monotonic clock's
progress to the wall clock's value at the start.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime

from batchlab.core.model import Instance
from batchlab.core.ports import Clock, Ids
from batchlab.fleet.api_types import LifecycleNotification
from batchlab.fleet.group_features import Asg
from batchlab.fleet.group_state import ActivityLog, Group


class SteadyClock:
    """Clock in seconds since the epoch that advances with the monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_s = clock.now_s() - clock.monotonic_s()

    def now_s(self) -> float:
        """Return the time. It differs from the wall clock if that was set since the start."""
        return self._clock.monotonic_s() + self._ahead_s


KEEP_NOTICES = 1_000
KEEP_REASONS = 4
"""Most reasons in a cause. AWS also limits causes, to 1,023 characters."""


def stamp(at_s: float) -> str:
    """Format a time as in AWS's causes."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Record:
    """Activities and other records of changes.

    `dead` has the instances that ended, and `notices` the newest 1,000 notifications of waiting
    instances. `unsaved` is true if anything changed. The caller resets all three.
    """

    def __init__(self, log: ActivityLog, clock: Clock, ids: Ids) -> None:
        self.log = log
        self.dead: list[Instance] = []
        self.notices: deque[LifecycleNotification] = deque(maxlen=KEEP_NOTICES)
        self.unsaved = False
        self.steady = SteadyClock(clock)
        self.ids = ids
        self._clock = clock

    def now_s(self) -> float:
        """Return the wall clock's time."""
        return self._clock.now_s()

    def note(self, pool: str, description: str, cause: str, status: str = "Successful") -> int:
        """Record an activity and return its id."""
        self.unsaved = True
        return self.log.add(pool, self.now_s(), description, cause, status)

    def settle(
        self, group: Group, activity: int, status: str, *, more: str = "", message: str = ""
    ) -> None:
        """Give an activity its final status."""
        self.unsaved = True
        name, now_s = group.pool.name, self.now_s()
        self.log.settle(name, activity, status, now_s, more=more, message=message)

    def mark(self, group: Group, activity: int, status: str) -> None:
        """Set the status of an activity in progress."""
        self.unsaved = True
        self.log.mark(group.pool.name, activity, status)

    def told(self, asg: Asg, *sentences: str) -> str:
        """Return a cause in AWS's wording: reasons of the desired capacity, then `sentences`."""
        at = stamp(self.now_s())
        return "  ".join([asg.cause] * bool(asg.cause) + [f"At {at} {s}." for s in sentences])

    def explain(self, asg: Asg, sentence: str) -> None:
        """Store the reason of the desired capacity until the capacity is reached.

        Only the latest KEEP_REASONS reasons are kept.
        """
        reasons = self.told(asg, sentence).split("  ")
        asg.cause = "  ".join(reasons[-KEEP_REASONS:])
        self.unsaved = True
