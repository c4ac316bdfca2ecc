"""Waits for an event with a timeout, and cancellation of such waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from batchlab.core.port_retries import doubled_s, set_within
from batchlab.server.autoscaling_api import engine_loop
from batchlab.sim.event_loop import SimLoop


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def test_a_pause_doubles_up_to_the_longest_however_often() -> None:
    assert [doubled_s(0.5, 3.0, times) for times in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert doubled_s(2.0, 60.0) == 4.0
    assert doubled_s(1.0, 900.0, 10**6) == 900.0


def test_wait_returns_the_state_by_its_deadline() -> None:
    async def main() -> None:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        assert not await set_within(event, 3.0)
        assert loop.time() == 3.0
        loop.call_later(2.0, event.set)
        assert await set_within(event, 60.0)
        assert loop.time() == 5.0
        assert await set_within(event, 0.0)
        assert await set_within(event, -1.0)
        event.clear()
        assert not await set_within(event, 0.0)
        assert loop.time() == 5.0
        # An event at the last moment counts.
        loop.call_later(1.0, event.set)
        assert await set_within(event, 1.0)

    play(main)


@pytest.mark.parametrize("order", ["event first", "cancellation first", "after the time"])
def test_cancellation_together_with_the_event_ends_the_loop(order: str) -> None:
    async def main() -> None:
        event, rounds = asyncio.Event(), 0

        async def for_ever() -> None:
            nonlocal rounds
            while True:
                await set_within(event, 1.0)
                event.clear()
                rounds += 1

        task = asyncio.create_task(for_ever())
        await asyncio.sleep(1.0 if order == "after the time" else 0.5)
        if order == "cancellation first":
            task.cancel()
            event.set()
        else:
            event.set()
            task.cancel()
        await asyncio.wait({task}, timeout=10.0)
        assert task.cancelled()
        assert rounds <= 1

    play(main)


def test_endpoint_that_ends_with_its_instance_ends() -> None:
    """Before, the keeper of the endpoint lost the cancellation, and the process did not end."""

    async def main() -> None:
        changed, ticks = asyncio.Event(), 0

        class Engine:
            async def tick(self) -> None:
                nonlocal ticks
                ticks += 1

        keeping = asyncio.create_task(engine_loop._keep(Engine(), changed))  # type: ignore[arg-type]
        await asyncio.sleep(0.5 * engine_loop.TICK_S)
        changed.set()
        keeping.cancel()
        await asyncio.wait({keeping}, timeout=10 * engine_loop.TICK_S)
        assert keeping.cancelled()
        assert ticks == 1

    play(main)
