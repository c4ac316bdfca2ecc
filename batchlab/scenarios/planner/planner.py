"""Deadline planner: search for the cheapest fleet and scaling policy that meet a goal, and confirmation with fresh
seeds.

The planner's answer depends only on the scenario and its seed, and not on the number of processes. If the search is
interrupted, the best candidate so far is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from batchlab.core.errors import UsageError
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.planner.candidates import (
    Candidate,
    EvaluatedCandidate,
    Forecaster,
    Goal,
    TrialResult,
    TrialRunner,
    current_candidate,
)
from batchlab.scenarios.planner.plan import REQUIRED_SHARE, Plan, frontier
from batchlab.scenarios.planner.search_steps import (
    PROMOTED_CANDIDATES,
    STEP_SIZES,
    TIME_TOLERANCE,
    USD_TOLERANCE,
    Evaluations,
    RunLimitReached,
    SizeLimits,
    pick_evenly,
    tolerance_class,
)

SEARCH_SEEDS = 3
"""Number of seeds with which the search runs each candidate that did well with the first seed.

The confirmation of a candidate uses other seeds than the search.
"""
GUIDED_SEEDS = 2
"""Value of SEARCH_SEEDS for a search in which the fast model preselects the candidates."""
MAX_CONFIRMATIONS = 4
"""Maximum number of candidates that the planner tries to confirm."""
FIRST_SEEDS = 4
"""Number of seeds in the first part of a confirmation.

The remaining seeds of a confirmation run only if the first part of the confirmation has not failed.
"""
EXPLORATION_SHARE = 0.75
"""Share of the search runs that the planner uses before the first confirmation."""
MAX_RUNS = 300
MAX_MODEL_RUNS = 500
"""Maximum number of runs of the fast model."""
MAX_ROUNDS = 4
"""Maximum number of times that results of the simulator correct the goal of the fast model."""
PICKED_CANDIDATES = 3
"""Number of candidates of the fast model that are simulated per round of the search.

