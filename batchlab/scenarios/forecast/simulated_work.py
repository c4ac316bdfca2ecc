"""Simulated work of a forecast: job definitions, shared cores and disks, the task runner, and machines of instances.

The item of a task is the number of the task. The behavior of a task depends only on the scenario's seed and the task's
job, stage, number, and attempt. A forecast therefore needs neither data nor code. The machine of a launched instance
depends only on the living instances.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Json, Machine, Market, Pool, Ran, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Objects
from batchlab.manager.stage_plans import MAX_STORED_ITEMS, PartWriter
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.values import TENANT_TAG, Job, PoolPlan, StageTemplate, WorkKind
from batchlab.scenarios.record import InstanceRun
from batchlab.sim.tasks import TimedRunner
from batchlab.worker.inflight_message import Handle, Work

HANDLER = "scenario:declared"
_ITEMS_PER_PART = 4096


def job_def(job: Job, submitted_s: float) -> JobDef:
    """Return the job's definition. `submitted_s` is in epoch seconds."""
    template = job.template
    stages = (
        StageDef(
            StageName(stage.name),
            tuple(map(StageName, stage.after)),
            # A result has one field for each stage that gathers by key, with the stage's name.
            gather=stage.name if stage.gather == "key" else stage.gather,
            handler=HANDLER,
            retry=stage.retry,
            slots=stage.slots,
            gpus=stage.gpus,
            memory_bytes=stage.memory_bytes,
            bundle=stage.bundle,
            pool=stage.pool,
            speculative_copies=stage.speculative_copies,
        )
        for stage in template.stages
    )
    return JobDef(
        JobId(job.id),
        template.name,
        tuple(stages),
        submitted_s,
        items=job.tasks,
        max_failures=template.max_failures,
        priority=template.priority,
        share=template.share,
        tags=((TENANT_TAG, job.tenant),) if job.tenant else (),
        token=job.id,
        after=job.after,
    )


def task_result(stages: tuple[StageTemplate, ...], stage: str, task: int) -> Json:
    """Return a task's result. For each stage that gathers results by key, the result contains the task's group."""
    gathers = (after for after in stages if after.gather == "key" and stage in after.after)
    return {after.name: f"{task % after.groups:06d}" for after in gathers} or None


async def store_items(job: JobDef, objects: Objects, patience: Patience) -> list[Json] | None:
    """Return the items of a small job, or write the items of a large job to the bucket and return None."""
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
    """Cores that the manager, the workers, and the tasks of a machine share.

    `count` is the number of cores (0: unlimited). A bundle takes `bundle_s` seconds of a core, and bundles take cores
    in order. The core time of a bundle covers its send, receive, run, commit, and count. A CPU-bound task uses a core
    whenever a core is free. The kernel shares cores fairly among processes, so CPU-bound tasks slow down the manager
    and the workers, and bundles take longer.
    """

    count: int
    bundle_s: float
    _free_s: list[float] = field(default_factory=list)
    """Monotonic time at which each core is free."""
    _at_work: Counter[str] = field(default_factory=Counter)
    _computing: int = 0

    def begin(self, now_s: float, worker: str, *, computes: bool) -> float:
        """Start a bundle in the worker `worker`. Return the seconds until the bundle's time on a core has ended."""
        if not (self.count and self.bundle_s):
            return 0.0
        self._free_s = self._free_s or [now_s] * self.count
        shared = 1.0 + self._computing / (1 + len(self._at_work))
        self._at_work[worker] += 1
        self._computing += computes
        core = min(range(self.count), key=self._free_s.__getitem__)
        self._free_s[core] = max(now_s, self._free_s[core]) + self.bundle_s * shared
        return self._free_s[core] - now_s

    def end(self, worker: str, *, computes: bool) -> None:
        if not (self.count and self.bundle_s):
            return
        self._computing -= computes
        self._at_work[worker] -= 1
        if not self._at_work[worker]:
            del self._at_work[worker]


BUDGETED_BATCH_S = 0.15
"""Time in seconds that consecutive short tasks run together in a bundle with a time budget.

In a bundle without a time budget, short tasks run until the worker's next check for a stop.
"""

DECLARED_FAILURE = "ScenarioFailure"
"""Error name of an attempt that fails because the scenario declares the failure."""


SLOW_DISK_FACTOR = 4.0

