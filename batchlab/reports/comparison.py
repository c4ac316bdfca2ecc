"""Comparison of two jobs or two sets of jobs: measures, changes, confidence intervals, causes, and gates.

Invariants: only the runs and the random seed determine a comparison, so a repeated comparison has equal results. A gate
fails only if a measure got worse by more than the gate allows. If the confidence interval of the measure's change is
known, the gate fails only if the interval also excludes 0.
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import UsageError
from batchlab.core.pricing.price_book import shown
from batchlab.core.text import figures
from batchlab.reports.queries import store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DRAWS = 200
"""Number of resamples of the tasks of one run."""
MIN_RESAMPLED_TASKS = 5
"""Minimum number of tasks in a stage for which percentiles are resampled."""
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_COLUMNS = (("", "run_s"), ("wait_", "wait_s"))


@dataclass(frozen=True, slots=True)
class Measure:
    """Definition of a measure, such as the 95th percentile of the run time.

    `more_is_better` is None for a measure without a better direction. A gate cannot use a measure for which
    `more_is_better` is None.
    """

    name: str
    unit: str
    """Unit of a value: "s", "usd", or the noun of a count."""
    meaning: str
    more_is_better: bool | None = False
    per: str = ""
    """Quantity to which the measure is related, such as "1,000 tasks"."""


_PER = "1,000 tasks"
MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("took", "s", "time from submission to end"),
        Measure("tasks_per_s", "tasks/s", "tasks that succeeded per second", more_is_better=True),
        Measure("cost", "usd", "cost per 1,000 tasks that succeeded", per=_PER),
        Measure("p50", "s", "median run time of a task"),
        Measure("p95", "s", "95th percentile of the run time"),
        Measure("p99", "s", "99th percentile of the run time"),
        Measure("wait_p50", "s", "median time from ready to started"),
        Measure("wait_p95", "s", "95th percentile of the time from ready to started"),
        Measure("retries", "attempts", "retried attempts per 1,000 tasks", per=_PER),
        Measure("failed", "tasks", "tasks per 1,000 that failed for good", per=_PER),
        Measure("wasted", "s", "slot time of failed or lost attempts per 1,000 tasks", per=_PER),
        Measure("tasks", "tasks", "tasks", more_is_better=None),
        Measure("span", "s", "time from a stage's first start to its last end", more_is_better=None),
        Measure("instances", "instances", "maximum number of instances in service", more_is_better=None),
        Measure("scaling_lag", "s", "median time from the request for capacity to its arrival", more_is_better=None),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Value of a measure in one run, and values of the measure in resamples of the run's tasks."""

    value: float
    draws: Sequence[float] = ()


Key = tuple[str, str]
"""Names of a measure and a stage. The stage name "" means the whole run."""


@dataclass(slots=True)
class ComparedRun:
    """Measures of one job, by measure and stage."""

    job: str
    name: str
    is_final: bool
    stages: list[str] = field(default_factory=list)
    samples: dict[Key, Sample] = field(default_factory=dict)

    def put(self, measure: str, stage: str, value: float | None) -> None:
        if value is not None:
            self.samples[measure, stage] = Sample(float(value))

    def count(self, measure: str, stage: str, number: int, of: int, rng: random.Random) -> None:
        """Store the rate of `number` in 1,000, with random draws that express the uncertainty of `number`."""
        draws = tuple(1000 * rng.gammavariate(number + 0.5, 1.0) / of for _ in range(DRAWS))
        self.samples[measure, stage] = Sample(1000 * number / of, draws)


def runs(folders: Sequence[Path], seed: int) -> list[ComparedRun]:
    """Return all runs in the folders in the order of their submission. Raise UsageError if a folder lacks data."""
    with store.open_store(folders) as connection:
        by_job = {run.job: run for run in _jobs(connection, seed)}
        for run in by_job.values():
            _stages(connection, run, seed)
            for stage in run.stages:
                _tasks(connection, run, stage, _rng(seed, run.job, stage, "tasks"))
        _fleet(connection, by_job)
        return list(by_job.values())


def _rng(*of: object) -> random.Random:
    return random.Random("/".join(map(str, of)))  # noqa: S311 - statistics


def _jobs(connection: DuckDBPyConnection, seed: int) -> Iterator[ComparedRun]:
    for row in store.rows(connection, "SELECT * FROM jobs ORDER BY submitted_s, job"):
        run = ComparedRun(row["job"], row["name"], row["is_final"])
        run.put("took", "", row["took_s"])
        if row["took_s"]:
            run.put("tasks_per_s", "", row["succeeded"] / row["took_s"])
        wasted_s = row["failed_run_s"] + row["lost_slot_s"]
        _per_1000(run, "", row, wasted_s, _rng(seed, run.job))
        yield run


