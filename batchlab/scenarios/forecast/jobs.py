"""A scenario's jobs as the grid takes them: its templates as definitions, its tasks as items.

Invariant: an item is its task's number, and all that a task does follows from that; so a forecast
needs no data and no code.

The cores of a machine that manager, workers and tasks share, as far as a forecast needs them.

Invariant: what a bundle costs is a function of the bundles before it; no clock, no chance.

Simulated tasks as a scenario declares them: how long each takes, which fail, which kill.

Invariant: what a task does is a function of the scenario's seed, its job, stage, number and
attempt; what is kept here is only what has run.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Json, Ran, StageName, TaskSet
from batchlab.core.ports import Clock, Objects
from batchlab.core.retry import Patience
from batchlab.manager.jobs.stage_plans import FEW, PartWriter
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.values import TENANT_TAG, Job, StageTemplate, WorkKind
from batchlab.sim.tasks import TimedRunner
from batchlab.worker.runner import Handle, Work

HANDLER = "scenario:declared"
_ITEMS_PER_PART = 4096


def job_def(job: Job, submitted_s: float) -> JobDef:
    """The job's definition; `submitted_s` in epoch seconds."""
    template = job.template
    return JobDef(
        JobId(job.id),
        template.name,
        tuple(map(_stage_def, template.stages)),
        submitted_s,
        items=job.tasks,
        max_failures=template.max_failures,
        priority=template.priority,
        tags=((TENANT_TAG, job.tenant),) if job.tenant else (),
        token=job.id,
    )


def _stage_def(stage: StageTemplate) -> StageDef:
    return StageDef(
        StageName(stage.name),
        tuple(map(StageName, stage.after)),
        # Results carry one field for each stage that gathers by key: its name.
        gather=stage.name if stage.gather == "key" else stage.gather,
        handler=HANDLER,
        retry=stage.retry,
        slots=stage.slots,
        memory_bytes=stage.memory_bytes,
        bundle=stage.bundle,
        pool=stage.pool,
    )


def task_result(stages: tuple[StageTemplate, ...], stage: str, task: int) -> Json:
    """What a task of the stage returns: for each stage that gathers it by key, the group."""
    return {
        one.name: f"{task % one.groups:06d}"
        for one in stages
        if one.gather == "key" and stage in one.after
    } or None


async def store_items(job: JobDef, objects: Objects, patience: Patience) -> list[Json] | None:
    """The job's items where they are few; else they are in the bucket now."""
    count = job.items or 0
    if count <= FEW:
        return list(range(count))
    for stage in job.roots():
        writer = PartWriter(objects, patience, job.id, stage.name, 0)
        for start in range(0, count, _ITEMS_PER_PART):
            await writer.add(*range(start, min(start + _ITEMS_PER_PART, count)))
        await writer.commit(TaskSet())
    return None


@dataclass(slots=True)
class SharedCores:
    """`count` cores (0: as many as one likes), of each of which a bundle takes `bundle_s`: sent,
    received, run, committed and counted. First come, first served.

    A task that computes holds a core whenever it can. The kernel is fair to processes: the manager
    and the workers that are at work have their share beside such tasks, and so a bundle takes
    longer.
    """

    count: int
    bundle_s: float
    _free_s: list[float] = field(default_factory=list)
    """Monotonic; when each core has done what was asked of it."""
    _at_work: Counter[str] = field(default_factory=Counter)
    _computing: int = 0

    def begin(self, now_s: float, worker: str, *, computes: bool) -> float:
        """A bundle begins in this worker; the seconds until the machine has done its part of it."""
        if not (self.count and self.bundle_s):
            return 0.0
        if not self._free_s:
            self._free_s = [now_s] * self.count
        shared = 1.0 + self._computing / (1 + len(self._at_work))
        self._at_work[worker] += 1
        self._computing += computes
        core = min(range(self.count), key=self._free_s.__getitem__)
        self._free_s[core] = max(now_s, self._free_s[core]) + self.bundle_s * shared
        return self._free_s[core] - now_s

    def end(self, worker: str, *, computes: bool) -> None:
        """It is over."""
        if not (self.count and self.bundle_s):
            return
        self._computing -= computes
        self._at_work[worker] -= 1
        if not self._at_work[worker]:
            del self._at_work[worker]


