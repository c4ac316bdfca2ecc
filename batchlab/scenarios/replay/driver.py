"""Replay of a scenario in real time on a running grid, and its record.

A replay always ends with a record of its measurements. A value that could not be read is empty in the record. The cost
in the record uses the grid's own account and the calculation of `batchlab cost bill`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, JobView
from batchlab.core.api_usage_types import AccountView, account_of
from batchlab.core.errors import BackendError, BatchlabError, Refused, UsageError
from batchlab.core.fair_share import DEFAULT_SHARE, SharePolicy
from batchlab.core.model import Market
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.pricing import price_book
from batchlab.core.pricing.bill import PoolFacts, StageUse, bill
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.usage import Account, Kind
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, PoolPlan, Scenario
from batchlab.scenarios.record import JobRun, Record, StageRun
from batchlab.scenarios.replay.jobs import JobPreparer
from batchlab.scenarios.replay.measurements import Measurements, measure, root_tasks
from batchlab.scenarios.replay.run import Injector, ReplayRun
from batchlab.scenarios.replay.run_state import GridSampler, ManagerConnection, ReplayProgress, RunState, SubmittedJob

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunCost:
    """Cost of a run at list prices, with the parts of the cost by purpose."""

    usd: float
    items: Mapping[str, float]


def compute_cost(
    before: Account,
    after: Account,
    stages: Iterable[StageRun],
    pools: Iterable[PoolPlan],
    backend: Backend,
    book: PriceBook,
) -> RunCost:
    """Compute the cost of the usage between two accounts.

    On a backend that is not billed, the cost is computed with the instance types and Spot shares of the scenario's
    pools.
    """
    plans = {plan.pool.name: plan for plan in pools}
    used = Account(
        _subtract(before.billed_s, after.billed_s),
        _subtract(before.failed_s, after.failed_s),
        _subtract(before.lost_s, after.lost_s),
        after.requests - before.requests,
        after.bundles - before.bundles,
        repeated_s=_subtract(before.repeated_s, after.repeated_s),
    )
    if not backend.capabilities.billed:
        used = replace(used, billed_s=_as_planned(used.billed_s, plans))
    uses = [StageUse(stage.stage, stage.pool, stage.run_s, stage.slots) for stage in stages]
    facts = {name: PoolFacts(plan.pool.slots, plan.pool.instance_type) for name, plan in plans.items()}
    cost = bill(uses, used, facts, book, pace=backend.pace)
    items: dict[str, float] = {}
    for item in cost.items:
        items[item.what] = items.get(item.what, 0.0) + item.usd.typical
    return RunCost(cost.usd.typical, items)


def wasted_s(before: Account, after: Account) -> float:
    """Return the slot seconds of failed attempts, lost executions, and speculative copies between two accounts of a
    grid."""
    first_s, last_s = (
        sum(sum(by_pool.values()) for by_pool in (account.failed_s, account.lost_s, account.repeated_s))
        for account in (before, after)
    )
    return last_s - first_s


def _subtract(before: Mapping[T, float], after: Mapping[T, float]) -> dict[T, float]:
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def _as_planned(billed_s: Mapping[Kind, float], plans: Mapping[str, PoolPlan]) -> dict[Kind, float]:
    """Return the billed instance seconds as if the instances had the planned types and Spot shares.

    The seconds of real Spot Instances do not change.
    """
    planned_s: dict[Kind, float] = {}
    for kind, seconds in billed_s.items():
        plan = plans.get(kind.pool)
        parts = {kind: seconds}
        if plan is not None and kind.market is not Market.SPOT:
            typed = replace(kind, type=plan.pool.instance_type or kind.type)
            parts = {replace(typed, market=Market.SPOT): seconds * plan.spot, typed: seconds * (1 - plan.spot)}
        for part, part_s in parts.items():
            if part_s:
                planned_s[part] = planned_s.get(part, 0.0) + part_s
    return planned_s


MAX_REQUESTS = 4
"""Maximum number of parallel requests for the accounts of jobs."""
FINAL_TIMEOUT_S = 10.0
"""Timeout in seconds of the last requests to the manager."""
RESTORE_TIMEOUT_S = 30.0
"""Time in seconds within which a manager must restore the grid's fair-share policy after a run."""


