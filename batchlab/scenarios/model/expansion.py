"""Jobs of a scenario, their task times and failures, and compression of a scenario.

Jobs, their times, and their sizes depend only on the scenario and the seed. Each source of arrivals has its own random
stream, so a change of one source does not change the arrivals of another source. Task times and failures depend only on
(seed, job, stage, task, attempt). The simulator and a replay therefore have equal task times and failures.

The module also computes the demand of a scenario over time: the arriving jobs and work, compared with the capacity of
the fleet. The demand curve depends only on the scenario and its jobs. Work is measured in slot seconds, which are the
mean task times multiplied by the slots of each task.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from graphlib import TopologicalSorter
from heapq import merge
from itertools import islice
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from batchlab.core.errors import UsageError
from batchlab.core.model import JobId, TaskSet
from batchlab.core.task_sizes import TaskTimes
from batchlab.core.text import count
from batchlab.jobs.field_types import MAX_TASKS
from batchlab.scenarios.model.arrivals import MAX_JOBS
from batchlab.scenarios.model.distributions import Constant, Stream
from batchlab.scenarios.model.values import (
    Arrival,
    Expectation,
    Job,
    JobTemplate,
    Scenario,
    Schedule,
    Source,
    StageTemplate,
)
from batchlab.scenarios.verdicts import MEASURES, Unit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def expand(scenario: Scenario, seed: int | None = None) -> Schedule:
    """Return all jobs of the scenario in order of time. A job comes after the jobs that it depends on. Other jobs with
    equal arrival times are in the order of their sources.

    `seed` replaces the scenario's seed. Raise UsageError for an unknown job name, a join of stages with unequal numbers
    of tasks, or more than MAX_JOBS jobs.
    """
    seed = scenario.seed if seed is None else seed
    identity = (scenario.name, scenario.digest, scenario.compressed, seed)
    tag = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]

    def numbered_arrivals(number: int, source: Source) -> Iterator[tuple[float, int, int, Arrival]]:
        for place, arrival in enumerate(source.arrivals(Stream(seed, "arrivals", number).random())):
            yield arrival.at_s, number, place, arrival

    streams = [numbered_arrivals(number, source) for number, source in enumerate(scenario.arrivals)]
    units = [Stream(seed, "sizes", number) for number, _ in enumerate(scenario.arrivals)]
    # The limit MAX_JOBS is checked before jobs are built, because building a job takes three times as long as drawing
    # an arrival.
    arrived = list(islice(merge(*streams), MAX_JOBS + 1))
    if len(arrived) > MAX_JOBS:
        raise UsageError(
            f"The scenario {scenario.name!r} has more than {MAX_JOBS:,} jobs.",
            remedy="Give its arrivals an earlier until, a lower rate or a limit.",
        )
    if any(template.after for template in scenario.jobs.values()):
        ranks = template_ranks(scenario.jobs)
        arrived.sort(key=lambda numbered: (numbered[0], ranks.get(numbered[3].template, 0)))
    jobs: list[Job] = []
    joined = {name for name, template in scenario.jobs.items() if item_joins(template)}
    latest: dict[str, JobId] = {}
    for index, (at_s, number, place, arrival) in enumerate(arrived):
        template = _template(scenario, arrival)
        tasks = _size(template, arrival, units[number].unit(place))
        tenant = arrival.tenant or template.tenant
        job_id = f"{scenario.name}-{tag}-{index:05d}"
        after = tuple(replace(other, job=latest[other.job]) for other in template.after if other.job in latest)
        jobs.append(Job(index, job_id, template, at_s, tasks, tenant, arrival.task_s, arrival.label, after))
        latest[template.name] = JobId(job_id)
        if template.name in joined and (stage := find_unequal_join(template, tasks)):
            what = f"A job {template.name!r} of {tasks:,} tasks cannot run: "
            raise UsageError(f"{what}{unequal_join_message(stage)}", remedy=UNEQUAL_JOIN_REMEDY)
    return Schedule(tuple(jobs), tuple(anomaly for source in scenario.arrivals for anomaly in source.odd()))


def template_ranks(templates: Mapping[str, JobTemplate]) -> dict[str, int]:
    """Return a rank for each template, which is higher than the ranks of the templates that it depends on.

    Raise graphlib.CycleError if templates depend on each other in a circle.
    """
    graph = {name: [str(other.job) for other in template.after] for name, template in templates.items()}
    ranks: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        ranks[name] = 1 + max((ranks[other] for other in graph.get(name, ())), default=-1)
    return ranks


def earliest_starts_s(jobs: Sequence[Job]) -> dict[str, float]:
    """Return the earliest start of each job, by its id. A dependency ends at the earliest after the mean task time of
    each of its stages."""
    starts_s: dict[str, float] = {}
    ends_s: dict[str, float] = {}
    for job in jobs:
        starts_s[job.id] = max((job.due_s, *(ends_s[other.job] for other in job.after)))
        ends_s[job.id] = starts_s[job.id] + sum(mean_task_s(job, stage) for stage in job.template.stages)
    return starts_s


def _template(scenario: Scenario, arrival: Arrival) -> JobTemplate:
    try:
        return scenario.jobs[arrival.template]
    except KeyError:
        raise UsageError(
            f"An arrival of the scenario {scenario.name!r} names the job {arrival.template!r}, which it does not have.",
            remedy=f"Its jobs are: {', '.join(sorted(scenario.jobs))}.",
        ) from None


def _size(template: JobTemplate, arrival: Arrival, unit: float) -> int:
    """Return the number of tasks of a job: the drawn size, rounded, but at least 1."""
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

    Compression does not change costs, counts, and shares. Compression also does not shorten the real work of a job
    file.
    """
    if not 0 < factor < float("inf"):
        raise UsageError(f"A scenario cannot be compressed {factor:g}-fold.", remedy="Use a number above 0.")
    if factor == 1:
        return scenario

    def divided(value: T, *names: str) -> T:
        """Return a copy of the dataclass in which the times in the fields `names` are divided by `factor`."""
        return replace(value, **{name: _divide(getattr(value, name), factor) for name in names})

    def compress_stage(stage: StageTemplate) -> StageTemplate:
        return replace(stage, task_s=stage.task_s.multiply(1 / factor), retry=stage.retry.divided(factor))

    def compress_job(template: JobTemplate) -> JobTemplate:
        return replace(divided(template, "deadline_s"), stages=tuple(map(compress_stage, template.stages)))

    return replace(
        scenario,
        jobs={name: compress_job(template) for name, template in scenario.jobs.items()},
        arrivals=tuple(source.compress(factor) for source in scenario.arrivals),
        pools=tuple(replace(plan, pool=divided(plan.pool, "boot_s")) for plan in scenario.pools),
        policy=divided(scenario.policy, "drain_target_s", "cooldown_in_s", "idle_s"),
        shares=None if scenario.shares is None else divided(scenario.shares, "decay_s"),
        prewarm=tuple(divided(prewarm, "at_s", "until_s") for prewarm in scenario.prewarm),
        faults=tuple(divided(fault, "at_s", "for_s", "notice_s") for fault in scenario.faults),
        expect=tuple(_expectation(expectation, factor) for expectation in scenario.expect),
        compressed=scenario.compressed * factor,
    )


