"""The Ledger port on a SQL database.

Invariant: each ledger call is one transaction and may be repeated. A change loads the needed rows, applies the ledger
projection, and stores the changed rows. The event loop never waits for the database, except with `InlineRunner`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from sqlalchemy import Connection, Engine, Table, bindparam, delete, select, update

from batchlab.adapters.clock import CallRunner, InlineRunner, ReadWriteThreads, SingleThread
from batchlab.adapters.sql import engines
from batchlab.adapters.sql.engines import WalFlush, reading_engine, sqlite_engine, transaction, translate_errors
from batchlab.adapters.sql.logins import Logins
from batchlab.adapters.sql.rows import (
    Snapshot,
    add_job,
    find_job,
    load_job,
    load_known,
    make_void,
    page_of_jobs,
    read_bundles,
    read_results,
    rows_of,
    select_bundles,
    store_bundles,
    store_job,
)
from batchlab.adapters.sql.tables import NOBODY, Upserts, bundles, jobs, leases, stages
from batchlab.core import ledger_projection
from batchlab.core.atomic_write import Sync
from batchlab.core.errors import NotFound
from batchlab.core.ledger_projection import NEVER, BundleRow, Projection
from batchlab.core.model import JobId, Json, StageName
from batchlab.core.ports import (
    AddJob,
    BundleRecord,
    BundleResult,
    ChangeResult,
    Fold,
    FoldResult,
    JobChange,
    JobHistory,
    JobRecord,
    JobRows,
    Lease,
    Reopen,
    SetControl,
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
    """Return the ledger in the SQLite file `path`. The first call of the ledger creates a missing file.

    With `sync`, a call that adds a job, changes a job's control, or reopens a job waits for the disk. A power loss may
    undo folds. The reconciler then repeats the folds from the bucket.
    """
    return SqlLedger(sqlite_engine(path), SingleThread(), sync, WalFlush(path))


def read_sqlite(path: Path) -> SqlLedger:
    """Return the ledger in the SQLite file `path`, for calls that only read."""
    return SqlLedger(reading_engine(path), SingleThread())


def open_postgres(
    url: str, *, schema: str = "batchlab", ca: Path | None = None, logins: Logins | None = None
) -> SqlLedger:
    """Return the ledger in a schema of an existing PostgreSQL database.

    The first call of the ledger connects, and creates a missing schema. Grids that share a database have one schema
    each. The form of `url` is libpq's: `postgresql://user:password@host:port/database?sslmode=verify-full&...`. The
    library libpq supplies missing parts of the URL, such as a password.

    `ca` is a file of root certificates for a database on another machine. With `ca`, the connection is encrypted, and
    the server's certificate must come from a root in `ca` and match the URL's host.

    `logins` supplies user and password for each connection. With `logins`, the server's certificate is checked also
    without `ca`, against the system's roots, unless the URL names another sslmode.

    Raise UsageError for an invalid URL or schema name, and for a `ca` that does not exist.
    """
    from batchlab.adapters.sql.postgres import postgres_engine

    return SqlLedger(postgres_engine(url, schema, ca=ca, logins=logins), ReadWriteThreads())


def open_memory() -> SqlLedger:
    """Return a ledger in memory that runs in its caller's thread.

    The ledger is discarded with the last reference to the ledger.
    """
    return open_memory_as(SqlLedger)


def open_memory_as(kind: type[L]) -> L:
    """Return a ledger in memory of the class `kind`."""
    engine = _unused_engines.pop() if _unused_engines else sqlite_engine(None)
    ledger = kind(engine, InlineRunner())
    weakref.finalize(ledger, _discard, engine)
    return ledger


_unused_engines: list[Engine] = []
"""Engines of discarded ledgers in memory, for reuse. A new engine would compile each SQL statement again."""


def _discard(engine: Engine) -> None:
    # A simulation does not close its ledger, and Python 3.13 warns about open databases. The next connection of the
    # engine opens a new, empty database.
    engine.dispose()
    _unused_engines.append(engine)


class SqlLedger:
    """The Ledger port over a SQL database.

    Every call raises Unreachable if the database does not answer: a lock is not released, a file cannot be opened, or a
    server is down. A call raises NotFound if a job or stage to change does not exist. Any other failure raises
    BackendError, for example a wrong password or a database of a newer batchlab.
    """

    def __init__(self, engine: Engine, run: CallRunner, sync: Sync = Sync.NONE, flush: WalFlush | None = None) -> None:
        """Take over `engine` without connecting. The engine must have the transactions of the module `engines`.

        `flush` waits for the disk if a commit of the engine does not wait for the disk.
        """
        self._sync = sync
        self._flush = flush
        self._engine = engine
        self._run = run
        self._upserts = Upserts.of(engine.dialect.name)
        self._has_schema = False

    # --- Changes ---------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> FoldResult: ...

    @overload
    async def apply(self, change: JobChange) -> ChangeResult: ...

    async def apply(self, change: Fold | JobChange) -> FoldResult | ChangeResult:
        """Apply the change to its jobs. A fold raises NotFound before it folds any completion."""
        if isinstance(change, Fold):
            if not change.completions:
                return FoldResult([], 0, {})
            return await self._write(lambda connection: self._fold(connection, change))
        written = await self._write(lambda connection: self._change(connection, change))
        # Changes other than AddJob, SetControl, and Reopen do not wait for the disk, because the next manager can
        # repeat such changes from the bucket.
        if isinstance(change, (AddJob, SetControl, Reopen)):
            await self._on_disk(None)
        return written

    def _change(self, connection: Connection, change: JobChange) -> ChangeResult:
        if isinstance(change, AddJob):
            return self._add_job(connection, change)
        projection = load_job(connection, change.job_id)
        before = Snapshot.of(projection)
        # Existing bundles are not loaded, because the statement that stores bundles does not change existing bundles.
        rows = ledger_projection.apply(projection, change, {})
        if rows is not None:
            self._store(connection, projection, before, rows)
        return ChangeResult(projection.rows(), rows is not None)

    def _add_job(self, connection: Connection, change: AddJob) -> ChangeResult:
        projection, rows = ledger_projection.begin(change)
        existing = add_job(connection, self._upserts, projection)
        if existing is not None:
            return ChangeResult(load_job(connection, existing).rows(), is_new=False)
        store_bundles(connection, self._upserts, projection, rows)
        return ChangeResult(projection.rows(), is_new=True)

    def _fold(self, connection: Connection, change: Fold) -> FoldResult:
        count = len(change.completions)
        positions = ledger_projection.positions_by_job(change)
        loaded = {job: load_job(connection, job) for job in positions}
        ledger_projection.check_stages(loaded, change)
        known = load_known(
            connection,
            self._upserts,
            [
                (job, key)
                for job, own in positions.items()
                for key in ledger_projection.keys_of(change, own, with_follows=False)
            ],
        )
        last = connection.execute(self._upserts.take_seqs, {"count": count}).scalar_one()
        first, new = last - count + 1, [False] * count
        for job, projection in loaded.items():
            before = Snapshot.of(projection)
            fresh, rows = ledger_projection.fold(projection, change, positions[job], known[job], first_seq=first)
            if rows is not None:
                self._store(connection, projection, before, rows)
            for position in fresh:
                new[position] = True
        return FoldResult(new, first, {job: projection.rows() for job, projection in loaded.items()})

    def _store(
        self, connection: Connection, projection: Projection, before: Snapshot, rows: Iterable[BundleRow]
    ) -> None:
        store_job(connection, projection, before)
        void = [name for name, stage in projection.stages.items() if stage.void_at != NEVER]
        make_void(connection, projection.job.id, void)
        store_bundles(connection, self._upserts, projection, rows)

    # --- Reads -----------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobRecord:
        return await self._read(lambda connection: find_job(connection, job), quick=True)

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRows]:
        return await self._read(lambda connection: page_of_jobs(connection, active, limit, before))

    async def rows(self, job: JobId) -> JobRows:
        return await self._read(lambda connection: rows_of(connection, job), quick=True)

    async def bundles(
        self,
        *jobs: JobId,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        query = select_bundles(jobs, stage, done, after_seq, failed).limit(limit)
        return await self._read(lambda connection: read_bundles(connection, query))

    async def results(self, job: JobId, *, after_seq: int, limit: int) -> Sequence[BundleResult]:
        query = select_bundles([job], None, True, after_seq, failed=False).limit(limit)
        return await self._read(lambda connection: read_results(connection, query))

    # --- The rest --------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        lease = over or Lease(NOBODY, 0)
        values: dict[str, str | int] = {"name": name, "owner": owner}
        values |= {"over_owner": lease.owner, "over_beat": lease.beat}

        def take(connection: Connection) -> Lease:
            row = connection.execute(self._upserts.take_lease, values).first()
            return Lease(*(row or connection.execute(_lease, {"name": name}).one()))

        return await self._write(take)

    async def release(self, name: str, owner: str) -> None:
        await self._write(lambda connection: connection.execute(_release, {"b_name": name, "b_owner": owner}))

    async def restore(self, past: JobHistory, *, over: JobRows | None) -> bool:
        return await self._on_disk(
            await self._write(lambda connection: self._restore(connection, past, over), quick=False)
        )

    def _restore(self, connection: Connection, past: JobHistory, over: JobRows | None) -> bool:
        job = past.job.id
        try:
            is_same = rows_of(connection, job).is_version(over)
        except NotFound:
            is_same = over is None
        if not is_same:
            return False
        _forget(connection, [job])
        count = sum(len(part.completions) for part in past.rounds)
        last = connection.execute(self._upserts.take_seqs, {"count": count}).scalar_one()
        projection, rows = ledger_projection.restore(past, last - count + 1)
        if add_job(connection, self._upserts, projection) is not None:
            raise NotFound(f"The ledger does not have a job {job}: another job has its token.")
        store_bundles(connection, self._upserts, projection, rows)
        return True

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        await self._write(lambda connection: _forget(connection, jobs), quick=False)
        await self._on_disk(None)

    async def dump(self) -> dict[str, Json]:
        """Return all rows about jobs, without leases and without `seq`.

        If two ledgers received the same changes in a different order, their dumps are equal. The dump omits `seq`,
        because `seq` records the order in which a ledger received its changes.
        """
        return await self._read(
            lambda connection: {table.name: _dump(connection, table) for table in (jobs, stages, bundles)}
        )

    async def close(self) -> None:
        """Wait for running calls and close the database. After `close`, no call may follow."""
        await self._run.close(self._engine.dispose)
        if self._flush:
            self._flush.close()

    # --- Transactions ----------------------------------------------------------------------------

    async def _on_disk(self, written: T) -> T:
        """Return `written` as soon as a power loss cannot undo the write."""
        if self._flush and self._sync.waits:
            await self._flush()
        return written

    async def _read(self, query: Callable[[Connection], T], *, quick: bool = False) -> T:
        return await self._transact(query, writes=False, quick=quick)

    async def _write(self, change: Callable[[Connection], T], *, quick: bool = True) -> T:
        return await self._transact(change, writes=True, quick=quick)

    async def _transact(self, work: Callable[[Connection], T], *, writes: bool, quick: bool) -> T:
        def call() -> T:
            with translate_errors(self._engine):
                if not self._has_schema:
                    engines.ensure(self._engine)
                    self._has_schema = True
                with transaction(self._engine, writes=writes, lasts=not quick) as connection:
                    return work(connection)

        return await self._run(call, writes=writes, quick=quick)


def _forget(connection: Connection, names: Sequence[JobId] | None) -> None:
    for table, column in ((bundles, bundles.c.job), (stages, stages.c.job), (jobs, jobs.c.id)):
        if names is None:
            connection.execute(delete(table))
        else:
            connection.execute(delete(table).where(column.in_(names)))


def _dump(connection: Connection, table: Table) -> list[dict[str, Json]]:
    rows = connection.execute(select(table).order_by(*table.primary_key)).mappings()
    return [{name: _readable(name, value) for name, value in row.items()} for row in rows]


def _readable(name: str, value: Any) -> Json:
    if name == "seq":
        return value is not None
    return json.loads(value) if name in ("spec", "uncut", "body") else value
