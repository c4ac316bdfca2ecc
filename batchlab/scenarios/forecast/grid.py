"""Simulated grid of a forecast: its world, its machines, and its sampler.

The manager, fleet, and worker objects are those of every backend, with the settings of the forecast
backend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.model import JobId, Pool
from batchlab.core.ports import MAX_WAIT_S, Objects
from batchlab.manager.admission import admit
from batchlab.manager.manager import LEASE, Manager
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.fault_timeline import FaultTimeline, FaultyQueue, ScenarioCallFaults, ServiceFaults
from batchlab.scenarios.forecast.jobs import DeclaredRunner, SimulatedWork, job_def
from batchlab.scenarios.forecast.machines import Machines, calibrated_pool, zone_names
from batchlab.scenarios.forecast.results import GridSampler
from batchlab.scenarios.model.values import FaultName, Job, Scenario
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Runner

READY_S = 600.0
"""Time in which permanent instances must be ready before the run, beyond their boot time."""

Examine = Callable[[World, Sequence[JobId]], Awaitable[None]]
"""Function that examines the world at the end of a run, with the submitted jobs."""


@dataclass(frozen=True, slots=True)
class ForecastOptions:
    """Rarely used options of a forecast.

    `fifo` and `max_wait_s` belong to the queue (see SimQueue). `watched` enables the runtime checks
    of the protocol. `examine` is called with the world at the end. Faults in `impossible` are
    skipped, with their reasons.
    """

    fifo: bool = False
    max_wait_s: float = MAX_WAIT_S
    watched: bool = False
    examine: Examine | None = None
    impossible: Mapping[FaultName, str] = field(default_factory=dict)


class ForecastGrid:
    """Simulated world of one scenario on the running SimLoop.

    `now_s` returns the run's time, which is negative until `come_up` returns.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        like: Backend,
        calibration: Calibration,
        jobs: Mapping[JobId, Job],
        log: list[str] | None,
        options: ForecastOptions,
    ) -> None:
        """Build the grid. Raise UsageError for unknown pools and impossible jobs."""
        self.pools: dict[str, Pool] = {plan.pool.name: calibrated_pool(plan, calibration) for plan in scenario.pools}
        self._admit(scenario)
        self._like, self._manager_s = like, calibration.manager_s
        policy = {key: s for key, s in asdict(scenario.policy).items() if s is not None}
        self.manager = replace(like.manager, **policy)
        self.worker = like.worker
        self.plays = SimulatedWork(seed, jobs, calibration, together_s=like.worker.control_lease_s)
        self.world = self._world(scenario, seed, calibration, log, options)
        self.machines = Machines(scenario.pools, zone_names(scenario.zones), self.now_s)
        launcher = self.world.launcher
        launcher.refuse = self.machines.refuse
        launcher.launched, launcher.ended = self.machines.launched, self.machines.ended
        self.timeline = FaultTimeline(
            scenario, like, self.world, self.machines, self.plays, self._trouble, self.now_s, options.impossible
        )
        self.watching = GridSampler(self.world, self.machines, self.manager.tick_s)
        self.base_s = 0.0
        """Loop time at second 0 of the run."""

    def _admit(self, scenario: Scenario) -> None:
        slots = {name: pool.slots for name, pool in self.pools.items()}
        for template in scenario.jobs.values():
            admit(job_def(Job(0, template.name, template, 0.0, 1), 0.0), slots)
        named = [prewarm.pool for prewarm in scenario.prewarm] + [fault.pool for fault in scenario.faults]
        for name in named:
            if name and name not in self.pools:
                raise UsageError(
                    f"The scenario names the pool {name!r}, which does not exist.",
                    remedy=f"Its pools are {', '.join(self.pools)}.",
                )

    def _world(
        self, scenario: Scenario, seed: int, calibration: Calibration, log: list[str] | None, options: ForecastOptions
    ) -> World:
        self._trouble = trouble = ServiceFaults()
        world = World(
            seed,
            tuple(self.pools.values()),
            make_runner=self._runner,
            manager_settings=self.manager,
            worker_settings=self.worker,
            logged=log is not None,
            watched=options.watched,
            sql=False,
        )
        world.faults = ScenarioCallFaults(world.rng("calls"), trouble, latency_s=calibration.call_s)
        world.queue = FaultyQueue(
            world.clock,
            world.rng("queue"),
            trouble,
            seed=seed,
            squeeze=scenario.compressed,
            fifo=options.fifo,
            max_wait_s=options.max_wait_s,
        )
        if options.watched:
            world.watch.queue = world.queue
            world.queue.lapsed = world.watch.lapsed
        if world.log is not None and log is not None:
            world.log.lines = log
        return world

    def _runner(self, world: World, die: Callable[[], None], _objects: Objects) -> Runner:
        return DeclaredRunner(self.plays, world.clock, die)

    def now_s(self) -> float:
        """Return the seconds since the start of the run."""
        return self.world.clock.monotonic_s() - self.base_s

    @property
    def leader(self) -> Manager | None:
        """Return the leading manager, or None."""
        manager = self.world.manager
        return manager if manager is not None and manager.is_leader.is_set() else None

    async def supervise(self) -> None:
        """Start managers one after another, as the backend does. This coroutine never returns."""
        world, rng = self.world, self.world.rng("supervisor")
        while True:
            await asyncio.wait([world.start_manager()])
            await self.timeline.may_start()
            await asyncio.sleep(rng.uniform(0.75, 1.25) * self._manager_s)
            if self._like.capabilities.keeps_home:
                await world.ledger.release(LEASE, world.last_owner)

    async def come_up(self) -> None:
        """Wait until a manager leads and the permanent instances are ready, then start the run.

        Raise UsageError on a timeout.
        """
        least = sum(pool.min_size for pool in self.pools.values())
        slowest_s = max((pool.boot_s for pool in self.pools.values()), default=0.0)
        limit_s = READY_S + 2 * slowest_s
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
        self.base_s = self.world.clock.monotonic_s()
        # A replay sets the Spot share only for later launches.
        self.machines.begin(ready, on_demand=self._like.capabilities.sets_spot_share)
        self.watching.begin(self.base_s)

    def is_down(self) -> bool:
        """Return whether every pool has shrunk to its minimum size."""
        leader = self.leader
        return leader is not None and all(
            view.desired == view.pool.min_size == self.machines.living(view.pool.name)
            for view in leader.groups.values()
        )

    async def ask(self, call: Callable[[Manager], object], name: str) -> object:
        """Call the leading manager until it answers. Raise its error if it refuses."""
        answer = await self.world.ask(call, name)
        if isinstance(answer, BatchlabError):
            raise answer
        return answer
