"""Replay of a scenario in real time on a running grid.

A replay always ends with a record of its measurements. Its unfinished jobs are canceled.

Record of a replay, and the run's cost.

Values that could not be read are left empty. The cost uses the grid's own account and the prices
and calculation of `batchlab cost bill`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, JobView
from batchlab.core.api_usage_types import AccountView, account_of
from batchlab.core.errors import BackendError, Refused, UsageError
from batchlab.core.model import Market
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.pricing import price_book
from batchlab.core.pricing.bill import Bill, PoolFacts, StageUse, bill
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.usage import Account, Kind
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, Policy, PoolPlan, Scenario
from batchlab.scenarios.record import JobRun, Record, StageRun
from batchlab.scenarios.replay.jobs import JobPreparer
from batchlab.scenarios.replay.measurements import Measurements, measure, root_tasks
from batchlab.scenarios.replay.run import Injector, ReplayRun
from batchlab.scenarios.replay.run_state import GridSampler, ManagerConnection, ReplayProgress, RunState, SubmittedJob

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunCost:
    """Cost at list prices, with its parts by purpose."""

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
    """Compute the cost between two accounts.

    Except on AWS, instances count with the types and Spot shares of the scenario's pools.
    """
    plans = {plan.pool.name: plan for plan in pools}
    used = _difference(before, after)
    if not backend.capabilities.billed:
        used = replace(used, billed_s=_as_planned(used.billed_s, plans))
    found = bill(
        [StageUse(s.stage, s.pool, s.run_s, s.slots) for s in stages],
        used,
        {name: PoolFacts(pool_plan.pool.slots, pool_plan.pool.instance_type) for name, pool_plan in plans.items()},
        book,
        pace=backend.pace,
    )
    return RunCost(found.usd.typical, _by_what(found))


def wasted_s(before: Account, after: Account) -> float:
    """Return the wasted slot seconds between two accounts: failed attempts, and executions lost
    with their instance.
    """
    return _wasted_s(after) - _wasted_s(before)


def _wasted_s(account: Account) -> float:
    return sum(account.failed_s.values()) + sum(account.lost_s.values())


def _difference(before: Account, after: Account) -> Account:
    return Account(
        _subtract(before.billed_s, after.billed_s),
        _subtract(before.failed_s, after.failed_s),
        _subtract(before.lost_s, after.lost_s),
        after.requests - before.requests,
        after.bundles - before.bundles,
    )


def _subtract(before: Mapping[T, float], after: Mapping[T, float]) -> dict[T, float]:
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def _as_planned(billed_s: Mapping[Kind, float], plans: Mapping[str, PoolPlan]) -> dict[Kind, float]:
    """Return the instance seconds by the planned types and Spot shares.

    Spot Instances stay as they are.
    """
    found: dict[Kind, float] = {}

    def add(kind: Kind, seconds: float) -> None:
        if seconds:
            found[kind] = found.get(kind, 0.0) + seconds

    for kind, seconds in billed_s.items():
        plan = plans.get(kind.pool)
        if plan is None or kind.market is Market.SPOT:
            add(kind, seconds)
            continue
        typed = replace(kind, type=plan.pool.instance_type or kind.type)
        add(replace(typed, market=Market.SPOT), seconds * plan.spot)
        add(typed, seconds * (1 - plan.spot))
    return found


def _by_what(found: Bill) -> dict[str, float]:
    items: dict[str, float] = {}
    for item in found.items:
        items[item.what] = items.get(item.what, 0.0) + item.usd.typical
    return items


AT_ONCE = 4
"""Maximum number of parallel requests for accounts of jobs."""
LAST_S = 10.0
"""Timeout of the last requests to the manager."""


async def build_record(
    course: RunState,
    sampler: GridSampler,
    link: ManagerConnection,
    backend: Backend,
    home: Home,
    before: Account,
    objects: Objects,
    patience: Patience,
) -> Record:
    """Build the record of a run that has ended. `before` is the grid's account at its start."""
    after = await _account(link, list(course.running))
    cut = course.cut
    try:
        measured = await measure(course.told(), course.seed, objects, patience)
    except BackendError as error:
        measured = Measurements()
        cut = cut or f"What its tasks came to cannot be read: {error.message}"
    scenario = course.scenario
    kinds = {plan.pool.name: plan.pool.instance_type for plan in scenario.pools}
    # Instances without a type count with the pool's type, as in their cost.
    instances = tuple(
        replace(instance, type=instance.type or kinds.get(instance.pool, "")) for instance in sampler.instances()
    )
    stages = measured.runs()
    compute_cost = _run_cost(course, backend, home, before, after, stages)
    return Record(
        scenario=scenario.name,
        digest=scenario.digest,
        seed=course.seed,
        backend=backend.name,
        compressed=scenario.compressed,
        pools={plan.pool.name: (plan.pool.min_size, plan.pool.max_size, plan.pool.slots) for plan in scenario.pools},
        jobs=tuple(
            sorted((job_run(one, course.begun_s) for one in course.running.values()), key=lambda one: one.index)
        ),
        stages=stages,
        samples=tuple(sampler.samples),
        instances=instances,
        faults=tuple(sorted(course.injected, key=lambda one: one.at_s)),
        lost=measured.lost,
        duplicates=measured.duplicates,
        instance_s=sum(instance.lived_s(course.took_s) for instance in instances),
        again_s=wasted_s(before, after) if after else None,
        usd=compute_cost.usd if compute_cost else None,
        usd_items=compute_cost.items if compute_cost else {},
        settings={
            **{f"worker.{name}": value for name, value in asdict(backend.worker).items()},
            **(sampler.grid["settings"] if sampler.grid else {}),
            "cores": backend.usual.cores,
        },
        wall_s=course.took_s,
        cut=cut,
    )