ALL_WORKERS = ""
"""Name that stands for all workers, including workers that start later."""


@dataclass(slots=True)
class SimulatedDisks:
    """Simulated disks of the instances.

    On a slow disk, I/O takes SLOW_DISK_FACTOR times as long. A bundle starts `start_s` seconds later on a slow disk,
    because its scratch folder and its log are files. `slow` counts the slow-disk faults per worker.
    """

    start_s: float = 0.0
    slow: Counter[str] = field(default_factory=Counter)
    slowed_tasks: int = 0
    slowed_bundles: int = 0
    added_s: float = 0.0

    def io_s(self, worker: str, takes_s: float, tasks: int) -> float:
        """Return the seconds that the I/O of `tasks` tasks takes on the worker's disk."""
        if not (times := self._times(worker)):
            return takes_s
        slow_s = takes_s * SLOW_DISK_FACTOR**times
        self.slowed_tasks += tasks
        self.added_s += slow_s - takes_s
        return slow_s

    def begin_s(self, worker: str) -> float:
        """Return the delay in seconds of a bundle's start on the worker's disk."""
        if not (times := self._times(worker)):
            return 0.0
        self.slowed_bundles += 1
        self.added_s += times * self.start_s
        return times * self.start_s

    def _times(self, worker: str) -> int:
        return self.slow[ALL_WORKERS] + self.slow[worker] if self.slow else 0


@dataclass(slots=True)
class SimulatedStage:
    """Stage of one job with its declared task times, multiplied by the measured `stretch` factor."""

    job: Job
    template: StageTemplate
    stretch: float


@dataclass(slots=True)
class SimulatedWork:
    """Work of all simulated workers, with a record of their executions."""

    seed: int
    jobs: Mapping[JobId, Job]
    calibration: Calibration
    together_s: float
    disks: SimulatedDisks = field(default_factory=SimulatedDisks)
    cores: SharedCores = field(init=False)
    first_s: dict[JobId, float] = field(default_factory=dict)
    """Monotonic time at which each job's first task started."""
    spans: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Pool and slot seconds of each ended execution, with or without a committed outcome."""
    running: dict[str, str] = field(default_factory=dict)
    """Worker of each running execution."""
    begun: int = 0
    _stages: dict[tuple[JobId, str], SimulatedStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cores = SharedCores(self.calibration.cores, self.calibration.bundle_cpu_s)

    def stage(self, job_id: JobId, name: str) -> SimulatedStage:
        stage = self._stages.get((job_id, name))
        if stage is None:
            job = self.jobs[job_id]
            (template,) = (template for template in job.template.stages if template.name == name)
            stretch = self.calibration.stretch.get(f"{job.template.name}/{name}", 1.0)
            stage = self._stages[job_id, name] = SimulatedStage(job, template, stretch)
        return stage

    def take_s(self, work: Work) -> Sequence[float]:
        """Return the seconds that each task of a bundle takes."""
        stage = self.stage(work.job.id, work.stage.name)
        times_s = expansion.task_times_s(self.seed, stage.job, stage.template, work.bundle.tasks)
        factor = stage.stretch
        if self.disks.slow and stage.template.kind is WorkKind.IO and (total_s := sum(times_s)):
            factor *= self.disks.io_s(_worker(work), total_s, len(times_s)) / total_s
        return times_s if factor == 1 else [time_s * factor for time_s in times_s]

    def start_s(self, work: Work) -> float:
        """Return the seconds from a bundle's start to its first task."""
        return self.calibration.bundle_s + self.disks.begin_s(_worker(work))


