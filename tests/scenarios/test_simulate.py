"""Forecasts as runs of a grid, with the expected jobs, fleet, failures, and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import JobState, Market, Pool
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.forecast.simulate import SimulationProgress, simulate
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.expansion import expand, task_s
from batchlab.scenarios.model.values import PoolPlan, Prewarm
from tests.support.scenarios.small_scenarios import PARSE, PRICE, claims


def test_every_job_runs_all_stages_on_a_changing_fleet() -> None:
    told: list[SimulationProgress] = []
    record = simulate(claims(), progress=told.append)
    assert [job.state for job in record.jobs] == [JobState.SUCCEEDED] * 6
    assert {job.planned for job in record.jobs} == {30 + 30 + 3 + 1}
    assert (record.lost, record.duplicates, record.cut) == (0, 0, "")
    counted = {(stage.stage, stage.tasks) for stage in record.stages}
    assert counted == {("parse", 180), ("price", 180), ("payer", 18), ("sum", 6)}
    assert record.samples[-1].pools["default"].in_service == 0
    assert max(sample.pools["default"].in_service for sample in record.samples) >= 2
    assert all(instance.ended_s is not None for instance in record.instances)
    boots_s = [instance.ready_s - instance.launched_s for instance in record.instances if instance.ready_s is not None]
    assert all(0.75 * 90 <= boot_s <= 1.25 * 90 + 10 for boot_s in boots_s)
    assert [(p.submitted, p.ended, p.jobs) for p in told[-1:]] == [(6, 6, 6)]
    assert record.settings["drain_target_s"] == factory.load("aws").manager.drain_target_s
    assert record.simulated
    assert record.usd == pytest.approx(sum(record.usd_items.values()))


def test_task_duration_combines_scenario_and_calibration() -> None:
    plan = claims(PARSE, jobs=2, tasks=20)
    jobs = expand(plan).jobs
    declared_s = sum(task_s(plan.seed, job, PARSE, n) for job in jobs for n in range(20))
    (stage,) = simulate(plan).stages
    assert stage.run_s == pytest.approx(declared_s, abs=1e-4)
    assert len(stage.task_s) == 40
    slower = Calibration("aws", stretch={"claims/parse": 1.5}, bundle_s=0.5)
    (stretched,) = simulate(plan, calibration=slower).stages
    assert stretched.run_s == pytest.approx(1.5 * declared_s, abs=1e-4)
    assert stretched.declared_s == pytest.approx(declared_s, abs=1e-4)
    assert stretched.span_s >= stretched.run_s + 0.5 * stretched.bundles - 1e-3


def test_attempts_fail_and_poison_kills_as_configured() -> None:
    bad = replace(PRICE, after=(), fails=0.3, poison=1)
    plan = claims(bad, jobs=1, tasks=20)
    allowed = {name: replace(job, max_failures=20) for name, job in plan.jobs.items()}
    record = simulate(replace(plan, jobs=allowed))
    (job,) = record.jobs
    assert job.retried >= 3
    assert job.failed >= 1, "the poisonous one"
    assert job.succeeded + job.failed == job.planned == 20
    assert (record.lost, record.duplicates) == (0, 0)
    killed = [instance for instance in record.instances if instance.note == "killed by SIGKILL, exit -9"]
    assert len(killed) >= LOSS_LIMIT, "each start of the poisonous task kills a worker"
    assert (record.again_s or 0.0) > 3 * 0.5


def test_instances_are_purchased_and_placed_as_configured() -> None:
    pool = Pool("default", 5, 5, 2, 30.0, instance_type="m7i.large")
    record = simulate(claims(PRICE_ALONE, jobs=1, pool=PoolPlan(pool, 0.5), zones=3))
    spot = [instance for instance in record.instances if instance.market == Market.SPOT.value]
    assert (len(record.instances), len(spot)) == (5, 2)
    zones = [instance.zone for instance in record.instances]
    assert sorted(map(zones.count, set(zones))) == [1, 2, 2]
    assert {instance.launched_s for instance in record.instances} == {0.0}, "they were there before"
    dear = simulate(claims(PRICE_ALONE, jobs=1, pool=PoolPlan(pool, 0.0), zones=3))
    assert dear.usd is not None
    assert record.usd is not None
    assert dear.usd > record.usd


def test_capacity_follows_its_plan() -> None:
    plan = claims(PRICE_ALONE, jobs=1, gap_s=0.0, prewarm=(Prewarm("default", 3, 600.0, 1800.0),))
    samples = simulate(plan).samples
    there = {s.at_s: s.pools["default"].desired for s in samples}
    assert {n for at_s, n in there.items() if 610 < at_s < 1790} == {3}
    assert there[max(there)] == 0
    assert all(n < 3 for at_s, n in there.items() if 300 < at_s < 600)


def test_calibrated_delays_move_starts_and_ends() -> None:
    pool = PoolPlan(Pool("default", 1, 1, 1))
    stage = replace(PRICE_ALONE, task_s=Constant(10.0))
    plan = claims(stage, jobs=1, tasks=1, pool=pool)
    (plain,) = simulate(plan).jobs
    calibration = Calibration("aws", submit_s=7.0, end_s=3.0, bundle_s=2.0)
    (job,) = simulate(plan, calibration=calibration).jobs
    assert plain.started_s is not None
    assert plain.started_s < 0.5
    assert job.started_s == pytest.approx(7.0, abs=0.5)
    assert job.ended_s == pytest.approx(9.0 + 10.0 + 3.0, abs=0.5)


def test_a_run_in_which_nothing_happens_any_more_is_cut() -> None:
    nobody = PoolPlan(Pool("default", 0, 0, 1))
    record = simulate(claims(PRICE_ALONE, jobs=2, pool=nobody))
    assert record.cut.startswith("2 jobs had not ended, and nothing had run for 144")
    assert [job.ended_s for job in record.jobs] == [None, None]
    assert record.lost == 60


def test_a_scenario_that_no_grid_could_run_is_refused() -> None:
    wide = replace(PRICE_ALONE, slots=3)
    with pytest.raises(UsageError, match="slots"):
        simulate(claims(wide))
    with pytest.raises(UsageError, match="names the pool 'gpu', which does not exist"):
        simulate(claims(prewarm=(Prewarm("gpu", 1, 0.0, 1.0),)))


PRICE_ALONE = replace(PRICE, after=())
