"""Has the performance data of each job that has ended written, by whoever can.

Invariant: nothing waits for it, and no job comes to harm by it. What could not be written is said,
and can be written at any time later, from the bucket alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from batchlab.model import JobId

log = logging.getLogger(__name__)

TRIES = 3
AGAIN_S = 30.0
SHORT_S = 5.0
"""Of shorter jobs nothing is written until somebody asks: there may be hundreds in a second, and a
report takes longer than they do."""
LATER_S = 1.0
"""From a job's end to the writing: others who wait for news of the end go first."""
TROUBLES_KEPT = 1_000


class Reporter(Protocol):
    """Writes a job's performance data into the bucket."""

    async def write(self, job: JobId) -> None:
        """Write all of it, outside of the event loop; any error where that could not be done."""


class Reports:
    """One at a time, oldest first. Without a `reporter` nothing is written."""

    def __init__(self, reporter: Reporter | None = None) -> None:
        self._reporter = reporter
        self._due: deque[JobId] = deque()
        self._is_due = asyncio.Event()
        self._troubles: dict[JobId, str] = {}

    @property
    def troubles(self) -> Mapping[JobId, str]:
        """Why the data of some jobs could not be written, by job."""
        return self._troubles

    def ended(self, job: JobId, took_s: float) -> None:
        """A job has ended after so many seconds, and what is known of it is in the bucket."""
        if self._reporter and took_s >= SHORT_S and job not in self._due:
            self._due.append(job)
            self._is_due.set()

    async def keep(self) -> None:
        """Write what is due, for ever."""
        while True:
            await self._is_due.wait()
            await asyncio.sleep(LATER_S)
            while self._due:
                await self._write(self._due.popleft())
            self._is_due.clear()

    async def _write(self, job: JobId) -> None:
        assert self._reporter
        for n in range(TRIES):
            if n:
                await asyncio.sleep(AGAIN_S)
            try:
                await self._reporter.write(job)
            except Exception as error:  # noqa: BLE001 - whatever it is, no job may suffer from it
                log.warning("the performance data of %s is not written: %s", job, error)
                self._troubles[job] = str(error)
                while len(self._troubles) > TROUBLES_KEPT:
                    del self._troubles[next(iter(self._troubles))]
            else:
                self._troubles.pop(job, None)
                return
