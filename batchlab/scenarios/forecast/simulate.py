"""Forecast: run of a scenario on a simulated grid in virtual time, with the manager, fleet, and worker of every
backend.

The record (without the wall time) and the event log depend only on scenario, seed, backend settings, calibration, and
price book.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from batchlab.core.errors import BatchlabError, Refused, UsageError
from batchlab.core.model import JobId
from batchlab.core.port_retries import Patience
from batchlab.core.ports import MAX_WAIT_S, Objects
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.manager import fleet_commands
from batchlab.manager.admission import admit
from batchlab.manager.manager import LEASE, Manager
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.fault_timeline import FaultTimeline, FaultyQueue, ScenarioCallFaults, ServiceFaults
from batchlab.scenarios.forecast.results import ForecastSetup, GridSampler, ResultCounter
from batchlab.scenarios.forecast.simulated_work import (
    DeclaredRunner,
    Machines,
    SimulatedWork,
    job_def,
    store_items,
    zone_names,
)
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import FaultName, Job, Prewarm, Scenario
from batchlab.scenarios.record import JobRun, Record, unrefused
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.fuzz import silence
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Runner

DEFAULT_BACKEND = "aws"
"""Backend whose settings a forecast uses by default."""

READY_S = 600.0
"""Time in seconds, in addition to the boot time, within which permanent instances must be ready before the run."""

STALL_LIMIT_S = 4 * 3600.0
"""Time in seconds after which a run is ended early if the run does not have any work or later events."""

SHRINK_LIMIT_S = 3600.0
"""Time in seconds within which the fleet must shrink to its minimum size after the end of the last job."""

SUBMIT_CALLS = 4
"""Number of port calls from a job's submission to the receive of the job's first bundle.

