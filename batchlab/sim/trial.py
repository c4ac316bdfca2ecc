"""One random simulated world from one seed: jobs, pools, fault rates, and users with random requests.

Invariant: a trial is a function of its seed. A trial checks every promise, and raises an error for a broken promise.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from batchlab.core.fair_share import SharePolicy
from batchlab.core.model import JobState
from batchlab.core.pricing.usage import Accounting
from batchlab.manager.manager import Manager
from batchlab.sim import invariants
from batchlab.sim.actors import Violated, check
from batchlab.sim.audit_checks import OPERATOR, UserChange
from batchlab.sim.event_loop import SimLoop, TimeLimit
from batchlab.sim.faults import DAMAGES, Fault, FaultKind, Faults, Weather
from batchlab.sim.plans import (
    FOCUS_WEATHERS,
    LIMIT_S,
    Focus,
    Plan,
    draw,
    focus_of,
    with_bystanders,
    with_copies,
    with_dependencies,
    with_focus,
    with_gpus,
    with_mended_inputs,
    with_owners,
    with_share_focus,
    with_shares,
)
from batchlab.sim.random_faults import WorldFaults
from batchlab.sim.tasks import TaskPlans
from batchlab.sim.users import ScheduleUser, User
from batchlab.sim.world import World

_USERS = Weather(cancelled=0.08, paused=0.12, resumed=0.1, retried=0.1, resubmitted=0.03)

CRASHES = replace(_USERS, kill_before=0.004, kill_after=0.004)
"""Fault rates for crashes of workers and of the manager between any two port calls."""

STORM = replace(
    _USERS,
    kill_before=0.003,
    kill_after=0.003,
    throttled=0.02,
    unreachable=0.01,
    answer_lost=0.01,
    delayed=0.005,
    conflict=0.02,
    duplicated=0.05,
    lost=0.02,
    late=0.02,
    dropped=0.02,
)
"""Fault rates for crashes, and for services that refuse, lose, repeat, and delay calls."""

ALL = replace(
    STORM,
    redelivered=0.06,
    vanished=0.04,
    purged=0.01,
    expired=0.02,
    removed=0.01,
    shuffled=0.06,
    clock_jumped=0.04,
    stalled=0.05,
    crashed=0.03,
    spot_notice=0.03,
    spot_kill=0.02,
    no_capacity=0.02,
    scaled_in=0.03,
    scaled_by_hand=0.02,
    second_manager=0.03,
    manager_stopped=0.02,
    ledger_lost=0.008,
    ledger_rebuilt=0.015,
    varied=True,
)
"""Rates of all kinds of faults. Each seed chooses some kinds of faults, and their rates."""

TIMED = replace(ALL, timed=True)
"""Rates of all kinds of faults, for worlds with a schedule."""

LIES = replace(ALL, corrupted=0.3, lies=True)
"""Rates of all kinds of faults, for worlds with lying workers."""

STORAGE = replace(ALL, torn=0.1, missing=0.1, rotted=0.05, unsynced=0.04, storage=True)
"""Rates of all kinds of faults, for worlds where the store damages objects."""

GPUS = replace(ALL, gpus=True)
"""Rates of all kinds of faults, for worlds with GPUs."""

DEPENDENT = replace(ALL, dependent=True)
"""Rates of all kinds of faults, for worlds whose jobs depend on earlier jobs."""

ACCOUNTS = replace(ALL, accounts=True)
"""Rates of all kinds of faults, for worlds whose managers record the usage of each job."""

SHARES = Weather(
    kill_before=0.0003,
    kill_after=0.0003,
    throttled=0.001,
    answer_lost=0.001,
    duplicated=0.02,
    lost=0.005,
    late=0.005,
    stalled=0.02,
    crashed=0.02,
    second_manager=0.02,
    manager_stopped=0.03,
    paused=0.06,
    resumed=0.1,
    shares=True,
)
"""Fault rates for worlds with a fair-share policy. The faults are rare, because a fault of a manager pauses the check
of its cuts."""
SPECULATIVE = replace(ALL, speculative=True, frozen=0.02)
"""Rates of all kinds of faults, for worlds with speculative copies and slow workers."""
MENDED = replace(ALL, mended=True)
"""Rates of all kinds of faults, for worlds whose users retry failed tasks with mended inputs."""
AUDITED = replace(ALL, audited=True)
"""Rates of all kinds of faults, for worlds whose managers write an audit log."""
ORPHANS = replace(ALL, orphans=True)
"""Rates of all kinds of faults, for worlds in which no manager leads until scheduled actions have ended the fleet."""

BUDGET = dict.fromkeys(FaultKind, 12) | dict.fromkeys((FaultKind.CORRUPTED, *DAMAGES), 3)
BUDGET[FaultKind.FROZEN] = 2
"""Maximum number of faults of each kind, which lets a world come to rest."""

SQL_EVERY = 4
"""Worlds whose seed is divisible by SQL_EVERY use the product's SQL ledger.

