"""Measures of a run, and the verdicts on its expectations.

A job that has not ended by the end of the run has infinite times, which exceed every bound. Expectations about costs
are not judged in a compressed run, because instances of a compressed run exist for a shorter time than on AWS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise

from batchlab.core.errors import UsageError
from batchlab.core.model import JobState
from batchlab.scenarios.model.values import Expectation
from batchlab.scenarios.record import InjectedFault, InstanceRun, JobRun, Record


class Unit(StrEnum):
    """Unit of a measure of a run."""

    SECONDS = "s"
    """Seconds of the run. In a compressed run, the seconds of measures and expectations are compressed."""
    USD = "USD"
    NUMBER = ""
    SHARE = "share"
    """Share, as a number from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Result for a measure that a record lacks. `why` is the reason why the record lacks the measure."""

    why: str


Measured = float | Unknown
_WASTE_UNKNOWN = Unknown("the manager did not report the time of lost and failed runs")
_NO_JOB = Unknown("there is no such job")


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure that can be computed from a record.

    The function `of` takes a record and a template's name ("" for all jobs).

    `by_template` is True if the measure also exists for a single job template.
    """

    name: str
    unit: Unit
    meaning: str
    of: Callable[[Record, str], Measured]
    by_template: bool = False


def quantile(numbers: Iterable[float], share: float) -> float:
    """Return the nearest-rank quantile: the smallest number that is at least as large as the share `share` of all
    numbers.

    Raise ValueError if `numbers` is empty.
    """
    ordered = sorted(numbers)
    if not ordered:
        raise ValueError("a quantile of nothing")
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def _jobs(record: Record, template: str) -> Sequence[JobRun]:
    return [job for job in record.jobs if template in ("", job.template)]


def waits_s(record: Record, template: str) -> list[float]:
    """Return the seconds from each job's due time to its first task's start.

    Jobs that ended before a task started are skipped.
    """
    waits = []
    for job in _jobs(record, template):
        if job.started_s is not None:
            waits.append(max(0.0, job.started_s - job.due_s))
        elif job.ended_s is None:
            waits.append(math.inf)
    return waits


def turnarounds_s(record: Record, template: str) -> list[float]:
    """Return the seconds from each job's due time to its end."""
    return [math.inf if job.ended_s is None else max(0.0, job.ended_s - job.due_s) for job in _jobs(record, template)]


MEASURES: dict[str, Measure] = {}
"""Measures by name. The keys under `expect` in a scenario are names of measures."""

_Function = Callable[[Record, str], Measured]


def _measure(name: str, unit: Unit, meaning: str, *, by_template: bool = False) -> Callable[[_Function], _Function]:

    def register(function: _Function) -> _Function:
        MEASURES[name] = Measure(name, unit, meaning, function, by_template)
        return function

    return register


@_measure(
    "makespan", Unit.SECONDS, "time from the due time of the first job to the end of the last job", by_template=True
)
def _makespan(record: Record, template: str) -> Measured:
    jobs = _jobs(record, template)
    if not jobs:
        return _NO_JOB
    ends = [math.inf if job.ended_s is None else job.ended_s for job in jobs]
    return max(ends) - min(job.due_s for job in jobs)


def _quantile_measure(name: str, share: float, times_s: Callable[[Record, str], list[float]], meaning: str) -> None:
    @_measure(name, Unit.SECONDS, meaning, by_template=True)
    def of(record: Record, template: str) -> Measured:
        times = times_s(record, template)
        return quantile(times, share) if times else Unknown("no such job has begun")


_WAIT = "from a job's due time to the start of the job's first task"
_quantile_measure("p50_wait", 0.5, waits_s, f"median of the time {_WAIT}")
_quantile_measure("p95_wait", 0.95, waits_s, f"95th percentile of the time {_WAIT}")
_quantile_measure("max_wait", 1.0, waits_s, f"longest time {_WAIT}")
_quantile_measure(
    "p95_turnaround", 0.95, turnarounds_s, "95th percentile of the time from a job's due time to the job's end"
)


@_measure("late", Unit.NUMBER, "number of jobs that missed their deadline", by_template=True)
def _late(record: Record, template: str) -> Measured:
    jobs = [job for job in _jobs(record, template) if job.deadline_s is not None]
    if not jobs:
        return Unknown("no such job has a deadline")
    return float(sum(job.ended_s is None or job.ended_s > (job.deadline_s or 0.0) for job in jobs))


@_measure("cost", Unit.USD, "cost of the instances and the requests at AWS's list prices")
def _cost(record: Record, _: str) -> Measured:
    return Unknown("the run had no prices") if record.usd is None else record.usd


