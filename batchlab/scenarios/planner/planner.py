"""The deadline planner: fleets and policies tried in the simulator until the cheapest that is in
time is found; and how sure that is, by seeds that the search has not seen.

Invariant: the answer depends on the scenario and its seed alone, not on how many processes looked
for it. Whenever the search is ended, what is known by then holds.
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
"""Seeds that every serious candidate lives through; those that confirm the best come after them."""
GUIDED_SEEDS = 2
"""The same where a sketch has made the choice before."""
MAX_CONFIRMATIONS = 4
"""So many candidates may fail in fresh seeds before the search gives up being sure."""
FIRST_SEEDS = 4
"""Fresh seeds with which a confirmation begins; the others follow where it has not failed yet."""
EXPLORATION_SHARE = 0.75
"""Of the runs that are not kept to confirm an answer, until a first one is there."""
MAX_RUNS = 300
MAX_MODEL_RUNS = 500
"""Runs that a sketch may make."""
MAX_ROUNDS = 4
"""So often the sketch is held against the simulator, and asked again."""
PICKED_CANDIDATES = 3
"""Candidates of a sketch that are simulated in each round, and as many beside them in the first
one, along the frontier."""


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """How far the search is: simulated runs, of at most `runs`, what it is at, and the best."""

    done: int
    runs: int
    phase: str
    best: EvaluatedCandidate | None


@dataclass(slots=True)
class Search:
    """A search, and what it knows so far. `seeds` is how many confirm the answer; `sketch` runs a
    scenario roughly and quickly, and says what is worth simulating."""

    scenario: Scenario
    goal: Goal
    run: Forecaster
    seeds: int = 20
    processes: int = 1
    runs: int = MAX_RUNS
    sketch: Forecaster | None = None
    book: PriceBook = field(default_factory=price_book.load)
    """Prices what a minimum costs until the deadline; `run` and `sketch` have theirs."""
    told: Callable[[SearchProgress], None] = lambda _: None
    cut: str = ""
    """Why it ended before it had tried all that it wanted to."""
    real: Evaluations = field(init=False)
    """What was simulated."""
    attempts: dict[Candidate, list[int]] = field(default_factory=dict)
    """Who was to be confirmed, in this order, by which fresh seeds."""
    _trials: TrialRunner = field(init=False)
    _rough: Evaluations = field(init=False)
    """The same in the sketch, where there is one."""

    def __post_init__(self) -> None:
        if self.goal.deadline_s <= 0:
            raise UsageError("A deadline of 0 s is met by nothing.", remedy="Write for example 6h.")
        if self.runs <= self.seeds:
            raise UsageError(
                f"Of {self.runs} runs none is left to search with: {self.seeds} seeds are to "
                "confirm the answer, a run each.",
                remedy=f"Give --runs more than {self.seeds}, or --seeds less than {self.runs}.",
            )
        self._trials = TrialRunner(
            self.scenario, self.goal, self.run, self.sketch, self.processes, self.book
        )
        searched = min(SEARCH_SEEDS if self.sketch is None else GUIDED_SEEDS, self.seeds)
        # What it takes to be sure of the best is kept for the end, and something for the next one
        # where that fails.
        limit = max(1, int(EXPLORATION_SHARE * (self.runs - self.seeds)))
        self.real = Evaluations(self._trials, self.goal, list(range(searched)), limit)
        self.real.phase = "the scenario as it is"
        self._rough = Evaluations(
            self._trials, self.goal, list(range(SEARCH_SEEDS)), MAX_MODEL_RUNS, rough=True
        )
        self.real.told = self._rough.told = self._tell

    @property
    def done(self) -> int:
        """Simulated runs."""
        return self.real.done

    def search(self) -> None:
        """Look for it; what is found is in the answer, also where this is ended by an exception."""
        try:
            self._search()
        finally:
            self._trials.close()

    def _search(self) -> None:
        base = self._trials.base()
        self._trials.window_s = base.busiest_s
        start = current_candidate(self.scenario)
        if self.sketch is None:
            self.real.done += 1
            if not (self._trials.waves and any(fleet.spot for fleet in start.fleets)):
                self.real.known[start] = {0: base}
            self.real.told()
        room = SizeLimits.of(self.scenario, base, self.goal.deadline_s)
        if self.sketch is None:
            self._within(partial(self.real.explore, start, room))
        else:
            self._within(partial(self._guided, start, room))
        self._confirm(room)

    def _within(self, call: Callable[[], None]) -> None:
        """As far as the runs allow."""
        try:
            call()
        except RunLimitReached:
            self.cut = (
                f"of the {self.runs:,} runs that it may make, {self.seeds:,} are kept to confirm "
                "an answer"
            )

    def _tell(self) -> None:
        self.told(SearchProgress(self.done, self.runs, self.real.phase, self.real.best()))

    def _guided(self, start: Candidate, room: SizeLimits) -> None:
        """Search in a sketch, simulate what is best there, put the sketch right by what is seen,
        and search again."""
        self.real.phase = "a sketch of it"
        _until_run_limit(partial(self._rough.explore, start, room))
        edge = [one.candidate for one in frontier(self._rough.points())]
        self._simulate([*self._worth_it(), *pick_evenly(edge, PICKED_CANDIDATES)])
        for _ in range(MAX_ROUNDS):
            before = self.real.best()
            self._ask(room)
            after = self.real.best()
            if after is None or before is None or after.candidate == before.candidate:
                return

    def _ask(self, room: SizeLimits) -> None:
        """The sketch once more, by what is known of how far it is off."""
        self._put_right()
        self.real.phase = "a sketch of it"
        _until_run_limit(partial(self._rough.refine, room, STEP_SIZES[1:]))
        self._simulate(self._worth_it())

    def _simulate(self, candidates: Sequence[Candidate]) -> None:
        """With one seed; then, but for those that others beat there, with all that count."""
        self.real.phase = "the best of a sketch"
        looked = self.real.look(list(dict.fromkeys(candidates)))
        good = [*looked[: PICKED_CANDIDATES - 1], *frontier(looked)]
        self.real.measure([one.candidate for one in good], self.real.hard)

    def _worth_it(self) -> list[Candidate]:
        """The best in the sketch that have not been simulated, no two of them alike."""
        found: dict[tuple[float, float], Candidate] = {}
        for point in self._rough.ranked():
            kind = (
                tolerance_class(point.usd, USD_TOLERANCE),
                tolerance_class(point.finish_s, TIME_TOLERANCE),
            )
            found.setdefault(kind, point.candidate)
            if len(found) == 4 * PICKED_CANDIDATES:
                break
        return [one for one in found.values() if not self.real.known.get(one)][:PICKED_CANDIDATES]

    def _put_right(self) -> None:
        """What is asked of the sketch is to mean in the simulator what was asked for."""
        pairs = [
            (found, self._rough.known[candidate][index])
            for candidate, outcomes in self.real.known.items()
            for index, found in outcomes.items()
            if index in self._rough.known.get(candidate, {})
        ]
        pairs = [(a, b) for a, b in pairs if a.is_done and b.is_done and b.finish_s and b.usd]
        late = [a.finish_s / b.finish_s for a, b in pairs] or [1.0]
        dear = [a.usd / b.usd for a, b in pairs] or [1.0]
        budget_usd = self.goal.budget_usd
        self._rough.goal = Goal(
            self.goal.deadline_s / median(late),
            None if budget_usd is None else budget_usd / median(dear),
        )

    def _confirm(self, room: SizeLimits) -> None:
        """Put the best to seeds that nobody has chosen by, and where it fails there the next one to
        others."""
        while (best := self._candidate()) is not None:
            self.real.phase = f"being sure over {self.seeds} fresh seeds"
            first = SEARCH_SEEDS + len(self.attempts) * self.seeds
            fresh = self.attempts[best.candidate] = list(range(first, first + self.seeds))
            self.real.limit = self.done + self.seeds
            missed = self._missed(best.candidate, fresh)
            self.real.limit = max(1, self.runs - self.seeds)
            if (
                missed is None
                or not self.real.meets(best)
                or len(self.attempts) == MAX_CONFIRMATIONS
            ):
                return
            # What failed there had good luck before: all others have to pass that seed too.
            self.real.phase = "a seed that is harder"
            self._within(partial(self._again, room, missed))
            if self.done + self.seeds > self.runs:
                return

    def _candidate(self) -> EvaluatedCandidate | None:
        """The best that was not to be confirmed before; None where nothing else meets the goal."""
        left = [one for one in self.real.ranked() if one.candidate not in self.attempts]
        if not left or (self.attempts and not self.real.meets(left[0])):
            return None
        return left[0]

    def _missed(self, candidate: Candidate, fresh: Sequence[int]) -> int | None:
        """The index of the seed that was worst, where it misses the goal once too often."""
        for indices in (fresh[:FIRST_SEEDS], fresh):
            self.real.measure([candidate], indices)
            outcomes = self.real.known[candidate]
            missed = [
                (outcomes[i].finish_s, outcomes[i].usd, -i)
                for i in indices
                if not self.goal.met(outcomes[i])
            ]
            if len(missed) > (1 - REQUIRED_SHARE) * self.seeds + 1e-9:
                return -max(missed)[2]
        return None

    def _again(self, room: SizeLimits, missed: int) -> None:
        """From now on that seed counts, too: one after another is put to it until one passes; and
        there may be better ones for it."""
        rivals = self.real.ranked()
        self.real.hard.append(missed)
        for one in rivals:
            if one.candidate in self.attempts or not self.real.meets(one):
                continue
            self.real.measure([one.candidate], [missed])
            if self.real.meets(self.real.point(one.candidate, self.real.hard)):
                break
        if self.sketch is None:
            self.real.refine(room, STEP_SIZES[1:])
            return
        self._rough.hard.append(missed)
        again = [one.candidate for one in self._rough.ranked()[: 2 * PROMOTED_CANDIDATES]]
        _until_run_limit(partial(self._rough.measure, again, [missed]))
        self._ask(room)

    def answer(self) -> Plan | None:
        """What is known; None where not one candidate is."""
        chosen, fresh = self._chosen()
        if chosen is None:
            return None
        others = (
            one
            for one in self.real.points()
            if one.candidate != chosen.candidate
            # Of what is hardly better the simpler one was taken, and stands for it.
            and not (one.usd <= chosen.usd and one.finish_s <= chosen.finish_s)
        )
        return Plan(
            self.scenario,
            self.goal,
            chosen,
            tuple(frontier([chosen, *others])),
            self.seeds,
            self.done,
            len(chosen.outcomes),
            self._trials.waves
            and any(fleet.spot for one in self.real.known for fleet in one.fleets),
            fresh=fresh,
            failed=max(0, len(self.attempts) - 1),
            cut=self.cut,
        )

    def _chosen(self) -> tuple[EvaluatedCandidate | None, tuple[TrialResult, ...]]:
        """Who was confirmed, else who came nearest to it; with the fresh seeds it has seen."""
        found = []
        for candidate, indices in self.attempts.items():
            outcomes = self.real.known[candidate]
            fresh = tuple(outcomes[i] for i in indices if i in outcomes)
            share = sum(map(self.goal.met, fresh)) / len(fresh) if fresh else 0.0
            found.append(
                (len(fresh) == self.seeds and share >= REQUIRED_SHARE, share, candidate, fresh)
            )
        if not found:
            return self.real.best(), ()
        _, _, candidate, fresh = max(found, key=lambda one: one[:2])
        outcomes = self.real.known[candidate]
        return self.real.point(candidate, [i for i in self.real.hard if i in outcomes]), fresh


def _until_run_limit(call: Callable[[], None]) -> None:
    """A sketch that may not go on has told enough."""
    try:
        call()
    except RunLimitReached:
        return
