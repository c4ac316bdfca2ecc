"""Control loops of a replay: submission, observation, sampling, prewarming, and faults.

However a run ends, its faults are undone, pool sizes are restored, and its unfinished jobs are
canceled.
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
    EVERY_S,
    RUN_ENDED,
    GridSampler,
    ManagerConnection,
    ReplayProgress,
    RunState,
    SubmittedJob,
)

AHEAD = 64
"""Number of jobs that are prepared ahead."""
AT_ONCE = 4
"""Maximum number of parallel requests of one kind."""
LOOK_S = 0.5
"""Interval between two looks at the unfinished jobs."""
LOOK_SHARE = 4.0
"""Minimum pause after a look, as a multiple of its duration."""
PAGE = 1000
ACTIVITIES_EVERY = 10
"""Scaling activities are read with every tenth look at the grid."""
READY_S = 600.0
"""Time in which permanent instances must be ready before the run."""
REST_S = 60.0
"""Time in which the fleet must shrink after the last job's end, beyond its idle time."""
LAST_S = 5.0
"""Timeout in seconds of the final request when the manager does not respond."""
END_S = 60.0
"""Timeout of all cancellations."""
CANCEL_AT_ONCE = 10
"""Each cancellation waits until no worker can start a task."""
INTERRUPTED = "It was interrupted."


class Prewarmer:
    """Scheduled capacity of one run, as a raised minimum size of a pool.

    The largest of several sizes applies, and the pool's own minimum is restored at the end. After a
    change of the leader the size is set again, because a new leader has the original limits.
    """

    def __init__(self, course: RunState, link: ManagerConnection, sampler: GridSampler) -> None:
        self._course = course
        self._link = link
        self._sampler = sampler
        self._own = {pool.pool.name: pool.pool.min_size for pool in course.scenario.pools}
        self._wanted: dict[str, list[int]] = defaultdict(list)
        self._told: dict[str, tuple[int, str]] = {}
        """Latest minimum size of each pool, and the leader at that time."""
        self._telling: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._flying: set[asyncio.Task[PoolView]] = set()

    async def warm(self, one: Prewarm) -> None:
        """Wait for the start and keep the pool warm until the end. Raise BackendError."""
        await self._course.until(one.at_s)
        self._wanted[one.pool].append(one.min_size)
        while (left_s := one.until_s - self._course.at_s()) > 0:
            await self._tell(one.pool)
            await asyncio.sleep(min(EVERY_S, left_s))
        self._wanted[one.pool].remove(one.min_size)
        await self._tell(one.pool)

    async def cool(self, *, within_s: float) -> None:
        """Restore the minimum sizes of all pools, as far as the manager responds."""
        if self._flying:  # otherwise a call in a thread could arrive after the next one
            _, late = await asyncio.wait(set(self._flying), timeout=within_s)
            for task_ in late:
                task_.cancel()
        for pool in list(self._told):
            self._wanted[pool].clear()
            # The recorded request may have failed.
            self._told.pop(pool, None)
            with suppress(BackendError):
                await self._tell(pool, within_s=within_s)

    async def _tell(self, pool: str, *, within_s: float | None = None) -> None:
        async with self._telling[pool]:  # the last request must be the wanted one
            least = max(self._own[pool], *self._wanted[pool], 0)
            leads = self._sampler.grid["owner"] if self._sampler.grid else ""
            if self._told.get(pool) == (least, leads):
                return
            # It is recorded before the call, so that a cancellation restores it.
            self._told[pool] = least, leads
            call = self._link.call(lambda there: there.scale(pool, min=least), within_s=within_s)
            flying = asyncio.create_task(call)
            self._flying.add(flying)
            flying.add_done_callback(self._flying.discard)
            await asyncio.shield(flying)


