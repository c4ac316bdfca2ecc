"""Ledger with a cache for the users and checks of a world, which read the ledger every virtual second.

Invariant: a cached answer equals the ledger's answer, because each write that may change the answer drops the cache.
Managers always read the ledger without the cache.
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


class CachedLedger(SqlLedger):
    """The product's SQL ledger, on an in-memory SQLite database, with a cache."""

    def __init__(self, engine: Engine, run: CallRunner) -> None:
        super().__init__(engine, run)
        self._written = 0
        """Number of writes to the ledger, without the writes of the lease."""
        self._jobs: dict[JobId, tuple[int, JobRecord | None]] = {}
        self._rows: dict[JobId, tuple[int, JobRows]] = {}

    async def find(self, job: JobId) -> JobRecord | None:
        """Return the job as `job` does, or None if the job does not exist."""
        cached = self._jobs.get(job)
        if cached is None or cached[0] != self._written:
            # The write count is read before the query, because a write during the query makes the answer old.
            written = self._written
            try:
                cached = written, await self.job(job)
            except NotFound:
                cached = written, None
            self._jobs[job] = cached
        return cached[1]

    async def cached_rows(self, job: JobId) -> JobRows:
        """Return the rows of the job as `rows` does, from the cache if possible."""
        cached = self._rows.get(job)
        if cached is None or cached[0] != self._written:
            cached = self._written, await self.rows(job)
            self._rows[job] = cached
        return cached[1]

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Renew the lease without a reset of the cache.

        The frequent writes of the lease do not change jobs, so the cache stays valid.
        """
        lease = await super().lease(name, owner, over=over)
        self._written -= 1
        return lease

    async def _write(self, change: Callable[[Connection], T], *, quick: bool = True) -> T:
        try:
            return await super()._write(change, quick=quick)
        finally:
            self._written += 1
