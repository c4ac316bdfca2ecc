"""Calibration of forecasts by measured runs: boot times, overheads, and task times.

The values are medians, so single outliers have no effect. Each value has quartiles and a number of
observations. A value with fewer than MIN_OBSERVATIONS observations is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from batchlab.core import text
from batchlab.core.capabilities import backend_names
from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.record import JobRun, Record

MIN_OBSERVATIONS = 3
"""Fewer observations are not enough for a value."""

MAX_CORES = 4096
"""Upper limit of cores. No machine has more, and each one needs memory in the simulator."""

_ADAPTER: TypeAdapter[Calibration] = TypeAdapter(Calibration)


@dataclass(frozen=True, slots=True)
class CalibratedValue:
    """Median and quartiles of one quantity, in seconds, except for the factor `stretch`.

    `what` names the observations. `value` is None if there were too few; `why` says what would
    help.
    """

    name: str
    of: str
    """Pool, or template/stage, or "" for the whole grid."""
    value: float | None
    low: float | None
    high: float | None
    observations: int
    what: str
    why: str = ""

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "of": self.of,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "observations": self.observations,
            "what": self.what,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """Calibration with the values that it is derived from."""

    calibration: Calibration
    quantities: tuple[CalibratedValue, ...]
    notes: tuple[str, ...]


def calibrate(records: Sequence[Record]) -> CalibrationResult:
    """Calibrate by runs of the same backend and compression.

    Raise UsageError if these differ, or if no value can be derived.
    """
    names = sorted({record.backend for record in records})
    if len(names) != 1:
        raise UsageError(
            f"The records are of {len(names)} backends: {', '.join(names) or 'none'}.",
            remedy="Calibrate each backend by itself.",
        )
    factors = sorted({record.compressed for record in records})
    if len(factors) != 1:
        told = ", ".join(f"{factor:g}" for factor in factors)
        raise UsageError(
            f"The records' times were divided by different numbers: {told}.",
            remedy="Calibrate each compression by itself: a boot of one is not a boot of another.",
        )
    calibrated_values = [
        *_boots(records),
        _median(
            "bundle",
            "",
            _bundle_overheads(records),
            "bundles",
            "in which every task succeeded, in records that say what each took",
        ),
        _median(
            "submit",
            "",
            ((wait_s, 1) for record in records for wait_s in _submit_delays(record)),
            "jobs",
            "that came when nothing else was to be done and an instance was in service",
        ),
        _median(
            "end",
            "",
            ((end_s, 1) for record in records for end_s in _end_delays(record)),
            "jobs",
            "that ended, and of which it is known when their last task did",
        ),
        *_stretches(records),
    ]
    if all(calibrated_value.value is None for calibrated_value in calibrated_values):
        raise UsageError(
            f"{_subject(records)} too little to calibrate anything by: "
            f"{'; '.join(dict.fromkeys(calibrated_value.why for calibrated_value in calibrated_values))}.",
            remedy="Record a longer run, or several.",
        )
    calibration = replace(_calibration(names[0], calibrated_values, len(records)), compressed=factors[0])
    return CalibrationResult(calibration, tuple(calibrated_values), _notes(records))


def check_fit(calibration: Calibration, backend: str, compressed: float) -> str:
    """Return a warning if the calibration has another compression than the forecast, or "".

    Raise UsageError for another backend's calibration.
    """
    if calibration.backend != backend:
        raise UsageError(
            f"The calibration was measured on {calibration.backend}, and the forecast is to be as on {backend}.",
            remedy=f"Give --like {calibration.backend}, or records of {backend} to calibrate by.",
        )
    if calibration.compressed == compressed:
        return ""
    return (
        f"the calibration is of runs that were compressed by {calibration.compressed:g}, the "
        f"forecast by {compressed:g}: overheads are the same seconds, but boots are not, and of a "
        "shorter task they are a larger share"
    )


def _subject(records: Sequence[Record]) -> str:
    return "The record has" if len(records) == 1 else f"The {len(records)} records have"


def _calibration(backend: str, found: Iterable[CalibratedValue], runs: int) -> Calibration:
    known = {
        (calibrated_value.name, calibrated_value.of): calibrated_value.value
        for calibrated_value in found
        if calibrated_value.value is not None
    }

    def by(name: str) -> dict[str, float]:
        return {of: value for (kind, of), value in known.items() if kind == name}

    usual = Calibration(backend)
    if backend in backend_names():
        usual = factory.load(backend).usual
    # A measured bundle time includes its time on a core. The simulator adds this again for shared
    # cores, so it is subtracted.
    bundle_s = known.get(("bundle", ""))
    shared_s = usual.bundle_cpu_s if usual.cores else 0.0
    return replace(
        usual,
        boot_s=by("boot"),
        bundle_s=usual.bundle_s if bundle_s is None else max(0.0, bundle_s - shared_s),
        submit_s=known.get(("submit", ""), 0.0),
        end_s=known.get(("end", ""), 0.0),
        stretch=by("stretch"),
        runs=runs,
    )


def _notes(records: Sequence[Record]) -> tuple[str, ...]:
    notes = []
    if records[0].compressed != 1:
        notes.append(f"it holds for runs that are compressed by {records[0].compressed:g}")
    if any(record.simulated for record in records):
        notes.append("a simulated run is among them, which was not measured on anything")
    if any(record.cut for record in records):
        notes.append("a run among them was cut; what it showed until then counts")
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
    """Yield the time of bundles beyond their tasks, from a sample with weights.

    A failed task's time is only in the bundle's time, so templates with failures are left out.
    """
    for record in records:
        spoilt = {job.template for job in record.jobs if job.failed or job.retried or job.cancelled}
        for stage in record.stages:
            if stage.template not in spoilt:
                for over_s in stage.over_s:
                    yield over_s, stage.bundles / len(stage.over_s)


def _submit_delays(record: Record) -> Iterator[float]:
    """Yield the delays from submission to the first task of jobs that waited neither for other jobs
    nor for a boot.
    """
    for job in record.jobs:
        if job.started_s is None or not _runs_alone(job, record.jobs):
            continue
        at_s = job.submitted_s
        if any(
            instance.ready_s is not None and instance.ready_s <= at_s and (instance.ended_s or at_s + 1) > at_s
            for instance in record.instances
        ):
            yield max(0.0, job.started_s - at_s)


def _runs_alone(job: JobRun, jobs: Iterable[JobRun]) -> bool:
    until_s = job.started_s or job.submitted_s
    return not any(
        other.submitted_s <= until_s and (other.ended_s is None or other.ended_s > job.submitted_s)
        for other in jobs
        if other.id != job.id
    )


def _end_delays(record: Record) -> Iterator[float]:
    for job in record.jobs:
        if job.ended_s is not None and job.done_s is not None:
            yield max(0.0, job.ended_s - job.done_s)


def _stretches(records: Sequence[Record]) -> Iterator[CalibratedValue]:
    stages = [stage for record in records for stage in record.stages]
    for of in sorted({f"{stage.template}/{stage.stage}" for stage in stages}):
        ratios = (
            (ratio, stage.tasks / len(stage.stretch))
            for stage in stages
            if f"{stage.template}/{stage.stage}" == of
            for ratio in stage.stretch
        )
        which = f"of {of} with a declared time, in records that say what each took"
        yield _median("stretch", of, ratios, "tasks", which)


def _median(name: str, of: str, observed: Iterable[tuple[float, float]], what: str, which: str) -> CalibratedValue:
    """Return the weighted median and quartiles of (number, weight) pairs."""
    ordered = sorted((value, weight) for value, weight in observed if weight > 0)
    count = round(sum(weight for _, weight in ordered))
    if count < MIN_OBSERVATIONS:
        why = f"{count} {what} {which}, of {MIN_OBSERVATIONS} that are needed"
        return CalibratedValue(name, of, None, None, None, count, what, why)

    def at(share: float) -> float:
        passed = 0.0
        for value, weight in ordered:
            passed += weight
            if passed >= share * count - 1e-6:
                return value
        return ordered[-1][0]

    return CalibratedValue(name, of, at(0.5), at(0.25), at(0.75), count, what)


def to_json(calibration: Calibration) -> bytes:
    return _ADAPTER.dump_json(calibration, indent=1) + b"\n"


def write(calibration: Calibration, path: Path) -> None:
    """Write the calibration. Raise UsageError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_json(calibration))
    except OSError as error:
        raise UsageError(
            f"The calibration {path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error


def read(path: Path) -> Calibration:
    """Read a calibration. Raise UsageError for a missing file or impossible values."""
    remedy = "Name the file that `batchlab scenario calibrate RECORD --out FILE` has written."
    try:
        data = path.read_bytes()
        calibration = _ADAPTER.validate_json(data)
    except OSError as error:
        raise UsageError(f"The calibration {path} cannot be read: {error.strerror}.", remedy=remedy) from error
    except ValidationError as error:
        raise UsageError(
            f"{path} is not a calibration ({text.count(error.error_count(), 'mistake')} in it).", remedy=remedy
        ) from error
    known = [field.name for field in fields(Calibration)]
    for name in json.loads(data):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"{path} has the unknown key {name!r}.", remedy=f"{hint}The keys are {', '.join(known)}.")
    low, high = calibration.call_s
    times = (
        *calibration.call_s,
        calibration.bundle_s,
        calibration.submit_s,
        calibration.end_s,
        *calibration.boot_s.values(),
    )
    times += (calibration.manager_s, calibration.bundle_cpu_s, calibration.other_boot_s or 0.0)
    factors = (calibration.compressed, *calibration.stretch.values())
    if not all(0 <= time < math.inf for time in times) or low > high:
        raise UsageError(f"{path} has a time that is negative or not a number.", remedy=remedy)
    if any(not 0 < factor < 1e6 for factor in factors):
        raise UsageError(f"{path} has an invalid stretch or compression.", remedy=remedy)
    if not 0 <= calibration.cores <= MAX_CORES:
        raise UsageError(f"{path} says {calibration.cores:,} cores.", remedy=f"Write a number from 0 to {MAX_CORES}.")
    return calibration
