"""SQLAlchemy engines for `SqlLedger`: transactions, errors, and the migration of the schema.

Invariants: writing transactions exclude each other from their start, and a reading transaction sees one state
(`transaction`). On SQLite, BEGIN IMMEDIATE excludes other writers. SQLite's write-ahead log (WAL) lets a reading
transaction see one state. The module `postgres` begins transactions of PostgreSQL.

A temporary failure (an outage, a lock, a failover) raises Unreachable, so the caller retries. A failure that a person
must correct raises BackendError at once. No error message contains a password.

One transaction of one writer changes the schema. Two processes that open a new database at the same time therefore
create one schema, and SIGKILL leaves the old or the new schema. Alembic is imported only for a migration, because its
import is slow.
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
from batchlab.core.operating_system import flush_data

_BUSY_S = 10.0
_RETRY_S = 0.01
_LOCK_S = 0.01
BEGIN = "batchlab_begin"
"""Name of the engine's execution option that contains its `Begin` function."""
READS_ONLY = "batchlab_reads_only"
"""Name of the engine's execution option that is true if the engine cannot write."""
SCHEMA = "batchlab_schema"
"""Name of the engine's execution option that contains its schema, if the database has several schemas."""

_PRAGMAS = (
    # `synchronous = NORMAL` is safe against SIGKILL, but not against a power loss. SqlLedger flushes SQLite's log after
    # changes that must survive a power loss.
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA journal_size_limit = 67108864",
    # A checkpoint every 4,096 pages (16 MiB) is four times the default interval. Checkpoints wait for the disk, so
    # longer intervals are better.
    "PRAGMA wal_autocheckpoint = 4096",
)


class Begin(Protocol):
    """Protocol of functions that begin a transaction on one kind of database."""

    def __call__(self, connection: Connection, /, *, writes: bool, lasts: bool) -> None:
        """Begin a transaction, read-only unless `writes`. With `lasts`, the transaction may take minutes."""


@contextmanager
def transaction(engine: Engine, *, writes: bool = False, lasts: bool = False) -> Iterator[Connection]:
    """Begin a transaction and yield its connection. Commit the transaction at the end, or roll back after an exception.

    Every statement on an engine runs in a transaction that `transaction` has begun.
    """
    with engine.begin() as connection:
        # The transaction begins here instead of in an event listener of SQLAlchemy, which would be slower. With an
        # event listener, SQLAlchemy checks for listeners at every step of every statement, which takes longer than a
        # lease renewal.
        begin: Begin = engine.get_execution_options()[BEGIN]
        begin(connection, writes=writes, lasts=lasts)
        yield connection


def sqlite_engine(path: Path | None) -> Engine:
    """Return a SQLite engine with one connection to the file `path`. Without `path`, the database is in memory."""

    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        _switch_to_wal(connection)
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    def make(*_: object) -> None:
        if path:
            make_private(path)

    engine = create_engine(
        URL.create("sqlite", database=str(path) if path else ":memory:"),
        # One connection per engine is enough, because SqlLedger never makes two calls at once.
        poolclass=StaticPool,
        # Every transaction is committed or rolled back before its connection returns to the pool.
        pool_reset_on_return=None,
        connect_args={
            "timeout": _LOCK_S,
            "check_same_thread": False,
            # Python's SQLite driver would begin transactions itself, but only before the first write.
            "isolation_level": None,
        },
        execution_options={BEGIN: _begin},
    )
    event.listen(engine, "do_connect", make)
    event.listen(engine, "connect", prepare)
    return engine


