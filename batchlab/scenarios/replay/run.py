"""Control loops of a replay: submission, observation, sampling, prewarming, and faults.

However a run ends, the replay undoes the faults, restores the pool sizes, and cancels the unfinished jobs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import count
from operator import methodcaller
from typing import Any, Protocol

from batchlab.core.api_types import JobView, PoolView
from batchlab.core.errors import BackendError, BatchlabError, NotFound, Refused
from batchlab.core.job_definition import Dependency, JobDef
from batchlab.core.ports import Clock
from batchlab.scenarios.model.values import Fault, FaultName, Prewarm
from batchlab.scenarios.record import InjectedFault, JobRun, unrefused
from batchlab.scenarios.replay.jobs import JobPreparer, PreparedJob
from batchlab.scenarios.replay.run_state import (
    RUN_ENDED,
    SAMPLE_INTERVAL_S,
    GridSampler,
    ManagerConnection,
    ReplayProgress,
    RunState,
    SubmittedJob,
)

MAX_PREPARED = 64
"""Maximum number of jobs that are prepared in advance."""
MAX_REQUESTS = 4
"""Maximum number of parallel requests of one kind."""
POLL_INTERVAL_S = 0.5
"""Minimum pause in seconds between two reads of the unfinished jobs."""
POLL_PAUSE_FACTOR = 4.0
"""Minimum pause after a read of the unfinished jobs, as a multiple of the duration of the read."""
PAGE = 1000
ACTIVITIES_INTERVAL = 10
"""Number of samples of the grid after which the scaling activities are read."""
READY_TIMEOUT_S = 600.0
"""Time in seconds within which permanent instances must be ready before the run."""
SHRINK_TIMEOUT_S = 60.0
"""Time in seconds, in addition to the idle time, within which the fleet must shrink after the last job's end."""
FINAL_TIMEOUT_S = 5.0
"""Timeout in seconds of the final request when the manager does not respond."""
CANCEL_TIMEOUT_S = 60.0
"""Timeout in seconds of the cancellation of all jobs."""
MAX_CANCELLATIONS = 10
"""Maximum number of parallel cancellations. A cancellation of a job waits until no worker can start a task of the job.
"""
INTERRUPTED = "It was interrupted."


class Prewarmer:
    """Scheduled capacity of one run, as a raised minimum size of a pool.

    If several prewarmings overlap, the largest minimum size applies, and the pool's own minimum size is restored at the
    end. After a change of the leader, the minimum size is set again, because a new leader has the original limits.
    """

    def __init__(self, state: RunState, link: ManagerConnection, sampler: GridSampler) -> None:
        self._state = state
        self._link = link
        self._sampler = sampler
        self._own = {plan.pool.name: plan.pool.min_size for plan in state.scenario.pools}
        self._wanted: dict[str, list[int]] = defaultdict(list)
        self._sent: dict[str, tuple[int, str]] = {}
        """Latest minimum size that was sent for each pool, and the leader at that time."""
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._requests: set[asyncio.Task[PoolView]] = set()

    async def warm(self, plan: Prewarm) -> None:
        """Wait for the start of the prewarming, and keep the pool warm until the end of the prewarming.

        Raise BackendError if the manager is absent for too long.
        """
        await self._state.until(plan.at_s)
        self._wanted[plan.pool].append(plan.min_size)
        while (rest_s := plan.until_s - self._state.at_s()) > 0:
            await self._send(plan.pool)
            await asyncio.sleep(min(SAMPLE_INTERVAL_S, rest_s))
        self._wanted[plan.pool].remove(plan.min_size)
        await self._send(plan.pool)

    async def restore(self, *, within_s: float) -> None:
        """Restore the minimum sizes of all pools, if the manager responds in time."""
        if self._requests:  # an earlier request must not arrive at the manager after the last request
            _, late = await asyncio.wait(set(self._requests), timeout=within_s)
            for task in late:
                task.cancel()
        for pool in list(self._sent):
            self._wanted[pool].clear()
            # The request for a minimum size is repeated even if `_sent` has the request, because the recorded request
            # may have failed.
            self._sent.pop(pool, None)
            with suppress(BackendError):
                await self._send(pool, within_s=within_s)

    async def _send(self, pool: str, *, within_s: float | None = None) -> None:
        async with self._locks[pool]:  # the lock keeps requests in order, so the last request has the wanted size
            least = max(self._own[pool], *self._wanted[pool], 0)
            leader = self._sampler.grid["owner"] if self._sampler.grid else ""
            if self._sent.get(pool) == (least, leader):
                return
            # The minimum size is recorded before the request, so that `restore` resets the size even after a
            # cancellation.
            self._sent[pool] = least, leader
            call = self._link.call(lambda client: client.scale(pool, min=least), within_s=within_s)
            request = asyncio.create_task(call)
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            await asyncio.shield(request)