async def _account(link: ManagerConnection, jobs: Sequence[str]) -> Account | None:
    """Return the grid's account, with the wasted attempts of these jobs, which only the jobs' own
    accounts have. Return None if the manager does not answer.
    """
    room = asyncio.Semaphore(AT_ONCE)

    async def of_job(job: str) -> AccountView | None:
        async with room:
            used = await link.call(lambda client: client.job_use(job), within_s=LAST_S)
        return used["account"]

    try:
        whole = account_of((await link.call(Client.use, within_s=LAST_S))["total"])
        for one in await asyncio.gather(*map(of_job, jobs)):
            for pool, seconds in (one["failed_s"] if one else {}).items():
                whole.fail(pool, seconds)
            for pool, seconds in (one["lost_s"] if one else {}).items():
                whole.lose(pool, seconds)
            whole.bundles += one["bundles"] if one else 0
    except BackendError:
        return None
    return whole


def _run_cost(
    course: RunState, backend: Backend, home: Home, before: Account, after: Account | None, stages: tuple[StageRun, ...]
) -> RunCost | None:
    if after is None:
        return None
    try:
        book = price_book.load(home.path)
    except UsageError:
        return None  # without a readable price book, there is no cost
    return compute_cost(before, after, stages, course.scenario.pools, backend, book)


def job_run(one: SubmittedJob, begun_s: float) -> JobRun:
    """Return the job for the record."""
    view, due = one.view, one.due
    stages = {stage.name: stage.after for stage in due.template.stages}
    deadline_s = due.template.deadline_s
    ends = [stage["last_end_s"] for stage in view["stages"] if stage["last_end_s"] is not None]
    return JobRun(
        index=due.index,
        id=view["id"],
        template=due.template.name,
        tenant=due.tenant,
        due_s=due.due_s,
        submitted_s=one.at_s,
        started_s=_run_time(view["started_s"], begun_s),
        ended_s=_run_time(view["ended_s"], begun_s),
        state=view["state"],
        planned=sum(stage["planned"] or 0 for stage in view["stages"]),
        succeeded=_sum(view, "succeeded"),
        failed=_sum(view, "failed"),
        cancelled=_sum(view, "cancelled"),
        retried=_sum(view, "retried"),
        deadline_s=None if deadline_s is None else due.due_s + deadline_s,
        label=due.label,
        tasks=root_tasks(view, stages),
        done_s=_run_time(max(ends, default=None), begun_s),
    )


def _sum(view: JobView, counter: Literal["succeeded", "failed", "cancelled", "retried"]) -> int:
    return sum(stage[counter] for stage in view["stages"])


def _run_time(at_s: float | None, begun_s: float) -> float | None:
    return None if at_s is None else at_s - begun_s


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
    named = {"drain_target_s": policy.drain_target_s, "cooldown_in_s": policy.cooldown_in_s, "idle_s": policy.idle_s}
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
                f"The grid that is up has no pool {wanted.name!r}, which the scenario asks for.", remedy=remedy
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
                f"{name} of the grid that is up is {shown}, and the scenario asks for {value:g}.", remedy=remedy
            )


def check_idle(active: Sequence[JobView]) -> None:
    """Raise Refused if the grid has other jobs, because they would be measured too."""
    if active:
        others = f" and {len(active) - 1} others" if len(active) > 1 else ""
        raise Refused(
            f"The grid has a job that has not ended: {active[0]['id']}{others}.",
            remedy="Wait for it, cancel it with `batchlab job cancel`, or name another folder with --home.",
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
    last_s = max([*(job.due_s for job in jobs[-1:]), *(fault.at_s + fault.for_s for fault in scenario.faults), 0.0])
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
        return await build_record(course, run.sampler, link, backend, home, before, objects, patience)