class DeclaredRunner:
    """Runner of a scenario's declared tasks on one instance. A task that kills its worker calls `die`."""

    def __init__(self, work: SimulatedWork, clock: Clock, die: Callable[[], None]) -> None:
        self._work = work
        self._clock = clock
        self._die = die
        self._unlimited = TimedRunner(work.take_s, clock, together_s=work.together_s)
        batch_s = min(BUDGETED_BATCH_S, work.together_s)
        self._budgeted = TimedRunner(work.take_s, clock, together_s=batch_s, look_s=work.together_s)

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        simulated, begun_s = self._work, self._clock.monotonic_s()
        simulated.begun += 1
        worker = simulated.running[work.execution] = _worker(work)
        stage = simulated.stage(work.job.id, work.stage.name)
        template = stage.template
        computes = template.kind is WorkKind.CPU
        # As on a real grid, a task starts with its bundle.
        simulated.first_s.setdefault(work.job.id, begun_s)
        try:
            start_s = simulated.cores.begin(begun_s, worker, computes=computes) + simulated.start_s(work)
            if start_s:
                await asyncio.sleep(start_s)
            runner = self._unlimited if work.budget_s is None else self._budgeted
            if template.poison:
                runs = self._run_with_poison(stage, work, handle, runner)
            elif template.fails or task_result(stage.job.template.stages, template.name, 0) is not None:
                runs = self._add_results(stage, work, runner.run(work, handle))
            else:
                runs = runner.run(work, handle)
            async for ran in runs:
                yield ran
        finally:
            del simulated.running[work.execution]
            simulated.cores.end(worker, computes=computes)
            took_s = self._clock.monotonic_s() - begun_s
            simulated.spans[work.execution] = (work.stage.pool, took_s * work.stage.slots)

    async def close(self) -> None:
        """Return at once, because the runner does not hold resources."""

    async def _add_results(self, stage: SimulatedStage, work: Work, runs: AsyncIterator[Ran]) -> AsyncIterator[Ran]:
        """Add the failures and results that the scenario declares to the tasks that ran."""
        bundle = work.bundle
        failing = expansion.failing_tasks(self._work.seed, stage.job, stage.template, bundle.tasks, bundle.attempt)
        stages, name = stage.job.template.stages, stage.template.name
        async for ran in runs:
            if ran.task in failing:
                reason = "the scenario lets this attempt fail"
                failure = Failure(ran.task, FailureKind.EXCEPTION, reason, error=DECLARED_FAILURE, run_s=ran.run_s)
                yield ran._replace(failure=failure)
            else:
                yield ran._replace(value=task_result(stages, name, ran.task))

    async def _run_with_poison(
        self, stage: SimulatedStage, work: Work, handle: Handle, runner: TimedRunner
    ) -> AsyncIterator[Ran]:
        """Run the tasks before the first task that kills the worker. Then run half of the time of the task that kills
        the worker.
        """
        tasks = list(work.bundle.tasks)
        deadly = (n for n, t in enumerate(tasks) if expansion.kills_worker(stage.job, stage.template, t))
        place = next(deadly, len(tasks))
        ran_all = True
        if place:
            before = replace(work.bundle, tasks=TaskSet.from_indices(tasks[:place]))
            count, part = 0, replace(work, bundle=before, items=work.items[:place])
            async for ran in self._add_results(stage, part, runner.run(part, handle)):
                count += 1
                yield ran
            ran_all = count == place
        is_over = handle.stop or handle.kill or self._clock.monotonic_s() >= handle.until_s
        if place == len(tasks) or not ran_all or is_over:
            return
        handle.running = tasks[place]
        alone = replace(work.bundle, tasks=TaskSet.from_indices(tasks[place : place + 1]))
        (takes_s,) = self._work.take_s(replace(work, bundle=alone))
        await asyncio.sleep(takes_s / 2)
        self._die()


def _worker(work: Work) -> str:
    return work.execution.rpartition("-")[0]


NO_CAPACITY = "InsufficientInstanceCapacity"

_EXACT = 1e-9


def zone_names(count: int) -> tuple[str, ...]:
    """Return names for `count` availability zones."""
    return tuple(f"us-east-1{chr(ord('a') + n)}" for n in range(count))


@dataclass(slots=True)
class SimulatedInstance:
    """Simulated instance. Times are in seconds from the start of the run."""

    pool: str
    machine: Machine
    launched_s: float
    ready_s: float | None = None
    ended_s: float | None = None
    note: str = ""


