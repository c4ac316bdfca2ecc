"""Cache of the ledger of a world for users and watchers, who read it every virtual second.

Invariant: a cached answer equals the ledger's answer. The cache is dropped at each write that may
change it. Managers always read the ledger itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine

from batchlab.adapters.clock import CallRunner
from batchlab.adapters.sql.ledger import SqlLedger
from batchlab.core.errors import NotFound
from batchlab.core.model import JobId
from batchlab.core.ports import JobRecord, JobRows, Lease

T = TypeVar("T")


class FollowedLedger(SqlLedger):
    """The product's SQL ledger, on an in-memory SQLite database, with a cache."""

    def __init__(self, engine: Engine, run: CallRunner) -> None:
        super().__init__(engine, run)
        self._written = 0
        """Number of writes, without those of the lease."""
        self._jobs: dict[JobId, tuple[int, JobRecord | None]] = {}
        self._rows: dict[JobId, tuple[int, JobRows]] = {}

    async def find(self, job: JobId) -> JobRecord | None:
        """Return the job as `job` does, or None if it does not exist."""
        known = self._jobs.get(job)
        if known is None or known[0] != self._written:
            # Save the write count from before the query: a write during the query makes the answer
            # old.
            written = self._written
            try:
                known = written, await self.job(job)
            except NotFound:
                known = written, None
            self._jobs[job] = known
        return known[1]

    async def seen(self, job: JobId) -> JobRows:
        """Return the rows as `rows` does."""
        known = self._rows.get(job)
        if known is None or known[0] != self._written:
            known = self._written, await self.rows(job)
            self._rows[job] = known
        return known[1]

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Renew the lease. This is the most frequent write, and it changes no job, so the cache
        stays valid."""
        stands = await super().lease(name, owner, over=over)
        self._written -= 1
        return stands

    async def _write(self, change: Callable[[Connection], T], *, quick: bool = True) -> T:
        try:
            return await super()._write(change, quick=quick)
        finally:
            self._written += 1