async def build_record(
    state: RunState,
    sampler: GridSampler,
    link: ManagerConnection,
    backend: Backend,
    home: Home,
    before: Account,
    objects: Objects,
    patience: Patience,
) -> Record:
    """Build the record of a run that has ended. `before` is the grid's account at the start of the run."""
    after = await _account(link, list(state.running))
    cut = state.cut
    try:
        measured = await measure(state.observed_jobs(), state.seed, objects, patience)
    except BackendError as error:
        measured = Measurements()
        cut = cut or f"The results of its tasks cannot be read: {error.message}"
    scenario = state.scenario
    types = {plan.pool.name: plan.pool.instance_type for plan in scenario.pools}
    # An instance without a type gets the type of its pool. The computation of the cost uses the same types.
    instances = tuple(replace(life, type=life.type or types.get(life.pool, "")) for life in sampler.instances())
    stages = measured.runs()
    cost = None
    if after is not None:
        with suppress(UsageError):  # if the price book cannot be read, the record lacks a cost
            cost = compute_cost(before, after, stages, scenario.pools, backend, price_book.load(home.path))
    jobs = [*(job_run(job, state.begun_s) for job in state.running.values()), *state.refused.values()]
    return Record(
        scenario=scenario.name,
        digest=scenario.digest,
        seed=state.seed,
        backend=backend.name,
        compressed=scenario.compressed,
        pools={plan.pool.name: (plan.pool.min_size, plan.pool.max_size, plan.pool.slots) for plan in scenario.pools},
        gpus={plan.pool.name: plan.pool.gpus for plan in scenario.pools if plan.pool.gpus},
        jobs=tuple(sorted(jobs, key=lambda job: job.index)),
        stages=stages,
        samples=tuple(sampler.samples),
        instances=instances,
        faults=tuple(sorted(state.injected, key=lambda fault: fault.at_s)),
        lost=measured.lost,
        duplicates=measured.duplicates,
        instance_s=sum(life.lived_s(state.took_s) for life in instances),
        again_s=wasted_s(before, after) if after else None,
        usd=cost.usd if cost else None,
        usd_items=cost.items if cost else {},
        settings={
            **{f"worker.{name}": value for name, value in asdict(backend.worker).items()},
            **(sampler.grid["settings"] if sampler.grid else {}),
            "cores": backend.usual.cores,
        },
        shares=scenario.shares,
        wall_s=state.took_s,
        cut=cut,
    )


async def _account(link: ManagerConnection, jobs: Sequence[str]) -> Account | None:
    """Return the grid's account, or None if the manager does not answer.

    The times of failed and lost runs come from the accounts of `jobs`, because the grid's account lacks these times.
    """
    limit = asyncio.Semaphore(MAX_REQUESTS)

    async def read(job: str) -> AccountView | None:
        async with limit:
            used = await link.call(lambda client: client.job_use(job), within_s=FINAL_TIMEOUT_S)
        return used["account"]

    try:
        total = account_of((await link.call(Client.use, within_s=FINAL_TIMEOUT_S))["total"])
        for account in await asyncio.gather(*map(read, jobs)):
            if account:
                for pool, seconds in account["failed_s"].items():
                    total.fail(pool, seconds)
                for pool, seconds in account["lost_s"].items():
                    total.lose(pool, seconds)
                for pool, seconds in account.get("repeated_s", {}).items():
                    total.repeat(pool, seconds)
                total.bundles += account["bundles"]
    except BackendError:
        return None
    return total