class Machines:
    """Simulated machines of all pools.

    The pool's Spot share decides whether a launch gets a Spot Instance. A launch uses the zone with the fewest
    instances of the pool. `now_s` returns the time of the run in seconds.
    """

    def __init__(self, plans: Sequence[PoolPlan], zones: Sequence[str], now_s: Callable[[], float]) -> None:
        self.lives: dict[str, SimulatedInstance] = {}
        """All instances by name, in the order of their launches."""
        self.lost_zones: list[str] = []
        self.refused = 0
        """Number of refused launches for which no zone was available."""
        self._spot = {plan.pool.name: plan.spot for plan in plans}
        self._zones = zones
        self._now_s = now_s
        self._alive: dict[str, dict[str, None]] = {plan.pool.name: {} for plan in plans}

    def refuse(self, _pool: Pool, _instance: str) -> str | None:
        """Return the reason why a launch is impossible, or None if a launch is possible."""
        if all(zone in self.lost_zones for zone in self._zones):
            self.refused += 1
            return f"{NO_CAPACITY}: no zone has capacity."
        return None

    def launched(self, pool: Pool, instance: str) -> None:
        """Record a launch and choose the machine of the new instance."""
        alive = self._alive[pool.name]
        machines = [self.lives[name].machine for name in alive]
        spot = sum(machine.market is Market.SPOT for machine in machines)
        # Rounding favors On-Demand Instances, as in a mixed group of EC2 Auto Scaling.
        is_spot = spot + 1 <= self._spot[pool.name] * (len(machines) + 1) + _EXACT
        open_zones = [zone for zone in self._zones if zone not in self.lost_zones]
        zone = min(open_zones, key=lambda name: sum(machine.zone == name for machine in machines))
        machine = Machine(pool.instance_type, zone, Market.SPOT if is_spot else Market.ON_DEMAND)
        self.lives[instance] = SimulatedInstance(pool.name, machine, self._now_s())
        alive[instance] = None

    def ended(self, instance: str, how: str) -> None:
        """Record the end of an instance."""
        life = self.lives[instance]
        life.ended_s, life.note = self._now_s(), how
        del self._alive[life.pool][instance]

    def alive(self, pool: str = "") -> Mapping[str, SimulatedInstance]:
        """Return the ready instances of one pool or of all pools."""
        pools = [pool] if pool else list(self._alive)
        names = (name for pool_name in pools for name in self._alive.get(pool_name, ()))
        return {name: self.lives[name] for name in names if self.lives[name].ready_s is not None}

    def living(self, pool: str) -> int:
        """Count the living instances of a pool."""
        return len(self._alive[pool])

    def begin(self, ready: Sequence[str], *, on_demand: bool = False) -> None:
        """Start the run.

        The living instances count from second 0 of the run, and the instances in `ready` are ready. If `on_demand` is
        True, all living instances become On-Demand Instances.
        """
        self.lives = {name: life for name, life in self.lives.items() if life.ended_s is None}
        for life in self.lives.values():
            life.launched_s = 0.0
            if on_demand:
                life.machine = replace(life.machine, market=Market.ON_DEMAND)
        for name in ready:
            self.lives[name].ready_s = 0.0

    def zone(self, name: str) -> str:
        """Return the zone with the name or last letter `name`, or the first zone if `name` is empty.

        Raise UsageError for an unknown zone.
        """
        if not name:
            return self._zones[0]
        for zone in self._zones:
            if name in (zone, zone[-1]):
                return zone
        raise UsageError(f"There is no zone {name!r}.", remedy=f"The zones are {', '.join(self._zones)}.")

    def booting(self, zone: str) -> list[str]:
        """Return the instances of a zone that are not ready."""
        lives = ((name, self.lives[name]) for names in self._alive.values() for name in names)
        return [name for name, life in lives if life.ready_s is None and life.machine.zone == zone]

    def oldest_first(self, names: Iterable[str]) -> list[str]:
        """Return the instances in the order of their launches."""
        chosen = set(names)
        return [name for name in self.lives if name in chosen]

    def since(self, at_s: float) -> list[SimulatedInstance]:
        """Return the instances that were launched since `at_s`."""
        return [life for life in self.lives.values() if life.launched_s >= at_s]

    def runs(self) -> tuple[InstanceRun, ...]:
        """Return all instances of the run in the format of the record."""
        runs = []
        for name, life in self.lives.items():
            kind, zone, market = life.machine.type, life.machine.zone, life.machine.market.value
            times = life.launched_s, life.ready_s, life.ended_s
            runs.append(InstanceRun(name, life.pool, kind, market, zone, *times, life.note))
        return tuple(runs)


def calibrate_pool(plan: PoolPlan, calibration: Calibration) -> Pool:
    """Return the plan's pool, with the measured boot time if the calibration has a boot time."""
    pool = plan.pool
    boot_s = pool.boot_s if calibration.other_boot_s is None else calibration.other_boot_s
    return replace(pool, boot_s=calibration.boot_s.get(pool.name, boot_s))
