"""Jobs of a scenario in the simulator: definitions, items, shared cores and disks, and the task
runner.

An item is its task's number. A task's behavior depends only on the scenario's seed and its job,
stage, number, and attempt, so a forecast needs neither data nor code. The cost of a bundle on
shared cores depends only on the bundles before it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Json, Ran, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Objects
from batchlab.manager.stage_plans import MAX_STORED_ITEMS, PartWriter
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.values import TENANT_TAG, Job, StageTemplate, WorkKind
from batchlab.sim.tasks import TimedRunner
from batchlab.worker.inflight_message import Handle, Work

HANDLER = "scenario:declared"
_ITEMS_PER_PART = 4096


def job_def(job: Job, submitted_s: float) -> JobDef:
    """Return the job's definition. `submitted_s` is in epoch seconds."""
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
        # A result has one field for each stage that gathers by key, with the stage's name.
        gather=stage.name if stage.gather == "key" else stage.gather,
        handler=HANDLER,
        retry=stage.retry,
        slots=stage.slots,
        memory_bytes=stage.memory_bytes,
        bundle=stage.bundle,
        pool=stage.pool,
    )


def task_result(stages: tuple[StageTemplate, ...], stage: str, task: int) -> Json:
    """Return a task's result: its group, for each stage that gathers it by key."""
    return {
        stage_template.name: f"{task % stage_template.groups:06d}"
        for stage_template in stages
        if stage_template.gather == "key" and stage in stage_template.after
    } or None


async def store_items(job: JobDef, objects: Objects, patience: Patience) -> list[Json] | None:
    """Return the items of a small job. Write the items of a large job to the bucket."""
    count = job.items or 0
    if count <= MAX_STORED_ITEMS:
        return list(range(count))
    for stage in job.roots():
        writer = PartWriter(objects, patience, job.id, stage.name, 0)
        for start in range(0, count, _ITEMS_PER_PART):
            await writer.add(*range(start, min(start + _ITEMS_PER_PART, count)))
        await writer.commit(TaskSet())
    return None


@dataclass(slots=True)
class SharedCores:
    """`count` shared cores (0: unlimited). Each bundle takes `bundle_s` of a core to be sent,
    received, run, committed, and counted. Bundles are served in order.

    A CPU-bound task holds a core whenever it can. The kernel shares cores fairly among processes,
    so such tasks slow down the manager and the workers, and bundles take longer.
    """

    count: int
    bundle_s: float
    _free_s: list[float] = field(default_factory=list)
    """Monotonic time at which each core is free."""
    _at_work: Counter[str] = field(default_factory=Counter)
    _computing: int = 0

    def begin(self, now_s: float, worker: str, *, computes: bool) -> float:
        """Start a bundle in this worker. Return the seconds until its share of the core is done."""
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
        """End a bundle."""
        if not (self.count and self.bundle_s):
            return
        self._computing -= computes
        self._at_work[worker] -= 1
        if not self._at_work[worker]:
            del self._at_work[worker]


BUDGETED_BATCH_S = 0.15
"""Short tasks run together for this time in a bundle with a time budget.

In another bundle they run until the worker's next check for a stop.
"""

DECLARED_FAILURE = "ScenarioFailure"
"""Error name of an attempt that fails by the scenario's declaration."""


SLOW_DISK_FACTOR = 4.0

ALL_WORKERS = ""
"""Stands for all workers, including later ones."""


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
        """Return the time of `tasks` tasks on this worker's disk."""
        if not (times := self._times(worker)):
            return takes_s
        slow_s = takes_s * SLOW_DISK_FACTOR**times
        self.slowed_tasks += tasks
        self.added_s += slow_s - takes_s
        return slow_s

    def begin_s(self, worker: str) -> float:
        """Return the delay of a bundle's start on this disk."""
        if not (times := self._times(worker)):
            return 0.0
        self.slowed_bundles += 1
        self.added_s += times * self.start_s
        return times * self.start_s

    def _times(self, worker: str) -> int:
        return self.slow[ALL_WORKERS] + self.slow[worker] if self.slow else 0


@dataclass(slots=True)
class SimulatedStage:
    """Stage of one job with its declared times, stretched as measured."""

    job: Job
    template: StageTemplate
    stretch: float

    @property
    def returns_nothing(self) -> bool:
        return task_result(self.job.template.stages, self.template.name, 0) is None