@_measure("lost", Unit.NUMBER, "number of tasks without a known result")
def _lost(record: Record, _: str) -> Measured:
    return float(record.lost)


@_measure("duplicates", Unit.NUMBER, "number of tasks with more than one committed result")
def _duplicates(record: Record, _: str) -> Measured:
    return float(record.duplicates)


@_measure("failed_tasks", Unit.NUMBER, "number of tasks that failed and were not retried", by_template=True)
def _failed_tasks(record: Record, template: str) -> Measured:
    jobs = _jobs(record, template)
    return float(sum(job.failed for job in jobs)) if jobs else _NO_JOB


@_measure("failed_jobs", Unit.NUMBER, "number of jobs that failed or were canceled", by_template=True)
def _failed_jobs(record: Record, template: str) -> Measured:
    jobs = _jobs(record, template)
    return float(sum(job.state in (JobState.FAILED, JobState.CANCELLED) for job in jobs)) if jobs else _NO_JOB


def end_s(record: Record) -> float:
    """Return the time of the last recorded event."""
    return max(
        (
            *(job.ended_s or job.submitted_s for job in record.jobs),
            *(sample.at_s for sample in record.samples),
            *(instance.ended_s or instance.launched_s for instance in record.instances),
        ),
        default=0.0,
    )


def fleet_sizes(record: Record) -> list[tuple[float, int]]:
    """Return the number of instances in service over time, as (start time, number) pairs.

    If the record lacks samples, the numbers are derived from the times of the instances.
    """
    if record.samples:
        return [(sample.at_s, sum(pool.in_service for pool in sample.pools.values())) for sample in record.samples]
    changes: list[tuple[float, int]] = []
    for instance in record.instances:
        if instance.ready_s is not None:
            changes.append((instance.ready_s, 1))
            if instance.ended_s is not None:
                changes.append((instance.ended_s, -1))
    sizes, count = [], 0
    for at_s, change in sorted(changes):
        count += change
        sizes.append((at_s, count))
    return sizes


@_measure("peak_fleet", Unit.NUMBER, "largest number of instances that were in service at the same time")
def _peak_fleet(record: Record, _: str) -> Measured:
    return float(max((count for _, count in fleet_sizes(record)), default=0))


@_measure(
    "least_fleet",
    Unit.NUMBER,
    "smallest number of instances in service, from the time when the first instance was in service to the end "
    "of the last job",
)
def _least_fleet(record: Record, _: str) -> Measured:
    ends = [job.ended_s for job in record.jobs if job.ended_s is not None]
    last_s = max(ends) if len(ends) == len(record.jobs) and ends else math.inf
    sizes = fleet_sizes(record)
    first = next((i for i, (_, count) in enumerate(sizes) if count), None)
    if first is None:
        return Unknown("no instance was ever in service")
    return float(min(count for at_s, count in sizes[first:] if at_s <= max(last_s, sizes[first][0])))


@_measure(
    "flapping",
    Unit.NUMBER,
    "number of changes of a pool's desired capacity that reversed the previous change within two cooldowns",
)
def _flapping(record: Record, _: str) -> Measured:
    cooldown_s = record.settings.get("cooldown_in_s")
    if cooldown_s is None:
        return Unknown("the record does not say what the cooldown was")
    if not record.samples:
        return Unknown("the record has no samples of the fleet")
    turns = 0
    for pool in {name for sample in record.samples for name in sample.pools}:
        sizes = [(sample.at_s, sample.pools[pool].desired) for sample in record.samples if pool in sample.pools]
        steps = [(b[0], b[1] > a[1]) for a, b in pairwise(sizes) if a[1] != b[1]]
        turns += sum(a[1] != b[1] and b[0] - a[0] <= 2 * cooldown_s for a, b in pairwise(steps))
    return float(turns)


def lifetimes_s(record: Record) -> Iterator[tuple[InstanceRun, float]]:
    """Yield each instance with the seconds from its launch to its end, or to the run's end."""
    last_s = end_s(record)
    for instance in record.instances:
        yield instance, instance.lived_s(last_s)


@_measure("again", Unit.SECONDS, "slot time of executions that failed or did not commit an outcome")
def _again(record: Record, _: str) -> Measured:
    return _WASTE_UNKNOWN if record.again_s is None else record.again_s


@_measure(
    "idle_share",
    Unit.SHARE,
    "share of the instances' slot time, from launch to end, in which the slots did not run a task",
)
def _idle_share(record: Record, _: str) -> Measured:
    slots = {name: slots for name, (_, _, slots) in record.pools.items()}
    total_s = sum(life_s * slots.get(instance.pool, 0) for instance, life_s in lifetimes_s(record))
    if not total_s:
        return Unknown("no instance was ever there")
    if record.again_s is None:
        return _WASTE_UNKNOWN
    used_s = sum(stage.run_s * stage.slots for stage in record.stages) + record.again_s
    return min(1.0, max(0.0, 1.0 - used_s / total_s))


