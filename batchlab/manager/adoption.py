"""Adoption of jobs: the leader starts an asyncio task for each job that is new, reopened, or from an earlier leader.

Invariants: one asyncio task advances each job that has not ended. An outage or a bug that affects one job does not stop
another job. A job with a start time does not start before the wall clock shows the start time. If the wall clock was
set back, the job starts at most `SET_BACK_S` after its original wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heappop, heappush

from batchlab.core import logs
from batchlab.core.atomic_write import of_single_call
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import AddCut, AddJob, BundleRecord, ChangeResult, Cut, JobRecord, JobRows
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.tracing import trace_of
from batchlab.manager import admission
from batchlab.manager.context import Context, Part
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_rebuild import restore
from batchlab.manager.quarantine import UnreadableObject
from batchlab.manager.retry_rounds import cuts_of_round
from batchlab.manager.spending import Spending
from batchlab.manager.state import LiveJob, Ports, Superseded, pages_of_jobs, set_job_state

log = logging.getLogger(__name__)

SET_BACK_S = 60.0
"""Maximum delay of a scheduled job after the wall clock was set back."""
MAX_SEARCH_S = 300.0
"""Maximum interval between searches for active jobs."""


class DelayedJobs:
    """Jobs in state SCHEDULED, which one manager starts at their start times."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._waiting: dict[JobId, tuple[int, float]] = {}
        """Number of the entry and start time (seconds since the epoch) of each job that waits."""
        self._by_time: list[tuple[float, int, JobId]] = []
        """Heap of the jobs by start time. Entries of jobs that no longer wait stay until they reach the top."""
        self._by_wait: list[tuple[float, int, JobId]] = []
        """Heap of the jobs by the monotonic time at which a job starts even if the wall clock was set back. Entries of
        jobs that no longer wait stay until they reach the top."""
        self._count = 0

    def add(self, job: JobDef) -> None:
        start_s = job.start_at_s or 0.0
        if job.id in self._waiting and self._waiting[job.id][1] == start_s:
            return
        self._count += 1
        self._waiting[job.id] = self._count, start_s
        clock = self._ports.clock
        heappush(self._by_time, (start_s, self._count, job.id))
        latest_s = clock.monotonic_s() + start_s - clock.now_s() + SET_BACK_S
        heappush(self._by_wait, (latest_s, self._count, job.id))

    def forget(self, job: JobId) -> None:
        self._waiting.pop(job, None)

    def retain(self, lives: Mapping[JobId, LiveJob]) -> None:
        """Forget the jobs that are not live."""
        for job in self._waiting.keys() - lives.keys():
            del self._waiting[job]

    async def start_due(self, lives: Mapping[JobId, LiveJob]) -> None:
        clock = self._ports.clock
        for heap, now_s in ((self._by_time, clock.now_s()), (self._by_wait, clock.monotonic_s())):
            while heap and heap[0][0] <= now_s:
                entry = heappop(heap)
                _, number, job = entry
                if self._waiting.get(job, (0, 0.0))[0] != number:
                    continue
                live = lives.get(job)
                if live is not None and live.record.state is JobState.SCHEDULED:
                    try:
                        await set_job_state(self._ports, live, JobState.SUBMITTED)
                    except BackendError:
                        heappush(heap, entry)
                        raise
                    live.wake.set()
                self.forget(job)


