"""Recorder of queues, fleet, scaling, instances, and requests while jobs run, and the queue of reports to write.

Invariants: the recorder samples only data in memory, at most once a second. The size of the recorded data is bounded,
because older data is stored in longer time steps. The recorder stores its data once a minute while jobs run, so that
the next leader continues the recording. The account of each ended job also stores the job's recorded data. No job waits
for a report, and an error of a report does not affect a job. A report can be written later from the data in the bucket.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, Protocol

from batchlab.core.errors import BackendError, Deleted
from batchlab.core.model import GroupView, JobId, LifecycleState, StageName
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import Depth
from batchlab.core.pricing.usage import Account
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.messages import Duplicate
from batchlab.manager.counters import Counters
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.recorded_data import (
    InstanceHistory,
    Point,
    RecordedData,
    TimeSeries,
    job_part,
    latest_point,
    merge_documents,
    merge_pool_points,
    request_point,
)
from batchlab.manager.state import Backlog, LiveJob, Ports
from batchlab.manager.versioned_document import UNREADABLE, VersionedDocument
from batchlab.manager.worker_registry import WorkerRegistry

log = logging.getLogger(__name__)


SAMPLE_S = 1.0
REQUESTS_S = 10.0
"""Interval in seconds between two samples of a job's request counts."""
SAVE_S = 60.0
CLOSE_S = 1.0
SHORT_S = 5.0
MAX_ROWS_OF_SHORT_JOB = 64
"""Maximum number of instances, and of workers, recorded for a job shorter than `SHORT_S`."""
MAX_DECISIONS = 2_000
MAX_STALE = 1_000
"""Maximum number of ended jobs in the heap of starts, in addition to twice the number of recorded jobs."""
MAX_JOBS = 200
"""Maximum number of jobs whose requests are sampled. For jobs above MAX_JOBS, the recorder stores only the total number
of requests."""
MAX_DUPLICATES = 4_096
"""Maximum number of stored duplicate ids, which let the recorder count each duplicate once."""
_BOOTING = {LifecycleState.PENDING, LifecycleState.PENDING_WAIT, LifecycleState.PENDING_PROCEED}
_LEAVING = {LifecycleState.TERMINATING, LifecycleState.TERMINATING_WAIT, LifecycleState.TERMINATING_PROCEED}


class _LiveRecording:
    """Recording of a live job. `since_s` is the start of the recording in seconds since the epoch."""

    def __init__(self, since_s: float, pools: Iterable[str]) -> None:
        self.since_s = since_s
        self.begun_s = float("inf")
        """Monotonic time when this process first saw the job."""
        self.pools = sorted(set(pools))
        self.requests = TimeSeries(latest_point)
        self.duplicates: dict[str, dict[str, list[float]]] = {}
        """Count and slot seconds of duplicates by stage and kind."""
        self.live: LiveJob | None = None
        """The live job, or None if this manager has not adopted the job."""

    def took_s(self, now_s: float, monotonic_s: float) -> float:
        """Return the duration of the job's round. The duration is the longer of two measurements: by the monotonic
        clock since the process first saw the job, and by the wall clock. If an earlier manager conducted the job, the
        wall clock measurement starts with the job's first task or its retry."""
        starts: list[float | None] = []
        if self.live and self.live.round:
            starts = [self.live.retried_s]  # the stage counts include tasks of earlier rounds
        elif self.live:
            starts = [stage.counts.first_start_s for stage in self.live.stages.values()]
        began_s = min([self.since_s, *(start for start in starts if start is not None)])
        return max(now_s - began_s, monotonic_s - self.begun_s, 0.0)

    def to_doc(self) -> RecordedData:
        return {
            "since_s": self.since_s,
            "requests": self.requests.points,
            "duplicates": self.duplicates,
            "pools": self.pools,
        }


