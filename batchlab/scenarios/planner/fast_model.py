"""Fast model of a run: tasks, slots, boots, and the grid's scaling policy.

The model simulates neither messages nor the manager. The fast model takes a hundredth of a forecast's time and is less
precise. The planner uses the fast model to select the candidates for forecasts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from batchlab.core.model import Market
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.manager.autoscaler import capacity_for
from batchlab.manager.state import UNKNOWN_TASK_S, Backlog
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.forecast.fault_timeline import NO_INSTANCE
from batchlab.scenarios.forecast.results import ForecastSetup, Results
from batchlab.scenarios.forecast.simulate import SHRINK_LIMIT_S
from batchlab.scenarios.forecast.simulated_work import Machines, zone_names
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Fault, FaultName, Scenario
from batchlab.scenarios.planner.work_units import (
    JobProgress,
    JobWork,
    ModelInstance,
    ModelPool,
    StageProgress,
    WorkUnit,
    end_times_s,
    followers,
    job_run,
    split_jobs,
    stage_runs,
    stages_known_at_start,
)
from batchlab.scenarios.record import InjectedFault, PoolSample, Record, Sample

MAX_POLICY_CHECKS = 2000
"""Maximum number of checks of the scaling policy while jobs arrive.

After the last arrival, the model checks the scaling policy once per tick of the manager.
"""


@dataclass(slots=True)
class FastModel:
    """Fast runs of one scenario with any fleet and policy.

    The default calibration has the backend's usual values. The model is pickled and sent to several processes, and each
    process caches the work of its seeds.
    """

    backend: str
    calibration: Calibration | None = None
    book: PriceBook = field(default_factory=price_book.load)
    _works: dict[int, tuple[JobWork, ...]] = field(default_factory=dict)

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        """Run the fast model of a scenario. Raise UsageError for an unknown backend."""
        backend = factory.load(self.backend)
        setup = ForecastSetup(scenario, seed, backend, self.calibration or backend.usual, self.book)
        if seed not in self._works:
            self._works[seed] = split_jobs(expand(scenario, seed), seed, setup.calibration)
        return _FastRun(setup, self._works[seed]).record()


class _FastRun:
    def __init__(self, setup: ForecastSetup, work: tuple[JobWork, ...]) -> None:
        self._setup, self._scenario, self._calibration = setup, setup.scenario, setup.calibration
        self._has_market = not setup.backend.capabilities.one_machine
        self._work = work
        self._bundle_s = self._calibration.bundle_s + (
            self._calibration.bundle_cpu_s if self._calibration.cores else 0.0
        )
        self._manager = setup.manager()
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._followers = {template.name: followers(template.stages) for template in self._scenario.jobs.values()}
        self._jobs: list[JobProgress] = []
        self._open: dict[int, JobProgress] = {}
        self._ended: set[str] = set()
        self._dependents: dict[str, list[JobWork]] = {}
        """Jobs that wait for another job, by the id of the other job."""
        self._pools = {name: ModelPool(pool, 0) for name, pool in setup.pools().items()}
        self._machines = Machines(self._scenario.pools, zone_names(self._scenario.zones), lambda: self._now_s)
        self._samples: list[Sample] = []
        self._injected: list[InjectedFault] = []
        self._checks_policy = False
        self._cut = ""
        self._due_s = work[-1].job.due_s if work else 0.0
        """Due time of the last job of the scenario."""
        self._check_s = max(self._manager.tick_s, self._due_s / MAX_POLICY_CHECKS)

    def _at(self, at_s: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, what))

    def record(self) -> Record:
        """Run the model to the end of the run and return the record."""
        for pool in self._pools.values():
            for _ in range(pool.pool.min_size):
                self._launch(pool, boot_s=0.0)
            pool.desired = pool.pool.min_size
        for work in self._work:
            self._at(work.job.due_s + self._calibration.submit_s, partial(self._submit, work))
        ends = end_times_s(self._scenario)
        for at_s in (*(warm.at_s for warm in self._scenario.prewarm), *ends):
            self._at(at_s, self._start_policy_checks)
        for fault in self._scenario.faults:
            if fault.name is FaultName.SPOT_WAVE:
                self._at(fault.at_s, partial(self._interrupt_spot, fault))
        limit_s: float | None = None
        while self._events:
            at_s, _, action = heapq.heappop(self._events)
            if limit_s is not None and at_s > limit_s:
                break
            self._now_s = at_s
            action()
            is_done = len(self._jobs) == len(self._work) and not self._open
            if limit_s is None and is_done and at_s >= max(ends, default=0.0):
                limit_s = at_s + SHRINK_LIMIT_S
        return self._setup.record(
            results=Results(
                bundles=sum(unit.bundles for work in self._work for units in work.stages for unit in units)
            ),
            jobs=tuple(map(job_run, self._jobs)),
            stages=tuple(stage_runs(self._scenario, self._work)),
            samples=self._samples,
            instances=self._machines.runs(),
            end_s=self._now_s,
            faults=tuple(self._injected),
            lost=sum(stage.remaining for job in self._open.values() for stage in job.stages),
            cut=self._cut,
        )

    def _submit(self, work: JobWork) -> None:
        """Begin the job, or let it wait for a job on which it depends."""
        for other in work.job.after:
            if other.job not in self._ended:
                self._dependents.setdefault(other.job, []).append(work)
                return
        template = work.job.template
        stages, planned = [], stages_known_at_start(template.stages)
        places = {stage.name: n for n, stage in enumerate(template.stages)}
        for stage, units in zip(template.stages, work.stages, strict=True):
            upstream = [work.stages[places[name]] for name in stage.after]
            waits = len(stage.after) if stage.gather is None else sum(map(len, upstream))
            tasks = sum(unit.tasks for unit in units)
            stages.append(StageProgress(stage.name in planned, tasks, len(units), [waits] * len(units)))
        by_pool: dict[str, list[tuple[StageProgress, int, int]]] = {}
        for stage, progress in zip(template.stages, stages, strict=True):
            by_pool.setdefault(stage.pool, []).append((progress, stage.slots, stage.gpus))
        job = JobProgress(work, stages, by_pool)
        self._jobs.append(job)
        self._open[work.job.index] = job
        for stage, units in zip(template.stages, work.stages, strict=True):
            for unit in () if stage.after else units:
                self._queue(job, unit)
        self._start_policy_checks()
        self._assign()

    def _queue(self, job: JobProgress, unit: WorkUnit, *, first: bool = False) -> None:
        """Put a ready work unit into the queue of its pool.

        If `first` is True, the unit is the first of its job in the queue, because the worker of the unit's predecessor
        runs the unit next.
        """
        template = job.work.job.template
        pool = self._pools[template.stages[unit.stage].pool]
        units = pool.ready.setdefault(template.priority, {}).setdefault(unit.job, deque())
        if first:
            units.appendleft(unit)
        else:
            units.append(unit)

    def _assign(self) -> None:
        """Assign ready work units to free instances. Jobs of equal priority take turns."""
        for pool in self._pools.values():
            while pool.ready and pool.open:
                priority = max(pool.ready)
                jobs = pool.ready[priority]
                found = self._next_unit(pool, jobs)
                if found is None:
                    break
                number, instance = found
                units, job = jobs[number], self._open[number]
                unit = units.popleft()
                del jobs[number]
                if units:
                    jobs[number] = units
                elif not jobs:
                    del pool.ready[priority]
                self._begin(job, unit, instance)

    def _next_unit(self, pool: ModelPool, jobs: Mapping[int, deque[WorkUnit]]) -> tuple[int, ModelInstance] | None:
        """Return the job whose first work unit starts next, and its instance, or None if no unit can start. A unit
        that waits for GPUs does not block the other jobs."""
        for number, units in jobs.items():
            stage = self._open[number].work.job.template.stages[units[0].stage]
            instances: Collection[ModelInstance] = pool.open.values()
            if stage.gpus:
                instances = [instance for instance in instances if instance.free_gpus >= stage.gpus]
                if not instances:
                    continue
            # On a real grid, workers receive bundles in a random order. The instance with the least work is usually the
            # first to receive a bundle.
            instance = max(instances, key=lambda instance: instance.free)
            return (number, instance) if instance.free >= stage.slots else None
        return None

    def _begin(self, job: JobProgress, unit: WorkUnit, instance: ModelInstance) -> None:
        template = job.work.job.template.stages[unit.stage]
        instance.running[unit] = None
        instance.free -= template.slots
        instance.free_gpus -= template.gpus
        if not instance.free:
            del instance.pool.open[instance.name]
        stage = job.stages[unit.stage]
        job.started_s = self._now_s if job.started_s is None else job.started_s
        stage.began_s = self._now_s if stage.began_s is None else stage.began_s
        takes_s = unit.run_s + unit.bundles * self._bundle_s
        self._at(self._now_s + takes_s, partial(self._finish, job, unit, instance))

    def _finish(self, job: JobProgress, unit: WorkUnit, instance: ModelInstance) -> None:
        if unit not in instance.running:
            return  # the work unit was lost with its instance
        del instance.running[unit]
        template = job.work.job.template.stages[unit.stage]
        instance.free += template.slots
        instance.free_gpus += template.gpus
        if not instance.leaving:
            instance.pool.open[instance.name] = instance
        elif not instance.running:
            self._end(instance)
        stage = job.stages[unit.stage]
        stage.remaining -= unit.tasks
        stage.units -= 1
        stage.done += unit.tasks
        stage.done_s += unit.run_s
        for number, is_gather in self._followers[job.work.job.template.name][unit.stage]:
            self._release_followers(job, number, unit, is_gather=is_gather)
        if not any(progress.units for progress in job.stages):
            job.ended_s = self._now_s + self._calibration.end_s
            del self._open[job.work.job.index]
            self._at(job.ended_s, partial(self._begin_dependents, job.work.job.id))
        self._assign()

    def _begin_dependents(self, job: str) -> None:
        self._ended.add(job)
        for work in self._dependents.pop(job, ()):
            self._submit(work)

    def _release_followers(self, job: JobProgress, number: int, done: WorkUnit, *, is_gather: bool) -> None:
        stage, units = job.stages[number], job.work.stages[number]
        for unit in units if is_gather else units[done.number : done.number + 1]:
            stage.waits[unit.number] -= 1
            if not stage.waits[unit.number]:
                stage.planned = True
                self._queue(job, unit, first=not is_gather)

    def _start_policy_checks(self) -> None:
        """Check the scaling policy periodically until all jobs have ended and each pool has its minimum size."""
        if not self._checks_policy:
            self._checks_policy = True
            self._at(self._now_s, self._check_policy)

    def _check_policy(self) -> None:
        pools = {}
        for name, pool in self._pools.items():
            backlog = self._scale(pool)
            in_service = sum(instance.ready_s <= self._now_s for instance in pool.alive.values())
            pending = len(pool.alive) - in_service
            pools[name] = PoolSample(pool.desired, in_service, pending, backlog.tasks, backlog.seconds)
        self._samples.append(Sample(self._now_s, pools, 0, 0))
        is_quiet = not self._open and all(
            pool.desired == len(pool.alive) == self._minimum(pool)
            and all(instance.ready_s <= self._now_s for instance in pool.alive.values())
            for pool in self._pools.values()
        )
        if self._open and not self._events:
            self._cut = f"{len(self._open)} jobs had not ended, and nothing ran or booted"
        self._checks_policy = not (is_quiet or self._cut)
        if self._checks_policy:
            pause_s = self._check_s if self._now_s < self._due_s else self._manager.tick_s
            self._at(self._now_s + pause_s, self._check_policy)

    def _minimum(self, pool: ModelPool) -> int:
        if not self._scenario.prewarm:
            return pool.pool.min_size
        plans = (plan for plan in self._scenario.prewarm if plan.pool == pool.pool.name)
        sizes = [plan.min_size for plan in plans if plan.at_s <= self._now_s < plan.until_s]
        return max(pool.pool.min_size, *sizes, 0)

    def _backlog(self, name: str) -> Backlog:
        seconds, tasks, gpu_s, gpu_tasks = 0.0, 0, 0.0, 0
        for job in self._open.values():
            for stage, slots, gpus in job.by_pool.get(name, ()):
                if not stage.planned:
                    continue
                if stage.done:
                    mean_s = stage.done_s / stage.done
                else:
                    began_s = self._now_s if stage.began_s is None else stage.began_s
                    mean_s = max(UNKNOWN_TASK_S, self._now_s - began_s)
                seconds += stage.remaining * mean_s * slots
                tasks += stage.remaining * slots
                gpu_s += stage.remaining * mean_s * gpus
                gpu_tasks += stage.remaining * gpus
        return Backlog(seconds, tasks, gpu_s, gpu_tasks)

    def _scale(self, pool: ModelPool) -> Backlog:
        """Scale the pool as the manager's autoscaler and the pool's Auto Scaling group do.

        Return the pool's backlog.
        """
        backlog = self._backlog(pool.pool.name)
        minimum, limits = self._minimum(pool), pool.pool
        if minimum != limits.min_size:
            limits = replace(limits, min_size=minimum)
        desired, _ = capacity_for(backlog, limits, self._manager.drain_target_s)
        if backlog.tasks:
            pool.idle_since_s = None
        if desired > pool.desired:
            pool.desired = desired
        elif desired < pool.desired and self._may_shrink(pool, backlog):
            idle = [instance for instance in pool.open.values() if not instance.running]
            pending = [instance for instance in pool.alive.values() if instance.ready_s > self._now_s]
            for instance in [*idle, *pending][: pool.desired - desired]:
                pool.desired -= 1
                self._end(instance)
            pool.shrunk_s = self._now_s
        while len(pool.alive) < pool.desired:
            self._launch(pool, pool.pool.boot_s)
        return backlog

    def _may_shrink(self, pool: ModelPool, backlog: Backlog) -> bool:
        if not backlog.tasks:
            if pool.idle_since_s is None:
                pool.idle_since_s = self._now_s
            return self._now_s - pool.idle_since_s >= self._manager.idle_s
        if pool.shrunk_s is None:
            pool.shrunk_s = self._now_s
        return self._now_s - pool.shrunk_s >= self._manager.cooldown_in_s

    def _launch(self, pool: ModelPool, boot_s: float) -> None:
        name = f"{pool.pool.name}-{len(self._machines.lives)}"
        self._machines.launched(pool.pool, name)
        market = self._machines.lives[name].machine.market
        # On a backend without a Spot market, a Spot wave can interrupt any instance.
        is_spot = market is Market.SPOT or not self._has_market
        own = pool.pool
        pool.alive[name] = instance = ModelInstance(name, pool, own.slots, self._now_s + boot_s, is_spot, own.gpus)
        self._at(instance.ready_s, partial(self._on_boot, instance))

    def _on_boot(self, instance: ModelInstance) -> None:
        if instance.name in instance.pool.alive:
            self._machines.lives[instance.name].ready_s = self._now_s
            instance.pool.open[instance.name] = instance
            self._assign()

    def _end(self, instance: ModelInstance) -> None:
        del instance.pool.alive[instance.name]
        instance.pool.open.pop(instance.name, None)
        for unit in instance.running:
            self._queue(self._open[unit.job], unit)
        instance.running.clear()
        self._machines.ended(instance.name, "")

    def _interrupt_spot(self, fault: Fault) -> None:
        """Interrupt Spot Instances. An interrupted instance does not take more work and ends after the notice time."""
        pools = [pool for name, pool in self._pools.items() if fault.pool in ("", name)]
        spot = [
            instance
            for pool in pools
            for instance in pool.alive.values()
            if instance.is_spot and instance.ready_s <= self._now_s
        ]
        targets = spot[: fault.among(len(spot))]
        impossible = "" if targets else NO_INSTANCE.format(of=" on Spot" if self._has_market else "")
        names = tuple(instance.name for instance in targets)
        self._injected.append(InjectedFault(fault.name.value, self._now_s, names, impossible=impossible))
        for instance in targets:
            instance.leaving = True
            instance.pool.open.pop(instance.name, None)
            if instance.running:
                self._at(self._now_s + fault.notice_s, partial(self._terminate, instance))
            else:
                self._end(instance)
        self._start_policy_checks()

    def _terminate(self, instance: ModelInstance) -> None:
        if instance.name in instance.pool.alive:
            self._end(instance)
            self._assign()
