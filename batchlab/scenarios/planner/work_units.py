"""Work units of a scenario's jobs for the fast model, and the model's state.

The fast model uses the same tasks and task times as the simulator. Consecutive short tasks form one work unit, and a
long task forms its own work unit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from batchlab.core.model import JobState, Pool, TaskSet
from batchlab.core.protocol.settlement import TARGET_S
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.values import LASTING_FAULTS, FaultName, Job, Scenario, Schedule, StageTemplate
from batchlab.scenarios.record import JobRun, StageRun

TARGET_UNITS = 20_000
"""Approximate number of work units of a scenario that has more than 20,000 tasks."""
MAX_FAILURE_SHARE = 0.9
"""Upper limit of the share of failed attempts in the estimate of the number of attempts."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkUnit:
    """Tasks of one stage that run one after another in the same slots.

    Units are compared by identity, because the fast model looks up units very often.
    `run_s` is the total time of the unit's tasks, and `bundles` is the number of bundles on a real grid.
    """

    job: int
    stage: int
    number: int
    tasks: int
    run_s: float
    bundles: int


@dataclass(frozen=True, slots=True)
class JobWork:
    """Job that is split into work units. `stages` has the work units of each stage."""

    job: Job
    stages: tuple[tuple[WorkUnit, ...], ...]


def split_jobs(schedule: Schedule, seed: int, calibration: Calibration) -> tuple[JobWork, ...]:
    """Split all jobs into work units."""
    total_s = 0.0
    for job in schedule.jobs:
        counts = expansion.stage_sizes(job.template, job.tasks)
        total_s += sum(expansion.mean_task_s(job, stage) * counts[stage.name] for stage in job.template.stages)
    return tuple(_split_job(job, seed, calibration, total_s / TARGET_UNITS) for job in schedule.jobs)


def _split_job(job: Job, seed: int, calibration: Calibration, grain_s: float) -> JobWork:
    counts = expansion.stage_sizes(job.template, job.tasks)
    base = _join_groups(job.template.stages)
    lengths = []
    for stage in job.template.stages:
        times_s = expansion.task_times_s(seed, job, stage, TaskSet.span(0, counts[stage.name]))
        stretch = calibration.stretch.get(f"{job.template.name}/{stage.name}", 1.0)
        attempts = 1 / (1 - min(MAX_FAILURE_SHARE, stage.fails))
        lengths.append([time_s * stretch * attempts for time_s in times_s])
    cuts: dict[int, list[tuple[int, int]]] = {}
    for first in dict.fromkeys(base):
        joined = [lengths[n] for n, group in enumerate(base) if group == first]
        cuts[first] = list(_cut([max(column) for column in zip(*joined, strict=True)], grain_s))
    units = (tuple(_work_units(job, number, cuts[first], lengths[number])) for number, first in enumerate(base))
    return JobWork(job, tuple(units))


def _join_groups(stages: Sequence[StageTemplate]) -> list[int]:
    """Return for each stage the index of the first stage with which the stage is joined item by item.

    A work unit that follows several stages waits for the same items of each upstream stage.
    """
    base = list(range(len(stages)))
    places = {stage.name: n for n, stage in enumerate(stages)}
    for number, stage in enumerate(stages):
        if stage.gather is None:
            joined = {number, *(base[places[name]] for name in stage.after)}
            base = [min(joined) if group in joined else group for group in base]
    return base


def _cut(longest_s: list[float], grain_s: float) -> Iterator[tuple[int, int]]:
    begin, sum_s = 0, 0.0
    for number, task_s in enumerate(longest_s):
        if number > begin and sum_s + task_s > grain_s:
            yield begin, number
            begin, sum_s = number, 0.0
        sum_s += task_s
    if longest_s:
        yield begin, len(longest_s)


