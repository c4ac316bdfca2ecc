"""Managers and workers that receive SIGTERM, which end for any answer of the services at that moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.errors import Unreachable
from batchlab.core.model import JobState, Pool
from batchlab.sim import invariants, port_wrappers
from batchlab.sim.world import World
from tests.support.sim.scenes import A, B, around, ended, in_world, job, leader, stage, submitted, takes

LONG_S = 120.0
"""Virtual seconds, twice as long as the longest retry limit."""


@pytest.fixture(autouse=True)
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each canceled call raise an error as if its answer was missing."""

    async def perform(original: Any, port: Any, label: str, *arguments: Any) -> Any:
        try:
            return await original(port, label, *arguments)
        except asyncio.CancelledError:
            if port._actor.alive:
                raise Unreachable(f"{label}: the connection was closed.") from None
            raise

    around(monkeypatch, port_wrappers._Port, "_perform", perform)


@pytest.mark.parametrize("after_s", [0.4, 1.5, 3.3, 4.1, 5.2, 7.0, 9.3, 13.7])
def test_error_during_the_cancellation_ends_the_manager(after_s: float) -> None:
    """Before, the manager continued next to its successor, as after an outage, and could not be stopped."""

    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=60)
        await submitted(world, made)
        await leader(world)
        await asyncio.sleep(after_s)
        (first,) = world.manager_processes
        first.task.cancel()
        await asyncio.wait({first.task}, timeout=LONG_S)
        assert first.task.cancelled()
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(2.0), pools=(Pool("default", 0, 3, 2),))


@pytest.mark.parametrize("after_s", [0.3, 2.0, 20.0, 33.3])
def test_nor_a_worker(after_s: float) -> None:
    """Before, only the end of the drain time stopped the worker, by a kill."""

    async def act(world: World) -> None:
        await leader(world)
        while not world.workers:
            await asyncio.sleep(0.1)
        (worker,) = world.workers.values()
        await asyncio.sleep(after_s)
        worker.worker.drain()
        await asyncio.sleep(5.0)
        assert worker.ended == "exit 0"

    in_world(act, script=takes(2.0), pools=(Pool("default", 1, 1, 2),))
