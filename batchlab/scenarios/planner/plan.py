"""Answer of the planner: the recommended fleet, the certainty of the recommendation, and the alternatives.

The certainty of an answer is computed only from fresh seeds, which the search has not used. A search selects candidates
that were lucky with the seeds of the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Protocol, TypeVar

from batchlab.scenarios.model.values import Fault, FaultName, Scenario
from batchlab.scenarios.planner.candidates import EvaluatedCandidate, Goal, TrialResult, apply_candidate, quantiles

Z_95 = 1.959964
"""Quantile of the normal distribution for a two-sided 95% interval."""


class Priced(Protocol):
    """Protocol of an item with a cost and a time."""

    @property
    def usd(self) -> float: ...

    @property
    def finish_s(self) -> float: ...


P = TypeVar("P", bound=Priced)


def frontier(points: Iterable[P]) -> list[P]:
    """Return the points that no other point beats in both cost and time, from the cheapest to the fastest.

    Points with an infinite time or cost are skipped.
    """
    best: list[P] = []
    finite = (point for point in points if math.isfinite(point.usd) and math.isfinite(point.finish_s))
    for point in sorted(finite, key=lambda point: (point.usd, point.finish_s)):
        if not best or point.finish_s < best[-1].finish_s:
            best.append(point)
    return best


@dataclass(frozen=True, slots=True)
class SeedShare:
    """Share of seeds that met the goal, with a 95% confidence interval."""

    met: int
    of: int

    @property
    def value(self) -> float:
        return self.met / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's score interval (1927), which is also valid for shares of 0 and 1."""
        if not self.of:
            return 0.0, 1.0
        n, p, z2 = self.of, self.value, Z_95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, object]:
        low, high = self.interval
        return {"met": self.met, "of": self.of, "share": self.value, "low": low, "high": high}


