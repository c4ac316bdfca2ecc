"""Calls whose connection is cut at their COMMIT. After a repetition, the result equals that of one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from batchlab.adapters.sql import postgres as sql_postgres
from batchlab.adapters.sql.ledger import SqlLedger, open_postgres
from batchlab.core.errors import Unreachable
from batchlab.core.model import JobState
from batchlab.core.ports import Fold, Lease, MoveJob
from tests.support.contract.ledger_suite import CALLS, JOB, bundle, counts_of, done, fold, ledger_in, submit
from tests.support.postgres.cut_connection import Cut, Wire, wire_to
from tests.support.postgres.server import Postgres


@asynccontextmanager
async def behind(wire: Wire, place: Postgres) -> AsyncIterator[SqlLedger]:
    """Yield the ledger behind the proxy, with its schema created."""
    url = place.server.url(port=wire.port)
    ledger = open_postgres(url, schema=place.schema)
    try:
        await ledger.jobs()
        yield ledger
    finally:
        await ledger.close()


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_call_with_a_cut_off_commit_is_repeated(cut: Cut, postgres: Postgres) -> None:
    """After the repetition, the call has been done exactly once."""

    async def main() -> None:
        with wire_to(postgres.server.port) as wire:
            async with behind(wire, postgres) as ledger, ledger_in(None) as once:
                for call in CALLS:
                    before = await ledger.dump()
                    wire.cut = cut
                    with pytest.raises(Unreachable, match="does not answer"):
                        await call(ledger)
                    assert wire.cut is None
                    await call(once)
                    assert await ledger.dump() == (before if cut is Cut.BEFORE else await once.dump())
                    await call(ledger)
                    assert await ledger.dump() == await once.dump()

    asyncio.run(main())


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_answer_after_a_lost_one_lists_the_new_sequence_numbers(cut: Cut, postgres: Postgres) -> None:
    """The answer to the second try may be that the outcome is not new. No seq is given twice, and a client that counts
    them notices missing ones."""

    async def main() -> None:
        with wire_to(postgres.server.port) as wire:
            async with behind(wire, postgres) as ledger:
                await submit(ledger)
                first = await ledger.apply(Fold([done(bundle(0, 1))], [{}]))
                wire.cut = cut
                with pytest.raises(Unreachable):
                    await fold(ledger, done(bundle(1, 2)), done(bundle(2, 3)))
                again = await ledger.apply(Fold([done(bundle(1, 2)), done(bundle(2, 3))], [{}, {}]))
                lost = cut is Cut.BEFORE
                assert again.new == [lost, lost]
                assert again.first_seq == first.first_seq + (1 if lost else 3)
                seqs = [r.seq or 0 for r in await ledger.bundles(JOB.id)]
                assert seqs == [first.first_seq + i for i in range(3)]
                assert (await counts_of(ledger)).succeeded == 3

    asyncio.run(main())


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER])
def test_a_lease_is_taken_renewed_and_given_back_though_answers_are_lost(cut: Cut, postgres: Postgres) -> None:
    async def main() -> None:
        with wire_to(postgres.server.port) as wire:
            async with behind(wire, postgres) as ledger, ledger_in(postgres) as rival:

                async def cut_off(over: Lease | None = None) -> Lease:
                    wire.cut = cut
                    with pytest.raises(Unreachable):
                        await ledger.lease("leader", "a", over=over)
                    return await ledger.lease("leader", "a", over=over)

                taken = await cut_off()
                assert taken.owner == "a"
                assert await rival.lease("leader", "b") == taken
                renewed = await cut_off()
                assert renewed.beat > taken.beat
                assert await rival.lease("leader", "b", over=taken) == renewed
                assert (await rival.lease("leader", "b", over=renewed)).owner == "b"
                stands = await rival.lease("leader", "b")
                assert (await cut_off(over=stands)).owner == "a"
                wire.cut = cut
                with pytest.raises(Unreachable):
                    await ledger.release("leader", "a")
                await ledger.release("leader", "a")
                assert (await rival.lease("leader", "b")).owner == "b"

    asyncio.run(main())


def test_silent_client_does_not_keep_the_lock(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's machine loses power, or its manager is paused, during a transaction."""
    monkeypatch.setattr(sql_postgres, "IDLE_CLIENT_S", 0.5)
    monkeypatch.setattr(sql_postgres, "STATEMENT_S", 2.0)
    monkeypatch.setattr(sql_postgres, "GRACE_S", 0.0)

    async def main() -> None:
        with wire_to(postgres.server.port) as wire:
            async with behind(wire, postgres) as gone, ledger_in(postgres) as other:
                await submit(other)
                wire.cut = Cut.SILENT
                began_s = time.monotonic()
                going = asyncio.create_task(gone.apply(MoveJob(JOB.id, JobState.RUNNING, 0)))
                while wire.cut:
                    await asyncio.sleep(0.01)
                assert await fold(other, done(bundle(0, 1))) == [True]
                assert 0.4 < time.monotonic() - began_s < 2.0
                with pytest.raises(Unreachable):
                    await going
                assert (await gone.job(JOB.id)).state is JobState.RUNNING, "by the outcome"

    asyncio.run(main())
