"""The cache of a world's ledger, which returns current content and queries the ledger only after a possible change."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.adapters.sql.ledger import open_memory_as
from batchlab.core.model import JobId, JobState
from batchlab.core.ports import AddJob, MoveJob
from batchlab.sim.cached_ledger import CachedLedger
from tests.support.sim.scenes import A, job, stage


def test_cached_read_queries_again_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[JobId] = []

    async def act() -> None:
        ledger = open_memory_as(CachedLedger)
        original = ledger.job

        async def counted(one: JobId) -> Any:
            asked.append(one)
            return await original(one)

        monkeypatch.setattr(ledger, "job", counted)
        made = job(stage(A), items=1)
        assert await ledger.find(made.id) is None
        await ledger.apply(AddJob(made, JobState.SUBMITTED))
        first = await ledger.find(made.id)
        assert first is not None
        assert first.state is JobState.SUBMITTED
        await ledger.lease("leader", "manager-1")
        assert await ledger.find(made.id) is first
        assert await ledger.cached_rows(made.id) is await ledger.cached_rows(made.id)
        assert len(asked) == 2
        await ledger.apply(MoveJob(made.id, JobState.PENDING, 0))
        now, rows = await ledger.find(made.id), await ledger.cached_rows(made.id)
        assert now is not None
        assert now.state is rows.job.state is JobState.PENDING
        await ledger.forget()
        assert await ledger.find(made.id) is None
        await ledger.close()

    asyncio.run(act())


def test_write_during_a_read_is_seen_by_the_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        ledger = open_memory_as(CachedLedger)
        original = ledger.job

        async def slow(one: JobId) -> Any:
            record = await original(one)
            await asyncio.sleep(0)
            return record

        monkeypatch.setattr(ledger, "job", slow)
        made = job(stage(A), items=1)
        await ledger.apply(AddJob(made, JobState.SUBMITTED))
        look = asyncio.create_task(ledger.find(made.id))
        await asyncio.sleep(0)
        await ledger.apply(MoveJob(made.id, JobState.PENDING, 0))
        before, after = await look, await ledger.find(made.id)
        assert before is not None
        assert before.state is JobState.SUBMITTED
        assert after is not None
        assert after.state is JobState.PENDING
        await ledger.close()

    asyncio.run(act())
