"""A small simulated grid, jobs that run on it, and ways to interrupt the grid.

Invariant: a scene depends only on its code, since every world here has the same seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, JobState, Pool, StageName
from batchlab.core.ports import Change, JobRecord, Ledger
from batchlab.manager.manager import Manager
from batchlab.sim import invariants, trial
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.tasks import Script, ScriptedAttempt, value_of
from batchlab.sim.users import bring_items
from batchlab.sim.world import EPOCH_S, MANAGER, WORKER, World

T = TypeVar("T")

UNHURRIED: dict[str, Any] = {
    "manager_settings": replace(MANAGER, tick_s=20.0, wait_s=20.0, control_lease_s=60.0, lease_ttl_s=60.0),
    "worker_settings": replace(WORKER, visibility_s=120.0, wait_s=20.0, control_lease_s=60.0, beat_s=60.0),
}
"""Settings for scenes of many virtual hours, in which the default settings would mostly cause polling."""

A, B, C = StageName("a"), StageName("b"), StageName("c")


def job(*stages: StageDef, items: int = 10, **changes: Any) -> JobDef:
    made = JobDef(JobId("job"), "job", stages, EPOCH_S, items=items, token="t")
    return replace(made, **changes)


def stage(name: StageName, *after: StageName, **changes: Any) -> StageDef:
    return replace(StageDef(name, after, handler="sim:task"), **changes)


def in_world(
    act: Callable[[World], Awaitable[T]],
    *,
    script: Script,
    pools: tuple[Pool, ...] = (Pool("default", 0, 2, 1),),
    seed: int = 1,
    sql: bool = False,
    **settings: Any,
) -> T:
    """Run `act` in a world without faults. The ledger in memory takes a tenth of the time of the SQL ledger."""

    async def main() -> T:
        world = World(seed, pools, script=script, faults=trial.calm(1), logged=False, sql=sql, **settings)
        supervisor = asyncio.create_task(world.supervise())
        try:
            return await act(world)
        finally:
            supervisor.cancel()
            await world.ledger.close()

    coroutine: Coroutine[Any, Any, T] = main()
    return SimLoop(inline_executor=True).run(coroutine, limit_s=1_000_000, limit_steps=20_000_000)


def takes(run_s: float) -> Script:
    return lambda scene: ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item))


async def submitted(world: World, made: JobDef) -> None:
    await bring_items(world, made)
    await world.submit(made)


async def run_to_end(world: World, made: JobDef, *, look_s: float = 1.0) -> JobState:
    await submitted(world, made)
    record = await looked_for(world, made, look_s)
    await invariants.check_all(world, [made.id])
    return record.state


async def looked_for(world: World, made: JobDef, look_s: float) -> JobRecord:
    """Return the job once it has ended, checked every `look_s` virtual seconds."""
    while True:
        record = await world.find(made.id)
        if record is not None and record.state.ended:
            return record
        await asyncio.sleep(look_s)


# --- Interception of calls -----------------------------------------------------------------------


def around(patch: pytest.MonkeyPatch, target: object, name: str, wrapper: Callable[..., Awaitable[object]]) -> None:
    """Replace an async method by `wrapper(original, *args, **kwargs)`.

    Call this function before a world's first step, because actors cache the methods that they have used.
    """
    original = getattr(target, name)

    async def call(*args: Any, **kwargs: Any) -> object:
        return await wrapper(original, *args, **kwargs)

    patch.setattr(target, name, call)


def around_change(
    patch: pytest.MonkeyPatch, ledger: Ledger, kind: type[Change], wrapper: Callable[..., Awaitable[object]]
) -> None:
    """Let `wrapper(apply, change)` apply each change of this kind to the ledger. See `around`."""

    async def call(real: Any, change: Any) -> object:
        return await (wrapper(real, change) if isinstance(change, kind) else real(change))

    around(patch, ledger, "apply", call)


def kill_manager(world: World) -> None:
    """Kill the manager as SIGKILL would. Another manager starts soon."""
    assert world.leader is not None
    world.leader.actor.kill()


async def leader(world: World) -> Manager:
    """Wait for a leader, and return it."""
    while not (world.manager and world.manager.is_leader.is_set()):
        await asyncio.sleep(0.5)
    return world.manager


async def ended(world: World, made: JobDef, *, within_s: float = 3000.0) -> JobRecord:
    """Return the job once it has ended. Raise TimeoutError if the job hangs (I7)."""
    async with asyncio.timeout(within_s):
        return await world.ended(made.id)


async def ends_well(world: World, made: JobDef) -> None:
    """Submit the job, and check that it succeeds and that every promise holds."""
    await submitted(world, made)
    await ended_well(world, made)


async def ended_well(world: World, made: JobDef) -> None:
    """Check that the job succeeds and that every promise holds."""
    assert (await ended(world, made)).state is JobState.SUCCEEDED
    await invariants.check_all(world, [made.id])
