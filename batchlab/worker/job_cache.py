"""Caches of a worker for the definitions and the control objects of its jobs.

Invariant (promise I4): a task starts only within the control lease after a read of the job's control object that
allowed the start. When one control lease has passed after the manager wrote "cancel", no task of the job can start,
even on a slow, paused, or disconnected worker. The manager does not need to ask the workers whether tasks may still
start.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from batchlab.core import commit
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, JobId
from batchlab.core.port_retries import Patience, raise_if_cancelled, set_after
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.messages import ASKED_S
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey, opens
from batchlab.worker.inflight_message import WorkerContext

MAX_JOBS = 64
MAX_KEYS = 4096


class WrongKeyError(BackendError):
    """Error if the commit key of a message does not match the definition of the message's job."""


class JobCache:
    """Cache of the definitions of a worker's jobs. The worker reads each job definition once.

    The commit key of a message must match the message's job, because any sender to the queue could otherwise start
    tasks of any job.
    """

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._jobs: dict[JobId, JobDef] = {}
        self._keys: dict[JobId, CommitKey] = {}
        self._reading: dict[JobId, asyncio.Lock] = {}
        """Locks by job, so that concurrent messages of a job cause a single read of the job's definition."""

    def __contains__(self, job: JobId) -> bool:
        return job in self._jobs

    def key_of(self, job: JobId) -> CommitKey:
        """Return the commit key of a job whose messages have been received."""
        return self._keys.get(job, UNSEALED)

    async def get(self, job: JobId, key: CommitKey) -> JobDef:
        """Return the job of a message with the given commit key.

        Raise NotFound if the job has been removed, or WrongKeyError if the job has another key.
        """
        if job_def := self._cached(job, key):
            return job_def
        lock = self._reading.setdefault(job, asyncio.Lock())
        try:
            async with lock:
                return self._cached(job, key) or await self._read(job, key)
        finally:
            if not lock.locked():
                self._reading.pop(job, None)

    def _cached(self, job: JobId, key: CommitKey) -> JobDef | None:
        """Return the cached job, or None if the worker must read the job's definition.

        A different commit key requires a new read, because the job may have been removed and submitted again.
        """
        job_def = self._jobs.get(job)
        return job_def if job_def and (key == self.key_of(job) or not job_def.commit_hash) else None

    async def _read(self, job: JobId, key: CommitKey) -> JobDef:
        data = await self._patience(partial(self._objects.get, object_keys.spec(job)))
        job_def = json_format.job_from_json(json_format.loads(data))
        if job_def.id != job or not opens(key, job_def):
            raise WrongKeyError(f"A message of job {job} does not have its commit key.")
        self._jobs[job] = job_def
        while len(self._jobs) > MAX_JOBS:
            del self._jobs[next(iter(self._jobs))]
        if job_def.commit_hash:
            self._keys[job] = key
            while len(self._keys) > MAX_KEYS:
                del self._keys[next(iter(self._keys))]
        return job_def


DEFINITION_LEASES = 20
"""Number of control leases after which a worker checks again whether a job without a control object has been removed.
"""
STARTING_SHARE = 0.5
"""Share of the lease after which a control object is read again while tasks of the job may start."""
RUNNING_SHARE = 0.8
"""Share of the lease after which a control object is read again while all tasks of the job's messages run.

A cancellation therefore ends the running tasks within one lease, if no read fails or takes a fifth of the lease.
"""
RETRY_SHARE = 1 / 6
"""Share of the lease between a failed read and the next read."""

MAX_CLOCK_SKEW_S = 60.0
"""Assumed maximum difference in seconds between the clocks of two machines."""


@dataclass(slots=True)
class _Entry:
    control: Control
    etag: str | None
    read_s: float
    """Monotonic time of the last read request."""
    watchers: int = 0
    defined_s: float | None = None
    """Monotonic time at which the worker last found the job's definition without a control object, or None if the job
    had a control object."""