Worlds whose seed is not divisible by SQL_EVERY use SimLedger. Both ledgers give the same answers, as a test checks, but
the SQL ledger takes a third of a world's run time.
"""
NOTIFY_EVERY = 7
"""In one of NOTIFY_EVERY worlds, the managers notify a target of each end of a job."""
ORPHAN_S = 180.0
ABANDON_S = (20.0, 400.0)
"""Range of seconds until the managers of a world with `orphans` are killed or suspended."""
MAX_ORPHAN_S = 4_000.0
"""Limit of the time in which the fleet ends after the end of the last manager, with the run time of its bundles."""
MAX_STEPS = 5_000_000
CHECK_S = 15.0
MAX_WAITS, MAX_WAITS_WITH_LIARS = 600, 4_000
"""Maximum number of checks whether the fleet has scaled in after the end of the work."""


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a trial. `digest` is the digest of the world's event log, or "" without a log."""

    seed: int
    digest: str
    virtual_s: float
    states: tuple[JobState, ...]
    injected: tuple[tuple[str, int], ...]
    tasks: int
    starts: int
    managers: int


def calm(seed: int, *, answers: bool = True) -> Faults:
    """Return a source of latencies that does not inject faults."""
    return Faults(_fault_rng(seed), answers=answers)


def faults_for(seed: int, weather: Weather = ALL) -> Faults:
    """Return the faults that `run` injects into the world of `seed`."""
    return Faults(_fault_rng(seed), weather_of(seed, weather), budget=BUDGET)


def _focus_of(seed: int, weather: Weather, plan: Plan) -> Focus | None:
    """Return the focus of the world of `seed`. Only worlds with all faults have a focus."""
    return focus_of(seed) if weather == ALL and plan.limit_s == LIMIT_S else None


def plan_of(seed: int, weather: Weather = ALL) -> Plan:
    """Return the plan of the world of `seed` with the fault rates `weather`."""
    plan = draw(seed)
    if weather.shares:
        return with_share_focus(seed, with_shares(seed, plan))
    focus = _focus_of(seed, weather, plan)
    if (weather.lies or weather.storage) and plan.limit_s == LIMIT_S:
        return with_bystanders(seed, plan)
    if weather.speculative and plan.limit_s == LIMIT_S:
        return with_copies(seed, plan)
    if weather.gpus and plan.limit_s == LIMIT_S:
        return with_gpus(seed, plan)
    if weather.dependent and plan.limit_s == LIMIT_S:
        return with_dependencies(seed, plan)
    if weather.mended and plan.limit_s == LIMIT_S:
        return with_mended_inputs(seed, plan)
    if weather.audited and plan.limit_s == LIMIT_S:
        return with_owners(seed, with_mended_inputs(seed, plan))
    return with_focus(seed, focus, plan) if focus else plan


