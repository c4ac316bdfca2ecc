"""The cost of bundles if all processes of a grid share the cores of one machine."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from batchlab.core.model import Pool
from batchlab.runtime import factory
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.forecast.simulated_work import SharedCores
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import PoolPlan, Scenario, StageTemplate, WorkKind
from batchlab.scenarios.planner.fast_model import FastModel
from batchlab.scenarios.verdicts import MEASURES
from tests.support.scenarios.small_scenarios import claims


def test_bundles_take_turns_at_the_cores() -> None:
    cores = SharedCores(2, 0.5)
    told = [cores.begin(10.0, "w", computes=False) for _ in range(4)]
    assert told == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert cores.begin(20.0, "w", computes=False) == pytest.approx(0.5)


def test_a_task_that_computes_takes_its_share_until_it_is_over() -> None:
    cores = SharedCores(1, 0.5)
    for _ in range(4):
        cores.begin(0.0, "a", computes=True)
    # Two of six processes that need a core are the manager and a worker.
    assert cores.begin(100.0, "a", computes=False) == pytest.approx(0.5 * (1 + 4 / 2))
    for _ in range(4):
        cores.end("a", computes=True)
    assert cores.begin(200.0, "a", computes=False) == pytest.approx(0.5)


def test_without_cores_nothing_is_shared() -> None:
    cores = SharedCores(0, 0.5)
    assert cores.begin(0.0, "w", computes=True) == 0.0
    cores.end("w", computes=True)


def many(kind: WorkKind = WorkKind.SLEEP) -> Scenario:
    """Return a scenario whose work would take a tenth of a second on forty slots."""
    stage = StageTemplate("work", Constant(0.1), kind=kind, bundle=1)
    return claims(stage, jobs=1, tasks=400, pool=PoolPlan(Pool("default", 10, 10, 4)))


def makespan_s(plan: Scenario, cores: int) -> float:
    local = factory.load("local")
    calibration = replace(local.usual, cores=cores, bundle_cpu_s=0.015)
    found = MEASURES["makespan"].of(simulate(plan, like=local, calibration=calibration), "")
    assert isinstance(found, float)
    return found


def test_record_stores_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7}, raising=False)
    plan = claims(StageTemplate("work", Constant(1.0)), jobs=1, tasks=2)
    assert simulate(plan, like=factory.load("local")).settings["cores"] == 3
    assert simulate(plan, like=factory.load("aws")).settings["cores"] == 0


def test_a_sketch_takes_what_a_bundle_takes_of_a_core() -> None:
    calibration = replace(factory.load("local").usual, cores=2, bundle_cpu_s=0.5, bundle_s=1.0)
    stage = StageTemplate("work", Constant(10.0), bundle=1)
    plan = claims(stage, jobs=1, tasks=2, pool=PoolPlan(Pool("default", 2, 2, 1)))
    for cores, takes_s in ((2, 11.5), (0, 11.0)):
        (job,) = FastModel("local", replace(calibration, cores=cores))(plan, 1).jobs
        assert job.ended_s == takes_s


def test_many_short_bundles_on_one_machine_take_what_its_cores_take() -> None:
    free_s, two_s, eight_s = (makespan_s(many(), cores) for cores in (0, 2, 8))
    assert two_s == pytest.approx(400 * 0.015 / 2, rel=0.2)
    assert free_s < eight_s < two_s
    assert makespan_s(many(WorkKind.CPU), 2) > 1.2 * two_s