def _divide(time_s: float | None, factor: float) -> float | None:
    return None if time_s is None else time_s / factor


def _expectation(expectation: Expectation, factor: float) -> Expectation:
    measure = MEASURES.get(expectation.measure)
    if measure is None or measure.unit is not Unit.SECONDS:
        return expectation
    return replace(expectation, least=_divide(expectation.least, factor), most=_divide(expectation.most, factor))


# Random streams are cached, because consecutive bundles of a job use the same streams and are often small.
_stream = lru_cache(maxsize=1024)(Stream)


def _fixed_task_s(job: Job, stage: StageTemplate) -> float | None:
    """Return the time of every task of the stage if the time is fixed, or None if the time is random."""
    if job.task_s is not None and not stage.after:
        return job.task_s
    return stage.task_s.value if isinstance(stage.task_s, Constant) else None


def mean_task_s(job: Job, stage: StageTemplate) -> float:
    """Return the mean time of the stage's tasks."""
    return stage.task_s.mean if job.task_s is None or stage.after else job.task_s


def task_s(seed: int, job: Job, stage: StageTemplate, task: int) -> float:
    """Return the seconds that a task takes. All attempts of a task take the same time."""
    fixed_s = _fixed_task_s(job, stage)
    if fixed_s is not None:
        return fixed_s
    return stage.task_s.at(_stream(seed, "tasks", job.index, stage.name).unit(task))


