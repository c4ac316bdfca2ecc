"""Comparison of a forecast with a real run of the same scenario.

An error of a forecast is the forecast value minus the measured value. A value that one record lacks is reported as
missing, and not as an error of 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from batchlab.core.errors import UsageError
from batchlab.scenarios.record import Record, Sample
from batchlab.scenarios.verdicts import MEASURES, Unit, Unknown, end_s, fleet_sizes, uncertainty

RUN_MEASURES = (
    "makespan",
    "p50_wait",
    "p95_wait",
    "max_wait",
    "p95_turnaround",
    "late",
    "peak_fleet",
    "cost",
    "failed_tasks",
    "again",
    "idle_share",
)
"""Measures of the whole run that are compared."""
TEMPLATE_MEASURES = ("makespan", "p95_wait", "p95_turnaround")
"""Measures that are compared for each job template if the scenario has several templates."""
CURVE_POINTS = 400
"""Number of points in time at which two curves are compared."""

StepCurve = Sequence[tuple[float, float]]
"""Step curve as (time, value) pairs. Each value applies until the time of the next pair."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Values of one measure in the forecast and in the real run.

    A value is None if the record lacks the measure or if a job never ended. `absolute` is an error in `unit`, and
    `relative` is an error as a share of the measured value.
    """

    measure: str
    template: str
    unit: Unit
    forecast: float | None
    fact: float | None

    @property
    def absolute(self) -> float | None:
        return None if self.forecast is None or self.fact is None else self.forecast - self.fact

    @property
    def relative(self) -> float | None:
        """Return the forecast's error as a share of the measured value, or None if only the measured value is 0."""
        absolute = self.absolute
        if absolute is None or (absolute and not self.fact):
            return None
        return absolute / self.fact if self.fact else 0.0

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "absolute": self.absolute, "relative": self.relative}


@dataclass(frozen=True, slots=True)
class CurvePair:
    """One curve in the forecast and in the real run.

    `mean_error` is the mean distance of the two curves over the duration of the longer run, in the unit of `what`.
    """

    what: str
    forecast: StepCurve
    fact: StepCurve
    until_s: float
    mean_error: float
    mean_fact: float

    @property
    def relative(self) -> float | None:
        """Return `mean_error` as a share of the measured curve's mean, or None if only the measured curve's mean is
        0."""
        if self.mean_fact:
            return self.mean_error / self.mean_fact
        return None if self.mean_error else 0.0

    def to_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "until_s": self.until_s,
            "mean_error": self.mean_error,
            "relative": self.relative,
            "forecast": [list(point) for point in self.forecast],
            "fact": [list(point) for point in self.fact],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of a forecast with a real run, or of two forecasts if `fact_simulated` is True.

    `notes` lists reasons why the two runs are not fully comparable.
    """

    scenario: str
    forecast_backend: str
    fact_backend: str
    compressed: float
    differences: tuple[Difference, ...]
    curves: tuple[CurvePair, ...]
    notes: tuple[str, ...]
    fact_simulated: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two runs."""
        return ("A", "B") if self.fact_simulated else ("forecast", "fact")

    @property
    def error(self) -> str:
        """Name of the difference between the two runs."""
        return "difference" if self.fact_simulated else "error"

    def of(self, measure: str, template: str = "") -> Difference:
        """Return the difference of a measure. Raise KeyError if the measure was not compared."""
        return {(difference.measure, difference.template): difference for difference in self.differences}[
            measure, template
        ]

    def to_json(self) -> dict[str, object]:
        return {
            "scenario": self.scenario,
            "forecast": {"backend": self.forecast_backend},
            "fact": {"backend": self.fact_backend},
            "compressed": self.compressed,
            "differences": [difference.to_json() for difference in self.differences],
            "curves": [curve.to_json() for curve in self.curves],
            "notes": list(self.notes),
        }


