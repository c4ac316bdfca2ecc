"""Random worlds with many faults, in which the report data always agrees with the ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batchlab.core.port_retries import Patience
from batchlab.core.ports import JobRows
from batchlab.core.pricing.usage import Accounting
from batchlab.manager.recorder import ReportQueue
from batchlab.sim import trial
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.plans import draw
from batchlab.sim.random_faults import WorldFaults
from batchlab.sim.tasks import TaskPlans
from batchlab.sim.users import User
from batchlab.sim.world import World
from tests.support.reports import simulated_run as told


async def lived(seed: int, folder: Path) -> list[JobRows]:
    plan, faults = draw(seed), trial.faults_for(seed)
    world = World(
        seed=seed,
        pools=plan.pools,
        faults=faults,
        script=TaskPlans(seed, plan.run_s),
        manager_settings=plan.manager,
        worker_settings=plan.worker,
        skew_s=plan.skew_s,
        logged=False,
        accounting=Accounting(),
        reports=ReportQueue(),
        sql=False,
    )
    supervisor = asyncio.create_task(world.supervise())
    world_faults = WorldFaults(world, faults, plan.pace)
    await asyncio.gather(world_faults.inject(), *(User(world, job, faults, plan.pace).use() for job in plan.jobs))
    await trial._wait_for_rest(world, max(plan.run_s))
    found = []
    for job in plan.jobs:
        patience = Patience(world.rng("reader"))
        await told.written(world.objects, patience, job.id, folder / job.id, *plan.pools)
        found.append(await world.ledger.rows(job.id))
    supervisor.cancel()
    await world.ledger.close()
    return found


@pytest.mark.parametrize("seed", [3, 8])
def test_tables_match_the_ledger(seed: int, tmp_path: Path) -> None:
    loop = SimLoop(inline_executor=True)
    jobs = loop.run(lived(seed, tmp_path), limit_s=10_000_000, limit_steps=trial.MAX_STEPS)
    assert jobs
    with told.answers(tmp_path) as ask:
        for rows in jobs:
            told.check_against_ledger(ask, rows)
        for job in ask("SELECT job, cost_usd FROM jobs"):
            lines = f"SELECT sum(cost_usd) FROM cost WHERE job = '{job['job']}'"
            assert told.one(ask, lines) == job["cost_usd"]
        assert not ask("SELECT * FROM duplicates WHERE harmful > 0")
