"""The runtime check of messages that a holder keeps or returns.

Each scene has the shortest timeout that seeds draw. The wait after a return grows with the receives, and at the third
receive it equals this timeout.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import NotFound
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.sim.actors import Violated
from batchlab.sim.world import WORKER, World
from batchlab.worker.heartbeats import RETURN_S, VisibilityHeartbeat
from tests.support.sim.scenes import A, around, ends_well, in_world, job, leader, stage, submitted, takes

VISIBILITY_S = 3 * RETURN_S
SHORT = replace(WORKER, visibility_s=VISIBILITY_S)


def test_a_message_given_back_for_as_long_as_its_timeout_has_not_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events queue was missing for a while. Before, at its third receive, the message was returned for as long as a
    heartbeat's extension, and the check blamed its worker."""

    async def act(world: World) -> None:
        waits: list[float] = []

        async def send(real: Any, queue: str, messages: Any) -> object:
            if queue == object_keys.EVENTS and world.starts and len(waits) < 4:
                raise NotFound(f"No queue {queue!r}.")
            return await real(queue, messages)

        async def change_visibility(real: Any, queue: str, changes: Any) -> object:
            waits.extend(wait_s for _, wait_s in changes)
            return await real(queue, changes)

        around(monkeypatch, world.queue, "send", send)
        around(monkeypatch, world.queue, "change_visibility", change_visibility)
        await ends_well(world, job(stage(A), items=1))
        assert waits == [RETURN_S, 2 * RETURN_S, VISIBILITY_S, 4 * RETURN_S]

    in_world(act, script=takes(1.0), worker_settings=SHORT)


def test_unextended_message_expires_even_with_a_short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The excuse for a returned message does not apply to a forgotten one."""

    async def forget(self: VisibilityHeartbeat) -> None:
        """Do not send a heartbeat."""

    monkeypatch.setattr(VisibilityHeartbeat, "_extend", forget)

    async def act(world: World) -> None:
        await ends_well(world, job(stage(A), items=1))

    with pytest.raises(Violated, match="heartbeat"):
        in_world(act, script=takes(60.0), worker_settings=SHORT)


def test_message_of_a_frozen_worker_is_not_checked_at_the_end_of_the_world() -> None:
    """The queue answers the long poll of a frozen worker, the worker receives the order to drain, and the end of the
    world thaws the worker. Before, the check of I6 reported the answer (seed 618 of the weather `speculative`)."""

    async def act(world: World) -> bool:
        made = job(stage(A), items=1)
        await leader(world)
        while not world.workers:
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)
        (worker,) = world.workers.values()
        worker.actor.freeze()
        await submitted(world, made)
        await asyncio.sleep(2.0)
        worker.stop(60.0)
        await asyncio.sleep(2.0)
        return (await world.queue.depth(object_keys.tasks_queue("default"))).in_flight == 1

    assert in_world(act, script=takes(1.0), pools=(Pool("default", 1, 1, 1),))