class Injector(Protocol):
    """Fault injector (see scenarios.faults)."""

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Inject the fault, hold it for its time, undo it, and return the result."""

    async def undo(self) -> None:
        """Undo all current faults and inject no more."""

    async def close(self) -> None:
        """Undo all faults and close the used resources."""


class ReplayRun:
    """One run, for a single call of `go`. `course` and `sampler` then have the measurements."""

    def __init__(
        self, course: RunState, link: ManagerConnection, preparer: JobPreparer, clock: Clock, injector: Injector | None
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
        """Tasks that currently inject a fault."""
        self._warmer = Prewarmer(course, link, self.sampler)
        self._flying: dict[str, tuple[PreparedJob, asyncio.Task[None]]] = {}
        """Submissions in progress by job id."""

    async def go(self, limit_s: float, stop: asyncio.Event, progress: Callable[[ReplayProgress], None]) -> None:
        """Run until all jobs have ended, `stop` is set, or `limit_s` of the run have passed."""
        ready: asyncio.Queue[PreparedJob] = asyncio.Queue(AHEAD)
        preparing = asyncio.create_task(self._prepare(ready))
        stopping = asyncio.create_task(stop.wait())
        # Jobs that are due at once must be prepared before the run starts.
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
        """Wait until the first jobs are prepared and the permanent instances are ready."""
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
                done, _ = await asyncio.wait(going, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
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
            # Faults are undone and recorded first: a call in a thread may still break something,
            # and no cancellation stops it.
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
            prepared_job = await self._preparer.prepare(due)
            if ready.full():
                self._prepared.set()
            await ready.put(prepared_job)
        self._prepared.set()

    async def _submit(self, ready: asyncio.Queue[PreparedJob]) -> None:
        room = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for _ in self.course.jobs:
                prepared_job = await ready.get()
                await self.course.until(prepared_job.due.due_s)
                await room.acquire()
                # A separate task, because a call in a thread completes even after a cancellation.
                flying = asyncio.create_task(self._submit_one(prepared_job, room))
                self._flying[prepared_job.job.id] = prepared_job, flying
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
        """Wait for the submissions in progress. Look up each unanswered one by its id."""
        if not self._flying:
            return
        await asyncio.wait([flying for _, flying in self._flying.values()], timeout=LAST_S)
        for job, (prepared_job, flying) in list(self._flying.items()):
            flying.cancel()
            with suppress(BatchlabError):  # then its submission is unknown
                view = await self._link.call(partial(_job, job=job), within_s=LAST_S)
                self._note(prepared_job, view)

    async def _watch(self) -> None:
        pause_s = LOOK_S
        while not self.course.is_over:
            await asyncio.sleep(pause_s)
            begun_s, unanswered = self.course.at_s(), self._link.unanswered
            await self._look()
            # With many jobs, a look is work for the manager too. Waiting for an absent manager is
            # not, and must not delay the next look.
            took_s = self.course.at_s() - begun_s if self._link.unanswered == unanswered else 0.0
            pause_s = max(LOOK_S, LOOK_SHARE * took_s)

    async def _look(self) -> None:
        """Update the unfinished jobs with one or two requests."""
        running = self.course.running
        open_ = self.course.open  # read first: later submissions may be missing in the answer
        if not open_:
            return
        active = await self._active()
        room = asyncio.Semaphore(AT_ONCE)

        async def news(job: str) -> None:
            async with room:
                try:
                    running[job].view = await self._link.call(lambda client: client.job(job))
                except NotFound:
                    # A lost ledger has the job again after its rebuild.
                    if not any(fault.name is FaultName.DATABASE_LOSS for fault in self._faults):
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
        found += [self._warmer.warm(prewarm) for prewarm in scenario.prewarm]
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
            # The schedule follows the run's clock, so a slow answer delays only one look.
            await self.course.until((self.course.at_s() // EVERY_S + 1) * EVERY_S)

    async def _see(self) -> None:
        # The wall clock may jump.
        await self.sampler.look(self.course.begun_s + self.course.at_s())

    async def _tell(self, progress: Callable[[ReplayProgress], None]) -> None:
        while True:
            progress(self.course.state(self.sampler.last))
            await asyncio.sleep(LOOK_S)

    async def _break(self, injector: Injector, fault: Fault) -> None:
        try:
            await self.course.until(fault.at_s)
        except asyncio.CancelledError:
            injected_fault = InjectedFault(fault.name, fault.at_s, impossible=RUN_ENDED)
            self.course.injected.append(injected_fault)
            raise
        at_s = self.course.at_s()
        self.course.breaking.append(fault.name)
        task = asyncio.current_task()
        assert task
        self._breaking.add(task)
        try:
            injected_fault = await injector.inject(fault, at_s)
        except BatchlabError as error:
            injected_fault = InjectedFault(fault.name, at_s, trouble=error.message)
        finally:
            self.course.breaking.remove(fault.name)
            self._breaking.discard(task)
        self.course.injected.append(injected_fault)

    async def _rest(self, stopped: asyncio.Task[Any]) -> None:
        """Wait until the fleet has shrunk to its minimum, because late instances cost money too."""
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
        """Cancel these jobs. The record keeps their earlier states."""
        room = asyncio.Semaphore(CANCEL_AT_ONCE)

        async def cancel(job: str) -> None:
            async with room:
                with suppress(BatchlabError):
                    await self._link.call(lambda client: client.cancel(job), within_s=LAST_S)

        async with _time_limit(END_S):
            await asyncio.gather(*map(cancel, jobs))


async def _wait_shielded(task: asyncio.Task[None]) -> None:
    """Wait for the task, which continues if the waiter is cancelled."""
    await asyncio.shield(task)


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """Stop the block silently after this time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield


def _job(client: Client, *, job: str) -> JobView:
    return client.job(job)


def _page(client: Client, *, before: str | None) -> list[JobView]:
    return client.jobs(limit=PAGE, before=before, active=True)


def _first(errors: BaseExceptionGroup[BatchlabError]) -> BatchlabError:
    """Return the first error. The others have the same cause."""
    one = errors.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one
