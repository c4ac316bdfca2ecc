"""Estimate of a job's remaining time as a range, calculated from the job's remaining work, its task times, and the
fleet.

Invariant: the functions of the module are pure. The range of the remaining time does not include stages without
measurements, which are listed by name. A larger spread of task times, fewer measurements, and more possible changes of
the fleet make the range wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.text import about

SIGMAS = 2.0
"""Half the width of the range of the remaining time, in standard deviations."""
MIN_BUNDLES = 4
"""Minimum number of measured bundles from which the spread of task times is calculated.

With fewer than MIN_BUNDLES bundles, the spread of task times is assumed to be at least half the mean.
"""
CLOSE = 0.15
"""A range of the remaining time is shown as one number if its width is less than CLOSE times its middle value."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured task times of a stage: `seconds` is the total time of `tasks` tasks in `bundles` bundles.

    `squares` is the sum over bundles of seconds² ÷ tasks, from which the spread is calculated.
    """

    bundles: int = 0
    tasks: int = 0
    seconds: float = 0.0
    squares: float = 0.0

    def with_bundle(self, tasks: int, seconds: float) -> Pace:
        """Return the Pace after the measurement of one more bundle, whose `tasks` tasks took `seconds` in total."""
        if not tasks:
            return self
        return Pace(
            self.bundles + 1, self.tasks + tasks, self.seconds + seconds, self.squares + seconds * seconds / tasks
        )

    @property
    def mean_s(self) -> float:
        return self.seconds / self.tasks if self.tasks else 0.0

    @property
    def spread_s(self) -> float:
        """Return the standard deviation of one task's time."""
        known = 0.0
        if self.bundles > 1:
            # The variance of the mean task time in a bundle with n tasks is the variance of one task's time divided by
            # n.
            excess = self.squares - self.seconds * self.seconds / self.tasks
            known = math.sqrt(max(0.0, excess / (self.bundles - 1)))
        return known if self.bundles >= MIN_BUNDLES else max(known, 0.5 * self.mean_s)


@dataclass(frozen=True, slots=True)
class StageWork:
    """Remaining work of a stage.

    `left` is the number of remaining tasks, or None before the stage is planned. `running` is the number of remaining
    tasks that are running.
    """

    name: str
    pool: str
    after: tuple[str, ...] = ()
    chained: bool = False
    left: int | None = None
    running: int = 0
    slots: int = 1
    pace: Pace = Pace()

    @property
    def is_known(self) -> bool:
        return self.left == 0 or (self.left is not None and self.pace.tasks > 0)


@dataclass(frozen=True, slots=True)
class Room:
    """Slots of a pool: the slots in service and the maximum number of slots.

    `rivals` is the number of other jobs that have work for the pool. A new instance takes `boot_s` seconds to start.
    """

    now: int
    most: int
    per_instance: int = 1
    boot_s: float = 0.0
    rivals: int = 0


@dataclass(frozen=True, slots=True)
class Eta:
    """Range of the seconds until the job's end, from `low_s` to `high_s`.

    The range does not include the time of the `unmeasured` stages.
    """

    low_s: float
    high_s: float
    unmeasured: tuple[str, ...] = ()


def estimate(stages: Sequence[StageWork], rooms: Mapping[str, Room]) -> Eta | None:
    """Return the range of a job's remaining time.

    Return None if none of the remaining stages has been measured, or if a pool cannot have any slots.
    """
    stage_works = [stage for stage in stages if stage.left and stage.is_known]
    unmeasured = tuple(stage.name for stage in stages if not stage.is_known)
    if unmeasured and not stage_works:
        return None
    if any(rooms[stage_work.pool].most < 1 for stage_work in stage_works):
        return None
    low_s = _span_s(stages, rooms, -1.0)
    high_s = max(low_s, _span_s(stages, rooms, 1.0))
    return Eta(low_s, high_s, unmeasured)


