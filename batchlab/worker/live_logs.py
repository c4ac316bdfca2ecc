"""Live logs: the recent output of running tasks, stored while a client follows them.

Invariant: live logs cause no requests unless a client follows them. The client's request is part of
the control object, which a worker reads anyway, and is valid for ASKED_S from that read. A worker
then makes at most one PUT per job and step, and none without new output.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.core.errors import BackendError
from batchlab.core.model import JobId
from batchlab.core.port_retries import heed_cancellation
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import ASKED_S, Tail, to_bytes
from batchlab.worker import task_log
from batchlab.worker.inflight_message import InflightMessage

log = logging.getLogger(__name__)

MAX_LOG_BYTES_PER_TASK = 64 * 1024
"""Size limit of the stored output of one running task. The end of the output is stored."""
WORKER_BYTES = 256 * 1024
"""Size limit of the stored output of all tasks that a worker runs for one job."""


@dataclass(slots=True)
class _Follow:
    until_s: float
    stored: list[Tail]


class LiveLogs:
    """Live logs of one worker, stored every `every_s`. The loop shares `inflight_messages`."""

    def __init__(
        self,
        worker: str,
        inflight_messages: Mapping[str, InflightMessage],
        objects: Objects,
        clock: Clock,
        *,
        every_s: float,
    ) -> None:
        self._worker = worker
        self._inflight = inflight_messages
        self._objects = objects
        self._clock = clock
        self._every_s = every_s
        self._jobs: dict[JobId, _Follow] = {}
        self._wanted = asyncio.Event()

    def asked(self, job: JobId) -> None:
        """Store the live logs of this job for the next ASKED_S seconds."""
        until_s = self._clock.monotonic_s() + ASKED_S
        if job in self._jobs:
            self._jobs[job].until_s = until_s
        else:
            self._jobs[job] = _Follow(until_s, [])
        self._wanted.set()

    async def keep(self) -> None:
        """Store the requested live logs forever. Sleep while there is no request."""
        while True:
            heed_cancellation()
            await self._wanted.wait()
            now_s = self._clock.monotonic_s()
            for job, follow in list(self._jobs.items()):
                if now_s >= follow.until_s:
                    del self._jobs[job]
                else:
                    await self._store(job, follow)
            if not self._jobs:
                self._wanted.clear()
                continue
            await asyncio.sleep(self._every_s)

    async def _store(self, job: JobId, asked: _Follow) -> None:
        try:
            tails = self._now(job)
        except (OSError, ValueError) as error:
            log.warning("live logs of %s could not be read: %s", job, error)
            return  # Live logs are optional, so an error here must not stop the worker.
        if tails == asked.stored:
            return
        try:
            await self._objects.put(object_keys.tail(job, self._worker), to_bytes(tails))
        except BackendError as error:
            log.warning("live logs of %s could not be stored: %s", job, error)
            return  # The next step tries again.
        asked.stored = tails

    def _now(self, job: JobId) -> list[Tail]:
        inflight_messages = [h for h in self._inflight.values() if h.bundle.job == job and h.running]
        most = min(MAX_LOG_BYTES_PER_TASK, WORKER_BYTES // max(1, len(inflight_messages)))
        return [tail for inflight in inflight_messages if (tail := _tail(inflight, most))]


def _tail(inflight: InflightMessage, most: int) -> Tail | None:
    peek = inflight.handle.peek
    found = peek(most) if peek else None
    if found is None or not found.data:
        return None
    bundle = inflight.bundle
    start = found.start - found.log_at
    return Tail(
        bundle.stage,
        found.task,
        bundle.attempt,
        bundle.round,
        bundle.id,
        inflight.execution,
        start,
        start + len(found.data),
        task_log.text(found.data),
    )