BUDGETED_BATCH_S = 0.15
"""Of a bundle that is to give the rest of its tasks away in time, short ones run together so long;
of another one until its worker would look whether it is to stop."""

DECLARED_FAILURE = "ScenarioFailure"
"""The error's name of an attempt that fails because the scenario says so."""


SLOW_DISK_FACTOR = 4.0

ALL_WORKERS = ""
"""In place of a worker: all of them, those that are not there yet too."""


@dataclass(slots=True)
class SimulatedDisks:
    """Disks of the instances.

    On a slow disk, I/O takes SLOW_DISK_FACTOR times as long, and a bundle starts `start_s` later
    because its scratch folder and its log are files. `slow` counts the slow-disk faults per worker.
    """

    start_s: float = 0.0
    slow: Counter[str] = field(default_factory=Counter)
    slowed_tasks: int = 0
    slowed_bundles: int = 0
    added_s: float = 0.0

    def io_s(self, worker: str, takes_s: float, tasks: int) -> float:
        """What is a time of `takes_s` on this worker's disk, of so many tasks."""
        if not (times := self._times(worker)):
            return takes_s
        slow_s = takes_s * SLOW_DISK_FACTOR**times
        self.slowed_tasks += tasks
        self.added_s += slow_s - takes_s
        return slow_s

    def begin_s(self, worker: str) -> float:
        """How much later a bundle begins on it."""
        if not (times := self._times(worker)):
            return 0.0
        self.slowed_bundles += 1
        self.added_s += times * self.start_s
        return times * self.start_s

    def _times(self, worker: str) -> int:
        return self.slow[ALL_WORKERS] + self.slow[worker] if self.slow else 0


@dataclass(slots=True)
class SimulatedStage:
    """A stage of one job as it is run: its declared times, stretched as measured."""

    job: Job
    template: StageTemplate
    stretch: float

    @property
    def returns_nothing(self) -> bool:
        return task_result(self.job.template.stages, self.template.name, 0) is None


