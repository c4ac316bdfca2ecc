"""SQLAlchemy engines with the transactions that `SqlLedger` needs.

Invariant: writing transactions exclude each other from their start, and a reading transaction sees
one state (`transaction`). SQLite ensures the first with BEGIN IMMEDIATE and the second with WAL.
`postgres` has PostgreSQL's way to begin.
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
"""Execution option with the `Begin` of an engine's transactions."""
SCHEMA = "batchlab_schema"
"""Execution option with the name of an engine's schema, if its database has several."""

_PRAGMAS = (
    # This is safe against SIGKILL. SqlLedger flushes the log after changes that must survive a
    # power loss.
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
def transaction(
    engine: Engine, *, writes: bool = False, lasts: bool = False
) -> Iterator[Connection]:
    """Run a transaction. Commit at the end, or roll back after an exception.

    All work on an engine happens in such transactions.
    """
    with engine.begin() as connection:
        # An event listener of SQLAlchemy would be slower: SQLAlchemy then looks for listeners at
        # every step of every statement, which takes longer than the renewal of a lease.
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
            "timeout": _MOMENT_S,
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
    # If two processes switch a new file at the same time, SQLite refuses one without waiting,
    # because both have read and want to write.
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
    # If a transaction began as a reader and then wrote, SQLite would refuse the write without
    # waiting whenever another process has written meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
