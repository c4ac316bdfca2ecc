"""Comparison of two runs or two sets of runs: changes, confidence, causes, and gates.

Invariants: the runs and the seed alone determine a comparison. A gate fails only if a measure got
worse by more than the gate allows. If the interval is known, it must also exclude 0.
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.errors import UsageError
from batchlab.core.text import figures
from batchlab.reports.compare.measures import MEASURES, Key, Measure, Run, Sample

RESAMPLES = 1_000
SURE = 0.95
GATED = ("p95", "tasks_per_s", "cost")
"""Measures to which `--threshold` applies."""
LITTLE = 0.05
"""A relative change below this value counts as the same if its interval is unknown."""
FLOOR_S = 0.01
"""Times that differ by less than this many seconds pass every gate, because of machine noise."""
_GATE = re.compile(r"\s*(?:(?P<stage>[\w.-]+)\.)?(?P<name>\w+)\s*>\s*(?P<share>[\d.]+)\s*%\s*")
_SHARE = re.compile(r"\s*(?P<share>\d+(\.\d+)?)\s*%?\s*")


@dataclass(frozen=True, slots=True)
class Change:
    """Change of one measure between the medians of both sides.

    `relative` is B's change as a share of A. It is infinite if A is 0 and B is not. `low` and
    `high` are the bounds of its 95% confidence interval. They are None if the spread is unknown,
    for example for a measure of a whole run with one run on each side.
    """

    measure: Measure
    stage: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None

    @property
    def relative(self) -> float:
        if self.a:
            return self.b / self.a - 1
        return math.inf if self.b else 0.0

    @property
    def worse_by(self) -> float:
        """Relative worsening: negative if the measure got better, 0 if no direction counts as
        better.
        """
        if self.measure.more_is_better is None:
            return 0.0
        return -self.relative if self.measure.more_is_better else self.relative

    @property
    def is_sure(self) -> bool | None:
        """Whether the interval excludes 0, or None if the interval is unknown."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    @property
    def is_small(self) -> bool:
        """Whether the difference in seconds is too small for a gate."""
        return self.measure.unit == "s" and abs(self.b - self.a) < FLOOR_S

    @property
    def verdict(self) -> str:
        """ "worse", "better", or "same". It is "" if neither direction of the measure is better."""
        if self.measure.more_is_better is None:
            return ""
        unknown = self.is_sure is None and abs(self.relative) < LITTLE
        if not self.worse_by or self.is_sure is False or self.is_small or unknown:
            return "same"
        return "worse" if self.worse_by > 0 else "better"

    def to_json(self) -> dict[str, object]:
        relative = self.relative
        return {
            "measure": self.measure.name,
            "unit": self.measure.unit,
            "stage": self.stage,
            "a": self.a,
            "b": self.b,
            "relative": relative if math.isfinite(relative) else None,
            "low": self.low,
            "high": self.high,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Gate:
    """Limit for the worsening of a measure, as a share.

    An empty `stage` means the whole run and every stage.
    """

    measure: str
    stage: str
    share: float

    def __str__(self) -> str:
        where = f"{self.stage}." if self.stage else ""
        return f"{where}{self.measure} > {self.share * 100:g}%"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison.

    `changes` follow the order of the stages. `broken` contains the failed gates with their changes.
    `causes` are sentences about what got slower and why, largest first.
    """

    a: Sequence[Run]
    b: Sequence[Run]
    changes: Sequence[Change]
    broken: Sequence[tuple[Gate, Change]]
    causes: Sequence[str]
    notes: Sequence[str]

    def to_json(self) -> dict[str, object]:
        return {
            "a": [run.job for run in self.a],
            "b": [run.job for run in self.b],
            "changes": [change.to_json() for change in self.changes],
            "causes": list(self.causes),
            "broken": [{"gate": str(gate), **change.to_json()} for gate, change in self.broken],
            "notes": list(self.notes),
            "ok": not self.broken,
        }


def gates(threshold: str | None, fail_on: Sequence[str]) -> list[Gate]:
    """Return the gates of `--threshold` and `--fail-on`. Raise UsageError if one is invalid."""
    found = []
    if threshold is not None:
        share = _SHARE.fullmatch(threshold)
        if share is None:
            raise UsageError(
                f"{threshold!r} is not a percentage.", remedy="Write for example --threshold 10%."
            )
        found += [Gate(name, "", float(share["share"]) / 100) for name in GATED]
    for text in fail_on:
        told = _GATE.fullmatch(text)
        known = MEASURES.get(told["name"]) if told else None
        if told is None or known is None or known.more_is_better is None:
            names = ", ".join(n for n, m in MEASURES.items() if m.more_is_better is not None)
            raise UsageError(
                f"{text!r} is no gate.",
                remedy=f"Write a measure and by how much it may get worse, such as 'p95 > 10%', or "
                f"of one stage, 'parse.p95 > 10%'. Measures are {names}.",
            )
        found.append(Gate(known.name, told["stage"] or "", _number(told["share"]) / 100))
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a number.", remedy="Write a number, such as 10."
        ) from None


def compare(
    a: Sequence[Run], b: Sequence[Run], wanted: Sequence[Gate] = (), *, seed: int = 0
) -> Comparison:
    """Compare B with A. Raise UsageError if a gate names a stage that neither side has."""
    stages = list(dict.fromkeys(stage for run in (*b, *a) for stage in run.stages))
    unknown = next((gate for gate in wanted if gate.stage and gate.stage not in stages), None)
    if unknown:
        raise UsageError(
            f"There is no stage {unknown.stage!r} to fail on.",
            remedy=f"The stages are {', '.join(stages)}.",
        )
    changes = [
        change
        for stage in ("", *stages)
        for name in MEASURES
        if (change := _change((name, stage), a, b, random.Random(f"{seed}/{name}/{stage}")))  # noqa: S311
    ]
    broken = [(gate, one) for gate in wanted for one in changes if _breaks(gate, one)]
    known = {(one.measure.name, one.stage): one for one in changes}
    return Comparison(a, b, changes, broken, list(_causes(known, stages)), list(_notes(a, b)))


def _breaks(gate: Gate, change: Change) -> bool:
    if change.measure.name != gate.measure or gate.stage not in ("", change.stage):
        return False
    if change.is_small or change.is_sure is False:
        return False
    return change.worse_by > gate.share


def _change(key: Key, a: Sequence[Run], b: Sequence[Run], rng: random.Random) -> Change | None:
    mine, theirs = _samples(key, a), _samples(key, b)
    if not mine or not theirs:
        return None
    before = statistics.median(one.value for one in mine)
    after = statistics.median(one.value for one in theirs)
    made = Change(MEASURES[key[0]], key[1], before, after)
    spreads = all(len(side) > 1 or side[0].draws for side in (mine, theirs))
    if not spreads or not before:
        return made
    drawn = sorted(_drawn(mine, theirs, rng))
    if len(drawn) < RESAMPLES:
        return made  # some resamples of A are 0, so their ratio is undefined
    tail = (1 - SURE) / 2
    low, high = drawn[int(tail * RESAMPLES)], drawn[int((1 - tail) * RESAMPLES) - 1]
    return Change(made.measure, made.stage, before, after, low, high)


def _samples(key: Key, side: Sequence[Run]) -> list[Sample]:
    return [run.samples[key] for run in side if key in run.samples]


def _drawn(a: Sequence[Sample], b: Sequence[Sample], rng: random.Random) -> Iterator[float]:
    """Yield relative changes between resamples of the runs and of the tasks within each run."""
    for _ in range(RESAMPLES):
        before, after = _resampled(a, rng), _resampled(b, rng)
        if before:
            yield after / before - 1


def _resampled(side: Sequence[Sample], rng: random.Random) -> float:
    # This function runs about 100,000 times per comparison. The `random` and `statistics` functions
    # take five times as long.
    draw, n = rng.random, len(side)
    values = []
    for i in range(n):
        one = side[int(draw() * n)] if n > 1 else side[i]
        draws = one.draws
        values.append(draws[int(draw() * len(draws))] if draws else one.value)
    values.sort()
    return values[n // 2] if n % 2 else (values[n // 2 - 1] + values[n // 2]) / 2


# --- Causes as sentences -------------------------------------------------------------------------

_TELLING = 0.02
"""A smaller relative change gets no sentence."""


def _causes(known: Mapping[Key, Change], stages: Sequence[str]) -> Iterator[str]:
    """Yield sentences about what got slower or more expensive: stages by growth, then the fleet."""

    def grown_s(stage: str) -> float:
        span = known.get(("span", stage))
        return span.b - span.a if span else 0.0

    for stage in sorted(stages, key=grown_s, reverse=True):
        told = list(_of_stage(known, stage))
        if told:
            yield f"{stage}: {'; '.join(told)}"
    yield from _of_fleet(known)
    cost = known.get(("cost", ""))
    if cost and _tells(cost):
        yield f"1,000 tasks cost {cost.a:.3g} USD before, {cost.b:.3g} USD now ({_percent(cost)})"


def _of_stage(known: Mapping[Key, Change], stage: str) -> Iterator[str]:
    tasks = known.get(("tasks", stage))
    if tasks and abs(tasks.relative) > _TELLING:
        yield f"it has {tasks.b:,.0f} tasks in place of {tasks.a:,.0f}"
    for usual, worst, what in (("p50", "p95", "run"), ("wait_p50", "wait_p95", "wait")):
        one, other = known.get((usual, stage)), known.get((worst, stage))
        if one and _tells(one):
            yield f"its tasks {what} longer, {_before_and_now(one)}"
        elif other and _tells(other):
            yield f"its last twentieth {what}s longer, {_before_and_now(other)}"
    for name, what in (("retries", "were tried again"), ("failed", "failed for good")):
        one = known.get((name, stage))
        if one and _tells(one):
            yield f"of 1,000 tasks {one.b:.3g} {what}, {one.a:.3g} before"


def _of_fleet(known: Mapping[Key, Change]) -> Iterator[str]:
    most = known.get(("instances", ""))
    if most and most.b != most.a:
        yield f"the fleet: {most.b:g} instances at the most, {most.a:g} before"
    lag = known.get(("scaling_lag", ""))
    if lag and lag.b - lag.a > 1.0 and lag.relative > _TELLING:
        after, before = figures(lag.b), figures(lag.a)
        yield f"the fleet: capacity comes {after} after it is wanted, {before} before"


def _before_and_now(change: Change) -> str:
    return f"{figures(change.a)} before and {figures(change.b)} now ({_percent(change)})"


def _tells(change: Change) -> bool:
    return change.verdict == "worse" and change.worse_by > _TELLING


def _percent(change: Change) -> str:
    if not math.isfinite(change.relative):
        return "from nothing"
    if change.low is None or change.high is None:
        return f"{change.relative:+.1%}"
    return f"{change.relative:+.1%}, 95% between {change.low:+.1%} and {change.high:+.1%}"


def _notes(a: Sequence[Run], b: Sequence[Run]) -> Iterator[str]:
    names = {run.name for run in (*a, *b)}
    if len(names) > 1:
        yield f"the runs are of different jobs: {', '.join(sorted(names))}"
    before, after = ({stage for run in side for stage in run.stages} for side in (a, b))
    for stage in sorted(before ^ after):
        yield f"stage {stage} is only in {'B' if stage in after else 'A'}"
    for run in (*a, *b):
        if not run.is_final:
            yield f"{run.job} had not ended when its data was written"
    if min(len(a), len(b)) == 1:
        yield (
            "one run on a side: intervals tell how its own tasks spread, not how runs differ, and "
            "what is of a whole run has none; several runs on each side tell more"
        )
