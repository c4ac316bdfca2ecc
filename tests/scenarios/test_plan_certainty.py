"""The certainty of the planner, and its output: a scenario's fleet and policy, and a text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from batchlab.cli import output, scenario_plan
from batchlab.core.model import Market, Pool
from batchlab.scenarios.model.values import Expectation, FaultName, Policy, PoolPlan, Prewarm, Scenario
from batchlab.scenarios.planner.candidates import (
    Candidate,
    EvaluatedCandidate,
    Goal,
    PoolConfig,
    TrialResult,
    apply_candidate,
    trial_result,
)
from batchlab.scenarios.planner.plan import Plan
from batchlab.scenarios.planner.planner import Search
from batchlab.scenarios.record import PoolSample, Record, Sample
from tests.support.scenarios.plan_models import BOOK, WAVE, Grid, a_plan, a_scenario, the_fleet
from tests.support.scenarios.records import a_job, a_record, an_instance

# --- Certainty -----------------------------------------------------------------------------------


class Lucky(Grid):
    """A grid whose tasks take half as long in the seeds that a search sees."""

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        grid = replace(self, task_s=self.task_s / 2) if seed < 10 else self
        return Grid.__call__(grid, scenario, seed)


def test_luck_in_the_seeds_of_the_search_is_not_taken_for_confidence() -> None:
    found = a_plan(Lucky(240, 30.0, spot_off=0.0), Goal(660.0))
    # A fleet for half of the work is late in every other seed, so the search continues.
    assert found.holds
    assert found.failed >= 1
    assert found.met.met == found.met.of == 20
    assert min(one.peak for one in found.fresh) >= 6
    assert min(one.seed for one in found.fresh) >= 30
    assert "failed the test with other fresh seeds" in scenario_plan.text(found)


class Failing(Grid):
    """A grid whose jobs on Spot fail early and cost almost nothing. With `always`, all jobs fail."""

    always: bool = False
    how: str = "fails"

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        made = super().__call__(scenario, seed)
        if not self.always and not scenario.pools[0].spot:
            return made
        if self.how == "loses":
            return replace(made, lost=3, usd=0.001)
        (job,) = made.jobs
        return replace(made, jobs=(replace(job, state="FAILED", ended_s=70.0),), usd=0.001)


@pytest.mark.parametrize("how", ["fails", "loses"])
def test_cheap_fleet_with_failing_jobs_is_excluded(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Failing(240, 30.0)
    grid.how = how
    found = a_plan(grid, Goal(660.0))
    assert found.holds
    assert all(one.candidate.fleets[0].spot == 0 for one in found.frontier)
    assert the_fleet(found).spot == 0
    grid.always = True
    assert scenario_plan.search_and_show(Search(a_scenario(), Goal(660.0), grid), json=False) == 1
    told = capsys.readouterr().out
    assert "No tested fleet does all of the work" in told
    assert ("3 tasks are not done" if how == "loses" else "up to 1 job fail") in told
    # A scenario that expects failed jobs is a different case.
    expected = a_scenario(expect=(Expectation("failed_jobs", most=1.0),))
    if how == "fails":
        assert a_plan(grid, Goal(660.0), expected).holds


def an_outcome(seed: int, finish_s: float, usd: float, hit: bool | None = None) -> TrialResult:
    return TrialResult(seed, finish_s, usd, 0, 0, 0, 2, {}, hit)


def told_of(outcomes: list[TrialResult], goal: Goal) -> tuple[Plan, str]:
    point = EvaluatedCandidate(Candidate((PoolConfig("default", 0, 2, 0.5),), 300.0), (an_outcome(7, 50.0, 0.5),))
    made = Plan(a_scenario(), goal, point, (point,), 20, 23, 1, True, fresh=tuple(outcomes))
    return made, scenario_plan.text(made)


def test_deadline_and_budget_apply_to_the_same_run() -> None:
    """Nineteen of twenty runs are in time and nineteen are within the budget, but not the same ones."""
    runs = [an_outcome(seed, 50.0, 1.0) for seed in range(10, 28)]
    runs += [an_outcome(28, 150.0, 1.0), an_outcome(29, 50.0, 3.0)]
    plan, told = told_of(runs, Goal(100.0, 2.0))
    assert (plan.in_time.met, plan.in_budget and plan.in_budget.met, plan.met.met) == (19, 19, 18)
    assert not plan.holds
    assert "No fleet was found that is in time for 2.00 USD in 95% of all seeds" in told
    assert "is both in 18 of 20 seeds, and costs 1.10 USD on average and 3.00 USD at most" in told
    # By the mean alone, the plan would exceed the budget.
    assert "for that budget" not in told
    plan, told = told_of([*runs[:-1], an_outcome(29, 50.0, 2.0)], Goal(100.0, 2.0))
    assert plan.holds
    assert "Recommended: 1.05 USD a run, in time and within the budget in 19 of 20 fresh" in told


def test_wave_without_effect_is_reported() -> None:
    runs = [an_outcome(seed, 50.0, 1.0, hit=seed >= 13) for seed in range(10, 30)]
    plan, told = told_of(runs, Goal(100.0))
    assert plan.to_json()["waves_missed"] == 3
    assert "The Spot wave hit no instance in 3 of 20 seeds" in told
    _, told = told_of(runs[3:], Goal(100.0))
    assert "hit no instance" not in told


def test_wave_hits_at_the_busiest_time() -> None:
    """The wave must not come in an hour without due work."""
    grid = Grid(200, 30.0, due_s=3600.0)
    found = a_plan(grid, Goal(600.0))
    waves = {f.at_s for scenario, _ in grid.asked for f in scenario.faults}
    assert len(waves) > 5
    assert all(3600 <= at_s <= 3750 for at_s in waves)
    assert found.missed_waves.met == 0


def busy(at_s: float, in_service: int, tasks: int) -> Sample:
    return Sample(at_s, {"default": PoolSample(in_service, in_service, 0, tasks, 1.0)}, 0, 0)


def test_the_busiest_quarter_is_where_instances_have_work() -> None:
    samples = (busy(0, 9, 0), busy(100, 2, 5), busy(200, 6, 5), busy(300, 1, 5), busy(400, 9, 0))
    made = a_record(a_job(ended_s=400.0), samples=samples, usd=1.0)
    assert trial_result(made, BOOK, 400.0).busiest_s == 200.0
    assert trial_result(replace(made, samples=()), BOOK, 400.0).busiest_s == 0.0


def test_a_minimum_is_priced_as_what_it_is() -> None:
    """The two Spot instances of three have ended, and the on-demand instance stays until the deadline."""
    spot = [an_instance(n, market="spot", ended_s=60.0) for n in (1, 2)]
    stays = an_instance(0, ended_s=None)
    made = a_record(a_job(), instances=(stays, *spot), pools={"default": (1, 3, 2)}, usd=9.0, instance_s=180.0)
    hour = BOOK.instance_usd_h("m7i.large").typical
    disk = BOOK.price("ebs", "gp3_usd_per_gb_month") * 50 / 730
    # The run ends with its last instance, at 60 s.
    assert trial_result(made, BOOK, 3660.0).usd == pytest.approx(9.0 + hour + disk)
    assert trial_result(made, BOOK, 30.0).usd == 9.0
    on_spot = replace(made, instances=(replace(stays, market="spot"), *spot))
    cheaper = BOOK.instance_usd_h("m7i.large", Market.SPOT).typical
    assert trial_result(on_spot, BOOK, 3660.0).usd == pytest.approx(9.0 + cheaper + disk)
    # An instance that is missing from a minimum at the end is priced as on-demand.
    gone = replace(made, instances=tuple(spot))
    assert trial_result(gone, BOOK, 3660.0).usd == pytest.approx(9.0 + hour + disk)


# --- The written scenario ------------------------------------------------------------------------


def test_a_candidate_changes_fleet_and_policy_and_nothing_else() -> None:
    scenario = a_scenario(policy=Policy(300.0, 120.0, 60.0), prewarm=(Prewarm("default", 1, 0, 9),))
    made = apply_candidate(scenario, Candidate((PoolConfig("default", 1, 9, 0.5),), 60.0), wave_s=50.0)
    (plan,) = made.pools
    assert (plan.pool.min_size, plan.pool.max_size, plan.spot) == (1, 9, 0.5)
    assert (plan.pool.slots, plan.pool.boot_s) == (2, 60.0)
    assert made.policy == Policy(60.0, 120.0, 60.0)
    assert made.prewarm == ()
    assert [(fault.name, fault.at_s) for fault in made.faults] == [(FaultName.SPOT_WAVE, 50.0)]
    assert apply_candidate(scenario, Candidate((PoolConfig("default", 1, 9),), 60.0), wave_s=50.0).faults == ()
    assert replace(made, pools=(), policy=Policy(), prewarm=(), faults=()) == replace(
        scenario, pools=(), policy=Policy(), prewarm=(), faults=()
    )


def test_printed_plan_can_be_loaded_from_yaml() -> None:
    plan = PoolPlan(Pool("default", 1, 9, 4, 90.0, instance_type="m7i.large"), 0.5)
    warm = Prewarm("default", 5, 25_200.0, 32_400.5)
    scenario = a_scenario(pools=(plan,), policy=Policy(600.0, None, 45.5), prewarm=(warm,))
    assert yaml.safe_load(scenario_plan.as_yaml(scenario)) == {
        "pools": {
            "default": {"min": 1, "max": 9, "slots": 4, "boot": "90s", "instance_type": "m7i.large", "spot": 0.5}
        },
        "policy": {"drain_target": "10m", "idle": "45.5s"},
        "prewarm": [{"pool": "default", "min": 5, "at": "7h", "until": "32400.5s"}],
    }


def test_a_person_reads_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code = scenario_plan.search_and_show(Search(a_scenario(faults=WAVE), Goal(600.0, 5.0), Grid(200, 30.0)), json=False)
    told = capsys.readouterr().out
    assert code == 0
    for part in ("Recommended:", "drain target", "pre-warm", "◆", "┊", "P50", "pools:", "Assumed:"):
        assert part in told
    assert "Spot wave of its own" not in told
    assert output.visible(told) == told
