"""Live logs of running tasks: requests to workers, and reads of the stored output.

Invariant: a request for live logs does not change the command in the control object. A request for live logs has a
larger request number than earlier requests, and replaces only the version of the control object that was read. For any
number of clients, the live logs of a job cost one GET and one PUT in each half of a request's validity, and one LIST in
each half of a control lease. The memory use of live logs is bounded, and the manager drops a job's live logs soon after
the last client has read them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from batchlab.core import commit
from batchlab.core.errors import Malformed, TooLarge, TooNew
from batchlab.core.model import BundleId, Control, JobId, StageName
from batchlab.core.ports import ObjectInfo
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.messages import ASKED_S, Tail, from_bytes
from batchlab.manager.context import Context, Part
from batchlab.manager.state import LiveJob

log = logging.getLogger(__name__)


MAX_JOB_BYTES = 8 * 1024 * 1024
MAX_BYTES = 8 * MAX_JOB_BYTES
"""Maximum memory of stored output for all jobs together, in bytes."""


@dataclass(frozen=True, slots=True)
class _WorkerLogs:
    """Stored output of one worker. `size` is the size of the output in bytes."""

    etag: str
    size: int
    tails: Sequence[Tail]


@dataclass(slots=True)
class _JobLogs:
    """Stored output of a job's workers, by object key. All times are monotonic."""

    asked_s: float = float("-inf")
    read_s: float = float("-inf")
    wanted_s: float = float("-inf")
    stored: dict[str, _WorkerLogs] = field(default_factory=dict)


class LiveLogs(Part):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.every_s = context.settings.control_lease_s
        """Interval between updates of the stored output, in seconds."""
        self._jobs: dict[JobId, _JobLogs] = {}

    async def read(self, live: LiveJob) -> list[Tail]:
        """Return the stored output of the job's running tasks, and request that workers store further output."""
        job_logs = self._jobs[live.id] = self._jobs.pop(live.id, _JobLogs())
        job_logs.wanted_s = self._clock.monotonic_s()
        await self._request(live, job_logs)
        await self._refresh(live, job_logs)
        self._evict()
        return [tail for worker_logs in job_logs.stored.values() for tail in _running_only(live, worker_logs.tails)]

    async def _request(self, live: LiveJob, job_logs: _JobLogs) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - job_logs.asked_s < ASKED_S / 2:
            return
        async with live.control_lock:
            if await self._write_request(live):
                job_logs.asked_s = now_s

    async def _write_request(self, live: LiveJob) -> bool:
        """Write the request for live logs, and return whether workers will receive the request."""
        spoken = await commit.read_stored(self._objects, live.id, self._patience)
        # A new job may not have a control object yet.
        word = spoken.command if spoken else json_format.ControlCommand(Control.RUN, round=live.round)
        if word.control is not live.record.control or word.control is Control.CANCEL:
            return False
        request = replace(word, tail=word.tail + 1, tail_s=self._clock.now_s())
        return await commit.replace_command(self._objects, live.id, request, self._patience, over=spoken)

    def _evict(self) -> None:
        """Drop the output of the least recently read jobs above the memory limit. The next client's request reads the
        dropped output again."""
        sizes = [sum(worker_logs.size for worker_logs in job_logs.stored.values()) for job_logs in self._jobs.values()]
        too_much = sum(sizes) - MAX_BYTES
        for job_logs, size in zip(self._jobs.values(), sizes, strict=True):
            if too_much <= 0:
                return
            job_logs.stored, job_logs.read_s = {}, float("-inf")
            too_much -= size

    def drop_unused(self) -> None:
        now_s = self._clock.monotonic_s()
        for job, job_logs in list(self._jobs.items()):
            if job_logs.wanted_s < now_s - 2 * ASKED_S:
                del self._jobs[job]

    async def _refresh(self, live: LiveJob, job_logs: _JobLogs) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - job_logs.read_s < self.every_s / 2:
            return
        job_logs.read_s = now_s
        stored: dict[str, _WorkerLogs] = {}
        free_bytes = MAX_JOB_BYTES
        async for page in self._objects.list(object_keys.tails(live.id)):
            for info in page:
                worker_logs = job_logs.stored.get(info.key)
                if worker_logs is None or worker_logs.etag != info.etag:
                    if info.size > free_bytes:
                        continue  # further workers' output that exceeds the memory limit is left out
                    worker_logs = await self._read_stored(info, free_bytes)
                elif not _running_only(live, worker_logs.tails):
                    worker_logs = _WorkerLogs(info.etag, 0, ())  # the bundles of the stored output have ended
                if worker_logs.size <= free_bytes:
                    stored[info.key] = worker_logs
                    free_bytes -= worker_logs.size
        job_logs.stored = stored

    async def _read_stored(self, info: ObjectInfo, limit: int) -> _WorkerLogs:
        """Return the output that a worker has stored. The result is empty if the stored object is unreadable or larger
        than `limit`, because the object may have grown since the listing."""
        get = partial(self._objects.get, info.key, limit=limit)
        try:
            data = await self._patience(get)
            return _WorkerLogs(info.etag, len(data), from_bytes(data))
        except (Malformed, TooLarge, TooNew) as error:
            log.error("went on without %s: %s", info.key, error.message)
            return _WorkerLogs(info.etag, 0, ())


def _running_only(live: LiveJob, tails: Sequence[Tail]) -> list[Tail]:
    return [tail for tail in tails if BundleId(tail.bundle) in live.outstanding.get(StageName(tail.stage), {})]
