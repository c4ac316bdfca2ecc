"""Opens databases so that SqlLedger may rely on them.

Invariant: transactions that write exclude each other from their begin on, and one that reads sees
one state (`transaction`). SQLite gives the first with BEGIN IMMEDIATE and the second with WAL;
PostgreSQL's way to begin is in postgres.py.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event

from batchlab.adapters.local.sqlite_wal import make_private

_BUSY_S = 10.0
_AGAIN_S = 0.01
_MOMENT_S = 0.01
BEGIN = "batchlab_begin"
"""The execution option that holds the Begin of an engine's transactions."""
SCHEMA = "batchlab_schema"
"""The execution option that names an engine's schema, where its database has several."""

_PRAGMAS = (
    # Safe against SIGKILL. SqlLedger flushes the log after what must outlive a power cut.
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA journal_size_limit = 67108864",
    # 16 MiB, four times the default: each checkpoint waits for the disk.
    "PRAGMA wal_autocheckpoint = 4096",
)


class Begin(Protocol):
    """Says BEGIN in a database's own way."""

    def __call__(self, connection: Connection, /, *, writes: bool, lasts: bool) -> None:
        """For a transaction that `writes`, or only reads; one that `lasts` may take minutes."""


@contextmanager
def transaction(
    engine: Engine, *, writes: bool = False, lasts: bool = False
) -> Iterator[Connection]:
    """Commits at the end, or rolls back what raises. Everything on an engine happens in these."""
    with engine.begin() as connection:
        # Not a listener of SQLAlchemy's: an engine that has one asks for listeners at every step
        # of every statement, which takes longer than what a lease is.
        begin: Begin = engine.get_execution_options()[BEGIN]
        begin(connection, writes=writes, lasts=lasts)
        yield connection


def sqlite_engine(path: Path | None) -> Engine:
    """One connection to a file, or with None to a database in memory."""

    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        _switch_to_wal(connection)
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    def make(*_: object) -> None:
        if path:
            make_private(path)

    engine = create_engine(
        URL.create("sqlite", database=str(path) if path else ":memory:"),
        # One connection, whoever's turn it is: SqlLedger never runs two things at once.
        poolclass=StaticPool,
        # A transaction has been committed or rolled back before its connection is given back.
        pool_reset_on_return=None,
        connect_args={
            "timeout": _MOMENT_S,
            "check_same_thread": False,
            # The driver would begin by itself, but only before the first write.
            "isolation_level": None,
        },
        execution_options={BEGIN: _begin},
    )
    event.listen(engine, "do_connect", make)
    event.listen(engine, "connect", prepare)
    return engine


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # Two processes that switch a fresh file at once: SQLite refuses one at once, whatever its
    # busy timeout, because both read and want to write.
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
        time.sleep(_AGAIN_S)


def _begin(connection: Connection, *, writes: bool, lasts: bool) -> None:  # noqa: ARG001
    # A reader that turned into a writer half-way would be refused when another process has
    # written meanwhile, without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
