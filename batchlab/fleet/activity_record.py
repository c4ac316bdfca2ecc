"""What every change of a group leaves behind: activities, notices, the dead.

A plain pool's activities are told in a short form, those of a group of AWS's kind in AWS's words,
sentences that begin with a time and are two spaces apart.

Moments that survive a restart and still never go back.

The monotonic clock starts anew with every process, the wall clock may jump. So this one is the
wall clock as it stood at the start, carried on by the monotonic clock.
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
    """Seconds of the epoch that grow by the monotonic clock alone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_s = clock.now_s() - clock.monotonic_s()

    def now_s(self) -> float:
        """May differ from the wall clock by as much as that was set since the start."""
        return self._clock.monotonic_s() + self._ahead_s


KEEP_NOTICES = 1_000
KEEP_REASONS = 4
"""AWS's causes are bounded too, at 1,023 characters."""


def stamp(at_s: float) -> str:
    """A moment as AWS writes it in a cause."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Record:
    """`dead` collects who ended, `notices` who waits in a hook (the newest thousand, as nobody need
    take them), `unsaved` says whether anything changed; the caller empties all three."""

    def __init__(self, log: ActivityLog, clock: Clock, ids: Ids) -> None:
        self.log = log
        self.dead: list[Instance] = []
        self.notices: deque[LifecycleNotification] = deque(maxlen=KEEP_NOTICES)
        self.unsaved = False
        self.steady = SteadyClock(clock)
        self.ids = ids
        self._clock = clock

    def now_s(self) -> float:
        """Wall clock."""
        return self._clock.now_s()

    def note(self, pool: str, description: str, cause: str, status: str = "Successful") -> int:
        """Record an activity, return its id."""
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
        """Say what an activity waits for."""
        self.unsaved = True
        self.log.mark(group.pool.name, activity, status)

    def told(self, asg: Asg, *sentences: str) -> str:
        """A cause in AWS's words: why desired capacity is what it is, then what follows from it."""
        at = stamp(self.now_s())
        return "  ".join([asg.cause] * bool(asg.cause) + [f"At {at} {s}." for s in sentences])

    def explain(self, asg: Asg, sentence: str) -> None:
        """Remember why desired capacity is what it is, until it is reached; if it never is, only
        the latest reasons are kept."""
        reasons = self.told(asg, sentence).split("  ")
        asg.cause = "  ".join(reasons[-KEEP_REASONS:])
        self.unsaved = True
