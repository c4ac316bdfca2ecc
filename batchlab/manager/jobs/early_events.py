"""Jobs whose first bundles are sent before the ledger has them.

Invariant: nothing is told or folded of such a job until it is conducted here, or will not be by
this request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from batchlab.core.model import JobId


class Arrivals:
    """Which jobs are arriving; there are a few at any moment."""

    def __init__(self) -> None:
        self._arriving: dict[JobId, asyncio.Event] = {}

    @contextmanager
    def of(self, job: JobId) -> Iterator[None]:
        """Until the end of the block, `job` is on its way into the ledger."""
        arrived = self._arriving[job] = asyncio.Event()
        try:
            yield
        finally:
            arrived.set()
            # A bucket that forgets may have let another request make the same job meanwhile.
            if self._arriving.get(job) is arrived:
                del self._arriving[job]

    async def ended(self, jobs: Iterable[JobId]) -> None:
        """Returns once none of these is on its way."""
        if not self._arriving:
            return
        for job in jobs:
            if arrived := self._arriving.get(job):
                await arrived.wait()