class Recorder:
    def __init__(self, ports: Ports, lives: LiveJobs, registry: WorkerRegistry) -> None:
        self._ports = ports
        self._lives = lives
        self._journal = lives.journal()
        self._registry = registry
        self.before_close: Callable[[], None] = lambda: None
        """Function that counts the last events of ended jobs. It is called before the data of ended jobs is closed."""
        self._pools: dict[str, TimeSeries] = {}
        self._slots: dict[str, tuple[int, str]] = {}
        """Number of slots and type of the instances of each pool."""
        self._decisions: deque[list[Any]] = deque(maxlen=MAX_DECISIONS)
        self._history = InstanceHistory(registry)
        self._jobs: dict[JobId, _LiveRecording] = {}
        self._oldest: list[tuple[float, JobId]] = []
        """Heap of the starts of the recordings, which may contain ended jobs."""
        self._unclaimed: tuple[JobId, ...] = ()
        """Jobs in the previous leader's data that this manager has possibly not adopted."""
        self._earlier: dict[JobId, RecordedData] = {}
        """Recorded data of earlier rounds, for jobs that run again."""
        self._counted_duplicates: dict[str, None] = {}
        self._losers: dict[tuple[str, str, str], None] = {}
        """Job, stage, and worker of runs that lost against another run because of a speculative copy."""
        self._sampled_s: float | None = None
        self._requests_s: float | None = None
        self._is_due = False
        self._document = VersionedDocument(ports, object_keys.RECORD, self._merge)

    def observe(
        self, views: Mapping[str, GroupView], depths: Mapping[str, Depth], backlog_of: Callable[[str], Backlog]
    ) -> None:
        now_s, monotonic_s = self._ports.clock.now_s(), self._ports.clock.monotonic_s()
        self._note_jobs()
        for name, view in views.items():
            self._slots[name] = view.pool.slots, view.pool.instance_type
        self._history.record_instances(views.values(), now_s, partial(self._since_s, now_s))
        if not self._jobs:
            self._sampled_s = None
            self._forget(now_s)
            return
        if self._sampled_s is not None and monotonic_s - self._sampled_s < SAMPLE_S:
            return
        step_s = monotonic_s - self._sampled_s if self._sampled_s is not None else 0.0
        self._sampled_s = monotonic_s
        self._is_due = True
        self._history.record_workers(now_s)
        for name, view in views.items():
            depth = depths.get(name, Depth(0, 0, 0))
            point = self._point(view, depth, backlog_of(name), now_s, step_s)
            self._pools.setdefault(name, TimeSeries(merge_pool_points)).add(point)
        if self._requests_s is None or monotonic_s - self._requests_s >= REQUESTS_S:
            step_s = monotonic_s - self._requests_s if self._requests_s is not None else 0.0
            self._requests_s = monotonic_s
            for job, live_recording in islice(self._jobs.items(), MAX_JOBS):
                if live := self._lives.get(job):
                    live.account.settle()
                    live_recording.requests.add(request_point(live.account, now_s, step_s))

    def _note_jobs(self) -> None:
        """Start the recording of new jobs, and remove ended jobs."""
        self._lives.refresh()
        for live in self._journal.changed.values():
            self.adopt(live)
        for job in (*self._journal.removed, *self._unclaimed):
            if job not in self._lives:
                self._jobs.pop(job, None)
                self._earlier.pop(job, None)
        self._journal.clear()
        self._unclaimed = ()
        if len(self._oldest) > 2 * len(self._jobs) + MAX_STALE:
            self._sort_starts()

    def _sort_starts(self) -> None:
        self._oldest = [(live_recording.since_s, job) for job, live_recording in self._jobs.items()]
        heapify(self._oldest)

    def adopt(self, live: LiveJob) -> None:
        """Start the recording of a job, because the job may end before the next sample."""
        if live.id in self._jobs:
            self._jobs[live.id].live = live
        elif not live.must_wait:
            self._begin(live)

    def _begin(self, live: LiveJob) -> _LiveRecording:
        now_s = round(self._ports.clock.now_s(), 3)
        heappush(self._oldest, (now_s, live.id))
        live_recording = self._jobs[live.id] = _LiveRecording(now_s, (stage.pool for stage in live.job.stages))
        live_recording.begun_s = self._ports.clock.monotonic_s()
        live_recording.live = live
        return live_recording

    def close(self, ended: Mapping[JobId, Account]) -> dict[JobId, tuple[float, RecordedData]]:
        """Remove ended jobs. Return each ended job's recorded data, and the duration of its last round (0 if not
        observed)."""
        self.before_close()
        now_s = self._ports.clock.now_s()
        self._history.record_workers(now_s)
        closed: dict[JobId, tuple[float, RecordedData]] = {}
        for job, account in ended.items():
            if live_recording := self._jobs.get(job):
                live_recording.requests.add(request_point(account, now_s, 0.0))
            took_s = live_recording.took_s(now_s, self._ports.clock.monotonic_s()) if live_recording else 0.0
            closed[job] = took_s, self._part(job, live_recording, took_s)
            # The ended job is removed before the next sample, because a retry of the job may begin before the next
            # sample.
            self._jobs.pop(job, None)
            self._earlier.pop(job, None)
        return closed

    def _part(self, job: JobId, seen: _LiveRecording | None, took_s: float) -> RecordedData:
        """Return the recorded data of the job. The function does not read rows older than the job, because many jobs
        may end together."""
        doc: RecordedData = {"jobs": {}, "earlier": {job: self._earlier[job]} if job in self._earlier else {}}
        if seen:
            # The limit of rows keeps the data of short jobs small, because most jobs are short and each job would
            # include the whole fleet.
            most = MAX_ROWS_OF_SHORT_JOB if took_s < SHORT_S else None
            doc |= {
                "pools": self._pools_doc(seen.pools),
                "scaling": self._decisions,
                **self._history.rows(seen.pools, seen.since_s, most),
                "jobs": {job: seen.to_doc()},
            }
        return job_part(doc, job)

    def _point(self, view: GroupView, depth: Depth, backlog: Backlog, now_s: float, step_s: float) -> Point:
        states = [instance.state for instance in view.instances]
        in_service = sum(state is LifecycleState.IN_SERVICE for state in states)
        holding, busy_slots = self._busy(view.pool.name)
        return [
            round(now_s, 3),
            round(step_s, 3),
            depth.visible,
            depth.in_flight,
            depth.delayed,
            backlog.tasks,
            view.desired,
            sum(state in _BOOTING for state in states),
            in_service,
            sum(state in _LEAVING for state in states),
            holding,
            in_service * view.pool.slots,
            busy_slots,
        ]

    def _busy(self, pool: str) -> tuple[int, float]:
        """Return the number of instances that hold a bundle, and the number of slots that run a bundle, by the last
        heartbeats."""
        holding, slots = 0, 0.0
        for worker_status in self._registry.workers.values():
            if worker_status.beat.pool != pool or not worker_status.beat.held:
                continue
            holding += 1
            for held in worker_status.beat.held:
                if held.running and held.job in self._lives:
                    slots += self._lives.slots_of(held)
        return holding, slots

    def samples(self, since_s: float) -> dict[str, list[Point]]:
        """Return each pool's recorded points after a time, in the format of `_point`."""
        return {name: series.since(since_s) for name, series in self._pools.items()}

    def record_decision(self, view: GroupView, desired: int, why: str, backlog: Backlog) -> None:
        now_s = round(self._ports.clock.now_s(), 3)
        in_service = sum(instance.state is LifecycleState.IN_SERVICE for instance in view.instances)
        self._decisions.append(
            [view.pool.name, now_s, view.desired, desired, in_service, backlog.tasks, round(backlog.seconds, 3), why]
        )
        self._is_due = True

    def record_repeated_outcome(self, job: JobId, stage: StageName) -> None:
        """Count an outcome that the ledger already had."""
        self._count(job, stage, "event", 0.0)

    def record_losers(self, job: JobId, stage: StageName, kind: str, slot_s: float, workers: Iterable[str]) -> None:
        """Count a bundle with a speculative copy, and the slot seconds of its runs that lost. A later report of such a
        run by its worker does not count."""
        self._count(job, stage, kind, slot_s)
        for worker in workers:
            self._losers[job, stage, worker] = None
        while len(self._losers) > MAX_DUPLICATES:
            del self._losers[next(iter(self._losers))]

    def record_duplicates(self, duplicates: Iterable[Duplicate]) -> None:
        """Count bundles that several workers have run."""
        for duplicate in duplicates:
            if duplicate.execution not in self._counted_duplicates:
                self._counted_duplicates[duplicate.execution] = None
                loser = duplicate.job, duplicate.stage, duplicate.execution.rpartition("-")[0]
                if duplicate.kind == "execution" and loser in self._losers:
                    del self._losers[loser]
                    continue
                self._count(duplicate.job, duplicate.stage, duplicate.kind, duplicate.slot_s)
        while len(self._counted_duplicates) > MAX_DUPLICATES:
            del self._counted_duplicates[next(iter(self._counted_duplicates))]

    def _count(self, job: JobId, stage: StageName, kind: str, slot_s: float) -> None:
        live_recording = self._jobs.get(job)
        if live_recording is None:
            live = self._lives.get(job)
            if live is None:
                return  # the job has ended, and the job's recorded data is already stored
            live_recording = self._begin(live)
        counted = live_recording.duplicates.setdefault(stage, {}).setdefault(kind, [0, 0.0])
        counted[0] += 1
        counted[1] = round(counted[1] + slot_s, 6)

    def add_earlier_rounds(self, job: JobId, earlier: RecordedData) -> None:
        self._earlier[job] = earlier

    def _since_s(self, now_s: float) -> float:
        """Return the start of the oldest live job (seconds since the epoch), or `now_s` without live jobs."""
        while self._oldest:
            since_s, job = self._oldest[0]
            live_recording = self._jobs.get(job)
            if live_recording and live_recording.since_s == since_s:
                return since_s
            heappop(self._oldest)
        return now_s

    def _forget(self, now_s: float) -> None:
        since_s = self._since_s(now_s)
        for series in self._pools.values():
            series.forget(since_s)
        while self._decisions and self._decisions[0][1] < since_s - SAVE_S:
            self._decisions.popleft()
        self._history.forget(since_s)

    def _to_doc(self) -> RecordedData:
        return {
            "pools": self._pools_doc(self._slots),
            "scaling": list(self._decisions),
            **self._history.to_doc(),
            "jobs": {job: live_recording.to_doc() for job, live_recording in self._jobs.items()},
            "earlier": self._earlier,
        }

    def _pools_doc(self, names: Iterable[str]) -> RecordedData:
        return {
            name: {
                "slots": self._slots[name][0],
                "type": self._slots[name][1],
                "series": self._pools[name].points if name in self._pools else [],
            }
            for name in names
            if name in self._slots
        }

    async def load(self) -> None:
        """Read the recorded data of the previous leader."""
        try:
            if (data := await self._document.read()) is not None:
                self._replace_data(json_format.loads(data))
        except UNREADABLE as error:
            # An unreadable document, such as a document of a later release, must not prevent a manager from leading.
            log.warning("what was recorded of queues and fleet cannot be read: %r", error)

    async def reread(self) -> None:
        await self._document.load()

    def _merge(self, content: bytes) -> None:
        self._replace_data(merge_documents(json_format.loads(content), self._to_doc()))

    def _replace_data(self, doc: RecordedData) -> None:
        pools = {name: TimeSeries(merge_pool_points, pool["series"]) for name, pool in doc["pools"].items()}
        slots = {name: (pool["slots"], pool["type"]) for name, pool in doc["pools"].items()}
        history = InstanceHistory.from_doc(doc, self._registry)
        jobs: dict[JobId, _LiveRecording] = {}
        for job, part in doc["jobs"].items():
            live_recording = jobs[JobId(job)] = _LiveRecording(part["since_s"], part["pools"])
            if own := self._jobs.get(JobId(job)):
                live_recording.begun_s = own.begun_s
            live_recording.live = self._lives.get(JobId(job)) or (own.live if own else None)
            live_recording.requests = TimeSeries(latest_point, part["requests"])
            live_recording.duplicates = part["duplicates"]
        earlier = {JobId(job): part for job, part in doc["earlier"].items()}
        # The attributes change only after the whole document was read without an error.
        self._slots, self._pools, self._jobs, self._earlier = slots, pools, jobs, earlier
        self._unclaimed = tuple(jobs)
        self._sort_starts()
        self._history = history
        self._decisions = deque(doc["scaling"], maxlen=MAX_DECISIONS)

    async def save_within_limit(self) -> None:
        """Store the recorded data for the next leader, within at most `CLOSE_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    async def save_regularly(self) -> None:
        """Store the recorded data every `SAVE_S` in an endless loop. Ticks of the manager do not wait for
        `save_regularly`."""
        while True:
            await asyncio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        if not self._is_due:
            return
        self._is_due = False
        self._forget(self._ports.clock.now_s())
        try:
            await self._document.write(self._to_bytes)
        except BackendError as error:
            log.warning("the recorded data is not stored yet: %s", error)
            self._is_due = True

    def _to_bytes(self) -> bytes:
        return json_format.to_bytes({"v": json_format.VERSION, **self._to_doc()})


MAX_ATTEMPTS = 3
RETRY_S = 30.0
QUIET_S = 1.0
"""Time without submitted jobs before a report is written, because a report delays short calls (DuckDB takes 0.1 s to
load)."""
MAX_DELAY_S = 30.0
"""Maximum delay of a report after the job's end, if clients submit jobs without a pause."""
MAX_TROUBLES = 1_000