def _work_units(job: Job, number: int, cuts: list[tuple[int, int]], times_s: list[float]) -> Iterator[WorkUnit]:
    bundle = job.template.stages[number].bundle
    for n, (begin, end) in enumerate(cuts):
        run_s, count = sum(times_s[begin:end]), end - begin
        bundles = -(-count // bundle) if bundle else min(count, max(1, round(run_s / TARGET_S)))
        yield WorkUnit(job.index, number, n, count, run_s, bundles)


@dataclass(slots=True, eq=False)
class ModelInstance:
    """Simulated instance with `free` slots and `free_gpus` GPUs."""

    name: str
    pool: ModelPool
    free: int
    ready_s: float
    is_spot: bool
    free_gpus: int = 0
    leaving: bool = False
    running: dict[WorkUnit, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ModelPool:
    pool: Pool
    desired: int
    alive: dict[str, ModelInstance] = field(default_factory=dict)
    open: dict[str, ModelInstance] = field(default_factory=dict)
    """Instances of the pool that have free slots."""
    ready: dict[int, dict[int, deque[WorkUnit]]] = field(default_factory=dict)
    """Ready work units by priority and job, in the order in which jobs take turns."""
    shrunk_s: float | None = None
    idle_since_s: float | None = None


@dataclass(slots=True)
class StageProgress:
    """Progress of a stage of one job."""

    planned: bool
    remaining: int
    units: int
    waits: list[int]
    """Number of other work units for which each work unit of the stage waits."""
    began_s: float | None = None
    done: int = 0
    done_s: float = 0.0


@dataclass(slots=True)
class JobProgress:
    """Progress of one job. `by_pool` has the stages of each pool with the slots of one task of the stage."""

    work: JobWork
    stages: list[StageProgress]
    by_pool: dict[str, list[tuple[StageProgress, int, int]]]
    started_s: float | None = None
    ended_s: float | None = None


def stage_runs(scenario: Scenario, split_jobs: Sequence[JobWork]) -> Iterator[StageRun]:
    """Yield the totals of all jobs by template and stage."""
    totals: dict[tuple[str, int], tuple[int, int, float]] = {}
    for work in split_jobs:
        for key, units in (((work.job.template.name, n), units) for n, units in enumerate(work.stages)):
            tasks, bundles, run_s = totals.get(key, (0, 0, 0.0))
            tasks, bundles = tasks + sum(unit.tasks for unit in units), bundles + sum(unit.bundles for unit in units)
            totals[key] = tasks, bundles, run_s + sum(unit.run_s for unit in units)
    for (name, number), (tasks, bundles, run_s) in totals.items():
        stage = scenario.jobs[name].stages[number]
        yield StageRun(name, stage.name, stage.pool, stage.slots, tasks, bundles, run_s, run_s, run_s, gpus=stage.gpus)


def stages_known_at_start(stages: Iterable[StageTemplate]) -> set[str]:
    """Return the stages whose tasks are known at the start.

    The tasks of a gathering stage and of its followers are known only after the gathered tasks have ended.
    """
    names: set[str] = set()
    for stage in stages:
        if stage.gather is None and names.issuperset(stage.after):
            names.add(stage.name)
    return names


def followers(stages: Sequence[StageTemplate]) -> list[list[tuple[int, bool]]]:
    """Return for each stage the stages that come after it: the index of each such stage, and whether it gathers."""
    return [
        [(n, after.gather is not None) for n, after in enumerate(stages) if stage.name in after.after]
        for stage in stages
    ]


def end_times_s(scenario: Scenario) -> list[float]:
    """Return the end times of prewarmings and faults.

    A run lasts at least until all prewarmings and faults have ended.
    """
    ends = [warm.until_s for warm in scenario.prewarm]
    for fault in scenario.faults:
        lasts_s = fault.for_s if fault.name in LASTING_FAULTS else 0.0
        ends.append(fault.at_s + (fault.notice_s if fault.name is FaultName.SPOT_WAVE else lasts_s))
    return ends


def job_run(job: JobProgress) -> JobRun:
    """Return the job's result in the form that a record contains."""
    done = sum(stage.done for stage in job.stages)
    return JobRun.of(
        job.work.job,
        submitted_s=job.work.job.due_s,
        started_s=job.started_s,
        ended_s=job.ended_s,
        state=(JobState.RUNNING if job.ended_s is None else JobState.SUCCEEDED).value,
        planned=done,
        succeeded=done,
        failed=0,
        cancelled=0,
    )