def compare(forecast: Record, fact: Record) -> Comparison:
    """Compare the record of a forecast with the record of a real run. Raise UsageError if the records have different
    scenarios or compressions.
    """
    if forecast.scenario != fact.scenario:
        raise UsageError(
            f"The forecast is of scenario {forecast.scenario}, and the fact is of scenario {fact.scenario}.",
            remedy="Name two records of the same scenario.",
        )
    if forecast.compressed != fact.compressed:
        raise UsageError(
            f"The forecast's times were divided by {forecast.compressed:g}, and the fact's times by "
            f"{fact.compressed:g}, so their seconds are not comparable.",
            remedy=f"Forecast it with `batchlab scenario simulate --compress {fact.compressed:g}`.",
        )
    templates = sorted({job.template for job in (*forecast.jobs, *fact.jobs)})
    measures = [(name, "") for name in RUN_MEASURES]
    if len(templates) > 1:
        measures += [(name, template) for template in templates for name in TEMPLATE_MEASURES]
    return Comparison(
        fact.scenario,
        _backend_label(forecast),
        _backend_label(fact),
        fact.compressed,
        tuple(_difference(name, template, forecast, fact) for name, template in measures),
        tuple(_curve_pair(what, forecast, fact, curve) for what, curve in _CURVES.items()),
        tuple(_notes(forecast, fact)),
        fact.simulated,
    )


def _backend_label(record: Record) -> str:
    return f"{record.backend}, simulated" if record.simulated else record.backend


def _difference(name: str, template: str, forecast: Record, fact: Record) -> Difference:
    measure = MEASURES[name]
    values = (measure.of(record, template) for record in (forecast, fact))
    first, second = (None if isinstance(value, Unknown) or math.isinf(value) else value for value in values)
    return Difference(name, template, measure.unit, first, second)


def _backlog(sample: Sample) -> float:
    return float(sum(pool.backlog_tasks for pool in sample.pools.values()))


_CURVES: Mapping[str, Callable[[Record], StepCurve]] = {
    "messages waiting": lambda record: [(sample.at_s, float(sample.waiting)) for sample in record.samples],
    "tasks to do": lambda record: [(sample.at_s, _backlog(sample)) for sample in record.samples],
    "instances in service": lambda record: [(at_s, float(count)) for at_s, count in fleet_sizes(record)],
}


def _curve_pair(what: str, forecast: Record, fact: Record, curve: Callable[[Record], StepCurve]) -> CurvePair:
    first, second = curve(forecast), curve(fact)
    until_s = max(end_s(forecast), end_s(fact))
    pairs = list(zip(sample_curve(first, until_s), sample_curve(second, until_s), strict=True))
    error = sum(abs(a - b) for a, b in pairs) / len(pairs)
    return CurvePair(what, first, second, until_s, error, sum(b for _, b in pairs) / len(pairs))


def sample_curve(curve: StepCurve, until_s: float, points: int = CURVE_POINTS) -> list[float]:
    """Return the curve's values in the middle of `points` equal intervals.

    A curve is 0 before its first time and constant after its last time.
    """
    moments = [at_s for at_s, _ in curve]
    indexes = (bisect_right(moments, (i + 0.5) * until_s / points) - 1 for i in range(points))
    return [curve[index][1] if index >= 0 else 0.0 for index in indexes]


def _notes(forecast: Record, fact: Record) -> Iterator[str]:
    if forecast.digest != fact.digest:
        yield "the scenario's file was changed between the two runs"
    if forecast.seed != fact.seed:
        yield f"the seeds differ ({forecast.seed} and {fact.seed}), so the arrivals and the task times differ"
    if not forecast.simulated:
        yield "the forecast is a real run, not a simulated one"
    for name, record in (("forecast", forecast), ("fact", fact)):
        if record.cut:
            yield f"the {name} was cut before it had ended: {record.cut}"
    if len(forecast.jobs) != len(fact.jobs):
        yield f"the forecast has {len(forecast.jobs):,} jobs, the fact {len(fact.jobs):,}"
    if dict(forecast.pools) != dict(fact.pools):
        yield "their pools differ in size or slots"
    if forecast.shares != fact.shares:
        yield "their fair-share policies differ"
    names = sorted(set(forecast.settings) & set(fact.settings))
    if different := [name for name in names if forecast.settings[name] != fact.settings[name]]:
        yield f"their settings differ: {', '.join(different)}"
    faults = [*forecast.faults, *fact.faults]
    yield from dict.fromkeys(f"fault {fault.name}: {why}" for fault in faults if (why := uncertainty(fault)))
    if fact.compressed != 1:
        yield "both runs are compressed, so their costs are lower than the costs of a run on AWS"
