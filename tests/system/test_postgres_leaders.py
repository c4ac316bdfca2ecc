"""Several managers on one PostgreSQL database. One manager leads at a time, and the job completes whatever happens to
the leader."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from batchlab.adapters.sql import open_memory, open_postgres
from batchlab.core.model import JobState
from batchlab.manager.ledger_rebuild import rebuild
from batchlab.manager.manager import LEASE
from tests.support.contract.ledger_suite import ledger_in
from tests.support.postgres.managers import LEASE_S, TAKEN_OVER_S, check_bucket, done, ended, manager, ports_in, workers
from tests.support.postgres.server import Postgres, PostgresServer

AWAY_S = LEASE_S * 2


def test_leaders_are_paused_and_killed_and_the_job_completes(postgres: Postgres, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            start = partial(manager, tmp_path, postgres.url, postgres.schema)
            first = stack.enter_context(start("a"))
            await first.says("leads", 20.0)
            second = stack.enter_context(start("b"))
            ledger = open_postgres(postgres.url, schema=postgres.schema)
            ports = await stack.enter_async_context(ports_in(tmp_path, ledger))
            async with workers(ports, 2):
                await done(ledger, 30)
                # The leader is paused at any point, and does not notice that time passes.
                first.process.send_signal(signal.SIGSTOP)
                began_s = time.monotonic()
                await second.says("leads", TAKEN_OVER_S)
                assert time.monotonic() - began_s > LEASE_S / 3
                await done(ledger, 90)
                first.process.send_signal(signal.SIGCONT)
                await first.says("lost", TAKEN_OVER_S)
                await done(ledger, 150)
                second.process.send_signal(signal.SIGKILL)
                await first.says("leads", TAKEN_OVER_S)
                assert (await ledger.lease(LEASE, "nobody")).owner == first.owner
                assert (await ended(ledger)).state is JobState.SUCCEEDED
            await check_bucket(ports, ledger)
            grown = await ledger.dump()
            # Invariant I3 holds on the same database and on another kind of ledger.
            async with ledger_in(Postgres(postgres.server, f"{postgres.schema}.again")) as again:
                await rebuild(await stack.enter_async_context(ports_in(tmp_path, again)))
                assert await again.dump() == grown
            memory = open_memory()
            await rebuild(await stack.enter_async_context(ports_in(tmp_path, memory)))
            assert await memory.dump() == grown
            await ledger.close()

    asyncio.run(main())
    postgres.server.execute(f'DROP SCHEMA "{postgres.schema}.again" CASCADE')


def test_outage_longer_than_a_lease_costs_only_time(frail_server: PostgresServer, tmp_path: Path) -> None:
    """The leader stops leading, and leads again later."""
    place = Postgres(frail_server, "grid")

    async def main() -> None:
        with manager(tmp_path, place.url, place.schema, "a") as only:
            await only.says("leads", 20.0)
            async with ledger_in(place) as ledger, ports_in(tmp_path, ledger) as ports:
                async with workers(ports, 2):
                    await done(ledger, 30)
                    await asyncio.to_thread(frail_server.stop, signal.SIGQUIT)
                    await asyncio.sleep(AWAY_S)
                    await asyncio.to_thread(frail_server.start)
                    await only.says("lost", TAKEN_OVER_S + AWAY_S)
                    await only.says("leads", TAKEN_OVER_S)
                    assert (await ended(ledger)).state is JobState.SUCCEEDED
                await check_bucket(ports, ledger)

    asyncio.run(main())
