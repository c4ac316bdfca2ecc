"""Deletion of a job whose manager is killed at any write of the deletion, in simulated worlds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.errors import NotFound, Refused
from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from batchlab.manager.manager import Manager
from batchlab.sim import invariants
from batchlab.sim.world import World
from tests.support.sim.scenes import A, around, ended, in_world, job, kill_manager, stage, submitted, takes


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("writes", range(14))
def test_a_deletion_survives_the_manager(monkeypatch: pytest.MonkeyPatch, writes: int, late: bool) -> None:
    """The next leader finishes the deletion, or the user repeats the request. The other job keeps every promise, and a
    rebuild gives an equal ledger."""
    made = job(stage(A), items=3)
    other = job(stage(A), items=3, id=JobId("other"), token="other")
    left: list[int] = []

    async def write(real: Any, *args: Any, **how: Any) -> object:
        is_last = False
        if left:
            left[0] -= 1
            is_last = left[0] < 0
        if is_last:
            left.clear()
            if late:
                await real(*args, **how)
            kill_manager(world_of[0])
            await asyncio.sleep(3600)  # The killed manager does not continue.
        return await real(*args, **how)

    async def delete(manager: Manager) -> object:
        try:
            return await manager.job_deletion.delete(made.id)
        except NotFound:
            return None  # An earlier request was successful, and its answer was lost.

    world_of: list[World] = []

    async def act(world: World) -> None:
        world_of.append(world)
        for name in ("put", "delete"):
            around(monkeypatch, world.objects, name, write)
        around(monkeypatch, world.ledger, "forget", write)
        for one in (other, made):
            await submitted(world, one)
        for one in (other, made):
            await ended(world, one)
        left.append(writes)
        await world.ask(delete, "delete")
        left.clear()
        assert await world.find(made.id) is None
        objects = [name for name in world.objects.names() if f"/{made.id}" in name]
        assert objects == [object_keys.spec(made.id)]
        assert isinstance(await world.ask(lambda m: m.job_commands.submit(made), "again"), Refused)
        await invariants.check_all(world, [other.id])

    in_world(act, script=takes(1.0))
