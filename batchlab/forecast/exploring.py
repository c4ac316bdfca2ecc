"""How candidates are sought: a coarse look, growth, and steps from the best, ever smaller.

Invariant: which are tried follows from what earlier ones came to, and from nothing else: no tie
goes to the faster process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from batchlab.forecast import moves
from batchlab.forecast.candidates import Candidate, Goal, Outcome, Point
from batchlab.forecast.frontier import frontier
from batchlab.forecast.moves import Room
from batchlab.forecast.trials import Trials

STEPS = (0.5, 0.25, 0.12, 0.06)
PROMOTED = 8
"""Candidates of the coarse look that are taken beyond the first seed; of each later round half as
many."""
ALIKE_USD, ALIKE_S = 1.005, 1.01
"""Costs and times that differ by less are the same to whoever has to choose."""


class TooMany(Exception):
    """The search has made as many runs as it may."""


@dataclass(slots=True)
class Field:
    """The candidates that were tried in one way, and what they came to.

    `hard` are indices of the seeds that all serious candidates must pass; the first is for a first
    look, in which most are dropped. `limit` is how many runs may be made."""

    trials: Trials
    goal: Goal
    hard: list[int]
    limit: int
    rough: bool = False
    phase: str = ""
    told: Callable[[], None] = lambda: None
    known: dict[Candidate, dict[int, Outcome]] = field(default_factory=dict)
    """By candidate and index of the seed."""
    done: int = 0

    # --- Runs ------------------------------------------------------------------------------------

    def measure(self, candidates: Iterable[Candidate], indices: Sequence[int]) -> None:
        """Run what is not known yet; TooMany."""
        wanted = [
            (candidate, index)
            for candidate in dict.fromkeys(candidates)
            for index in indices
            if index not in self.known.get(candidate, {})
        ]
        for candidate, _ in wanted:
            # In this order, and not in that in which processes come back: ties go to the first.
            self.known.setdefault(candidate, {})
        may = wanted[: max(0, self.limit - self.done)]
        trials = [self.trials.trial(*one, rough=self.rough) for one in may]
        for trial, found in self.trials.outcomes(trials):
            self.known[trial.candidate][trial.index] = found
            self.done += 1
            self.told()
        if len(may) < len(wanted):
            raise TooMany

    # --- What is known ---------------------------------------------------------------------------

    def point(self, candidate: Candidate, indices: Sequence[int]) -> Point:
        outcomes = self.known[candidate]
        return Point(candidate, tuple(outcomes[i] for i in indices))

    def points(self) -> list[Point]:
        """All that have been through the seeds that count; while there are none, through fewer."""
        for count in range(len(self.hard), 0, -1):
            indices = self.hard[:count]
            found = [
                self.point(candidate, indices)
                for candidate, outcomes in self.known.items()
                if all(i in outcomes for i in indices)
            ]
            if found:
                return found
        return []

    def in_time(self, point: Point) -> bool:
        return all(map(self.goal.in_time, point.outcomes))

    def meets(self, point: Point) -> bool:
        return point.met(self.goal) == len(point.outcomes)

    def rank(self, point: Point) -> tuple[float, ...]:
        """The less the better: what meets the goal by its cost, of what costs the same the faster,
        of those the simpler one; then likewise what is in time and too dear; then by how late it
        is, and by how much is not done at all."""
        usd, finish_s = alike(point.usd, ALIKE_USD), alike(point.finish_s, ALIKE_S)
        exactly = (*map(float, point.candidate.simplicity), point.usd, point.finish_s)
        if self.in_time(point):
            return 0.0 if self.meets(point) else 1.0, usd, finish_s, *exactly
        undone = sum(one.lost + one.failed_jobs for one in point.outcomes)
        return 2.0, finish_s, float(undone) if math.isinf(finish_s) else 0.0, usd, *exactly

    def ranked(self) -> list[Point]:
        return sorted(self.points(), key=self.rank)

    def best(self) -> Point | None:
        """The cheapest that meets the goal in all seeds that count, else what comes nearest."""
        return min(self.points(), key=self.rank, default=None)

    # --- Rounds ----------------------------------------------------------------------------------

    def explore(self, start: Candidate, room: Room) -> None:
        """All of it, from nothing; TooMany."""
        self.phase = "a coarse look"
        grid = moves.coarse(start, room, self.goal.deadline_s)
        looked = self.look(grid)
        looked = self.look([*grid, *moves.bought(one.candidate for one in self._sizes(looked))])
        edge = moves.spread_out([one.candidate for one in frontier(looked)], PROMOTED)
        self.measure([*(one.candidate for one in looked[:PROMOTED]), *edge], self.hard)
        self._grow(room)
        self.refine(room, STEPS)

    def look(self, candidates: Sequence[Candidate]) -> list[Point]:
        """Each with the first seed, the best first."""
        self.measure(candidates, self.hard[:1])
        return sorted((self.point(one, self.hard[:1]) for one in candidates), key=self.rank)

    def _sizes(self, looked: Sequence[Point]) -> list[Point]:
        """The best of each size that a fleet really had, of those in time; the best of all where
        none is."""
        found: dict[int, Point] = {}
        for point in looked:
            found.setdefault(point.peak, point)
        sizes = list(found.values())
        return [one for one in sizes if self.in_time(one)][:PROMOTED] or sizes[:1]

    def _grow(self, room: Room) -> None:
        """Twice as large again while nothing is in time and it still gets faster."""
        while (best := self.best()) is not None and not self.in_time(best):
            more = moves.larger(best.candidate, room)
            if more is None or more in self.known:
                return
            self.measure([more], self.hard)
            if self.point(more, self.hard).finish_s * ALIKE_S > best.finish_s:
                return

    def refine(self, room: Room, steps: Sequence[float]) -> None:
        """Steps from the best; TooMany."""
        for step in steps:
            self.phase = f"steps of {step:.0%} from the best"
            # From a better place there may be a still better one as far away, but not for ever.
            for _ in range(2):
                before = self.best()
                assert before is not None
                looked = self.look(moves.around(before.candidate, room, step))
                at_first = self.rank(self.point(before.candidate, self.hard[:1]))
                good = [one.candidate for one in looked if self.rank(one) < at_first]
                self.measure(good[: PROMOTED // 2], self.hard)
                after = self.best()
                if after is None or after.candidate == before.candidate:
                    break


def alike(number: float, factor: float) -> float:
    """The same for numbers that are nearly the same; in their order."""
    if not 0 < number < math.inf:
        return -math.inf if number <= 0 else number
    return float(math.floor(math.log(number) / math.log(factor)))
