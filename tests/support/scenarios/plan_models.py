"""Grids whose duration and cost follow from arithmetic instead of the simulator, and plans for these grids."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.scenarios.model.values import Fault, FaultName, Policy, PoolPlan, Scenario
from batchlab.scenarios.planner.candidates import Goal, PoolConfig
from batchlab.scenarios.planner.plan import Plan
from batchlab.scenarios.planner.planner import Search
from batchlab.scenarios.record import InjectedFault, PoolSample, Record, Sample, StageRun
from tests.support.scenarios.records import a_job, a_record, an_instance

USD_H = 0.1
BOOK = price_book.load()
WAVE = (Fault(FaultName.SPOT_WAVE, 100.0),)


def a_scenario(**more: Any) -> Scenario:
    plan = PoolPlan(Pool("default", 0, 2, 2, 60.0))
    told: dict[str, Any] = {
        "name": "sums",
        "about": "",
        "jobs": {},
        "arrivals": (),
        "pools": (plan,),
        "policy": Policy(drain_target_s=300.0),
        "seed": 7,
        **more,
    }
    return Scenario(**told)


@dataclass
class Grid:
    """A grid with one pool, in which `tasks` tasks of `task_s` seconds each are due at `due_s`. The number of instances
    follows the policy. Each instance boots, runs one task at a time per slot, and is paid from its launch to the end.
    With `noise`, a task takes longer than `task_s`, by at most the share `noise`, depending on the seed. A Spot wave
    costs a Spot instance one boot and one task. The grid is pickled if there are several processes."""

    tasks: int
    task_s: float
    boot_s: float = 60.0
    due_s: float = 0.0
    noise: float = 0.0
    spot_off: float = 0.6
    """The share by which Spot is cheaper than on demand."""
    asked: list[tuple[Scenario, int]] = field(default_factory=list)

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        self.asked.append((scenario, seed))
        (plan,) = scenario.pools
        pool, drain_s = plan.pool, scenario.policy.drain_target_s
        assert drain_s is not None
        task_s = self.task_s * (1 + self.noise * Random(f"noise {seed}").random())
        wanted = math.ceil(self.tasks * task_s / (drain_s * pool.slots))
        useful = math.ceil(self.tasks / pool.slots)
        count = max(pool.min_size, min(pool.max_size, max(1, min(wanted, useful))))
        ready = sorted(self._ready_s(scenario, count))
        ends = sorted(max(at_s, self.due_s) + self._struck(scenario.faults, plan.spot, task_s) for at_s in ready)
        end_s = _finished(self.tasks, task_s, ends, pool.slots)
        paid_s = sum(end_s - (at_s - self.boot_s) for at_s in ready)
        rate = USD_H * (1 - self.spot_off * plan.spot)
        job = a_job(0, due_s=self.due_s, started_s=max(ready[0], self.due_s), ended_s=end_s, planned=self.tasks)
        work = StageRun("a", "work", "default", 1, self.tasks, 1, self.tasks * task_s, self.tasks * task_s, 0.0)
        samples = (
            Sample(0.0, {"default": PoolSample(pool.min_size, 0, 0, 0, 0.0)}, 0, 0),
            Sample(self.due_s, {"default": PoolSample(count, count, 0, self.tasks, 1.0)}, 0, 0),
            Sample(end_s, {"default": PoolSample(count, count, 0, 0, 0.0)}, 0, 0),
        )
        waves = [fault for fault in scenario.faults if fault.name is FaultName.SPOT_WAVE]
        missed = "" if plan.spot else "no instance on Spot was in service then"
        launched = an_instance(0, launched_s=ready[0] - self.boot_s, ready_s=ready[0])
        return a_record(
            job,
            scenario="sums",
            seed=seed,
            stages=(work,),
            samples=samples,
            instances=(launched,),
            faults=tuple(InjectedFault("spot-wave", wave.at_s, impossible=missed) for wave in waves),
            usd=rate * paid_s / 3600,
        )

    def _ready_s(self, scenario: Scenario, count: int) -> list[float]:
        warm = sum(one.min_size for one in scenario.prewarm if one.at_s <= self.due_s <= one.until_s)
        early_s = max((one.at_s for one in scenario.prewarm), default=0.0) + self.boot_s
        there = [self.boot_s] * scenario.pools[0].pool.min_size
        there += [early_s] * max(0, warm - len(there))
        return [*there[: max(count, warm)], *[self.due_s + self.boot_s] * max(0, count - len(there))]

    def _struck(self, faults: tuple[Fault, ...], spot: float, task_s: float) -> float:
        hit = any(fault.name is FaultName.SPOT_WAVE for fault in faults)
        return (self.boot_s + task_s) * spot if hit else 0.0


def _finished(tasks: int, task_s: float, ready_s: list[float], slots: int) -> float:
    """Return the end time of the last task if each task goes to the first free slot."""
    free = [at_s for at_s in ready_s for _ in range(slots)]
    heapq.heapify(free)
    last_s = 0.0
    for _ in range(tasks):
        end_s = heapq.heappop(free) + task_s
        last_s = max(last_s, end_s)
        heapq.heappush(free, end_s)
    return last_s


def a_plan(grid: Any, goal: Goal, scenario: Scenario | None = None, **more: Any) -> Plan:
    search = Search(scenario or a_scenario(), goal, grid, **more)
    search.search()
    found = search.answer()
    assert found is not None
    return found


def the_fleet(plan: Plan) -> PoolConfig:
    (fleet,) = plan.chosen.candidate.fleets
    return fleet
