"""SQLAlchemy engines with the transactions that `SqlLedger` needs, their errors, and the migration of their schema.

Invariants: writing transactions exclude each other from their start, and a reading transaction sees one state
(`transaction`). SQLite ensures the first with BEGIN IMMEDIATE and the second with WAL. `postgres` begins transactions
of PostgreSQL.

A temporary failure (an outage, a lock, a failover) is Unreachable, so the caller retries it. A failure that a person
must fix is BackendError at once. No message contains a password.

One transaction of one writer changes the schema. So two processes that open a new database create one schema, and after
SIGKILL the schema is the old or the new one. Alembic is imported only for a migration, because its import is slow.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateSchema

from batchlab.adapters.clock import Busy
from batchlab.adapters.sql.tables import HEAD, metadata, versions
from batchlab.core.atomic_write import make_private, sync_folder
from batchlab.core.errors import BackendError, NotFound, Unreachable

_BUSY_S = 10.0
_RETRY_S = 0.01
_LOCK_S = 0.01
BEGIN = "batchlab_begin"
"""Execution option with the `Begin` of an engine's transactions."""
SCHEMA = "batchlab_schema"
"""Execution option with the name of an engine's schema, if its database has several."""

_PRAGMAS = (
    # This is safe against SIGKILL. SqlLedger flushes the log after changes that must survive a power loss.
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA journal_size_limit = 67108864",
    # 16 MiB is four times the default. Checkpoints wait for the disk, so fewer are better.
    "PRAGMA wal_autocheckpoint = 4096",
)


class Begin(Protocol):
    """Function that begins a transaction in the database's own way."""

    def __call__(self, connection: Connection, /, *, writes: bool, lasts: bool) -> None:
        """Begin a transaction, read-only unless `writes`. With `lasts` it may take minutes."""


@contextmanager
def transaction(engine: Engine, *, writes: bool = False, lasts: bool = False) -> Iterator[Connection]:
    """Run a transaction. Commit at the end, or roll back after an exception.

    All work on an engine happens in such transactions.
    """
    with engine.begin() as connection:
        # An event listener of SQLAlchemy would be slower: SQLAlchemy then looks for listeners at every step of every
        # statement, which takes longer than the renewal of a lease.
        begin: Begin = engine.get_execution_options()[BEGIN]
        begin(connection, writes=writes, lasts=lasts)
        yield connection


def sqlite_engine(path: Path | None) -> Engine:
    """Return an engine with one connection to a file, or to a database in memory without `path`."""

    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        _switch_to_wal(connection)
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    def make(*_: object) -> None:
        if path:
            make_private(path)

    engine = create_engine(
        URL.create("sqlite", database=str(path) if path else ":memory:"),
        # One connection is enough, because SqlLedger never makes two calls at once.
        poolclass=StaticPool,
        # A transaction is committed or rolled back before its connection is returned.
        pool_reset_on_return=None,
        connect_args={
            "timeout": _LOCK_S,
            "check_same_thread": False,
            # The driver would begin transactions itself, but only before the first write.
            "isolation_level": None,
        },
        execution_options={BEGIN: _begin},
    )
    event.listen(engine, "do_connect", make)
    event.listen(engine, "connect", prepare)
    return engine


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # If two processes switch a new file at the same time, SQLite refuses one without waiting, because both have read
    # and want to write.
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
        time.sleep(_RETRY_S)


def _begin(connection: Connection, *, writes: bool, lasts: bool) -> None:  # noqa: ARG001
    # If a transaction began as a reader and then wrote, SQLite would refuse the write without waiting whenever another
    # process has written meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class WalFlush:
    """Group commit for a SQLite file in WAL mode, for open connections of this process.

    With `synchronous = NORMAL`, a commit is in the log. The end of a process cannot harm it, but the log may not be on
    disk. This class flushes the log outside of SQLite's lock, and calls that wait at the same time share one flush. A
    checkpoint flushes both files itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sqlite-flush")
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._is_name_flushed = False

    async def __call__(self) -> None:
        """Wait until every committed transaction is on disk. Raise BackendError if the flush fails."""
        if self._next is None:
            # The current flush may have begun before the caller's commit.
            self._next = asyncio.get_running_loop().create_task(self._flush_after(self._current))
            self._next.add_done_callback(_read_error)
        # The cancellation of one caller must not cancel the flush of the others.
        await asyncio.shield(self._next)

    async def _flush_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        await asyncio.wrap_future(self._threads.submit(self._flush))

    def _flush(self) -> None:
        try:
            descriptor = os.open(f"{self._path}-wal", os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            if not self._is_name_flushed:
                sync_folder(self._path.parent)
                self._is_name_flushed = True
        except FileNotFoundError:
            return  # the last connection was closed, which moved the log into the database
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """End the thread after its current flush."""
        self._threads.shutdown(wait=False)


def _read_error(flush: asyncio.Task[None]) -> None:
    # All callers may have been canceled, and asyncio warns about an error that is never read.
    if not flush.cancelled():
        flush.exception()


_LOCKED = "55P03"
_FOREIGN_KEY = "23503"
# First characters of a SQLSTATE. 25006 means that the server has become a standby.
_PASSING = ("08", "25006", "40", "53", "57", "58")
# A refused connection has only a text, from the server or from libpq.
_REMEDIES = (
    (
        ("authentication failed", "no password supplied", "no pg_hba.conf entry"),
        "Check the user and the password in the ledger's URL, and the server's pg_hba.conf.",
    ),
    (
        ("certificate", "does not support SSL", "sslmode"),
        "Check sslmode and sslrootcert in the ledger's URL, or the CA bundle.",
    ),
    (
        ('relation "',),
        "The tables do not exist anymore. Start the manager again. Then `batchlab ledger rebuild` fills them again "
        "from the bucket.",
    ),
    (("does not exist",), "Create it with `createdb` and `createuser`, or name another one."),
    (("invalid connection option",), "Check the options after the question mark in the ledger's URL."),
    (("permission denied",), "The ledger's user must own the schema, or must have the permission to CREATE a schema."),
)


def name_of(engine: Engine) -> str:
    """Return the name of the database for messages."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "localhost"
    return f"{url.database or url.username} on {host}" + (f":{url.port}" if url.port else "")


