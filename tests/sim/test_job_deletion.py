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
from batchlab.sim.actors import CURRENT, Actor
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
        assert objects == [object_keys.deletion(made.id), object_keys.spec(made.id)]
        assert isinstance(await world.ask(lambda m: m.job_commands.submit(made), "again"), Refused)
        await invariants.check_all(world, [other.id])

    in_world(act, script=takes(1.0))


@pytest.mark.parametrize("dies", [False, True])
def test_objects_that_a_suspended_worker_commits_after_the_deletion_are_swept(
    monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """A worker is suspended before the commit of a bundle, while another worker runs the bundle and the user deletes
    the job. The sweep follows the event of the bundle, or the deletion after an hour if the worker dies without an
    event."""
    made = job(stage(A), items=2)
    late: list[str] = []
    actors: list[Actor] = []
    has_committed = asyncio.Event()

    async def put(real: Any, key: str, *args: Any, **how: Any) -> object:
        if late or not object_keys.is_outcome(key):
            return await real(key, *args, **how)
        late.append(key)
        worker = CURRENT.get()
        assert worker is not None
        actors.append(worker)
        worker.freeze()
        await asyncio.sleep(0.001)
        answer = await real(key, *args, **how)
        has_committed.set()
        if dies:
            worker.kill()
            await asyncio.sleep(0.001)
        return answer

    async def act(world: World) -> None:
        around(monkeypatch, world.objects, "put", put)
        await submitted(world, made)
        await ended(world, made)
        await world.ask(lambda m: m.job_deletion.delete(made.id), "delete")
        actors[0].thaw()
        await has_committed.wait()
        assert late[0] in world.objects.names()
        await asyncio.sleep(4000.0 if dies else 600.0)
        assert [name for name in world.objects.names() if f"/{made.id}/" in name] == [object_keys.spec(made.id)]

    in_world(act, script=takes(1.0))
