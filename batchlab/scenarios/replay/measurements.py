"""Measurements of a run's jobs from the committed outcomes: task times, lost tasks, and duplicates.

They are read from the bucket, so that errors of the ledger are found too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from batchlab.core.api_types import JobView, StageView
from batchlab.core.commit import outcome_at
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import ENDED, JobId, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.jobs.attempts import definition
from batchlab.scenarios.model.values import Job
from batchlab.scenarios.record import StageRun
from batchlab.scenarios.replay.jobs import declared_s

READ_AT_ONCE = 16
JOBS_AT_ONCE = 8
"""Jobs whose outcomes are in memory at the same time."""
SAMPLE_SIZE = 200
"""Number of task times per stage in a record."""


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """Job of the run with its latest view. `due` is the scenario's job, or None."""

    template: str
    view: JobView
    due: Job | None = None


@dataclass(slots=True)
class StageTotals:
    """Totals of a stage of one template. `slots` are those of a task."""

    pool: str
    slots: int
    after: tuple[str, ...]
    gather: str | None
    tasks: int = 0
    bundles: int = 0
    declared_s: float = 0.0
    span_s: float = 0.0
    task_s: list[float] = field(default_factory=list)
    over_s: list[float] = field(default_factory=list)
    stretch: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Measurements:
    """Totals by (template, stage). `lost` and `duplicates` are as in a Record."""

    stages: dict[tuple[str, str], StageTotals] = field(default_factory=dict)
    lost: int = 0
    duplicates: int = 0

    def add(self, other: Measurements) -> None:
        """Add the measurements of other jobs."""
        for key, stage_totals in other.stages.items():
            totals = self.stages.setdefault(
                key, StageTotals(stage_totals.pool, stage_totals.slots, stage_totals.after, stage_totals.gather)
            )
            totals.tasks += stage_totals.tasks
            totals.bundles += stage_totals.bundles
            totals.declared_s += stage_totals.declared_s
            totals.span_s += stage_totals.span_s
            totals.task_s += stage_totals.task_s
            totals.over_s += stage_totals.over_s
            totals.stretch += stage_totals.stretch
        self.lost += other.lost
        self.duplicates += other.duplicates

    def runs(self) -> tuple[StageRun, ...]:
        """Return the stages for the record, in order of appearance."""
        return tuple(
            StageRun(
                template=template,
                stage=name,
                pool=stage_totals.pool,
                slots=stage_totals.slots,
                tasks=stage_totals.tasks,
                bundles=stage_totals.bundles,
                run_s=sum(stage_totals.task_s),
                declared_s=stage_totals.declared_s,
                span_s=stage_totals.span_s,
                task_s=even_sample(stage_totals.task_s, SAMPLE_SIZE),
                after=stage_totals.after,
                gather=stage_totals.gather,
                over_s=even_sample(stage_totals.over_s, SAMPLE_SIZE),
                stretch=even_sample(stage_totals.stretch, SAMPLE_SIZE),
            )
            for (template, name), stage_totals in self.stages.items()
        )


