"""The ledger of a world, at which users and watchers look every virtual second.

Invariant: what a look shows is what the ledger would answer. It is asked again once something may
have changed; managers ask it themselves each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine

from batchlab.adapters.sql.ledger import SqlLedger
from batchlab.adapters.threads import Run
from batchlab.core.errors import NotFound
from batchlab.core.model import JobId
from batchlab.core.ports import JobRecord, JobRows, Lease

T = TypeVar("T")


class FollowedLedger(SqlLedger):
    """Every grid's, as a world opens it: in a SQLite that lives in memory."""

    def __init__(self, engine: Engine, run: Run) -> None:
        super().__init__(engine, run)
        self._written = 0
        """How often anything but a lease has been written."""
        self._jobs: dict[JobId, tuple[int, JobRecord | None]] = {}
        self._rows: dict[JobId, tuple[int, JobRows]] = {}

    async def find(self, job: JobId) -> JobRecord | None:
        """As `job`, and None where there is none."""
        known = self._jobs.get(job)
        if known is None or known[0] != self._written:
            # What was written before the question, not before the answer.
            written = self._written
            try:
                known = written, await self.job(job)
            except NotFound:
                known = written, None
            self._jobs[job] = known
        return known[1]

    async def seen(self, job: JobId) -> JobRows:
        """As `rows`."""
        known = self._rows.get(job)
        if known is None or known[0] != self._written:
            known = self._written, await self.rows(job)
            self._rows[job] = known
        return known[1]

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """See SqlLedger. It is what is written most often, and changes no job."""
        stands = await super().lease(name, owner, over=over)
        self._written -= 1
        return stands

    async def _write(self, change: Callable[[Connection], T], *, quick: bool = True) -> T:
        try:
            return await super()._write(change, quick=quick)
        finally:
            self._written += 1
