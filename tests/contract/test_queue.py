"""The contract of every Queue adapter: the semantics of SQS standard queues that batchlab needs. Limits are in
test_queue_limits, waiting and waking in test_queue_waiting."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.core.errors import NotFound
from batchlab.core.ports import Depth, Outgoing, QueueSpec
from tests.support.contract.queue_worlds import QueueWorld, bodies, on_every_queue, receipts

HOUR_S = 3600.0


@on_every_queue
async def test_a_message_arrives_as_it_was_sent(world: QueueWorld) -> None:
    name = await world.make()
    body = '{"text": "Grüße, 日本 \\u0001", "quote": "\'", "lines": "\n\t"}'
    before_s = world.clock.now_s()
    await world.send(name, body)
    (message,) = await world.receive(name)
    assert (message.body, message.receive_count) == (body, 1)
    assert before_s - 2 <= message.sent_s <= message.first_received_s
    assert message.first_received_s <= world.clock.now_s() + 2


@on_every_queue
async def test_a_received_message_is_hidden_until_its_timeout(world: QueueWorld) -> None:
    name = await world.make(visibility_s=2)
    await world.send(name, "a")
    (first,) = await world.receive(name)
    await world.advance(1)
    assert await world.empty(name)
    await world.advance(2)
    (second,) = await world.receive(name)
    assert (second.id, second.body, second.receive_count) == (first.id, "a", 2)
    assert second.sent_s == first.sent_s
    assert second.first_received_s == pytest.approx(first.first_received_s, abs=1e-3)


@on_every_queue
async def test_a_receive_may_choose_its_own_timeout(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    await world.receive(name, visibility_s=3)
    await world.advance(2)
    assert await world.empty(name)
    await world.advance(2)
    await world.receive(name)


@on_every_queue
async def test_a_timeout_of_zero_leaves_the_message_visible(world: QueueWorld) -> None:
    name = await world.make()
    await world.send(name, "a", "b")
    await world.receive(name, 2, visibility_s=0)
    assert bodies(await world.receive(name, 2)) == ["a", "b"]


@on_every_queue
async def test_deleted_message_is_never_received_again(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a", "b")
    held = await world.receive(name, 2)
    assert list(await world.queue.delete(name, [held[0].receipt])) == []
    await world.advance(2)
    assert bodies(await world.receive(name)) == [held[1].body]
    assert await world.empty(name)


@on_every_queue
async def test_expired_receipt_still_deletes_an_unreceived_message(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    (message,) = await world.receive(name)
    await world.advance(2)
    assert list(await world.queue.delete(name, [message.receipt])) == []
    assert await world.empty(name)
    assert await world.queue.depth(name) == Depth(0, 0, 0)


@on_every_queue
async def test_every_receive_has_its_own_receipt_and_an_old_one_cannot_delete(world: QueueWorld) -> None:
    """A delete with a stale receipt must not lose a message that another worker has received."""
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    (old,) = await world.receive(name)
    await world.advance(2)
    (new,) = await world.receive(name)
    assert old.receipt != new.receipt
    refused = await world.queue.delete(name, [old.receipt])
    if world.exact:
        assert list(refused) == [old.receipt]
    await world.advance(2)
    (again,) = await world.receive(name)
    assert (again.id, again.receive_count) == (old.id, 3)


@on_every_queue
async def test_an_old_receipt_cannot_change_visibility(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    (old,) = await world.receive(name)
    await world.advance(2)
    (new,) = await world.receive(name, visibility_s=2)
    for visibility_s in (0.0, 20.0):
        refused = await world.queue.change_visibility(name, [(old.receipt, visibility_s)])
        if world.exact:
            assert list(refused) == [old.receipt]
    assert await world.empty(name)
    await world.advance(3)
    assert [message.id for message in await world.receive(name)] == [new.id]


@on_every_queue
async def test_repeated_and_invalid_deletes_succeed(world: QueueWorld) -> None:
    name = await world.make()
    await world.send(name, "a", "b")
    first, second = await world.receive(name, 2)
    await world.queue.delete(name, [first.receipt])
    strange = ["", "nonsense", "1", ".", "1.x", "²³.1", "9" * 40 + ".1", "-1.-1", "1.1.1"]
    refused = await world.queue.delete(name, [first.receipt, *strange])
    if world.exact:
        assert list(refused) == [first.receipt, *strange]
        changes = [(receipt, 1.0) for receipt in strange]
        assert list(await world.queue.change_visibility(name, changes)) == strange
    assert list(await world.queue.delete(name, [second.receipt])) == []


@on_every_queue
async def test_a_receipt_belongs_to_its_queue(world: QueueWorld) -> None:
    one, other = await world.make(visibility_s=1), await world.make()
    await world.send(one, "a")
    await world.send(other, "b")
    (message,) = await world.receive(one)
    if world.exact:
        assert list(await world.queue.delete(other, [message.receipt])) == [message.receipt]
    assert bodies(await world.receive(other)) == ["b"]
    await world.advance(2)
    assert bodies(await world.receive(one)) == ["a"]


@on_every_queue
async def test_visibility_can_be_extended_again_and_again(world: QueueWorld) -> None:
    """A task longer than the timeout does not run twice while its worker sends heartbeats."""
    name = await world.make(visibility_s=2)
    await world.send(name, "a")
    (message,) = await world.receive(name)
    for _ in range(3):
        await world.advance(1)
        assert list(await world.queue.change_visibility(name, [(message.receipt, 2)])) == []
        assert await world.empty(name)
    await world.advance(3)
    assert (await world.receive(name))[0].receive_count == 2


@on_every_queue
async def test_a_timeout_set_to_zero_gives_the_message_back_at_once(world: QueueWorld) -> None:
    """A worker that shuts down returns its messages instead of hiding them."""
    name = await world.make()
    await world.send(name, "a", "b")
    held = await world.receive(name, 2)
    changes = [(receipt, 0.0) for receipt in receipts(held)]
    assert list(await world.queue.change_visibility(name, changes)) == []
    assert bodies(await world.receive(name, 2)) == ["a", "b"]


@on_every_queue
async def test_only_a_message_in_flight_can_be_changed(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a")
    (message,) = await world.receive(name)
    await world.advance(2)
    refused = await world.queue.change_visibility(name, [(message.receipt, 20)])
    assert list(refused) == [message.receipt]
    await world.receive(name)


@on_every_queue
async def test_visibility_ends_12_hours_after_the_receive(world: QueueWorld) -> None:
    """The limit counts from the receive, and an extension does not change that."""
    if not world.jumps:
        pytest.skip("hours cannot pass here")
    name = await world.make()
    await world.send(name, "a", "b")
    one, other = await world.receive(name, 2, visibility_s=HOUR_S)
    assert list(await world.queue.change_visibility(name, [(one.receipt, 11.9 * HOUR_S)])) == []
    await world.advance(HOUR_S / 2)
    changes = [(one.receipt, 11.6 * HOUR_S), (other.receipt, 11.4 * HOUR_S)]
    assert list(await world.queue.change_visibility(name, changes)) == [one.receipt]
    await world.advance(11 * HOUR_S)
    assert await world.empty(name)
    changes = [(one.receipt, HOUR_S), (other.receipt, HOUR_S / 4)]
    assert list(await world.queue.change_visibility(name, changes)) == [one.receipt]
    await world.advance(0.45 * HOUR_S)
    assert len(await world.receive(name, 2)) == 2


@on_every_queue
async def test_the_12_hours_begin_anew_with_each_receive(world: QueueWorld) -> None:
    if not world.jumps:
        pytest.skip("hours cannot pass here")
    name = await world.make()
    await world.send(name, "a")
    await world.receive(name, visibility_s=HOUR_S)
    await world.advance(2 * HOUR_S)
    (message,) = await world.receive(name, visibility_s=10)
    assert list(await world.queue.change_visibility(name, [(message.receipt, 11.9 * HOUR_S)])) == []
    assert list(await world.queue.change_visibility(name, [(message.receipt, 13 * HOUR_S)])) == [message.receipt]


@on_every_queue
async def test_a_delayed_message_waits_its_time(world: QueueWorld) -> None:
    name = await world.make()
    await world.queue.send(name, [Outgoing("late", 2), Outgoing("now")])
    assert bodies(await world.receive(name)) == ["now"]
    assert await world.empty(name)
    assert (await world.queue.depth(name)).delayed == 1
    await world.advance(3)
    assert bodies(await world.receive(name)) == ["late"]


@on_every_queue
async def test_depth_counts_visible_in_flight_and_delayed(world: QueueWorld) -> None:
    name = await world.make(visibility_s=3)
    assert await world.queue.depth(name) == Depth(0, 0, 0)
    await world.send(name, *"abcdef")
    await world.send(name, "x", "y", delay_s=6)
    assert await world.queue.depth(name) == Depth(visible=6, in_flight=0, delayed=2)
    held = await world.receive(name, 4)
    assert await world.queue.depth(name) == Depth(visible=2, in_flight=4, delayed=2)
    await world.queue.delete(name, [held[0].receipt])
    await world.queue.change_visibility(name, [(held[1].receipt, 0)])
    assert await world.queue.depth(name) == Depth(visible=3, in_flight=2, delayed=2)
    await world.advance(4)
    assert await world.queue.depth(name) == Depth(visible=5, in_flight=0, delayed=2)
    await world.advance(3)
    assert await world.queue.depth(name) == Depth(visible=7, in_flight=0, delayed=0)


@on_every_queue
async def test_receive_returns_at_most_the_requested_number(world: QueueWorld) -> None:
    name = await world.make()
    await world.send(name, *map(str, range(15)))
    seen: set[str] = set()
    for most in (1, 3, 10, 10):
        some = await world.queue.receive(name, max_messages=most, wait_s=0)
        assert len(some) <= most
        seen |= {message.body for message in some}
    if world.exact:
        assert seen == {str(number) for number in range(15)}


@on_every_queue
async def test_receivers_at_the_same_time_share_no_message(world: QueueWorld) -> None:
    name = await world.make()
    await world.send(name, *map(str, range(100)))
    done: list[str] = []

    async def receiver() -> None:
        while messages := await world.queue.receive(name, max_messages=3, wait_s=1):
            done.extend(message.body for message in messages)
            assert list(await world.queue.delete(name, receipts(messages))) == []

    await asyncio.gather(*(receiver() for _ in range(8)))
    assert sorted(done, key=int) == [str(number) for number in range(100)]


@on_every_queue
async def test_message_received_too_often_moves_to_the_dead_letter_queue(world: QueueWorld) -> None:
    """Failed messages are in one queue with their history."""
    dead = await world.make()
    name = await world.make(visibility_s=1, dead_letters=dead, max_receives=2)
    await world.send(name, "poison")
    for count in (1, 2):
        (message,) = await world.receive(name)
        assert message.receive_count == count
        await world.advance(2)
    assert await world.empty(dead)
    assert await world.empty(name)
    (corpse,) = await world.receive(dead)
    assert (corpse.id, corpse.body) == (message.id, "poison")
    assert corpse.receive_count == 3
    assert corpse.sent_s == message.sent_s
    if world.exact:
        assert corpse.first_received_s == pytest.approx(message.first_received_s, abs=1e-3)
    assert list(await world.queue.delete(dead, [corpse.receipt])) == []
    assert await world.queue.depth(name) == await world.queue.depth(dead) == Depth(0, 0, 0)


@on_every_queue
async def test_dead_letters_do_not_hold_up_their_neighbours(world: QueueWorld) -> None:
    dead = await world.make()
    name = await world.make(visibility_s=1, dead_letters=dead, max_receives=1)
    await world.send(name, *(f"poison-{number}" for number in range(12)))
    await world.receive(name, 12)
    await world.advance(2)
    await world.send(name, "good")
    assert bodies(await world.receive(name)) == ["good"]
    await world.empty(name)
    assert (await world.queue.depth(dead)).visible == 12
    assert len(await world.receive(dead, 12)) == 12


@on_every_queue
async def test_message_is_redelivered_without_a_dead_letter_queue(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1, max_receives=1)
    await world.send(name, "a")
    for count in (1, 2, 3):
        assert (await world.receive(name))[0].receive_count == count
        await world.advance(2)


@on_every_queue
async def test_expired_message_is_dropped(world: QueueWorld) -> None:
    if not world.jumps:
        pytest.skip("hours cannot pass here")
    name = await world.make(retention_s=HOUR_S)
    await world.send(name, *map(str, range(15)))
    await world.receive(name, 2, visibility_s=10)
    await world.advance(HOUR_S / 2)
    await world.send(name, "younger")
    await world.advance(HOUR_S * 0.6)
    assert bodies(await world.receive(name)) == ["younger"]
    assert await world.empty(name)
    assert await world.queue.depth(name) == Depth(visible=0, in_flight=1, delayed=0)
    await world.advance(2 * HOUR_S)
    assert await world.queue.depth(name) == Depth(0, 0, 0)


@on_every_queue
async def test_ensure_keeps_messages_and_updates_attributes(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1000)
    await world.send(name, "a")
    await world.queue.ensure(QueueSpec(name, visibility_s=1))
    (first,) = await world.receive(name)
    await world.advance(2)
    assert [message.id for message in await world.receive(name)] == [first.id]


@on_every_queue
async def test_a_purge_drops_everything(world: QueueWorld) -> None:
    name, other = await world.make(visibility_s=1), await world.make()
    await world.send(name, *"abcd")
    await world.send(name, "late", delay_s=1)
    await world.send(other, "stays")
    await world.receive(name, 2)
    await world.queue.purge(name)
    await world.advance(2)
    assert await world.empty(name)
    assert await world.queue.depth(name) == Depth(0, 0, 0)
    await world.send(name, "after")
    assert bodies(await world.receive(name)) == ["after"]
    assert bodies(await world.receive(other)) == ["stays"]


@on_every_queue
async def test_a_queue_made_again_is_empty_and_old_receipts_mean_nothing_to_it(world: QueueWorld) -> None:
    name = await world.make(visibility_s=1)
    await world.send(name, "a", "b")
    old = await world.receive(name, 2)
    await world.queue.remove(name)
    with pytest.raises(NotFound):
        await world.queue.depth(name)
    await world.queue.ensure(QueueSpec(name, visibility_s=1))
    await world.send(name, "c", "d")
    assert bodies(await world.receive(name, 2)) == ["c", "d"]
    await world.queue.delete(name, receipts(old))
    await world.advance(2)
    assert bodies(await world.receive(name, 2)) == ["c", "d"]