@dataclass(slots=True)
class SimulatedWork:
    """What all workers of one world run, and what they have run."""

    seed: int
    jobs: Mapping[JobId, Job]
    calibration: Calibration
    together_s: float
    disks: SimulatedDisks = field(default_factory=SimulatedDisks)
    cores: SharedCores = field(init=False)
    first_s: dict[JobId, float] = field(default_factory=dict)
    """Monotonic; when each job's first task began."""
    spans: dict[str, tuple[str, float]] = field(default_factory=dict)
    """(pool, slot seconds) of each execution of a bundle that is over, committed or not."""
    running: dict[str, str] = field(default_factory=dict)
    """Executions that run, with the worker they run in."""
    begun: int = 0
    _stages: dict[tuple[JobId, str], SimulatedStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cores = SharedCores(self.calibration.cores, self.calibration.bundle_cpu_s)

    def stage(self, job: JobId, name: str) -> SimulatedStage:
        found = self._stages.get((job, name))
        if found is None:
            scenario_job = self.jobs[job]
            (template,) = (one for one in scenario_job.template.stages if one.name == name)
            stretch = self.calibration.stretch.get(f"{scenario_job.template.name}/{name}", 1.0)
            found = self._stages[job, name] = SimulatedStage(scenario_job, template, stretch)
        return found

    def take_s(self, work: Work) -> Sequence[float]:
        """Seconds that each task of a bundle takes."""
        stage = self.stage(work.job.id, work.stage.name)
        found = expansion.task_times_s(self.seed, stage.job, stage.template, work.bundle.tasks)
        factor = stage.stretch
        if self.disks.slow and stage.template.kind is WorkKind.IO and (whole_s := sum(found)):
            factor *= self.disks.io_s(_worker(work), whole_s, len(found)) / whole_s
        return found if factor == 1 else [one * factor for one in found]

    def start_s(self, work: Work) -> float:
        """What a bundle takes before its first task begins."""
        return self.calibration.bundle_s + self.disks.begin_s(_worker(work))


class DeclaredRunner:
    """A Runner of what the scenario declares, on one instance; `die` is called by a task that
    kills its worker."""

    def __init__(self, plays: SimulatedWork, clock: Clock, die: Callable[[], None]) -> None:
        self._plays = plays
        self._clock = clock
        self._die = die
        self._patient = TimedRunner(plays.take_s, clock, together_s=plays.together_s)
        together_s = min(BUDGETED_BATCH_S, plays.together_s)
        self._hasty = TimedRunner(
            plays.take_s, clock, together_s=together_s, look_s=plays.together_s
        )

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See worker.runner."""
        plays, begun_s = self._plays, self._clock.monotonic_s()
        plays.begun += 1
        worker = plays.running[work.execution] = _worker(work)
        stage = plays.stage(work.job.id, work.stage.name)
        computes = stage.template.kind is WorkKind.CPU
        # As a grid tells it: with its bundle a task has begun, whatever that does at first.
        plays.first_s.setdefault(work.job.id, begun_s)
        try:
            shared_s = plays.cores.begin(begun_s, worker, computes=computes)
            if start_s := shared_s + plays.start_s(work):
                await asyncio.sleep(start_s)
            inner = self._patient if work.budget_s is None else self._hasty
            if stage.template.poison:
                async for ran in self._with_poison(stage, work, handle, inner):
                    yield ran
            elif stage.template.fails or not stage.returns_nothing:
                async for ran in self._ended(stage, work, inner.run(work, handle)):
                    yield ran
            else:
                async for ran in inner.run(work, handle):
                    yield ran
        finally:
            del plays.running[work.execution]
            plays.cores.end(worker, computes=computes)
            took_s = self._clock.monotonic_s() - begun_s
            plays.spans[work.execution] = (work.stage.pool, took_s * work.stage.slots)

    async def close(self) -> None:
        """Nothing to end."""

    async def _ended(
        self, stage: SimulatedStage, work: Work, runs: AsyncIterator[Ran]
    ) -> AsyncIterator[Ran]:
        """What tasks come to that have run."""
        bundle = work.bundle
        bad = expansion.failing_tasks(
            self._plays.seed, stage.job, stage.template, bundle.tasks, bundle.attempt
        )
        stages, name = stage.job.template.stages, stage.template.name
        async for ran in runs:
            if ran.task in bad:
                yield ran._replace(failure=_declared_failure(ran))
            else:
                yield ran._replace(value=task_result(stages, name, ran.task))

    async def _with_poison(
        self, stage: SimulatedStage, work: Work, handle: Handle, inner: TimedRunner
    ) -> AsyncIterator[Ran]:
        """Run up to the first task that kills, and half of that one."""
        tasks = list(work.bundle.tasks)
        kills = (
            n for n, t in enumerate(tasks) if expansion.kills_worker(stage.job, stage.template, t)
        )
        doomed = next(kills, len(tasks))
        ran_all = True
        if doomed:
            before = replace(work.bundle, tasks=TaskSet.of(tasks[:doomed]))
            count, part = 0, replace(work, bundle=before, items=work.items[:doomed])
            async for ran in self._ended(stage, part, inner.run(part, handle)):
                count += 1
                yield ran
            ran_all = count == doomed
        over = handle.stop or handle.kill or self._clock.monotonic_s() >= handle.until_s
        if doomed == len(tasks) or not ran_all or over:
            return
        handle.running = tasks[doomed]
        alone = replace(work.bundle, tasks=TaskSet.of(tasks[doomed : doomed + 1]))
        (takes_s,) = self._plays.take_s(replace(work, bundle=alone))
        await asyncio.sleep(takes_s / 2)
        self._die()


def _worker(work: Work) -> str:
    return work.execution.rpartition("-")[0]


def _declared_failure(ran: Ran) -> Failure:
    reason = "the scenario lets this attempt fail"
    return Failure(ran.task, FailureKind.EXCEPTION, reason, error=DECLARED_FAILURE, run_s=ran.run_s)
