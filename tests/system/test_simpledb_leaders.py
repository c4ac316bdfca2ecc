"""Several managers on one SimpleDB domain with every fault. One manager leads at a time, and the job completes whatever
happens to the leader."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from batchlab.adapters.sql import open_memory
from batchlab.core.model import JobState
from batchlab.manager.ledger_rebuild import rebuild
from batchlab.manager.manager import LEASE
from tests.support.contract.ledger_suite import ledger_in
from tests.support.postgres.managers import LEASE_S, TAKEN_OVER_S, check_bucket, done, ended, manager, ports_in, workers
from tests.support.simpledb.fixtures import FAIR, Sdb

WEATHER = {"throttle": 0.05, "lose": 0.01, "lag_s": 0.5, "short": 0.1}


def test_leaders_are_paused_and_killed_and_the_job_completes(simpledb: Sdb, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            start = partial(manager, tmp_path, simpledb.url, simpledb.domain)
            first = stack.enter_context(start("a"))
            await first.says("leads", 30.0)
            second = stack.enter_context(start("b"))
            async with ledger_in(simpledb) as ledger:
                ports = await stack.enter_async_context(ports_in(tmp_path, ledger))
                async with workers(ports, 2):
                    await done(ledger, 30)
                    # The leader is paused at any point, and may continue its write later.
                    first.process.send_signal(signal.SIGSTOP)
                    await second.says("leads", TAKEN_OVER_S)
                    await done(ledger, 90)
                    first.process.send_signal(signal.SIGCONT)
                    await first.says("lost", TAKEN_OVER_S)
                    await done(ledger, 150)
                    second.process.send_signal(signal.SIGKILL)
                    await first.says("leads", TAKEN_OVER_S)
                    assert (await ledger.lease(LEASE, "nobody")).owner == first.owner
                    simpledb.weather(**WEATHER)
                    assert (await ended(ledger)).state is JobState.SUCCEEDED
                simpledb.weather(**FAIR)
                await check_bucket(ports, ledger)
                grown = await ledger.dump()
                # Invariant I3 holds on the same domain and on another kind of ledger.
                await rebuild(ports)
                assert await ledger.dump() == grown
                memory = open_memory()
                await rebuild(await stack.enter_async_context(ports_in(tmp_path, memory)))
                assert await memory.dump() == grown

    asyncio.run(main())


def test_outage_longer_than_a_lease_costs_only_time(simpledb: Sdb, tmp_path: Path) -> None:
    """The leader stops leading, and leads again later."""

    async def main() -> None:
        with manager(tmp_path, simpledb.url, simpledb.domain, "a") as only:
            await only.says("leads", 30.0)
            async with ledger_in(simpledb) as ledger, ports_in(tmp_path, ledger) as ports:
                async with workers(ports, 2):
                    await done(ledger, 30)
                    simpledb.weather(throttle=1.0)
                    await asyncio.sleep(LEASE_S * 3)
                    simpledb.weather(**FAIR)
                    assert (await ended(ledger)).state is JobState.SUCCEEDED
                await check_bucket(ports, ledger)

    asyncio.run(main())
