"""Opens databases so that SqlLedger may rely on them, and says where its calls run.

Invariant: transactions that write exclude each other from their begin on (`as_writer`), and a
transaction that reads sees one state. SQLite gives the first with BEGIN IMMEDIATE and the second
with WAL; PostgreSQL's begin hook is in postgres.py.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event

from batchlab.errors import Unreachable

T = TypeVar("T")

_BUSY_S = 10.0
_AGAIN_S = 0.01
_MOMENT_S = 0.01
_WRITES = "batchlab_writes"
_LASTS = "batchlab_lasts"
SCHEMA = "batchlab_schema"
"""The execution option that names an engine's schema, where its database has several."""

_PRAGMAS = (
    # Safe against SIGKILL; a power cut may cost the last folds, which the reconciler repeats.
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA journal_size_limit = 67108864",
    # 16 MiB, four times the default: each checkpoint waits for the disk.
    "PRAGMA wal_autocheckpoint = 4096",
)


def as_writer(engine: Engine) -> Engine:
    """The same engine and connections, for transactions that write."""
    return engine.execution_options(**{_WRITES: True})


def at_length(engine: Engine) -> Engine:
    """The same engine and connections, for transactions that may take minutes."""
    return engine.execution_options(**{_LASTS: True})


def writes(connection: Connection) -> bool:
    """Whether it comes from an engine `as_writer`."""
    return bool(connection.get_execution_options().get(_WRITES))


def lasts(connection: Connection) -> bool:
    """Whether it comes from an engine `at_length`."""
    return bool(connection.get_execution_options().get(_LASTS))


def sqlite_engine(path: Path | None) -> Engine:
    """One connection to a file, or with None to a database that lives in memory."""
    engine = create_engine(
        URL.create("sqlite", database=str(path) if path else ":memory:"),
        # One connection, whoever's turn it is: SqlLedger never runs two things at once.
        poolclass=StaticPool,
        connect_args={
            "timeout": _MOMENT_S,
            "check_same_thread": False,
            # The driver would begin by itself, but only before the first write.
            "isolation_level": None,
        },
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    _switch_to_wal(connection)
    for pragma in _PRAGMAS:
        connection.execute(pragma)


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


def _begin(connection: Connection) -> None:
    # A reader that turned into a writer half-way would be refused when another process has
    # written meanwhile, without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes(connection) else "BEGIN")


class Busy(Unreachable):
    """Somebody else has the database's lock."""


class Run(Protocol):
    """Where blocking calls run: those that write one at a time, in the order they are made."""

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:
        """The result of `call`, which takes about a millisecond where it is `quick`."""

    async def close(self, last: Callable[[], None]) -> None:
        """Run `last` once everything has run that was asked for, and nothing after it."""


class Inline:
    """On the spot: for the simulator, whose event loop knows no threads."""

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        return call()

    async def close(self, last: Callable[[], None]) -> None:
        last()


class OneThread:
    """In one thread of its own, where calls queue up in the order they are made; but a quick one
    that finds the thread idle runs on the spot, since going there and back takes as long."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._waiting = 0

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        if quick and not self._waiting:
            # Somebody else's lock is waited for where that holds up nobody.
            with suppress(Busy):
                return call()
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, _patiently, call)
        finally:
            self._waiting -= 1

    async def close(self, last: Callable[[], None]) -> None:
        await self(last, writes=True, quick=False)
        self._executor.shutdown()


class Threads:
    """What writes in one thread, in the order it is asked for; what reads beside it in a few
    others, so that a long listing holds up neither a fold nor the lease.

    For a database behind a network: no call, however quick, runs in the event loop's thread, which
    would wait with it. A read that is asked for while a write is under way may see the state
    before it, even where its answer comes later.
    """

    READERS = 3

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-write")
        self._readers = ThreadPoolExecutor(self.READERS, thread_name_prefix="ledger-read")

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        executor = self._writer if writes else self._readers
        return await asyncio.get_running_loop().run_in_executor(executor, call)

    async def close(self, last: Callable[[], None]) -> None:
        def end() -> None:
            self._readers.shutdown()
            self._writer.shutdown()
            last()

        await asyncio.get_running_loop().run_in_executor(None, end)


def _patiently(call: Callable[[], T]) -> T:
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except Busy:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_AGAIN_S)
