"""How long a job still takes, as a band: from what is left, what tasks took, and the fleet.

Invariant: pure, and honest. What nobody has measured is named and not guessed; the band widens with
the spread of the task times, with few measurements, and with what the fleet may yet become.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.text import about

SIGMAS = 2.0
"""Half the width of the band, in standard deviations."""
FEW = 4
"""With fewer measured bundles the spread is taken to be half the mean at the least."""
CLOSE = 0.15
"""A band that is this narrow, as a share of its middle, is told as one number."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a stage's tasks as measured: of `tasks` tasks, in `bundles` bundles. `squares` is
    the sum over bundles of seconds² ÷ tasks, from which their spread follows."""

    bundles: int = 0
    tasks: int = 0
    seconds: float = 0.0
    squares: float = 0.0

    def with_bundle(self, tasks: int, seconds: float) -> Pace:
        """One bundle more, of so many tasks that took so long together."""
        if not tasks:
            return self
        return Pace(
            self.bundles + 1,
            self.tasks + tasks,
            self.seconds + seconds,
            self.squares + seconds * seconds / tasks,
        )

    @property
    def mean_s(self) -> float:
        return self.seconds / self.tasks if self.tasks else 0.0

    @property
    def spread_s(self) -> float:
        """The standard deviation of one task's time."""
        known = 0.0
        if self.bundles > 1:
            # Bundles of n tasks have means whose variance is that of a task divided by n.
            excess = self.squares - self.seconds * self.seconds / self.tasks
            known = math.sqrt(max(0.0, excess / (self.bundles - 1)))
        return known if self.bundles >= FEW else max(known, 0.5 * self.mean_s)


@dataclass(frozen=True, slots=True)
class StageWork:
    """What is left of a stage: `left` tasks, None before it is planned, of which `running` run."""

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
    """Slots of a pool: those in service, and as many as it may have; `rivals` other jobs have work
    for it too. A new instance takes `boot_s`."""

    now: int
    most: int
    per_instance: int = 1
    boot_s: float = 0.0
    rivals: int = 0


@dataclass(frozen=True, slots=True)
class Eta:
    """Seconds until the job's end, from `low_s` to `high_s`. What comes on top, in stages that
    nobody has measured, is `unmeasured`."""

    low_s: float
    high_s: float
    unmeasured: tuple[str, ...] = ()


def estimate(stages: Sequence[StageWork], rooms: Mapping[str, Room]) -> Eta | None:
    """The band; None where nothing that is left has been measured, or a pool can have no slots."""
    known = [one for one in stages if one.left and one.is_known]
    unmeasured = tuple(one.name for one in stages if not one.is_known)
    if unmeasured and not known:
        return None
    if any(rooms[one.pool].most < 1 for one in known):
        return None
    low_s = _span_s(stages, rooms, -1.0)
    high_s = max(low_s, _span_s(stages, rooms, 1.0))
    return Eta(low_s, high_s, unmeasured)


def told(eta: Eta) -> str:
    """The band for a person."""
    low, high = about(eta.low_s), about(eta.high_s)
    middle_s = (eta.low_s + eta.high_s) / 2
    narrow = low == high or eta.high_s - eta.low_s <= CLOSE * middle_s
    if eta.unmeasured:
        noun = "stage" if len(eta.unmeasured) == 1 else "stages"
        names = ", ".join(eta.unmeasured)
        return f"more than {low} left; {noun} {names} not measured yet"
    return f"about {about(middle_s)} left" if narrow else f"{low} to {high} left"


# --- One end of the band --------------------------------------------------------------------------


def _span_s(stages: Sequence[StageWork], rooms: Mapping[str, Room], side: float) -> float:
    """Seconds at the hopeful (-1) or the careful (+1) end."""
    by_name = {one.name: one for one in stages}
    heads: dict[str, str] = {}
    ends_s: dict[str, float] = {}
    members: dict[str, list[StageWork]] = {}
    for one in stages:
        head = heads[one.after[0]] if one.chained and one.after else one.name
        heads[one.name] = head
        members.setdefault(head, []).append(one)
    for head, group in members.items():
        # A stage that waits begins when all that it waits for has ended.
        before = {heads[name] for name in by_name[head].after}
        start_s = max((ends_s[name] for name in before), default=0.0)
        ends_s[head] = start_s + _group_s(group, rooms, side)
    pools = {one.pool for one in stages}
    crowded_s = max((_pool_s(stages, pool, rooms[pool], side) for pool in pools), default=0.0)
    return max(*ends_s.values(), crowded_s) if ends_s else 0.0


def _group_s(group: Sequence[StageWork], rooms: Mapping[str, Room], side: float) -> float:
    """Stages that feed each other item by item, and so run at the same time."""
    open_ = [one for one in group if one.left and one.is_known]
    if not open_:
        return 0.0
    pools = {one.pool for one in open_}
    work_s = max(_pool_s(open_, pool, rooms[pool], side) for pool in pools)
    # However many slots there are, the last item goes through one stage after the other.
    item_s = sum(_item_s(one, side) for one in open_)
    return work_s + item_s if side > 0 else max(work_s, item_s)


def _item_s(one: StageWork, side: float) -> float:
    longest_s = one.pace.mean_s + side * SIGMAS * one.pace.spread_s
    waits = (one.left or 0) > one.running
    # What runs already has some of it behind it.
    return max(0.0, longest_s) * (1.0 if waits or side > 0 else 0.0)


def _pool_s(stages: Iterable[StageWork], pool: str, room: Room, side: float) -> float:
    """Seconds that the pool needs for the work of these stages."""
    mine = [one for one in stages if one.pool == pool and one.left and one.is_known]
    if not mine:
        return 0.0
    if side < 0:
        # As large as it may become, but no larger than there are tasks for.
        wanted = sum((one.left or 0) * one.slots for one in mine)
        slots = max(1, min(max(room.now, room.most), wanted))
        return sum(_work_s(one, side) for one in mine) / slots
    slots, boot_s = room.now, 0.0
    if not slots:
        slots, boot_s = max(1, min(room.per_instance, room.most)), room.boot_s
    fair = max(1.0, slots / (1 + room.rivals))
    return boot_s + sum(_work_s(one, side) for one in mine) / fair


def _work_s(one: StageWork, side: float) -> float:
    """Slot seconds."""
    left, pace = one.left or 0, one.pace
    # The tasks differ among themselves, and their mean is known from so many only.
    sigma_s = pace.spread_s * math.sqrt(left + left * left / pace.tasks)
    done_s = 0.5 * pace.mean_s * min(one.running, left) if side < 0 else 0.0
    return max(0.0, left * pace.mean_s - done_s + side * SIGMAS * sigma_s) * one.slots
