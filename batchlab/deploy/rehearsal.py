"""Steps of the acceptance run `batchlab deploy rehearse`, and the limits on their time and cost.

Invariants: the steps that remove resources always run, also after a failed step, an interruption, or a reached budget.
A step that did not run is recorded as not tried, with the reason, and never as passed. A failed step does not prevent
the steps that do not need its result. Time includes the time for which the machine was suspended, because AWS bills it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

from batchlab.core.errors import BatchlabError
from batchlab.core.operating_system import since_boot_s
from batchlab.core.pricing.price_book import shown
from batchlab.core.text import span


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_TRIED = "not tried"


class NotTried(Exception):
    """Error of a step that cannot run in this account. The text of the exception is a sentence with the reason."""


class TimeLimit(SystemExit):
    """End of a step at its time limit. Any other SystemExit in a step is an interruption by the user."""


class Limits(Protocol):
    """Time limit of a step, and interruptions by the user."""

    @property
    def interruptions(self) -> int:
        """Number of signals of the user so far. The code of a step may lose the exception of a signal."""

    def limited(self, limit_s: float) -> AbstractContextManager[None]:
        """Return a context manager that raises TimeLimit in its block after `limit_s` seconds, or another SystemExit
        after a signal of the user.
        """


@dataclass(frozen=True, slots=True)
class Comparison:
    """Observation of a step next to the expected value, which is the value on the emulators or the estimate."""

    subject: str
    expected: str
    observed: str


@dataclass(slots=True)
class StepNotes:
    """Notes of a step for the report: sentences about its work, comparisons, and measured figures by name."""

    done: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def compare(self, subject: str, expected: object, observed: object) -> None:
        self.comparisons.append(Comparison(subject, str(expected), str(observed)))


@dataclass(frozen=True, slots=True)
class Step:
    """Step of a rehearsal, which `run` executes within `limit_s` seconds.

    `needs` contains the names of the steps that must pass first. If `removes` is true, the step removes resources, so
    the step always runs, and an interruption repeats the step once.
    """

    name: str
    what: str
    run: Callable[[StepNotes], None]
    limit_s: float
    needs: tuple[str, ...] = ()
    removes: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step. `reason` explains why the step failed or was not tried."""

    name: str
    what: str
    outcome: Outcome
    reason: str
    seconds: float
    notes: StepNotes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome.value, "seconds": round(self.seconds, 1)}


@dataclass(frozen=True, slots=True)
class Budget:
    """Maximum cost of a rehearsal.

    The running cost is an upper bound, because AWS reports costs only a day later. `usd_per_h` is the highest cost per
    hour of the stack with all its workers on demand. `fixed_usd` is the highest cost that does not depend on time.
    `reserve_s` is the time in seconds that remains for the removal of the stack.
    """

    usd: float
    usd_per_h: float
    fixed_usd: float
    reserve_s: float

    def spent_usd(self, elapsed_s: float) -> float:
        """Return the highest possible cost after `elapsed_s` seconds."""
        return self.fixed_usd + self.usd_per_h * elapsed_s / 3600

    def left_s(self, elapsed_s: float) -> float:
        """Return the seconds after which the removal must begin, so that the cost stays within the budget."""
        return (self.usd - self.fixed_usd) / self.usd_per_h * 3600 - self.reserve_s - elapsed_s


