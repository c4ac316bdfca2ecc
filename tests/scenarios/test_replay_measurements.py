"""Measurements from outcomes and activities, and the cost of a run."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from batchlab.core.api_types import JobView
from batchlab.core.errors import Refused
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Market, Outcome, Pool, StageName, TaskSet
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import HOURS_A_MONTH, WORKER_DISK_GB
from batchlab.core.pricing.request_costs import Requests
from batchlab.core.pricing.usage import Account, Kind
from batchlab.runtime import factory
from batchlab.scenarios.model.values import PoolPlan
from batchlab.scenarios.record import StageRun
from batchlab.scenarios.replay import driver
from batchlab.scenarios.replay.measurements import duplicates, succeeded_s
from batchlab.scenarios.replay.run_state import GridSampler, ManagerConnection
from tests.support.cli import a_grid, a_job


def outcome(tasks: range, *, attempt: int = 1, round_: int = 0, failed: int | None = None) -> Outcome:
    good = TaskSet.from_indices(task for task in tasks if task != failed)
    bad = () if failed is None else (Failure(failed, FailureKind.EXCEPTION, "so"),)
    return Outcome(
        Bundle(JobId("j"), StageName("s"), TaskSet.from_indices(tasks), attempt, round_),
        "x",
        "w",
        0.0,
        1.0,
        succeeded=good,
        values=(None,) * len(good),
        run_s=(1.0 + round_,) * len(good),
        failed=bad,
    )


def test_task_with_two_results_is_a_duplicate_and_a_retried_one_is_not() -> None:
    assert duplicates([outcome(range(4)), outcome(range(4, 8))]) == 0
    assert duplicates([outcome(range(4)), outcome(range(3, 8))]) == 1
    assert duplicates([outcome(range(4), failed=2), outcome(range(2, 3), attempt=2)]) == 1
    # A repetition by the user is another round.
    assert duplicates([outcome(range(4), failed=2), outcome(range(2, 3), round_=1)]) == 0


def test_last_round_of_a_task_counts() -> None:
    found = succeeded_s([outcome(range(2), round_=1), outcome(range(4))])
    assert found == {0: 2.0, 1: 2.0, 2: 1.0, 3: 1.0}


class FakeLink:
    """A link that returns a list of answers in turn. The answer None means that the manager does not answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def try_call(self, ask: Any) -> Any:
        return self.answers.pop(0)


def _grid(*instances: tuple[str, str, float]) -> dict[str, Any]:
    grid = a_grid()
    (pool,) = grid["pools"]
    (one,) = pool["instances"]
    pool["instances"] = [
        {**one, "id": name, "state": state, "launched_s": launched_s} for name, state, launched_s in instances
    ]
    return grid


def _activity(number: int, what: str, at_s: float, ended_s: float | None) -> dict[str, Any]:
    return {
        "id": number,
        "pool": "default",
        "at_s": at_s,
        "ended_s": ended_s,
        "description": what,
        "cause": "",
        "status": "Successful" if ended_s else "InProgress",
    }


def test_an_instances_life_is_put_together_from_looks_and_activities() -> None:
    activities = [
        _activity(1, "Launching a new instance: w-1", 1001.0, 1001.4),
        _activity(2, "Launching a new EC2 instance: i-2", 1001.0, None),
        _activity(3, "Launching a new instance: w-3", 1002.1, 1002.2),
        _activity(4, "Terminating instance: w-3", 1002.3, 1002.5),
        _activity(5, "Launching a new instance: w-0", 900.0, 901.0),
        _activity(6, "Terminating instance: w-1", 1004.0, 1004.2),
    ]
    link = FakeLink(
        _grid(("w-1", "Pending", 1001.0), ("i-2", "Pending", 1001.0)),
        None,
        _grid(("w-1", "InService", 1001.0), ("i-2", "InService", 1001.0)),
        _grid(("i-2", "InService", 1001.0)),
        activities,
    )
    sampler = GridSampler(cast("ManagerConnection", link))
    sampler.begin(1000.0)

    async def go() -> None:
        for now_s in (1001.2, 1002.0, 1003.0, 1005.0):
            await sampler.sample(now_s)
        await sampler.read_activities()

    asyncio.run(go())
    assert [sample.at_s for sample in sampler.samples] == pytest.approx([1.2, 3.0, 5.0])
    assert [sample.pools["default"].in_service for sample in sampler.samples] == [0, 2, 1]
    lives = {instance.id: (instance.launched_s, instance.ready_s, instance.ended_s) for instance in sampler.instances()}
    assert lives == {
        "w-1": pytest.approx((1.0, 1.4, 4.2)),
        "i-2": (1.0, 3.0, None),
        "w-3": pytest.approx((2.1, 2.2, 2.5)),
    }


def test_instance_missing_from_one_sample_continues() -> None:
    there, missing = _grid(("w-1", "InService", 1001.0)), _grid()
    gone = _grid(("w-1", "Terminated", 1001.0))
    sampler = GridSampler(cast("ManagerConnection", FakeLink(there, missing, there, gone, missing)))
    sampler.begin(1000.0)
    ends: list[float | None] = []

    async def go() -> None:
        for now_s in (1002.0, 1003.0, 1004.0, 1005.0, 1006.0):
            await sampler.sample(now_s)
            ends.append(sampler.instances()[0].ended_s)

    asyncio.run(go())
    assert ends == [None, 3.0, None, 5.0, 5.0]


def test_on_a_laptop_instances_cost_what_the_scenarios_would() -> None:
    book, local = price_book.load(), factory.load("local")
    before = Account({Kind("default"): 100.0})
    after = Account(
        {Kind("default"): 3700.0},
        failed_s={"default": 7.0},
        lost_s={"default": 3.0},
        requests=Requests(s3_gets=1e6),
        bundles=10,
    )
    stages = [StageRun("t", "s", "default", 1, 10, 10, 1800.0, 1800.0, 1800.0)]

    def usd(spot: float, kind: str = "m7i.large") -> driver.RunCost:
        plan = PoolPlan(Pool("default", 0, 1, 1, instance_type=kind), spot)
        return driver.compute_cost(before, after, stages, [plan], local, book)

    hour = book.rate("m7i.large", Market.ON_DEMAND, "").typical
    found = usd(0.0)
    instances = sum(v for name, v in found.items.items() if "pool" in name)
    disk = book.price("ebs", "gp3_usd_per_gb_month") * WORKER_DISK_GB / HOURS_A_MONTH
    assert instances == pytest.approx(hour + disk, rel=0.001)
    assert found.usd == pytest.approx(sum(found.items.values()))
    assert driver.wasted_s(before, after) == 10.0
    assert usd(1.0).usd < usd(0.5).usd < found.usd < usd(0.0, "m7i.4xlarge").usd


def test_a_grid_that_does_something_else_is_refused() -> None:
    driver.check_idle([])
    jobs = [cast("JobView", a_job(f"sums-{n}")) for n in range(3)]
    with pytest.raises(Refused, match="has not ended: sums-0 and 2 others"):
        driver.check_idle(jobs)
