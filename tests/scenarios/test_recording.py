"""The recording of a run as a scenario that repeats the run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from batchlab.cli import scenario_records
from batchlab.cli.scenario_records import RecordRequest
from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios import record as records
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.expansion import compress_scenario, expand
from batchlab.scenarios.record import InstanceRun, JobRun, Record, StageRun
from batchlab.scenarios.replay import recording
from batchlab.scenarios.replay.measurements import even_sample

JOBS = 7
POOLS = {"default": (0, 4, 2), "closed": (0, 0, 1)}


def _record(compressed_: float = 1.0) -> Record:
    """Return the record of a run with 20 tasks per job, then the same jobs again, then a job of three groups."""
    rng = random.Random(5)
    drawn = {
        "parse": [rng.lognormvariate(1.0, 0.8) for _ in range(20 * JOBS)],
        "price": [2.0] * 20 * JOBS,
        "by": [rng.uniform(1, 9) for _ in range(3 * JOBS)],
        "sum": [rng.expovariate(0.2) for _ in range(JOBS)],
    }
    shapes = {"parse": ((), None), "price": (("parse",), None), "by": (("price",), "key"), "sum": (("by",), "*")}
    jobs = tuple(
        JobRun(
            index=number,
            id=f"claims-{number:010x}",
            template="claims",
            tenant="payer-a",
            due_s=30.0 * number,
            submitted_s=30.0 * number + 0.2,
            started_s=30.0 * number + 1,
            ended_s=30.0 * number + 50,
            state="SUCCEEDED",
            planned=44,
            succeeded=44,
            failed=0,
            cancelled=0,
            deadline_s=30.0 * number + 600,
            tasks=20,
        )
        for number in range(JOBS)
    )
    stages = tuple(
        StageRun(
            template="claims",
            stage=name,
            pool="default",
            slots=1,
            tasks=len(times),
            bundles=len(times),
            run_s=sum(times),
            declared_s=sum(times),
            span_s=sum(times),
            task_s=even_sample(times, 200),
            after=shapes[name][0],
            gather=shapes[name][1],
        )
        for name, times in drawn.items()
    )
    machine = InstanceRun("i-1", "default", "m7i.large", "on-demand", "", 1.0, 3.5, 300.0)
    return Record(
        scenario="claims",
        digest="",
        seed=11,
        backend="local",
        compressed=compressed_,
        pools={"default": (0, 4, 2)},
        jobs=jobs,
        stages=stages,
        samples=(),
        instances=(machine,),
        settings={"drain_target_s": 20.0, "cooldown_in_s": 5.0, "idle_s": 2.0},
    )


def test_the_scenario_has_the_same_jobs_and_tasks_which_take_as_long_in_all(tmp_path: Path) -> None:
    past = _record()
    written = recording.write(recording.from_record(past, "again"), tmp_path / "again.yaml")
    assert (written.jobs, written.tasks) == (JOBS, 44 * JOBS)
    simulated = simulate(loader.load(written.scenario), like=factory.load("local"))
    assert len(simulated.jobs) == JOBS
    assert sum(job.succeeded for job in simulated.jobs) == 44 * JOBS
    for before, after in zip(past.stages, simulated.stages, strict=True):
        assert (after.stage, after.tasks) == (before.stage, before.tasks)
        assert after.declared_s == pytest.approx(before.run_s, rel=0.01)
    wanted = [job.submitted_s - 0.2 for job in past.jobs]
    assert [job.due_s for job in simulated.jobs] == pytest.approx(wanted, abs=1e-3)
    assert {job.tenant for job in simulated.jobs} == {"payer-a"}


def test_pools_policy_and_deadlines_are_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    recording.write(recording.from_record(_record(), "again"), path)
    scenario = loader.load(path)
    (plan,) = scenario.pools
    pool = plan.pool
    assert (pool.name, pool.min_size, pool.max_size, pool.slots) == ("default", 0, 4, 2)
    assert (pool.boot_s, pool.instance_type, plan.spot) == (2.5, "m7i.large", 0.0)
    policy = scenario.policy
    assert (policy.drain_target_s, policy.cooldown_in_s, policy.idle_s) == (20.0, 5.0, 2.0)
    assert scenario.jobs["claims"].deadline_s == 600.0
    assert {one.measure for one in scenario.expect} == {"lost", "duplicates"}


def test_a_compressed_run_is_recorded_as_the_scenario_that_it_was_of(tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    recording.write(recording.from_record(_record(compressed_=60.0), "again"), path)
    scenario = loader.load(path)
    assert scenario.compress == 60
    assert expand(scenario).jobs[-1].due_s == pytest.approx(60 * 30.0 * (JOBS - 1))
    assert scenario.policy.drain_target_s == 1200
    again = compress_scenario(scenario, 60)
    assert expand(again).jobs[-1].due_s == pytest.approx(30.0 * (JOBS - 1))
    seconds = recording.drawn_times(path)["claims", "price"][1]
    assert seconds == pytest.approx(60 * 2.0 * 20 * JOBS, rel=1e-6)


SPOT = InstanceRun("i-2", "default", "m7i.large", "spot", "us-east-1b", 2.0, 61.0, None)
NAMELESS = InstanceRun("w-1", "default", "", "on-demand", "", -1.0, 0.0, 300.0)
ODD = InstanceRun("i-3", "default", "x9.enormous", "on-demand", "a", 1.0, None, None)


@pytest.mark.parametrize(
    ("backend", "machines"),
    [
        ("local", (NAMELESS,)),
        ("ministack", (NAMELESS, NAMELESS)),
        ("localstack", (SPOT, replace(SPOT, id="i-4", market="on-demand"))),
        ("aws", (SPOT, ODD, ODD)),
        ("sim", ()),
    ],
)
def test_a_record_of_any_backend_is_a_scenario_that_is_fine_and_its_jobs_are_a_trace(
    tmp_path: Path, backend: str, machines: tuple[InstanceRun, ...]
) -> None:
    few = replace(_record(), jobs=_record().jobs[:2], backend=backend, instances=machines, pools=POOLS)
    path, kept = tmp_path / "again.yaml", tmp_path / "run.json"
    records.write(few, kept)
    written = recording.write(recording.from_record(records.read(kept), "again"), path)
    simulated = simulate(loader.load(written.scenario))
    assert [job.tasks for job in simulated.jobs] == [20] * 2
    assert all(job.state == "SUCCEEDED" for job in simulated.jobs)
    wanted = [(job.due_s, job.tasks, job.template.name) for job in expand(loader.load(path)).jobs]
    own = "name: own\nabout: Own.\njobs: {claims: {task: 1s}}\npools: {default: {max: 1}}\n"
    for trace in (written.trace, kept):
        mine = tmp_path / "own.yaml"
        mine.write_text(f"{own}arrivals: [{{trace: {{file: {trace.name}}}}}]\n")
        schedule = expand(loader.load(mine))
        assert not schedule.odd
        assert [(job.due_s, job.tasks, job.template.name) for job in schedule.jobs] == wanted


def test_jobs_with_too_little_data_are_counted(tmp_path: Path) -> None:
    record = _record()
    lacking = replace(record.jobs[0], index=JOBS, tasks=None)
    past = recording.from_record(replace(record, jobs=(*record.jobs, lacking)), "again")
    assert recording.write(past, tmp_path / "again.yaml").left_out == 1


def test_a_record_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not have a job with a known number of tasks"):
        recording.from_record(replace(_record(), jobs=()), "none")


def test_unwritable_path_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        recording.write(recording.from_record(_record(), "again"), tmp_path / "file" / "again.yaml")


def test_recorded_trace_overwrites_no_foreign_file(tmp_path: Path) -> None:
    past = recording.from_record(_record(), "again")
    with pytest.raises(UsageError, match=r"x\.jsonl cannot be both the scenario and its trace"):
        recording.write(past, tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "y.jsonl").write_text("somebody's\n")
    for text in ("", "arrivals: [{at: 0s}]", "arrivals: [{trace: {file: z.jsonl}}]", "5", "{", None):
        if text is None:
            (tmp_path / "y.yaml").unlink()
        else:
            (tmp_path / "y.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"would replace the existing file .*y\.jsonl"):
            recording.write(past, tmp_path / "y.yaml")
        assert (tmp_path / "y.jsonl").read_text() == "somebody's\n"
    recording.write(past, tmp_path / "again.yaml")
    assert recording.write(past, tmp_path / "again.yaml").jobs == JOBS, "its own is made anew"


def test_the_file_is_one_that_a_person_can_read(tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    recording.write(recording.from_record(_record(), "again"), path)
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 110
    assert len(text.splitlines()) < 90
    assert list(yaml.safe_load(text)) == ["name", "about", "seed", "jobs", "arrivals", "pools", "policy", "expect"]


def test_a_sample_is_evenly_spread() -> None:
    assert even_sample([3, 1, 2], 5) == (1, 2, 3)
    assert even_sample(range(1000), 4) == (125, 375, 625, 875)


def test_the_record_that_is_read_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write(_record(), path)
    before = path.read_bytes()
    for out in (path, tmp_path / "x" / ".." / "run.json"):
        with pytest.raises(UsageError, match="would overwrite the record"):
            scenario_records.write_scenario(RecordRequest((), path, out, None, Home(tmp_path)), json=True)
    assert path.read_bytes() == before
