"""The ledger during outages of PostgreSQL: a stopped, restarted, frozen, or foreign server."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from random import Random

import pytest
from sqlalchemy import Connection, Select

from batchlab.adapters.clock import Busy
from batchlab.adapters.sql import ledger as sql_ledger
from batchlab.adapters.sql import postgres as sql_postgres
from batchlab.adapters.sql import rows
from batchlab.adapters.sql.rows import Snapshot
from batchlab.core.errors import Unreachable
from batchlab.core.ledger_projection import Projection
from batchlab.core.model import Control
from batchlab.core.port_retries import Patience, patiently
from batchlab.core.ports import BundleRecord, Fold, SetControl
from tests.support.contract.ledger_suite import (
    BATCH,
    JOB,
    DumpingLedger,
    bundle,
    counts_of,
    done,
    fold,
    ledger_in,
    many,
    submit,
)
from tests.support.postgres.server import DATABASE, Postgres, PostgresServer


def _patient(ledger: DumpingLedger) -> DumpingLedger:
    """Wrap the ledger with the manager's retries."""
    return patiently(ledger, Patience(Random(1), limit_s=60.0))


async def _folded(ledger: DumpingLedger, count: int) -> None:
    completions = many()[:count]
    await submit(ledger)
    for i in range(0, count, BATCH):
        await fold(ledger, *completions[i : i + BATCH])


def test_sessions_that_were_ended_meanwhile_are_not_noticed(postgres: Postgres) -> None:
    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            await asyncio.gather(*(ledger.jobs() for _ in range(8)))
            for _ in range(3):
                assert postgres.server.end_sessions() > 0
                await _until(lambda: postgres.server.sessions() == 0)
                assert (await ledger.job(JOB.id)).job == JOB
                assert (await ledger.lease("leader", "a")).owner == "a"

    asyncio.run(main())


def test_sessions_that_are_ended_all_the_time_leave_no_trace(postgres: Postgres) -> None:
    """No call is applied partly or twice."""

    async def main() -> None:
        completions, ended, folded = many(), 0, 0
        async with ledger_in(postgres) as ledger, ledger_in(None) as reference:
            patient = _patient(ledger)
            await submit(patient)
            while ended < 10:
                # The sessions are ended so often that some ends come in the middle of a call.
                ending = asyncio.create_task(asyncio.to_thread(postgres.server.end_sessions))
                while not ending.done():
                    await fold(patient, *completions[folded : folded + BATCH])
                    folded += BATCH
                ended += ending.result()
            assert folded <= len(completions)
            await submit(reference)
            await fold(reference, *completions[:folded])
            assert await ledger.dump() == await reference.dump()

    asyncio.run(main())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_restarted_server_finds_its_clients(frail_server: PostgresServer, how: signal.Signals) -> None:
    place = Postgres(frail_server, "grid")

    async def main() -> None:
        async with ledger_in(place) as ledger, ledger_in(None) as reference:
            work = asyncio.ensure_future(_folded(_patient(ledger), 4_000))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(frail_server.stop, how)
            assert not work.done()
            began_s = time.monotonic()
            with pytest.raises(Unreachable, match=r"ledgers on 127\.0\.0\.1:\d+ does not answer"):
                await ledger.jobs()
            assert time.monotonic() - began_s < 2.0, "nobody waits for a refusal"
            await asyncio.sleep(3.0)
            await asyncio.to_thread(frail_server.start)
            await work
            await _folded(reference, 4_000)
            assert await ledger.dump() == await reference.dump()

    asyncio.run(main())


