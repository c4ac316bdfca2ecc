"""The loops of one run: jobs submitted when they are due, watched, sampled; things broken.

Invariant: however a run is left, what it has broken is mended, limits are what they were, and of
its jobs none goes on.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from batchlab.client.http import Client
from batchlab.core.api_types import JobView, PoolView
from batchlab.core.errors import BackendError, BatchlabError, NotFound
from batchlab.core.ports import Clock
from batchlab.scenarios.model.values import Fault, FaultName, Prewarm
from batchlab.scenarios.record import InjectedFault
from batchlab.scenarios.replay.jobs import JobPreparer, PreparedJob
from batchlab.scenarios.replay.run_state import (
    RUN_ENDED,
    ManagerConnection,
    ReplayProgress,
    RunState,
    SubmittedJob,
)
from batchlab.scenarios.replay.sampling import EVERY_S, GridSampler

AHEAD = 64
"""Jobs that are prepared before they are due."""
AT_ONCE = 4
"""Requests of one kind under way at the same time."""
LOOK_S = 0.5
"""How often the jobs that have not ended are looked at."""
LOOK_SHARE = 4.0
"""The least pause after a look, in times of what it took."""
PAGE = 1000
ACTIVITIES_EVERY = 10
"""Of the looks at the grid, one with a look at what it tells of its scaling."""
READY_S = 600.0
"""The instances that are always there have so long to be ready before the run begins."""
REST_S = 60.0
"""After the last job's end the fleet has so long to come down, beyond its idle time."""
LAST_S = 5.0
"""So long a last request waits for a manager that does not answer."""
END_S = 60.0
"""So long all that is left may take to be cancelled."""
CANCEL_AT_ONCE = 10
"""Each waits until no worker can start a task any more."""
INTERRUPTED = "It was interrupted."


class Prewarmer:
    """Of one run. Another manager than the one that was told has limits of its own: it is told
    again as soon as it is seen to lead."""

    def __init__(self, course: RunState, link: ManagerConnection, sampler: GridSampler) -> None:
        self._course = course
        self._link = link
        self._sampler = sampler
        self._own = {one.pool.name: one.pool.min_size for one in course.scenario.pools}
        self._wanted: dict[str, list[int]] = defaultdict(list)
        self._told: dict[str, tuple[int, str]] = {}
        """What each pool's least size was made last, and who led then."""
        self._telling: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._flying: set[asyncio.Task[PoolView]] = set()

    async def warm(self, one: Prewarm) -> None:
        """Wait for its time, and keep the pool warm until that is over. BackendError."""
        await self._course.until(one.at_s)
        self._wanted[one.pool].append(one.min_size)
        while (left_s := one.until_s - self._course.at_s()) > 0:
            await self._tell(one.pool)
            await asyncio.sleep(min(EVERY_S, left_s))
        self._wanted[one.pool].remove(one.min_size)
        await self._tell(one.pool)

    async def cool(self, *, within_s: float) -> None:
        """All pools have their own least size, as far as the manager can be told."""
        if self._flying:  # else what is in a thread could come after what is told now
            _, late = await asyncio.wait(set(self._flying), timeout=within_s)
            for one in late:
                one.cancel()
        for pool in list(self._told):
            self._wanted[pool].clear()
            # What was noted may have failed.
            self._told.pop(pool, None)
            with suppress(BackendError):
                await self._tell(pool, within_s=within_s)

    async def _tell(self, pool: str, *, within_s: float | None = None) -> None:
        async with self._telling[pool]:  # what was told last must be what is wanted last
            least = max(self._own[pool], *self._wanted[pool], 0)
            leads = self._sampler.grid["owner"] if self._sampler.grid else ""
            if self._told.get(pool) == (least, leads):
                return
            # Noted before it is so: who is cancelled meanwhile has it taken back.
            self._told[pool] = least, leads
            call = self._link.call(lambda there: there.scale(pool, min=least), within_s=within_s)
            flying = asyncio.create_task(call)
            self._flying.add(flying)
            flying.add_done_callback(self._flying.discard)
            await asyncio.shield(flying)


