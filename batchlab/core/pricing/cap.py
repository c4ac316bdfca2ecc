"""A cap on cost: what is left under it, and how much work and how many instances that pays for.

Invariant: pure arithmetic. What is taken out of a purse is committed; it is only put right when
the purse is filled anew from what has really been spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.pricing.money import BILLED_LEAST_S, shown

PROBED_S = 3600.0
"""So long a task may take of which nothing is known."""


@dataclass(slots=True)
class Purse:
    """What a cap leaves. All in USD."""

    whose: str
    """For a sentence: "the grid", "the job"."""
    cap_usd: float
    spent_usd: float = 0.0
    committed_usd: float = 0.0

    @property
    def left_usd(self) -> float:
        return self.cap_usd - self.spent_usd - self.committed_usd

    def take(self, usd: float) -> None:
        self.committed_usd += usd

    def text(self) -> str:
        """What has become of it."""
        return (
            f"{self.whose} may cost {shown(self.cap_usd)}, has cost {shown(self.spent_usd)}, and "
            f"{shown(max(0.0, self.committed_usd))} more is committed"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """The purses that pay for a job's work; by pool the price of a slot second, and the slots of an
    instance."""

    purses: tuple[Purse, ...]
    slot_usd_s: Mapping[str, float]
    slots: Mapping[str, int]

    @property
    def left_usd(self) -> float:
        return min(purse.left_usd for purse in self.purses)

    def take(self, usd: float) -> None:
        for purse in self.purses:
            purse.take(usd)

    def afford(self, sizes: Sequence[int], pool: str, task_s: float) -> list[int]:
        """The first of these bundles, as far as they are paid for; `task_s` is slot seconds of one
        task. What they cost is taken."""
        usd = self.slot_usd_s.get(pool, 0.0) * task_s
        paid: list[int] = []
        for size in sizes:
            tasks = size if usd <= 0 else min(size, _times(self.left_usd, usd))
            if not tasks:
                break
            self.take(tasks * usd)
            paid.append(tasks)
            if tasks < size:
                break
        return paid

    def probe(self, sizes: Sequence[int], pool: str, task_s: float, out: int) -> list[int]:
        """As `afford`, of tasks of which none has been measured, and `out` have begun: as many as
        one instance takes, or as are paid for if they take `task_s` or up to an hour."""
        usd = self.slot_usd_s.get(pool, 0.0) * min(task_s, PROBED_S)
        paid = self.slots.get(pool, 1) if usd <= 0 else _times(self.left_usd, usd)
        room = max(paid, self.slots.get(pool, 1)) - out
        found: list[int] = []
        for size in sizes:
            if (tasks := min(size, room)) <= 0:
                break
            found.append(tasks)
            room -= tasks
        return found


def launch_usd(usd_h: float, tail_s: float = 0.0) -> float:
    """What is owed as soon as an instance is launched: a minute of it, or its boot and tail where
    these take longer."""
    return usd_h * max(BILLED_LEAST_S, tail_s) / 3600


def launches(wanted: int, each: float, purses: Sequence[Purse]) -> int:
    """How many of `wanted` launches these purses pay for at `each` in USD; what they cost is
    taken."""
    left = min((purse.left_usd for purse in purses), default=0.0)
    count = wanted if each <= 0 or not purses else min(wanted, _times(left, each))
    for purse in purses:
        purse.take(count * each)
    return count


def _times(left_usd: float, each_usd: float) -> int:
    """How often it is in there, whatever the last digit of a float says."""
    return int(max(0.0, left_usd) / each_usd + 1e-9)