def other_database(engine: Engine) -> str:
    """Return advice for the use of another database."""
    if engine.dialect.name == "sqlite":
        return "name another folder with --home"
    return "name another database"


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Raise batchlab's errors instead of the database's."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, sqlite3.Error):
            raise _from_sqlite(engine, error, cause) from error
        raise _from_postgresql(engine, error, cause) from error


def _from_sqlite(engine: Engine, error: SQLAlchemyError, cause: sqlite3.Error) -> BackendError:
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, IntegrityError):
        return _nothing_there()
    if isinstance(error, (OperationalError, InterfaceError)):
        kind = Busy if code == sqlite3.SQLITE_BUSY else Unreachable
        return kind(f"The ledger {name_of(engine)} does not answer: {cause}.")
    damaged = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    return BackendError(
        f"The ledger {name_of(engine)} cannot be used: {cause}.",
        remedy="Move the file away and start the grid again. Then `batchlab ledger rebuild` fills the new ledger from "
        "the bucket."
        if damaged
        else "",
    )


def _from_postgresql(engine: Engine, error: SQLAlchemyError, cause: BaseException | None) -> BackendError:
    state = getattr(cause, "sqlstate", None) or ""
    text = one_line(cause)
    remedy = next((what for signs, what in _REMEDIES if any(s in text for s in signs)), "")
    if state == _FOREIGN_KEY:
        return _nothing_there()
    if state == _LOCKED:
        return Busy(f"Another process has held the lock of the ledger {name_of(engine)} for too long.")
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = isinstance(error, OperationalError) and not state and not remedy
    if lost or refused or state.startswith(_PASSING):
        return Unreachable(f"The ledger {name_of(engine)} does not answer: {text}.")
    return BackendError(f"The ledger {name_of(engine)} cannot be used: {text}.", remedy=remedy)


def one_line(cause: BaseException | None) -> str:
    """Return the text of a database error in one line."""
    return " ".join(str(cause).split()).rstrip(".")


def is_refusal(error: BaseException) -> bool:
    """Return whether PostgreSQL or RDS's PAM has refused a password."""
    return "authentication failed" in str(error)


def _nothing_there() -> NotFound:
    # Rows that may exist are inserted conditionally, so this error is a missing foreign key.
    return NotFound("The ledger has no such job or stage.")


MIGRATIONS = Path(__file__).parent / "migrations"


def ensure(engine: Engine) -> None:
    """Create or migrate the tables. Raise BackendError if a newer batchlab has migrated them."""
    with transaction(engine) as connection:
        if _version(connection) == HEAD:
            return
    with transaction(engine, writes=True, lasts=True) as connection:
        # The version is read again, because from now on no other process can change it.
        version = _version(connection)
        if version is None:
            _make_room(connection)
            create(connection)
        elif version != HEAD:
            upgrade(connection)


def _make_room(connection: Connection) -> None:
    """Create the schema, if the database has schemas and lacks this one."""
    schema = connection.get_execution_options().get(SCHEMA)
    # CREATE SCHEMA IF NOT EXISTS would need the permission to create even if the schema exists.
    if schema and not inspect(connection).has_schema(schema):
        connection.execute(CreateSchema(schema))


def create(connection: Connection) -> None:
    """Create the newest schema in an empty database."""
    metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(versions).values(version_num=HEAD))


def upgrade(connection: Connection) -> None:
    """Run the missing migrations in the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    """Return None for a new database, and "" if Alembic has begun without a migration."""
    if not inspect(connection).has_table(versions.name):
        return None
    version = connection.execute(select(versions.c.version_num)).scalar() or ""
    if version > HEAD:
        raise BackendError(
            f"{name_of(connection.engine)} was written by a newer batchlab (schema {version}).",
            remedy=f"Install that version, or {other_database(connection.engine)}.",
        )
    return version
