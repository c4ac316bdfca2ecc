"""Jobs of a scenario that wait for other jobs of the scenario: scenario file, forecast, fast model, and recording."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.model import JobId
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.expansion import earliest_starts_s, expand
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.planner.fast_model import FastModel
from batchlab.scenarios.record import JobRun, Record
from batchlab.scenarios.replay import driver, recording
from batchlab.scenarios.replay.measurements import Measurements, StageTotals
from batchlab.scenarios.verdicts import MEASURES
from tests.support.cli import a_job
from tests.support.scenarios.files import load
from tests.support.sim.scenes import A, job, stage

TEXT = """\
name: night
about: A night. It teaches.
jobs:
  load: {tasks: 8, task: 30s}
  sums: {tasks: 2, task: 10s, after: load}
  mail: {task: 1s, after: ["sums:ended", load]}
arrivals:
  - {job: mail, at: [0s, 1h]}
  - {job: sums, at: [0s, 1h]}
  - {job: load, at: [0s, 1h]}
pools:
  default: {min: 2, max: 2, slots: 2, instance_type: m7i.large}
expect: {lost: 0}
"""
BROKEN = TEXT.replace(
    "load: {tasks: 8, task: 30s}", "load: {stages: [{name: work, task: 30s, fails: 1, retry: {attempts: 1}}]}"
)


def _runs(record: Record, template: str) -> list[JobRun]:
    return [run for run in record.jobs if run.template == template]


def _begins_after(run: JobRun, other: JobRun) -> bool:
    return run.started_s is not None and other.ended_s is not None and run.started_s >= other.ended_s - 1e-6


def test_a_job_depends_on_the_latest_job_of_each_template_up_to_its_arrival(tmp_path: Path) -> None:
    jobs = expand(load(tmp_path, TEXT)).jobs
    assert [one.template.name for one in jobs] == ["load", "sums", "mail"] * 2
    first, second = jobs[:3], jobs[3:]
    for loading, sums, mail in (first, second):
        assert loading.after == ()
        assert sums.after == (Dependency(JobId(loading.id)),)
        assert mail.after == (Dependency(JobId(sums.id), Condition.ENDED), Dependency(JobId(loading.id)))
    late = load(tmp_path, TEXT.replace("{job: load, at: [0s, 1h]}", "{job: load, at: [1s, 2h]}"))
    assert [len(one.after) for one in expand(late).jobs if one.template.name == "sums"] == [0, 1]


def test_a_forecast_begins_a_job_after_its_dependencies(tmp_path: Path) -> None:
    scenario = load(tmp_path, TEXT)
    record = simulate(scenario)
    assert [run.state for run in record.jobs] == ["SUCCEEDED"] * 6
    for loading, sums, mail in zip(*(_runs(record, name) for name in ("load", "sums", "mail")), strict=True):
        assert _begins_after(sums, loading)
        assert _begins_after(mail, sums)
    assert (record.lost, record.cut) == (0, "")
    # Without dependencies, a small job begins while others run.
    free = {name: replace(template, after=()) for name, template in scenario.jobs.items()}
    early = simulate(replace(scenario, jobs=free))
    assert not all(_begins_after(*pair) for pair in zip(_runs(early, "mail"), _runs(early, "sums"), strict=True))


def test_a_failed_dependency_fails_waiting_jobs_and_jobs_that_arrive_later(tmp_path: Path) -> None:
    later = BROKEN.replace("{job: sums, at: [0s, 1h]}", "{job: sums, at: [0s, 10m]}")
    later = later.replace("{job: load, at: [0s, 1h]}", "{job: load, at: 0s}").replace(
        '["sums:ended", load]', "sums:ended"
    )
    record = simulate(load(tmp_path, later))
    assert {run.state for run in (*_runs(record, "load"), *_runs(record, "sums"))} == {"FAILED"}
    assert [run.started_s for run in _runs(record, "sums")] == [None, None]
    assert [run.state for run in _runs(record, "mail")] == ["SUCCEEDED"] * 2
    assert [run.index for run in record.jobs] == list(range(5))
    assert (record.lost, record.cut) == (0, "")
    assert MEASURES["failed_jobs"].of(record, "sums") == 2.0


def test_the_fast_model_begins_a_job_after_its_dependencies(tmp_path: Path) -> None:
    record = FastModel("aws")(load(tmp_path, TEXT), 1)
    for loading, sums, mail in zip(*(_runs(record, name) for name in ("load", "sums", "mail")), strict=True):
        assert loading.ended_s is not None
        assert loading.ended_s - loading.due_s >= 60.0
        assert _begins_after(sums, loading)
        assert _begins_after(mail, sums)
    assert record.lost == 0


def test_the_limit_of_a_replay_contains_the_wait_for_other_jobs(tmp_path: Path) -> None:
    scenario = load(tmp_path, TEXT.replace("task: 30s", "task: 2h"))
    jobs = expand(scenario).jobs
    starts_s = earliest_starts_s(jobs)
    assert [starts_s[one.id] for one in jobs] == [0.0, 7200.0, 7210.0, 3600.0, 10800.0, 10810.0]
    free = [replace(one, after=()) for one in jobs]
    assert driver.limit_s(scenario, jobs) - driver.limit_s(scenario, free) == pytest.approx(7210.0)


def _recorded(tmp_path: Path, after: dict[str, Any]) -> Scenario:
    """Return the scenario that is recorded from two jobs of each template in `after`."""
    rng = random.Random(3)
    pairs, measured = [], {}
    for number in range(2):
        for place, (name, others) in enumerate(after.items()):
            needs = tuple(Dependency(JobId(f"{other.job}-{number}"), other.condition) for other in others[number])
            made = job(stage(A), id=JobId(f"{name}-{number}"), items=1, after=needs)
            made = replace(made, name=name)
            view = {**a_job(made.id), "submitted_s": 100.0 * number + place}
            totals = StageTotals("default", 1, (), None, tasks=1, bundles=1, task_s=[rng.uniform(1, 2)])
            pairs.append((view, made))
            measured[made.id] = Measurements({(name, A): totals})
    pools = load(tmp_path, TEXT).pools
    workload = recording.from_jobs(pairs, measured, "again", pools, {})  # type: ignore[arg-type]
    recording.write(workload, tmp_path / "again.yaml")
    return loader.load(tmp_path / "again.yaml")


def test_a_recorded_scenario_has_the_dependencies_that_all_jobs_of_a_template_had(tmp_path: Path) -> None:
    one, ended = Dependency(JobId("load")), Dependency(JobId("load"), Condition.ENDED)
    scenario = _recorded(
        tmp_path, {"load": ((), ()), "sums": ((one,), (one,)), "mail": ((ended,), (ended,)), "odd": ((one,), ())}
    )
    assert {name: template.after for name, template in scenario.jobs.items()} == {
        "load": (),
        "sums": (one,),
        "mail": (ended,),
        "odd": (),
    }
    assert all(earlier.due_s <= later.due_s for earlier, later in pairwise(expand(scenario).jobs))
