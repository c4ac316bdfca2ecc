"""Forecast: run of a scenario on the simulated grid in virtual time.

The record (without the wall time) and the event log depend only on the scenario, the seed, the
backend's settings, the calibration, and the price book.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from batchlab.core.model import JobId
from batchlab.core.port_retries import Patience
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.manager import fleet_commands
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.grid import ForecastGrid, ForecastOptions
from batchlab.scenarios.forecast.jobs import job_def, store_items
from batchlab.scenarios.forecast.results import ResultCounter, compute_bill
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, Prewarm, Scenario, Schedule
from batchlab.scenarios.record import Record
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.fuzz import silence

DEFAULT_BACKEND = "aws"
"""Default backend of a forecast's settings."""

STALL_LIMIT_S = 4 * 3600.0
"""A run without any work for this time, and without later events, is cut."""

SHRINK_LIMIT_S = 3600.0
"""Time in which the fleet must shrink to its minimum after the last job's end."""

SUBMIT_CALLS = 4
"""Port calls from a submission to the receive of its first bundle. Each takes one latency."""

DEFAULT_OPTIONS = ForecastOptions()


@dataclass(frozen=True, slots=True)
class SimulationProgress:
    """Progress of a simulated run: its time, and numbers of jobs."""

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

    `seed` replaces the scenario's own. `like` is the backend whose settings apply (default: aws).
    Lines of the event log are appended to `log`. Without `book`, the shipped price book applies.
    Raise UsageError for a scenario that no grid can run.
    """
    begun_s = time.monotonic()
    run = _Simulation(
        scenario,
        scenario.seed if seed is None else seed,
        factory.load(DEFAULT_BACKEND) if like is None else like,
        calibration,
        log,
        progress,
        options,
        price_book.load() if book is None else book,
    )
    with silence():
        record = SimLoop(inline_executor=True).run(run.main())
    return replace(record, wall_s=time.monotonic() - begun_s)


class _Simulation:
    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        like: Backend,
        calibration: Calibration | None,
        log: list[str] | None,
        progress: Callable[[SimulationProgress], None] | None,
        options: ForecastOptions,
        book: PriceBook,
    ) -> None:
        self._scenario, self._seed, self._like = scenario, seed, like
        self._book = book
        self._calibration = calibration or like.usual
        self._log, self._progress, self._options = log, progress, options
        self._schedule: Schedule = expand(scenario, seed)
        self._submitted_s: dict[str, float] = {}
        self._open: dict[str, None] = {}
        """Submitted jobs that are not known to have ended."""
        self._moved_s = 0.0
        """Run time of the last observed progress."""
        self._begun = 0
        self._cut = ""

    async def main(self) -> Record:
        jobs = {JobId(job.id): job for job in self._schedule.jobs}
        self._grid = ForecastGrid(
            scenario=self._scenario,
            seed=self._seed,
            like=self._like,
            calibration=self._calibration,
            jobs=jobs,
            log=self._log,
            options=self._options,
        )
        supervisor = asyncio.create_task(self._grid.supervise(), name="supervisor")
        try:
            await self._grid.come_up()
            await self._live()
            return await self._told()
        finally:
            supervisor.cancel()
            await self._grid.world.ledger.close()

    async def _live(self) -> None:
        grid = self._grid
        todo = [
            asyncio.create_task(grid.timeline.run(), name="timeline"),
            *(asyncio.create_task(self._warm(prewarm)) for prewarm in self._scenario.prewarm),
            asyncio.create_task(self._arrive(), name="arrivals"),
        ]
        ended_s: float | None = None
        while True:
            await asyncio.sleep(grid.manager.tick_s)
            await grid.watching.look()
            await self._look_for_ends()
            for task in todo:
                if task.done():
                    task.result()
            if self._progress:
                sent = len(self._submitted_s)
                ended = sent - len(self._open)
                self._progress(SimulationProgress(grid.now_s(), sent, ended, len(self._schedule.jobs)))
            if not all(task.done() for task in todo):
                continue
            if self._open:
                if self._stands_still():
                    return
                continue
            ended_s = grid.now_s() if ended_s is None else ended_s
            if grid.is_down() or grid.now_s() - ended_s > SHRINK_LIMIT_S:
                return

    async def _arrive(self) -> None:
        async with asyncio.TaskGroup() as group:
            for job in self._schedule.jobs:
                if (left_s := job.due_s - self._grid.now_s()) > 0:
                    await asyncio.sleep(left_s)
                group.create_task(self._submit(job), name=f"submit {job.id}")

    async def _submit(self, job: Job) -> None:
        grid, world = self._grid, self._grid.world
        self._submitted_s[job.id] = grid.now_s()
        self._open[job.id] = None
        calls_s = SUBMIT_CALLS * sum(self._calibration.call_s) / 2
        if (extra_s := self._calibration.submit_s - calls_s) > 0:
            await asyncio.sleep(extra_s)
        made = job_def(job, world.clock.now_s())
        items = await store_items(made, world.objects, Patience(world.rng(f"client/{job.id}")))
        await grid.ask(lambda m: m.job_commands.submit(made, items), f"submit {job.id}")

    async def _warm(self, plan: Prewarm) -> None:
        """Keep the pool prewarmed for a while. A new leader gets the size again."""
        grid = self._grid
        await asyncio.sleep(max(0.0, plan.at_s - grid.now_s()))
        led = 0
        while (left_s := plan.until_s - grid.now_s()) > 0:
            if led != grid.world.managers:
                led = grid.world.managers
                await self._at_least(plan.pool)
            await asyncio.sleep(min(grid.manager.lease_ttl_s, left_s))
        await self._at_least(plan.pool)

    async def _at_least(self, pool: str) -> None:
        """Set the pool's minimum to the value planned for now."""
        now_s = self._grid.now_s()
        planned = [
            prewarm.min_size
            for prewarm in self._scenario.prewarm
            if prewarm.pool == pool and prewarm.at_s <= now_s < prewarm.until_s
        ]
        least = max(self._grid.pools[pool].min_size, *planned, 0)
        await self._grid.ask(lambda m: fleet_commands.scale(m, pool, min_size=least), f"prewarm {pool}")

    async def _look_for_ends(self) -> None:
        grid, plays = self._grid, self._grid.plays
        leader = grid.leader
        if leader is None:
            return
        before = len(self._open)
        for job in [one for one in self._open if one not in leader.lives]:
            record = await grid.world.find(JobId(job))
            if record is not None and record.state.ended:
                del self._open[job]
        if before != len(self._open) or plays.running or plays.begun != self._begun:
            self._moved_s, self._begun = grid.now_s(), plays.begun

    def _stands_still(self) -> bool:
        still_s = self._grid.now_s() - self._moved_s
        if still_s >= STALL_LIMIT_S:
            self._cut = f"{len(self._open)} jobs had not ended, and nothing had run for {still_s:.0f} s"
        return bool(self._cut)

    async def _told(self) -> Record:
        grid, scenario, world = self._grid, self._scenario, self._grid.world
        end_s = grid.now_s()
        begin_s = world.clock.now_s() - end_s
        counting = ResultCounter(world.objects, world.ledger, grid.plays, begin_s, grid.base_s)
        jobs = self._schedule.jobs
        results = await counting.all(jobs, self._submitted_s, self._calibration.end_s)
        if self._options.examine is not None:
            await self._options.examine(world, [JobId(one) for one in self._submitted_s])
        stages, instances = results.stages(jobs), grid.machines.runs()
        bill = compute_bill(
            pools=grid.pools,
            instances=instances,
            stages=stages,
            results=results,
            book=self._book,
            manager=grid.manager,
            worker=grid.worker,
            over_s=end_s,
        )
        settings: dict[str, float] = {**asdict(grid.manager)}
        settings.update({f"worker.{name}": s for name, s in asdict(grid.worker).items()})
        settings["cores"] = self._calibration.cores
        return Record(
            scenario.name,
            scenario.digest,
            self._seed,
            self._like.name,
            scenario.compressed,
            {name: (p.min_size, p.max_size, p.slots) for name, p in grid.pools.items()},
            tuple(results.jobs),
            stages,
            tuple(grid.watching.samples),
            instances,
            tuple(grid.timeline.injected),
            results.lost,
            results.duplicates,
            sum(instance.lived_s(end_s) for instance in instances),
            results.again_s,
            bill.usd.typical,
            {item.what: item.usd.typical for item in bill.items},
            settings,
            simulated=True,
            log_digest=world.log.digest() if world.log else "",
            cut=self._cut,
        )