class Reporter(Protocol):
    """Writer of a job's performance data to the bucket."""

    async def write(self, job: JobId) -> None:
        """Write the job's performance data outside of the event loop. May raise any error."""


class ReportQueue:
    """Queue of ended jobs that need a report. The queue writes one report at a time, starting with the job that ended
    first. Without a `reporter`, the queue does not write reports."""

    def __init__(self, reporter: Reporter | None = None, counts: Counters | None = None) -> None:
        self._reporter = reporter
        self._counts = counts or Counters()
        self._due: dict[JobId, float] = {}
        """Latest start of each report, by the event loop's clock."""
        self._is_due = asyncio.Event()
        self._troubles: dict[JobId, str] = {}
        self._current: JobId | None = None
        """Job whose report is written, or was written last."""
        self._write_lock = asyncio.Lock()

    @property
    def troubles(self) -> Mapping[JobId, str]:
        """Return the error message of each report that could not be written, by job."""
        return self._troubles

    def add(self, job: JobId, took_s: float) -> None:
        """Add a job that ended after `took_s` seconds. The bucket must already have the job's account."""
        if self._reporter and took_s >= SHORT_S and job not in self._due:
            self._due[job] = asyncio.get_running_loop().time() + MAX_DELAY_S
            self._is_due.set()

    async def forget(self, job: JobId) -> None:
        """Remove a deleted job from the queue, after the end of a write of the job's report."""
        self._due.pop(job, None)
        if self._current == job:
            self._current = None
            async with self._write_lock:
                pass
        self._troubles.pop(job, None)

    async def run(self) -> None:
        while True:
            await self._is_due.wait()
            while self._due:
                job, latest_s = next(iter(self._due.items()))
                await self._wait_until_quiet(latest_s)
                if self._due.pop(job, None) is not None:
                    await self._write(job)
            self._is_due.clear()

    async def _wait_until_quiet(self, latest_s: float) -> None:
        """Wait until no job was submitted for `QUIET_S`, or until `latest_s` on the event loop's clock."""
        before = -1
        while self._counts.submitted != before and asyncio.get_running_loop().time() < latest_s:
            before = self._counts.submitted
            await asyncio.sleep(QUIET_S)

    async def _write(self, job: JobId) -> None:
        assert self._reporter
        self._current = job
        for n in range(MAX_ATTEMPTS):
            if n:
                await asyncio.sleep(RETRY_S)
            if self._current != job:
                return  # the job was deleted
            try:
                async with self._write_lock:
                    await self._reporter.write(job)
            except Deleted:
                self._troubles.pop(job, None)
                return
            except Exception as error:  # noqa: BLE001 - an error of a report must not affect a job
                raise_if_cancelled()
                log.warning("the performance data of %s is not written: %s", job, error)
                self._troubles[job] = str(error)
                while len(self._troubles) > MAX_TROUBLES:
                    del self._troubles[next(iter(self._troubles))]
            else:
                self._troubles.pop(job, None)
                return