class Injector(Protocol):
    """What breaks things (see replay.harm)."""

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Break it, keep it broken for its time, mend it, and say what was seen."""

    async def undo(self) -> None:
        """Mend all that is broken now, and break nothing more."""

    async def close(self) -> None:
        """Undo, and let go of whom the harm is done by."""


class ReplayRun:
    """One run; `go` once. `course` and `sampler` then have what was measured."""

    def __init__(
        self,
        course: RunState,
        link: ManagerConnection,
        preparer: JobPreparer,
        clock: Clock,
        injector: Injector | None,
    ) -> None:
        self.course = course
        self.sampler = GridSampler(link)
        self._link = link
        self._preparer = preparer
        self._clock = clock
        self._injector = injector
        self._faults = course.scenario.faults if injector else ()
        self._prepared = asyncio.Event()
        self._breaking: set[asyncio.Task[Any]] = set()
        """Those that something is broken by now."""
        self._warmer = Prewarmer(course, link, self.sampler)
        self._flying: dict[str, tuple[PreparedJob, asyncio.Task[None]]] = {}
        """Submissions under way, by the job's id."""

    async def go(
        self, limit_s: float, stop: asyncio.Event, progress: Callable[[ReplayProgress], None]
    ) -> None:
        """Run until all jobs have ended, `stop` is set, or `limit_s` of the run have passed."""
        ready: asyncio.Queue[PreparedJob] = asyncio.Queue(AHEAD)
        preparing = asyncio.create_task(self._prepare(ready))
        stopping = asyncio.create_task(stop.wait())
        # Those that are due at once shall not be late for having to be prepared.
        first = asyncio.create_task(self._first())
        before = (first, preparing, stopping)
        try:
            while not (first.done() or stopping.done()):
                left = [one for one in before if not one.done()]
                await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                if first.done():
                    first.result()
                if preparing.done():
                    preparing.result()
            first.cancel()
            self.course.begin(self._clock.now_s())
            self.sampler.begin(self.course.begun_s)
            await self._going(ready, limit_s, (preparing, stopping), progress)
        finally:
            for one in before:
                one.cancel()
            await asyncio.gather(*before, return_exceptions=True)
            self.course.took_s = self.course.at_s()
            await self._finish()

    async def _first(self) -> None:
        """Wait until the first jobs are prepared, and the instances that are always there are."""
        await self._prepared.wait()
        least = {p.pool.name: p.pool.min_size for p in self.course.scenario.pools}
        async with _time_limit(READY_S):
            while not await self.sampler.has_up(least):  # noqa: ASYNC110 - somebody else's state
                await asyncio.sleep(LOOK_S)

    async def _going(
        self,
        ready: asyncio.Queue[PreparedJob],
        limit_s: float,
        before: tuple[asyncio.Task[Any], asyncio.Task[Any]],
        progress: Callable[[ReplayProgress], None],
    ) -> None:
        preparing, stopped = before
        work = asyncio.create_task(self._work(ready))
        aside = {asyncio.create_task(one) for one in self._aside(progress)}
        going: set[asyncio.Task[Any]] = {work, preparing, stopped, *aside}
        try:
            while not (work.done() or stopped.done()):
                left_s = limit_s - self.course.at_s()
                done, _ = await asyncio.wait(
                    going, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self.course.cut = f"It was ended after {limit_s:g} s, its limit."
                    return
                for one in done & aside:
                    one.result()
                if preparing in done:
                    preparing.result()
                going -= done
            if not work.done():
                self.course.cut = INTERRUPTED
                return
            work.result()
            await self._rest(stopped)
        except BackendError as error:
            self.course.cut = error.message
        finally:
            # What is broken is mended and told before anything is left: a call that breaks
            # something may be in a thread, which no cancellation stops.
            if self._injector:
                await self._injector.undo()
            if self._breaking:
                await asyncio.wait(set(self._breaking))
            everything = (work, *aside)
            for one in everything:
                one.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
            await self._landed()

    async def _work(self, ready: asyncio.Queue[PreparedJob]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._submit(ready))
                group.create_task(self._watch())
        except* BatchlabError as errors:
            raise _first(errors) from None

    async def _prepare(self, ready: asyncio.Queue[PreparedJob]) -> None:
        for due in self.course.jobs:
            one = await self._preparer.prepare(due)
            if ready.full():
                self._prepared.set()
            await ready.put(one)
        self._prepared.set()

    async def _submit(self, ready: asyncio.Queue[PreparedJob]) -> None:
        room = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for _ in self.course.jobs:
                one = await ready.get()
                await self.course.until(one.due.due_s)
                await room.acquire()
                # By itself: what is in a thread is submitted, whoever is cancelled.
                flying = asyncio.create_task(self._submit_one(one, room))
                self._flying[one.job.id] = one, flying
                group.create_task(_wait_shielded(flying))

    async def _submit_one(self, one: PreparedJob, room: asyncio.Semaphore) -> None:
        try:
            job = replace(one.job, submitted_s=self._clock.now_s())
            view = await self._link.call(lambda client: client.submit(job, one.items))
        finally:
            room.release()
        self._note(one, view)

    def _note(self, one: PreparedJob, view: JobView) -> None:
        self.course.running[one.job.id] = SubmittedJob(one.due, self.course.at_s(), view)
        del self._flying[one.job.id]

    async def _landed(self) -> None:
        """Know of every submission that was under way whether it has come to something. One that
        nobody answers is asked for by its id."""
        if not self._flying:
            return
        await asyncio.wait([flying for _, flying in self._flying.values()], timeout=LAST_S)
        for job, (one, flying) in list(self._flying.items()):
            flying.cancel()
            with suppress(BatchlabError):  # then it is not known to be there
                view = await self._link.call(partial(_job, job=job), within_s=LAST_S)
                self._note(one, view)

    async def _watch(self) -> None:
        pause_s = LOOK_S
        while not self.course.is_over:
            await asyncio.sleep(pause_s)
            begun_s, unanswered = self.course.at_s(), self._link.unanswered
            await self._look()
            # With many jobs a look is work for the manager too; to wait for one that is away is
            # none, and would put off the next look by many times its absence.
            took_s = self.course.at_s() - begun_s if self._link.unanswered == unanswered else 0.0
            pause_s = max(LOOK_S, LOOK_SHARE * took_s)

    async def _look(self) -> None:
        """Look at the jobs that have not ended, all of them in a request or two."""
        running = self.course.running
        open_ = self.course.open  # before: what is submitted meanwhile may not be in the answer
        if not open_:
            return
        active = await self._active()
        room = asyncio.Semaphore(AT_ONCE)

        async def news(job: str) -> None:
            async with room:
                try:
                    running[job].view = await self._link.call(lambda client: client.job(job))
                except NotFound:
                    # A ledger that was lost knows it again once it has been rebuilt.
                    if not any(one.name is FaultName.DATABASE_LOSS for one in self._faults):
                        raise

        for job in open_:
            if job in active:
                running[job].view = active[job]
        await asyncio.gather(*(news(job) for job in open_ if job not in active))

    async def _active(self) -> dict[str, JobView]:
        found: dict[str, JobView] = {}
        before: str | None = None
        while True:
            ask = partial(_page, before=before)
            page = await self._link.call(ask)
            found.update((view["id"], view) for view in page)
            if len(page) < PAGE:
                return found
            before = page[-1]["id"]

    def _aside(self, progress: Callable[[ReplayProgress], None]) -> list[Coroutine[Any, Any, None]]:
        scenario = self.course.scenario
        found = [self._sample(), self._tell(progress)]
        found += [self._warmer.warm(one) for one in scenario.prewarm]
        if self._injector:
            found += [self._break(self._injector, fault) for fault in scenario.faults]
        return found

    async def _sample(self) -> None:
        number = 0
        while True:
            await self._see()
            if number % ACTIVITIES_EVERY == 0:
                await self.sampler.read_activities()
            number += 1
            # By the run's clock: a slow answer makes one look late, not all that follow.
            await self.course.until((self.course.at_s() // EVERY_S + 1) * EVERY_S)

    async def _see(self) -> None:
        # Not by the calendar, which may jump.
        await self.sampler.look(self.course.begun_s + self.course.at_s())

    async def _tell(self, progress: Callable[[ReplayProgress], None]) -> None:
        while True:
            progress(self.course.state(self.sampler.last))
            await asyncio.sleep(LOOK_S)

    async def _break(self, injector: Injector, fault: Fault) -> None:
        try:
            await self.course.until(fault.at_s)
        except asyncio.CancelledError:
            seen = InjectedFault(fault.name, fault.at_s, impossible=RUN_ENDED)
            self.course.injected.append(seen)
            raise
        at_s = self.course.at_s()
        self.course.breaking.append(fault.name)
        task = asyncio.current_task()
        assert task
        self._breaking.add(task)
        try:
            seen = await injector.inject(fault, at_s)
        except BatchlabError as error:
            seen = InjectedFault(fault.name, at_s, trouble=error.message)
        finally:
            self.course.breaking.remove(fault.name)
            self._breaking.discard(task)
        self.course.injected.append(seen)

    async def _rest(self, stopped: asyncio.Task[Any]) -> None:
        """Wait until the fleet is at its least size: what comes down late is paid for too."""
        settings = self.sampler.grid["settings"] if self.sampler.grid else {}
        least = {p.pool.name: p.pool.min_size for p in self.course.scenario.pools}
        async with _time_limit(settings.get("idle_s", 0.0) + REST_S):
            while not (self.sampler.is_down_to(least) or stopped.done()):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)

    async def _finish(self) -> None:
        await self._warmer.cool(within_s=LAST_S)
        await self._cancel([*self.course.open, *self._flying])
        if not self.course.cut:
            await self._see()
        await self.sampler.read_activities()

    async def _cancel(self, jobs: Sequence[str]) -> None:
        """None of them goes on. The record tells of them as they were."""
        room = asyncio.Semaphore(CANCEL_AT_ONCE)

        async def cancel(job: str) -> None:
            async with room:
                with suppress(BatchlabError):
                    await self._link.call(lambda client: client.cancel(job), within_s=LAST_S)

        async with _time_limit(END_S):
            await asyncio.gather(*map(cancel, jobs))


async def _wait_shielded(task: asyncio.Task[None]) -> None:
    """Its end; it goes on where whoever waits for that is cancelled."""
    await asyncio.shield(task)


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """What is in it is given up after so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield


def _job(client: Client, *, job: str) -> JobView:
    return client.job(job)


def _page(client: Client, *, before: str | None) -> list[JobView]:
    return client.jobs(limit=PAGE, before=before, active=True)


def _first(errors: BaseExceptionGroup[BatchlabError]) -> BatchlabError:
    """One sentence for a person; the others end for the same reason."""
    one = errors.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one