def task_times_s(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet) -> list[float]:
    """Return the result of `task_s` for each task of `tasks`. The computation takes well under a microsecond per
    task.
    """
    fixed_s = _fixed_task_s(job, stage)
    if fixed_s is not None:
        return [fixed_s] * len(tasks)
    stream = _stream(seed, "tasks", job.index, stage.name)
    at = stage.task_s.at
    if len(tasks.ranges) == 1:
        return list(map(at, stream.units(*tasks.ranges[0])))
    return [at(unit) for span in tasks.ranges for unit in stream.units(*span)]


def attempt_fails(seed: int, job: Job, stage: StageTemplate, task: int, attempt: int) -> bool:
    """Return whether attempt `attempt` (counted from 1) of the task raises an exception."""
    if not stage.fails:
        return False
    return _stream(seed, "fails", job.index, stage.name, attempt).unit(task) < stage.fails


def failing_tasks(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet, attempt: int) -> frozenset[int]:
    """Return the tasks whose attempt `attempt` fails."""
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
    """Return whether the task kills its worker in every attempt."""
    return task < stage.poison


def stage_sizes(template: JobTemplate, tasks: int) -> dict[str, int]:
    """Return the number of tasks of each stage if all tasks succeed. Raise ValueError if the stages form a cycle."""
    sizes: dict[str, int] = {}
    waiting = list(template.stages)
    while waiting:
        ready = [stage for stage in waiting if all(name in sizes for name in stage.after)]
        if not ready:
            raise ValueError("the stages run in a circle")
        for stage in ready:
            most = max((sizes[name] for name in stage.after), default=tasks)
            if stage.after and stage.gather is not None:
                most = 1 if stage.gather == "*" else min(stage.groups, most)
            sizes[stage.name] = most
        waiting = [stage for stage in waiting if stage not in ready]
    return sizes


def item_joins(template: JobTemplate) -> list[StageTemplate]:
    """Return the stages that join several stages item by item. The joined stages must have equal numbers of tasks."""
    return [stage for stage in template.stages if stage.gather is None and len(stage.after) > 1]


def find_unequal_join(template: JobTemplate, tasks: int) -> StageTemplate | None:
    """Return the first stage that joins stages with unequal numbers of tasks. Raise ValueError if the stages form a
    cycle.
    """
    joins = item_joins(template)
    sizes = stage_sizes(template, tasks) if joins else {}
    return next((stage for stage in joins if len({sizes[name] for name in stage.after}) > 1), None)


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
"""Possible widths of a column of a Curve, as round numbers of seconds, minutes, hours, and days."""