def job_run(job: SubmittedJob, begun_s: float) -> JobRun:
    """Return the result of the job for the record."""
    view, stages = job.view, job.view["stages"]
    ends = [stage["last_end_s"] for stage in stages if stage["last_end_s"] is not None]
    return JobRun.of(
        job.due,
        job_id=view["id"],
        submitted_s=job.at_s,
        started_s=_run_time(view["started_s"], begun_s),
        ended_s=_run_time(view["ended_s"], begun_s),
        state=view["state"],
        planned=sum(stage["planned"] or 0 for stage in stages),
        succeeded=sum(stage["succeeded"] for stage in stages),
        failed=sum(stage["failed"] for stage in stages),
        cancelled=sum(stage["cancelled"] for stage in stages),
        retried=sum(stage["retried"] for stage in stages),
        tasks=root_tasks(view, {stage.name: stage.after for stage in job.due.template.stages}),
        done_s=_run_time(max(ends, default=None), begun_s),
    )


def _run_time(at_s: float | None, begun_s: float) -> float | None:
    return None if at_s is None else at_s - begun_s


ABSENCE_LIMIT_S = 120.0
"""Time in seconds that a manager may be absent, in addition to the duration of the scenario's faults."""
IDLE_TIMEOUT_S = 15.0
"""Time in seconds within which canceled jobs of an earlier run must end."""
EXTRA_S = 300.0
"""Time in seconds that a replay may take in addition to twice the time that its work takes on the whole fleet."""


_REMEDY = "Take it down with `batchlab grid down`, or name another folder with --home."
_STACK_REMEDY = "Let the scenario have the stack's own, or change the stack with `batchlab deploy apply`."
_TOLERANCE = 1e-6


def check_grid(grid: GridView, scenario: Scenario, *, deployed: bool) -> None:
    """Raise Refused if the grid's pools or policy differ from the scenario.

    Pools of the grid that the scenario does not have are ignored.
    """
    remedy = _STACK_REMEDY if deployed else _REMEDY
    pools = {pool["name"]: pool for pool in grid["pools"]}
    for planned in (plan.pool for plan in scenario.pools):
        pool = pools.get(planned.name)
        if pool is None:
            raise Refused(f"The running grid lacks the pool {planned.name!r}, which the scenario needs.", remedy=remedy)
        ours = (planned.min_size, planned.max_size, planned.slots, planned.gpus)
        # A scenario without GPUs runs on a pool with GPUs as on other pools.
        theirs = (pool["min"], pool["max"], pool["slots"], pool.get("gpus", 0) if planned.gpus else 0)
        if ours != theirs:
            raise Refused(
                f"The pool {planned.name!r} of the running grid is {_describe_pool(*theirs)}, and the scenario needs "
                f"{_describe_pool(*ours)}.",
                remedy=remedy,
            )
        if pool["held_by_hand"]:
            raise Refused(
                f"The capacity of the pool {planned.name!r} of the running grid is set by hand.",
                remedy=f"`batchlab grid scale {planned.name} --auto` returns it to the policy.",
            )
    for name, value in scenario.policy.settings().items():
        actual = grid["settings"].get(name)
        if actual is None or not math.isclose(actual, value, rel_tol=_TOLERANCE):
            shown = "not known" if actual is None else f"{actual:g}"
            raise Refused(f"{name} of the running grid is {shown}, and the scenario needs {value:g}.", remedy=remedy)


def check_idle(active: Sequence[JobView]) -> None:
    """Raise Refused if the grid has other jobs, because a replay would measure these jobs too."""
    if active:
        others = f" and {len(active) - 1} others" if len(active) > 1 else ""
        raise Refused(
            f"The grid has a job that has not ended: {active[0]['id']}{others}.",
            remedy="Wait for it, cancel it with `batchlab job cancel`, or name another folder with --home.",
        )


def _describe_pool(least: int, most: int, slots: int, gpus: int) -> str:
    return f"{least}-{most}x{slots}" + (f",gpus={gpus}" if gpus else "")


