"""The planner on grids whose best fleet is known by arithmetic."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from batchlab.cli import scenario_plan
from batchlab.cli.output import INTERRUPTED
from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.scenarios.model.values import PoolPlan, Scenario
from batchlab.scenarios.planner import candidates
from batchlab.scenarios.planner.candidates import Candidate, Goal, PoolConfig, apply_candidate, trial_result
from batchlab.scenarios.planner.planner import Search, SearchProgress
from batchlab.scenarios.record import Record
from batchlab.sim.process_pool import ProcessPool
from tests.support.scenarios.plan_models import BOOK, WAVE, Grid, a_plan, a_scenario, the_fleet

# --- Found plans ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "task_s", "deadline_s"), [(240, 30.0, 660.0), (1000, 10.0, 560.0), (90, 100.0, 560.0)]
)
def test_as_many_instances_as_the_work_needs(tasks: int, task_s: float, deadline_s: float) -> None:
    """Each of the two slots of an instance runs a fixed number of tasks until the deadline. Fewer instances are late,
    and more instances pay for more boots."""
    rounds = int((deadline_s - 60.0) // task_s)
    needed = math.ceil(tasks / (2 * rounds))
    found = a_plan(Grid(tasks, task_s, spot_off=0.0), Goal(deadline_s))
    assert found.holds
    assert found.chosen.outcomes[0].peak == needed
    assert found.chosen.finish_s == 60.0 + math.ceil(tasks / (2 * needed)) * task_s
    assert (the_fleet(found).min_size, the_fleet(found).spot) == (0, 0.0)
    assert found.chosen.candidate.prewarm == ()


@pytest.mark.parametrize(
    ("tasks", "task_s", "deadline_s"), [(200, 30.0, 600.0), (97, 50.0, 400.0), (1500, 3.0, 400.0), (60, 100.0, 450.0)]
)
def test_plan_is_as_cheap_as_the_cheapest_candidate(tasks: int, task_s: float, deadline_s: float) -> None:
    """The test compares the plan with every size and every Spot share, where a wave costs extra for Spot instances."""
    scenario, grid = a_scenario(faults=WAVE), Grid(tasks, task_s)
    cheapest = math.inf
    for size in range(1, 50):
        for share in range(21):
            fleet = PoolConfig("default", 0, size, share / 20)
            made = trial_result(grid(apply_candidate(scenario, Candidate((fleet,), 1.0)), 7), BOOK)
            if made.finish_s <= deadline_s:
                cheapest = min(cheapest, made.usd)
    found = a_plan(grid, Goal(deadline_s), scenario)
    assert found.holds
    assert found.chosen.finish_s <= deadline_s
    assert found.chosen.usd <= 1.01 * cheapest


def test_boot_delay_is_covered_by_prewarming() -> None:
    """The work is due after an hour and must end before an instance could have booted. Prewarming costs minutes, and a
    minimum would cost the whole hour."""
    grid = Grid(20, 40.0, due_s=3600.0)
    found = a_plan(grid, Goal(45.0))
    assert found.holds
    (warm,) = found.chosen.candidate.prewarm
    assert warm.min_size == 10
    assert 3600 - 120 <= warm.at_s <= 3600 - 60
    assert warm.until_s > 3600
    assert the_fleet(found).min_size == 0
    assert found.chosen.usd < 0.1 * (10 * 3640 * 0.1 / 3600)


def test_each_pool_has_its_own_size() -> None:
    """The two pools are independent grids with their own costs, and the slower one decides."""
    small, large = Grid(40, 30.0, spot_off=0.0), Grid(400, 30.0, spot_off=0.0)
    pools = tuple(PoolPlan(Pool(name, 0, 3, 2, 60.0)) for name in ("small", "large"))

    def run(scenario: Scenario, seed: int) -> Record:
        records = []
        for plan, grid in zip(scenario.pools, (small, large), strict=True):
            alone = replace(plan, pool=replace(plan.pool, name="default"))
            warm = tuple(replace(w, pool="default") for w in scenario.prewarm if w.pool == plan.pool.name)
            records.append(grid(replace(scenario, pools=(alone,), prewarm=warm), seed))
        first, second = records
        names = [plan.pool.name for plan in scenario.pools]
        return replace(
            first,
            pools=dict.fromkeys(names, (0, 3, 2)),
            jobs=(*first.jobs, *second.jobs),
            stages=tuple(replace(r.stages[0], pool=name) for name, r in zip(names, records, strict=True)),
            instances=tuple(replace(r.instances[0], pool=name) for name, r in zip(names, records, strict=True)),
            samples=tuple(
                replace(a, pools={"small": a.pools["default"], "large": b.pools["default"]})
                for a, b in zip(first.samples, second.samples, strict=True)
            ),
            usd=(first.usd or 0.0) + (second.usd or 0.0),
        )

    found = a_plan(run, Goal(660.0), a_scenario(pools=pools))
    assert found.holds
    sizes = {fleet.pool: fleet.max_size for fleet in found.chosen.candidate.fleets}
    # An instance does twenty rounds of two tasks, so one instance does 40 tasks and ten do 400.
    assert sizes["small"] <= 2
    assert found.chosen.outcomes[0].peak <= 12
    assert found.chosen.usd <= 1.05 * (11 * 660 * 0.1 / 3600)


def test_a_fleet_is_recommended_that_is_in_time_with_other_luck_too() -> None:
    grid, scenario = Grid(240, 30.0, noise=0.5), a_scenario(faults=WAVE)
    found = a_plan(grid, Goal(660.0), scenario)
    assert found.holds
    assert found.in_time.of == 20
    assert found.in_time.met >= 19
    low, high = found.in_time.interval
    assert 0.7 < low < found.in_time.value <= high
    # The same fleet is run directly with the same twenty seeds, which the search has not seen.
    seeds = {one.seed for one in found.fresh}
    assert len(seeds) == 20
    assert not seeds & {outcome.seed for outcome in found.chosen.outcomes}
    ends = [trial_result(grid(found.planned, seed), BOOK).finish_s for seed in seeds]
    assert sum(end_s <= 660.0 for end_s in ends) == found.in_time.met
    assert sorted(one.finish_s for one in found.fresh) == sorted(ends)


def test_no_point_of_the_frontier_is_dominated() -> None:
    found = a_plan(Grid(200, 30.0), Goal(600.0), a_scenario(faults=WAVE))
    points = found.frontier
    assert len(points) >= 4
    assert all(a.usd < b.usd and a.finish_s > b.finish_s for a, b in pairwise(points))
    assert found.chosen in points
    ahead = [p for p in points if p.finish_s <= 600.0 and p.usd < found.chosen.usd / 1.005]
    assert ahead == []


def test_recommendation_is_on_the_shown_frontier() -> None:
    """The recommended plan may replace a slightly cheaper plan that is more complicated."""
    for tasks in (50, 97, 200, 333):
        found = a_plan(Grid(tasks, 30.0, noise=0.1), Goal(600.0), a_scenario(), seeds=8, runs=120)
        assert found.holds
        assert found.chosen in found.frontier
        assert "◆  " in scenario_plan.text(found)


# --- Impossible goals ----------------------------------------------------------------------------


def test_a_deadline_that_nothing_meets(capsys: pytest.CaptureFixture[str]) -> None:
    code = scenario_plan.search_and_show(Search(a_scenario(), Goal(80.0), Grid(100, 30.0)), json=False)
    told = capsys.readouterr().out
    assert code == 1
    assert "No fleet meets the deadline of 80.0 s." in told
    # Even with prewarming from the first second, a boot and a task take 90 s.
    assert "The best fleet found is done after 90.0 s at the latest" in told
    # Four runs are enough to reject the plan.
    assert "In time in 0 of 4 fresh seeds" in told


def test_a_budget_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    grid, scenario = Grid(240, 30.0, spot_off=0.0), a_scenario(faults=WAVE)
    plain = a_plan(grid, Goal(360.0), scenario)
    cheapest = plain.frontier[0].usd
    assert plain.holds
    assert plain.chosen.usd > cheapest
    between = (plain.chosen.usd + cheapest) / 2
    found = a_plan(grid, Goal(360.0, between), scenario)
    assert not found.holds
    assert found.affordable is not None
    assert found.affordable.usd <= between
    assert found.affordable.finish_s > 360.0
    code = scenario_plan.search_and_show(Search(scenario, Goal(360.0, between), grid), json=False)
    told = capsys.readouterr().out
    assert code == 1
    assert "No fleet was found that is in time for" in told
    assert "The fastest fleet for that budget is done after" in told
    assert scenario_plan.search_and_show(Search(scenario, Goal(360.0, 0.0001), grid), json=False) == 1
    assert "No tested fleet, however slow, costs so little" in capsys.readouterr().out
    assert scenario_plan.search_and_show(Search(scenario, Goal(360.0, 50.0), grid), json=False) == 0
    assert "In time and within the budget in 20 of 20 fresh seeds" in capsys.readouterr().out


def test_plan_without_prices_is_refused() -> None:
    grid = Grid(10, 1.0)
    with pytest.raises(UsageError, match="has no cost"):
        a_plan(lambda scenario, seed: replace(grid(scenario, seed), usd=None), Goal(600.0))
    with pytest.raises(UsageError, match="deadline of 0 s"):
        a_plan(grid, Goal(0.0))


# --- The search ----------------------------------------------------------------------------------


def test_all_candidates_live_through_the_same_seeds() -> None:
    grid = Grid(200, 30.0, noise=0.2)
    found = a_plan(grid, Goal(600.0))
    seeds = [seed for _, seed in grid.asked]
    assert set(seeds) == set(range(7, 30))
    assert seeds.count(7) >= max(map(seeds.count, set(seeds)))
    assert found.runs == len(grid.asked) <= 300
    # Each seed has one Spot wave, when most instances work, if the plan uses Spot.
    waves = {(seed, f.at_s) for scenario, seed in grid.asked for f in scenario.faults}
    assert len(waves) == len({seed for seed, _ in waves}) > 1
    assert all(0 <= at_s <= 150 for _, at_s in waves)
    assert all(bool(s.faults) == (s.pools[0].spot > 0) for s, _ in grid.asked)


def test_plan_depends_only_on_the_seed() -> None:
    scenario, goal = a_scenario(), Goal(600.0)
    first, second = (a_plan(Grid(200, 30.0, noise=0.2), goal, scenario, seeds=6, runs=60, processes=n) for n in (1, 2))
    assert first.to_json() == second.to_json()
    other = a_plan(Grid(200, 30.0, noise=0.2), goal, replace(scenario, seed=8), seeds=6, runs=60)
    assert other.to_json() != first.to_json()


def test_ties_do_not_depend_on_process_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    each = ProcessPool.each

    def late_ones_first(self: ProcessPool[Any, Any], items: Any) -> Iterator[Any]:
        yield from reversed(list(each(self, items)))

    first = a_plan(Grid(50, 30.0), Goal(300.0), seeds=6, runs=60)
    monkeypatch.setattr(ProcessPool, "each", late_ones_first)
    second = a_plan(Grid(50, 30.0), Goal(300.0), seeds=6, runs=60, processes=2)
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_one_crew_lives_through_all_rounds(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ProcessPool[Any, Any]] = []

    def hired(work: Any, processes: int) -> ProcessPool[Any, Any]:
        made.append(ProcessPool(work, processes))
        return made[-1]

    monkeypatch.setattr(candidates, "ProcessPool", hired)
    search = Search(a_scenario(), Goal(300.0), Grid(50, 30.0), 6, 2, 60)
    seen: set[int | None] = set()

    def look(progress: SearchProgress) -> None:
        seen.update(child.pid for child in multiprocessing.active_children())
        if is_stopped and progress.done == 30:
            raise KeyboardInterrupt

    search.on_progress = look
    with pytest.raises(KeyboardInterrupt) if is_stopped else nullcontext():
        search.search()
    assert len(made) == 1
    assert len(seen) == 2
    assert not multiprocessing.active_children()
    assert search.answer() is not None


def test_limited_search_is_reported() -> None:
    grid = Grid(200, 30.0)
    found = a_plan(grid, Goal(600.0), seeds=5, runs=20)
    assert len(grid.asked) == found.runs <= 20
    assert "5 of the 20 runs are reserved to confirm" in found.cut
    assert len(found.fresh) == 5
    assert "There may be better fleets" in scenario_plan.text(found)


class Impatient(Grid):
    """A grid that raises Ctrl-C in the run with a given number."""

    at: int = 0

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        if len(self.asked) >= self.at:
            raise KeyboardInterrupt
        return super().__call__(scenario, seed)


@pytest.mark.parametrize(("at", "said"), [(0, "There is no answer"), (1, "interrupted"), (50, "interrupted")])
def test_ctrl_c_ends_the_search_with_its_results(at: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Impatient(200, 30.0)
    grid.at = at
    code = scenario_plan.search_and_show(Search(a_scenario(), Goal(600.0), grid), json=False)
    told = capsys.readouterr()
    assert code == INTERRUPTED
    assert said in told.out + told.err
    assert ("Recommended" in told.out) is False
