"""From a scenario to its jobs, and from a scenario to the same one in less time.

Invariant: which jobs there are, when, and how large, follows from (scenario, seed). A source draws
from a stream of its own, so that a second source changes nothing in what the first one sends.

What each task of a scenario takes, and how its attempts end.

Invariant: a function of (seed, job, stage, task, attempt) alone: the same in the simulator and in a
replay, and whichever tasks share a bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from heapq import merge
from itertools import islice

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import RetryRule
from batchlab.core.model import TaskSet
from batchlab.jobs.field_types import MOST_TASKS
from batchlab.scenarios.model.arrivals import MAX_JOBS
from batchlab.scenarios.model.distributions import Constant, Stream
from batchlab.scenarios.model.values import (
    Anomaly,
    Arrival,
    Expectation,
    Fault,
    Job,
    JobTemplate,
    Policy,
    PoolPlan,
    Prewarm,
    Scenario,
    Schedule,
    Source,
    StageTemplate,
)
from batchlab.scenarios.verdicts import MEASURES, Unit


def expand(scenario: Scenario, seed: int | None = None) -> Schedule:
    """All jobs in order of time; of two at the same time, that of the earlier source is first.

    `seed` replaces the scenario's. UsageError where an arrival names no job of the scenario,
    where a job's stages have not the numbers of tasks that they must, and where there are more
    jobs than MAX_JOBS.
    """
    seed = scenario.seed if seed is None else seed
    identity = (scenario.name, scenario.digest, scenario.compressed, seed)
    tag = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    streams = [
        _numbered_arrivals(source, Stream(seed, "arrivals", number), number)
        for number, source in enumerate(scenario.arrivals)
    ]
    units = [Stream(seed, "sizes", number) for number, _ in enumerate(scenario.arrivals)]
    # All of them first: a job costs three times as much as its arrival.
    arrived = list(islice(merge(*streams), MAX_JOBS + 1))
    if len(arrived) > MAX_JOBS:
        raise UsageError(
            f"The scenario {scenario.name!r} has more than {MAX_JOBS:,} jobs.",
            remedy="Give its arrivals an earlier until, a lower rate or a limit.",
        )
    jobs: list[Job] = []
    joined = {name for name, template in scenario.jobs.items() if item_joins(template)}
    for index, (_, number, count, arrival) in enumerate(arrived):
        template = _template(scenario, arrival)
        job = Job(
            index,
            f"{scenario.name}-{tag}-{index:05d}",
            template,
            arrival.at_s,
            _size(template, arrival, units[number].unit(count)),
            arrival.tenant or template.tenant,
            arrival.task_s,
            arrival.label,
        )
        if template.name in joined and (stage := find_unequal_join(template, job.tasks)):
            what = f"A job {template.name!r} of {job.tasks:,} tasks cannot run: "
            raise UsageError(
                f"{what}{unequal_join_message(stage)}",
                remedy=UNEQUAL_JOIN_REMEDY,
            )
        jobs.append(job)
    odd: tuple[Anomaly, ...] = tuple(one for source in scenario.arrivals for one in source.odd())
    return Schedule(tuple(jobs), odd)


def _numbered_arrivals(
    source: Source, stream: Stream, number: int
) -> Iterator[tuple[float, int, int, Arrival]]:
    for count, arrival in enumerate(source.arrivals(stream.random())):
        yield arrival.at_s, number, count, arrival


def _template(scenario: Scenario, arrival: Arrival) -> JobTemplate:
    try:
        return scenario.jobs[arrival.template]
    except KeyError:
        raise UsageError(
            f"An arrival of the scenario {scenario.name!r} names the job {arrival.template!r}, "
            "which it has not.",
            remedy=f"Its jobs are: {', '.join(sorted(scenario.jobs))}.",
        ) from None


def _size(template: JobTemplate, arrival: Arrival, unit: float) -> int:
    """A drawn size is rounded; a job has at least one task."""
    if arrival.tasks is not None:
        return arrival.tasks
    drawn = template.tasks.at(unit)
    if drawn > MOST_TASKS:
        raise UsageError(
            f"A job {template.name!r} would have more than {MOST_TASKS:,} tasks.",
            remedy="Give its tasks another distribution.",
        )
    return max(1, int(drawn + 0.5))


def compress_scenario(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with every time in it divided by `factor`: the same jobs, sooner and shorter.

    Money, counts and shares stay. Real work of a job file takes as long as before.
    """
    if not 0 < factor < float("inf"):
        raise UsageError(
            f"A scenario cannot be compressed {factor:g}-fold.", remedy="Use a number above 0."
        )
    if factor == 1:
        return scenario
    return replace(
        scenario,
        jobs={name: _job(template, factor) for name, template in scenario.jobs.items()},
        arrivals=tuple(source.compressed(factor) for source in scenario.arrivals),
        pools=tuple(_pool(plan, factor) for plan in scenario.pools),
        policy=Policy(
            _divided(scenario.policy.drain_target_s, factor),
            _divided(scenario.policy.cooldown_in_s, factor),
            _divided(scenario.policy.idle_s, factor),
        ),
        prewarm=tuple(_prewarm(one, factor) for one in scenario.prewarm),
        faults=tuple(_fault(one, factor) for one in scenario.faults),
        expect=tuple(_expectation(one, factor) for one in scenario.expect),
        compressed=scenario.compressed * factor,
    )


def _divided(time_s: float | None, factor: float) -> float | None:
    return None if time_s is None else time_s / factor