Each port call takes the time of one simulated latency.
"""

Examine = Callable[[World, Sequence[JobId]], Awaitable[None]]
"""Function that examines the world at the end of a run, with the submitted jobs."""


@dataclass(frozen=True, slots=True)
class ForecastOptions:
    """Options of a forecast that most callers do not need.

    `fifo` and `max_wait_s` are options of the queue (see SimQueue). `watched` enables the runtime checks of the
    protocol. `examine` is called with the simulated world at the end of the run. `impossible` maps each fault that is
    skipped to the reason.
    """

    fifo: bool = False
    max_wait_s: float = MAX_WAIT_S
    watched: bool = False
    examine: Examine | None = None
    impossible: Mapping[FaultName, str] = field(default_factory=dict)


DEFAULT_OPTIONS = ForecastOptions()


@dataclass(frozen=True, slots=True)
class SimulationProgress:
    """Progress of a simulated run: the time of the run, and numbers of jobs."""

    at_s: float
    submitted: int
    ended: int
    jobs: int


def simulate(
    scenario: Scenario,
    *,
    seed: int | None = None,
    like: Backend | None = None,
    calibration: Calibration | None = None,
    log: list[str] | None = None,
    progress: Callable[[SimulationProgress], None] | None = None,
    options: ForecastOptions = DEFAULT_OPTIONS,
    book: PriceBook | None = None,
) -> Record:
    """Run the scenario and its faults to their end.

    `seed` replaces the scenario's own seed. `like` is the backend whose settings apply (default: aws). The function
    appends the lines of the event log to `log`. The default of `book` is the shipped price book. Raise UsageError for a
    scenario that no grid can run.
    """
    begun_s = time.monotonic()
    backend = factory.load(DEFAULT_BACKEND) if like is None else like
    seed = scenario.seed if seed is None else seed
    prices = price_book.load() if book is None else book
    setup = ForecastSetup(scenario, seed, backend, calibration or backend.usual, prices)
    with silence():
        record = SimLoop(inline_executor=True).run(_Simulation(setup, log, progress, options).run())
    return replace(record, wall_s=time.monotonic() - begun_s)


class ForecastGrid:
    """Simulated world of one scenario on the running SimLoop.

    `now_s` returns the time of the run in seconds, which is negative until `come_up` returns.
    """

    def __init__(
        self, setup: ForecastSetup, jobs: Mapping[JobId, Job], log: list[str] | None, options: ForecastOptions
    ) -> None:
        """Build the simulated grid. Raise UsageError for unknown pools and impossible jobs."""
        scenario, backend = setup.scenario, setup.backend
        self._backend, self._manager_s = backend, setup.calibration.manager_s
        self._shares = scenario.shares
        self.pools = setup.pools()
        self._check_names(scenario)
        self.manager = setup.manager()
        self.work = SimulatedWork(setup.seed, jobs, setup.calibration, together_s=backend.worker.control_lease_s)
        services = ServiceFaults()
        self.world = self._create_world(setup, services, log, options)
        self.machines = Machines(scenario.pools, zone_names(scenario.zones), self.now_s)
        launcher = self.world.launcher
        launcher.refuse = self.machines.refuse
        launcher.launched, launcher.ended = self.machines.launched, self.machines.ended
        self.timeline = FaultTimeline(
            scenario, backend, self.world, self.machines, self.work, services, self.now_s, options.impossible
        )
        self.sampler = GridSampler(self.world, self.machines, self.manager.tick_s)
        self.base_s = 0.0
        """Time of the event loop at second 0 of the run."""

    def _check_names(self, scenario: Scenario) -> None:
        slots = {name: pool.slots for name, pool in self.pools.items()}
        gpus = {name: pool.gpus for name, pool in self.pools.items()}
        for template in scenario.jobs.values():
            admit(job_def(Job(0, template.name, template, 0.0, 1), 0.0), slots, gpus=gpus)
        for name in [prewarm.pool for prewarm in scenario.prewarm] + [fault.pool for fault in scenario.faults]:
            if name and name not in self.pools:
                raise UsageError(
                    f"The scenario names the pool {name!r}, which does not exist.",
                    remedy=f"Its pools are {', '.join(self.pools)}.",
                )

    def _create_world(
        self, setup: ForecastSetup, services: ServiceFaults, log: list[str] | None, options: ForecastOptions
    ) -> World:
        def runner(world: World, die: Callable[[], None], _objects: Objects) -> Runner:
            return DeclaredRunner(self.work, world.clock, die)

        world = World(
            setup.seed,
            tuple(self.pools.values()),
            make_runner=runner,
            manager_settings=self.manager,
            worker_settings=setup.backend.worker,
            logged=log is not None,
            watched=options.watched,
            sql=False,
            shares=setup.scenario.shares is not None,
        )
        world.faults = ScenarioCallFaults(world.rng("calls"), services, latency_s=setup.calibration.call_s)
        world.queue = FaultyQueue(
            world.clock,
            world.rng("queue"),
            services,
            seed=setup.seed,
            compressed=setup.scenario.compressed,
            fifo=options.fifo,
            max_wait_s=options.max_wait_s,
        )
        if options.watched:
            world.watch.queue = world.queue
            world.queue.lapsed = world.watch.on_lapse
        if world.log is not None and log is not None:
            world.log.lines = log
        return world

    def now_s(self) -> float:
        """Return the seconds since the start of the run."""
        return self.world.clock.monotonic_s() - self.base_s

    @property
    def leader(self) -> Manager | None:
        """Return the leading manager, or None if no manager leads."""
        manager = self.world.manager
        return manager if manager is not None and manager.is_leader.is_set() else None

    async def supervise(self) -> None:
        """Start managers one after another, as the backend does. The coroutine `supervise` never returns."""
        world, rng = self.world, self.world.rng("supervisor")
        while True:
            await asyncio.wait([world.start_manager()])
            await self.timeline.wait_for_restart()
            await asyncio.sleep(rng.uniform(0.75, 1.25) * self._manager_s)
            if self._backend.capabilities.keeps_home:
                await world.ledger.release(LEASE, world.last_owner)

    async def come_up(self) -> None:
        """Wait until a manager leads and the permanent instances are ready, and then start the simulated run.

        Raise UsageError if the grid is not ready in time.
        """
        least = sum(pool.min_size for pool in self.pools.values())
        limit_s = READY_S + 2 * max((pool.boot_s for pool in self.pools.values()), default=0.0)
        while True:
            leader = self.leader
            ready = list(leader.registry.workers) if leader is not None else []
            if leader is not None and leader.groups and len(ready) >= least:
                break
            if self.now_s() > limit_s:
                raise UsageError(
                    f"Only {len(ready)} of the {least} permanent instances were ready in {limit_s:.0f} s.",
                    remedy="Give their pools a lower min or a shorter boot time.",
                )
            await asyncio.sleep(min(1.0, self.manager.tick_s))
        if (policy := self._shares) is not None:
            await self.ask(lambda manager: manager.fair_share.change(lambda _: policy), "set the fair-share policy")
        self.base_s = self.world.clock.monotonic_s()
        # A replay sets the Spot share only for launches after the start of the replay.
        self.machines.begin(ready, on_demand=self._backend.capabilities.sets_spot_share)
        self.sampler.begin(self.base_s)

    def is_down(self) -> bool:
        """Return whether every pool has shrunk to its minimum size."""
        leader = self.leader
        return leader is not None and all(
            view.desired == view.pool.min_size == self.machines.living(view.pool.name)
            for view in leader.groups.values()
        )

    async def ask(self, call: Callable[[Manager], object], name: str) -> object:
        """Call the leading manager until the manager answers.

        Raise the manager's error if the manager refuses the call.
        """
        answer = await self.world.ask(call, name)
        if isinstance(answer, BatchlabError):
            raise answer
        return answer


class _Simulation:
    def __init__(
        self,
        setup: ForecastSetup,
        log: list[str] | None,
        progress: Callable[[SimulationProgress], None] | None,
        options: ForecastOptions,
    ) -> None:
        self._setup, self._scenario = setup, setup.scenario
        self._log, self._progress, self._options = log, progress, options
        self._jobs = expand(setup.scenario, setup.seed).jobs
        self._submitted_s: dict[str, float] = {}
        self._open: dict[str, None] = {}
        """Ids of submitted jobs whose end has not been observed yet."""
        self._refused: dict[str, JobRun] = {}
        """Jobs whose submission was refused because of a failed dependency, by id."""
        self._answered = {JobId(other.job): asyncio.Event() for job in self._jobs for other in job.after}
        """Events that are set when a manager has answered the submission of a job on which other jobs depend."""
        self._progress_s = 0.0
        """Time of the run at the last observed progress."""
        self._begun = 0
        self._cut = ""

    async def run(self) -> Record:
        jobs = {JobId(job.id): job for job in self._jobs}
        self._grid = ForecastGrid(self._setup, jobs, self._log, self._options)
        supervisor = asyncio.create_task(self._grid.supervise(), name="supervisor")
        try:
            await self._grid.come_up()
            await self._run_to_end()
            return await self._record()
        finally:
            supervisor.cancel()
            await self._grid.world.ledger.close()

    async def _run_to_end(self) -> None:
        grid = self._grid
        tasks = [
            asyncio.create_task(grid.timeline.run(), name="timeline"),
            *(asyncio.create_task(self._prewarm(prewarm)) for prewarm in self._scenario.prewarm),
            asyncio.create_task(self._submit_all(), name="arrivals"),
        ]
        ended_s: float | None = None
        while True:
            await asyncio.sleep(grid.manager.tick_s)
            await grid.sampler.look()
            await self._find_ended_jobs()
            for task in tasks:
                if task.done():
                    task.result()
            if self._progress:
                submitted = len(self._submitted_s)
                ended = submitted - len(self._open)
                self._progress(SimulationProgress(grid.now_s(), submitted, ended, len(self._jobs)))
            if not all(task.done() for task in tasks):
                continue
            if self._open:
                stalled_s = grid.now_s() - self._progress_s
                if stalled_s >= STALL_LIMIT_S:
                    self._cut = f"{len(self._open)} jobs had not ended, and nothing had run for {stalled_s:.0f} s"
                    return
                continue
            ended_s = grid.now_s() if ended_s is None else ended_s
            if grid.is_down() or grid.now_s() - ended_s > SHRINK_LIMIT_S:
                return

    async def _submit_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for job in self._jobs:
                if (wait_s := job.due_s - self._grid.now_s()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._submit(job), name=f"submit {job.id}")

    async def _submit(self, job: Job) -> None:
        grid, world, calibration = self._grid, self._grid.world, self._setup.calibration
        for other in job.after:
            await self._answered[other.job].wait()
        self._submitted_s[job.id] = grid.now_s()
        self._open[job.id] = None
        calls_s = SUBMIT_CALLS * sum(calibration.call_s) / 2
        if (extra_s := calibration.submit_s - calls_s) > 0:
            await asyncio.sleep(extra_s)
        after = unrefused(job.after, self._refused)
        definition = replace(job_def(job, world.clock.now_s()), after=after)
        items = await store_items(definition, world.objects, Patience(world.rng(f"client/{job.id}")))
        try:
            await grid.ask(lambda manager: manager.job_commands.submit(definition, items), f"submit {job.id}")
        except Refused:
            if not after:
                raise
            self._refused[job.id] = JobRun.refused(job, grid.now_s())
            del self._open[job.id]
        if job.id in self._answered:
            self._answered[JobId(job.id)].set()

    async def _prewarm(self, plan: Prewarm) -> None:
        """Keep the pool prewarmed until the end of the plan. The minimum size is sent again to each new leader."""
        grid = self._grid
        await asyncio.sleep(max(0.0, plan.at_s - grid.now_s()))
        managers = 0
        while (rest_s := plan.until_s - grid.now_s()) > 0:
            if managers != grid.world.managers:
                managers = grid.world.managers
                await self._set_minimum(plan.pool)
            await asyncio.sleep(min(grid.manager.lease_ttl_s, rest_s))
        await self._set_minimum(plan.pool)

    async def _set_minimum(self, pool: str) -> None:
        """Set the pool's minimum size to the size that is planned for the current time."""
        now_s, plans = self._grid.now_s(), self._scenario.prewarm
        sizes = [plan.min_size for plan in plans if plan.pool == pool and plan.at_s <= now_s < plan.until_s]
        least = max(self._grid.pools[pool].min_size, *sizes, 0)
        await self._grid.ask(lambda manager: fleet_commands.scale(manager, pool, min_size=least), f"prewarm {pool}")

    async def _find_ended_jobs(self) -> None:
        grid, work = self._grid, self._grid.work
        leader = grid.leader
        if leader is None:
            return
        before = len(self._open)
        for job in [job for job in self._open if job not in leader.lives]:
            record = await grid.world.find(JobId(job))
            if record is not None and record.state.ended:
                del self._open[job]
        if before != len(self._open) or work.running or work.begun != self._begun:
            self._progress_s, self._begun = grid.now_s(), work.begun

    async def _record(self) -> Record:
        grid, world, setup = self._grid, self._grid.world, self._setup
        end_s = grid.now_s()
        counter = ResultCounter(world.objects, world.ledger, grid.work, world.clock.now_s() - end_s, grid.base_s)
        accepted = [job for job in self._jobs if job.id not in self._refused]
        results = await counter.count(accepted, self._submitted_s, setup.calibration.end_s)
        if self._options.examine is not None:
            await self._options.examine(world, [JobId(job.id) for job in accepted if job.id in self._submitted_s])
        instances = grid.machines.runs()
        settings: dict[str, float] = {**asdict(grid.manager)}
        settings.update({f"worker.{name}": value for name, value in asdict(setup.backend.worker).items()})
        settings["cores"] = setup.calibration.cores
        return setup.record(
            results=results,
            jobs=tuple(sorted([*results.jobs, *self._refused.values()], key=lambda job: job.index)),
            stages=results.stages(self._jobs),
            samples=grid.sampler.samples,
            instances=instances,
            end_s=end_s,
            faults=tuple(grid.timeline.injected),
            lost=results.lost,
            duplicates=results.duplicates,
            instance_s=sum(instance.lived_s(end_s) for instance in instances),
            again_s=results.again_s,
            settings=settings,
            log_digest=world.log.digest() if world.log else "",
            cut=self._cut,
        )
