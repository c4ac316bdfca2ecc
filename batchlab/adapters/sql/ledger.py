"""The Ledger port on a SQL database.

Invariant: each call is one transaction and may be repeated; the event loop never waits for the
database, unless it asked for that (`Inline`). The statements are in job_rows, bundle_rows and
past_rows.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from sqlalchemy import Connection, Engine, Table, bindparam, select, update

from batchlab.adapters.local.sqlite_wal import WalFlush
from batchlab.adapters.sql import bundle_rows, job_rows, migrate
from batchlab.adapters.sql import restore as past_rows
from batchlab.adapters.sql.db_errors import translated
from batchlab.adapters.sql.engines import sqlite_engine, transaction
from batchlab.adapters.sql.logins import Logins
from batchlab.adapters.sql.tables import NOBODY, Upserts, bundles, jobs, leases, stages
from batchlab.adapters.threads import Inline, OneThread, Run, Threads
from batchlab.core.atomic_write import Sync
from batchlab.core.model import JobId, Json, StageName
from batchlab.core.ports import (
    AddCut,
    AddJob,
    BundleRecord,
    Finish,
    Fold,
    Folded,
    JobChange,
    JobRecord,
    JobRows,
    Lease,
    MoveJob,
    Past,
    Reopen,
    SetControl,
    Written,
)

T = TypeVar("T")
L = TypeVar("L", bound="SqlLedger")

_lease = select(leases.c.owner, leases.c.beat).where(leases.c.name == bindparam("name"))
_release = (
    update(leases)
    .where(leases.c.name == bindparam("b_name"), leases.c.owner == bindparam("b_owner"))
    .values(owner=NOBODY, beat=leases.c.beat + 1)
)


def open_sqlite(path: Path, sync: Sync = Sync.NONE) -> SqlLedger:
    """The ledger in this file; the first call makes the file where there is none.

    With `sync`, changes that a user is told of wait for the disk. A power cut may undo folds, which
    the reconciler repeats from the bucket.
    """
    return SqlLedger(sqlite_engine(path), OneThread(), sync, WalFlush(path))


def open_postgres(
    url: str, *, schema: str = "batchlab", ca: Path | None = None, logins: Logins | None = None
) -> SqlLedger:
    """The ledger in a schema of this PostgreSQL database, which must exist; the first call makes
    the schema where there is none. Grids that share a database have a schema each.

    `url` is libpq's, `postgresql://user:password@host:port/database?sslmode=verify-full&...`. What
    it leaves out (a password, say) comes from where libpq looks for it. Connects at the first
    call.

    For a database on another machine: with `ca`, a file of root certificates, the server's must
    come from one of them and be for the URL's host, and nothing is sent that is not encrypted. With
    `logins` user and password come from there, for each connection; then the server is checked also
    without `ca` (against the system's roots), unless the URL says another sslmode.

    UsageError for a URL or a schema that can be none, and for a `ca` that is not there.
    """
    from batchlab.adapters.sql.postgres import postgres_engine

    return SqlLedger(postgres_engine(url, schema, ca=ca, logins=logins), Threads())


def open_memory() -> SqlLedger:
    """A ledger that ends with its last reference; everything happens in the caller's thread."""
    return open_memory_as(SqlLedger)


def open_memory_as(kind: type[L]) -> L:
    """As `open_memory`, a ledger of that kind."""
    engine = sqlite_engine(None)
    ledger = kind(engine, Inline())
    # A world is dropped wherever it has come to its end, and Python 3.13 asks that databases be
    # closed.
    weakref.finalize(ledger, engine.dispose)
    return ledger


class SqlLedger:
    """See ports.Ledger.

    Every call raises Unreachable where the database does not answer (a lock that is not given up,
    a file that cannot be opened, a server that is away), NotFound where a job or stage to change
    is not there, and BackendError for anything else: a database that a newer batchlab has written,
    a password that is wrong.
    """

    def __init__(
        self,
        engine: Engine,
        run: Run,
        sync: Sync = Sync.NONE,
        flush: WalFlush | None = None,
    ) -> None:
        """Takes over `engine`, which must keep the promises of `engines`; opens nothing yet.
        `flush` waits for the disk where a commit of the engine does not."""
        self._sync = sync
        self._flush = flush
        self._engine = engine
        self._run = run
        self._upserts = Upserts.of(engine.dialect.name)
        self._has_schema = False

    # --- Changes ---------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> Folded: ...

    @overload
    async def apply(self, change: JobChange) -> Written: ...

    async def apply(self, change: Fold | JobChange) -> Folded | Written:
        """See ports.Ledger. A fold raises NotFound before it folds any completion."""
        if isinstance(change, Fold):
            return await self._fold(change)
        written = await self._write(lambda c: self._change(c, change))
        # The other changes do not wait for the disk: the next manager finds them in the bucket.
        if isinstance(change, (AddJob, SetControl, Reopen)):
            await self._on_disk(None)
        return written

    async def _fold(self, change: Fold) -> Folded:
        if not change.completions:
            return Folded([], 0, {})
        return await self._write(
            lambda c: bundle_rows.fold(c, self._upserts, change.completions, change.casualties)
        )

    def _change(self, connection: Connection, change: JobChange) -> Written:
        if isinstance(change, AddJob):
            return self._add_job(connection, change)
        if isinstance(change, AddCut):
            is_new = job_rows.take_cut(connection, change.cut)
            if is_new:
                bundle_rows.plan(connection, self._upserts, change.cut.bundles)
        elif isinstance(change, MoveJob):
            is_new = job_rows.move_job(connection, change.job_id, change.state, change.round)
        elif isinstance(change, SetControl):
            is_new = job_rows.set_control(connection, change.job_id, change.control, change.round)
        elif isinstance(change, Reopen):
            is_new = job_rows.reopen(connection, change.job_id, change.round, change.stages)
        elif isinstance(change, Finish):
            return job_rows.finish(connection, change.job_id, change.round, change.ending)
        else:
            return job_rows.set_planned(
                connection, change.job_id, change.stage, change.planned, change.round
            )
        return Written(job_rows.rows_of(connection, change.job_id), is_new)

    def _add_job(self, connection: Connection, change: AddJob) -> Written:
        job, cut = change.job, change.cut
        written = job_rows.add_job(connection, self._upserts, job, change.state, cut)
        if cut and written.is_new:
            bundle_rows.plan(connection, self._upserts, cut.bundles)
        return written

    # --- Reads -----------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobRecord:
        return await self._read(lambda c: job_rows.find_job(c, job), quick=True)

    async def jobs(
        self, *, active: bool = False, limit: int = 100, before: str | None = None
    ) -> Sequence[JobRecord]:
        """Also raises NotFound where `before` is not there any more."""
        return await self._read(lambda c: job_rows.page_of_jobs(c, active, limit, before))

    async def rows(self, job: JobId) -> JobRows:
        return await self._read(lambda c: past_rows.rows_of(c, job), quick=True)

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
        query = bundle_rows.select_bundles(job, stage, done, after_seq, failed).limit(limit)
        return await self._read(lambda c: bundle_rows.records(c, query))

    # --- The rest --------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        seen = over or Lease(NOBODY, 0)
        values: dict[str, str | int] = {"name": name, "owner": owner}
        values |= {"over_owner": seen.owner, "over_beat": seen.beat}

        def take(connection: Connection) -> Lease:
            row = connection.execute(self._upserts.take_lease, values).first()
            return Lease(*(row or connection.execute(_lease, {"name": name}).one()))

        return await self._write(take)

    async def release(self, name: str, owner: str) -> None:
        await self._write(lambda c: c.execute(_release, {"b_name": name, "b_owner": owner}))

    async def restore(self, past: Past, *, over: JobRows | None) -> bool:
        return await self._on_disk(
            await self._write(
                lambda c: past_rows.restore(c, self._upserts, past, over), quick=False
            )
        )

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        await self._write(lambda c: past_rows.forget(c, jobs), quick=False)
        await self._on_disk(None)

    async def dump(self) -> dict[str, Json]:
        """Everything the ledger says of its jobs: equal for two ledgers that have seen the same,
        in whatever order. Leaves out `seq`, which is that order, and leases."""
        return await self._read(
            lambda c: {table.name: _dump(c, table) for table in (jobs, stages, bundles)}
        )

    async def close(self) -> None:
        """Waits for calls that are under way; no other call may follow."""
        await self._run.close(self._engine.dispose)
        if self._flush:
            self._flush.close()

    # --- Transactions ----------------------------------------------------------------------------

    async def _on_disk(self, written: T) -> T:
        """Return what was written once a power cut cannot undo it."""
        if self._flush and self._sync.waits:
            await self._flush()
        return written

    async def _read(self, query: Callable[[Connection], T], *, quick: bool = False) -> T:
        return await self._transact(query, writes=False, quick=quick)

    async def _write(self, change: Callable[[Connection], T], *, quick: bool = True) -> T:
        return await self._transact(change, writes=True, quick=quick)

    async def _transact(self, work: Callable[[Connection], T], *, writes: bool, quick: bool) -> T:
        def call() -> T:
            with translated(self._engine):
                if not self._has_schema:
                    migrate.ensure(self._engine)
                    self._has_schema = True
                with transaction(self._engine, writes=writes, lasts=not quick) as connection:
                    return work(connection)

        return await self._run(call, writes=writes, quick=quick)


def _dump(connection: Connection, table: Table) -> list[dict[str, Json]]:
    rows = connection.execute(select(table).order_by(*table.primary_key)).mappings()
    return [{name: _readable(name, value) for name, value in row.items()} for row in rows]


def _readable(name: str, value: Any) -> Json:
    if name == "seq":
        return value is not None
    return json.loads(value) if name in ("spec", "uncut", "body") else value
