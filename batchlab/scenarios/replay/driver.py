"""Replay of a scenario in real time on a running grid.

A replay always ends with a record of its measurements. Its unfinished jobs are canceled.
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
"""Time that a manager may be absent, beyond the scenario's faults."""
QUIET_S = 15.0
"""Time in which jobs of an earlier run must end."""
SPARE_S = 300.0
"""Time that a replay may take beyond twice the time of its work on the whole fleet."""


_HOW = "Take it down with `batchlab grid down`, or name another folder with --home."
_STACK = "Let the scenario have the stack's own, or change the stack with `batchlab deploy apply`."
_CLOSE = 1e-6


def policy_settings(policy: Policy) -> Mapping[str, float]:
    """Return the scenario's policy with the manager's setting names."""
    named = {
        "drain_target_s": policy.drain_target_s,
        "cooldown_in_s": policy.cooldown_in_s,
        "idle_s": policy.idle_s,
    }
    return {name: value for name, value in named.items() if value is not None}


def check_grid(grid: GridView, scenario: Scenario, *, deployed: bool) -> None:
    """Check the grid's pools and policy against the scenario.

    Raise Refused if they differ. Other pools of the grid are ignored.
    """
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
    """Raise Refused if the grid has other jobs, because they would be measured too."""
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
    """Return the default time limit of a replay in run seconds: twice the time of its work on the
    whole fleet after the last arrival, plus spare time.
    """
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
    """Wait until canceled jobs of an earlier run have ended. Raise Refused on a timeout."""
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
    """Run the compressed scenario on the grid in `home` and measure it.

    `limit` (run seconds, see `limit_s`) or `stop` ends the run early; the record's `cut` then has
    the reason. `injector` creates the injector of the scenario's faults. Raise Refused if the grid
    differs from the scenario or has other work, UsageError for a job that the grid refuses, and
    BackendError if the manager stays absent before the run.
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
