"""A scenario in real time on a grid that is up: submitted when it is due, watched to its end.

Invariant: whatever ends a replay, what was measured so far becomes a record, and of its jobs none
goes on: those that have not ended are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from batchlab.client.http import Client
from batchlab.core.api_usage_types import account_of
from batchlab.core.retry import Patience
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model import distributions
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, Scenario
from batchlab.scenarios.replay import grid_fit
from batchlab.scenarios.replay.build_record import build_record
from batchlab.scenarios.replay.jobs import JobPreparer
from batchlab.scenarios.replay.run import Injector, ReplayRun
from batchlab.scenarios.replay.run_state import ManagerConnection, ReplayProgress, RunState
from batchlab.scenarios.verdicts.record import Record

AWAY_S = 120.0
"""So long a manager may be away, beyond what the scenario does to it."""
QUIET_S = 15.0
"""So long jobs of an earlier run may take to end."""
SPARE_S = 300.0
"""What a replay may take beyond twice the time that all its work takes on the whole fleet."""


def limit_s(scenario: Scenario, jobs: Sequence[Job]) -> float:
    """When a replay ends at the latest unless told otherwise, in seconds of the run: twice what
    its work takes on the whole fleet after the last arrival, and some time to spare."""
    slots = {plan.pool.name: plan.pool.max_size * plan.pool.slots for plan in scenario.pools}
    work: dict[str, float] = {}
    for job in jobs:
        counts = distributions.stage_sizes(job.template, job.tasks)
        for stage in job.template.stages:
            known = None if stage.after else job.task_s
            mean_s = stage.task_s.mean if known is None else known
            busy_s = mean_s * counts[stage.name] * stage.slots
            work[stage.pool] = work.get(stage.pool, 0.0) + busy_s
    whole_s = max((s / max(1, slots.get(pool, 1)) for pool, s in work.items()), default=0.0)
    last_s = max(
        [
            *(job.due_s for job in jobs[-1:]),
            *(fault.at_s + fault.for_s for fault in scenario.faults),
            0.0,
        ]
    )
    return last_s + 2 * whole_s + SPARE_S


async def _wait_until_idle(link: ManagerConnection) -> None:
    """Wait until the grid has nothing else to do: what an earlier run has cancelled ends as soon
    as there is a grid again. Refused where it does not."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + QUIET_S
    while active := await link.call(lambda client: client.jobs(active=True)):
        if loop.time() > give_up_s:
            grid_fit.check_quiet(active)
        await asyncio.sleep(0.2)


async def replay(
    scenario: Scenario,
    home: Home,
    backend: Backend,
    *,
    patience: Patience,
    seed: int | None = None,
    limit: float | None = None,
    injector: Callable[[], Injector] | None = None,
    stop: asyncio.Event | None = None,
    progress: Callable[[ReplayProgress], None] = lambda _: None,
) -> Record:
    """ReplayRun the scenario, compressed already, on the grid that is up in `home`, and measure it.

    `limit` ends it (seconds of the run; see `limit_s`), and so does `stop`: then `cut` of the
    record says so. `injector` is called for one where the scenario has faults. Refused where the
    grid's pools or policy are others than the scenario's, or it has other work; UsageError for a
    job that the grid does not take; BackendError where the manager stays away before the run.
    """
    seed = scenario.seed if seed is None else seed
    schedule = expand(scenario, seed)
    longest_s = max((fault.for_s for fault in scenario.faults), default=0.0)
    async with AsyncExitStack() as stack:
        link = ManagerConnection(home, away_s=AWAY_S + longest_s)
        stack.callback(link.close)
        objects = backend.open_objects(home)
        breaker = injector() if injector and scenario.faults else None
        if breaker:
            stack.push_async_callback(breaker.close)
        grid = await link.call(Client.grid)
        grid_fit.check(grid, scenario, deployed=backend.capabilities.fixed_pools)
        await _wait_until_idle(link)
        before = account_of((await link.call(Client.use))["total"])
        preparer = JobPreparer(
            scenario=scenario.name,
            seed=seed,
            run=backend.open_ids().fresh("run"),
            objects=objects,
            clock=backend.open_clock(),
            patience=patience,
        )
        course = RunState(scenario, seed, schedule.jobs)
        run = ReplayRun(course, link, preparer, backend.open_clock(), breaker)
        most_s = limit_s(scenario, schedule.jobs) if limit is None else limit
        await run.go(most_s, stop or asyncio.Event(), progress)
        return await build_record(
            course, run.sampler, link, backend, home, before, objects, patience
        )