REQUIRED_SHARE = 0.95
"""Share of seeds with which a recommended fleet must meet the goal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Answer of the planner.

    `chosen` is the recommended candidate if `holds` is true, or else the candidate nearest to the goal. `searched` is
    the number of seeds with which the search selected `chosen`. `fresh` has the results of `chosen` for other seeds,
    and `seeds` is the required number of other seeds. `failed` is the number of candidates whose confirmation failed
    before. `frontier` is sorted from the cheapest to the fastest candidate, by the latest finish time in the search.
    `waves` is True if a Spot wave was added to the scenario.
    """

    scenario: Scenario
    goal: Goal
    chosen: EvaluatedCandidate
    frontier: tuple[EvaluatedCandidate, ...]
    seeds: int
    runs: int
    searched: int
    waves: bool
    fresh: tuple[TrialResult, ...] = ()
    failed: int = 0
    cut: str = ""

    @property
    def outcomes(self) -> tuple[TrialResult, ...]:
        """Return the results of the fresh seeds, or the results of the search if no fresh seed has run."""
        return self.fresh or self.chosen.outcomes

    @property
    def met(self) -> SeedShare:
        """Return the share of results that meet both the deadline and the budget."""
        return self._share(self.goal.met)

    @property
    def in_time(self) -> SeedShare:
        """Return the share of results that meet the deadline."""
        return self._share(self.goal.in_time)

    @property
    def in_budget(self) -> SeedShare | None:
        """Return the share of results within the budget, or None if the goal does not have a budget."""
        return None if self.goal.budget_usd is None else self._share(self.goal.in_budget)

    def _share(self, met: Callable[[TrialResult], bool]) -> SeedShare:
        return SeedShare(sum(map(met, self.outcomes)), len(self.outcomes))

    @property
    def sure(self) -> bool:
        """Return whether all required fresh seeds have run."""
        return len(self.fresh) == self.seeds

    @property
    def holds(self) -> bool:
        """Return whether all required fresh seeds have run and enough fresh seeds meet the goal."""
        return self.sure and is_enough(self.met)

    @property
    def undone(self) -> int:
        """Count the results with unfinished work."""
        return sum(not outcome.is_done for outcome in self.outcomes)

    @property
    def missed_waves(self) -> SeedShare:
        """Return the share of results whose Spot wave did not hit an instance."""
        hits = [outcome.hit for outcome in self.outcomes if outcome.hit is not None]
        return SeedShare(hits.count(False), len(hits))

    @property
    def affordable(self) -> EvaluatedCandidate | None:
        """Return the fastest candidate of the frontier within the budget, or None without a budget or such a
        candidate.
        """
        if self.goal.budget_usd is None:
            return None
        within = [point for point in self.frontier if all(map(self.goal.in_budget, point.outcomes))]
        return within[-1] if within else None

    @property
    def chooses_types(self) -> bool:
        """Return whether the search has chosen the instance type of a pool."""
        return any(fleet.instance for fleet in self.chosen.candidate.fleets)

    @property
    def planned(self) -> Scenario:
        """Return the scenario with the chosen fleet and policy."""
        return apply_candidate(self.scenario, self.chosen.candidate)

    @property
    def idle_waves(self) -> tuple[Fault, ...]:
        """Return the scenario's Spot waves that do not have a target in the chosen fleet.

        A scenario with a Spot wave that does not have a target is invalid.
        """
        on_spot = {fleet.pool for fleet in self.chosen.candidate.fleets if fleet.spot}
        return tuple(
            fault
            for fault in self.scenario.faults
            if fault.name is FaultName.SPOT_WAVE and not (fault.pool in on_spot if fault.pool else on_spot)
        )

    @property
    def assumed(self) -> list[str]:
        """Return the assumptions of the plan, with one sentence for each assumption."""
        wave = (
            "as the scenario has no Spot wave, all Spot Instances are interrupted once, in the quarter of the deadline "
            "in which most of them have work"
        )
        return [
            "a run's time is from when its first job is due until its last one has ended",
            "its cost is at AWS's list prices, Spot at what is typical in the price book",
            "a minimum is paid for until the deadline, however early the work is done",
            "cooldown, idle time, slots and instance types are as in the scenario"
            + (", except for pools whose tasks need GPUs" if self.chooses_types else ""),
            *(
                [
                    "a task with GPUs takes the same time on each instance type of the family, and the slots of a type "
                    "are in proportion to its vCPUs"
                ]
                if self.chooses_types
                else []
            ),
            *([wave] if self.waves else []),
            *(
                ["shares are as in the scenario, but the choice of candidates ignores them"]
                if self.scenario.shares
                else []
            ),
        ]

    def to_json(self) -> dict[str, object]:
        outcomes, in_budget = self.outcomes, self.in_budget
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            "deadline_s": self.goal.deadline_s,
            "budget_usd": self.goal.budget_usd,
            "holds": self.holds,
            "recommended": self.chosen.candidate.to_json(),
            "fresh_seeds": [result.seed for result in self.fresh],
            "met": self.met.to_json(),
            "in_time": self.in_time.to_json(),
            "in_budget": in_budget.to_json() if in_budget else None,
            "not_done": self.undone,
            "failed_before": self.failed,
            "finish_s": quantiles([outcome.finish_s for outcome in outcomes]),
            "usd": quantiles([outcome.usd for outcome in outcomes]),
            "usd_mean": mean(outcome.usd for outcome in outcomes),
            "late_jobs": max(outcome.late for outcome in outcomes),
            "waves_missed": self.missed_waves.met,
            "idle_waves_at_s": [fault.at_s for fault in self.idle_waves],
            "frontier": [point.to_json() for point in self.frontier],
            "searched_seeds": self.searched,
            "runs": self.runs,
            "cut": self.cut,
            "assumed": self.assumed,
        }


def is_enough(share: SeedShare) -> bool:
    """Return whether the share of seeds is large enough for a recommendation."""
    return share.met >= REQUIRED_SHARE * share.of - 1e-9