def _job(template: JobTemplate, factor: float) -> JobTemplate:
    return replace(
        template,
        stages=tuple(_stage(stage, factor) for stage in template.stages),
        deadline_s=_divided(template.deadline_s, factor),
    )


def _stage(stage: StageTemplate, factor: float) -> StageTemplate:
    return replace(stage, task_s=stage.task_s.scaled(1 / factor), retry=_retry(stage.retry, factor))


def _retry(rule: RetryRule, factor: float) -> RetryRule:
    return replace(
        rule, backoff_s=rule.backoff_s / factor, max_backoff_s=rule.max_backoff_s / factor
    )


def _pool(plan: PoolPlan, factor: float) -> PoolPlan:
    return replace(plan, pool=replace(plan.pool, boot_s=plan.pool.boot_s / factor))


def _prewarm(one: Prewarm, factor: float) -> Prewarm:
    return replace(one, at_s=one.at_s / factor, until_s=one.until_s / factor)


def _fault(one: Fault, factor: float) -> Fault:
    return replace(
        one, at_s=one.at_s / factor, for_s=one.for_s / factor, notice_s=one.notice_s / factor
    )


def _expectation(one: Expectation, factor: float) -> Expectation:
    measure = MEASURES.get(one.measure)
    if measure is None or measure.unit is not Unit.SECONDS:
        return one
    return replace(one, least=_divided(one.least, factor), most=_divided(one.most, factor))


# A job's bundles come one after another, and are often small.
_stream = lru_cache(maxsize=1024)(Stream)


def _fixed_task_s(job: Job, stage: StageTemplate) -> float | None:
    """What every task of the stage takes, where that is no matter of chance."""
    if job.task_s is not None and not stage.after:
        return job.task_s
    return stage.task_s.value if isinstance(stage.task_s, Constant) else None


def task_s(seed: int, job: Job, stage: StageTemplate, task: int) -> float:
    """Seconds that one task takes whenever it is tried."""
    known = _fixed_task_s(job, stage)
    if known is not None:
        return known
    return stage.task_s.at(_stream(seed, "tasks", job.index, stage.name).unit(task))


def task_times_s(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet) -> list[float]:
    """`task_s` of each of `tasks`, in order, well under a microsecond each."""
    known = _fixed_task_s(job, stage)
    if known is not None:
        return [known] * len(tasks)
    stream = _stream(seed, "tasks", job.index, stage.name)
    at = stage.task_s.at
    if len(tasks.ranges) == 1:
        return list(map(at, stream.units(*tasks.ranges[0])))
    return [at(unit) for span in tasks.ranges for unit in stream.units(*span)]


def attempt_fails(seed: int, job: Job, stage: StageTemplate, task: int, attempt: int) -> bool:
    """Whether this attempt (counted from 1) of a task ends in an exception."""
    if not stage.fails:
        return False
    return _stream(seed, "fails", job.index, stage.name, attempt).unit(task) < stage.fails


def failing_tasks(
    seed: int, job: Job, stage: StageTemplate, tasks: TaskSet, attempt: int
) -> frozenset[int]:
    """Those of `tasks` whose attempt `attempt_fails`, for many tasks at once."""
    if not stage.fails:
        return frozenset()
    stream = _stream(seed, "fails", job.index, stage.name, attempt)
    return frozenset(
        task
        for start, stop in tasks.ranges
        for task, unit in enumerate(stream.units(start, stop), start)
        if unit < stage.fails
    )


def kills_worker(job: Job, stage: StageTemplate, task: int) -> bool:  # noqa: ARG001 - of every job
    """Whether a task kills its worker whenever it runs."""
    return task < stage.poison


def stage_sizes(template: JobTemplate, tasks: int) -> dict[str, int]:
    """By stage; ValueError where the stages cannot be put into an order."""
    found: dict[str, int] = {}
    left = list(template.stages)
    while left:
        ready = [stage for stage in left if all(name in found for name in stage.after)]
        for stage in ready:
            found[stage.name] = _stage_size(stage, found, tasks)
        left = [stage for stage in left if stage not in ready]
        if not ready:
            raise ValueError("the stages run in a circle")
    return found


def _stage_size(stage: StageTemplate, found: dict[str, int], tasks: int) -> int:
    if not stage.after:
        return tasks
    if stage.gather == "*":
        return 1
    before = max(found[name] for name in stage.after)
    return before if stage.gather is None else min(stage.groups, before)


def item_joins(template: JobTemplate) -> list[StageTemplate]:
    """The stages that follow several item by item, which must have equally many tasks."""
    return [stage for stage in template.stages if stage.gather is None and len(stage.after) > 1]


def find_unequal_join(template: JobTemplate, tasks: int) -> StageTemplate | None:
    """The first of the joins that follows stages with unequal numbers of tasks; ValueError as
    in `stage_sizes`."""
    joined = item_joins(template)
    sizes = stage_sizes(template, tasks) if joined else {}
    return next((one for one in joined if len({sizes[name] for name in one.after}) > 1), None)


def unequal_join_message(stage: StageTemplate) -> str:
    """What is wrong with an unequal join."""
    which = " and ".join(f"'{name}'" for name in stage.after)
    return (
        f"The stage '{stage.name}' takes the results of {which} item by item, and those have not "
        "equally many tasks."
    )


UNEQUAL_JOIN_REMEDY = "Write gather: all, or let it follow stages with as many tasks."
