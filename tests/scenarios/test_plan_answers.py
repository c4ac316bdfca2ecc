"""The answer of a plan, its basis, and the scenario text that it suggests."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from batchlab.cli import scenario_plan
from batchlab.core.model import Pool
from batchlab.scenarios.model.arrivals import FixedTimes
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Expectation, Fault, FaultName, JobTemplate, Prewarm, Scenario
from batchlab.scenarios.planner.candidates import (
    Candidate,
    EvaluatedCandidate,
    Goal,
    PoolConfig,
    TrialResult,
    allowed_failures,
    trial_result,
)
from batchlab.scenarios.planner.plan import Plan
from batchlab.scenarios.planner.search_steps import SizeLimits, neighbors, scale_pools
from batchlab.scenarios.record import Record
from tests.support.scenarios.plan_models import BOOK, a_scenario
from tests.support.scenarios.records import a_job, a_record
from tests.support.scenarios.replay import stage


def a_run(**failed: int) -> Record:
    """Return a record with the given number of failed jobs per template and one job that succeeded."""
    names = [name for name, count in failed.items() for _ in range(count)]
    jobs = [a_job(n, template=name, state="FAILED") for n, name in enumerate(names)]
    return a_record(*jobs, a_job(99), usd=1.0)


@pytest.mark.parametrize(
    ("told", "fine", "not_fine"),
    [
        ((), {}, {"odd": 1}),
        ((Expectation("failed_jobs", most=2.0),), {"odd": 2}, {"odd": 2, "claims": 1}),
        # Ten jobs of the first template may fail, and none of the second one.
        ((Expectation("failed_jobs", most=10.0, template="odd"),), {"odd": 10}, {"claims": 1}),
        (
            (Expectation("failed_jobs", most=9.0), Expectation("failed_jobs", most=1.0, template="odd")),
            {"odd": 1, "claims": 8},
            {"odd": 2},
        ),
        ((Expectation("failed_jobs", most=3.0), Expectation("failed_jobs", most=1.0)), {"odd": 1}, {"odd": 2}),
    ],
)
def test_jobs_may_fail_as_their_own_template_is_expected_to(
    told: tuple[Expectation, ...], fine: dict[str, int], not_fine: dict[str, int]
) -> None:
    may = allowed_failures(a_scenario(expect=told))
    assert trial_result(a_run(**fine), BOOK, allowed_failures=may).is_done
    assert not trial_result(a_run(**not_fine), BOOK, allowed_failures=may).is_done


def a_room(useful: int) -> SizeLimits:
    shown = trial_result(a_record(usd=1.0), BOOK)
    demand = replace(shown.pools["default"], work_s=4000.0, slots=useful, rise_s=100.0, boot_s=30.0)
    return SizeLimits({"default": demand}, 1030.0, {"default": Pool("default", 0, 6, slots=1)})


def test_existing_capacity_is_not_prewarmed() -> None:
    """`check` refuses a prewarming that would not change anything."""
    warm = (Prewarm("default", 3, 60.0, 160.0),)
    for least, step in product((0, 1, 2, 3, 5), (0.5, 0.12)):
        best = Candidate((PoolConfig("default", least, 6),), 300.0, warm if least < 3 else ())
        tried = [*neighbors(best, a_room(9), step), scale_pools(best, a_room(9), 0.5)]
        for one in tried:
            (fleet,) = one.fleets
            assert all(fleet.min_size < w.min_size <= fleet.max_size for w in one.prewarm), one


def a_plan(scenario: Scenario, *fleets: PoolConfig) -> Plan:
    point = EvaluatedCandidate(Candidate(fleets, 300.0), (TrialResult(7, 50.0, 0.5, 0, 0, 0, 2, {}, None),))
    return Plan(scenario, Goal(100.0), point, (point,), 20, 23, 1, False)


def test_a_wave_that_has_no_spot_instance_to_take_is_to_be_deleted() -> None:
    wave, other = Fault(FaultName.SPOT_WAVE, 90.0), Fault(FaultName.KILL, 10.0)
    scenario = a_scenario(faults=(other, wave))
    found = a_plan(scenario, PoolConfig("default", 0, 2))
    assert found.idle_waves == (wave,)
    assert found.to_json()["idle_waves_at_s"] == [90.0]
    assert "Delete the spot-wave at 90.0 s from the scenario" in scenario_plan.text(found)
    on_spot = a_plan(scenario, PoolConfig("default", 0, 2, 0.1))
    assert on_spot.idle_waves == ()
    assert "Delete" not in scenario_plan.text(on_spot)
    assert a_plan(a_scenario(faults=(other,)), PoolConfig("default", 0, 2)).idle_waves == ()
    # A wave in one pool does not affect another pool.
    of_one = a_scenario(faults=(replace(wave, pool="default"), replace(wave, pool="big")))
    fleets = (PoolConfig("default", 0, 2), PoolConfig("big", 0, 2, 1.0))
    assert [idle_wave.pool for idle_wave in a_plan(of_one, *fleets).idle_waves] == ["default"]


@pytest.mark.parametrize(("deadline_s", "cannot"), [(1200.0, True), (1201.0, False)])
def test_deadline_before_the_last_arrival_is_impossible(deadline_s: float, cannot: bool) -> None:
    arrivals = (FixedTimes(template="plain", moments=((300.0, 1), (1500.0, 1))),)
    late = (TrialResult(7, 1600.0, 0.5, 0, 0, 0, 2, {}, None),)
    jobs = {"plain": JobTemplate("plain", (stage("work", 30.0),), Constant(1))}
    made = a_plan(a_scenario(jobs=jobs, arrivals=arrivals), PoolConfig("default", 0, 4))
    made = replace(made, goal=Goal(deadline_s), chosen=replace(made.chosen, outcomes=late))
    told = "No fleet can, because the last job is due 20 min 00 s after the first job"
    assert (told in scenario_plan.text(made)) is cannot