def limit_s(scenario: Scenario, jobs: Sequence[Job]) -> float:
    """Return the default time limit of a replay, in seconds from the start of the run.

    After the last start of a job and the last fault, a replay has twice the time that its work takes on the whole
    fleet, plus EXTRA_S. The work of each share with a limit of slots also takes the time that it needs alone within the
    limit.
    """
    slots = {plan.pool.name: plan.pool.max_size * plan.pool.slots for plan in scenario.pools}
    shares = scenario.shares or SharePolicy()
    work: dict[str, float] = {}
    limited_s = 0.0
    for job in jobs:
        counts = expansion.stage_sizes(job.template, job.tasks)
        max_slots = shares.attributes(job.template.share or DEFAULT_SHARE).max_slots
        for stage in job.template.stages:
            busy_s = expansion.mean_task_s(job, stage) * counts[stage.name] * stage.slots
            work[stage.pool] = work.get(stage.pool, 0.0) + busy_s
            if max_slots is not None:
                limited_s += busy_s / max_slots
    whole_s = max((s / max(1, shares.usable_slots(slots.get(pool, 1), 1)) for pool, s in work.items()), default=0.0)
    last_s = max(
        [*expansion.earliest_starts_s(jobs).values(), *(fault.at_s + fault.for_s for fault in scenario.faults), 0.0]
    )
    return last_s + 2 * (whole_s + limited_s) + EXTRA_S


@asynccontextmanager
async def share_policy(link: ManagerConnection, policy: SharePolicy | None, state: RunState) -> AsyncIterator[None]:
    """Set the fair-share policy of the grid, and restore the policy of the grid at the end. Both policies begin without
    use, because the use before a run must not affect the run, and the use of the run must not affect later jobs.

    If the policy cannot be restored, the reason is in `state.cut`.
    """
    before = (await link.call(lambda client: client.shares()))["policy"]
    if before is None and policy is None:
        yield
        return
    try:
        await link.call(lambda client: _set_share_policy(client, policy.to_json() if policy else None))
        yield
    finally:
        try:
            await link.call(lambda client: _set_share_policy(client, before), within_s=RESTORE_TIMEOUT_S)
        except BatchlabError as error:
            trouble = f"The fair-share policy of the grid is not restored: {error.message}"
            state.cut = f"{state.cut} {trouble}".strip()


def _set_share_policy(client: Client, policy: Mapping[str, Any] | None) -> None:
    client.remove_share(None)
    if policy is not None:
        changes = {"decay_s": policy["decay_s"], "reservation": policy["reservation"]}
        if policy.get("only_listed"):  # managers of earlier releases refuse the field
            changes["only_listed"] = True
        client.set_share_policy(changes)
        for entry in policy["shares"]:
            client.set_share(entry)


async def _wait_until_idle(link: ManagerConnection) -> None:
    """Wait until canceled jobs of an earlier run have ended. Raise Refused if a job does not end in time."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + IDLE_TIMEOUT_S
    while active := await link.call(lambda client: client.jobs(active=True)):
        if loop.time() > deadline_s:
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
    """Run the compressed scenario on the grid in `home` and measure the run.

    The time `limit` (see `limit_s`) or the event `stop` ends the run early. The field `cut` of the record then has the
    reason. `injector` creates the injector of the scenario's faults. During the run, the grid has the fair-share policy
    of the scenario, or no policy if the scenario does not have one. Raise Refused if the grid differs from the
    scenario or has other work. Raise UsageError if the grid refuses a job, and BackendError if the manager is absent
    for too long before the run.
    """
    seed = scenario.seed if seed is None else seed
    schedule = expand(scenario, seed)
    longest_s = max((fault.for_s for fault in scenario.faults), default=0.0)
    async with AsyncExitStack() as stack:
        link = ManagerConnection(home, away_s=ABSENCE_LIMIT_S + longest_s)
        stack.callback(link.close)
        objects = backend.open_objects(home)
        fault_injector = injector() if injector and scenario.faults else None
        if fault_injector:
            stack.push_async_callback(fault_injector.close)
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
        state = RunState(scenario, seed, schedule.jobs)
        run = ReplayRun(state, link, preparer, backend.open_clock(), fault_injector)
        most_s = limit_s(scenario, schedule.jobs) if limit is None else limit
        async with share_policy(link, scenario.shares, state):
            await run.run(most_s, stop or asyncio.Event(), progress)
        return await build_record(state, run.sampler, link, backend, home, before, objects, patience)
