"""Queue of ended jobs whose performance data is to be written.

Invariant: nothing waits for it, and an error does not affect a job. Errors are reported, and the
data can be written later from the bucket alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from batchlab.core.model import JobId
from batchlab.core.retry import heed_cancellation
from batchlab.manager.counters import Counters

log = logging.getLogger(__name__)

TRIES = 3
RETRY_S = 30.0
SHORT_S = 5.0
"""The data of shorter jobs is written on request only. There may be hundreds per second, and a
report takes longer than such a job."""
QUIET_S = 1.0
"""Nothing is written until no job was submitted for this time, because writing delays short calls
(DuckDB takes 0.1 s to load)."""
LATEST_S = 30.0
"""Latest start of the writing after the job's end, if jobs are submitted all the time."""
TROUBLES_KEPT = 1_000


class Reporter(Protocol):
    """Writer of a job's performance data to the bucket."""

    async def write(self, job: JobId) -> None:
        """Write all data outside of the event loop. May raise any error."""


class ReportQueue:
    """Writes the data of one job at a time, oldest first. Does nothing without a `reporter`."""

    def __init__(self, reporter: Reporter | None = None, counts: Counters | None = None) -> None:
        self._reporter = reporter
        self._counts = counts or Counters()
        self._due: dict[JobId, float] = {}
        """Latest start of each job's writing, by the event loop's clock."""
        self._is_due = asyncio.Event()
        self._troubles: dict[JobId, str] = {}

    @property
    def troubles(self) -> Mapping[JobId, str]:
        """Return why the data of some jobs could not be written, by job."""
        return self._troubles

    def ended(self, job: JobId, took_s: float) -> None:
        """Queue a job that ended after `took_s` seconds. Its account is in the bucket."""
        if self._reporter and took_s >= SHORT_S and job not in self._due:
            self._due[job] = asyncio.get_running_loop().time() + LATEST_S
            self._is_due.set()

    async def keep(self) -> None:
        """Write the data of queued jobs, forever."""
        while True:
            await self._is_due.wait()
            while self._due:
                job, latest_s = next(iter(self._due.items()))
                await self._calm(latest_s)
                del self._due[job]
                await self._write(job)
            self._is_due.clear()

    async def _calm(self, latest_s: float) -> None:
        """Wait until no job was submitted for a while, or until `latest_s` on the loop's clock."""
        before = -1
        while self._counts.submitted != before and asyncio.get_running_loop().time() < latest_s:
            before = self._counts.submitted
            await asyncio.sleep(QUIET_S)

    async def _write(self, job: JobId) -> None:
        assert self._reporter
        for n in range(TRIES):
            if n:
                await asyncio.sleep(RETRY_S)
            try:
                await self._reporter.write(job)
            except Exception as error:  # noqa: BLE001 - whatever it is, no job may suffer from it
                heed_cancellation()
                log.warning("the performance data of %s is not written: %s", job, error)
                self._troubles[job] = str(error)
                while len(self._troubles) > TROUBLES_KEPT:
                    del self._troubles[next(iter(self._troubles))]
            else:
                self._troubles.pop(job, None)
                return
