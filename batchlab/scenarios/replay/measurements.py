"""Measurements of a run's jobs from the committed outcomes: task times, lost tasks, and duplicates.

The outcomes come from the bucket, so the measurements also show errors of the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from batchlab.core.api_types import JobView, StageView
from batchlab.core.commit import outcome_at
from batchlab.core.job_definition import JobDef
from batchlab.core.model import ENDED, JobId, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.jobs.attempts import definition
from batchlab.scenarios.model.values import Job
from batchlab.scenarios.record import StageRun
from batchlab.scenarios.replay.jobs import declared_s

MAX_PARALLEL_READS = 16
MAX_PARALLEL_JOBS = 8
"""Maximum number of jobs whose outcomes are in memory at the same time."""
SAMPLE_SIZE = 200
"""Maximum number of task times of a stage in a record."""


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """Job of the run, with the manager's latest view of the job. `due` is the job in the scenario, or None without a
    scenario.
    """

    template: str
    view: JobView
    due: Job | None = None


@dataclass(slots=True)
class StageTotals:
    """Totals of a stage of one template. `slots` is the number of slots of a task."""

    pool: str
    slots: int
    after: tuple[str, ...]
    gather: str | None
    gpus: int = 0
    tasks: int = 0
    bundles: int = 0
    declared_s: float = 0.0
    span_s: float = 0.0
    task_s: list[float] = field(default_factory=list)
    over_s: list[float] = field(default_factory=list)
    stretch: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Measurements:
    """Totals of each stage by (template, stage). `lost` and `duplicates` have the same meaning as in a Record."""

    stages: dict[tuple[str, str], StageTotals] = field(default_factory=dict)
    lost: int = 0
    duplicates: int = 0

    def add(self, other: Measurements) -> None:
        """Add the measurements of other jobs."""
        for key, more in other.stages.items():
            totals = self.stages.setdefault(key, StageTotals(more.pool, more.slots, more.after, more.gather, more.gpus))
            for name in ("tasks", "bundles", "declared_s", "span_s", "task_s", "over_s", "stretch"):
                setattr(totals, name, getattr(totals, name) + getattr(more, name))
        self.lost += other.lost
        self.duplicates += other.duplicates

    def runs(self) -> tuple[StageRun, ...]:
        """Return the totals of the stages in the format of the record, in the order in which the stages were
        measured.
        """
        return tuple(
            StageRun(
                template=template,
                stage=name,
                pool=totals.pool,
                slots=totals.slots,
                tasks=totals.tasks,
                bundles=totals.bundles,
                run_s=sum(totals.task_s),
                declared_s=totals.declared_s,
                span_s=totals.span_s,
                task_s=even_sample(totals.task_s, SAMPLE_SIZE),
                after=totals.after,
                gather=totals.gather,
                over_s=even_sample(totals.over_s, SAMPLE_SIZE),
                stretch=even_sample(totals.stretch, SAMPLE_SIZE),
                gpus=totals.gpus,
            )
            for (template, name), totals in self.stages.items()
        )


def even_sample(numbers: Iterable[float], most: int) -> tuple[float, ...]:
    """Sort the numbers, and return at most `most` of the numbers, evenly spread."""
    ordered = sorted(numbers)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[(2 * i + 1) * len(ordered) // (2 * most)] for i in range(most))


async def measure(jobs: Sequence[ObservedJob], seed: int, objects: Objects, patience: Patience) -> Measurements:
    """Measure jobs by their outcomes in the bucket.

    `seed` is the seed of the run, from which declared times are drawn. Raise BackendError if the bucket cannot be read.
    """
    measurements = Measurements()
    reader = _OutcomeReader(objects, patience)
    for start in range(0, len(jobs), MAX_PARALLEL_JOBS):
        batch = jobs[start : start + MAX_PARALLEL_JOBS]
        for observed, (job, outcomes) in zip(batch, await reader.jobs(batch), strict=True):
            for stage in observed.view["stages"]:
                _add(measurements, observed, job, stage, outcomes[stage["name"]], seed)
    return measurements


def _add(
    measurements: Measurements,
    observed: ObservedJob,
    job: JobDef,
    view: StageView,
    outcomes: Sequence[Outcome],
    seed: int,
) -> None:
    stage = job.stage(view["name"])
    # In a record, the gather value "key" stands for the name of any field.
    gather = stage.gather if stage.gather in (None, "*") else "key"
    totals = measurements.stages.setdefault(
        (observed.template, stage.name), StageTotals(stage.pool, stage.slots, tuple(stage.after), gather, stage.gpus)
    )
    times = succeeded_s(outcomes)
    totals.tasks += len(times)
    totals.bundles += len(outcomes)
    totals.task_s += times.values()
    spans = [max(0.0, outcome.ended_s - outcome.started_s) for outcome in outcomes]
    totals.span_s += sum(spans)
    totals.over_s += [max(0.0, s - sum(outcome.run_s)) for s, outcome in zip(spans, outcomes, strict=True)]
    if observed.due:
        declared = declared_s(seed, observed.due, stage.name, TaskSet.from_indices(times))
        totals.declared_s += sum(declared.values())
        totals.stretch += [times[task] / s for task, s in declared.items() if s > 0]
    measurements.lost += _lost_tasks(observed.view, view, len(times))
    measurements.duplicates += duplicates(outcomes)


def succeeded_s(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """Return the seconds of each succeeded task. If a task succeeded in several rounds, the last round counts."""
    times: dict[int, float] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.bundle.round):
        times.update(zip(outcome.succeeded, outcome.run_s, strict=True))
    return times


def duplicates(outcomes: Iterable[Outcome]) -> int:
    """Count the tasks that have several terminal states within one round (invariant I1)."""
    ended: set[tuple[int, int]] = set()
    twice: set[int] = set()
    for outcome in outcomes:
        failed = (failure.task for failure in outcome.failed if failure.final)
        for task in (*outcome.succeeded, *failed):
            if (outcome.bundle.round, task) in ended:
                twice.add(task)
            ended.add((outcome.bundle.round, task))
    return len(twice)


def _lost_tasks(job: JobView, stage: StageView, succeeded: int) -> int:
    """Count the lost tasks.

    In an ended job, a task without a terminal state is lost. A task that the ledger counts as succeeded is also lost if
    the bucket lacks its outcome. In a job that has not ended, every task without a success is lost.
    """
    planned = stage["planned"] or 0
    if job["state"] not in ENDED:
        return max(0, planned - succeeded)
    ended = stage["succeeded"] + stage["failed"] + stage["cancelled"]
    return max(0, planned - ended) + max(0, stage["succeeded"] - succeeded)


class _OutcomeReader:
    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._keys = CommitKeys(objects, patience)
        self._limit = asyncio.Semaphore(MAX_PARALLEL_READS)

    async def jobs(self, jobs: Iterable[ObservedJob]) -> list[tuple[JobDef, dict[str, list[Outcome]]]]:
        """Read each job's definition and its outcomes by stage."""
        return await asyncio.gather(*map(self._job, jobs))

    async def _job(self, observed: ObservedJob) -> tuple[JobDef, dict[str, list[Outcome]]]:
        job = await definition(self._objects, JobId(observed.view["id"]), self._patience)
        names = [stage["name"] for stage in observed.view["stages"]]
        outcomes = await asyncio.gather(*(self.outcomes(job, StageName(name)) for name in names))
        return job, dict(zip(names, outcomes, strict=True))

    async def outcomes(self, job: JobDef, stage: StageName) -> list[Outcome]:
        """Read the committed outcomes of a stage."""
        key, prefix = await self._keys.key_of(job), object_keys.outcomes(job.id, stage)

        async def read(name: str) -> Outcome:
            async with self._limit:
                return outcome_at(name, await self._patience(partial(self._objects.get, name)), key)

        listed = [info.key async for page in self._objects.list(prefix) for info in page]
        return await asyncio.gather(*(read(name) for name in listed if object_keys.is_genuine(name, key)))


def root_tasks(view: JobView, stages: Mapping[str, tuple[str, ...]]) -> int:
    """Return the number of root tasks. `stages` maps each stage to its upstream stages."""
    roots = [stage for stage in view["stages"] if not stages.get(stage["name"])]
    return max((stage["planned"] or 0 for stage in roots), default=0)