def reading_engine(path: Path) -> Engine:
    """Return a SQLite engine that cannot write the file `path`, for a time in which no process writes the file."""

    def connect() -> sqlite3.Connection:
        # Also a connection that only reads creates the files of the write-ahead log, unless the file is immutable. A
        # killed process leaves a log with content, which the connection must read.
        log = path.with_name(f"{path.name}-wal")
        has_log = log.exists() and log.stat().st_size > 0
        uri = f"{path.as_uri()}?mode=ro{'' if has_log else '&immutable=1'}"
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)

    return create_engine(
        URL.create("sqlite", database=str(path)),
        creator=connect,
        poolclass=StaticPool,
        pool_reset_on_return=None,
        execution_options={BEGIN: _begin, READS_ONLY: True},
    )


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # If two processes switch a new file to WAL at the same time, SQLite refuses one of the processes at once, because
    # both processes want to write.
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
    # If a transaction began as a reader and then wrote, SQLite would immediately refuse the write after any write of
    # another process.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class WalFlush:
    """Flush of a SQLite file in WAL mode, shared by the calls of this process.

    With `synchronous = NORMAL`, a commit is only in SQLite's write-ahead log. The end of a process cannot harm a commit
    in the log, but the log may not be on disk yet. The class flushes the log outside of SQLite's lock, and calls that
    wait at the same time share one flush. At a checkpoint, SQLite itself flushes the log and the database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sqlite-flush")
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._is_name_flushed = False

    async def __call__(self) -> None:
        """Wait until every committed transaction is on disk. Raise BackendError if the flush to disk fails."""
        if self._next is None:
            # A new flush is started, because the current flush may have begun before the caller's commit.
            self._next = asyncio.get_running_loop().create_task(self._flush_after(self._current))
            self._next.add_done_callback(_read_error)
        # The cancellation of one caller must not cancel the flush of the other callers.
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
                flush_data(descriptor)
            finally:
                os.close(descriptor)
            if not self._is_name_flushed:
                sync_folder(self._path.parent)
                self._is_name_flushed = True
        except FileNotFoundError:
            return  # SQLite moved the log into the database when the last connection was closed.
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """End the flush thread after its current flush."""
        self._threads.shutdown(wait=False)


def _read_error(flush: asyncio.Task[None]) -> None:
    # The error of the flush is read here, because asyncio warns about an unread error if all callers were canceled.
    if not flush.cancelled():
        flush.exception()


_LOCKED = "55P03"
_FOREIGN_KEY = "23503"
# First characters of SQLSTATE codes that mean a temporary failure. The code 25006 means that the server has become a
# standby.
_PASSING = ("08", "25006", "40", "53", "57", "58")
# The error of a refused connection does not have a SQLSTATE, but only a text from the server or from libpq.
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
        "The tables do not exist anymore. Start the manager again. Then `batchlab grid rebuild-ledger` fills them "
        "again from the bucket.",
    ),
    (("does not exist",), "Create it with `createdb` and `createuser`, or name another one."),
    (("invalid connection option",), "Check the options after the question mark in the ledger's URL."),
    (("permission denied",), "The ledger's user must own the schema, or must have the permission to CREATE a schema."),
)


def name_of(engine: Engine) -> str:
    """Return the name of the database for error messages."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "localhost"
    return f"{url.database or url.username} on {host}" + (f":{url.port}" if url.port else "")


def other_database(engine: Engine) -> str:
    """Return advice on how to use another database."""
    if engine.dialect.name == "sqlite":
        return "name another folder with --home"
    return "name another database"


@contextmanager
def translate_errors(engine: Engine) -> Iterator[None]:
    """Raise batchlab's errors instead of the database's errors."""
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
        remedy="Move the file away and start the grid again. Then `batchlab grid rebuild-ledger` fills the new ledger "
        "from the bucket."
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
    # Rows that may already exist are inserted conditionally, so an IntegrityError means a missing foreign key.
    return NotFound("The ledger has no such job or stage.")


MIGRATIONS = Path(__file__).parent / "migrations"


def ensure(engine: Engine) -> None:
    """Create or migrate the tables of the ledger. Raise BackendError if a newer batchlab has migrated the tables."""
    with transaction(engine) as connection:
        if _version(connection) == HEAD:
            return
    if engine.get_execution_options().get(READS_ONLY):
        raise BackendError(
            f"{name_of(engine)} was written by an older batchlab, or is empty.",
            remedy="`batchlab grid up` brings it up to date.",
        )
    with transaction(engine, writes=True, lasts=True) as connection:
        # This transaction reads the schema version again, because other processes cannot change the version during a
        # writing transaction.
        version = _version(connection)
        if version is None:
            _make_room(connection)
            create(connection)
        elif version != HEAD:
            upgrade(connection)


def _make_room(connection: Connection) -> None:
    """Create the ledger's schema if the database supports schemas and the ledger's schema does not exist."""
    schema = connection.get_execution_options().get(SCHEMA)
    # CREATE SCHEMA IF NOT EXISTS would need the permission to create schemas even if the schema exists.
    if schema and not inspect(connection).has_schema(schema):
        connection.execute(CreateSchema(schema))


def create(connection: Connection) -> None:
    """Create the tables of the newest version in an empty database."""
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
    """Return the version of the schema, or None for a new database.

    Return "" if Alembic's table does not contain a version.
    """
    if not inspect(connection).has_table(versions.name):
        return None
    version = connection.execute(select(versions.c.version_num)).scalar() or ""
    if version > HEAD:
        raise BackendError(
            f"{name_of(connection.engine)} was written by a newer batchlab (schema {version}).",
            remedy=f"Install that version, or {other_database(connection.engine)}.",
        )
    return version
