"""Waiting receives on every Queue adapter. A receive sleeps until a message arrives, and does not lose a wake-up or, if
it is canceled, a message."""

from __future__ import annotations

import asyncio
import contextlib

from batchlab.core.ports import Depth, Message, Outgoing
from tests.support.contract.queue_worlds import QueueWorld, bodies, on_every_queue_alone, receipts

SOON_S = 0.5
"""A time far longer than a wake-up and far shorter than a wait without a wake-up."""


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _asleep() -> None:
    """Let the receivers that were just started fall asleep."""
    await asyncio.sleep(0.05)


def _waiter(world: QueueWorld, name: str, most: int = 10) -> asyncio.Task[list[Message]]:
    async def receive() -> list[Message]:
        return list(await world.queue.receive(name, max_messages=most, wait_s=20))

    return asyncio.create_task(receive())


@on_every_queue_alone
async def test_a_waiting_receive_ends_empty_when_its_time_is_over(world: QueueWorld) -> None:
    name = await world.make()
    began_s = _now_s()
    assert not await world.queue.receive(name, wait_s=0.1)
    assert 0.09 <= _now_s() - began_s < SOON_S


@on_every_queue_alone
async def test_a_send_wakes_a_waiting_receive(world: QueueWorld) -> None:
    name = await world.make()
    waiter = _waiter(world, name)
    await _asleep()
    began_s = _now_s()
    await world.send(name, "a")
    assert bodies(await waiter) == ["a"]
    assert _now_s() - began_s < SOON_S


@on_every_queue_alone
async def test_a_receive_does_not_wait_for_a_full_batch(world: QueueWorld) -> None:
    name = await world.make()
    await world.send(name, "a")
    began_s = _now_s()
    assert bodies(await world.queue.receive(name, wait_s=20)) == ["a"]
    assert _now_s() - began_s < SOON_S


@on_every_queue_alone
async def test_a_sleeping_receive_notices_a_delayed_message_in_time(world: QueueWorld) -> None:
    name = await world.make()
    waiter = _waiter(world, name)
    await _asleep()
    began_s = _now_s()
    await world.queue.send(name, [Outgoing("a", 1.0)])
    assert bodies(await waiter) == ["a"]
    assert 0.95 <= _now_s() - began_s < 1 + SOON_S + world.late_s


@on_every_queue_alone
async def test_a_sleeping_receive_notices_a_timeout_that_ran_out(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    began_s = _now_s()
    await world.receive(name)
    assert bodies(await _waiter(world, name)) == ["a"]
    assert 0.95 <= _now_s() - began_s < 1 + SOON_S + world.late_s


@on_every_queue_alone
async def test_giving_a_message_back_wakes_a_waiting_receive(world: QueueWorld) -> None:
    """Messages that a worker returns at its shutdown continue at once on other workers."""
    name = await world.make()
    await world.send(name, "a")
    (held,) = await world.receive(name)
    waiter = _waiter(world, name)
    await _asleep()
    began_s = _now_s()
    await world.queue.change_visibility(name, [(held.receipt, 0)])
    assert [message.receive_count for message in await waiter] == [2]
    assert _now_s() - began_s < SOON_S + world.late_s


@on_every_queue_alone
async def test_dead_letters_wake_their_receivers(world: QueueWorld) -> None:
    dead = await world.make()
    name = await world.make(visibility_s=1, dead_letters=dead, max_receives=1)
    await world.send(name, "poison")
    await world.receive(name)
    waiter = _waiter(world, dead)
    await world.advance(2)
    await _asleep()
    began_s = _now_s()
    await world.empty(name)
    assert bodies(await waiter) == ["poison"]
    assert _now_s() - began_s < SOON_S + world.late_s


@on_every_queue_alone
async def test_each_of_many_waiting_receivers_gets_its_message(world: QueueWorld) -> None:
    name = await world.make()
    waiters = [_waiter(world, name, 1) for _ in range(12)]
    await _asleep()
    began_s = _now_s()
    await world.send(name, *map(str, range(12)))
    found = [message for got in await asyncio.gather(*waiters) for message in got]
    assert bodies(found) == sorted(map(str, range(12)))
    assert _now_s() - began_s < 2 * SOON_S


@on_every_queue_alone
async def test_receivers_of_other_queues_sleep_on(world: QueueWorld) -> None:
    name, other = await world.make(), await world.make()
    bystander, waiter = _waiter(world, other), _waiter(world, name)
    await _asleep()
    await world.send(name, "a")
    assert bodies(await waiter) == ["a"]
    assert not bystander.done()
    await world.send(other, "b")
    assert bodies(await bystander) == ["b"]


async def _cancelled(task: asyncio.Task[list[Message]]) -> list[Message]:
    """Cancel a receive, and return its messages if it had already received some."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await task
    return []


@on_every_queue_alone
async def test_a_cancelled_receive_swallows_no_message(world: QueueWorld) -> None:
    """Messages that were received just before a shutdown must not stay hidden for the full timeout."""
    name = await world.make()
    got: list[Message] = []
    for number in range(15):
        task = _waiter(world, name)
        # The cancellation comes at each step of the loop, from before the sleep to after the receive.
        for _ in range(number % 5):
            await asyncio.sleep(0)
        await world.send(name, str(number))
        for _ in range(number // 5):
            await asyncio.sleep(0)
        got += await _cancelled(task)
    left = 15 - len(got)
    got += await world.receive(name, left) if left else []
    assert sorted(bodies(got), key=int) == [str(number) for number in range(15)]
    if world.exact:
        assert {message.receive_count for message in got} == {1}


@on_every_queue_alone
async def test_a_cancelled_receive_passes_its_wake_up_on(world: QueueWorld) -> None:
    name = await world.make()
    for number in range(10):
        first, second = _waiter(world, name), _waiter(world, name)
        await _asleep()
        await world.send(name, str(number))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        began_s = _now_s()
        got = await _cancelled(first)
        if got:
            await _cancelled(second)
        else:
            got = await second
        assert bodies(got) == [str(number)]
        assert _now_s() - began_s < SOON_S + world.late_s
        await world.queue.delete(name, receipts(got))
    assert await world.queue.depth(name) == Depth(0, 0, 0)
