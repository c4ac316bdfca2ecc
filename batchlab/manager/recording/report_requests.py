"""Has the performance data of each job that has ended written, by whoever can.

Invariant: nothing waits for it, and no job comes to harm by it. What could not be written is said,
and can be written at any time later, from the bucket alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from batchlab.core.model import JobId
from batchlab.core.retry import heed_cancellation
from batchlab.manager.counters import Counts

log = logging.getLogger(__name__)

TRIES = 3
AGAIN_S = 30.0
SHORT_S = 5.0
"""Of shorter jobs nothing is written until somebody asks: there may be hundreds in a second, and a
report takes longer than they do."""
CALM_S = 1.0
"""Nothing is written until no job has come for so long, since short calls have to wait meanwhile
(for the first one DuckDB is loaded, a tenth of a second)."""
LATEST_S = 30.0
"""From a job's end to the writing, if they never cease to come."""
TROUBLES_KEPT = 1_000


class Reporter(Protocol):
    """Writes a job's performance data into the bucket."""

    async def write(self, job: JobId) -> None:
        """Write all of it, outside of the event loop; any error where that could not be done."""


class Reports:
    """One at a time, oldest first. Without a `reporter` nothing is written."""

    def __init__(self, reporter: Reporter | None = None, counts: Counts | None = None) -> None:
        self._reporter = reporter
        self._counts = counts or Counts()
        self._due: dict[JobId, float] = {}
        """With the loop's time by which each is to be written."""
        self._is_due = asyncio.Event()
        self._troubles: dict[JobId, str] = {}

    @property
    def troubles(self) -> Mapping[JobId, str]:
        """Why the data of some jobs could not be written, by job."""
        return self._troubles

    def ended(self, job: JobId, took_s: float) -> None:
        """A job has ended after so many seconds, and what is known of it is in the bucket."""
        if self._reporter and took_s >= SHORT_S and job not in self._due:
            self._due[job] = asyncio.get_running_loop().time() + LATEST_S
            self._is_due.set()

    async def keep(self) -> None:
        """Write what is due, for ever."""
        while True:
            await self._is_due.wait()
            while self._due:
                job, latest_s = next(iter(self._due.items()))
                await self._calm(latest_s)
                del self._due[job]
                await self._write(job)
            self._is_due.clear()

    async def _calm(self, latest_s: float) -> None:
        """Wait until no job has come for a while, or until `latest_s` of the loop's time."""
        before = -1
        while self._counts.submitted != before and asyncio.get_running_loop().time() < latest_s:
            before = self._counts.submitted
            await asyncio.sleep(CALM_S)

    async def _write(self, job: JobId) -> None:
        assert self._reporter
        for n in range(TRIES):
            if n:
                await asyncio.sleep(AGAIN_S)
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
