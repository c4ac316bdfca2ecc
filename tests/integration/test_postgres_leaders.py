"""Several managers on one PostgreSQL: one leads, whatever becomes of it, and the job completes."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from batchlab.adapters.sql import open_memory, open_postgres
from batchlab.errors import NotFound
from batchlab.manager.live import Ports
from batchlab.manager.manager import LEASE
from batchlab.manager.rebuild import rebuild
from batchlab.model import JobState, Json
from batchlab.ports import JobRecord
from batchlab.protocol import wire
from tests.contract.ledger_suite import DumpingLedger, ledger_in
from tests.integration.postgres_managers import (
    ITEMS,
    JOB,
    LEASE_S,
    SQUARE,
    manager,
    ports_in,
    workers,
)
from tests.postgres import Postgres, PostgresServer

# A standby looks every third of the lease; the rest is for a machine that is busy.
TAKEN_OVER_S = LEASE_S * 5 / 3 + 20.0

AWAY_S = LEASE_S * 2


async def _done(ledger: DumpingLedger, at_least: int) -> None:
    """Wait until so many tasks have succeeded."""
    deadline_s = time.monotonic() + 60
    while True:
        try:
            if (await ledger.rows(JOB.id)).stages[0].counts.succeeded >= at_least:
                return
        except NotFound:
            pass  # nobody has submitted it yet
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)


async def _ended(ledger: DumpingLedger) -> JobRecord:
    deadline_s = time.monotonic() + 60
    while not (record := await ledger.job(JOB.id)).state.ended:
        assert time.monotonic() < deadline_s, await ledger.rows(JOB.id)
        await asyncio.sleep(0.1)
    return record


async def _check_bucket(ports: Ports, ledger: DumpingLedger) -> None:
    """I1 and I2: each task has one result, and the sums close."""
    squares: dict[int, Json] = {}
    totals: dict[int, Json] = {}
    async for page in ports.objects.list(f"jobs/{JOB.id}/"):
        for info in page:
            if "/outcomes/" in info.key:
                outcome = wire.outcome_from_json(wire.loads(await ports.objects.get(info.key)))
                values = dict(zip(outcome.succeeded, outcome.values, strict=True))
                into = squares if outcome.bundle.stage == SQUARE else totals
                assert not into.keys() & values.keys()
                into |= values
    assert squares == {n: n**2 for n in ITEMS}
    assert totals == {0: sum(n**2 for n in ITEMS)}
    for stage in (await ledger.rows(JOB.id)).stages:
        counts = stage.counts
        assert counts.planned == counts.succeeded == (len(ITEMS) if counts.stage == SQUARE else 1)


def test_leaders_are_paused_and_killed_and_the_job_completes(
    postgres: Postgres, tmp_path: Path
) -> None:
    async def main() -> None:
        with ExitStack() as stack:
            start = partial(manager, tmp_path, postgres.url, postgres.schema)
            first = stack.enter_context(start("a"))
            await first.says("leads", 20.0)
            second = stack.enter_context(start("b"))
            ledger = open_postgres(postgres.url, schema=postgres.schema)
            ports = ports_in(tmp_path, ledger)
            async with workers(ports, 2):
                await _done(ledger, 30)
                # Paused, wherever it is: it has not noticed that time goes on without it.
                first.process.send_signal(signal.SIGSTOP)
                began_s = time.monotonic()
                await second.says("leads", TAKEN_OVER_S)
                assert time.monotonic() - began_s > LEASE_S / 3
                await _done(ledger, 90)
                first.process.send_signal(signal.SIGCONT)
                await first.says("lost", TAKEN_OVER_S)
                await _done(ledger, 150)
                second.process.send_signal(signal.SIGKILL)
                await first.says("leads", TAKEN_OVER_S)
                assert (await ledger.lease(LEASE, "nobody")).owner == first.owner
                assert (await _ended(ledger)).state is JobState.SUCCEEDED
            await _check_bucket(ports, ledger)
            grown = await ledger.dump()
            # I3, on the same database, and on another kind.
            async with ledger_in(Postgres(postgres.server, f"{postgres.schema}.again")) as again:
                await rebuild(ports_in(tmp_path, again))
                assert await again.dump() == grown
            memory = open_memory()
            await rebuild(ports_in(tmp_path, memory))
            assert await memory.dump() == grown
            await ledger.close()

    asyncio.run(main())
    postgres.server.execute(f'DROP SCHEMA "{postgres.schema}.again" CASCADE')


def test_a_server_that_is_away_for_longer_than_a_lease_costs_only_time(
    frail_server: PostgresServer, tmp_path: Path
) -> None:
    """The leader stops leading, and leads again."""
    place = Postgres(frail_server, "grid")

    async def main() -> None:
        with manager(tmp_path, place.url, place.schema, "a") as only:
            await only.says("leads", 20.0)
            async with ledger_in(place) as ledger:
                ports = ports_in(tmp_path, ledger)
                async with workers(ports, 2):
                    await _done(ledger, 30)
                    await asyncio.to_thread(frail_server.stop, signal.SIGQUIT)
                    await asyncio.sleep(AWAY_S)
                    await asyncio.to_thread(frail_server.start)
                    await only.says("lost", TAKEN_OVER_S + AWAY_S)
                    await only.says("leads", TAKEN_OVER_S)
                    assert (await _ended(ledger)).state is JobState.SUCCEEDED
                await _check_bucket(ports, ledger)

    asyncio.run(main())
