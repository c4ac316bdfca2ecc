"""What came of a run's jobs, read from what the grid has committed: task times, lost, duplicates.

Invariant: read from the bucket and not from the ledger, so that what the ledger says is judged too.
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
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.seals import CommitKey
from batchlab.core.retry import Patience
from batchlab.jobs.attempts import definition
from batchlab.scenarios.model.values import Job
from batchlab.scenarios.record import StageRun
from batchlab.scenarios.replay.jobs import declared_s

READ_AT_ONCE = 16
JOBS_AT_ONCE = 8
"""Jobs whose outcomes are held in memory together."""
SAMPLE_SIZE = 200
"""Task times that a record keeps of a stage."""


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """A job of the run as the manager has shown it last. `due` is what the scenario says of it,
    None where it is of none."""

    template: str
    view: JobView
    due: Job | None = None


@dataclass(slots=True)
class StageTotals:
    """All bundles of a stage of one template together; `slots` are those of a task."""

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
    """What the outcomes of a run's jobs say, stages by (template, name). `lost` and `duplicates`
    are as in a Record."""

    stages: dict[tuple[str, str], StageTotals] = field(default_factory=dict)
    lost: int = 0
    duplicates: int = 0

    def add(self, other: Measurements) -> None:
        """Take in what other jobs of the same templates came to."""
        for key, one in other.stages.items():
            mine = self.stages.setdefault(
                key, StageTotals(one.pool, one.slots, one.after, one.gather)
            )
            mine.tasks += one.tasks
            mine.bundles += one.bundles
            mine.declared_s += one.declared_s
            mine.span_s += one.span_s
            mine.task_s += one.task_s
            mine.over_s += one.over_s
            mine.stretch += one.stretch
        self.lost += other.lost
        self.duplicates += other.duplicates

    def runs(self) -> tuple[StageRun, ...]:
        """The stages as a record has them, in the order in which they were met."""
        return tuple(
            StageRun(
                template=template,
                stage=name,
                pool=one.pool,
                slots=one.slots,
                tasks=one.tasks,
                bundles=one.bundles,
                run_s=sum(one.task_s),
                declared_s=one.declared_s,
                span_s=one.span_s,
                task_s=even_sample(one.task_s, SAMPLE_SIZE),
                after=one.after,
                gather=one.gather,
                over_s=even_sample(one.over_s, SAMPLE_SIZE),
                stretch=even_sample(one.stretch, SAMPLE_SIZE),
            )
            for (template, name), one in self.stages.items()
        )


def even_sample(numbers: Iterable[float], most: int) -> tuple[float, ...]:
    """At most so many of the numbers, evenly spread over the sorted ones."""
    ordered = sorted(numbers)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[(2 * i + 1) * len(ordered) // (2 * most)] for i in range(most))


async def measure(
    jobs: Sequence[ObservedJob], seed: int, objects: Objects, patience: Patience
) -> Measurements:
    """Read the outcomes of these jobs; BackendError. `seed` is the run's, for declared times."""
    found = Measurements()
    reader = _OutcomeReader(objects, patience)
    for start in range(0, len(jobs), JOBS_AT_ONCE):
        some = jobs[start : start + JOBS_AT_ONCE]
        for one, (job, outcomes) in zip(some, await reader.jobs(some), strict=True):
            for stage in one.view["stages"]:
                _add(found, one, job, stage, outcomes[stage["name"]], seed)
    return found


def _add(
    found: Measurements,
    told: ObservedJob,
    job: JobDef,
    view: StageView,
    outcomes: Sequence[Outcome],
    seed: int,
) -> None:
    one = job.stage(view["name"])
    stage = found.stages.setdefault(
        (told.template, one.name),
        StageTotals(one.pool, one.slots, tuple(one.after), _gather(one)),
    )
    times = succeeded_s(outcomes)
    stage.tasks += len(times)
    stage.bundles += len(outcomes)
    stage.task_s += times.values()
    spans = [max(0.0, o.ended_s - o.started_s) for o in outcomes]
    stage.span_s += sum(spans)
    stage.over_s += [max(0.0, s - sum(o.run_s)) for s, o in zip(spans, outcomes, strict=True)]
    if told.due:
        declared = declared_s(seed, told.due, one.name, TaskSet.of(times))
        stage.declared_s += sum(declared.values())
        stage.stretch += [times[task] / s for task, s in declared.items() if s > 0]
    found.lost += _lost(told.view, view, len(times))
    found.duplicates += duplicates(outcomes)


def _gather(stage: StageDef) -> str | None:
    """How it gathers, as a record says it: any other word than `*` is the field that it goes by."""
    return stage.gather if stage.gather in (None, "*") else "key"


def succeeded_s(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """What each task that succeeded took, in seconds; of one that did more than once, the last
    round's."""
    found: dict[int, float] = {}
    for outcome in sorted(outcomes, key=lambda one: one.bundle.round):
        found.update(zip(outcome.succeeded, outcome.run_s, strict=True))
    return found


def duplicates(outcomes: Iterable[Outcome]) -> int:
    """How many tasks have more than one terminal state within a round (I1)."""
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
    """Tasks of which nobody knows what became of them: in an ended job those without a terminal
    state, and those that count as succeeded though no outcome has them; in another, all that have
    not succeeded."""
    planned = stage["planned"] or 0
    if job["state"] not in ENDED:
        return max(0, planned - succeeded)
    ended = stage["succeeded"] + stage["failed"] + stage["cancelled"]
    return max(0, planned - ended) + max(0, stage["succeeded"] - succeeded)


class _OutcomeReader:
    """Reads outcomes, some at a time."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._keys = CommitKeys(objects, patience)
        self._limit = asyncio.Semaphore(READ_AT_ONCE)

    async def jobs(
        self, jobs: Iterable[ObservedJob]
    ) -> list[tuple[JobDef, dict[str, list[Outcome]]]]:
        """Each job's definition, and its outcomes by stage."""
        return await asyncio.gather(*map(self._job, jobs))

    async def _job(self, told: ObservedJob) -> tuple[JobDef, dict[str, list[Outcome]]]:
        job = await definition(self._objects, JobId(told.view["id"]), self._patience)
        names = [stage["name"] for stage in told.view["stages"]]
        found = await asyncio.gather(*(self.outcomes(job, StageName(one)) for one in names))
        return job, dict(zip(names, found, strict=True))

    async def outcomes(self, job: JobDef, stage: StageName) -> list[Outcome]:
        """Every committed outcome of a stage."""
        key, prefix = await self._keys.of(job), object_keys.outcomes(job.id, stage)
        listed = [info.key async for page in self._objects.list(prefix) for info in page]
        names = [name for name in listed if object_keys.is_genuine(name, key)]
        return await asyncio.gather(*(self._read(name, key) for name in names))

    async def _read(self, name: str, key: CommitKey) -> Outcome:
        async with self._limit:
            data = await self._patience(partial(self._objects.get, name))
        return outcome_at(name, data, key)


def root_tasks(view: JobView, stages: Mapping[str, tuple[str, ...]]) -> int:
    """How many tasks the job's input has made; `stages` says what each follows."""
    roots = [stage for stage in view["stages"] if not stages.get(stage["name"])]
    return max((stage["planned"] or 0 for stage in roots), default=0)