The first round of the search also simulates this number of candidates of the frontier between cost and time.
"""


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """Progress of the search: number of simulated runs, maximum number of runs, phase, and best candidate."""

    done: int
    runs: int
    phase: str
    best: EvaluatedCandidate | None


@dataclass(slots=True)
class Search:
    """Search for the answer of the planner, and the state of the search.

    `seeds` is the number of seeds that confirm the answer. `sketch` runs a scenario in the fast model to select
    candidates.
    """

    scenario: Scenario
    goal: Goal
    run: Forecaster
    seeds: int = 20
    processes: int = 1
    runs: int = MAX_RUNS
    sketch: Forecaster | None = None
    book: PriceBook = field(default_factory=price_book.load)
    """Price book for the cost of the pools' minimum sizes until the deadline."""
    on_progress: Callable[[SearchProgress], None] = lambda _: None
    cut: str = ""
    """Reason why the search ended early."""
    real: Evaluations = field(init=False)
    """Evaluations of candidates in the simulator."""
    attempts: dict[Candidate, list[int]] = field(default_factory=dict)
    """Fresh seeds of each candidate that was or is being confirmed, in the order of the confirmations."""
    _trials: TrialRunner = field(init=False)
    _rough: Evaluations = field(init=False)
    """Evaluations of candidates in the fast model, if the search has a fast model."""

    def __post_init__(self) -> None:
        if self.goal.deadline_s <= 0:
            raise UsageError("A deadline of 0 s cannot be met.", remedy="Write for example 6h.")
        if self.runs <= self.seeds:
            raise UsageError(
                f"All of the {self.runs} runs are needed to confirm the answer with {self.seeds} "
                "seeds, so none is left for the search.",
                remedy=f"Give --runs more than {self.seeds}, or --seeds less than {self.runs}.",
            )
        self._trials = TrialRunner(self.scenario, self.goal, self.run, self.sketch, self.processes, self.book)
        searched = min(SEARCH_SEEDS if self.sketch is None else GUIDED_SEEDS, self.seeds)
        # The limit of runs reserves runs for the confirmation of the best candidate, and some runs for the next
        # candidate.
        limit = max(1, int(EXPLORATION_SHARE * (self.runs - self.seeds)))
        self.real = Evaluations(self._trials, self.goal, list(range(searched)), limit)
        self.real.phase = "the scenario as it is"
        self._rough = Evaluations(self._trials, self.goal, list(range(SEARCH_SEEDS)), MAX_MODEL_RUNS, rough=True)
        self.real.on_progress = self._rough.on_progress = self._report

    @property
    def done(self) -> int:
        """Return the number of simulated runs."""
        return self.real.runs

    def search(self) -> None:
        """Run the search. The answer of the planner is available even if an exception ends the search."""
        try:
            self._search()
        finally:
            self._trials.close()

    def _search(self) -> None:
        base = self._trials.base()
        self._trials.window_s = base.busiest_s
        start = current_candidate(self.scenario)
        if self.sketch is None:
            self.real.runs += 1
            if not (self._trials.waves and any(fleet.spot for fleet in start.fleets)):
                self.real.results[start] = {0: base}
            self.real.on_progress()
        limits = SizeLimits.of(self.scenario, base, self.goal.deadline_s, self.book)
        if self.sketch is None:
            self._until_limit(partial(self.real.explore, start, limits))
        else:
            self._until_limit(partial(self._guide, start, limits))
        self._confirm(limits)

    def _until_limit(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RunLimitReached:
            self.cut = f"{self.seeds:,} of the {self.runs:,} runs are reserved to confirm the answer"

    def _report(self) -> None:
        self.on_progress(SearchProgress(self.done, self.runs, self.real.phase, self.real.best()))

    def _guide(self, start: Candidate, limits: SizeLimits) -> None:
        """Search in the fast model, simulate the best candidates of the fast model, correct the goal of the fast model,
        and repeat.
        """
        self.real.phase = "the fast model"
        _until_run_limit(partial(self._rough.explore, start, limits))
        edge = [point.candidate for point in frontier(self._rough.points())]
        self._simulate([*self._promising(), *pick_evenly(edge, PICKED_CANDIDATES)])
        for _ in range(MAX_ROUNDS):
            before = self.real.best()
            self._search_again(limits)
            after = self.real.best()
            if after is None or before is None or after.candidate == before.candidate:
                return

    def _search_again(self, limits: SizeLimits) -> None:
        self._correct_goal()
        self.real.phase = "the fast model"
        _until_run_limit(partial(self._rough.refine, limits, STEP_SIZES[1:]))
        self._simulate(self._promising())

    def _simulate(self, candidates: Sequence[Candidate]) -> None:
        """Simulate the candidates with one seed, and the best candidates with all seeds."""
        self.real.phase = "the best of the fast model"
        points = self.real.preselect(list(dict.fromkeys(candidates)))
        good = [*points[: PICKED_CANDIDATES - 1], *frontier(points)]
        self.real.measure([point.candidate for point in good], self.real.hard)

    def _promising(self) -> list[Candidate]:
        """Return the best candidates of the fast model that were not simulated yet, without similar candidates."""
        best: dict[tuple[float, float], Candidate] = {}
        for point in self._rough.rank_all():
            kind = (tolerance_class(point.usd, USD_TOLERANCE), tolerance_class(point.finish_s, TIME_TOLERANCE))
            best.setdefault(kind, point.candidate)
            if len(best) == 4 * PICKED_CANDIDATES:
                break
        return [candidate for candidate in best.values() if not self.real.results.get(candidate)][:PICKED_CANDIDATES]

    def _correct_goal(self) -> None:
        """Scale the goal of the fast model by its measured errors."""
        pairs = [
            (result, self._rough.results[candidate][index])
            for candidate, results in self.real.results.items()
            for index, result in results.items()
            if index in self._rough.results.get(candidate, {})
        ]
        pairs = [(a, b) for a, b in pairs if a.is_done and b.is_done and b.finish_s and b.usd]
        time_factor = median([a.finish_s / b.finish_s for a, b in pairs] or [1.0])
        usd_factor = median([a.usd / b.usd for a, b in pairs] or [1.0])
        budget_usd = self.goal.budget_usd
        self._rough.goal = Goal(
            self.goal.deadline_s / time_factor, None if budget_usd is None else budget_usd / usd_factor
        )

    def _confirm(self, limits: SizeLimits) -> None:
        """Confirm the best candidate with fresh seeds.

        If a confirmation fails, confirm the next candidate with other seeds.
        """
        while (best := self._candidate()) is not None:
            self.real.phase = f"confirmation by {self.seeds} fresh seeds"
            first = SEARCH_SEEDS + len(self.attempts) * self.seeds
            fresh = self.attempts[best.candidate] = list(range(first, first + self.seeds))
            self.real.limit = self.done + self.seeds
            missed = self._first_miss(best.candidate, fresh)
            self.real.limit = max(1, self.runs - self.seeds)
            if missed is None or not self.real.meets(best) or len(self.attempts) == MAX_CONFIRMATIONS:
                return
            # The candidate that failed was only lucky with the earlier seeds. All other candidates must therefore also
            # pass the seed with which the candidate failed.
            self.real.phase = "a harder seed"
            self._until_limit(partial(self._add_failed_seed, limits, missed))
            if self.done + self.seeds > self.runs:
                return

    def _candidate(self) -> EvaluatedCandidate | None:
        """Return the best candidate without a confirmation so far, or None. After a failed confirmation, the candidate
        must meet the goal.
        """
        best = next((point for point in self.real.rank_all() if point.candidate not in self.attempts), None)
        return None if best is None or (self.attempts and not self.real.meets(best)) else best

    def _first_miss(self, candidate: Candidate, fresh: Sequence[int]) -> int | None:
        """Return the index of the worst seed if too many seeds miss the goal, else None."""
        for indices in (fresh[:FIRST_SEEDS], fresh):
            self.real.measure([candidate], indices)
            outcomes = self.real.results[candidate]
            missed = [(outcomes[i].finish_s, outcomes[i].usd, -i) for i in indices if not self.goal.met(outcomes[i])]
            if len(missed) > (1 - REQUIRED_SHARE) * self.seeds + 1e-9:
                return -max(missed)[2]
        return None

    def _add_failed_seed(self, limits: SizeLimits, missed: int) -> None:
        """Add the seed with which a candidate failed to the seeds of the search.

        Run other candidates with the added seed until one candidate meets the goal, and then refine the search.
        """
        rivals = self.real.rank_all()
        self.real.hard.append(missed)
        for rival in rivals:
            if rival.candidate in self.attempts or not self.real.meets(rival):
                continue
            self.real.measure([rival.candidate], [missed])
            if self.real.meets(self.real.point(rival.candidate, self.real.hard)):
                break
        if self.sketch is None:
            self.real.refine(limits, STEP_SIZES[1:])
            return
        self._rough.hard.append(missed)
        again = [point.candidate for point in self._rough.rank_all()[: 2 * PROMOTED_CANDIDATES]]
        _until_run_limit(partial(self._rough.measure, again, [missed]))
        self._search_again(limits)

    def answer(self) -> Plan | None:
        """Return the plan, or None if no candidate has a result."""
        chosen, fresh = self._choose()
        if chosen is None:
            return None
        others = (
            point
            for point in self.real.points()
            if point.candidate != chosen.candidate
            # The simplest of several nearly equal candidates was chosen, and represents the other candidates.
            and not (point.usd <= chosen.usd and point.finish_s <= chosen.finish_s)
        )
        return Plan(
            self.scenario,
            self.goal,
            chosen,
            tuple(frontier([chosen, *others])),
            self.seeds,
            self.done,
            len(chosen.outcomes),
            self._trials.waves and any(fleet.spot for candidate in self.real.results for fleet in candidate.fleets),
            fresh=fresh,
            failed=max(0, len(self.attempts) - 1),
            cut=self.cut,
        )

    def _choose(self) -> tuple[EvaluatedCandidate | None, tuple[TrialResult, ...]]:
        """Return the confirmed candidate, or else the candidate nearest to the goal, with its results for fresh
        seeds.
        """
        attempts = []
        for candidate, indices in self.attempts.items():
            results = self.real.results[candidate]
            fresh = tuple(results[i] for i in indices if i in results)
            share = sum(map(self.goal.met, fresh)) / len(fresh) if fresh else 0.0
            attempts.append((len(fresh) == self.seeds and share >= REQUIRED_SHARE, share, candidate, fresh))
        if not attempts:
            return self.real.best(), ()
        _, _, candidate, fresh = max(attempts, key=lambda attempt: attempt[:2])
        results = self.real.results[candidate]
        return self.real.point(candidate, [i for i in self.real.hard if i in results]), fresh


def _until_run_limit(call: Callable[[], None]) -> None:
    try:
        call()
    except RunLimitReached:
        return