def test_frozen_server_is_an_outage_and_the_loop_continues(
    frail_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container of the server is paused: connections stay open, but no answer arrives."""
    monkeypatch.setattr(sql_postgres, "STATEMENT_S", 1.0)
    monkeypatch.setattr(sql_postgres, "GRACE_S", 0.5)
    place = Postgres(frail_server, "grid")
    beats: list[float] = []

    async def beat() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with ledger_in(place) as ledger:
            await submit(ledger)
            beating = asyncio.create_task(beat())
            pids = frail_server.pids
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                began_s = time.monotonic()
                for call in (fold(ledger, done(bundle(0, 1))), ledger.job(JOB.id)):
                    async with asyncio.timeout(20.0):
                        with pytest.raises(Unreachable):
                            await call
                assert 1.4 < time.monotonic() - began_s < 15.0
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            beating.cancel()
            longest_s = max(b - a for a, b in pairwise(beats))
            assert longest_s < 0.5
            await _patient(ledger).apply(Fold([done(bundle(0, 1))], [{}]))
            assert (await counts_of(ledger)).succeeded == 1

    asyncio.run(main())


def test_a_lock_that_is_not_given_up_is_an_outage(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_postgres, "LOCK_S", 0.2)

    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            with closing(postgres.server.connect()) as other:
                other.execute("SELECT pg_advisory_lock(%s)", [sql_postgres.key(postgres.schema)])
                with pytest.raises(Busy, match="Another process has held the lock"):
                    await fold(ledger, done(bundle(0, 1)))
                assert (await counts_of(ledger)).succeeded == 0, "readers are not held up"
            assert await fold(ledger, done(bundle(0, 1))) == [True]

    asyncio.run(main())


def test_idle_transaction_is_ended(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that is paused while it writes must not keep another manager from leading. The paused write is not done
    later."""
    monkeypatch.setattr(sql_postgres, "IDLE_CLIENT_S", 0.3)
    asleep, awake = threading.Event(), threading.Event()
    real = rows.store_job

    def sleepy(connection: Connection, projection: Projection, before: Snapshot) -> None:
        real(connection, projection, before)
        asleep.set()
        awake.wait()

    async def main() -> None:
        async with ledger_in(postgres) as ledger, ledger_in(postgres) as other:
            await submit(ledger)
            with monkeypatch.context() as patch:
                patch.setattr(sql_ledger, "store_job", sleepy)
                sleeping = asyncio.create_task(ledger.apply(SetControl(JOB.id, Control.CANCEL, 0)))
                await asyncio.to_thread(asleep.wait)
                try:
                    assert (await other.lease("leader", "b")).owner == "b"
                finally:
                    awake.set()
                with pytest.raises(Unreachable):
                    await sleeping
            assert (await other.job(JOB.id)).control is Control.RUN

    asyncio.run(main())


def test_read_only_server_is_awaited(postgres: Postgres) -> None:
    """After a failover, the address may still lead to the old server."""
    server = postgres.server

    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            alter = f"ALTER DATABASE {DATABASE}"
            server.execute(f"{alter} SET default_transaction_read_only = on", database="postgres")
            try:
                server.end_sessions()
                with pytest.raises(Unreachable, match="read-only"):
                    await ledger.job(JOB.id)
            finally:
                server.execute(f"{alter} RESET default_transaction_read_only", database="postgres")
            await _patient(ledger).job(JOB.id)

    asyncio.run(main())


def test_long_listing_blocks_no_other_call(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, go_on = threading.Event(), threading.Event()
    real = rows.read_bundles

    def slow(connection: Connection, query: Select[int | None, str]) -> list[BundleRecord]:
        found = real(connection, query)
        listing.set()
        go_on.wait()
        # The content is unchanged since the beginning.
        assert real(connection, query) == found
        return found

    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            await fold(ledger, done(bundle(0, 1)))
            with monkeypatch.context() as patch:
                patch.setattr(sql_ledger, "read_bundles", slow)
                asked = asyncio.create_task(ledger.bundles(JOB.id))
                await asyncio.to_thread(listing.wait)
            try:
                async with asyncio.timeout(20.0):
                    assert await fold(ledger, done(bundle(1, 2))) == [True]
                    assert (await ledger.lease("leader", "a")).owner == "a"
                    assert (await counts_of(ledger)).succeeded == 2
            finally:
                go_on.set()
            assert len(await asked) == 1
            assert len(await ledger.bundles(JOB.id)) == 2

    asyncio.run(main())


def test_closing_waits_for_what_is_under_way_and_leaves_no_session(postgres: Postgres) -> None:
    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            folds = [asyncio.create_task(fold(ledger, one)) for one in many()[:50]]
            reads = [asyncio.create_task(ledger.dump()) for _ in range(10)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*folds) == [[True]] * 50
        assert all(isinstance(one, dict) for one in await asyncio.gather(*reads))
        await _until(lambda: postgres.server.sessions() == 0)

    asyncio.run(main())


async def _until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
