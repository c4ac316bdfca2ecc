"""One random world from one seed: jobs, pools, faults and a user who cancels, pauses and retries.

Invariant: a trial is a function of its seed. It ends with every promise checked, or raises.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.errors import Refused
from batchlab.jobdef import JobDef, RetryRule, StageDef
from batchlab.manager.plans import PartWriter
from batchlab.model import Failure, FailureKind, JobId, JobState, Json, Pool, StageName, TaskSet
from batchlab.patience import Patience
from batchlab.sim import invariants
from batchlab.sim.faults import FaultKind, FaultRates, Faults
from batchlab.sim.loop import SimLoop
from batchlab.sim.runner import Play, Scene
from batchlab.sim.world import EPOCH_S, World

CRASHES = FaultRates(kill_before=0.004, kill_after=0.004)
"""Crashes of workers and of the manager between any two port calls."""

STORM = FaultRates(
    kill_before=0.003,
    kill_after=0.003,
    throttled=0.02,
    unreachable=0.01,
    answer_lost=0.01,
    delayed=0.005,
    duplicated=0.05,
    lost=0.02,
    dropped=0.02,
)
"""Crashes, and services that refuse, lose, repeat and delay."""

BUDGET = dict.fromkeys(FaultKind, 12)
"""After these many the weather is fair, so that a world comes to rest."""


def calm(seed: int) -> Faults:
    """Latencies but no faults."""
    return Faults(random.Random(f"{seed}/faults"))  # noqa: S311 - simulation


LIMIT_S = 30_000.0
STEPS = 20_000_000


@dataclass(frozen=True, slots=True)
class Report:
    """What a trial saw. `digest` is of its event log, empty where none was kept."""

    seed: int
    digest: str
    virtual_s: float
    states: tuple[JobState, ...]
    injected: tuple[tuple[str, int], ...]
    tasks: int
    starts: int
    managers: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the seed asks for."""

    pools: tuple[Pool, ...]
    jobs: tuple[JobDef, ...]
    moods: tuple[tuple[str, float], ...]
    """Per job: what its user does ("watch", "cancel", "pause") and when, seconds."""


def run(
    seed: int,
    rates: FaultRates = CRASHES,
    *,
    faults: Faults | None = None,
    logged: bool = False,
) -> Report:
    """Run the world of `seed`; Violated or another SimulationError where a promise is broken."""
    rng = random.Random(f"{seed}/faults")  # noqa: S311 - simulation
    chosen = faults or Faults(rng, rates, budget=BUDGET)
    loop = SimLoop(inline_executor=True)
    return loop.run(_main(seed, chosen, logged=logged), limit_s=LIMIT_S, limit_steps=STEPS)


async def _main(seed: int, faults: Faults, *, logged: bool) -> Report:
    plan = draw(seed)
    world = World(seed, plan.pools, faults=faults, script=Behaviour(seed), logged=logged)
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    watcher = asyncio.create_task(_watch_bounds(world), name="bounds")
    users = [
        asyncio.create_task(_use(world, job, *mood), name=f"user {job.id}")
        for job, mood in zip(plan.jobs, plan.moods, strict=True)
    ]
    for user in users:
        await user
    watcher.cancel()
    await _rest(world)
    jobs = [job.id for job in plan.jobs]
    invariants.check_at_rest(await world.groups())
    await invariants.check_all(world, jobs)
    for job in plan.jobs:
        await _check_results(world, job)
    supervisor.cancel()
    records = [await world.ledger.job(job) for job in jobs]
    await world.ledger.close()
    return Report(
        seed,
        world.log.digest() if world.log else "",
        world.clock.monotonic_s(),
        tuple(r.state for r in records),
        tuple(sorted((kind.value, n) for kind, n in faults.counts.items())),
        sum(job.items or 0 for job in plan.jobs),
        len(world.starts),
        world.managers,
    )


async def _rest(world: World) -> None:
    """Wait until the fleet has come down; check_at_rest says what is wrong where it does not."""
    for _ in range(600):
        manager = world.manager
        if manager and manager.is_leader.is_set() and not manager.lives:
            groups = await world.groups()
            if all(v.desired == v.pool.min_size == _alive(v.instances) for v in groups):
                return
        await asyncio.sleep(1.0)


def _alive(instances: Sequence[object]) -> int:
    return sum(getattr(i, "state", "") in ("Pending", "InService") for i in instances)


async def _watch_bounds(world: World) -> None:
    while True:
        await asyncio.sleep(1.0)
        manager, actor = world.manager, world.manager_actor
        if manager and actor and actor.alive and manager.is_leader.is_set():
            invariants.check_bounds(await world.groups())


# --- The user ------------------------------------------------------------------------------------


async def _use(world: World, job: JobDef, mood: str, after_s: float) -> None:
    await bring_items(world, job)
    await world.submit(job)
    if mood != "watch":
        await asyncio.sleep(after_s)
    if mood == "pause":
        await world.ask(lambda m: m.requests.pause(job.id), f"pause {job.id}")
        await asyncio.sleep(after_s * 2)
        await world.ask(lambda m: m.requests.resume(job.id), f"resume {job.id}")
    if mood == "cancel":
        answer = await world.ask(lambda m: m.requests.cancel(job.id), f"cancel {job.id}")
        acknowledged_s = world.clock.monotonic_s()
        await world.ended(job.id)
        if not isinstance(answer, Refused):
            invariants.check_no_start_after(world, job.id, acknowledged_s)
    record = await world.ended(job.id)
    if record.state is not JobState.SUCCEEDED and mood != "watch":
        await world.ask(lambda m: m.requests.retry(job.id), f"retry {job.id}")
        await world.ended(job.id)