ENDED = "ended"
"""Name of the verdict row that judges whether the run was completed."""
ARRIVALS = "arrivals"
"""Name of the verdict row that judges whether the run had jobs."""
_SLACK = 1e-9
"""Relative tolerance for rounding errors of sums."""


class Color(StrEnum):
    """Result of a check of an expectation."""

    GREEN = "green"
    RED = "red"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """Expectation and its measured value in `unit`.

    An expectation without a template applies to all jobs. `measured` is None if the value is unknown, and infinite if a
    job never ended. `why` explains a verdict that is not green.
    """

    measure: str
    template: str
    unit: Unit
    least: float | None
    most: float | None
    measured: float | None
    verdict: Color
    why: str = ""

    def to_json(self) -> dict[str, object]:
        """Return a JSON object, in which None replaces infinity."""
        is_finite = self.measured is not None and math.isfinite(self.measured)
        return {**asdict(self), "measured": self.measured if is_finite else None}


def judge(record: Record, expectations: Iterable[Expectation]) -> list[VerdictRow]:
    """Return the verdict on each expectation.

    Rows about the whole run come first. If the run was aborted, the row `ended` is red. The row of a fault that was not
    injected as planned is neither green nor red. Raise UsageError for an unknown measure.
    """
    return [*_judge_run(record), *(_judge_one(record, expectation) for expectation in expectations)]


def is_red(rows: Iterable[VerdictRow]) -> bool:
    """Return whether one of the verdicts is red, so that a gate must fail."""
    return any(row.verdict is Color.RED for row in rows)


def _judge_run(record: Record) -> Iterator[VerdictRow]:
    if record.cut:
        yield VerdictRow(ENDED, "", Unit.NUMBER, None, None, None, Color.RED, record.cut)
    if not record.jobs:
        why = "nothing arrived, so nothing was tried"
        yield VerdictRow(ARRIVALS, "", Unit.NUMBER, 1, None, 0, Color.RED, why)
    for fault in record.faults:
        if why := uncertainty(fault):
            name = f"fault {fault.name}"
            yield VerdictRow(name, "", Unit.NUMBER, None, None, None, Color.NOT_JUDGED, why)


def uncertainty(fault: InjectedFault) -> str:
    """Return the reason why the effect of a fault is uncertain, or "" if the effect is certain."""
    if fault.impossible:
        return f"it could not be injected: {fault.impossible}"
    return f"it did not go as it should: {fault.trouble}" if fault.trouble else ""


def measure_of(name: str, template: str = "") -> Measure:
    """Return the measure with this name.

    Raise UsageError if the measure does not exist, or if the measure exists only for the whole run.
    """
    measure = MEASURES.get(name)
    if measure is None:
        raise UsageError(f"The measure {name!r} does not exist.", remedy=f"The measures are {', '.join(MEASURES)}.")
    if template and not measure.by_template:
        raise UsageError(
            f"{name} is of a whole run, not of one job template ({template}).",
            remedy=f"Expect {name} beside `jobs`, not in it.",
        )
    return measure


def _judge_one(record: Record, expectation: Expectation) -> VerdictRow:
    name, template, least, most = expectation.measure, expectation.template, expectation.least, expectation.most
    measure = measure_of(name, template)
    measured = measure.of(record, template)
    number = None if isinstance(measured, Unknown) else measured
    color, why = _color(record, measure, expectation, measured)
    return VerdictRow(name, template, measure.unit, least, most, number, color, why)


def _color(record: Record, measure: Measure, expectation: Expectation, measured: float | Unknown) -> tuple[Color, str]:
    if measure.unit is Unit.USD and record.compressed != 1:
        return Color.NOT_JUDGED, "money is not judged in a compressed run"
    if isinstance(measured, Unknown):
        return Color.NOT_JUDGED, measured.why
    if math.isinf(measured):
        return Color.RED, "it never ended"
    if expectation.most is not None and measured > expectation.most + _SLACK * abs(expectation.most):
        return Color.RED, "more than expected"
    if expectation.least is not None and measured < expectation.least - _SLACK * abs(expectation.least):
        # A run that ended early might still have reached the value later, but then the row `ended` is red.
        return Color.RED, "less than expected"
    if record.cut:
        return Color.NOT_JUDGED, "the run was cut before it had ended"
    return Color.GREEN, ""
