"""The limits of every Queue adapter, so that code for a laptop also works on AWS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from batchlab.core.errors import NotFound, Throttled, TooLarge
from batchlab.core.ports import MAX_MESSAGE_BYTES, Outgoing, QueueSpec
from tests.support.contract.queue_worlds import IN_FLIGHT, QueueWorld, on_every_queue, receipts


@on_every_queue
async def test_more_than_ten_entries_are_too_large(world: QueueWorld) -> None:
    name = await world.make()
    with pytest.raises(TooLarge):
        await world.queue.send(name, [Outgoing("a")] * 11)
    with pytest.raises(TooLarge):
        await world.queue.delete(name, ["1.1"] * 11)
    with pytest.raises(TooLarge):
        await world.queue.change_visibility(name, [("1.1", 1.0)] * 11)
    assert await world.empty(name)


@on_every_queue
async def test_a_call_carries_256_kib(world: QueueWorld) -> None:
    name = await world.make()
    half = "x" * (MAX_MESSAGE_BYTES // 2)
    await world.send(name, half, half)
    assert [len(message.body) for message in await world.receive(name, 2)] == [len(half)] * 2
    with pytest.raises(TooLarge):
        await world.send(name, half, half, "y")
    with pytest.raises(TooLarge):
        # Bytes count, not characters.
        await world.send(name, "ü" * (MAX_MESSAGE_BYTES // 2 + 1))
    assert await world.empty(name)


@on_every_queue
async def test_requests_that_sqs_refuses_raise_value_error(world: QueueWorld) -> None:
    name = await world.make()
    calls: list[Callable[[], Awaitable[object]]] = [
        partial(world.queue.send, name, [Outgoing("a", 901)]),
        partial(world.queue.send, name, [Outgoing("a", -1)]),
        partial(world.queue.receive, name, max_messages=11),
        partial(world.queue.receive, name, max_messages=0),
        partial(world.queue.receive, name, wait_s=21),
        partial(world.queue.receive, name, wait_s=-1),
        partial(world.queue.receive, name, visibility_s=43_201),
        partial(world.queue.change_visibility, name, [("1.1", -1.0)]),
        partial(world.queue.ensure, QueueSpec("not a name")),
        partial(world.queue.ensure, QueueSpec("../../name")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"."):
            await call()


@on_every_queue
async def test_missing_queue_is_not_found(world: QueueWorld) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        partial(world.queue.send, "nowhere", [Outgoing("a")]),
        partial(world.queue.receive, "nowhere", wait_s=0),
        partial(world.queue.receive, "nowhere", wait_s=1),
        partial(world.queue.delete, "nowhere", ["1.1"]),
        partial(world.queue.change_visibility, "nowhere", [("1.1", 1.0)]),
        partial(world.queue.depth, "nowhere"),
        partial(world.queue.purge, "nowhere"),
        partial(world.queue.ensure, QueueSpec("here", dead_letters="nowhere")),
    ]
    for call in calls:
        with pytest.raises(NotFound) as caught:
            await call()
        assert "nowhere" in str(caught.value)
    await world.queue.remove("nowhere")


@on_every_queue
async def test_past_the_limit_of_messages_in_flight_nothing_more_is_given_out(world: QueueWorld) -> None:
    if not world.exact or world.patient:
        pytest.skip(f"the limit is not {IN_FLIGHT} here, or nobody is told")
    name = await world.make(visibility_s=5)
    await world.send(name, *map(str, range(IN_FLIGHT + 5)))
    held = await world.receive(name, IN_FLIGHT - 3)
    assert len(await world.queue.receive(name, wait_s=0)) == 3
    with pytest.raises(Throttled):
        await world.queue.receive(name, wait_s=0)
    # SQS does the same: a long poll returns no message.
    assert not await world.queue.receive(name, wait_s=0.05)
    await world.queue.delete(name, receipts(held[:2]))
    assert len(await world.queue.receive(name, wait_s=0)) == 2
    await world.advance(6)
    assert len(await world.receive(name, 10)) == 10
