"""The ledger as a Protocol: a projection of the bucket that people and the planner read.

Invariant: each call is one transaction and may be repeated. A change names the round of the job, so
a late call of a paused manager has no effect on a later round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

from batchlab.model import JobId, StageName
from batchlab.ports.rows import (
    BundleRecord,
    Fold,
    Folded,
    JobChange,
    JobRecord,
    JobRows,
    Lease,
    Past,
    Written,
)


class Ledger(Protocol):
    """Rows of jobs, stages, and bundles, and the leases of managers.

    Readers see whole transactions. The ledger has no facts about single tasks: those are in the
    outcomes. A change returns the rows that it leaves, which saves the caller a read.
    """

    @overload
    async def apply(self, change: Fold) -> Folded: ...

    @overload
    async def apply(self, change: JobChange) -> Written:
        """Apply the change, unless it was applied before; NotFound if the job or a stage does not
        exist."""

    async def job(self, job: JobId) -> JobRecord:
        """Return one job; NotFound."""

    async def jobs(
        self, *, active: bool = False, limit: int = 100, before: str | None = None
    ) -> Sequence[JobRecord]:
        """Return jobs, newest first by (submitted_s, id). `active` leaves out jobs that have ended.
        `before` is the id of the last job of the previous page; NotFound if it does not exist."""

    async def rows(self, job: JobId) -> JobRows:
        """Return the job with its stages; NotFound."""

    async def bundles(
        self,
        job: JobId,
        *,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        """Return bundles in the order (seq, stage, id), planned ones last.

        `done` selects folded (True) or planned bundles (False), `after_seq` completions that were
        folded after that one, and `failed` bundles with failed tasks.
        """

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Take the lease if it is free, renew it if it is the owner's, or take it over if it is
        still `over`, which the caller read earlier. Return the lease after that."""

    async def release(self, name: str, owner: str) -> None:
        """Release the lease if the owner holds it. Its beat continues from there."""

    async def restore(self, past: Past, *, over: JobRows | None) -> bool:
        """Replace all rows of a job by what the bucket says of it.

        `over` are the rows that `rows` returned before the bucket was read, None if the job did not
        exist. Return False and change nothing if the job has changed since.
        """

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        """Delete these jobs, or all jobs. Leases stay."""

    async def close(self) -> None:
        """Release connections."""
