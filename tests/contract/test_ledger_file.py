"""A ledger in a file: locks, and files that are not ledgers."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from batchlab.adapters import clock
from batchlab.core.errors import BackendError, Unreachable
from tests.support.contract.ledger_suite import JOB, bundle, counts_of, done, fold, ledger_in, submit


def _lock(path: Path) -> sqlite3.Connection:
    """Open a transaction of another connection that holds the write lock until the connection is closed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_lock_released_in_time_is_awaited(tmp_path: Path) -> None:
    """The event loop and readers continue while a call waits for the lock."""
    path = tmp_path / "ledger.sqlite"

    async def main() -> None:
        async with ledger_in(path) as ledger, ledger_in(path) as reader:
            await submit(ledger)
            with closing(_lock(path)):
                waiting = asyncio.create_task(fold(ledger, done(bundle(0, 5))))
                assert (await counts_of(reader)).succeeded == 0
                assert not waiting.done()
            assert await waiting == [True]

    asyncio.run(main())


def test_a_lock_that_is_not_given_up_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_BUSY_S", 0.05)
    path = tmp_path / "ledger.sqlite"

    async def main() -> None:
        async with ledger_in(path) as ledger:
            await submit(ledger)
            with closing(_lock(path)):
                with pytest.raises(Unreachable, match="locked") as caught:
                    await fold(ledger, done(bundle(0, 5)))
                assert isinstance(caught.value.__cause__, Exception)
                assert (await ledger.job(JOB.id)).job == JOB
            assert await fold(ledger, done(bundle(0, 5))) == [True]

    asyncio.run(main())


def test_a_file_that_cannot_be_opened_is_an_outage(tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path / "nowhere" / "ledger.sqlite") as ledger:
            with pytest.raises(Unreachable, match=r"nowhere/ledger\.sqlite"):
                await ledger.jobs()
            (tmp_path / "nowhere").mkdir()
            assert list(await ledger.jobs()) == []

    asyncio.run(main())


def test_file_that_is_not_a_database_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"somebody's letter, not a database. " * 100)
    before = path.read_bytes()

    async def main() -> None:
        async with ledger_in(path) as ledger:
            with pytest.raises(BackendError, match=r"ledger\.sqlite cannot be used"):
                await ledger.jobs()

    asyncio.run(main())
    assert path.read_bytes() == before