def _stages(connection: DuckDBPyConnection, run: ComparedRun, seed: int) -> None:
    sql = "SELECT * FROM stages WHERE job = ? ORDER BY position"
    for row in store.rows(connection, sql, [run.job]):
        stage = row["stage"]
        run.stages.append(stage)
        wasted_s = row["failed_run_s"] * row["slots"]
        _per_1000(run, stage, row, wasted_s, _rng(seed, run.job, stage))
        if row["started_s"] is not None:
            run.put("span", stage, row["ended_s"] - row["started_s"])


def _per_1000(run: ComparedRun, stage: str, row: Mapping[str, Any], wasted_s: float, rng: random.Random) -> None:
    run.put("tasks", stage, row["planned"])
    if row["planned"]:
        run.count("retries", stage, row["retried"], row["planned"], rng)
        run.count("failed", stage, row["failed"], row["planned"], rng)
        run.put("wasted", stage, 1000 * wasted_s / row["planned"])
    if row["succeeded"] and row["cost_usd"] is not None:
        run.put("cost", stage, 1000 * float(row["cost_usd"]) / row["succeeded"])


def _tasks(connection: DuckDBPyConnection, run: ComparedRun, stage: str, rng: random.Random) -> None:
    """Store the quantiles of the times of a stage's tasks, and the quantiles of resamples of the tasks.

    The quantile of a resample equals the value at a random rank, so the function draws ranks instead of resamples.
    DuckDB computes the values at all ranks in one pass.
    """
    where = "FROM tasks WHERE job = ? AND stage = ? AND state = 'SUCCEEDED'"
    (count,) = store.rows(connection, f"SELECT count(*) AS n {where}", [run.job, stage])
    if not (n := count["n"]):
        return
    ranks: list[float] = []
    for share in QUANTILES.values():
        ranks.append(share)
        ranks += [rng.betavariate(n * share + 1, n * (1 - share) + 1) for _ in range(DRAWS)]
    wanted = ", ".join(repr(min(1.0, max(0.0, rank))) for rank in ranks)
    columns = ", ".join(f"quantile_cont({c}, [{wanted}]) AS {c}" for _, c in _COLUMNS)
    (row,) = store.rows(connection, f"SELECT {columns} {where}", [run.job, stage])
    for prefix, column in _COLUMNS:
        values = row[column]
        for i, name in enumerate(QUANTILES):
            measure = f"{prefix}{name}"
            if values is not None and measure in MEASURES:
                first = i * (DRAWS + 1)
                draws = tuple(values[first + 1 : first + 1 + DRAWS]) if n >= MIN_RESAMPLED_TASKS else ()
                run.samples[measure, stage] = Sample(values[first], draws)


def _fleet(connection: DuckDBPyConnection, runs_by_job: Mapping[str, ComparedRun]) -> None:
    instances = (
        "SELECT job, sum(most) AS instances FROM (SELECT job, pool, max(in_service) AS most "
        "FROM fleet GROUP BY job, pool) GROUP BY job"
    )
    for row in store.rows(connection, instances):
        runs_by_job[row["job"]].put("instances", "", row["instances"])
    for row in store.rows(connection, store.find_query("scaling_lag").sql):
        run, lag_s = runs_by_job[row["job"]], row["lag_p50_s"]
        sample = run.samples.get(("scaling_lag", ""))
        if lag_s is not None and (sample is None or lag_s > sample.value):
            run.put("scaling_lag", "", lag_s)


RESAMPLES = 1_000
CONFIDENCE = 0.95
THRESHOLD_MEASURES = ("p95", "tasks_per_s", "cost")
"""Measures to which the option `--threshold` applies."""
MIN_CHANGE = 0.05
"""Minimum relative change for the verdict "worse" or "better" if the confidence interval is unknown."""
MIN_CHANGE_S = 0.01
"""Minimum difference in seconds for which a gate fails. Smaller differences are noise of the machine."""
_GATE = re.compile(r"\s*(?:(?P<stage>[\w.-]+)\.)?(?P<name>\w+)\s*>\s*(?P<share>[\d.]+)\s*%\s*")
_SHARE = re.compile(r"\s*(?P<share>\d+(\.\d+)?)\s*%?\s*")


