"""A scenario in real time on a grid that is up: submitted when it is due, watched to its end.

Invariant: whatever ends a replay, what was measured so far becomes a record, and of its jobs none
goes on: those that have not ended are cancelled.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, JobView
from batchlab.core.api_usage_types import account_of
from batchlab.core.errors import Refused
from batchlab.core.retry import Patience
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, Policy, Scenario
from batchlab.scenarios.record import Record
from batchlab.scenarios.replay.build_record import build_record
from batchlab.scenarios.replay.jobs import JobPreparer
from batchlab.scenarios.replay.run import Injector, ReplayRun
from batchlab.scenarios.replay.run_state import ManagerConnection, ReplayProgress, RunState

AWAY_S = 120.0
"""So long a manager may be away, beyond what the scenario does to it."""
QUIET_S = 15.0
"""So long jobs of an earlier run may take to end."""
SPARE_S = 300.0
"""What a replay may take beyond twice the time that all its work takes on the whole fleet."""


_HOW = "Take it down with `batchlab grid down`, or name another folder with --home."
_STACK = "Let the scenario have the stack's own, or change the stack with `batchlab deploy apply`."
_CLOSE = 1e-6


def policy_settings(policy: Policy) -> Mapping[str, float]:
    """What the scenario asks of the manager, by the manager's own names."""
    named = {
        "drain_target_s": policy.drain_target_s,
        "cooldown_in_s": policy.cooldown_in_s,
        "idle_s": policy.idle_s,
    }
    return {name: value for name, value in named.items() if value is not None}


def check_grid(grid: GridView, scenario: Scenario, *, deployed: bool) -> None:
    """Refused where the grid's pools or its policy are others than the scenario's. Pools that only
    the grid has stand by."""
    remedy = _STACK if deployed else _HOW
    there = {pool["name"]: pool for pool in grid["pools"]}
    for plan in scenario.pools:
        wanted, found = plan.pool, there.get(plan.pool.name)
        if found is None:
            raise Refused(
                f"The grid that is up has no pool {wanted.name!r}, which the scenario asks for.",
                remedy=remedy,
            )
        ours = (wanted.min_size, wanted.max_size, wanted.slots)
        theirs = (found["min"], found["max"], found["slots"])
        if ours != theirs:
            raise Refused(
                f"The pool {wanted.name!r} of the grid that is up is {_describe_pool(*theirs)}, "
                f"and the scenario asks for {_describe_pool(*ours)}.",
                remedy=remedy,
            )
        if found["held_by_hand"]:
            raise Refused(
                f"The capacity of the pool {wanted.name!r} of the grid that is up is set by hand.",
                remedy=f"`batchlab grid scale {wanted.name} --auto` hands it back to the policy.",
            )
    for name, value in policy_settings(scenario.policy).items():
        is_so = grid["settings"].get(name)
        if is_so is None or not math.isclose(is_so, value, rel_tol=_CLOSE):
            shown = "not known" if is_so is None else f"{is_so:g}"
            raise Refused(
                f"{name} of the grid that is up is {shown}, and the scenario asks for {value:g}.",
                remedy=remedy,
            )


def check_idle(active: Sequence[JobView]) -> None:
    """Refused where the grid has other work to do: it would be measured along."""
    if active:
        others = f" and {len(active) - 1} others" if len(active) > 1 else ""
        raise Refused(
            f"The grid has a job that has not ended: {active[0]['id']}{others}.",
            remedy="Wait for it, cancel it with `batchlab job cancel`, or name another folder "
            "with --home.",
        )


def _describe_pool(least: int, most: int, slots: int) -> str:
    return f"{least}-{most}x{slots}"


def limit_s(scenario: Scenario, jobs: Sequence[Job]) -> float:
    """When a replay ends at the latest unless told otherwise, in seconds of the run: twice what
    its work takes on the whole fleet after the last arrival, and some time to spare."""
    slots = {plan.pool.name: plan.pool.max_size * plan.pool.slots for plan in scenario.pools}
    work: dict[str, float] = {}
    for job in jobs:
        counts = expansion.stage_sizes(job.template, job.tasks)
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
            check_idle(active)
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
        check_grid(grid, scenario, deployed=backend.capabilities.fixed_pools)
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
