"""Worlds with a focus: one rare situation happens in them again and again.

Invariant: a separate random source decides whether a seed has a focus, and which focus, so the
other seeds keep their worlds.
"""

from __future__ import annotations

import random
from dataclasses import replace
from enum import StrEnum

from batchlab.core.job_definition import JobDef, RetryRule
from batchlab.core.model import JobId, Pool
from batchlab.sim.faults import Weather
from batchlab.sim.plans import A, B, Plan

SHARE = 0.18
"""The share of seeds that have a focus."""


class Focus(StrEnum):
    """The rare situation that a world makes frequent."""

    STEADY = "steady"
    """A queue that does not become empty, workers that freeze for ever, and lost messages."""
    WORDS = "words"
    """Users who pause, resume, and cancel running bundles, slow reads of control objects, and lost
    events."""
    RIVALS = "rivals"
    """Managers that take the lead from each other, and users who retry some of the failed tasks."""


WEATHERS = {
    Focus.STEADY: Weather(
        vanished=0.1, lost=0.01, frozen=0.1, crashed=0.02, manager_stopped=0.02, kill_after=0.0003
    ),
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
    """Return the focus of a seed's world, or None if it is an ordinary world."""
    rng = _rng(seed, "share")
    return rng.choice(list(Focus)) if rng.random() < SHARE else None


def focused(seed: int, focus: Focus, plan: Plan) -> Plan:
    """Return the plan of a world with the focus, made from the seed's `plan`."""
    rng = _rng(seed, "plan")
    makers = {Focus.STEADY: _steady, Focus.WORDS: _words, Focus.RIVALS: _rivals}
    made = makers[focus](rng, plan)
    return replace(made, focus=focus.value, skew_s=0.0, heaviness=1.0, pace=1.0)


def _rng(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed}/focus/{what}")  # noqa: S311 - simulation


def _steady(rng: random.Random, plan: Plan) -> Plan:
    pool = Pool("default", 0, 2, 1, boot_s=5)
    job = _with_stages(plan.jobs[0], pool, rng.choice([1, 1, 2]), RetryRule(3, 10.0), bundle=1)
    job = replace(job, items=90 // len(job.stages), max_failures=1000, start_at_s=None)
    manager = replace(
        plan.manager, silence_s=30.0, visibility_s=30.0, wait_s=20.0, tick_s=5.0, lease_ttl_s=20.0
    )
    worker = replace(plan.worker, visibility_s=30.0, wait_s=20.0)
    return replace(
        plan, pools=(pool,), jobs=(job,), run_s=(5.0, 15.0, 25.0), manager=manager, worker=worker
    )


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
    slow_looks_s = rng.choice([None, (4.0, 12.0)])
    run_s = rng.choice([(0.3, 1.0, 2.0), (0.3, 1.0, 1.0, 10.0)])
    manager = replace(plan.manager, tick_s=3.0)
    return replace(
        plan,
        pools=(pool,),
        jobs=jobs,
        run_s=run_s,
        manager=manager,
        slow_looks_s=slow_looks_s,
    )


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
    first = replace(
        job.stages[0], name=A, after=(), gather=None, retry=rule, slots=1, bundle=bundle
    )
    first = replace(first, pool=pool.name)
    return replace(job, stages=(first, replace(first, name=B, after=(A,)))[:number])
