"""The fast model, compared with arithmetic and with the simulator."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from batchlab.core.model import Pool
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Fault, FaultName, PoolPlan, Prewarm, Scenario, StageTemplate
from batchlab.scenarios.planner import fast_model, work_units
from batchlab.scenarios.planner.candidates import Goal
from batchlab.scenarios.planner.fast_model import FastModel
from batchlab.scenarios.planner.planner import Search
from batchlab.scenarios.record import Record
from tests.support.scenarios.plan_models import Grid, a_scenario
from tests.support.scenarios.records import measured
from tests.support.scenarios.small_scenarios import PARSE, PRICE, SUM, claims

MINUTE = StageTemplate("sums", Constant(60.0))


def fixed(size: int, *, spot: float = 0.0, slots: int = 2) -> PoolPlan:
    return PoolPlan(Pool("default", size, size, slots, 30.0, instance_type="m7i.large"), spot)


def sketched(scenario: Scenario, seed: int = 1) -> Record:
    return FastModel("aws")(scenario, seed)


def test_available_instances_run_the_tasks_in_rounds() -> None:
    for size, rounds in ((4, 4), (3, 6), (16, 1)):
        found = sketched(claims(MINUTE, jobs=1, tasks=32, pool=fixed(size)))
        assert measured(found, "makespan") == 60.0 * rounds
        assert (found.lost, measured(found, "peak_fleet")) == (0, size)
        # Each instance is paid from the beginning to the end.
        assert len(found.instances) == size
        assert all(instance.launched_s == 0 and instance.ended_s is None for instance in found.instances)


def test_fleet_grows_after_a_boot_and_shrinks_when_idle() -> None:
    plan = PoolPlan(Pool("default", 0, 2, 2, 90.0, instance_type="m7i.large"))
    found = sketched(claims(MINUTE, jobs=1, tasks=8, pool=plan))
    first, *_ = found.instances
    assert first.ready_s == first.launched_s + 90.0
    assert all(instance.ended_s is not None for instance in found.instances)
    assert 150.0 <= measured(found, "makespan") <= 90.0 + 4 * 60.0 + 90.0
    warm = (Prewarm("default", 2, 0.0, 200.0),)
    early = claims(MINUTE, jobs=1, tasks=8, pool=plan, prewarm=warm)
    assert measured(sketched(early), "makespan") == 90.0 + 2 * 60.0


def test_gather_waits_for_all_and_a_chain_continues_by_piece() -> None:
    follows = StageTemplate("price", Constant(60.0), after=("sums",))
    gathers = StageTemplate("all", Constant(5.0), after=("price",), gather="*")
    found = sketched(claims(MINUTE, follows, gathers, jobs=1, tasks=16, pool=fixed(4)))
    assert measured(found, "makespan") == 2 * 2 * 60.0 + 5.0
    assert [stage.tasks for stage in found.stages] == [16, 16, 1]


@pytest.mark.parametrize("after", [("slow", "quick"), ("quick", "slow"), ("quick", "more")])
def test_follow_up_of_several_stages_is_cut_as_one(after: tuple[str, str]) -> None:
    """A stage of long tasks and a stage of short tasks would be cut differently on their own."""
    stages = (
        StageTemplate("slow", Constant(100.0)),
        StageTemplate("quick", Constant(1.0)),
        StageTemplate("more", Constant(1.0), after=("slow",)),
        StageTemplate("both", Constant(1.0), after=after),
    )
    found = sketched(claims(*stages, jobs=1, tasks=1000, pool=fixed(25)))
    assert (found.lost, found.cut) == (0, "")
    assert measured(found, "makespan") == pytest.approx(1000 * 103.0 / 50, rel=0.1)


def test_a_run_in_which_nothing_runs_or_boots_is_cut() -> None:
    none = PoolPlan(Pool("default", 0, 0, 2, 30.0, instance_type="m7i.large"))
    found = sketched(claims(MINUTE, jobs=2, tasks=4, pool=none))
    assert (found.lost, len(found.instances)) == (8, 0)
    assert "2 jobs had not ended" in found.cut


def test_jobs_take_turns() -> None:
    """The second job does not wait for the end of the first one, and both end late."""
    found = sketched(claims(MINUTE, jobs=2, gap_s=0.0, tasks=16, pool=fixed(2)))
    ends = [job.ended_s for job in found.jobs]
    assert ends == [420.0, 480.0]
    assert max(job.started_s or 0.0 for job in found.jobs) == 60.0


def test_a_spot_wave_takes_what_does_not_end_in_time() -> None:
    wave = Fault(FaultName.SPOT_WAVE, 30.0, notice_s=10.0)
    plan = claims(MINUTE, jobs=1, tasks=8, pool=fixed(4, spot=1.0))
    assert measured(sketched(plan), "makespan") == 60.0
    found = sketched(replace(plan, faults=(wave,)))
    (hit,) = found.faults
    assert (len(hit.targets), hit.impossible) == (4, "")
    assert sum(instance.ended_s == 40.0 for instance in found.instances) == 4
    # The other instances boot for 30 s and repeat all of the work.
    assert 130.0 <= measured(found, "makespan") <= 140.0
    assert found.lost == 0
    (miss,) = sketched(replace(plan, faults=(wave,), pools=(fixed(4),))).faults
    assert miss.impossible


def test_defaults_of_the_backend_apply_without_a_calibration() -> None:
    """On this backend, processes start at once whatever the scenario says, and a Spot wave takes any of them."""
    wave = Fault(FaultName.SPOT_WAVE, 30.0, notice_s=10.0)
    plan = claims(MINUTE, jobs=1, tasks=8, faults=(wave,))
    found = FastModel("local")(plan, 1)
    assert {instance.boot_s for instance in found.instances} == {factory.load("local").usual.other_boot_s}
    (hit,) = found.faults
    assert hit.targets
    assert not hit.impossible


def test_run_ends_after_the_last_prewarming_and_fault() -> None:
    plan = PoolPlan(Pool("default", 0, 4, 2, 90.0, instance_type="m7i.large"))
    warm = (Prewarm("default", 3, 4500.0, 6000.0),)
    late = claims(MINUTE, jobs=1, tasks=2, pool=plan, prewarm=warm)
    found, exact = sketched(late), simulate(late, like=factory.load("aws"))
    assert measured(found, "peak_fleet") == measured(exact, "peak_fleet") == 3
    assert found.usd == pytest.approx(exact.usd, rel=0.02)
    warmed = [instance for instance in found.instances if instance.launched_s >= 4500.0]
    assert len(warmed) == 3
    assert all(one.ended_s and one.ended_s >= 6000.0 for one in warmed)
    wave = Fault(FaultName.SPOT_WAVE, 4500.0)
    (missed,) = sketched(replace(late, prewarm=(), faults=(wave,))).faults
    assert missed.impossible


def test_idle_time_after_the_last_job_is_checked_at_each_tick() -> None:
    tick_s = factory.load("aws").manager.tick_s
    plan = claims(MINUTE, jobs=2, gap_s=10 * fast_model.MAX_POLICY_CHECKS * tick_s, tasks=64)
    moments = [sample.at_s for sample in sketched(plan).samples]
    last_s = 10 * fast_model.MAX_POLICY_CHECKS * tick_s
    late = [b - a for a, b in pairwise(at_s for at_s in moments if at_s >= last_s)]
    assert set(late[1:]) == {tick_s}
    assert len(moments) < 2 * fast_model.MAX_POLICY_CHECKS


def test_short_tasks_are_pieces_and_a_long_one_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_units, "TARGET_UNITS", 50)
    plan = claims(PARSE, PRICE, SUM, jobs=2, tasks=500)
    works = work_units.split_jobs(expand(plan, 1), 1, Calibration("aws"))
    for work in works:
        parse, price, total = work.stages
        assert len(parse) == len(price) < 100
        assert (sum(p.tasks for p in parse), sum(p.tasks for p in price)) == (500, 500)
        assert [p.tasks for p in total] == [1]
        assert [p.tasks for p in parse] == [p.tasks for p in price], "they share a cut"
        assert all(a.number + 1 == b.number for a, b in pairwise(parse))


def test_fast_model_is_near_the_simulator() -> None:
    """The scenario has several stages, boots, a changing fleet, and a Spot wave."""
    wave = (Fault(FaultName.SPOT_WAVE, 200.0),)
    plan = claims(jobs=6, tasks=100, faults=wave)
    rough, exact = sketched(plan), simulate(plan, like=factory.load("aws"))
    assert rough.seed == exact.seed
    assert measured(rough, "makespan") == pytest.approx(measured(exact, "makespan"), rel=0.1)
    assert rough.usd == pytest.approx(exact.usd, rel=0.15)
    assert measured(rough, "peak_fleet") == pytest.approx(measured(exact, "peak_fleet"), abs=1)


def test_candidates_of_the_fast_model_are_simulated() -> None:
    """An error of a fifth in the fast model's time and cost causes one more round of simulations, but not a wrong
    answer."""
    exact, off = Grid(240, 30.0, noise=0.1), Grid(240, 24.0, noise=0.1)
    plain = Search(a_scenario(), Goal(660.0), exact)
    plain.search()
    guided = Search(a_scenario(), Goal(660.0), exact, sketch=off)
    guided.search()
    first, second = plain.answer(), guided.answer()
    assert first is not None
    assert second is not None
    assert second.holds
    assert second.chosen.usd <= 1.03 * first.chosen.usd
    assert second.runs < 70 < first.runs
