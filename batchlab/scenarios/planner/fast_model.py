"""Fast model of a run: tasks, slots, boots, and the grid's scaling policy.

The model has no messages, manager, or protocol, so it takes a hundredth of a forecast's time and is
less precise. It selects the candidates that are worth a forecast.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from batchlab.core.model import GroupView, Market
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.manager.autoscaler import desired_capacity
from batchlab.manager.state import UNKNOWN_TASK_S, Backlog, ManagerSettings
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.fault_timeline import NO_INSTANCE
from batchlab.scenarios.forecast.machines import Machines, calibrated_pool, zone_names
from batchlab.scenarios.forecast.results import Results, compute_bill
from batchlab.scenarios.forecast.simulate import SHRINK_LIMIT_S
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
    job_run,
    split_jobs,
    stage_runs,
    stages_known_at_start,
)
from batchlab.scenarios.record import InjectedFault, PoolSample, Record
from batchlab.scenarios.record import Sample as Seen

MAX_POLICY_CHECKS = 2000
"""Maximum number of policy checks while jobs arrive.

Later checks happen at each tick of the policy.
"""


@dataclass(slots=True)
class FastModel:
    """Fast runs of one scenario with any fleet and policy.

    Without a calibration, the backend's usual values apply. The model is pickled for several
    processes, and each caches the work of its seeds.
    """

    backend: str
    calibration: Calibration | None = None
    book: PriceBook = field(default_factory=price_book.load)
    _works: dict[int, tuple[JobWork, ...]] = field(default_factory=dict)

    def __call__(self, scenario: Scenario, seed: int) -> Record:
        """Run the model. Raise UsageError for an unknown backend."""
        like = factory.load(self.backend)
        calibration = self.calibration or like.usual
        if seed not in self._works:
            schedule = expand(scenario, seed)
            self._works[seed] = split_jobs(schedule, seed, calibration)
        run = _FastRun(scenario, seed, like, calibration, self._works[seed], self.book)
        return run.record()


class _FastRun:
    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        like: Backend,
        calibration: Calibration,
        work: tuple[JobWork, ...],
        book: PriceBook,
    ) -> None:
        self._scenario, self._seed, self._calibration = scenario, seed, calibration
        self._like, self._work, self._book = like, work, book
        shared_s = calibration.bundle_cpu_s if calibration.cores else 0.0
        self._bundle_s = calibration.bundle_s + shared_s
        said = {key: s for key, s in asdict(scenario.policy).items() if s is not None}
        self._manager: ManagerSettings = replace(like.manager, **said)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._jobs: list[JobProgress] = []
        self._open: dict[int, JobProgress] = {}
        self._pools = {plan.pool.name: ModelPool(calibrated_pool(plan, calibration), 0) for plan in scenario.pools}
        self._machines = Machines(scenario.pools, zone_names(scenario.zones), lambda: self._now_s)
        self._samples: list[Seen] = []
        self._injected: list[InjectedFault] = []
        self._looks = False
        self._cut = ""
        self._due_s = work[-1].job.due_s if work else 0.0
        """Due time of the last job."""
        self._look_s = max(self._manager.tick_s, self._due_s / MAX_POLICY_CHECKS)

    def _at(self, at_s: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, what))

    def record(self) -> Record:
        """Run to the end and return the record."""
        for pool in self._pools.values():
            for _ in range(pool.pool.min_size):
                self._launch(pool, boot_s=0.0)
            pool.desired = pool.pool.min_size
        for work in self._work:
            at_s = work.job.due_s + self._calibration.submit_s
            self._at(at_s, partial(self._submit, work))
        ends = end_times_s(self._scenario)
        for at_s in (*(warm.at_s for warm in self._scenario.prewarm), *ends):
            self._at(at_s, self._wake)
        for fault in self._scenario.faults:
            if fault.name is FaultName.SPOT_WAVE:
                self._at(fault.at_s, partial(self._wave, fault))
        rest_s: float | None = None
        while self._events:
            at_s, _, what = heapq.heappop(self._events)
            if rest_s is not None and at_s > rest_s:
                break
            self._now_s = at_s
            what()
            is_done = len(self._jobs) == len(self._work) and not self._open
            if rest_s is None and is_done and at_s >= max(ends, default=0.0):
                rest_s = at_s + SHRINK_LIMIT_S
        return self._told()

    def _submit(self, work: JobWork) -> None:
        template = work.job.template
        stages, at_once = [], stages_known_at_start(template.stages)
        places = {stage.name: n for n, stage in enumerate(template.stages)}
        for number, stage in enumerate(template.stages):
            pieces = work.stages[number]
            befores = [work.stages[places[name]] for name in stage.after]
            waits = len(stage.after) if stage.gather is None else sum(map(len, befores))
            tasks = sum(piece.tasks for piece in pieces)
            stages.append(StageProgress(stage.name in at_once, tasks, len(pieces), [waits] * len(pieces)))
        job = JobProgress(work, stages)
        self._jobs.append(job)
        self._open[work.job.index] = job
        for number, stage in enumerate(template.stages):
            if not stage.after:
                for piece in work.stages[number]:
                    self._ready(job, piece)
        self._wake()
        self._serve()

    def _ready(self, job: JobProgress, piece: WorkUnit, *, ahead: bool = False) -> None:
        """Queue a unit. With `ahead`, the worker of its predecessor continues with it."""
        template = job.work.job.template
        pool = self._pools[template.stages[piece.stage].pool]
        jobs = pool.ready.setdefault(template.priority, {})
        pieces = jobs.setdefault(piece.job, deque())
        if ahead:
            pieces.appendleft(piece)
        else:
            pieces.append(piece)

    def _serve(self) -> None:
        """Assign ready units to free instances. Jobs of equal priority take turns."""
        for pool in self._pools.values():
            while pool.ready and pool.open:
                priority = max(pool.ready)
                jobs = pool.ready[priority]
                number, pieces = next(iter(jobs.items()))
                job = self._open[number]
                slots = job.work.job.template.stages[pieces[0].stage].slots
                # On a real grid the order is random; the instance with the least work usually asks
                # first.
                free = max(pool.open.values(), key=lambda one: one.free)
                if free.free < slots:
                    break
                piece = pieces.popleft()
                del jobs[number]
                if pieces:
                    jobs[number] = pieces
                elif not jobs:
                    del pool.ready[priority]
                self._begin(job, piece, free, slots)

    def _begin(self, job: JobProgress, piece: WorkUnit, on: ModelInstance, slots: int) -> None:
        on.running[piece] = None
        on.free -= slots
        if not on.free:
            del on.pool.open[on.name]
        stage = job.stages[piece.stage]
        if job.started_s is None:
            job.started_s = self._now_s
        if stage.began_s is None:
            stage.began_s = self._now_s
        takes_s = piece.run_s + piece.bundles * self._bundle_s
        self._at(self._now_s + takes_s, partial(self._done, job, piece, on, slots))

    def _done(self, job: JobProgress, piece: WorkUnit, on: ModelInstance, slots: int) -> None:
        if piece not in on.running:
            return  # it went with its instance
        del on.running[piece]
        on.free += slots
        if not on.leaving:
            on.pool.open[on.name] = on
        elif not on.running:
            self._end(on)
        stage = job.stages[piece.stage]
        stage.left -= piece.tasks
        stage.pieces -= 1
        stage.done += piece.tasks
        stage.done_s += piece.run_s
        name = job.work.job.template.stages[piece.stage].name
        for number, after in enumerate(job.work.job.template.stages):
            if name in after.after:
                self._follow(job, number, piece, is_gather=after.gather is not None)
        if not any(stage_progress.pieces for stage_progress in job.stages):
            job.ended_s = self._now_s + self._calibration.end_s
            del self._open[job.work.job.index]
        self._serve()

    def _follow(self, job: JobProgress, number: int, piece: WorkUnit, *, is_gather: bool) -> None:
        stage, pieces = job.stages[number], job.work.stages[number]
        for work_unit in pieces if is_gather else pieces[piece.number : piece.number + 1]:
            stage.waits[work_unit.number] -= 1
            if not stage.waits[work_unit.number]:
                stage.planned = True
                self._ready(job, work_unit, ahead=not is_gather)

    def _wake(self) -> None:
        """Start the periodic policy checks, until no decision is left."""
        if not self._looks:
            self._looks = True
            self._at(self._now_s, self._look)

    def _look(self) -> None:
        self._see({name: self._scale(pool) for name, pool in self._pools.items()})
        is_quiet = not self._open and all(
            pool.desired == len(pool.alive) == self._least(pool)
            and all(model_instance.ready_s <= self._now_s for model_instance in pool.alive.values())
            for pool in self._pools.values()
        )
        if self._open and not self._events:
            self._cut = f"{len(self._open)} jobs had not ended, and nothing ran or booted"
        self._looks = not (is_quiet or self._cut)
        if self._looks:
            still = self._look_s if self._now_s < self._due_s else self._manager.tick_s
            self._at(self._now_s + still, self._look)

    def _least(self, pool: ModelPool) -> int:
        warm = [
            prewarm.min_size
            for prewarm in self._scenario.prewarm
            if prewarm.pool == pool.pool.name and prewarm.at_s <= self._now_s < prewarm.until_s
        ]
        return max(pool.pool.min_size, *warm, 0)

    def _backlog(self, name: str) -> Backlog:
        seconds, tasks = 0.0, 0
        for job in self._open.values():
            for template, stage in zip(job.work.job.template.stages, job.stages, strict=True):
                if template.pool != name or not stage.planned:
                    continue
                if stage.done:
                    mean_s = stage.done_s / stage.done
                else:
                    began_s = self._now_s if stage.began_s is None else stage.began_s
                    mean_s = max(UNKNOWN_TASK_S, self._now_s - began_s)
                seconds += stage.left * mean_s * template.slots
                tasks += stage.left * template.slots
        return Backlog(seconds, tasks)

    def _scale(self, pool: ModelPool) -> Backlog:
        """Scale the pool like the manager's autoscaler and its group. Return the backlog."""
        name = pool.pool.name
        backlog = self._backlog(name)
        limits = replace(pool.pool, min_size=self._least(pool))
        desired, _ = desired_capacity(backlog, GroupView(limits, pool.desired, ()), self._manager.drain_target_s)
        if backlog.tasks:
            pool.idle_since_s = None
        if desired > pool.desired:
            pool.desired = desired
        elif desired < pool.desired and self._may_shrink(pool, backlog):
            idle = [model_instance for model_instance in pool.open.values() if not model_instance.running]
            coming = [model_instance for model_instance in pool.alive.values() if model_instance.ready_s > self._now_s]
            for model_instance in [*idle, *coming][: pool.desired - desired]:
                pool.desired -= 1
                self._end(model_instance)
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
        # Processes have no market, so a wave can hit any of them.
        is_spot = market is Market.SPOT or self._like.capabilities.one_machine
        slots = pool.pool.slots
        model_instance = ModelInstance(name, pool, slots, self._now_s + boot_s, is_spot)
        pool.alive[name] = model_instance
        self._at(model_instance.ready_s, partial(self._booted, model_instance))

    def _booted(self, one: ModelInstance) -> None:
        if one.name not in one.pool.alive:
            return
        self._machines.lives[one.name].ready_s = self._now_s
        one.pool.open[one.name] = one
        self._serve()

    def _end(self, one: ModelInstance) -> None:
        """End an instance and queue its units again."""
        del one.pool.alive[one.name]
        one.pool.open.pop(one.name, None)
        for piece in one.running:
            self._ready(self._open[piece.job], piece)
        one.running.clear()
        self._machines.ended(one.name, "")

    def _wave(self, fault: Fault) -> None:
        """Interrupt Spot Instances: they take no more work and end after the notice."""
        pools = [pool for name, pool in self._pools.items() if fault.pool in ("", name)]
        model_instances = [model_instance for pool in pools for model_instance in pool.alive.values()]
        hit = [
            model_instance
            for model_instance in model_instances
            if model_instance.is_spot and model_instance.ready_s <= self._now_s
        ]
        hit = hit[: fault.among(len(hit))]
        market = "" if self._like.capabilities.one_machine else " on Spot"
        why = "" if hit else NO_INSTANCE.format(of=market)
        names = tuple(model_instance.name for model_instance in hit)
        self._injected.append(InjectedFault(fault.name.value, self._now_s, names, impossible=why))
        for model_instance in hit:
            model_instance.leaving = True
            model_instance.pool.open.pop(model_instance.name, None)
            if model_instance.running:
                self._at(self._now_s + fault.notice_s, partial(self._taken, model_instance))
            else:
                self._end(model_instance)
        self._wake()

    def _taken(self, one: ModelInstance) -> None:
        if one.name in one.pool.alive:
            self._end(one)
            self._serve()

    def _see(self, backlogs: Mapping[str, Backlog]) -> None:
        pools = {}
        for name, pool in self._pools.items():
            there = sum(model_instance.ready_s <= self._now_s for model_instance in pool.alive.values())
            coming, backlog = len(pool.alive) - there, backlogs[name]
            pools[name] = PoolSample(pool.desired, there, coming, backlog.tasks, backlog.seconds)
        self._samples.append(Seen(self._now_s, pools, 0, 0))

    def _told(self) -> Record:
        end_s = self._now_s
        instances = self._machines.runs()
        stages = tuple(stage_runs(self._scenario, self._work))
        pools = {name: pool.pool for name, pool in self._pools.items()}
        bundles = sum(p.bundles for w in self._work for pieces in w.stages for p in pieces)
        bill = compute_bill(
            pools=pools,
            instances=instances,
            stages=stages,
            results=Results(bundles=bundles),
            book=self._book,
            manager=self._manager,
            worker=self._like.worker,
            over_s=end_s,
        )
        return Record(
            self._scenario.name,
            self._scenario.digest,
            self._seed,
            self._like.name,
            self._scenario.compressed,
            {name: (pool.min_size, pool.max_size, pool.slots) for name, pool in pools.items()},
            tuple(map(job_run, self._jobs)),
            stages,
            tuple(self._samples),
            instances,
            tuple(self._injected),
            lost=sum(stage.left for job in self._open.values() for stage in job.stages),
            usd=bill.usd.typical,
            simulated=True,
            cut=self._cut,
        )
