"""Search for candidates: a coarse grid, doubled fleets, and ever smaller steps from the best candidate.

The search is deterministic, so equal results lead to the same candidates in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType

from batchlab.core.model import Pool
from batchlab.core.pricing.price_book import PriceBook
from batchlab.scenarios.model.values import Prewarm, Scenario
from batchlab.scenarios.planner.candidates import (
    Candidate,
    EvaluatedCandidate,
    Goal,
    Instance,
    PoolConfig,
    PoolDemand,
    TrialResult,
    TrialRunner,
    instance_choices,
)
from batchlab.scenarios.planner.plan import frontier

SIZE_FACTORS = (0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
"""Pool sizes that the search tries, as multiples of the size that would finish all work by the deadline without
overhead.
"""
DRAIN_SHARES = (0.6, 0.25, 0.08)
"""Drain targets that the search tries, as shares of the deadline."""
MIN_DRAIN_S = 1.0
MIN_PREWARM_S = 60.0
"""Minimum duration of prewarming in seconds."""


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Sensible sizes and instance types of each pool.

    `pools` has the scenario's own pools, and `choices` the instance types among which the search chooses.
    """

    demand: Mapping[str, PoolDemand]
    deadline_s: float
    pools: Mapping[str, Pool]
    choices: Mapping[str, Sequence[Instance]] = MappingProxyType({})

    @classmethod
    def of(cls, scenario: Scenario, base: TrialResult, deadline_s: float, book: PriceBook) -> SizeLimits:
        """Derive the size limits from the run of the unchanged scenario."""
        pools = {plan.pool.name: plan.pool for plan in scenario.pools}
        return cls(base.pools, deadline_s, pools, instance_choices(scenario, book))

    def needed(self, fleet: PoolConfig) -> int:
        """Return the number of instances that finish all work by the deadline if the instances are always busy."""
        demand, own = self.demand[fleet.pool], fleet.instance or self.pools[fleet.pool]
        work_time_s = self.deadline_s - demand.boot_s
        if work_time_s <= 0:
            work_time_s = self.deadline_s
        busy_s = max(demand.work_s / own.slots, demand.gpu_s / max(1, own.gpus))
        return self.fit(fleet, math.ceil(busy_s / work_time_s - 1e-9))

    def useful(self, fleet: PoolConfig) -> int:
        """Return the number of instances that all tasks would use if the tasks ran at once."""
        demand, own = self.demand[fleet.pool], fleet.instance or self.pools[fleet.pool]
        return max(1, math.ceil(max(demand.slots / own.slots, demand.gpus / max(1, own.gpus))))

    def fit(self, fleet: PoolConfig, size: int) -> int:
        """Return `size`, limited to the range from 1 to the pool's useful size."""
        return max(1, min(self.useful(fleet), size))


def round_to_two_digits(number: float) -> float:
    """Round a number to two significant digits."""
    if number <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(number))
    return round(number, digits)


def scale_pools(start: Candidate, limits: SizeLimits, factor: float) -> Candidate:
    """Return the candidate with all pools scaled to `factor` times their needed size, up to their useful size."""
    sizes = [math.ceil(factor * limits.needed(fleet) - 1e-9) for fleet in start.fleets]
    fleets = [with_max_size(fleet, limits.fit(fleet, size)) for fleet, size in zip(start.fleets, sizes, strict=True)]
    return _fit_prewarming(start, fleets)


def other_types(start: Candidate, limits: SizeLimits) -> Iterator[Candidate]:
    """Yield the candidates with another instance type of one pool. The pool can do about the same work at once."""
    for fleet in start.fleets:
        for instance in limits.choices.get(fleet.pool, ()):
            if instance != fleet.instance:
                other = replace(fleet, instance=instance)
                factor = limits.needed(other) / limits.needed(fleet)
                other = replace(other, min_size=math.ceil(factor * fleet.min_size - 1e-9))
                size = max(other.min_size, math.ceil(factor * fleet.max_size - 1e-9))
                yield _replace_pools(start, {fleet.pool: with_max_size(other, limits.fit(other, size))})


def with_max_size(fleet: PoolConfig, most: int) -> PoolConfig:
    return replace(fleet, max_size=most, min_size=min(fleet.min_size, most))


def _fit_prewarming(start: Candidate, fleets: Sequence[PoolConfig]) -> Candidate:
    """Replace the pools of the candidate, and limit the sizes of prewarmings to the range of the new pools."""
    by_pool = {fleet.pool: fleet for fleet in fleets}
    warm = (replace(warm, min_size=min(warm.min_size, by_pool[warm.pool].max_size)) for warm in start.prewarm)
    prewarm = tuple(plan for plan in warm if plan.min_size > by_pool[plan.pool].min_size)
    return replace(start, fleets=tuple(fleets), prewarm=prewarm)


