"""Bugs with a ledger that is rebuilt while other calls continue. Each docstring describes the behavior before the
fix."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.model import JobId, JobState
from batchlab.sim.world import World
from tests.support.sim.scenes import A, B, around, ended, ended_well, in_world, job, leader, stage, submitted, takes


def test_retry_during_a_rebuild_is_neither_refused_nor_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rebuild restored the job object by object over half a minute (seed 2286 of the simulator). Before, a retry by
    a manager that did not know of the new leader used the incomplete job (I2)."""

    async def act(world: World) -> None:
        reads: list[str] = []

        async def get(real: Any, key: str, *, limit: int | None = None) -> object:
            data = await real(key, limit=limit)
            if rebuilding and "/outcomes/" in key:
                reads.append(key)
                await asyncio.sleep(10)
            return data

        around(monkeypatch, world.objects, "get", get)
        made = job(stage(A), stage(B, A), items=1)
        rebuilding = False
        await submitted(world, made)
        while not world.starts:
            await asyncio.sleep(1)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        rebuilding = True
        manager = await leader(world)
        rebuild = asyncio.create_task(manager.rebuild_ledger())
        while not reads:
            await asyncio.sleep(0.1)
        assert (await world.ledger.job(made.id)).state is JobState.CANCELLED, "seen whole"
        await manager.job_commands.retry(made.id)
        assert not rebuild.done()
        assert (await rebuild).jobs == 1
        assert len(reads) > len(set(reads)), "what was read before the retry does not count"
        assert (await world.ledger.job(made.id)).round == 1
        await ended_well(world, made)

    in_world(act, script=takes(20.0))


def test_rebuild_drops_only_what_the_bucket_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        gone = job(stage(A), items=1)
        late = replace(job(stage(A), items=1, token="other"), id=JobId("late"))
        came = asyncio.Event()

        async def forget(real: Any, jobs: Sequence[JobId]) -> None:
            assert jobs == [gone.id]
            await submitted(world, late)
            came.set()
            await real(jobs)

        around(monkeypatch, world.ledger, "forget", forget)
        await submitted(world, gone)
        await ended_well(world, gone)
        keys = [one.key async for page in world.objects.list(f"jobs/{gone.id}/") for one in page]
        await world.objects.delete(keys)
        assert (await (await leader(world)).rebuild_ledger()).jobs == 0, "as it found them"
        assert came.is_set()
        assert [rows.id for rows in await world.ledger.jobs()] == [late.id]
        await ended_well(world, late)

    in_world(act, script=takes(1.0))