async def bring_items(world: World, job: JobDef) -> None:
    """Write the plan's parts, as a client does before it submits a job that brings its items."""
    patience = Patience(world.rng(f"client/{job.id}"))
    for stage in job.roots():
        writer = PartWriter(world.objects, patience, job.id, stage.name, 0)
        for item in range(job.items or 0):
            await writer.add(item)
        await writer.commit(TaskSet())


# --- What the seed asks for ----------------------------------------------------------------------

A, B, C, D = (StageName(name) for name in "abcd")


def draw(seed: int) -> Plan:
    """Pools, jobs and moods of a seed."""
    rng = random.Random(f"{seed}/plan")  # noqa: S311 - simulation
    pools = [
        Pool("default", 0, rng.randint(1, 4), rng.choice([1, 2, 4]), boot_s=rng.choice([0, 20]))
    ]
    if rng.random() < 0.3:
        pools.append(Pool("second", 0, 2, rng.choice([1, 2]), boot_s=5))
    jobs = tuple(_job(seed, number, rng, pools) for number in range(rng.choice([1, 1, 2, 3])))
    moods = tuple(
        (rng.choice(["watch", "watch", "cancel", "pause"]), rng.uniform(0, 40)) for _ in jobs
    )
    return Plan(tuple(pools), jobs, moods)


def _job(seed: int, number: int, rng: random.Random, pools: Sequence[Pool]) -> JobDef:
    def stage(name: StageName, *after: StageName, gather: str | None = None) -> StageDef:
        pool = rng.choice(pools)
        return StageDef(
            name,
            after,
            gather,
            handler="sim:task",
            retry=RetryRule(attempts=rng.choice([1, 3]), backoff_s=rng.choice([0.5, 30.0])),
            slots=rng.choice([1, 1, pool.slots]),
            bundle=rng.choice([None, None, 1, 7]),
            pool=pool.name,
        )

    shapes = [
        (stage(A),),
        (stage(A), stage(B, A)),
        (stage(A), stage(B, A), stage(C, B, gather="*")),
        (stage(A), stage(B, A), stage(C, B, gather="key")),
        (stage(A), stage(B, A), stage(C, A), stage(D, B, C)),
        (stage(A), stage(B, A, gather="key"), stage(C, B), stage(D, C, gather="*")),
    ]
    return JobDef(
        JobId(f"job-{number}"),
        f"job-{number}",
        rng.choice(shapes),
        EPOCH_S + number,
        items=rng.choice([0, 1, 2, 5, 30, 120]),
        max_failures=rng.choice([0, 0, 1000]),
        fail_fast=rng.random() < 0.3,
        priority=rng.choice([0, 0, 5]),
        token=f"{seed}-{number}",
    )


def value_of(stage: str, item: Json) -> Json:
    """What a task returns, a function of its input: so results can be checked whatever happened."""
    if stage == A:
        return {"key": f"k{item % 3}", "n": item}
    if isinstance(item, list):
        return {"key": "sum", "n": sum(one["n"] for one in item)}
    if set(item) == {"key", "n"}:
        return {"key": item["key"], "n": item["n"] * 2 + len(stage)}
    return {"key": "joined", "n": sum(one["n"] for one in item.values())}


class Behaviour:
    """The script: each task's fate is drawn from the seed and its name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, scene: Scene) -> Play:
        name = f"{self._seed}/{scene.job.id}/{scene.stage.name}/{scene.task}"
        rng = random.Random(name)  # noqa: S311 - simulation
        run_s = rng.choice([0.01, 0.1, 1.0, 1.0, 20.0])
        fate = rng.random()
        stubborn = rng.randint(1, 4)
        if fate < 0.02:
            return Play(run_s, kills_worker=True)
        if fate < 0.12 and scene.bundle.attempt <= stubborn and not scene.bundle.round:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return Play(run_s, failure=failure)
        return Play(run_s, value_of(scene.stage.name, scene.item))


async def _check_results(world: World, job: JobDef) -> None:
    """The final result equals a computation that knows nothing of grids (where all succeeded)."""
    stages = await world.ledger.stages(job.id)
    if any(s.counts.failed or s.counts.cancelled for s in stages):
        return
    expected: dict[str, list[Json]] = {}
    for stage in job.stages:
        inputs = _inputs(stage, job.items or 0, expected)
        expected[stage.name] = [value_of(stage.name, item) for item in inputs]
        got = await invariants.results_of(world.objects, world.ledger, job.id, stage.name)
        found = [got[task] for task in sorted(got)]
        if found != expected[stage.name]:
            raise invariants.Violated(
                f"I1 is violated: {job.id}/{stage.name} gave {found[:5]}, "
                f"expected {expected[stage.name][:5]}"
            )


def _inputs(stage: StageDef, count: int, done: dict[str, list[Json]]) -> list[Json]:
    if not stage.after:
        return list(range(count))
    if stage.gather == "*":
        return [done[stage.after[0]]]
    if stage.gather:
        groups: dict[str, list[Json]] = {}
        for value in done[stage.after[0]]:
            groups.setdefault(value[stage.gather], []).append(value)
        return [groups[key] for key in sorted(groups)]
    if len(stage.after) == 1:
        return done[stage.after[0]]
    return [{u: done[u][i] for u in stage.after} for i in range(count)]
