"""Live logs: the recent output of running tasks, which a worker stores while a client follows the output.

Invariant: live logs cause requests to the bucket only while a client follows them. The client's request for live logs
is part of the control object, which a worker reads anyway. The request for live logs is valid for ASKED_S from the
worker's read. In each step, a worker makes at most one PUT per job, and makes a PUT only for new output.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from batchlab.core.errors import BackendError
from batchlab.core.model import JobId
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import ASKED_S, Tail, to_bytes
from batchlab.worker import task_log
from batchlab.worker.inflight_message import InflightMessage, WorkerContext

log = logging.getLogger(__name__)

MAX_LOG_BYTES_PER_TASK = 64 * 1024
"""Maximum size in bytes of the stored output of one running task. Only the end of longer output is stored."""
MAX_LOG_BYTES_PER_JOB = 256 * 1024
"""Maximum size in bytes of the stored output of all tasks that a worker runs for one job."""


@dataclass(slots=True)
class _Following:
    until_s: float
    stored: list[Tail]


class LiveLogs:
    """Live logs of one worker, which are stored once per control lease."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._jobs: dict[JobId, _Following] = {}
        self._has_jobs = asyncio.Event()

    def follow(self, job: JobId) -> None:
        """Store the live logs of the job for the next ASKED_S seconds."""
        until_s = self._context.clock.monotonic_s() + ASKED_S
        self._jobs.setdefault(job, _Following(until_s, [])).until_s = until_s
        self._has_jobs.set()

    async def run(self) -> None:
        """Store the requested live logs forever, and sleep while no request exists."""
        while True:
            raise_if_cancelled()
            await self._has_jobs.wait()
            now_s = self._context.clock.monotonic_s()
            for job, following in list(self._jobs.items()):
                if now_s >= following.until_s:
                    del self._jobs[job]
                else:
                    await self._store(job, following)
            if not self._jobs:
                self._has_jobs.clear()
                continue
            await asyncio.sleep(self._context.settings.control_lease_s)

    async def _store(self, job: JobId, following: _Following) -> None:
        running = [m for m in self._context.inflight.values() if m.bundle.job == job and m.running]
        max_bytes = min(MAX_LOG_BYTES_PER_TASK, MAX_LOG_BYTES_PER_JOB // max(1, len(running)))
        try:
            tails = [tail for inflight in running if (tail := _tail(inflight, max_bytes))]
        except (OSError, ValueError) as error:
            log.warning("live logs of %s could not be read: %s", job, error)
            return  # Live logs are optional, so an error of the storage must not stop the worker.
        if tails == following.stored:
            return
        try:
            await self._context.objects.put(object_keys.tail(job, self._context.who.worker), to_bytes(tails))
        except BackendError as error:
            log.warning("live logs of %s could not be stored: %s", job, error)
            return  # The next step of `run` tries to store the live logs again.
        following.stored = tails


def _tail(inflight: InflightMessage, max_bytes: int) -> Tail | None:
    peek = inflight.handle.peek
    output = peek(max_bytes) if peek else None
    if output is None or not output.data:
        return None
    bundle = inflight.bundle
    start = output.start - output.log_at
    return Tail(
        bundle.stage,
        output.task,
        bundle.attempt,
        bundle.round,
        bundle.id,
        inflight.execution,
        start,
        start + len(output.data),
        task_log.text(output.data),
    )