@dataclass(frozen=True, slots=True)
class Change:
    """Change of one measure, from its median in the runs A to its median in the runs B.

    `relative` is the change as a share of the median in A, and infinite if only the median in A is 0. `low` and `high`
    are the bounds of the 95% confidence interval of `relative`. `low` and `high` are None if the spread is unknown, for
    example for the duration of a single run.
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
        """Relative worsening of the measure.

        A negative result is an improvement. The result is also 0 for a measure without a better direction.
        """
        if self.measure.more_is_better is None:
            return 0.0
        return -self.relative if self.measure.more_is_better else self.relative

    @property
    def is_sure(self) -> bool | None:
        """Whether the confidence interval of the change excludes 0, or None if the interval is unknown."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    @property
    def is_small(self) -> bool:
        """Whether the difference of the medians is less than `MIN_CHANGE_S` seconds. A gate does not fail for a small
        difference.
        """
        return self.measure.unit == "s" and abs(self.b - self.a) < MIN_CHANGE_S

    @property
    def verdict(self) -> str:
        """Verdict "worse", "better", or "same", or "" for a measure without a better direction."""
        if self.measure.more_is_better is None:
            return ""
        unknown = self.is_sure is None and abs(self.relative) < MIN_CHANGE
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
    """Limit for the relative worsening of a measure.

    A gate with an empty `stage` applies to the whole run and to every stage.
    """

    measure: str
    stage: str
    share: float

    def __str__(self) -> str:
        where = f"{self.stage}." if self.stage else ""
        return f"{where}{self.measure} > {self.share * 100:g}%"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison of the runs A and B.

    `changes` lists the changes in the order of the stages. `broken` contains each failed gate with the change that the
    gate does not allow. `causes` contains sentences about slower stages, with the largest slowdown first.
    """

    a: Sequence[ComparedRun]
    b: Sequence[ComparedRun]
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
    """Return the gates in the options `--threshold` and `--fail-on`. Raise UsageError for an invalid gate."""
    gates = []
    if threshold is not None:
        share = _SHARE.fullmatch(threshold)
        if share is None:
            raise UsageError(f"{threshold!r} is not a percentage.", remedy="An example is --threshold 10%.")
        gates += [Gate(name, "", float(share["share"]) / 100) for name in THRESHOLD_MEASURES]
    for text in fail_on:
        match = _GATE.fullmatch(text)
        measure = MEASURES.get(match["name"]) if match else None
        if match is None or measure is None or measure.more_is_better is None:
            names = ", ".join(n for n, m in MEASURES.items() if m.more_is_better is not None)
            raise UsageError(
                f"{text!r} is not a gate.",
                remedy="Write a measure and how much worse it may get, such as 'p95 > 10%', or 'parse.p95 > 10%' for "
                f"one stage. The measures are {names}.",
            )
        gates.append(Gate(measure.name, match["stage"] or "", _number(match["share"]) / 100))
    return gates


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number.", remedy="Write a number, such as 10.") from None


def compare(
    a: Sequence[ComparedRun], b: Sequence[ComparedRun], wanted: Sequence[Gate] = (), *, seed: int = 0
) -> Comparison:
    """Compare the runs `b` with the runs `a`. Raise UsageError if a gate names a stage that does not exist in the
    runs.
    """
    stages = list(dict.fromkeys(stage for run in (*b, *a) for stage in run.stages))
    unknown = next((gate for gate in wanted if gate.stage and gate.stage not in stages), None)
    if unknown:
        raise UsageError(
            f"No run has the stage {unknown.stage!r} of a gate.", remedy=f"The stages are {', '.join(stages)}."
        )
    changes = [
        change
        for stage in ("", *stages)
        for name in MEASURES
        if (change := _change((name, stage), a, b, random.Random(f"{seed}/{name}/{stage}")))  # noqa: S311
    ]
    broken = [(gate, change) for gate in wanted for change in changes if _breaks(gate, change)]
    by_key = {(change.measure.name, change.stage): change for change in changes}
    return Comparison(a, b, changes, broken, list(_causes(by_key, stages)), list(_notes(a, b)))


def _breaks(gate: Gate, change: Change) -> bool:
    if change.measure.name != gate.measure or gate.stage not in ("", change.stage):
        return False
    if change.is_small or change.is_sure is False:
        return False
    return change.worse_by > gate.share


def _change(key: Key, a: Sequence[ComparedRun], b: Sequence[ComparedRun], rng: random.Random) -> Change | None:
    samples, other_samples = _samples(key, a), _samples(key, b)
    if not samples or not other_samples:
        return None
    before = statistics.median(sample.value for sample in samples)
    after = statistics.median(sample.value for sample in other_samples)
    change = Change(MEASURES[key[0]], key[1], before, after)
    spreads = all(len(side) > 1 or side[0].draws for side in (samples, other_samples))
    if not spreads or not before:
        return change
    changes = sorted(_resampled_changes(samples, other_samples, rng))
    if len(changes) < RESAMPLES:
        return change  # If a resample of A is 0, the relative change is undefined.
    tail = (1 - CONFIDENCE) / 2
    low, high = changes[int(tail * RESAMPLES)], changes[int((1 - tail) * RESAMPLES) - 1]
    return Change(change.measure, change.stage, before, after, low, high)


def _samples(key: Key, side: Sequence[ComparedRun]) -> list[Sample]:
    return [run.samples[key] for run in side if key in run.samples]


def _resampled_changes(a: Sequence[Sample], b: Sequence[Sample], rng: random.Random) -> Iterator[float]:
    """Yield the relative change from a resample of A to a resample of B, up to `RESAMPLES` times.

    A resample draws runs at random, and then draws tasks within each run.
    """
    for _ in range(RESAMPLES):
        before, after = _resampled_difference(a, rng), _resampled_difference(b, rng)
        if before:
            yield after / before - 1


def _resampled_difference(side: Sequence[Sample], rng: random.Random) -> float:
    # A comparison calls `_resampled_difference` about 100,000 times. Functions of `random` and `statistics` would
    # take five times as long.
    draw, n = rng.random, len(side)
    values = []
    for i in range(n):
        sample = side[int(draw() * n)] if n > 1 else side[i]
        draws = sample.draws
        values.append(draws[int(draw() * len(draws))] if draws else sample.value)
    values.sort()
    return values[n // 2] if n % 2 else (values[n // 2 - 1] + values[n // 2]) / 2


# --- Causes as sentences -------------------------------------------------------------------------

_MIN_REPORTED_CHANGE = 0.02
"""Minimum relative change that a sentence about a cause reports."""


def _causes(changes: Mapping[Key, Change], stages: Sequence[str]) -> Iterator[str]:
    """Yield sentences about slower stages, the fleet, and a higher cost.

    The stage whose time grew most comes first.
    """

    def grown_s(stage: str) -> float:
        span = changes.get(("span", stage))
        return span.b - span.a if span else 0.0

    for stage in sorted(stages, key=grown_s, reverse=True):
        reasons = list(_of_stage(changes, stage))
        if reasons:
            yield f"{stage}: {'; '.join(reasons)}"
    yield from _of_fleet(changes)
    cost = changes.get(("cost", ""))
    if cost and _is_reported(cost):
        yield f"1,000 tasks cost {shown(cost.a)} before and {shown(cost.b)} now ({_percent(cost)})"


def _of_stage(changes: Mapping[Key, Change], stage: str) -> Iterator[str]:
    tasks = changes.get(("tasks", stage))
    if tasks and abs(tasks.relative) > _MIN_REPORTED_CHANGE:
        yield f"it has {tasks.b:,.0f} tasks instead of {tasks.a:,.0f}"
    for usual, worst, what in (("p50", "p95", "run"), ("wait_p50", "wait_p95", "wait")):
        change, other = changes.get((usual, stage)), changes.get((worst, stage))
        if change and _is_reported(change):
            yield f"its tasks {what} longer, {_before_and_now(change)}"
        elif other and _is_reported(other):
            yield f"its slowest 5% of tasks {what} longer, {_before_and_now(other)}"
    for name, what in (("retries", "attempts were retried"), ("failed", "tasks failed for good")):
        change = changes.get((name, stage))
        if change and _is_reported(change):
            yield f"{change.b:.3g} {what} per 1,000 tasks, and {change.a:.3g} before"


def _of_fleet(changes: Mapping[Key, Change]) -> Iterator[str]:
    instances = changes.get(("instances", ""))
    if instances and instances.b != instances.a:
        yield f"the fleet: it had at most {instances.b:g} instances, and {instances.a:g} before"
    lag = changes.get(("scaling_lag", ""))
    if lag and lag.b - lag.a > 1.0 and lag.relative > _MIN_REPORTED_CHANGE:
        after, before = figures(lag.b), figures(lag.a)
        yield f"the fleet: capacity arrives {after} after the request, and {before} after it before"


def _before_and_now(change: Change) -> str:
    return f"{figures(change.a)} before and {figures(change.b)} now ({_percent(change)})"


def _is_reported(change: Change) -> bool:
    return change.verdict == "worse" and change.worse_by > _MIN_REPORTED_CHANGE


def _percent(change: Change) -> str:
    if not math.isfinite(change.relative):
        return "from 0"
    if change.low is None or change.high is None:
        return f"{change.relative:+.1%}"
    return f"{change.relative:+.1%}, 95% between {change.low:+.1%} and {change.high:+.1%}"


def _notes(a: Sequence[ComparedRun], b: Sequence[ComparedRun]) -> Iterator[str]:
    names = {run.name for run in (*a, *b)}
    if len(names) > 1:
        yield f"the runs belong to different jobs: {', '.join(sorted(names))}"
    before, after = ({stage for run in side for stage in run.stages} for side in (a, b))
    for stage in sorted(before ^ after):
        yield f"stage {stage} is only in {'B' if stage in after else 'A'}"
    for run in (*a, *b):
        if not run.is_final:
            yield f"{run.job} had not ended when its data was written"
    if min(len(a), len(b)) == 1:
        yield (
            "one side has a single run, so the intervals show the spread of its tasks, but not the differences between "
            "runs, and measures of a whole run have no interval; compare several runs on each side"
        )
