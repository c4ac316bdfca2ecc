"""Calibration of forecasts by measured runs: boot times, overheads, and task times.

Each calibrated value is a median, so single outliers do not change the value. A calibrated value needs at least
MIN_OBSERVATIONS observations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from batchlab.core import text
from batchlab.core.capabilities import backend_names
from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.record import JobRun, Record, StageRun, read_file, write_file

MIN_OBSERVATIONS = 3
"""Minimum number of observations from which a value is calibrated."""

MAX_CORES = 4096
"""Upper limit of the number of cores of a machine, because each core needs memory in the simulator."""

_ADAPTER: TypeAdapter[Calibration] = TypeAdapter(Calibration)


@dataclass(frozen=True, slots=True)
class CalibratedValue:
    """Median and quartiles of one quantity, in seconds, except for the factor `stretch`.

    `what` names the observations. If the records have too few observations, `value` is None, and `why` names the
    missing observations.
    """

    name: str
    of: str
    """Subject of the value: a pool, "template/stage", or "" for the whole grid."""
    value: float | None
    low: float | None
    high: float | None
    observations: int
    what: str
    why: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """Calibration with the values from which the calibration is derived."""

    calibration: Calibration
    quantities: tuple[CalibratedValue, ...]
    notes: tuple[str, ...]


def calibrate(records: Sequence[Record]) -> CalibrationResult:
    """Return a calibration from runs of the same backend and compression.

    Raise UsageError if the backends or compressions differ, or if no value can be derived.
    """
    names = sorted({record.backend for record in records})
    if len(names) != 1:
        raise UsageError(
            f"The records are of {len(names)} backends: {', '.join(names) or 'none'}.",
            remedy="Calibrate each backend by itself.",
        )
    factors = sorted({record.compressed for record in records})
    if len(factors) != 1:
        raise UsageError(
            f"The records' times were divided by different numbers: {', '.join(f'{factor:g}' for factor in factors)}.",
            remedy="Calibrate each compression by itself: a boot of one is not a boot of another.",
        )
    submits = [(wait_s, 1.0) for record in records for wait_s in _submit_delays(record)]
    ends = [
        (max(0.0, job.ended_s - job.done_s), 1.0)
        for record in records
        for job in record.jobs
        if job.ended_s is not None and job.done_s is not None
    ]
    quantities = (
        *_boots(records),
        _median(
            "bundle", "", _bundle_overheads(records), "bundles", "without a failed task, in records with task times"
        ),
        _median(
            "submit", "", submits, "jobs", "that arrived while no other job was active and an instance was in service"
        ),
        _median("end", "", ends, "jobs", "that ended and whose last task's end is known"),
        *_stretches(records),
    )
    if all(quantity.value is None for quantity in quantities):
        subject = "The record has" if len(records) == 1 else f"The {len(records)} records have"
        raise UsageError(
            f"{subject} too little to calibrate anything by: "
            f"{'; '.join(dict.fromkeys(quantity.why for quantity in quantities))}.",
            remedy="Record a longer run, or several.",
        )
    return CalibrationResult(_calibration(names[0], quantities, len(records), factors[0]), quantities, _notes(records))


def check_fit(calibration: Calibration, backend: str, compressed: float) -> str:
    """Return a warning if the calibration has another compression than the forecast, or "". Raise UsageError for
    another backend's calibration.
    """
    if calibration.backend != backend:
        raise UsageError(
            f"The calibration was measured on {calibration.backend}, and the forecast is for {backend}.",
            remedy=f"Give --like {calibration.backend}, or calibrate with records of {backend}.",
        )
    if calibration.compressed == compressed:
        return ""
    return (
        f"the calibration is of runs that were compressed by {calibration.compressed:g}, and the forecast by "
        f"{compressed:g}: overheads take the same seconds, but boot times differ, and an overhead is a larger share of "
        "a shorter task"
    )


def _calibration(backend: str, quantities: Iterable[CalibratedValue], runs: int, compressed: float) -> Calibration:
    values = {(quantity.name, quantity.of): quantity.value for quantity in quantities if quantity.value is not None}

    def by_name(name: str) -> dict[str, float]:
        return {of: value for (kind, of), value in values.items() if kind == name}

    usual = factory.load(backend).usual if backend in backend_names() else Calibration(backend)
    # A measured bundle time includes the bundle's CPU time (`bundle_cpu_s`). On a backend with shared cores, the
    # simulator adds `bundle_cpu_s` to each bundle. `bundle_s` is therefore the measured time minus `bundle_cpu_s`.
    bundle_s = values.get(("bundle", ""))
    shared_s = usual.bundle_cpu_s if usual.cores else 0.0
    return replace(
        usual,
        boot_s=by_name("boot"),
        bundle_s=usual.bundle_s if bundle_s is None else max(0.0, bundle_s - shared_s),
        submit_s=values.get(("submit", ""), 0.0),
        end_s=values.get(("end", ""), 0.0),
        stretch=by_name("stretch"),
        runs=runs,
        compressed=compressed,
    )


def _notes(records: Sequence[Record]) -> tuple[str, ...]:
    notes = []
    if records[0].compressed != 1:
        notes.append(f"it holds for runs that are compressed by {records[0].compressed:g}")
    if any(record.simulated for record in records):
        notes.append("one of the runs was simulated, so its values were not measured")
    if any(record.cut for record in records):
        notes.append("one of the runs was cut, and its measurements until then are used")
    return tuple(notes)


def _boots(records: Sequence[Record]) -> Iterator[CalibratedValue]:
    for pool in sorted({name for record in records for name in record.pools}):
        boots = (
            (instance.boot_s, 1)
            for record in records
            for instance in record.instances
            if instance.pool == pool and instance.boot_s is not None
        )
        yield _median("boot", pool, boots, "launches", f"in pool {pool} that came into service")


def _bundle_overheads(records: Sequence[Record]) -> Iterator[tuple[float, float]]:
    """Yield samples of the time that a bundle takes in addition to its tasks, each with a weight.

    Templates with failures are skipped, because the time of a failed task is recorded only as a part of its bundle's
    time.
    """
    for record in records:
        spoilt = {job.template for job in record.jobs if job.failed or job.retried or job.cancelled}
        for stage in record.stages:
            if stage.template not in spoilt:
                for over_s in stage.over_s:
                    yield over_s, stage.bundles / len(stage.over_s)


def _submit_delays(record: Record) -> Iterator[float]:
    """Yield the seconds from submission to the first task, for jobs that did not wait for other jobs or for a boot."""
    for job in record.jobs:
        at_s = job.submitted_s
        if job.started_s is None or not _runs_alone(job, record.jobs):
            continue
        if any(
            life.ready_s is not None and life.ready_s <= at_s and (life.ended_s or at_s + 1) > at_s
            for life in record.instances
        ):
            yield max(0.0, job.started_s - at_s)


def _runs_alone(job: JobRun, jobs: Iterable[JobRun]) -> bool:
    until_s = job.started_s or job.submitted_s
    return not any(
        other.submitted_s <= until_s and (other.ended_s is None or other.ended_s > job.submitted_s)
        for other in jobs
        if other.id != job.id
    )


def _stretches(records: Sequence[Record]) -> Iterator[CalibratedValue]:
    stages: dict[str, list[StageRun]] = {}
    for stage in (stage for record in records for stage in record.stages):
        stages.setdefault(f"{stage.template}/{stage.stage}", []).append(stage)
    for of, runs in sorted(stages.items()):
        ratios = [(ratio, run.tasks / len(run.stretch)) for run in runs for ratio in run.stretch]
        yield _median("stretch", of, ratios, "tasks", f"of {of} with a declared time, in records with task times")


def _median(name: str, of: str, observed: Iterable[tuple[float, float]], what: str, which: str) -> CalibratedValue:
    ordered = sorted((value, weight) for value, weight in observed if weight > 0)
    number = round(sum(weight for _, weight in ordered))
    if number < MIN_OBSERVATIONS:
        why = f"{number} {what} {which}, of {MIN_OBSERVATIONS} that are needed"
        return CalibratedValue(name, of, None, None, None, number, what, why)

    def at(share: float) -> float:
        passed = 0.0
        for value, weight in ordered:
            passed += weight
            if passed >= share * number - 1e-6:
                return value
        return ordered[-1][0]

    return CalibratedValue(name, of, at(0.5), at(0.25), at(0.75), number, what)


def to_json(calibration: Calibration) -> bytes:
    return _ADAPTER.dump_json(calibration, indent=1) + b"\n"


def write(calibration: Calibration, path: Path) -> None:
    """Write the calibration. Raise UsageError if the file cannot be written."""
    write_file(path, to_json(calibration), "calibration")


def read(path: Path) -> Calibration:
    """Read a calibration. Raise UsageError if the file is missing or contains impossible values."""
    remedy = "Name the file that `batchlab scenario calibrate RECORD --out FILE` has written."
    data = read_file(path, "calibration", remedy)
    try:
        calibration = _ADAPTER.validate_json(data)
    except ValidationError as error:
        mistakes = text.count(error.error_count(), "mistake")
        raise UsageError(f"{path} is not a calibration ({mistakes} in it).", remedy=remedy) from error
    names = [field.name for field in fields(Calibration)]
    for name in json.loads(data):
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"{path} has the unknown key {name!r}.", remedy=f"{hint}The keys are {', '.join(names)}.")
    low, high = calibration.call_s
    times = [low, high, calibration.bundle_s, calibration.submit_s, calibration.end_s, *calibration.boot_s.values()]
    times += [calibration.manager_s, calibration.bundle_cpu_s, calibration.other_boot_s or 0.0]
    factors = (calibration.compressed, *calibration.stretch.values())
    if not all(0 <= time < math.inf for time in times) or low > high:
        raise UsageError(f"{path} has a time that is negative or not a number.", remedy=remedy)
    if any(not 0 < factor < 1e6 for factor in factors):
        raise UsageError(f"{path} has an invalid stretch or compression.", remedy=remedy)
    if not 0 <= calibration.cores <= MAX_CORES:
        raise UsageError(f"{path} says {calibration.cores:,} cores.", remedy=f"Write a number from 0 to {MAX_CORES}.")
    return calibration