def weather_of(seed: int, weather: Weather = ALL) -> Weather:
    """Return the fault rates of the world of `seed`, which are chosen from `weather`."""
    focus = _focus_of(seed, weather, draw(seed))
    if focus:
        return FOCUS_WEATHERS[focus]
    rng = random.Random(f"{seed}/weather")  # noqa: S311 - simulation
    return weather.of_seed(rng, heaviness=plan_of(seed, weather).heaviness)


def replay_faults(seed: int, faults: Iterable[Fault]) -> Faults:
    """Return a source of exactly the given faults, with the latencies of the world of `seed`."""
    return Faults.from_list(faults, _fault_rng(seed))


def _fault_rng(seed: int) -> random.Random:
    return random.Random(f"{seed}/faults")  # noqa: S311 - simulation


def run(
    seed: int,
    weather: Weather = ALL,
    *,
    faults: Faults | None = None,
    logged: bool = False,
    log: list[str] | None = None,
    sql: bool | None = None,
) -> Report:
    """Run the world of `seed`. A broken promise raises Violated or another SimulationError.

    `faults` replaces the faults that the seed draws from `weather`; see `faults_for` and `replayed`. The lines of the
    event log are appended to `log`, so that `log` has the lines even after a failure. `sql` selects the ledger of the
    world. If `sql` is None, SQL_EVERY selects the ledger.
    """
    faults, plan = faults or faults_for(seed, weather), plan_of(seed, weather)
    faults.slow_looks_s = plan.slow_looks_s
    # A world of many hours does not have a schedule, because its tasks are longer than any schedule's period.
    timed = weather.timed and plan.limit_s == LIMIT_S
    orphans = weather.orphans and plan.limit_s == LIMIT_S

    def make_world() -> World:
        world = World(
            seed,
            plan.pools,
            faults=faults,
            script=TaskPlans(seed, plan.run_s, mended=plan.mended),
            manager_settings=replace(plan.manager, orphan_s=ORPHAN_S) if orphans else plan.manager,
            worker_settings=plan.worker,
            skew_s=plan.skew_s,
            logged=logged or log is not None,
            sql=seed % SQL_EVERY == 0 if sql is None else sql,
            schedules=timed,
            accounting=Accounting() if weather.accounts else None,
            notifies=seed % NOTIFY_EVERY == 3,
            shares=weather.shares or bool(plan.policies),
            audited=weather.audited,
            slow_share=plan.slow_share,
            one_machine=plan.one_machine,
        )
        world.watch.shares.is_on = weather.shares
        if world.log is not None and log is not None:
            world.log.lines = log
        if weather.storage:
            world.damage.vulnerable |= {job.id for job in draw(seed).jobs}
            world.watch.flushed = world.damage.save_ledger
        return world

    try:
        main = _main(make_world, plan, faults, timed=timed, orphans=orphans)
        return SimLoop(inline_executor=True).run(main, limit_s=plan.limit_s, limit_steps=MAX_STEPS)
    except TimeLimit as error:
        raise Violated(f"I7 is violated: something never ends. {error}") from error


async def _main(make_world: Callable[[], World], plan: Plan, faults: Faults, *, timed: bool, orphans: bool) -> Report:
    world = make_world()
    world.watch.start_times.is_exact = not plan.skew_s
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    watcher = asyncio.create_task(_watch_ledger(world, plan), name="watcher")
    world_faults = WorldFaults(world, faults, plan.pace)
    is_choosy = plan.mended or plan.focus in (Focus.WORDS, Focus.RIVALS)
    users = [User(world, job, faults, plan.pace, is_choosy, mends=plan.mended).use() for job in plan.jobs]
    if timed:
        users.append(ScheduleUser(world, plan, faults).use())
    if plan.policies:
        users.append(_set_policies(world, plan))
    if orphans:
        service = asyncio.create_task(world.serve_groups(), name="auto scaling")
        users.append(_abandon(world))
    await asyncio.gather(world_faults.inject(), *users)
    if orphans:
        service.cancel()
    watcher.cancel()
    await _wait_for_rest(world, max(plan.run_s))
    await invariants.check_trial(world, plan)
    supervisor.cancel()
    records = [record for job in plan.jobs if (record := await world.find(job.id))]
    await world.ledger.close()
    return Report(
        world.seed,
        world.log.digest() if world.log else "",
        world.clock.monotonic_s(),
        tuple(r.state for r in records),
        tuple(sorted((kind.value, n) for kind, n in faults.counts.items())),
        sum(job.items or 0 for job in plan.jobs),
        len(world.starts),
        world.managers,
    )


