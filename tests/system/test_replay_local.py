"""Scenarios replayed on real processes: the submissions, the durations, and the record."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.client.http import Client
from batchlab.core.errors import Refused, UsageError
from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.model import JobId, Pool
from batchlab.core.retry_rule import RetryRule
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios import record, verdicts
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Expectation, JobTemplate, Policy, PoolPlan, Prewarm
from batchlab.scenarios.replay import driver
from batchlab.scenarios.replay.run_state import ReplayProgress
from tests.support.grid.backends import command
from tests.support.grid.local_grid import processes_of
from tests.support.scenarios.replay import claims, replay, scenario, stage, up
from tests.support.waiting import until


def test_every_kind_of_stage_and_of_work_takes_its_time_and_is_recorded(tmp_path: Path) -> None:
    wanted = scenario(
        claims(), at=((0.0, 1), (2.0, 2)), expect=(Expectation("makespan", most=40.0), Expectation("lost", most=0.0))
    )
    states: list[ReplayProgress] = []
    run = replay(tmp_path / "home", wanted, progress=states.append)
    assert run.cut == ""
    assert [(job.index, job.due_s, job.state) for job in run.jobs] == [
        (0, 0.0, "SUCCEEDED"),
        (1, 2.0, "SUCCEEDED"),
        (2, 2.0, "SUCCEEDED"),
    ]
    for job in run.jobs:
        assert (job.planned, job.succeeded, job.tasks, job.tenant) == (29, 29, 12, "payer-a")
        assert job.deadline_s == job.due_s + 30
        assert job.started_s is not None
        assert job.done_s is not None
        assert job.ended_s is not None
        # A submission ends with its answer, but a task may begin before the answer arrives.
        assert job.due_s <= job.started_s
        assert job.due_s <= job.submitted_s <= job.ended_s
        assert job.started_s < job.done_s <= job.ended_s + 0.1
    tasks = {one.stage: (one.tasks, one.after, one.gather) for one in run.stages}
    assert tasks == {
        "parse": (36, (), None),
        "price": (36, ("parse",), None),
        "by": (9, ("price",), "key"),
        "sum": (3, ("by",), "*"),
        "last": (3, ("sum",), None),
    }
    for one in run.stages:
        # A task never ends early, and ends only a little late, because two busy cores run four tasks.
        assert one.declared_s * 0.99 <= one.run_s <= one.declared_s * 1.5 + 0.5
        assert one.run_s <= one.span_s + 0.1
        assert len(one.task_s) == one.tasks
    assert (run.lost, run.duplicates, run.again_s) == (0, 0, 0.0)
    assert max(pool.in_service for s in run.samples for pool in s.pools.values()) >= 1
    assert run.samples[-1].pools["default"].desired == 0, "the fleet was not waited for"
    for machine in run.instances:
        assert machine.ready_s is not None
        assert machine.launched_s <= machine.ready_s
        assert machine.ended_s is not None
    assert run.instance_s > 0
    assert run.usd is not None
    assert run.usd == pytest.approx(sum(run.usd_items.values()))
    assert run.settings["drain_target_s"] == 3.0
    assert not verdicts.is_red(verdicts.judge(run, wanted.expect))
    assert (states[-1].jobs, states[-1].ended, states[-1].bad) == (3, 3, 0)
    path = tmp_path / "record.json"
    record.write(run, path)
    assert record.read(path) == run
    assert processes_of(tmp_path / "home") == {}, "something still runs"


def test_the_same_scenario_again_in_the_same_home_runs_anew_with_the_same_times(tmp_path: Path) -> None:
    wanted = scenario(claims(4))
    one, two = (replay(tmp_path / "home", wanted) for _ in range(2))
    assert one.jobs[0].id != two.jobs[0].id
    declared = [[stage.declared_s for stage in run.stages] for run in (one, two)]
    assert declared[0] == declared[1]


def test_jobs_begin_after_their_dependencies(tmp_path: Path) -> None:
    """The jobs arrive at the same time, and the first job that a dependency would allow comes last in the scenario."""
    begins = JobTemplate("begins", (stage("work", 1.0),), Constant(3))
    breaks = JobTemplate("breaks", (stage("work", 0.1, fails=1.0, retry=RetryRule(attempts=1)),), Constant(1))
    then = replace(begins, name="then", after=(Dependency(JobId("begins")),))
    anyway = replace(begins, name="anyway", after=(Dependency(JobId("breaks"), Condition.ENDED),))
    never = replace(begins, name="never", after=(Dependency(JobId("breaks")),))
    run = replay(tmp_path / "home", scenario(never, anyway, then, breaks, begins, at=((0.0, 1), (8.0, 1))))
    jobs = {name: [job for job in run.jobs if job.template == name] for name in ("begins", "breaks", "then", "anyway")}
    for name, other in (("then", "begins"), ("anyway", "breaks")):
        for job, earlier in zip(jobs[name], jobs[other], strict=True):
            assert job.state == "SUCCEEDED"
            assert job.started_s is not None
            assert earlier.ended_s is not None
            assert job.started_s >= earlier.ended_s
    assert [(job.state, job.started_s) for job in run.jobs if job.template == "never"] == [("FAILED", None)] * 2
    assert (run.lost, run.cut) == (0, "")


def test_the_grid_follows_the_policy_of_the_scenario_during_the_run(tmp_path: Path) -> None:
    """The share `bulk` may use one of four slots, so its eight tasks of a second take at least eight seconds."""
    bulk = JobTemplate("bulk", (stage("work", 1.0, bundle=1),), Constant(8), share="bulk")
    quick = JobTemplate("quick", (stage("work", 0.5),), Constant(4), share="team1")
    policy = SharePolicy((ShareAttributes("bulk", 2.0, max_slots=1), ShareAttributes("team*")), decay_s=60.0)
    wanted = scenario(bulk, quick, at=((0.0, 1),), shares=policy, pools=(PoolPlan(Pool("default", 2, 2, 2)),))
    home, seen = Home(tmp_path / "home"), []
    with up(home, wanted) as backend:
        record_ = home.record()
        assert record_ is not None
        with Client.of(home, record_) as client:
            own = client.set_share({"identifier": "research", "weight": 0.5})["policy"]

            def look(_: ReplayProgress) -> None:
                seen.append(client.shares())

            run = asyncio.run(driver.replay(wanted, home, backend, patience=factory.patience(), progress=look))
            assert {job["name"]: job["share"] for job in client.jobs()} == {"bulk": "bulk", "quick": "team1"}
            assert client.shares()["policy"] == own
            # The use of the run does not count for the later jobs of the grid.
            assert {one["share"]: one["use_s"] for one in client.shares()["shares"]} == {"research": 0.0}
    assert (run.cut, run.lost, run.shares) == ("", 0, policy)
    assert {one["policy"] == policy.to_json() for one in seen} == {True}
    limited = [one["slots"] for view in seen for one in view["shares"] if one["share"] == "bulk"]
    assert max(limited) == 1
    ends_s = {job.template: job.ended_s for job in run.jobs}
    assert ends_s["bulk"] is not None
    assert ends_s["quick"] is not None
    assert ends_s["bulk"] >= 8.0
    assert ends_s["quick"] < ends_s["bulk"]
    file = tmp_path / "again.yaml"
    ids = [job.id for job in run.jobs]
    command("scenario", "record", *ids, "--home", home.path, "--out", file, "--json")
    again = loader.load(file)
    assert {name: template.share for name, template in again.jobs.items()} == {"bulk": "bulk", "quick": "team1"}
    assert again.shares == SharePolicy((ShareAttributes("research", 0.5),))


def test_attempts_fail_and_tasks_kill_their_workers_as_configured(tmp_path: Path) -> None:
    sound = JobTemplate("frail", (stage("work", 0.05, fails=0.3),), Constant(40))
    deadly = JobTemplate("poison", (stage("work", 0.2, poison=1, bundle=1),), Constant(4))
    # With one slot, no other task runs next to the task that kills its worker.
    pools = (PoolPlan(Pool("default", 0, 3, 1)),)
    run = replay(tmp_path / "home", scenario(sound, deadly, pools=pools))
    frail, poison = sorted(run.jobs, key=lambda job: job.template)
    assert (frail.planned, frail.succeeded + frail.failed) == (40, 40)
    assert frail.retried > 0
    assert (poison.succeeded, poison.failed, poison.state) == (3, 1, "FAILED")
    killed = [one for one in run.instances if "exit -9" in one.note]
    assert len(killed) >= 3, run.instances
    assert run.again_s
    assert run.lost == run.duplicates == 0


def test_different_grid_is_refused(tmp_path: Path) -> None:
    home, wanted = Home(tmp_path / "home"), scenario(claims(2))
    others = {
        "0-3x2": replace(wanted, pools=(PoolPlan(Pool("default", 0, 3, 2)),)),
        "x2,gpus=1": replace(wanted, pools=(replace(wanted.pools[0], pool=replace(wanted.pools[0].pool, gpus=1)),)),
        "lacks the pool 'big'": replace(wanted, pools=(PoolPlan(Pool("big", 0, 3, 2)),)),
        "drain_target_s": replace(wanted, policy=Policy(drain_target_s=4.0)),
    }
    with up(home, wanted) as backend:
        for told, other in others.items():
            with pytest.raises(Refused, match=told):
                asyncio.run(driver.replay(other, home, backend, patience=factory.patience()))
        record_ = home.record()
        assert record_ is not None
        with Client.of(home, record_) as client:
            assert client.jobs() == []


def test_refusal_of_the_grid_ends_the_replay(tmp_path: Path) -> None:
    wide = JobTemplate("wide", (stage("work", 0.1, slots=9),), Constant(2))
    with pytest.raises(UsageError, match="asks for 9 slots"):
        replay(tmp_path / "home", scenario(claims(3), wide))
    assert processes_of(tmp_path / "home") == {}


def test_a_limit_ends_it_in_good_order(tmp_path: Path) -> None:
    long = JobTemplate("long", (stage("work", 30.0),), Constant(4))
    begun_s = time.monotonic()
    run = replay(tmp_path / "home", scenario(long, at=((0.0, 1), (60.0, 1))), limit=3.0)
    assert time.monotonic() - begun_s < 25
    assert "its limit of 3 s" in run.cut
    assert [job.state in ("STARTING", "RUNNING") for job in run.jobs] == [True]
    assert run.jobs[0].ended_s is None
    assert run.lost == 4
    assert run.samples
    assert verdicts.is_red(verdicts.judge(run, ()))
    assert processes_of(tmp_path / "home") == {}


def test_stop_keeps_the_record_and_cancels_running_jobs(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    wanted = scenario(JobTemplate("long", (stage("work", 6.0),), Constant(40)))

    async def go(backend: factory.Backend) -> record.Record:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(3.0, stop.set)
        return await driver.replay(wanted, home, backend, patience=factory.patience(), stop=stop)

    with up(home, wanted) as backend:
        run = asyncio.run(go(backend))
        found = home.record()
        assert found is not None
        with Client(found.url, home.token()) as client:
            until(lambda: [job["state"] for job in client.jobs()] == ["CANCELLED"])
    assert run.cut == "It was interrupted."
    assert len(run.jobs) == 1


def test_permanent_loss_of_the_manager_stops_the_run_and_keeps_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "ABSENCE_LIMIT_S", 2.0)
    home = Home(tmp_path / "home")
    wanted = scenario(JobTemplate("long", (stage("work", 30.0),), Constant(4)))

    def kill(state: ReplayProgress) -> None:
        found = home.record()
        if state.at_s > 3 and found:
            os.kill(found.pid, signal.SIGKILL)

    with up(home, wanted) as backend:
        run = asyncio.run(driver.replay(wanted, home, backend, patience=factory.patience(), progress=kill))
    assert "has ended" in run.cut
    assert (run.usd, run.again_s) == (None, None), "nobody could be asked for the account"
    assert len(run.jobs) == 1


def test_prewarm_starts_instances_before_the_job(tmp_path: Path) -> None:
    quick = JobTemplate("quick", (stage("work", 0.1),), Constant(4))
    wanted = scenario(quick, at=((5.0, 1),), prewarm=(Prewarm("default", 2, at_s=1.0, until_s=5.5),))
    run = replay(tmp_path / "home", wanted)
    assert [one.ready_s is not None and one.ready_s < 5 for one in run.instances] == [True, True]
    wait = verdicts.MEASURES["max_wait"].of(run, "")
    assert isinstance(wait, float)
    assert wait < 0.5
