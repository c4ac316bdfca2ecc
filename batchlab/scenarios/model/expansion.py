"""Jobs of a scenario, their task times and failures, and compression of a scenario.

Jobs, their times, and their sizes depend only on the scenario and the seed. Each source has its own
random stream, so another source does not change its arrivals. Task times and failures depend only
on (seed, job, stage, task, attempt), so they are equal in the simulator and in a replay.

Demand of a scenario over time: jobs and work that arrive, compared with the capacity of its
fleet.

The curve depends only on the scenario and its jobs. Work is in slot seconds: the mean task times
multiplied by the slots of each task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import merge
from itertools import islice
from math import ceil

from batchlab.core.errors import UsageError
from batchlab.core.model import TaskSet
from batchlab.jobs.field_types import MAX_TASKS
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
    """Return all jobs in order of time; at equal times, in the order of the sources.

    `seed` replaces the scenario's seed. Raise UsageError for an unknown job name, for stages with
    unequal numbers of tasks in a join, and for more than MAX_JOBS jobs.
    """
    seed = scenario.seed if seed is None else seed
    identity = (scenario.name, scenario.digest, scenario.compressed, seed)
    tag = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    streams = [
        _numbered_arrivals(source, Stream(seed, "arrivals", number), number)
        for number, source in enumerate(scenario.arrivals)
    ]
    units = [Stream(seed, "sizes", number) for number, _ in enumerate(scenario.arrivals)]
    # The limit is checked before jobs are built, because a job costs three times as much as an
    # arrival.
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
            raise UsageError(f"{what}{unequal_join_message(stage)}", remedy=UNEQUAL_JOIN_REMEDY)
        jobs.append(job)
    odd: tuple[Anomaly, ...] = tuple(anomaly for source in scenario.arrivals for anomaly in source.odd())
    return Schedule(tuple(jobs), odd)


def _numbered_arrivals(source: Source, stream: Stream, number: int) -> Iterator[tuple[float, int, int, Arrival]]:
    for count, arrival in enumerate(source.arrivals(stream.random())):
        yield arrival.at_s, number, count, arrival


def _template(scenario: Scenario, arrival: Arrival) -> JobTemplate:
    try:
        return scenario.jobs[arrival.template]
    except KeyError:
        raise UsageError(
            f"An arrival of the scenario {scenario.name!r} names the job {arrival.template!r}, which it does not have.",
            remedy=f"Its jobs are: {', '.join(sorted(scenario.jobs))}.",
        ) from None


def _size(template: JobTemplate, arrival: Arrival, unit: float) -> int:
    """Return the number of tasks: the drawn size rounded, and at least 1."""
    if arrival.tasks is not None:
        return arrival.tasks
    drawn = template.tasks.at(unit)
    if drawn > MAX_TASKS:
        raise UsageError(
            f"A job {template.name!r} would have more than {MAX_TASKS:,} tasks.",
            remedy="Give its tasks another distribution.",
        )
    return max(1, int(drawn + 0.5))


def compress_scenario(scenario: Scenario, factor: float) -> Scenario:
    """Divide every time in the scenario by `factor`.

    Costs, counts, and shares stay the same. Real work of a job file takes as long as before.
    """
    if not 0 < factor < float("inf"):
        raise UsageError(f"A scenario cannot be compressed {factor:g}-fold.", remedy="Use a number above 0.")
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
        faults=tuple(_fault(fault, factor) for fault in scenario.faults),
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
    return replace(stage, task_s=stage.task_s.scaled(1 / factor), retry=stage.retry.divided(factor))


def _pool(plan: PoolPlan, factor: float) -> PoolPlan:
    return replace(plan, pool=replace(plan.pool, boot_s=plan.pool.boot_s / factor))


def _prewarm(one: Prewarm, factor: float) -> Prewarm:
    return replace(one, at_s=one.at_s / factor, until_s=one.until_s / factor)


def _fault(one: Fault, factor: float) -> Fault:
    return replace(one, at_s=one.at_s / factor, for_s=one.for_s / factor, notice_s=one.notice_s / factor)


def _expectation(one: Expectation, factor: float) -> Expectation:
    measure = MEASURES.get(one.measure)
    if measure is None or measure.unit is not Unit.SECONDS:
        return one
    return replace(one, least=_divided(one.least, factor), most=_divided(one.most, factor))


# Bundles of a job are consecutive and often small, so streams are cached.
_stream = lru_cache(maxsize=1024)(Stream)


def _fixed_task_s(job: Job, stage: StageTemplate) -> float | None:
    """Return the time of every task of the stage if it is not random."""
    if job.task_s is not None and not stage.after:
        return job.task_s
    return stage.task_s.value if isinstance(stage.task_s, Constant) else None


def task_s(seed: int, job: Job, stage: StageTemplate, task: int) -> float:
    """Return the seconds that a task takes in every attempt."""
    known = _fixed_task_s(job, stage)
    if known is not None:
        return known
    return stage.task_s.at(_stream(seed, "tasks", job.index, stage.name).unit(task))


def task_times_s(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet) -> list[float]:
    """Return `task_s` of each task, in order. It takes well under a microsecond per task."""
    known = _fixed_task_s(job, stage)
    if known is not None:
        return [known] * len(tasks)
    stream = _stream(seed, "tasks", job.index, stage.name)
    at = stage.task_s.at
    if len(tasks.ranges) == 1:
        return list(map(at, stream.units(*tasks.ranges[0])))
    return [at(unit) for span in tasks.ranges for unit in stream.units(*span)]


def attempt_fails(seed: int, job: Job, stage: StageTemplate, task: int, attempt: int) -> bool:
    """Return whether this attempt (counted from 1) raises an exception."""
    if not stage.fails:
        return False
    return _stream(seed, "fails", job.index, stage.name, attempt).unit(task) < stage.fails


def failing_tasks(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet, attempt: int) -> frozenset[int]:
    """Return the tasks whose attempt fails."""
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
    """Return whether a task kills its worker in every attempt."""
    return task < stage.poison


def stage_sizes(template: JobTemplate, tasks: int) -> dict[str, int]:
    """Return the number of tasks of each stage if all tasks succeed.

    Raise ValueError for a cycle of stages.
    """
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
    """Return the stages that join several stages item by item.

    These must have equal numbers of tasks.
    """
    return [stage for stage in template.stages if stage.gather is None and len(stage.after) > 1]


def find_unequal_join(template: JobTemplate, tasks: int) -> StageTemplate | None:
    """Return the first join of stages with unequal numbers of tasks.

    Raise ValueError for a cycle.
    """
    joined = item_joins(template)
    sizes = stage_sizes(template, tasks) if joined else {}
    return next(
        (stage_template for stage_template in joined if len({sizes[name] for name in stage_template.after}) > 1), None
    )


def unequal_join_message(stage: StageTemplate) -> str:
    which = " and ".join(f"'{name}'" for name in stage.after)
    return (
        f"The stage '{stage.name}' takes the results of {which} item by item, but these have unequal numbers of tasks."
    )


UNEQUAL_JOIN_REMEDY = "Write gather: all, or use stages with equal numbers of tasks."


_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0
COLUMN_WIDTHS_S = (
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    15.0,
    30.0,
    *(factor * _MINUTE for factor in (1, 2, 5, 10, 15, 30)),
    *(factor * _HOUR for factor in (1, 2, 3, 6, 12)),
    *(factor * _DAY for factor in (1, 2, 7, 14, 30, 90, 365, 3650)),
)
"""Possible column widths: round numbers of seconds, minutes, hours, and days."""


@dataclass(frozen=True, slots=True)
class Column:
    """Arrivals from `at_s` until the next column: jobs, tasks of all stages, and slot seconds per
    pool.
    """

    at_s: float
    jobs: int
    tasks: int
    work_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Load of one pool. `slots` is the capacity of its largest fleet, and `busy` is the work that
    arrives in each column, in busy slots. `behind_s` is the longest delay of work on the largest
    fleet, and `behind_at_s` its time. `idle_from_s` is the time at which all work would be done.
    """

    pool: str
    slots: int
    busy: tuple[float, ...]
    behind_s: float
    behind_at_s: float
    idle_from_s: float

    @property
    def peak(self) -> float:
        return max(self.busy, default=0.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Arrivals over time, in columns of `width_s` from the start of the scenario."""

    width_s: float
    columns: tuple[Column, ...]
    asks: tuple[PoolLoad, ...]

    @property
    def span_s(self) -> float:
        return self.width_s * len(self.columns)

    @property
    def work_s(self) -> float:
        return sum(sum(column.work_s.values()) for column in self.columns)


def build_curve(scenario: Scenario, jobs: Sequence[Job], most: int = 72) -> Curve:
    """Build the curve of `jobs` with at most `most` columns."""
    width_s = column_width_s(_span_s(scenario, jobs), most)
    count = max(1, ceil(_span_s(scenario, jobs) / width_s - 1e-9))
    number, tasks = [0] * count, [0] * count
    work: list[dict[str, float]] = [{} for _ in range(count)]
    for job in jobs:
        i = min(int(job.due_s / width_s), count - 1)
        number[i] += 1
        for name, size, slot_s in _stage_work(job):
            tasks[i] += size
            work[i][name] = work[i].get(name, 0.0) + slot_s
    columns = tuple(Column(i * width_s, number[i], tasks[i], work[i]) for i in range(count))
    asks = []
    for plan in scenario.pools:
        pool = plan.pool
        arriving = [column.work_s.get(pool.name, 0.0) for column in columns]
        slots = pool.max_size * pool.slots
        behind = _backlog(arriving, slots, width_s)
        busy = tuple(one / width_s for one in arriving)
        asks.append(PoolLoad(pool.name, slots, busy, *behind))
    return Curve(width_s, columns, tuple(asks))


def column_width_s(span_s: float, most: int) -> float:
    """Return the smallest width with which at most `most` columns cover `span_s`."""
    return next((one for one in COLUMN_WIDTHS_S if span_s / one <= most + 1e-9), span_s / most)


def _span_s(scenario: Scenario, jobs: Sequence[Job]) -> float:
    """Return the time shortly after the last event of the scenario."""
    ends = [job.due_s * (1 + 1e-9) for job in jobs[-1:]]
    ends += [fault.at_s * (1 + 1e-9) for fault in scenario.faults]
    ends += [prewarm.until_s for prewarm in scenario.prewarm]
    return max([1.0, *ends])


def _backlog(arriving: Sequence[float], slots: int, width_s: float) -> tuple[float, float, float]:
    """Return the longest delay, its time, and the time at which all work is done.

    Work is treated as a fluid.
    """
    left, worst, worst_at_s, idle_s = 0.0, 0.0, 0.0, 0.0
    for i, work in enumerate(arriving):
        before = left
        left = max(0.0, left + work - slots * width_s)
        if left > worst:
            worst, worst_at_s = left, (i + 1) * width_s
        if before + work > 0:
            idle_s = i * width_s + min(width_s, (before + work) / slots) + left / slots
    return worst / slots, worst_at_s, idle_s


def _stage_work(job: Job) -> list[tuple[str, int, float]]:
    """Return (pool, tasks, slot seconds) of each stage."""
    count = stage_sizes(job.template, job.tasks)
    found = []
    for stage in job.template.stages:
        draw = stage.task_s
        if job.task_s is not None and not stage.after:
            draw = Constant(job.task_s)
        size = count[stage.name]
        found.append((stage.pool, size, size * draw.mean * stage.slots))
    return found
