"""A user who submits a job and does not wait politely.

Invariant: in the end somebody has seen to it that the job can end, and waits until it has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from inspect import isawaitable

from batchlab.errors import Malformed, NotFound, Refused, Unreachable
from batchlab.jobdef import JobDef
from batchlab.manager.manager import Manager
from batchlab.manager.plans import PartWriter
from batchlab.manager.retries import failed_tasks
from batchlab.model import Control, JobState, Json, StageName, TaskSet
from batchlab.patience import Patience
from batchlab.sim.faults import USER, FaultKind, Faults
from batchlab.sim.world import World

THOUGHTS = 8
"""A user thinks so often of asking for something."""

PAUSES_S = (0.0, 0.1, 1.0, 5.0, 20.0)
"""From one thought to the next, about."""

LOOK_S = 4.0
"""How often a user who waits looks at the job, at least: a look costs more than all else."""


PATIENCE_S = 300.0
"""A user waits so long for a job that a lying worker has touched."""

ROUNDS = 3
"""A choosy user asks so often in the end for a retry."""

FEW = 20
"""Items that a client sends along with the submission."""


def few_items(job: JobDef) -> list[Json] | None:
    """The items of a job that sends them along, None for one that brings them before."""
    return list(range(job.items)) if job.items is not None and job.items <= FEW else None


async def bring_items(world: World, job: JobDef) -> None:
    """Write the plan's parts, as a client does before it submits a job that brings its items."""
    patience = Patience(world.rng(f"client/{job.id}"))
    for stage in job.roots():
        writer = PartWriter(world.objects, patience, job.id, stage.name, 0)
        for item in range(job.items or 0):
            await writer.add(item)
        await writer.commit(TaskSet())