class Injector(Protocol):
    """Fault injector (see scenarios.faults)."""

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Inject the fault, hold the fault for its duration, undo the fault, and return the result."""

    async def undo(self) -> None:
        """Undo all current faults and do not inject other faults."""

    async def close(self) -> None:
        """Undo all faults and close the used resources."""


class ReplayRun:
    """One run of a replay, on which `run` may be called once. After the run, `state` and `sampler` have the
    measurements.
    """

    def __init__(
        self, state: RunState, link: ManagerConnection, preparer: JobPreparer, clock: Clock, injector: Injector | None
    ) -> None:
        self.state = state
        self.sampler = GridSampler(link)
        self._link = link
        self._preparer = preparer
        self._clock = clock
        self._injector = injector
        self._sizes = {plan.pool.name: plan.pool.min_size for plan in state.scenario.pools}
        self._prepared = asyncio.Event()
        self._injecting: set[asyncio.Task[Any]] = set()
        """Asyncio tasks that currently inject a fault."""
        self._prewarmer = Prewarmer(state, link, self.sampler)
        self._submissions: dict[str, tuple[PreparedJob, asyncio.Task[None]]] = {}
        """Submissions in progress by job id."""

    async def run(self, limit_s: float, stop: asyncio.Event, progress: Callable[[ReplayProgress], None]) -> None:
        """Run until all jobs have ended, `stop` is set, or `limit_s` of the run have passed."""
        ready: asyncio.Queue[PreparedJob] = asyncio.Queue(MAX_PREPARED)
        preparing = asyncio.create_task(self._prepare(ready))
        stopping = asyncio.create_task(stop.wait())
        # Jobs that are due at once must be prepared before the run starts.
        starting = asyncio.create_task(self._wait_for_start())
        tasks: tuple[asyncio.Task[Any], ...] = (starting, preparing, stopping)
        try:
            while not (starting.done() or stopping.done()):
                await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                if preparing.done():
                    preparing.result()
            starting.cancel()
            self.state.begin(self._clock.now_s())
            self.sampler.begin(self.state.begun_s)
            await self._run_to_end(ready, limit_s, (preparing, stopping), progress)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.state.took_s = self.state.at_s()
            await self._prewarmer.restore(within_s=FINAL_TIMEOUT_S)
            await self._cancel([*self.state.open, *self._submissions])
            if not self.state.cut:
                await self._sample()
            await self.sampler.read_activities()

    async def _wait_for_start(self) -> None:
        await self._prepared.wait()
        async with _time_limit(READY_TIMEOUT_S):
            while not await self.sampler.has_in_service(self._sizes):  # noqa: ASYNC110 - state of another process
                await asyncio.sleep(POLL_INTERVAL_S)

    async def _run_to_end(
        self,
        ready: asyncio.Queue[PreparedJob],
        limit_s: float,
        outer: tuple[asyncio.Task[Any], asyncio.Task[Any]],
        progress: Callable[[ReplayProgress], None],
    ) -> None:
        preparing, stopping = outer
        work = asyncio.create_task(self._work(ready))
        helpers = {asyncio.create_task(helper) for helper in self._helpers(progress)}
        running: set[asyncio.Task[Any]] = {work, preparing, stopping, *helpers}
        try:
            while not (work.done() or stopping.done()):
                rest_s = limit_s - self.state.at_s()
                done, _ = await asyncio.wait(running, timeout=rest_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    self.state.cut = f"The run was ended after its limit of {limit_s:g} s."
                    return
                for task in done & {preparing, *helpers}:
                    task.result()
                running -= done
            if not work.done():
                self.state.cut = INTERRUPTED
                return
            work.result()
            # The run ends when the fleet has shrunk to its minimum size, because instances also cost money after the
            # last job.
            settings = self.sampler.grid["settings"] if self.sampler.grid else {}
            async with _time_limit(settings.get("idle_s", 0.0) + SHRINK_TIMEOUT_S):
                while not (self.sampler.is_down_to(self._sizes) or stopping.done()):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_INTERVAL_S)
        except BackendError as error:
            self.state.cut = error.message
        finally:
            # Faults are undone and recorded before the tasks are canceled, because a cancellation does not stop a
            # thread that changes the grid.
            if self._injector:
                await self._injector.undo()
            if self._injecting:
                await asyncio.wait(set(self._injecting))
            for task in (work, *helpers):
                task.cancel()
            await asyncio.gather(work, *helpers, return_exceptions=True)
            await self._await_submissions()

    async def _work(self, ready: asyncio.Queue[PreparedJob]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._submit(ready))
                group.create_task(self._watch())
        except* BatchlabError as errors:
            raise _first(errors) from None

    async def _prepare(self, ready: asyncio.Queue[PreparedJob]) -> None:
        for due in self.state.jobs:
            prepared = await self._preparer.prepare(due)
            if ready.full():
                self._prepared.set()
            await ready.put(prepared)
        self._prepared.set()

    async def _submit(self, ready: asyncio.Queue[PreparedJob]) -> None:
        limit = asyncio.Semaphore(MAX_REQUESTS)

        async def wait_shielded(task: asyncio.Task[None]) -> None:
            await asyncio.shield(task)

        async with asyncio.TaskGroup() as group:
            for _ in self.state.jobs:
                prepared = await ready.get()
                await self.state.until(prepared.due.due_s)
                await limit.acquire()
                # The submission is a separate task, because the thread of a submission continues even after a
                # cancellation.
                submission = asyncio.create_task(self._submit_one(prepared, limit))
                self._submissions[prepared.job.id] = prepared, submission
                group.create_task(wait_shielded(submission))

    async def _submit_one(self, prepared: PreparedJob, limit: asyncio.Semaphore) -> None:
        try:
            after = await self._dependencies(prepared.job)
            job = replace(prepared.job, submitted_s=self._clock.now_s(), after=after)
            view = await self._link.call(lambda client: client.submit(job, prepared.items))
        except Refused:
            if not prepared.job.after:
                raise
            self.state.refused[prepared.job.id] = JobRun.refused(prepared.due, self.state.at_s())
            del self._submissions[prepared.job.id]
        else:
            self._record(prepared, view)
        finally:
            limit.release()

    async def _dependencies(self, job: JobDef) -> tuple[Dependency, ...]:
        """Wait until the manager has answered the submissions of the job's dependencies, and return the dependencies.
        Leave out refused jobs that must only end."""
        earlier = [self._submissions[other.job][1] for other in job.after if other.job in self._submissions]
        if earlier:
            await asyncio.wait(earlier)
        return unrefused(job.after, self.state.refused)

    def _record(self, prepared: PreparedJob, view: JobView) -> None:
        self.state.running[prepared.job.id] = SubmittedJob(prepared.due, self.state.at_s(), view)
        del self._submissions[prepared.job.id]

    async def _await_submissions(self) -> None:
        """Wait for the submissions in progress. After an unanswered submission, ask the manager for the job by the
        job's id.
        """
        if not self._submissions:
            return
        await asyncio.wait([task for _, task in self._submissions.values()], timeout=FINAL_TIMEOUT_S)
        for job, (prepared, task) in list(self._submissions.items()):
            task.cancel()
            with suppress(BatchlabError):  # after an error, it is unknown whether the job was submitted
                view = await self._link.call(methodcaller("job", job), within_s=FINAL_TIMEOUT_S)
                self._record(prepared, view)

    async def _watch(self) -> None:
        pause_s = POLL_INTERVAL_S
        while not self.state.is_over:
            await asyncio.sleep(pause_s)
            begun_s, unanswered = self.state.at_s(), self._link.unanswered
            await self._read_jobs()
            # The pause depends on the duration of the read, because a read of many jobs is much work for the manager.
            # The wait for an absent manager does not count as part of the read, so the wait does not delay the next
            # read.
            took_s = self.state.at_s() - begun_s if self._link.unanswered == unanswered else 0.0
            pause_s = max(POLL_INTERVAL_S, POLL_PAUSE_FACTOR * took_s)

    async def _read_jobs(self) -> None:
        """Update the unfinished jobs with one or two requests."""
        running = self.state.running
        # The unfinished jobs are listed before the request, because the answer may lack jobs that are submitted later.
        unfinished = self.state.open
        if not unfinished:
            return
        active = await self._active_jobs()
        limit = asyncio.Semaphore(MAX_REQUESTS)

        async def read(job: str) -> None:
            async with limit:
                try:
                    running[job].view = await self._link.call(lambda client: client.job(job))
                except NotFound:
                    # A job that the manager does not know after a loss of the ledger exists again after the rebuild of
                    # the ledger.
                    faults = self.state.scenario.faults if self._injector else ()
                    if not any(fault.name is FaultName.DATABASE_LOSS for fault in faults):
                        raise

        for job in unfinished:
            if job in active:
                running[job].view = active[job]
        await asyncio.gather(*(read(job) for job in unfinished if job not in active))

    async def _active_jobs(self) -> dict[str, JobView]:
        jobs: dict[str, JobView] = {}
        before: str | None = None
        while True:
            page = await self._link.call(methodcaller("jobs", limit=PAGE, before=before, active=True))
            jobs.update((view["id"], view) for view in page)
            if len(page) < PAGE:
                return jobs
            before = page[-1]["id"]

    def _helpers(self, progress: Callable[[ReplayProgress], None]) -> list[Coroutine[Any, Any, None]]:
        scenario = self.state.scenario
        helpers = [self._sample_periodically(), self._report(progress)]
        helpers += [self._prewarmer.warm(prewarm) for prewarm in scenario.prewarm]
        if self._injector:
            helpers += [self._inject(self._injector, fault) for fault in scenario.faults]
        return helpers

    async def _sample_periodically(self) -> None:
        for number in count():
            await self._sample()
            if number % ACTIVITIES_INTERVAL == 0:
                await self.sampler.read_activities()
            # The sample times are multiples of SAMPLE_INTERVAL_S, so a slow answer delays only one sample.
            await self.state.until((self.state.at_s() // SAMPLE_INTERVAL_S + 1) * SAMPLE_INTERVAL_S)

    async def _sample(self) -> None:
        # The sample time comes from the run's clock, because the wall clock may jump.
        await self.sampler.sample(self.state.begun_s + self.state.at_s())

    async def _report(self, progress: Callable[[ReplayProgress], None]) -> None:
        while True:
            progress(self.state.progress(self.sampler.last))
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _inject(self, injector: Injector, fault: Fault) -> None:
        try:
            await self.state.until(fault.at_s)
        except asyncio.CancelledError:
            self.state.injected.append(InjectedFault(fault.name, fault.at_s, impossible=RUN_ENDED))
            raise
        at_s = self.state.at_s()
        self.state.breaking.append(fault.name)
        task = asyncio.current_task()
        assert task
        self._injecting.add(task)
        try:
            injected = await injector.inject(fault, at_s)
        except BatchlabError as error:
            injected = InjectedFault(fault.name, at_s, trouble=error.message)
        finally:
            self.state.breaking.remove(fault.name)
            self._injecting.discard(task)
        self.state.injected.append(injected)

    async def _cancel(self, jobs: Sequence[str]) -> None:
        """Cancel the jobs. The record keeps the states from before the cancellation."""
        limit = asyncio.Semaphore(MAX_CANCELLATIONS)

        async def cancel(job: str) -> None:
            async with limit:
                with suppress(BatchlabError):
                    await self._link.call(lambda client: client.cancel(job), within_s=FINAL_TIMEOUT_S)

        async with _time_limit(CANCEL_TIMEOUT_S):
            await asyncio.gather(*map(cancel, jobs))


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """Stop the block of this context manager after `seconds`, without an error."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            yield


def _first(errors: BaseExceptionGroup[BatchlabError]) -> BatchlabError:
    """Return the first error of the group. All errors of the group have the same cause."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
