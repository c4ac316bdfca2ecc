"""The features of the simulated queue: determinism, scale, and injected faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.ports import Depth, Outgoing, QueueSpec
from batchlab.sim.event_loop import SimLoop
from tests.support.contract.queue_worlds import LoopClock, bodies, receipts

T = TypeVar("T")


def _run(scenario: Callable[[SimQueue], Coroutine[Any, Any, T]], *, seed: int = 1, **options: Any) -> T:
    async def run() -> T:
        queue = SimQueue(LoopClock(), random.Random(seed), **options)
        await queue.ensure(QueueSpec("dead"))
        await queue.ensure(QueueSpec("q", visibility_s=5, dead_letters="dead", max_receives=3))
        return await scenario(queue)

    return SimLoop().run(run(), limit_s=1e5)


async def _send(queue: SimQueue, count: int) -> None:
    for start in range(0, count, 10):
        batch = range(start, min(start + 10, count))
        await queue.send("q", [Outgoing(str(number)) for number in batch])


def _history(seed: int) -> list[tuple[float, int, str, int]]:
    """Return the receives of 20 receivers for 200 messages. The receivers do not delete some of the messages."""
    seen: list[tuple[float, int, str, int]] = []
    rng = random.Random(seed)

    async def scenario(queue: SimQueue) -> None:
        async def receiver(who: int) -> None:
            while messages := await queue.receive("q", max_messages=3):
                now_s = asyncio.get_running_loop().time()
                seen.extend((now_s, who, message.body, message.receive_count) for message in messages)
                await asyncio.sleep(rng.random())
                if rng.random() < 0.8:
                    await queue.delete("q", receipts(messages))

        receivers = [asyncio.create_task(receiver(who)) for who in range(20)]
        await _send(queue, 200)
        await asyncio.gather(*receivers)

    _run(scenario, seed=seed)
    return seen


def test_history_depends_only_on_the_seed() -> None:
    assert _history(1) == _history(1)
    assert _history(1) != _history(2)


def test_messages_arrive_in_loose_order() -> None:
    async def scenario(queue: SimQueue) -> list[int]:
        await _send(queue, 1000)
        order: list[int] = []
        while messages := await queue.receive("q", wait_s=0):
            order += [int(message.body) for message in messages]
        return order

    order = _run(scenario)
    assert order != sorted(order)
    assert sorted(order) == list(range(1000))
    early = [place - number for place, number in enumerate(order)]
    # Messages arrive out of order, but within a window, and few arrive much later.
    assert min(early) >= -40
    assert sum(lag > 100 for lag in early) < 50


def test_queue_handles_100_000_messages_and_10_000_receivers() -> None:
    messages_in_all, receivers_in_all = 100_000, 10_000

    async def scenario(queue: SimQueue) -> tuple[int, Depth]:
        done = 0

        async def receiver() -> None:
            nonlocal done
            while messages := await queue.receive("q", max_messages=10):
                await asyncio.sleep(1)
                done += len(messages)
                await queue.delete("q", receipts(messages))

        receivers = [asyncio.create_task(receiver()) for _ in range(receivers_in_all)]
        await asyncio.sleep(10)
        await _send(queue, messages_in_all)
        await asyncio.gather(*receivers)
        return done, await queue.depth("q")

    assert _run(scenario) == (messages_in_all, Depth(0, 0, 0))


def test_redelivered_message_arrives_early_and_twice() -> None:
    async def scenario(queue: SimQueue) -> None:
        rng = random.Random(3)
        assert queue.redeliver("q", rng) is None
        await _send(queue, 5)
        held = {message.id: message for message in await queue.receive("q")}
        again = queue.redeliver("q", rng)
        assert again in held
        assert await queue.depth("q") == Depth(visible=1, in_flight=4, delayed=0)
        (copy,) = await queue.receive("q", wait_s=0)
        assert (copy.id, copy.receive_count) == (again, 2)
        assert await queue.delete("q", [held[copy.id].receipt]) == [held[copy.id].receipt]
        assert await queue.delete("q", [copy.receipt]) == []

    _run(scenario)


def test_a_redelivered_message_wakes_a_waiting_receive_and_its_holder_may_still_delete_it() -> None:
    async def scenario(queue: SimQueue) -> None:
        rng = random.Random(3)
        await _send(queue, 1)
        await queue.receive("q")
        waiter = asyncio.create_task(queue.receive("q"))
        await asyncio.sleep(1)
        queue.redeliver("q", rng)
        assert bodies(await waiter) == ["0"]
        assert asyncio.get_running_loop().time() == 1
        queue.redeliver("q", rng)
        (message,) = await queue.receive("q")
        queue.redeliver("q", rng)
        assert await queue.delete("q", [message.receipt]) == []
        assert not await queue.receive("q", wait_s=0)

    _run(scenario)


def test_dropped_message_disappears_in_any_state() -> None:
    async def scenario(queue: SimQueue) -> None:
        rng = random.Random(5)
        await _send(queue, 30)
        await queue.send("q", [Outgoing("late", 10)] * 10)
        await queue.receive("q")
        lost = [queue.drop("q", rng) for _ in range(25)]
        assert None not in lost
        assert len(set(lost)) == 25
        depth = await queue.depth("q")
        assert depth.visible + depth.in_flight + depth.delayed == 15
        assert min(depth.visible, depth.in_flight, depth.delayed) > 0
        await asyncio.sleep(20)
        left: list[str] = []
        while messages := await queue.receive("q", wait_s=0):
            left += [message.id for message in messages]
        assert len(left) == 15
        assert not set(left) & set(lost)
        for _ in range(15):
            assert queue.drop("q", rng) is not None
        assert queue.drop("q", rng) is None
        assert await queue.depth("q") == Depth(0, 0, 0)

    _run(scenario)


def test_idle_receivers_let_virtual_time_jump() -> None:
    async def scenario(queue: SimQueue) -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        before = loop.steps
        await queue.send("q", [Outgoing("a", 900)])
        while not await queue.receive("q"):
            pass
        assert 900 <= loop.time() < 901
        return loop.steps - before

    assert _run(scenario) < 200


def test_a_queue_in_order_gives_messages_as_they_became_visible() -> None:
    async def scenario(queue: SimQueue) -> list[str]:
        await queue.send("q", [Outgoing("late", 1)])
        await _send(queue, 200)
        first = await queue.receive("q", max_messages=5)
        assert [message.body for message in first] == [str(number) for number in range(5)]
        await queue.change_visibility("q", [(first[3].receipt, 0)])
        await queue.delete("q", receipts([*first[:3], first[4]]))
        await asyncio.sleep(2)
        order: list[str] = []
        while messages := await queue.receive("q", max_messages=7, wait_s=0):
            order += [message.body for message in messages]
        return order

    order = _run(scenario, fifo=True)
    assert order == [*(str(number) for number in range(5, 200)), "3", "late"]


def test_a_receive_waits_for_hours_where_it_may_and_is_refused_elsewhere() -> None:
    async def scenario(queue: SimQueue) -> float:
        waiter = asyncio.create_task(queue.receive("q", wait_s=7200))
        await asyncio.sleep(3600)
        await _send(queue, 1)
        assert bodies(await waiter) == ["0"]
        with pytest.raises(ValueError, match="wait_s must be 0 to 7200 s, not 7201"):
            await queue.receive("q", wait_s=7201)
        return asyncio.get_running_loop().time()

    assert _run(scenario, max_wait_s=7200.0) == 3600
    with pytest.raises(ValueError, match="wait_s must be 0 to 20 s, not 7200"):
        _run(scenario)