class Adoption(Part):
    """Adoption of jobs into `lives`, the map of live jobs, with an asyncio task for each adopted job."""

    def __init__(self, context: Context, coordinator: JobCoordinator, spending: Spending | None) -> None:
        super().__init__(context)
        self._coordinator = coordinator
        self._spending = spending
        self.delayed_jobs = DelayedJobs(context.ports)
        self.group: asyncio.TaskGroup | None = None
        """Task group with the asyncio tasks of the adopted jobs, or None while this manager does not lead."""
        self._searched_s = 0.0
        """Monotonic time of the last search of the ledger for jobs without an asyncio task."""
        self._listing_s = 0.0
        """Duration of the last search, or 0 after a search that failed or adopted jobs."""
        self._departed: set[JobId] = set()
        """Jobs that have ended since the read of the page of jobs that is being adopted."""

    async def adopt_active(self) -> None:
        """Search the ledger for active jobs without an asyncio task, and adopt them."""
        begun_s = self._searched_s = self._clock.monotonic_s()
        # After a search that failed or adopted jobs, the next search follows after `silence_s`. The duration of a
        # search with adoptions does not count.
        self._listing_s, has_adopted = 0.0, False
        self._departed.clear()
        async for page in pages_of_jobs(self._ports, active=True):
            if absent := [rows for rows in page if rows.id not in self._lives]:
                has_adopted = True
                await self._adopt_page(absent)
            self._departed.clear()
        if not has_adopted:
            self._listing_s = self._clock.monotonic_s() - begun_s
        self.delayed_jobs.retain(self._lives)
        self._lives.wake_waiting()

    async def _adopt_page(self, page: Sequence[JobRows]) -> None:
        """Adopt many jobs with few requests to the ledger."""
        # A retry adds bundles to the ledger during the adoption of its job.
        unretried = [rows.id for rows in page if not rows.job.round and _may_have_outstanding_bundles(rows)]
        planned: dict[JobId, list[BundleRecord]] = {job: [] for job in unretried}
        if planned:
            for record in await self._ledger.bundles(*planned, done=False):
                planned[record.bundle.job].append(record)
        for rows in page:
            # The rows are outdated if a request has adopted the job, or if the job has ended since.
            if rows.id in self._lives or rows.id in self._departed:
                continue
            try:
                live = await self._prepare(ChangeResult(rows, is_new=False), planned=planned.get(rows.id))
            except (Malformed, TooNew, NotFound) as error:
                # A job that cannot be adopted must not block other jobs. The next search of the ledger tries to adopt
                # the job again.
                self._quarantine.object(object_keys.committed(rows.id), error, rows.id, "object")
                continue
            if rows.id not in self._departed:
                self._start(live)

    @property
    def is_search_due(self) -> bool:
        """Return whether the next search is due. The interval grows with the duration of a search, up to
        `MAX_SEARCH_S`, because a search reads the whole list of active jobs."""
        interval_s = max(self._settings.silence_s, min(100 * self._listing_s, MAX_SEARCH_S))
        return self._clock.monotonic_s() - self._searched_s >= interval_s

    async def adopt(self, result: ChangeResult, *, cut: Cut | None = None, concurrent: bool = False) -> LiveJob:
        """Adopt a new job, a reopened job, or a job of an earlier leader. `cut` is the first cut of a new job. With
        `concurrent`, other asyncio tasks may fold completions during the adoption."""
        live = await self._prepare(result, concurrent=concurrent)
        if cut:
            now_s = self._clock.monotonic_s()
            live.add_outstanding((bundle, now_s) for bundle in cut.bundles)
        self._start(live)
        if cut:
            self._context.wake_if_short(live.job.stage(cut.stage).pool)
        return self._lives[live.id]

    async def _prepare(
        self, result: ChangeResult, *, planned: Sequence[BundleRecord] | None = None, concurrent: bool = False
    ) -> LiveJob:
        """Return the in-memory state of a job. `planned` has the job's outstanding bundles if the caller has read
        them."""
        ledger, rows = self._ledger, result.rows
        job = rows.job.job
        # The cuts of a retry are written again, because the previous leader may have died before it wrote all ledger
        # changes of the retry.
        cuts, unreadable = await self._cuts(rows.job)
        for cut in cuts:
            rows = (await ledger.apply(AddCut(cut))).rows
        if planned is None and not result.is_new and _may_have_outstanding_bundles(rows):
            planned = await ledger.bundles(job.id, done=False)
            if concurrent:
                # The job's rows are read again after the job's bundles, because older counters would miss a bundle that
                # was folded in between. A bundle that is folded between the reads of bundles and rows stays outstanding
                # until the reconciler finds its outcome.
                rows = await ledger.rows(job.id)
        # The job's version starts at the clock's time, so that clients of the previous manager accept the updates of
        # this manager.
        live = LiveJob(
            rows.job,
            {s.counts.stage: s for s in rows.stages},
            version=int(self._clock.now_s() * 1000),
            must_read_control=not result.is_new,
            unreadable=unreadable,
            retried_s=min((cut.at_s for cut in cuts if cut.at_s is not None), default=None),
            complete_after=0 if result.is_new else None,
        )
        if not result.is_new:
            live.learn_run_times()
            # The silence of each bundle starts at 75% of `silence_s`, so that the reconciler soon sends the bundles
            # that a crashed leader planned but did not send.
            monotonic_s = self._clock.monotonic_s()
            heard_s = monotonic_s - 0.75 * self._settings.silence_s
            # The silence of a retried bundle begins at the end of the bundle's backoff.
            now_s = self._clock.now_s()
            waits = [(r.bundle, settlement.wait_s(job, r.bundle, now_s)) for r in planned or ()]
            live.add_outstanding((bundle, heard_s + wait_s) for bundle, wait_s in waits)
            live.delay((bundle, monotonic_s + wait_s) for bundle, wait_s in waits if wait_s)
        if self._spending:
            await self._spending.open_account(live, is_new=result.is_new)
        if self._recorder:
            self._recorder.adopt(live)
        return live

    def _start(self, live: LiveJob) -> None:
        """Start the asyncio task of a prepared job."""
        live_job = self._lives.get(live.id)
        # Another task may have adopted the job first, for example if two submissions use one client token. A live job
        # of an earlier round is replaced, because a retry may begin before the earlier round's asyncio task ends.
        if live_job and not live_job.ended.is_set() and live_job.round >= live.round:
            return
        self._lives[live.id] = live
        if live.record.state is JobState.SCHEDULED:
            self.delayed_jobs.add(live.job)
        if self._spending:
            self._spending.add_budget(live)
        if self.group is not None:
            live.conducting = self.group.create_task(self._conduct(live), name=f"job {live.id}")

    async def _cuts(self, record: JobRecord) -> tuple[Sequence[Cut], UnreadableObject | None]:
        """Return the cuts of the retry that began the job's current round, or the error of the unreadable retry
        object."""
        try:
            return await cuts_of_round(self._ports, record), None
        except UnreadableObject as error:
            return (), error
        except NotFound as error:
            key = object_keys.retry(record.job.id, record.round)
            return (), UnreadableObject(key, error.message)

    async def restore(self, job: JobId, *, concurrent: bool = False) -> JobDef | None:
        """Restore a job from the bucket to the ledger after a crash of its submission or a loss of the ledger. Return
        None if the bucket does not have a readable job of this id, or if this grid does not admit the job. The job id
        is checked, because a worker may send any job id in an event."""
        if not admission.is_name(job):
            log.error("an event names a job that cannot exist")
            return None
        try:
            get = partial(self._objects.get, object_keys.spec(job))
            job_def, opening = commit_keys.from_json(json_format.loads(await self._patience(get)))
            self._context.admit(job_def, is_new=False)
            cut = opening.cut if opening and job_def.is_single_call else None
            if cut and await self.is_fresh(job) and await self._adopt_call(job_def, cut):
                return job_def
            await restore(self._ports, job)
        except NotFound:
            return None
        except UnreadableObject as error:
            # The error of one job must not block the completions of other jobs.
            self._quarantine.object(error.key, error, job, "object")
            return None
        except (Malformed, TooNew) as error:
            self._quarantine.object(object_keys.spec(job), error, job, "object")
            return None
        except (Throttled, Unreachable):
            raise
        except UsageError as error:
            log.error("job %s is not admitted: %s", job, error, extra={"job": job})
            return None
        except Exception:
            log.exception("job %s cannot be restored", job, extra={"job": job})
            return None
        log.warning("job %s was not in the ledger and is restored", job, extra={"job": job})
        rows = await self._ledger.rows(job)
        if not rows.job.state.ended:
            await self.adopt(ChangeResult(rows, is_new=False), concurrent=concurrent)
        return rows.job.job

    async def is_fresh(self, job: JobId) -> bool:
        """Return whether the bucket has only the job's definition and outcomes."""
        async for page in self._objects.list(object_keys.committed(job)):
            if any(info.key != object_keys.spec(job) and not object_keys.is_outcome(info.key) for info in page):
                return False
        return True

    async def _adopt_call(self, job: JobDef, cut: Cut) -> bool:
        """Add a direct call to the ledger (see `core.direct_calls`). Its completions are folded afterwards. Return
        False if the ledger refuses the call, so that the call is restored as any other job."""
        job = await admission.restore_addresses(self._ports, job)
        try:
            with of_single_call(job.is_single_call):
                written = await self._ledger.apply(AddJob(job, JobState.SUBMITTED, cut))
        except (Throttled, Unreachable):
            raise
        except BackendError as error:
            raise_if_cancelled()
            log.warning("a direct call is not accepted: %s", error, extra={"job": job.id})
            return False
        if written.is_new:
            self._counts.submitted += 1
            log.info("accepted a direct call", extra={"job": job.id})
            await self.adopt(written, cut=cut, concurrent=True)
        elif not written.rows.job.state.ended:
            await self.adopt(written, concurrent=True)
        return True

    async def readopt(self, live: LiveJob) -> None:
        """Restore a job from the bucket and adopt the restored job, because the ledger does not match the bucket."""
        await restore(self._ports, live.id)
        live.ended.set()
        await self.adopt(ChangeResult(await self._ledger.rows(live.id), is_new=False), concurrent=True)

    async def _give_up(self, live: LiveJob, error: Malformed) -> None:
        """End a job that can never continue. If the backend is unavailable, the caller tries again after a tick."""
        try:
            await self._coordinator.give_up(live, error)
        except Superseded:
            live.end()
        except BackendError as later:
            raise_if_cancelled()
            log.warning("job %s waits for the backend: %s", live.id, later)
            await asyncio.sleep(self._settings.tick_s)

    async def _conduct(self, live: LiveJob) -> None:
        logs.add_fields(job=live.id, trace=trace_of(live.job.trace))
        while not live.ended.is_set():
            try:
                await self._coordinator.conduct(live)
            except Superseded as error:
                raise_if_cancelled()
                log.info("%s", error, extra={"job": live.id})
                live.end()
            except Malformed as error:
                raise_if_cancelled()
                log.error("job %s is given up: %s", live.id, error, extra={"job": live.id})
                live.trouble = str(error)
                await self._give_up(live, error)
            except BackendError as error:
                raise_if_cancelled()
                # The job continues after the backend's outage, because the bucket has the state of the job.
                log.warning("job %s waits for the backend: %s", live.id, error)
                live.trouble = str(error)
                await asyncio.sleep(self._settings.tick_s)
            except Exception as error:
                raise_if_cancelled()
                # An unexpected error of one job must not end other jobs.
                log.exception("job %s met a bug", live.id)
                live.trouble = f"an error inside the manager: {error!r}; see its log"
                await asyncio.sleep(self._settings.lease_ttl_s)
        if self._lives.get(live.id) is live:
            del self._lives[live.id]
            self._departed.add(live.id)
            live.release_outcomes()
            self.delayed_jobs.forget(live.id)

    async def drop_all(self) -> None:
        conducting = [live.conducting for live in self._lives.values() if live.conducting]
        self._lives.clear()
        for task in conducting:
            task.cancel()
        await asyncio.gather(*conducting, return_exceptions=True)


def _may_have_outstanding_bundles(rows: JobRows) -> bool:
    return any(stage.may_have_outstanding_bundles for stage in rows.stages)