@dataclass(frozen=True, slots=True)
class Column:
    """Jobs that arrive from `at_s` until the next column: the number of jobs, the number of their tasks in all stages,
    and the slot seconds of their work per pool.
    """

    at_s: float
    jobs: int
    tasks: int
    work_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Load of one pool over time.

    `slots` is the capacity of the pool at its maximum size, and `busy` is the work that arrives in each column, in busy
    slots. `behind_s` is the longest delay of work at the maximum size, and `behind_at_s` is the time of the longest
    delay. `idle_from_s` is the time at which a pool of the maximum size would have finished all work.
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
    """Arrivals over time, in columns of `width_s` seconds from the start of the scenario."""

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
    """Build the arrival curve of `jobs` with at most `most` columns."""
    # The time span of the demand curve ends shortly after the last event of the scenario.
    ends = [prewarm.until_s for prewarm in scenario.prewarm]
    ends += [at_s * (1 + 1e-9) for at_s in (*(job.due_s for job in jobs[-1:]), *(f.at_s for f in scenario.faults))]
    span_s = max([1.0, *ends])
    width_s = column_width_s(span_s, most)
    count = max(1, ceil(span_s / width_s - 1e-9))
    number, tasks = [0] * count, [0] * count
    work: list[dict[str, float]] = [{} for _ in range(count)]
    for job in jobs:
        i = min(int(job.due_s / width_s), count - 1)
        number[i] += 1
        sizes = stage_sizes(job.template, job.tasks)
        for stage in job.template.stages:
            tasks[i] += sizes[stage.name]
            slot_s = sizes[stage.name] * mean_task_s(job, stage) * stage.slots
            work[i][stage.pool] = work[i].get(stage.pool, 0.0) + slot_s
    columns = tuple(Column(i * width_s, number[i], tasks[i], work[i]) for i in range(count))
    loads = []
    for pool in (plan.pool for plan in scenario.pools):
        arriving = [column.work_s.get(pool.name, 0.0) for column in columns]
        slots = pool.max_size * pool.slots
        busy = tuple(work_s / width_s for work_s in arriving)
        loads.append(PoolLoad(pool.name, slots, busy, *_backlog(arriving, slots, width_s)))
    return Curve(width_s, columns, tuple(loads))


def column_width_s(span_s: float, most: int) -> float:
    """Return the smallest width with which at most `most` columns cover `span_s`."""
    return next((width_s for width_s in COLUMN_WIDTHS_S if span_s / width_s <= most + 1e-9), span_s / most)


def _backlog(arriving: Sequence[float], slots: int, width_s: float) -> tuple[float, float, float]:
    """Return the longest delay, the time of the longest delay, and the time at which all work is done.

    The computation treats work as a fluid that arrives evenly in each column.
    """
    backlog_s, worst_s, worst_at_s, idle_s = 0.0, 0.0, 0.0, 0.0
    for i, work_s in enumerate(arriving):
        total_s = backlog_s + work_s
        backlog_s = max(0.0, total_s - slots * width_s)
        if backlog_s > worst_s:
            worst_s, worst_at_s = backlog_s, (i + 1) * width_s
        if total_s > 0:
            idle_s = i * width_s + min(width_s, total_s / slots) + backlog_s / slots
    return worst_s / slots, worst_at_s, idle_s


MEDIAN_DRAWS = 1001
"""Number of evenly distributed units from which the median of a distribution is computed.

The median of a Mixture is not its value at 0.5, because a Mixture is not monotonic.
"""


def task_times(scenario: Scenario, jobs: Sequence[Job]) -> list[TaskTimes]:
    """Return the task times of each stage of the templates that arrive, without the compression of the scenario."""
    spot = {plan.pool.name for plan in scenario.pools if plan.spot}
    medians: dict[tuple[str, str], float] = {}
    weights: dict[tuple[str, str], Counter[float]] = {}
    for job in jobs:
        sizes = stage_sizes(job.template, job.tasks)
        for stage in job.template.stages:
            key = job.template.name, stage.name
            if key not in medians:
                units = ((number + 0.5) / MEDIAN_DRAWS for number in range(MEDIAN_DRAWS))
                medians[key] = median(map(stage.task_s.at, units))
            task_s = medians[key] if job.task_s is None or stage.after else job.task_s
            weights.setdefault(key, Counter())[task_s * scenario.compressed] += sizes[stage.name]
    pools = {(job.template.name, stage.name): stage.pool for job in jobs for stage in job.template.stages}
    return [
        TaskTimes(
            f"{template} ({stage})",
            _weighted_median(counts),
            counts.total(),
            f"Half of the {count(counts.total(), 'task')} in the scenario take at most",
            is_whole=True,
            spot=f"pool {pools[template, stage]} has Spot Instances" if pools[template, stage] in spot else "",
        )
        for (template, stage), counts in weights.items()
        if counts.total()
    ]


def _weighted_median(counts: Counter[float]) -> float:
    """Return the lower median of values that occur as often as `counts` says."""
    seen, half = 0, counts.total() / 2
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("a median needs at least one value")
