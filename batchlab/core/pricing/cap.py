"""Caps on cost: the remaining budget, and the work and the instances that it pays for.

Invariant: the functions are pure arithmetic. An amount taken from a budget is committed. It is
corrected only when the budget is created again from the actual costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.pricing.money import BILLED_LEAST_S, shown

PROBED_S = 3600.0
"""Assumed maximum time of a task in a stage without measurements."""


@dataclass(slots=True)
class Purse:
    """Remaining budget of one cap, in USD."""

    whose: str
    """Owner of the cap in a sentence: "the grid" or "the job"."""
    cap_usd: float
    spent_usd: float = 0.0
    committed_usd: float = 0.0

    @property
    def left_usd(self) -> float:
        return self.cap_usd - self.spent_usd - self.committed_usd

    def take(self, usd: float) -> None:
        self.committed_usd += usd

    def text(self) -> str:
        """Return a text about what is spent and what is committed."""
        return (
            f"{self.whose} may cost {shown(self.cap_usd)}, has cost {shown(self.spent_usd)}, and "
            f"{shown(max(0.0, self.committed_usd))} more is committed"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """The remaining budgets of all caps that apply to a job.

    `slot_usd_s` has the price of a slot second by pool, and `slots` the slots of an instance by
    pool.
    """

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
        """Return the first of these bundles that the budget pays for, and commit their cost.

        `task_s` is the slot seconds of one task. The last bundle may be smaller than requested.
        """
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
        """Return the first of these bundles for a stage without measurements. `out` tasks have
        begun.

        Together with these, the result has at most as many tasks as fit into one instance, or as
        the budget pays for, if that is more. Each task is assumed to take `task_s`, at most an
        hour.
        """
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
    """Return the cost that is due as soon as an instance is launched.

    That is one minute, or its boot and tail if they take longer.
    """
    return usd_h * max(BILLED_LEAST_S, tail_s) / 3600


def launches(wanted: int, each: float, purses: Sequence[Purse]) -> int:
    """Return how many of `wanted` launches these budgets pay for, and commit their cost.

    `each` is the cost of one launch in USD.
    """
    left = min((purse.left_usd for purse in purses), default=0.0)
    count = wanted if each <= 0 or not purses else min(wanted, _times(left, each))
    for purse in purses:
        purse.take(count * each)
    return count


def _times(left_usd: float, each_usd: float) -> int:
    """Return how often `each_usd` fits into `left_usd`, with tolerance for rounding errors."""
    return int(max(0.0, left_usd) / each_usd + 1e-9)