@dataclass(slots=True)
class SimulatedWork:
    """Work of all simulated workers, and what they have run."""

    seed: int
    jobs: Mapping[JobId, Job]
    calibration: Calibration
    together_s: float
    disks: SimulatedDisks = field(default_factory=SimulatedDisks)
    cores: SharedCores = field(init=False)
    first_s: dict[JobId, float] = field(default_factory=dict)
    """Monotonic time at which each job's first task started."""
    spans: dict[str, tuple[str, float]] = field(default_factory=dict)
    """(pool, slot seconds) of each ended execution, committed or not."""
    running: dict[str, str] = field(default_factory=dict)
    """Running executions and their workers."""
    begun: int = 0
    _stages: dict[tuple[JobId, str], SimulatedStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cores = SharedCores(self.calibration.cores, self.calibration.bundle_cpu_s)

    def stage(self, job: JobId, name: str) -> SimulatedStage:
        simulated_stage = self._stages.get((job, name))
        if simulated_stage is None:
            scenario_job = self.jobs[job]
            (template,) = (
                stage_template for stage_template in scenario_job.template.stages if stage_template.name == name
            )
            stretch = self.calibration.stretch.get(f"{scenario_job.template.name}/{name}", 1.0)
            simulated_stage = self._stages[job, name] = SimulatedStage(scenario_job, template, stretch)
        return simulated_stage

    def take_s(self, work: Work) -> Sequence[float]:
        """Return the seconds of each task of a bundle."""
        stage = self.stage(work.job.id, work.stage.name)
        found = expansion.task_times_s(self.seed, stage.job, stage.template, work.bundle.tasks)
        factor = stage.stretch
        if self.disks.slow and stage.template.kind is WorkKind.IO and (whole_s := sum(found)):
            factor *= self.disks.io_s(_worker(work), whole_s, len(found)) / whole_s
        return found if factor == 1 else [one * factor for one in found]

    def start_s(self, work: Work) -> float:
        """Return the seconds before a bundle's first task."""
        return self.calibration.bundle_s + self.disks.begin_s(_worker(work))


class DeclaredRunner:
    """Runner of declared tasks on one instance. A task that kills its worker calls `die`."""

    def __init__(self, plays: SimulatedWork, clock: Clock, die: Callable[[], None]) -> None:
        self._plays = plays
        self._clock = clock
        self._die = die
        self._patient = TimedRunner(plays.take_s, clock, together_s=plays.together_s)
        together_s = min(BUDGETED_BATCH_S, plays.together_s)
        self._hasty = TimedRunner(plays.take_s, clock, together_s=together_s, look_s=plays.together_s)

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        plays, begun_s = self._plays, self._clock.monotonic_s()
        plays.begun += 1
        worker = plays.running[work.execution] = _worker(work)
        stage = plays.stage(work.job.id, work.stage.name)
        computes = stage.template.kind is WorkKind.CPU
        # As on a real grid, a task starts with its bundle.
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
        """Do nothing."""

    async def _ended(self, stage: SimulatedStage, work: Work, runs: AsyncIterator[Ran]) -> AsyncIterator[Ran]:
        """Add declared failures and results to the tasks that ran."""
        bundle = work.bundle
        bad = expansion.failing_tasks(self._plays.seed, stage.job, stage.template, bundle.tasks, bundle.attempt)
        stages, name = stage.job.template.stages, stage.template.name
        async for ran in runs:
            if ran.task in bad:
                yield ran._replace(failure=_declared_failure(ran))
            else:
                yield ran._replace(value=task_result(stages, name, ran.task))

    async def _with_poison(
        self, stage: SimulatedStage, work: Work, handle: Handle, inner: TimedRunner
    ) -> AsyncIterator[Ran]:
        """Run up to the first task that kills the worker, and half of that task."""
        tasks = list(work.bundle.tasks)
        kills = (n for n, t in enumerate(tasks) if expansion.kills_worker(stage.job, stage.template, t))
        doomed = next(kills, len(tasks))
        ran_all = True
        if doomed:
            before = replace(work.bundle, tasks=TaskSet.from_indices(tasks[:doomed]))
            count, part = 0, replace(work, bundle=before, items=work.items[:doomed])
            async for ran in self._ended(stage, part, inner.run(part, handle)):
                count += 1
                yield ran
            ran_all = count == doomed
        over = handle.stop or handle.kill or self._clock.monotonic_s() >= handle.until_s
        if doomed == len(tasks) or not ran_all or over:
            return
        handle.running = tasks[doomed]
        alone = replace(work.bundle, tasks=TaskSet.from_indices(tasks[doomed : doomed + 1]))
        (takes_s,) = self._plays.take_s(replace(work, bundle=alone))
        await asyncio.sleep(takes_s / 2)
        self._die()


def _worker(work: Work) -> str:
    return work.execution.rpartition("-")[0]


def _declared_failure(ran: Ran) -> Failure:
    reason = "the scenario lets this attempt fail"
    return Failure(ran.task, FailureKind.EXCEPTION, reason, error=DECLARED_FAILURE, run_s=ran.run_s)