def coarse_grid(start: Candidate, limits: SizeLimits, deadline_s: float) -> list[Candidate]:
    """Return the first candidates of the search: `start`, combinations of pool sizes and drain targets, and
    combinations of pool sizes and other instance types."""
    drains = [start.drain_s, *(max(MIN_DRAIN_S, round_to_two_digits(s * deadline_s)) for s in DRAIN_SHARES)]
    candidates = [
        replace(scale_pools(start, limits, factor), drain_s=drain_s) for factor in SIZE_FACTORS for drain_s in drains
    ]
    candidates += [
        scale_pools(other, limits, factor) for other in other_types(start, limits) for factor in SIZE_FACTORS
    ]
    return list(dict.fromkeys([start, *candidates]))


def with_spot_variants(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return variants of each candidate with 0%, 50%, and 100% Spot Instances.

    A larger Spot fleet may be cheaper than a smaller On-Demand fleet, but a search in small steps does not get from the
    On-Demand fleet to the Spot fleet.
    """
    return [
        replace(candidate, fleets=tuple(replace(fleet, spot=share) for fleet in candidate.fleets))
        for candidate in candidates
        for share in (0.0, 0.5, 1.0)
    ]


def double_size(start: Candidate, limits: SizeLimits) -> Candidate | None:
    """Return the candidate with doubled pool sizes, up to the useful sizes, or None if all pools have their useful
    size.
    """
    fleets = [with_max_size(f, min(limits.useful(f), 2 * f.max_size)) for f in start.fleets]
    candidate = _fit_prewarming(start, fleets)
    return None if candidate == start else candidate


def neighbors(best: Candidate, limits: SizeLimits, step: float) -> list[Candidate]:
    """Return candidates that differ from `best` by a small change.

    `step` is the relative change of sizes, which starts at 0.5 and becomes smaller.
    """
    candidates = [
        *_size_changes(best, limits, step),
        *_drain_changes(best, step),
        *_spot_changes(best, step),
        *_size_and_spot_changes(best, limits, step),
        *_minimum_changes(best, step),
        *_prewarm_changes(best, limits, step),
        *other_types(best, limits),
    ]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate != best]


def _replace_pools(best: Candidate, changed: Mapping[str, PoolConfig]) -> Candidate:
    return _fit_prewarming(best, [changed.get(fleet.pool, fleet) for fleet in best.fleets])


def _size_changes(best: Candidate, limits: SizeLimits, step: float) -> Iterator[Candidate]:
    def resize(fleet: PoolConfig, factor: float, more: int) -> PoolConfig:
        size = round(fleet.max_size * factor)
        size = fleet.max_size + more if size == fleet.max_size else size
        return with_max_size(fleet, limits.fit(fleet, size))

    for factor, more in ((1 - step, -1), (1 + step, 1), (1 - step / 2, -1), (1 + step / 2, 1)):
        yield _replace_pools(best, {f.pool: resize(f, factor, more) for f in best.fleets})
        if len(best.fleets) > 1:
            for fleet in best.fleets:
                yield _replace_pools(best, {fleet.pool: resize(fleet, factor, more)})
    for more in (-1, 1):
        for fleet in best.fleets:
            yield _replace_pools(best, {fleet.pool: resize(fleet, 1.0, more)})


def _drain_changes(best: Candidate, step: float) -> Iterator[Candidate]:
    if best.drain_s is not None:
        for factor in (1 / (1 + step), 1 + step):
            yield replace(best, drain_s=max(MIN_DRAIN_S, round_to_two_digits(best.drain_s * factor)))


def _spot_changes(best: Candidate, step: float) -> Iterator[Candidate]:
    shares = {0.0, 1.0} if step >= 0.5 else set()
    for fleet in best.fleets:
        for share in sorted(shares | {max(0.0, fleet.spot - step), min(1.0, fleet.spot + step)}):
            yield _replace_pools(best, {fleet.pool: replace(fleet, spot=round(share, 3))})
    if len(best.fleets) > 1:
        for share in sorted(shares):
            yield _replace_pools(best, {f.pool: replace(f, spot=share) for f in best.fleets})


def _size_and_spot_changes(best: Candidate, limits: SizeLimits, step: float) -> Iterator[Candidate]:
    """Yield candidates with changed sizes and Spot shares, because more instances compensate for a Spot wave."""
    for sign, share, extra in product((1, -1), (step, 2 * step), (1, 2)):
        fleets = []
        for fleet in best.fleets:
            spot = max(0.0, min(1.0, fleet.spot + sign * share))
            resized = with_max_size(fleet, limits.fit(fleet, fleet.max_size + sign * extra))
            fleets.append(replace(resized, spot=round(spot, 3)))
        yield _fit_prewarming(best, fleets)


def _minimum_changes(best: Candidate, step: float) -> Iterator[Candidate]:
    for fleet in best.fleets:
        less, more = fleet.min_size, fleet.min_size + max(1, round(step * fleet.max_size / 2))
        for size in (0, math.floor(less * (1 - step)), min(fleet.max_size, more)):
            yield _replace_pools(best, {fleet.pool: replace(fleet, min_size=size)})


def _prewarm_changes(best: Candidate, limits: SizeLimits, step: float) -> Iterator[Candidate]:
    """Yield candidates with a removed, smaller, larger, or new prewarming.

    A pool without a prewarming gets a prewarming that begins before the pool's demand rises.
    """

    def with_plans(*plans: Prewarm) -> Candidate:
        return replace(best, prewarm=tuple(sorted(plans, key=lambda plan: (plan.at_s, plan.pool))))

    for i, prewarm in enumerate(best.prewarm):
        others = (*best.prewarm[:i], *best.prewarm[i + 1 :])
        yield replace(best, prewarm=others)
        change = max(1, round(step * prewarm.min_size))
        fleet = next(f for f in best.fleets if f.pool == prewarm.pool)
        for size in (prewarm.min_size - change, min(fleet.max_size, prewarm.min_size + change)):
            if size > fleet.min_size:
                yield with_plans(*others, replace(prewarm, min_size=size))
    for fleet in best.fleets:
        demand = limits.demand[fleet.pool]
        if demand.rise_s is None or any(prewarm.pool == fleet.pool for prewarm in best.prewarm):
            continue
        at_s = math.floor(max(0.0, demand.rise_s - 1.1 * demand.boot_s))
        until_s = math.ceil(demand.rise_s + max(MIN_PREWARM_S, demand.boot_s))
        for size in sorted({fleet.max_size, math.ceil(fleet.max_size / 2), fleet.min_size} - {0}):
            candidate = with_plans(*best.prewarm, Prewarm(fleet.pool, size, float(at_s), float(until_s)))
            if size > fleet.min_size:
                yield candidate
            if fleet.min_size:  # the yielded candidate replaces the pool's permanent instances by the prewarming
                yield _replace_pools(candidate, {fleet.pool: replace(fleet, min_size=0)})


def pick_evenly(points: Sequence[Candidate], number: int) -> list[Candidate]:
    """Return `number` evenly spread candidates of `points`, including the first and the last candidate."""
    if len(points) <= number:
        return list(points)
    steps = [round(i * (len(points) - 1) / (number - 1)) for i in range(number)]
    return [points[i] for i in dict.fromkeys(steps)]


STEP_SIZES = (0.5, 0.25, 0.12, 0.06)
PROMOTED_CANDIDATES = 8
"""Number of candidates of the coarse grid that run with more than one seed.

After the coarse grid, each round of the search runs half of this number of candidates with more than one seed.
"""
USD_TOLERANCE, TIME_TOLERANCE = 1.005, 1.01
"""Relative differences of costs and times below which candidates count as equal."""


class RunLimitReached(Exception):
    """The search has used all of its allowed runs."""


@dataclass(slots=True)
class Evaluations:
    """Candidates that were evaluated in the simulator or in the fast model, with their results.

    `hard` has the indexes of the seeds with which a chosen candidate must meet the goal. The first seed in `hard` is
    also used to preselect candidates. `limit` is the maximum number of runs.
    """

    trials: TrialRunner
    goal: Goal
    hard: list[int]
    limit: int
    rough: bool = False
    phase: str = ""
    on_progress: Callable[[], None] = lambda: None
    results: dict[Candidate, dict[int, TrialResult]] = field(default_factory=dict)
    """Results of trials by candidate and seed index."""
    runs: int = 0

    def measure(self, candidates: Iterable[Candidate], indices: Sequence[int]) -> None:
        """Run the trials that do not have a result yet. Raise RunLimitReached if the limit of runs is reached."""
        missing = [
            (candidate, index)
            for candidate in dict.fromkeys(candidates)
            for index in indices
            if index not in self.results.get(candidate, {})
        ]
        for candidate, _ in missing:
            # Candidates are inserted in the given order, because the first of equally good candidates wins.
            self.results.setdefault(candidate, {})
        allowed = missing[: max(0, self.limit - self.runs)]
        trials = [self.trials.trial(candidate, index, rough=self.rough) for candidate, index in allowed]
        for trial, result in self.trials.results(trials):
            self.results[trial.candidate][trial.index] = result
            self.runs += 1
            self.on_progress()
        if len(allowed) < len(missing):
            raise RunLimitReached

    def point(self, candidate: Candidate, indices: Sequence[int]) -> EvaluatedCandidate:
        results = self.results[candidate]
        return EvaluatedCandidate(candidate, tuple(results[i] for i in indices))

    def points(self) -> list[EvaluatedCandidate]:
        """Return the candidates with results for all seeds, or else the candidates with results for the most seeds."""
        for count in range(len(self.hard), 0, -1):
            indices = self.hard[:count]
            done = [candidate for candidate, results in self.results.items() if all(i in results for i in indices)]
            if done:
                return [self.point(candidate, indices) for candidate in done]
        return []

    def in_time(self, point: EvaluatedCandidate) -> bool:
        return all(map(self.goal.in_time, point.outcomes))

    def meets(self, point: EvaluatedCandidate) -> bool:
        return point.met(self.goal) == len(point.outcomes)

    def rank(self, point: EvaluatedCandidate) -> tuple[float, ...]:
        """Return the sort key of a candidate.

        Candidates that meet the goal come first, by cost, time, and simplicity. Candidates that are in time but too
        expensive come second. Candidates that are late come last, by lateness and unfinished work.
        """
        usd, finish_s = (tolerance_class(point.usd, USD_TOLERANCE), tolerance_class(point.finish_s, TIME_TOLERANCE))
        exactly = (*map(float, point.candidate.simplicity), point.usd, point.finish_s)
        if self.in_time(point):
            return 0.0 if self.meets(point) else 1.0, usd, finish_s, *exactly
        undone = sum(outcome.lost + outcome.failed_jobs for outcome in point.outcomes)
        return 2.0, finish_s, float(undone) if math.isinf(finish_s) else 0.0, usd, *exactly

    def rank_all(self) -> list[EvaluatedCandidate]:
        return sorted(self.points(), key=self.rank)

    def best(self) -> EvaluatedCandidate | None:
        """Return the cheapest candidate that meets the goal with all seeds, or else the candidate nearest to the
        goal.
        """
        return min(self.points(), key=self.rank, default=None)

    def explore(self, start: Candidate, limits: SizeLimits) -> None:
        """Run a complete search. Raise RunLimitReached if the limit of runs is reached."""
        self.phase = "a coarse grid"
        grid = coarse_grid(start, limits, self.goal.deadline_s)
        best = self._best_of_each_size(self.preselect(grid))
        points = self.preselect([*grid, *with_spot_variants(point.candidate for point in best)])
        edge = pick_evenly([point.candidate for point in frontier(points)], PROMOTED_CANDIDATES)
        self.measure([*(point.candidate for point in points[:PROMOTED_CANDIDATES]), *edge], self.hard)
        # The search doubles the fleet while no candidate is in time and larger fleets are still faster.
        while (point := self.best()) is not None and not self.in_time(point):
            larger = double_size(point.candidate, limits)
            if larger is None or larger in self.results:
                break
            self.measure([larger], self.hard)
            if self.point(larger, self.hard).finish_s * TIME_TOLERANCE > point.finish_s:
                break
        self.refine(limits, STEP_SIZES)

    def preselect(self, candidates: Sequence[Candidate]) -> list[EvaluatedCandidate]:
        """Evaluate the candidates with the first seed, and return the candidates in order, the best candidate first."""
        self.measure(candidates, self.hard[:1])
        return sorted((self.point(candidate, self.hard[:1]) for candidate in candidates), key=self.rank)

    def _best_of_each_size(self, points: Sequence[EvaluatedCandidate]) -> list[EvaluatedCandidate]:
        """Return the best candidate of each observed fleet size that is in time, or the overall best."""
        best: dict[int, EvaluatedCandidate] = {}
        for point in points:
            best.setdefault(point.peak, point)
        return [point for point in best.values() if self.in_time(point)][:PROMOTED_CANDIDATES] or list(best.values())[
            :1
        ]

    def refine(self, limits: SizeLimits, steps: Sequence[float]) -> None:
        """Search around the best candidate with the step sizes in `steps`.

        Raise RunLimitReached if the limit of runs is reached.
        """
        for step in steps:
            self.phase = f"steps of {step:.0%} from the best"
            # A second round with the same step follows, because a better candidate may have another good neighbor at
            # the same distance.
            for _ in range(2):
                before = self.best()
                assert before is not None
                points = self.preselect(neighbors(before.candidate, limits, step))
                least = self.rank(self.point(before.candidate, self.hard[:1]))
                better = [point.candidate for point in points if self.rank(point) < least]
                self.measure(better[: PROMOTED_CANDIDATES // 2], self.hard)
                after = self.best()
                if after is None or after.candidate == before.candidate:
                    break


def tolerance_class(number: float, factor: float) -> float:
    """Return a number that is equal for nearly equal arguments and keeps the order of different arguments."""
    if not 0 < number < math.inf:
        return -math.inf if number <= 0 else number
    return float(math.floor(math.log(number) / math.log(factor)))