async def _set_policies(world: World, plan: Plan) -> None:
    """Set the fair-share policies of the plan at their times."""
    for at_s, policy in plan.policies:
        await asyncio.sleep(at_s - world.clock.monotonic_s())
        change = UserChange(OPERATOR, "share policy", "the policy")
        await world.change(change, partial(_set_policy, policy), "set the policy")


def _set_policy(policy: SharePolicy, manager: Manager) -> Awaitable[None]:
    return manager.fair_share.change(lambda _: policy)


async def _abandon(world: World) -> None:
    """Kill or suspend all managers, check that the fleet ends, and let a manager lead again."""
    rng = world.rng("abandon")
    await asyncio.sleep(rng.uniform(*ABANDON_S))
    while True:
        if world.has_scheduled_ends():
            break  # A manager has led.
        await asyncio.sleep(1.0)
    is_suspended = rng.random() < 0.5
    world.may_start.clear()
    world.note("trial", "the managers are suspended" if is_suspended else "the managers are killed")
    begun_s = world.clock.monotonic_s()
    while world.running_instances() or world.has_scheduled_ends():
        # A manager may have been starting, and a stall may end.
        for process in list(world.manager_processes):
            if is_suspended:
                process.actor.freeze()
            else:
                process.actor.kill()
        await asyncio.sleep(1.0)
        lasted_s = world.clock.monotonic_s() - begun_s
        facts = f"{world.running_instances()} run {lasted_s:.0f} s after the end of the last manager"
        check(lasted_s < MAX_ORPHAN_S, "orphans", facts)
    world.may_start.set()
    for process in list(world.manager_processes):
        process.actor.thaw()


async def _watch_ledger(world: World, plan: Plan) -> None:
    has_gpus = any(stage.gpus for job in plan.jobs for stage in job.stages)
    while True:
        await asyncio.sleep(CHECK_S * plan.pace)
        if plan.limit_s == LIMIT_S:
            processes = world.manager_processes
            world.watch.check_silences([process.actor for process in processes if process.manager.is_leader.is_set()])
        for process in world.manager_processes:
            manager, now_s = process.manager, world.clock.monotonic_s()
            world.watch.trust.check_registry(manager.registry)
            if has_gpus and manager.is_leader.is_set() and not world.watch.frozen(process.actor):
                world.watch.gpus.check_capacity(process.actor, manager.context, manager.autoscaler, now_s)
        for job in plan.jobs:
            record = None if world.rebuilding else await world.find(job.id)
            if record is not None:
                world.watch.check_counts(job.id, record.round, (await world.rows(job.id)).stages)


async def _wait_for_rest(world: World, longest_s: float) -> None:
    """Wait until the fleet has scaled in and all queues exist.

    If the fleet is not at rest after `longest_s`, the later checks report the reason. An old copy of a committed bundle
    may still run, and another copy may wait for a slot. A lying worker keeps its instance until the manager stops
    seeing evidence of work on the instance.
    """
    for _ in range(MAX_WAITS_WITH_LIARS if world.watch.trust.lies else MAX_WAITS):
        manager = world.manager
        if manager and manager.is_leader.is_set() and not manager.lives:
            groups = await world.groups()
            down = all(v.desired == v.pool.min_size == len(invariants.counted_instances(v)) for v in groups)
            if down and not invariants.missing_queues(world):
                return
        await asyncio.sleep(max(1.0, longest_s / 100))