def even_sample(numbers: Iterable[float], most: int) -> tuple[float, ...]:
    """Return at most `most` of the sorted numbers, evenly spread."""
    ordered = sorted(numbers)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[(2 * i + 1) * len(ordered) // (2 * most)] for i in range(most))


async def measure(jobs: Sequence[ObservedJob], seed: int, objects: Objects, patience: Patience) -> Measurements:
    """Read the outcomes of these jobs.

    `seed` is the run's, for declared times. Raise BackendError.
    """
    measurements = Measurements()
    reader = _OutcomeReader(objects, patience)
    for start in range(0, len(jobs), JOBS_AT_ONCE):
        observed_jobs = jobs[start : start + JOBS_AT_ONCE]
        for observed_job, (job, outcomes) in zip(observed_jobs, await reader.jobs(observed_jobs), strict=True):
            for stage in observed_job.view["stages"]:
                _add(measurements, observed_job, job, stage, outcomes[stage["name"]], seed)
    return measurements


def _add(
    found: Measurements, told: ObservedJob, job: JobDef, view: StageView, outcomes: Sequence[Outcome], seed: int
) -> None:
    stage_def = job.stage(view["name"])
    stage = found.stages.setdefault(
        (told.template, stage_def.name),
        StageTotals(stage_def.pool, stage_def.slots, tuple(stage_def.after), _gather(stage_def)),
    )
    times = succeeded_s(outcomes)
    stage.tasks += len(times)
    stage.bundles += len(outcomes)
    stage.task_s += times.values()
    spans = [max(0.0, o.ended_s - o.started_s) for o in outcomes]
    stage.span_s += sum(spans)
    stage.over_s += [max(0.0, s - sum(o.run_s)) for s, o in zip(spans, outcomes, strict=True)]
    if told.due:
        declared = declared_s(seed, told.due, stage_def.name, TaskSet.from_indices(times))
        stage.declared_s += sum(declared.values())
        stage.stretch += [times[task] / s for task, s in declared.items() if s > 0]
    found.lost += _lost(told.view, view, len(times))
    found.duplicates += duplicates(outcomes)


def _gather(stage: StageDef) -> str | None:
    """Return the gather value for the record, in which "key" stands for any field."""
    return stage.gather if stage.gather in (None, "*") else "key"


def succeeded_s(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """Return the seconds of each succeeded task. The last round counts."""
    found: dict[int, float] = {}
    for outcome in sorted(outcomes, key=lambda one: one.bundle.round):
        found.update(zip(outcome.succeeded, outcome.run_s, strict=True))
    return found


def duplicates(outcomes: Iterable[Outcome]) -> int:
    """Count the tasks with several terminal states within a round (I1)."""
    seen: dict[int, set[int]] = {}
    twice: set[int] = set()
    for outcome in outcomes:
        ended = seen.setdefault(outcome.bundle.round, set())
        failed = (failure.task for failure in outcome.failed if failure.final)
        for task in (*outcome.succeeded, *failed):
            if task in ended:
                twice.add(task)
            ended.add(task)
    return len(twice)


def _lost(job: JobView, stage: StageView, succeeded: int) -> int:
    """Count the lost tasks.

    In an ended job these are tasks without a terminal state and counted successes without an
    outcome. In another job they are all tasks without a success.
    """
    planned = stage["planned"] or 0
    if job["state"] not in ENDED:
        return max(0, planned - succeeded)
    ended = stage["succeeded"] + stage["failed"] + stage["cancelled"]
    return max(0, planned - ended) + max(0, stage["succeeded"] - succeeded)


class _OutcomeReader:
    """Reader of outcomes with limited parallelism."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._keys = CommitKeys(objects, patience)
        self._limit = asyncio.Semaphore(READ_AT_ONCE)

    async def jobs(self, jobs: Iterable[ObservedJob]) -> list[tuple[JobDef, dict[str, list[Outcome]]]]:
        """Read each job's definition and its outcomes by stage."""
        return await asyncio.gather(*map(self._job, jobs))

    async def _job(self, told: ObservedJob) -> tuple[JobDef, dict[str, list[Outcome]]]:
        job = await definition(self._objects, JobId(told.view["id"]), self._patience)
        names = [stage["name"] for stage in told.view["stages"]]
        found = await asyncio.gather(*(self.outcomes(job, StageName(name)) for name in names))
        return job, dict(zip(names, found, strict=True))

    async def outcomes(self, job: JobDef, stage: StageName) -> list[Outcome]:
        """Read the committed outcomes of a stage."""
        key, prefix = await self._keys.key_of(job), object_keys.outcomes(job.id, stage)
        listed = [info.key async for page in self._objects.list(prefix) for info in page]
        names = [name for name in listed if object_keys.is_genuine(name, key)]
        return await asyncio.gather(*(self._read(name, key) for name in names))

    async def _read(self, name: str, key: CommitKey) -> Outcome:
        async with self._limit:
            data = await self._patience(partial(self._objects.get, name))
        return outcome_at(name, data, key)


def root_tasks(view: JobView, stages: Mapping[str, tuple[str, ...]]) -> int:
    """Return the number of root tasks. `stages` maps each stage to its upstream stages."""
    roots = [stage for stage in view["stages"] if not stages.get(stage["name"])]
    return max((stage["planned"] or 0 for stage in roots), default=0)
