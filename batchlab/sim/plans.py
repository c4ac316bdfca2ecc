"""Plan of the simulated world of one seed: pools, jobs, settings, and the focus (a rare situation made frequent).

Invariant: a plan is a function of its seed alone, whatever the fault rates. The focus of a world has its own random
source, so a new kind of focus does not change the worlds of other seeds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import Condition, Dependency, JobDef, StageDef
from batchlab.core.model import JobId, Pool, StageName
from batchlab.core.retry_rule import RetryRule
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.sim.faults import SLOW_LOOKS_S, Weather
from batchlab.sim.world import EPOCH_S, MANAGER, WORKER

A, B, C, D = (StageName(name) for name in "abcd")

LONG_SHARE = 0.015
"""Share of seeds with tasks that are longer than the maximum visibility timeout of SQS."""

MAX_WORK_S = 600.0
"""Approximate maximum of the seconds that a world's tasks take on the maximum number of instances.

Most faults happen early, so a longer world would only repeat the same situations.
"""

PERCENT_SHARE, CHAIN_SHARE = 0.15, 0.1
"""Shares of the jobs with a failure limit in percent, and of the jobs with three chained stages."""

LIMIT_S = 12_000.0
LONG_LIMIT_S = 20 * 86_400.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of the world of one seed.

    `run_s` has the possible durations of a task in seconds. `heaviness` scales the rates of faults of port calls.
    `pace` stretches the pauses between world events and between user requests, so that faults also hit the last hours
    of a long world. All jobs must end within `limit_s` (promise I7).
    """

    pools: tuple[Pool, ...]
    jobs: tuple[JobDef, ...]
    run_s: tuple[float, ...]
    manager: ManagerSettings
    worker: WorkerSettings
    skew_s: float = 0.0
    heaviness: float = 1.0
    pace: float = 1.0
    limit_s: float = LIMIT_S
    focus: str = ""
    """The focus of the world (a rare situation made frequent, see `Focus`), or "" for an ordinary world."""
    slow_looks_s: tuple[float, float] | None = None
    """Range of seconds that a slow answer to a worker's read of a control object takes."""
    policies: tuple[tuple[float, SharePolicy], ...] = ()
    """Fair-share policies that a user sets, each with its time in seconds since the start of the world."""
    slow_share: float = 0.0
    """Share of the instances whose workers are slow."""
    mended: bool = False
    """Whether users retry failed tasks with mended inputs."""
    one_machine: bool = False
    """Whether all instances use the GPUs of one machine."""


