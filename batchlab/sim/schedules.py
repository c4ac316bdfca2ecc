"""A user who keeps a schedule while a world's weather lasts, and looks what has become of it.

Invariant: what the user asks for is a function of the seed, and of nothing else in the world.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from datetime import datetime
from typing import Any

from batchlab.errors import Refused
from batchlab.jobdef import InputDef, JobDef, RetryRule, SplitBy, StageDef
from batchlab.manager.manager import Manager
from batchlab.manager.schedule_requests import Schedules
from batchlab.model import JobId, StageName
from batchlab.protocol import naming
from batchlab.schedule.decide import MOST_MISSED
from batchlab.schedule.model import Definition, Missed, Overlap, RunState, Schedule, When, token_of
from batchlab.sim.actors import SimulationError
from batchlab.sim.faults import FaultKind, Faults
from batchlab.sim.plans import Plan
from batchlab.sim.watch import Violated
from batchlab.sim.world import World

NAME = "timed"
INPUT = "raw/timed.jsonl"
LOOK_S = 5.0
LATER_S = 10 * 366 * 86_400.0
PROMISE = "Once for each due time"


class Keeper:
    """Of one schedule of one job, in one world."""

    def __init__(self, world: World, plan: Plan, faults: Faults) -> None:
        self._world = world
        self._faults = faults
        rng = world.rng("schedule")
        self._period_min = rng.choice([1, 1, 2, 5])
        overlap = rng.choice(list(Overlap))
        missed = rng.choice(
            [m for m in Missed if (m, overlap) != (Missed.RUN_ALL, Overlap.REPLACE)]
        )
        self._definition = Definition(
            NAME,
            NAME,
            When(f"*/{self._period_min} * * * *"),
            template="",
            missed=missed,
            overlap=overlap,
            prewarm_s=rng.choice([0.0, 0.0, 30.0]),
            capacity=rng.choice([None, 1, 3]),
        )
        self._lasts_s = rng.uniform(100.0, 900.0)
        pool = rng.choice(plan.pools)
        stage = StageDef(
            StageName("a"), handler="sim:task", retry=RetryRule(attempts=2), pool=pool.name
        )
        raw = InputDef((INPUT,), SplitBy.ITEMS)
        self._job = JobDef(JobId("timed-template"), NAME, (stage,), 0.0, input=raw, max_failures=9)
        self._items = rng.choice([1, 3])

    async def use(self) -> None:
        """Add the schedule, leave it alone for a while, and wait until its last run has ended."""
        lines = "".join(f"{item}\n" for item in range(self._items))
        await self._world.objects.put(INPUT, lines.encode())
        first = await self._keep(self._definition, replacing=False)
        await asyncio.sleep(self._lasts_s)
        # Not due for a long time, so that what waits still runs.
        at_s = self._world.clock.now_s() + LATER_S
        last = await self._keep(replace(self._definition, when=When(at_s=at_s)), replacing=True)
        while True:
            # While it is being rebuilt, the ledger knows of none of them.
            if not (await self._shown()).unfinished and not self._world.rebuilding:
                break
            await asyncio.sleep(LOOK_S)
        await self._check(first, last.through_s)

    async def _keep(self, definition: Definition, *, replacing: bool) -> Schedule:
        async def ask(schedules: Schedules) -> Schedule:
            return (await schedules.add(definition, self._job, replacing=replacing))[0]

        return await self._ask(ask)

    async def _shown(self) -> Schedule:
        return await self._ask(lambda schedules: schedules.one(NAME))

    async def _ask(self, call: Any) -> Schedule:
        def of(manager: Manager) -> Coroutine[Any, Any, Schedule]:
            assert manager.scheduler
            answer: Coroutine[Any, Any, Schedule] = call(manager.scheduler)
            return answer

        found = await self._world.ask(of, "the schedule's user")
        if isinstance(found, Refused):
            raise SimulationError(f"a schedule is refused: {found}")
        assert isinstance(found, Schedule)
        return found

    async def _check(self, first: Schedule, until_s: float) -> None:
        """Each job is of a due time, each due time has one, and the history says the same."""
        schedule = await self._shown()
        found = await self._world.ledger.jobs(limit=10_000)
        records = [one for one in found if one.job.token.startswith("schedule/")]
        period_s = self._period_min * 60.0
        known = {one.job.id: one for one in records}
        for run in schedule.runs:
            if run.job and run.state is RunState.ENDED:
                record = known.get(run.job)
                _require(record is not None, f"the job of {run} is not there")
                assert record
                _require(record.state.value == run.result, f"{run} ended {record.state}")
        for record in records:
            due_s = _due_s(record.job.token)
            _require(not due_s % period_s, f"{record.job.id} was due at {due_s:.0f}")
        if self._must_be_whole(first, until_s, period_s):
            due_s = first.added_s - first.added_s % period_s + period_s
            while due_s <= until_s:
                job = naming.job_id(NAME, token_of(schedule, due_s))
                _require(job in known, f"nothing has run at {due_s:.0f}")
                due_s += period_s

    def _must_be_whole(self, first: Schedule, until_s: float, period_s: float) -> bool:
        """Whether each due time must have run: no policy, bound or clock says otherwise."""
        definition = self._definition
        return (
            definition.missed is Missed.RUN_ALL
            and definition.overlap is Overlap.QUEUE
            and not self._faults.counts.get(FaultKind.CLOCK_JUMPED, 0)
            and until_s - first.added_s <= MOST_MISSED * period_s
        )


def _due_s(token: str) -> float:
    return datetime.fromisoformat(token.rsplit("/", 1)[-1]).timestamp()


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise Violated(f"{PROMISE} is violated: {text}")