def describe(eta: Eta) -> str:
    """Return the range of the remaining time as a text for a person."""
    low, high = about(eta.low_s), about(eta.high_s)
    middle_s = (eta.low_s + eta.high_s) / 2
    narrow = low == high or eta.high_s - eta.low_s <= CLOSE * middle_s
    if eta.unmeasured:
        noun = "stage" if len(eta.unmeasured) == 1 else "stages"
        names = ", ".join(eta.unmeasured)
        return f"more than {low} left; {noun} {names} not measured yet"
    return f"about {about(middle_s)} left" if narrow else f"{low} to {high} left"


# --- One end of the range of the remaining time ---------------------------------------------------


def _span_s(stages: Sequence[StageWork], rooms: Mapping[str, Room], side: float) -> float:
    """Return the remaining seconds at the optimistic (`side` -1) or the pessimistic (`side` +1) end of the range."""
    by_name = {stage.name: stage for stage in stages}
    heads: dict[str, str] = {}
    ends_s: dict[str, float] = {}
    members: dict[str, list[StageWork]] = {}
    for stage in stages:
        head = heads[stage.after[0]] if stage.chained and stage.after else stage.name
        heads[stage.name] = head
        members.setdefault(head, []).append(stage)
    for head, group in members.items():
        # A gather stage begins when all of its upstream stages have ended.
        before = {heads[name] for name in by_name[head].after}
        start_s = max((ends_s[name] for name in before), default=0.0)
        ends_s[head] = start_s + _group_s(group, rooms, side)
    pools = {stage.pool for stage in stages}
    crowded_s = max((_pool_s(stages, pool, rooms[pool], side) for pool in pools), default=0.0)
    return max(*ends_s.values(), crowded_s) if ends_s else 0.0


def _group_s(group: Sequence[StageWork], rooms: Mapping[str, Room], side: float) -> float:
    """Return the remaining seconds of stages that pass items to each other and therefore run at the same time."""
    open_ = [stage_work for stage_work in group if stage_work.left and stage_work.is_known]
    if not open_:
        return 0.0
    pools = {stage_work.pool for stage_work in open_}
    work_s = max(_pool_s(open_, pool, rooms[pool], side) for pool in pools)
    # Even with many slots, the last item passes through the stages one after another.
    item_s = sum(_item_s(stage_work, side) for stage_work in open_)
    return work_s + item_s if side > 0 else max(work_s, item_s)


def _item_s(stage: StageWork, side: float) -> float:
    longest_s = stage.pace.mean_s + side * SIGMAS * stage.pace.spread_s
    waits = (stage.left or 0) > stage.running
    # If all remaining tasks are running, the optimistic end of the range is 0, because the tasks may be about to end.
    return max(0.0, longest_s) * (1.0 if waits or side > 0 else 0.0)


def _pool_s(stages: Iterable[StageWork], pool: str, room: Room, side: float) -> float:
    """Return the seconds that a pool needs for the remaining work of the stages."""
    stage_works = [stage for stage in stages if stage.pool == pool and stage.left and stage.is_known]
    if not stage_works:
        return 0.0
    if side < 0:
        # The pool may grow up to its maximum, but not beyond the number of slots that the remaining tasks need.
        wanted = sum((stage_work.left or 0) * stage_work.slots for stage_work in stage_works)
        slots = max(1, min(max(room.now, room.most), wanted))
        return sum(_work_s(stage_work, side) for stage_work in stage_works) / slots
    slots, boot_s = room.now, 0.0
    if not slots:
        slots, boot_s = max(1, min(room.per_instance, room.most)), room.boot_s
    fair = max(1.0, slots / (1 + room.rivals))
    return boot_s + sum(_work_s(stage_work, side) for stage_work in stage_works) / fair


def _work_s(stage: StageWork, side: float) -> float:
    """Return the remaining work of a stage in slot seconds, at one end of the range."""
    remaining, pace = stage.left or 0, stage.pace
    # The variance includes the spread of task times and the error of their mean, which is estimated from `pace.tasks`
    # tasks.
    sigma_s = pace.spread_s * math.sqrt(remaining + remaining * remaining / pace.tasks)
    done_s = 0.5 * pace.mean_s * min(stage.running, remaining) if side < 0 else 0.0
    return max(0.0, remaining * pace.mean_s - done_s + side * SIGMAS * sigma_s) * stage.slots