def draw(seed: int) -> Plan:
    """Return the plan of a seed."""
    rng = random.Random(f"{seed}/plan")  # noqa: S311 - simulation
    if rng.random() < LONG_SHARE:
        return _long(seed, rng)
    pools = [_pool("default", rng.randint(1, 4), rng)]
    if rng.random() < 0.3:
        pools.append(_pool("second", 2, rng))
    jobs = tuple(_job(seed, number, rng, pools) for number in range(rng.choice([1, 1, 2, 3])))
    manager, worker = _settings(rng)
    run_s = rng.choice([(0.01, 0.1, 1.0, 1.0, 20.0), (0.1, 1.0, 5.0), (0.5, 15.0, 60.0)])
    while _work_s(pools, jobs, run_s) > MAX_WORK_S:
        jobs = tuple(replace(job, items=(job.items or 0) // 2) for job in jobs)
    return Plan(
        tuple(pools),
        jobs,
        run_s,
        manager,
        worker,
        skew_s=rng.choice([0.0, 0.0, 0.5, 20.0]),
        heaviness=rng.choice([0.1, 0.3, 1.0, 1.0]),
        pace=rng.choice([0.5, 1.0, 1.0, 3.0]),
    )


def with_bystanders(seed: int, plan: Plan) -> Plan:
    """Return the plan with two more small jobs. Lying workers (see `sim.lying_worker`) never receive messages of
    these two jobs.
    """
    rng = random.Random(f"{seed}/bystanders")  # noqa: S311 - simulation
    first = len(plan.jobs)
    more = [_job(seed, first + number, rng, plan.pools) for number in range(2)]
    small = (replace(job, items=min(job.items or 0, 5), start_at_s=None) for job in more)
    return replace(plan, jobs=(*plan.jobs, *small))


SHARES = ("A1", "A2", "B", "")
"""Share identifiers of the jobs of a world with shares."""


def with_shares(seed: int, plan: Plan) -> Plan:
    """Return the plan of a world with several shares in one pool, based on the seed's `plan`."""
    rng = random.Random(f"{seed}/shares")  # noqa: S311 - simulation
    pool = Pool("default", rng.choice([0, 1]), rng.choice([1, 2, 3]), rng.choice([2, 4]), boot_s=5)
    slots = pool.max_size * pool.slots
    run_s = rng.choice([(0.3, 1.0, 2.0), (1.0, 3.0), (2.0, 8.0)])
    number = rng.choice([2, 3, 4, 5])
    tasks = int(rng.choice([150.0, 300.0]) * slots * len(run_s) / sum(run_s) / number)
    shares = rng.sample(SHARES, 2) if rng.random() < 0.5 else list(SHARES)
    jobs = []
    for n in range(number):
        first = replace(_stage(A, rng, (pool,)), bundle=rng.choice([None, None, 1, 3]))
        stages = (first, _stage(B, rng, (pool,), A)) if rng.random() < 0.2 else (first,)
        job = JobDef(
            JobId(f"job-{n}"),
            f"job-{n}",
            stages,
            EPOCH_S + n,
            items=max(1, tasks // len(stages)),
            max_failures=10_000,
            priority=rng.choice([0, 0, 5]),
            token=f"{seed}-{n}",
            start_at_s=EPOCH_S + rng.choice([60, 120]) if n and rng.random() < 0.4 else None,
            share=shares[n % len(shares)],
        )
        jobs.append(job)
    first_policy = _policy(rng, slots)
    later = ((rng.uniform(60.0, 120.0), _policy(rng, slots)),) if rng.random() < 0.2 else ()
    manager = replace(plan.manager, tick_s=1.0, silence_s=120.0, visibility_s=30.0)
    return Plan(
        (pool,),
        tuple(jobs),
        run_s,
        manager,
        replace(plan.worker, visibility_s=30.0),
        # A share with a small limit runs one bundle at a time, and tasks that kill their workers delay its next bundle.
        limit_s=3 * LIMIT_S,
        policies=((0.0, first_policy), *later),
    )


def with_share_focus(seed: int, plan: Plan) -> Plan:
    """Return the plan of a world with shares, which in some seeds has larger tasks or long backoffs at the limit of a
    share. The tasks of a focus take long, so that a world with much waiting has few tasks."""
    rng = random.Random(f"{seed}/shares/focus")  # noqa: S311 - simulation
    focus, first = rng.choice(["", "", "", "large", "backoff"]), plan.jobs[0]
    if not focus:
        return plan
    slots, ((at_s, _), *_) = plan.pools[0].slots, plan.policies
    limit = slots if focus == "large" else slots // 2
    policy = SharePolicy((ShareAttributes(first.share or "default", 1.0, limit),))
    stage = replace(first.stages[0], slots=1, bundle=1)
    one = replace(first, stages=(stage,), priority=0, items=40 * limit)
    jobs: tuple[JobDef, ...]
    if focus == "large":
        larger = replace(stage, slots=slots)
        jobs = one, replace(one, stages=(larger,), id=JobId("job-1"), name="job-1", items=4, token=f"{seed}-1")
    else:
        jobs = (replace(one, stages=(replace(stage, retry=RetryRule(attempts=3, backoff_s=90.0)),)),)
    return replace(plan, jobs=jobs, policies=((at_s, policy),), run_s=(2.0, 8.0))


def _policy(rng: random.Random, slots: int) -> SharePolicy:
    weights = rng.sample([0.125, 0.25, 0.5, 1.0, 2.0, 4.0], 2)
    limits = [rng.choice([None, None, max(1, slots // 2)]) for _ in range(2)]
    entries = tuple(map(ShareAttributes, ("A*", "B"), weights, limits))
    return SharePolicy(entries, decay_s=rng.choice([20.0, 60.0, 600.0]), reservation=rng.choice([0, 0, 0, 30, 60]))


def with_gpus(seed: int, plan: Plan) -> Plan:
    """Return the plan in which the first pool has GPUs, and some stages of the pool need GPUs. In a fifth of the
    plans, all instances use the GPUs of one machine."""
    rng = random.Random(f"{seed}/gpus")  # noqa: S311 - simulation
    first, *others = plan.pools
    first = replace(first, slots=rng.choice([2, 4]), gpus=rng.choice([1, 1, 2]))
    jobs = []
    for job in plan.jobs:
        stages = [
            replace(stage, slots=1, gpus=rng.choice([0, 1, 1, first.gpus])) if stage.pool == first.name else stage
            for stage in job.stages
        ]
        jobs.append(replace(job, stages=tuple(stages), items=min(job.items or 0, 60)))
    plan = replace(plan, pools=(first, *others), jobs=tuple(jobs), limit_s=3 * LIMIT_S)
    is_shared = random.Random(f"{seed}/host").random() < 0.2  # noqa: S311 - simulation
    return _on_one_machine(plan) if is_shared else plan


def _on_one_machine(plan: Plan) -> Plan:
    """Return the plan in which all instances use the GPUs of one machine. Tasks take long and follow each other, so
    that bundles wait while an instance ends."""
    first, *others = plan.pools
    first = replace(first, min_size=min(first.min_size, 1), max_size=1)
    jobs = []
    for job in plan.jobs:
        stages = tuple(
            replace(stage, gpus=1 if stage.after else 0, bundle=1) if stage.pool == first.name else stage
            for stage in job.stages
        )
        jobs.append(replace(job, stages=stages, items=20))
    run_s = (1.0, 10.0, 15.0)
    return replace(plan, pools=(first, *others), jobs=tuple(jobs), run_s=run_s, one_machine=True)


def with_dependencies(seed: int, plan: Plan) -> Plan:
    """Return the plan with one more small job, in which each job but the first depends on one or two earlier jobs."""
    rng = random.Random(f"{seed}/dependencies")  # noqa: S311 - simulation
    more = _job(seed, len(plan.jobs), rng, plan.pools)
    first, *others = *plan.jobs, replace(more, items=min(more.items or 0, 5))
    jobs = [first]
    for job in others:
        chosen = rng.sample(jobs, min(len(jobs), rng.choice([1, 1, 2])))
        jobs.append(replace(job, after=tuple(Dependency(one.id, rng.choice(list(Condition))) for one in chosen)))
    return replace(plan, jobs=tuple(jobs))


def _work_s(pools: Sequence[Pool], jobs: Sequence[JobDef], run_s: Sequence[float]) -> float:
    """Return the seconds of work of the busiest pool, with the maximum number of instances."""
    slots = {pool.name: pool.max_size * pool.slots for pool in pools}
    return max(
        sum(
            (job.items or 0) * min(stage.slots, pool.slots) * sum(run_s) / len(run_s)
            for job in jobs
            for stage in job.stages
            if stage.pool == pool.name
        )
        / slots[pool.name]
        for pool in pools
    )


def _pool(name: str, max_size: int, rng: random.Random) -> Pool:
    min_size = rng.choice([0, 0, 0, 1])
    return Pool(name, min_size, max_size, rng.choice([1, 2, 4]), boot_s=rng.choice([0, 5, 20]))


def _settings(rng: random.Random) -> tuple[ManagerSettings, WorkerSettings]:
    visibility_s = rng.choice([6.0, 15.0, 30.0, 30.0, 60.0])
    wait_s = rng.choice([1.0, 20.0, 20.0])
    manager = replace(
        MANAGER,
        visibility_s=visibility_s,
        silence_s=rng.choice([30.0, 120.0, 120.0, 300.0]),
        wait_s=wait_s,
        idle_s=rng.choice([1.0, 5.0, 20.0]),
        cooldown_in_s=rng.choice([1.0, 10.0]),
        max_receives=rng.choice([2, 5, 10]),
    )
    worker = replace(WORKER, visibility_s=visibility_s, wait_s=wait_s, drain_s=rng.choice([1.0, 20.0]))
    return manager, worker


def _long(seed: int, rng: random.Random) -> Plan:
    """Return a plan of many hours, with slow polling.

    With normal polling, most calls of a long world would be polls.
    """
    pools = [Pool("default", 0, 2, rng.choice([1, 2]), boot_s=20)]
    stages = rng.choice([(_stage(A, rng, pools),), (_stage(A, rng, pools), _stage(B, rng, pools, A))])
    job = JobDef(JobId("job-0"), "job-0", stages, EPOCH_S, items=rng.choice([1, 2, 3]), token=f"{seed}")
    manager = replace(
        MANAGER, visibility_s=900.0, silence_s=1800.0, tick_s=120.0, lease_ttl_s=600.0, control_lease_s=300.0
    )
    return Plan(
        tuple(pools),
        (job,),
        (11.0 * 3600, 13.0 * 3600, 15.0 * 3600),
        manager,
        replace(WORKER, visibility_s=900.0, beat_s=300.0, control_lease_s=300.0),
        skew_s=rng.choice([0.0, 20.0]),
        heaviness=rng.choice([0.0, 0.03, 0.1]),
        pace=rng.choice([50.0, 150.0]),
        limit_s=LONG_LIMIT_S,
    )


def _stage(
    name: StageName, rng: random.Random, pools: Sequence[Pool], *after: StageName, gather: str | None = None
) -> StageDef:
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


def _job(seed: int, number: int, rng: random.Random, pools: Sequence[Pool]) -> JobDef:
    return _vary(seed, number, _plain_job(seed, number, rng, pools), pools)


def _vary(seed: int, number: int, job: JobDef, pools: Sequence[Pool]) -> JobDef:
    """Return the job, in some seeds with a failure limit in percent or with three chained stages.

    A separate random source decides the changes, so the jobs of other seeds stay the same.
    """
    rng = random.Random(f"{seed}/{number}/varied")  # noqa: S311 - simulation
    if rng.random() < PERCENT_SHARE:
        limit = rng.choice((4, 10, 34))
        job = replace(job, max_failures=limit, max_failures_percent=True)
    if rng.random() < CHAIN_SHARE:
        first, second = _stage(A, rng, pools), _stage(B, rng, pools, A)
        job = replace(job, stages=(first, second, _stage(C, rng, pools, B)))
    return job


def _plain_job(seed: int, number: int, rng: random.Random, pools: Sequence[Pool]) -> JobDef:
    def stage(name: StageName, *after: StageName, gather: str | None = None) -> StageDef:
        return _stage(name, rng, pools, *after, gather=gather)

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
        items=rng.choice([0, 1, 2, 5, 20, 50]),
        max_failures=rng.choice([0, 0, 1000]),
        fail_fast=rng.random() < 0.3,
        priority=rng.choice([0, 0, 5]),
        # The first bundles of a job without a start time are sent before the ledger has the job.
        token=f"{seed}-{number}" if (seed + number) % 2 else "",
        start_at_s=EPOCH_S + 40 if rng.random() < 0.05 else None,
    )


def with_mended_inputs(seed: int, plan: Plan) -> Plan:
    """Return the plan with more failures, which users retry with mended inputs."""
    rng = random.Random(f"{seed}/mended")  # noqa: S311 - simulation
    # A job with a small limit refuses the retry of some of its failed tasks.
    jobs = tuple(
        replace(
            job,
            items=min(20, max(job.items or 0, rng.choice([3, 5, 10]))),
            max_failures=rng.choice([0, 1_000, 1_000, 1_000]),
            max_failures_percent=False,
        )
        for job in plan.jobs
    )
    return replace(plan, jobs=jobs, heaviness=rng.choice([0.1, 0.3, 1.0]), mended=True)


def with_owners(seed: int, plan: Plan) -> Plan:
    """Return the plan in which each job has an owner, and a user sets fair-share policies."""
    rng = random.Random(f"{seed}/owners")  # noqa: S311 - simulation
    jobs = tuple(replace(job, owner=f"user-{number}") for number, job in enumerate(plan.jobs))
    weights = [rng.choice([0.5, 1.0, 2.0]) for _ in range(2)]
    times_s = sorted(rng.uniform(5.0, 200.0) for _ in weights)
    policies = [SharePolicy((ShareAttributes("A*", weight, None),), decay_s=60.0) for weight in weights]
    return replace(plan, jobs=jobs, policies=tuple(zip(times_s, policies, strict=True)))


SLOW_WORKERS = 0.3
"""Share of slow workers in worlds with speculative copies."""


def with_copies(seed: int, plan: Plan) -> Plan:
    """Return the plan with stages whose tasks may have speculative copies, except tasks with side effects."""
    rng = random.Random(f"{seed}/copies")  # noqa: S311 - simulation

    def stage(stage: StageDef) -> StageDef:
        side_effects = rng.random() < 0.2
        return replace(stage, speculative_copies=side_effects or rng.random() < 0.9, side_effects=side_effects)

    jobs = tuple(
        replace(job, stages=tuple(map(stage, job.stages)), items=max(job.items or 0, rng.choice([8, 20, 40])))
        for job in plan.jobs
    )
    pools = tuple(replace(pool, min_size=rng.choice([0, 2, 3]), max_size=rng.choice([3, 4, 6])) for pool in plan.pools)
    manager = replace(plan.manager, idle_s=rng.choice([5.0, 60.0]), copy_after_s=rng.choice([2.0, 5.0]))
    # The replacement of a frozen instance takes a multiple of `silence_s`.
    manager = replace(manager, silence_s=min(manager.silence_s, 120.0))
    run_s = rng.choice([(0.1, 1.0, 1.0), (1.0, 2.0, 3.0), (0.5, 1.0, 10.0)])
    heaviness = rng.choice([0.0, 0.1, 0.3, 1.0])
    return replace(
        plan, jobs=jobs, pools=pools, manager=manager, run_s=run_s, heaviness=heaviness, slow_share=SLOW_WORKERS
    )


SHARE = 0.18
"""Share of the seeds whose worlds have a focus."""


class Focus(StrEnum):
    """Rare situation that a world makes frequent."""

    STEADY = "steady"
    """A queue that does not become empty, workers that freeze forever, and lost messages."""
    WORDS = "words"
    """Users who pause, resume, and cancel running bundles, slow reads of control objects, and lost events."""
    RIVALS = "rivals"
    """Managers that take the lease from each other, and users who retry some of the failed tasks."""


FOCUS_WEATHERS = {
    Focus.STEADY: Weather(vanished=0.1, lost=0.01, frozen=0.1, crashed=0.02, manager_stopped=0.02, kill_after=0.0003),
    Focus.WORDS: Weather(
        cancelled=0.06,
        paused=0.25,
        resumed=0.2,
        retried=0.1,
        lost=0.06,
        late=0.06,
        vanished=0.05,
        spot_notice=0.12,
        manager_stopped=0.03,
        kill_after=0.0003,
    ),
    Focus.RIVALS: Weather(
        cancelled=0.08,
        retried=0.4,
        second_manager=0.25,
        stalled=0.25,
        manager_stopped=0.06,
        kill_before=0.001,
        kill_after=0.002,
    ),
}


def focus_of(seed: int) -> Focus | None:
    """Return the focus of a seed's world, or None for an ordinary world."""
    rng = _rng(seed, "share")
    return rng.choice(list(Focus)) if rng.random() < SHARE else None


def with_focus(seed: int, focus: Focus, plan: Plan) -> Plan:
    """Return the plan of a world with the focus, based on the seed's `plan`."""
    make = {Focus.STEADY: _steady, Focus.WORDS: _words, Focus.RIVALS: _rivals}[focus]
    plan = make(_rng(seed, "plan"), plan)
    return replace(plan, focus=focus.value, skew_s=0.0, heaviness=1.0, pace=1.0)


def _rng(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed}/focus/{what}")  # noqa: S311 - simulation


def _steady(rng: random.Random, plan: Plan) -> Plan:
    pool = Pool("default", 0, 2, 1, boot_s=5)
    job = _with_stages(plan.jobs[0], pool, rng.choice([1, 1, 2]), RetryRule(3, 10.0), bundle=1)
    job = replace(job, items=90 // len(job.stages), max_failures=1000, start_at_s=None)
    manager = replace(plan.manager, silence_s=30.0, visibility_s=30.0, wait_s=20.0, tick_s=5.0, lease_ttl_s=20.0)
    worker = replace(plan.worker, visibility_s=30.0, wait_s=20.0)
    return replace(plan, pools=(pool,), jobs=(job,), run_s=(5.0, 15.0, 25.0), manager=manager, worker=worker)


def _words(rng: random.Random, plan: Plan) -> Plan:
    pool = Pool("default", 0, 2, rng.choice([1, 2]), boot_s=5)
    first = plan.jobs[0]
    second = replace(first, id=JobId("job-1"), name="job-1", token=f"{first.token}-1")
    jobs = tuple(
        replace(
            _with_stages(job, pool, rng.choice([1, 2]), RetryRule(3, 20.0), rng.choice([3, 7, 15])),
            items=rng.choice([40, 100]),
            max_failures=rng.choice([0, 1000]),
            priority=priority,
            start_at_s=None,
        )
        for job, priority in ((first, 0), (second, rng.choice([0, 5])))
    )
    slow_looks_s = rng.choice([None, SLOW_LOOKS_S])
    run_s = rng.choice([(0.3, 1.0, 2.0), (0.3, 1.0, 1.0, 10.0)])
    manager = replace(plan.manager, tick_s=3.0)
    return replace(plan, pools=(pool,), jobs=jobs, run_s=run_s, manager=manager, slow_looks_s=slow_looks_s)


def _rivals(rng: random.Random, plan: Plan) -> Plan:
    rule = RetryRule(attempts=1)
    jobs = tuple(
        replace(
            job,
            stages=tuple(replace(stage, retry=rule) for stage in job.stages),
            items=rng.choice([20, 40]),
            max_failures=0,
            max_failures_percent=False,
        )
        for job in plan.jobs[:2]
    )
    return replace(plan, jobs=jobs, run_s=(0.1, 1.0, 5.0))


def _with_stages(job: JobDef, pool: Pool, number: int, rule: RetryRule, bundle: int) -> JobDef:
    first = replace(job.stages[0], name=A, after=(), gather=None, retry=rule, slots=1, bundle=bundle)
    first = replace(first, pool=pool.name)
    return replace(job, stages=(first, replace(first, name=B, after=(A,)))[:number])