class ControlPoller:
    """Poller of the control objects of in-flight jobs.

    The poller compares ETags, and reads each control object in time for the next start of a task. While the worker runs
    the last tasks of its messages of a job, the poller reads the job's control object less often, because no task needs
    the lease. After each read, the poller applies the control command to the in-flight messages of the job.
    `on_tail(job)` is called when a read finds a new request for the live logs of the job.
    """

    def __init__(self, context: WorkerContext, on_tail: Callable[[JobId], None] = lambda _: None) -> None:
        self._context = context
        self._clock = context.clock
        self._lease_s = context.settings.control_lease_s
        self._on_tail = on_tail
        self._entries: dict[JobId, _Entry] = {}
        self._watched: dict[JobId, None] = {}
        self._unwatched: dict[JobId, None] = {}
        """Jobs with an entry and without a watcher, from the oldest to the newest read."""
        self._is_due_earlier = asyncio.Event()
        """Event that is set if a new watched job is due before `_next_s`."""
        self._next_s = math.inf
        """Monotonic time of the next read, or infinity if no job is watched."""

    async def read(self, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        """Read the control object of a job.

        Return the control command, and the monotonic time at which the control lease ends. A missing control object
        means RUN if the worker has just read the job's definition (`is_new`), or if the definition exists. If the
        control object and the job's definition are both missing, the control command is CANCEL, because the job has
        been removed.
        """
        entry = self._entries.get(job)
        # The lease starts before the request, because the answer may be as old as the request.
        read_s = self._clock.monotonic_s()
        changed: tuple[Control, str | None, float | None] | None = None
        tail = 0
        try:
            spoken = await commit.read_if_changed(self._context.objects, job, entry.etag if entry else None)
            if spoken is not None:
                word = spoken.command
                changed, tail = (word.control, spoken.etag, None), word.tail
                is_recent = entry is not None and read_s - entry.read_s <= self._lease_s
                if not is_recent and word.tail_s is not None:
                    # The request for live logs in the control object may be old. If the clocks differ by more than
                    # MAX_CLOCK_SKEW_S, the worker notices only the next renewal of the request.
                    age_s = self._clock.now_s() - word.tail_s
                    tail *= abs(age_s) <= ASKED_S + MAX_CLOCK_SKEW_S
        except NotFound:
            # After a gap between two reads, the worker may have missed a cancellation and the removal of the job.
            has_gap = entry is None or read_s - entry.read_s > self._lease_s
            defined_s = read_s if is_new else None if has_gap or entry is None else entry.defined_s
            if defined_s is None or read_s - defined_s > DEFINITION_LEASES * self._lease_s:
                defined_s = read_s if await commit.is_defined(self._context.objects, job) else None
            changed = (Control.CANCEL if defined_s is None else Control.RUN, None, defined_s)
        entry = self._entries.get(job)
        if changed is not None:
            control, etag, defined_s = changed
            watchers = entry.watchers if entry else 0
            entry = self._entries[job] = _Entry(control, etag, read_s, watchers, defined_s)
            if not watchers:
                self._unwatched.pop(job, None)
                self._unwatched[job] = None
        elif entry is None:  # `watch` removed the entry of the job during the request.
            return await self.read(job)
        else:
            entry.read_s = max(entry.read_s, read_s)
        until_s = entry.read_s + self._lease_s
        self._apply(job, entry.control, until_s)
        if tail:
            self._on_tail(job)
        return entry.control, until_s

    def _apply(self, job: JobId, control: Control, until_s: float) -> None:
        for inflight in self._context.inflight.values():
            if inflight.task.bundle.job != job:
                continue
            inflight.control = control
            inflight.handle.until_s = until_s
            if control is not Control.RUN:
                inflight.handle.stop = True
            if control is Control.CANCEL:
                inflight.handle.kill = True

    async def current(self, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        """Return the result of the last read if the read is younger than half of the lease, else read again."""
        entry = self._entries.get(job)
        if entry and self._clock.monotonic_s() - entry.read_s < self._lease_s * STARTING_SHARE:
            return entry.control, entry.read_s + self._lease_s
        return await self.read(job, is_new=is_new)

    def watch(self, job: JobId) -> None:
        """Poll the control object of the job. The caller must have awaited `current` before the call of `watch`."""
        self._entries[job].watchers += 1
        self._watched[job] = None
        self._unwatched.pop(job, None)
        if self._entries[job].read_s + self._lease_s * STARTING_SHARE < self._next_s:
            self._is_due_earlier.set()
        self._remove_old()

    def unwatch(self, job: JobId) -> None:
        entry = self._entries[job]
        entry.watchers -= 1
        if not entry.watchers:
            del self._watched[job]
            self._unwatched[job] = None

    def _starting(self) -> set[JobId]:
        """Return the jobs with in-flight messages of which a task may still start."""
        return {
            message.bundle.job
            for message in self._context.inflight.values()
            if not message.committing and (message.handle.running is None or len(message.bundle.tasks) > 1)
        }

    def _due_s(self, job: JobId, starting: Collection[JobId]) -> float:
        """Return the monotonic time of the next read of a watched job's control object."""
        share = STARTING_SHARE if job in starting else RUNNING_SHARE
        return self._entries[job].read_s + self._lease_s * share

    def _remove_old(self) -> None:
        """Remove the entries of jobs that were last read long ago.

        The check ends at the first entry that stays, because a worker may have had many short jobs.
        """
        oldest_s = self._clock.monotonic_s() - 60 * self._lease_s
        while self._unwatched:
            job = next(iter(self._unwatched))
            if self._entries[job].read_s >= oldest_s:
                return
            del self._unwatched[job], self._entries[job]

    async def run(self) -> None:
        """Read the control object of every watched job forever."""
        failed_s = -math.inf
        while True:
            raise_if_cancelled()
            if not self._watched:
                self._next_s = math.inf
                await self._is_due_earlier.wait()
            self._is_due_earlier.clear()
            starting = self._starting()
            due_s = min((self._due_s(job, starting) for job in self._watched), default=0.0)
            self._next_s = max(due_s, failed_s + self._lease_s * RETRY_SHARE)
            if (wait_s := self._next_s - self._clock.monotonic_s()) > 0:
                await set_after(self._is_due_earlier, wait_s)
                continue
            for job in list(self._watched):
                # The last watcher of a job may leave during a read.
                if job not in self._watched or self._due_s(job, starting) > self._clock.monotonic_s():
                    continue
                try:
                    await self.read(job)
                except BackendError:
                    # Without an answer of the bucket, the control lease of the job expires, and then no task of the
                    # job starts.
                    failed_s = self._clock.monotonic_s()