@dataclass(slots=True)
class Rehearsal:
    """One run of the steps.

    `on_begin` receives each step and its limit in seconds, and `on_end` receives each result. An error of one of both
    is reported, and does not stop the rehearsal.
    """

    steps: Sequence[Step]
    budget: Budget
    limits: Limits
    on_begin: Callable[[Step, float], None] = lambda _step, _limit_s: None
    on_end: Callable[[StepResult], None] = lambda _result: None
    say: Callable[[str], None] = lambda _text: None
    clock: Callable[[], float] = since_boot_s
    results: list[StepResult] = field(default_factory=list, init=False)
    is_interrupted: bool = field(default=False, init=False)
    is_over_budget: bool = field(default=False, init=False)
    is_warned: bool = field(default=False, init=False)
    """Whether the user knows that another interruption stops the removal."""
    begun_s: float = field(default=0.0, init=False)

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.begun_s

    @property
    def has_succeeded(self) -> bool:
        """Whether no step failed, and the rehearsal was not stopped."""
        failed = any(result.outcome is Outcome.FAILED for result in self.results)
        return not (failed or self.is_interrupted or self.is_over_budget)

    def run(self) -> list[StepResult]:
        """Run all steps in order, and return their results."""
        self.begun_s = self.clock()
        for step in self.steps:
            result = self._result_of(step)
            self.results.append(result)
            if self.budget.spent_usd(self.elapsed_s) > self.budget.usd:
                self.is_over_budget = True
            self._report(partial(self.on_end, result))
        return self.results

    def _report(self, show: Callable[[], None]) -> None:
        """Call `show`. An error of the terminal or of the report must not prevent the removal."""
        try:
            show()
        except Exception as error:  # noqa: BLE001 - see the docstring
            with suppress(Exception):
                self.say(f"The report is incomplete: {type(error).__name__}: {error}")

    def _result_of(self, step: Step) -> StepResult:
        notes, begun_s = StepNotes(), self.clock()
        limit_s = step.limit_s if step.removes else min(step.limit_s, self.budget.left_s(self.elapsed_s))
        if obstacle := self._obstacle(step, limit_s):
            return StepResult(step.name, step.what, Outcome.NOT_TRIED, obstacle, 0.0, notes)
        self._report(partial(self.on_begin, step, limit_s))
        outcome, reason = self._run(step, notes, limit_s)
        return StepResult(step.name, step.what, outcome, reason, self.clock() - begun_s, notes)

    def _obstacle(self, step: Step, limit_s: float) -> str:
        """Return the reason why the step cannot begin, or ""."""
        if step.removes:
            return ""
        if self.is_interrupted:
            return "The rehearsal was interrupted."
        if limit_s <= 0:
            self.is_over_budget = True
            return f"The cost may have reached the budget of {shown(self.budget.usd)}."
        passed = {result.name for result in self.results if result.outcome is Outcome.PASSED}
        missing = [name for name in step.needs if name not in passed]
        return f"The step {missing[0]!r} did not pass." if missing else ""

    def _run(self, step: Step, notes: StepNotes, limit_s: float) -> tuple[Outcome, str]:
        before = self.limits.interruptions
        outcome, reason, is_interrupted = self._attempt(step, notes, limit_s)
        if not (is_interrupted or self.limits.interruptions > before):
            return outcome, reason
        self.is_interrupted = True
        if not step.removes or outcome is not Outcome.FAILED or self.is_warned:
            return outcome, reason
        self.is_warned = True
        self._report(lambda: self.say("Interrupted. The removal continues. Another interruption stops the removal."))
        return self._run(step, notes, limit_s)

    def _attempt(self, step: Step, notes: StepNotes, limit_s: float) -> tuple[Outcome, str, bool]:
        """Run the step once. Return the outcome, the reason, and whether the user has interrupted the step."""
        try:
            with self.limits.limited(limit_s):
                step.run(notes)
        except NotTried as reason:
            return Outcome.NOT_TRIED, str(reason), False
        except BatchlabError as error:
            return Outcome.FAILED, str(error), False
        except TimeLimit:
            return Outcome.FAILED, self._timeout(step, limit_s), False
        except (SystemExit, KeyboardInterrupt):
            return Outcome.FAILED, "The step was interrupted.", True
        except Exception as error:  # noqa: BLE001 - the report contains the error, and the removal must still run
            return Outcome.FAILED, f"An unexpected error occurred: {type(error).__name__}: {error}", False
        return Outcome.PASSED, "", False

    def _timeout(self, step: Step, limit_s: float) -> str:
        if limit_s < step.limit_s:
            self.is_over_budget = True
            return f"The step was stopped, because the cost may reach the budget of {shown(self.budget.usd)}."
        return f"The step did not end within {span(limit_s)}."


def count_outcomes(results: Iterable[StepResult]) -> str:
    """Return the numbers of results by outcome as a sentence."""
    outcomes = [result.outcome for result in results]
    failed, skipped = outcomes.count(Outcome.FAILED), outcomes.count(Outcome.NOT_TRIED)
    passed = f"{outcomes.count(Outcome.PASSED)} of {len(outcomes)} steps passed"
    return f"{passed}, {failed} failed, and {skipped} {'was' if skipped == 1 else 'were'} not tried."
