"""Candidates tried one by one: in the simulator, or in a sketch of it, in several processes.

Invariant: all candidates live through the same arrivals and task times, seed by seed (common random
numbers), so that what differs is theirs; what a trial comes to is the same in whichever process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from batchlab.core.errors import BatchlabError
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.scenarios.model.random_streams import Stream
from batchlab.scenarios.model.values import FaultName, Scenario
from batchlab.scenarios.planner.candidates import (
    BUSIEST_WINDOW,
    Candidate,
    Goal,
    TrialResult,
    allowed_failures,
    apply_candidate,
    current_candidate,
    trial_result,
)
from batchlab.scenarios.verdicts.record import Record
from batchlab.sim.process_pool import Crew, Died

Forecaster = Callable[[Scenario, int], Record]
"""Forecasts a scenario with a seed; pickled where there are several processes."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one candidate; `wave_s` is when its Spot instances are taken. `rough`: as a
    sketch."""

    candidate: Candidate
    index: int
    seed: int
    wave_s: float | None
    rough: bool = False


@dataclass(frozen=True, slots=True)
class _TrialTask:
    """One run, in whichever process; only what it came to is sent back."""

    scenario: Scenario
    run: Forecaster
    sketch: Forecaster | None
    book: PriceBook
    deadline_s: float
    allowed_failures: Mapping[str, float]

    def __call__(self, trial: Trial) -> TrialResult | BatchlabError:
        run = self.sketch if trial.rough and self.sketch is not None else self.run
        try:
            made = run(apply_candidate(self.scenario, trial.candidate, trial.wave_s), trial.seed)
            return trial_result(made, self.book, self.deadline_s, self.allowed_failures)
        except BatchlabError as error:
            return error


@dataclass(slots=True)
class TrialRunner:
    """Where runs are made. Its processes stay until it is closed."""

    scenario: Scenario
    goal: Goal
    run: Forecaster
    sketch: Forecaster | None = None
    processes: int = 1
    book: PriceBook = field(default_factory=price_book.load)
    window_s: float = 0.0
    """When the span begins in which the Spot wave comes, seconds of the run."""
    _crew: Crew[Trial, TrialResult | BatchlabError] | None = None
    _work: _TrialTask = field(init=False)

    def __post_init__(self) -> None:
        self._work = _TrialTask(
            self.scenario,
            self.run,
            self.sketch,
            self.book,
            self.goal.deadline_s,
            allowed_failures(self.scenario),
        )

    @property
    def waves(self) -> bool:
        """Whether a Spot wave is added, because the scenario has none of its own."""
        return all(fault.name is not FaultName.SPOT_WAVE for fault in self.scenario.faults)

    def trial(self, candidate: Candidate, index: int, *, rough: bool = False) -> Trial:
        """With the seed of that index, counted from the scenario's own."""
        seed = self.scenario.seed + index
        wave_s = None
        if self.waves:
            width_s = BUSIEST_WINDOW * self.goal.deadline_s
            wave_s = self.window_s + width_s * Stream(seed, "plan", "spot-wave").unit()
        return Trial(candidate, index, seed, wave_s, rough)

    def base(self) -> TrialResult:
        """The scenario as it is, without a wave that it has not itself; in the sketch where there
        is one. BatchlabError."""
        start, rough = current_candidate(self.scenario), self.sketch is not None
        return _result_or_raise(self._work(Trial(start, 0, self.scenario.seed, None, rough)))

    def outcomes(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, TrialResult]]:
        """Each with what it came to, in the order in which they are done. BatchlabError where one
        cannot be run, or has taken its process with it."""
        if self.processes <= 1 or len(trials) <= 1:
            for trial in trials:
                yield trial, _result_or_raise(self._work(trial))
            return
        if self._crew is None:
            self._crew = Crew(self._work, self.processes)
        with closing(self._crew.each(trials)) as each:
            for trial, found in each:
                yield trial, _result_or_raise(found)

    def close(self) -> None:
        """End the processes."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None


def _result_or_raise(found: TrialResult | BatchlabError | Died) -> TrialResult:
    if isinstance(found, Died):
        raise BatchlabError(
            f"A simulated run ended with exit code {found.exit_code} instead of an answer.",
            remedy="Plan again with --jobs 1, and on a machine with more memory.",
        )
    if isinstance(found, BatchlabError):
        raise found
    return found
