"""Calibration from records whose parameters are known."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.forecast import calibration
from batchlab.scenarios.forecast.calibration import CalibratedValue, CalibrationResult
from batchlab.scenarios.record import Record, StageRun
from tests.support.scenarios.records import a_job, a_record, an_instance

BOOT_S, BUNDLE_S, SUBMIT_S, END_S, STRETCH = 42.0, 0.25, 1.5, 0.75, 1.2


def a_run(seed: int, *, stretch: float = STRETCH) -> Record:
    """Return a record of jobs one after another on existing instances, with a little noise and one outlier of each
    kind."""
    chance = random.Random(seed)

    def about(value: float) -> float:
        return value * chance.uniform(0.95, 1.05)

    jobs = []
    for i in range(12):
        at_s = 100.0 + 60.0 * i
        begun_s = at_s + (30.0 if i == 3 else about(SUBMIT_S))
        done_s = begun_s + 10.0
        end_s = done_s + (20.0 if i == 5 else about(END_S))
        jobs.append(a_job(i, due_s=at_s, submitted_s=at_s, started_s=begun_s, done_s=done_s, ended_s=end_s))
    boots = [about(BOOT_S) for _ in range(9)] + [600.0]
    instances = [an_instance(i, ready_s=boot_s, ended_s=None) for i, boot_s in enumerate(boots)]
    lost = an_instance(99, ready_s=None, ended_s=5.0)
    there = [an_instance(100 + i, ready_s=0.0, ended_s=None) for i in range(20)]
    # One task and one bundle in ten is ten times as slow, so a mean would be wrong by half.
    ratios = sorted(about(stretch) * (10 if i % 10 == 0 else 1) for i in range(120))
    over_s = sorted(about(BUNDLE_S) * (10 if i % 10 == 0 else 1) for i in range(40))
    run_s = 2.0 * sum(ratios)
    work = StageRun(
        template="claims",
        stage="parse",
        pool="default",
        slots=1,
        tasks=120,
        bundles=40,
        run_s=run_s,
        declared_s=120 * 2.0,
        span_s=run_s + sum(over_s),
        over_s=tuple(over_s),
        stretch=tuple(ratios),
    )
    return a_record(*jobs, instances=(*instances, lost, *there), stages=(work,))


def by_name(found: CalibrationResult) -> dict[str, CalibratedValue]:
    return {f"{quantity.name} {quantity.of}".strip(): quantity for quantity in found.quantities}


def test_parameters_are_recovered_despite_outliers() -> None:
    found = calibration.calibrate([a_run(seed) for seed in range(5)])
    made = found.calibration
    assert made.boot_s == {"default": pytest.approx(BOOT_S, rel=0.03)}
    # The time of a bundle on a shared core is added to its other time.
    usual = factory.load("local").usual
    assert made.bundle_s == pytest.approx(BUNDLE_S - usual.bundle_cpu_s, rel=0.05)
    assert made.submit_s == pytest.approx(SUBMIT_S, rel=0.03)
    assert made.end_s == pytest.approx(END_S, rel=0.03)
    assert made.stretch == {"claims/parse": pytest.approx(STRETCH, rel=0.03)}
    assert (made.backend, made.runs) == ("local", 5)
    told = by_name(found)
    counts = {name: one.observations for name, one in told.items()}
    assert counts == {"boot default": 50, "bundle": 200, "submit": 60, "end": 60, "stretch claims/parse": 600}
    for one in told.values():
        assert one.value is not None
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.value <= one.high
        assert one.high - one.low < 0.1 * one.value
    assert found.notes == ()


def test_waits_for_slots_or_boots_are_not_overhead() -> None:
    first, second = a_job(0), a_job(1, submitted_s=30.0, started_s=70.0, ended_s=80.0)
    record = a_record(first, second, instances=tuple(an_instance(i) for i in range(3)))
    submit = by_name(calibration.calibrate([record] * 3))["submit"]
    # The first job arrived before an instance existed, and the second one before the end of the first one.
    assert (submit.value, submit.observations) == (None, 0)
    assert "0 jobs that arrived while no other job was active" in submit.why
    # A job that arrives after the end of the last instance waits for a boot.
    late = a_job(2, submitted_s=90.0, started_s=150.0, ended_s=160.0)
    record = a_record(late, instances=tuple(an_instance(i) for i in range(3)))
    assert by_name(calibration.calibrate([record] * 3))["submit"].observations == 0


def test_failed_tasks_do_not_calibrate_bundles() -> None:
    work = StageRun(
        template="claims",
        stage="parse",
        pool="default",
        slots=1,
        tasks=10,
        bundles=10,
        run_s=10.0,
        declared_s=10.0,
        span_s=99.0,
        over_s=(8.9,) * 10,
        stretch=(1.0,) * 10,
    )
    record = a_record(a_job(retried=1), stages=(work,))
    found = calibration.calibrate([record])
    assert by_name(found)["bundle"].value is None
    assert found.calibration.stretch == {"claims/parse": 1.0}


def test_too_little_is_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"The record has too little .* 2 launches in pool"):
        calibration.calibrate([a_record(instances=(an_instance(0), an_instance(1)))])
    with pytest.raises(UsageError, match="2 backends: local, sim"):
        calibration.calibrate([a_record(), a_record(backend="sim")])
    with pytest.raises(UsageError, match="divided by different numbers: 1, 60"):
        calibration.calibrate([a_run(1), replace(a_run(2), compressed=60.0)])


def test_record_without_durations_has_no_median() -> None:
    old = a_run(1)
    bare = tuple(replace(stage, over_s=(), stretch=()) for stage in old.stages)
    told = by_name(calibration.calibrate([replace(old, stages=bare)]))
    assert told["bundle"].value is told["stretch claims/parse"].value is None
    assert "in records with task times" in told["bundle"].why


def test_samples_are_weighted_by_their_population() -> None:
    few = StageRun("a", "b", "default", 1, 6, 6, 6.0, 6.0, 6.0, over_s=(1.0, 1.0, 1.0))
    many = StageRun("a", "c", "default", 1, 900, 900, 9.0, 9.0, 9.0, over_s=(2.0, 2.0, 3.0))
    bundle = by_name(calibration.calibrate([a_record(stages=(few, many))]))["bundle"]
    assert (bundle.value, bundle.observations) == (2.0, 906)


def test_numbers_are_for_the_backend_and_compression_that_they_are_of() -> None:
    made = calibration.calibrate([replace(a_run(1), compressed=60.0)]).calibration
    assert made.compressed == 60.0
    assert calibration.check_fit(made, "local", 60.0) == ""
    assert "compressed by 60, and the forecast by 1" in calibration.check_fit(made, "local", 1.0)
    with pytest.raises(UsageError, match="measured on local") as refused:
        calibration.check_fit(made, "aws", 60.0)
    assert "--like local" in refused.value.remedy


def test_scope_of_the_calibration_is_described() -> None:
    plain, fast = a_run(1), a_run(2)
    (note,) = calibration.calibrate([a_record(*plain.jobs, **_of(plain), compressed=60.0)]).notes
    assert "compressed by 60" in note
    mixed = [plain, a_record(*fast.jobs, **_of(fast), simulated=True, cut="x")]
    assert len(calibration.calibrate(mixed).notes) == 2


def _of(record: Record) -> dict[str, object]:
    return {"instances": record.instances, "stages": record.stages}


def test_calibration_file_round_trips(tmp_path: Path) -> None:
    made = calibration.calibrate([a_run(1)]).calibration
    file = tmp_path / "deep" / "c.json"
    calibration.write(made, file)
    assert calibration.read(file) == made
    assert json.loads(file.read_text())["backend"] == "local"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        ("[]", r"not a calibration \(1 mistake in it\)\."),
        ('{"runs": 1}', "not a calibration"),
        ('{"backend": "local", "bundle_s": -1}', "negative"),
        ('{"backend": "local", "boot_s": {"default": -1}}', "negative"),
        ('{"backend": "local", "stretch": {"a/b": 0}}', "stretch"),
        ('{"backend": "local", "call_s": [2, 1]}', "negative"),
        ('{"backend": "local", "compressed": 0}', "compression"),
        ('{"backend": "local", "bundle_s": NaN}', "not a number"),
        ('{"backend": "local", "call_s": [0, Infinity]}', "not a number"),
        ('{"backend": "local", "boot_s": {"default": Infinity}}', "not a number"),
        ('{"backend": "local", "stretch": {"a/b": NaN}}', "stretch"),
        ('{"backend": "local", "cores": 4097}', "4,097 cores"),
        ('{"backend": "local", "cores": -1}', "-1 cores"),
        ('{"backend": "local", "bundel_s": 1}', "unknown key 'bundel_s'"),
    ],
)
def test_invalid_calibration_is_refused(text: str | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=why) as refused:
        calibration.read(file)
    said = ("scenario calibrate", "bundle_s?", "from 0 to 4096")
    assert any(one in refused.value.remedy for one in said)
    with pytest.raises(UsageError, match="cannot be written"):
        calibration.write(Calibration("local"), tmp_path)


def test_unmeasured_values_keep_the_backends_default() -> None:
    usual = factory.load("local").usual
    told = replace(a_run(1), backend="local")
    made = calibration.calibrate([told]).calibration
    assert (made.manager_s, made.other_boot_s) == (usual.manager_s, usual.other_boot_s)
    assert made.call_s == usual.call_s
    # Bundles share the cores of the machine, with or without measurements. The remaining time of a bundle is at least
    # zero.
    assert (made.bundle_cpu_s, made.cores) == (usual.bundle_cpu_s, usual.cores)
    assert usual.bundle_cpu_s > 0
    quick = tuple(replace(stage, over_s=(0.001,) * 40) for stage in told.stages)
    made = calibration.calibrate([replace(told, stages=quick)]).calibration
    assert (made.bundle_s, made.bundle_cpu_s) == (0.0, usual.bundle_cpu_s)
    bare = calibration.calibrate([replace(told, stages=())]).calibration
    assert bare.bundle_cpu_s == usual.bundle_cpu_s