class User:
    """The user of one job; `pace` stretches the pauses between requests. A user who is `choosy`
    retries some of the failed tasks only, or asks for two retries at once."""

    def __init__(
        self, world: World, job: JobDef, faults: Faults, pace: float, is_choosy: bool = False
    ) -> None:
        self._world = world
        self._choices = world.rng(f"{USER} {job.id} chooses") if is_choosy else None
        self._job = job
        self._faults = faults
        self._pace = pace
        self._name = f"{USER} {job.id}"
        self._requests: list[asyncio.Task[object]] = []
        self._verbs: dict[FaultKind, Callable[[], asyncio.Task[object]]] = {
            FaultKind.CANCELLED: self._cancel,
            FaultKind.PAUSED: partial(self._ask, "pause"),
            FaultKind.RESUMED: partial(self._ask, "resume"),
            FaultKind.RETRIED: self._retry,
            FaultKind.RESUBMITTED: self._submit,
        }

    async def use(self) -> None:
        """Submit the job, meddle with it, and wait for its end."""
        rng = self._world.rng(self._name)
        await asyncio.sleep(rng.choice([0.0, 0.0, 3.0, 30.0]))
        if few_items(self._job) is None:
            await bring_items(self._world, self._job)
        await self._submit()
        for _ in range(THOUGHTS):
            await self._think()
        for request in self._requests:
            await request
        state = await self._see_to_the_end()
        retries = ROUNDS if self._choices else int(rng.random() < 0.5)
        while retries and state is not JobState.SUCCEEDED:
            retries -= 1
            await self._retry()
            state = await self._see_to_the_end()

    async def _think(self) -> None:
        point = self._faults.next(self._name)
        rng = random.Random(point.pick)  # noqa: S311 - simulation
        await asyncio.sleep(rng.choice(PAUSES_S) * rng.uniform(0.5, 1.5) * self._pace)
        kind = self._faults.due(point, USER)
        if kind is None:
            return
        self._faults.happened(point, kind)
        self._world.note(self._name, kind.value)
        request = self._verbs[kind]()
        self._requests.append(request)
        if rng.random() < 0.7:
            await request

    async def _see_to_the_end(self) -> JobState | None:
        """Wait for the end of the job; None if the ledger cannot have it, since the store has
        damaged it."""
        waited_s = 0.0
        while True:
            record = await self._world.find(self._job.id)
            if record is not None and record.state.ended:
                return record.state
            if self._job.id in self._world.watch.trust.touched:
                # A lying worker may hold up a job that it was given, until its user cancels it.
                waited_s += max(LOOK_S, self._pace / 10)
                if waited_s > PATIENCE_S * self._pace:
                    is_damaged = self._job.id in self._world.damage.jobs
                    if record is None and is_damaged:
                        return None
                    if not is_damaged or self._is_explained():
                        waited_s = 0.0
                        await self._cancel()
            if record is not None and record.control is Control.PAUSE:
                await self._ask("resume")
            await asyncio.sleep(max(LOOK_S, self._pace / 10))

    def _is_explained(self) -> bool:
        """Whether `job why` names trouble of the job. A job that hangs without a cause breaks I7,
        so its user does not help it."""
        manager = self._world.manager
        live = manager.lives.get(self._job.id) if manager else None
        return bool(manager and (manager.quarantine.of(self._job.id) or (live and live.trouble)))

    def _submit(self) -> asyncio.Task[object]:
        job, items = self._job, few_items(self._job)
        return self._start(lambda m: m.requests.submit(job, items), "submit", lambda _: None)

    def _ask(self, verb: str) -> asyncio.Task[object]:
        job = self._job.id
        return self._start(lambda m: getattr(m.requests, verb)(job), verb, lambda _: None)

    def _cancel(self) -> asyncio.Task[object]:
        job, acknowledged = self._job.id, self._world.watch.controls.cancel_asked(self._job.id)

        def told(answer: object) -> None:
            if not isinstance(answer, Refused):
                acknowledged()

        return self._start(lambda m: m.requests.cancel(job), "cancel", told)

    def _retry(self) -> asyncio.Task[object]:
        if self._choices and self._choices.random() < 0.7:
            self._requests.append(self._ask_to_retry())
        return self._ask_to_retry()

    def _ask_to_retry(self) -> asyncio.Task[object]:
        job, controls = self._job.id, self._world.watch.controls
        answered = controls.retry_asked(job)
        seed = self._choices.random() if self._choices and self._choices.random() < 0.7 else None

        async def retry(manager: Manager) -> object:
            chosen = None if seed is None else await self._choice(manager, seed)
            controls.chosen(job, chosen)
            return await manager.requests.retry(job, chosen)

        return self._start(retry, "retry", lambda _: answered())

    async def _choice(self, manager: Manager, seed: float) -> dict[StageName, TaskSet] | None:
        """Some of the failed tasks; None, which is all of them, if there are none."""
        rng = random.Random(seed)  # noqa: S311 - simulation
        failed = await failed_tasks(manager.ports, await manager.ports.ledger.job(self._job.id))
        some = {
            stage: TaskSet.of(task for task in tasks if rng.random() < 0.5)
            for stage, tasks in failed.items()
        }
        return {stage: tasks for stage, tasks in some.items() if tasks} or None

    def _start(
        self,
        call: Callable[[Manager], object],
        verb: str,
        told: Callable[[object], None],
    ) -> asyncio.Task[object]:
        async def asked(manager: Manager) -> object:
            try:
                answer = call(manager)
                return await answer if isawaitable(answer) else answer
            except (Malformed, NotFound) as error:
                if self._job.id not in self._world.damage.jobs:
                    raise
                return Refused(str(error))  # the user reads which object is damaged
            except Unreachable as error:
                if verb != "retry" or self._job.id not in self._world.watch.trust.touched:
                    raise
                return Refused(str(error))  # a lie may have changed the counts of the job

        async def ask() -> object:
            answer = await self._world.ask(asked, f"{verb} {self._job.id}")
            told(answer)
            return answer

        return asyncio.create_task(ask(), name=f"{self._name} asks to {verb}")
