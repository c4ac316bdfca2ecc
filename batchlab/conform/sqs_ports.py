"""SQS through batchlab's own adapter: what the Queue port promises, on this endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from batchlab.adapters.sqs import SqsQueue
from batchlab.conform.check import Differs, Severity, Table, expect
from batchlab.conform.site import Site
from batchlab.errors import NotFound
from batchlab.ports import Message, Outgoing, QueueSpec

NEEDED = Severity.NEEDED

SQS_PORTS = Table()


async def _take(queue: SqsQueue, name: str, count: int = 1) -> Sequence[Message]:
    found: list[Message] = []
    for _ in range(4):
        found += await queue.receive(name, max_messages=count - len(found), wait_s=3)
        if len(found) == count:
            return found
    raise Differs(f"{len(found)} of {count} messages came")


@SQS_PORTS.check(
    "sqs-port-round",
    NEEDED,
    rule="A message is sent, received, returned, received again, and deleted.",
    source="SQS Developer Guide, message lifecycle",
    promise="Queue",
    otherwise="a grid cannot run on this endpoint",
)
async def port_round(site: Site) -> None:
    async with site.port() as queue:
        await queue.ensure(QueueSpec("a", visibility_s=300))
        await queue.send("a", [Outgoing("one")])
        (first,) = await _take(queue, "a")
        expect((first.body, first.receive_count) == ("one", 1), "something else comes")
        refused = await queue.change_visibility("a", [(first.receipt, 0)])
        expect(not refused, "its receipt is refused for giving it back")
        (second,) = await _take(queue, "a")
        expect((second.id, second.receive_count) == (first.id, 2), "something else comes again")
        expect(second.sent_s == first.sent_s, "it was sent at another time")
        expect(not await queue.delete("a", [second.receipt]), "its receipt is refused")
        expect(not await queue.receive("a", wait_s=1), "it comes although it was deleted")


@SQS_PORTS.check(
    "sqs-port-ensure",
    NEEDED,
    rule="An existing queue accepts new attributes, including dead letters on and off.",
    source="SQS API, CreateQueue, SetQueueAttributes",
    promise="Queue.ensure",
    otherwise="a changed visibility timeout never takes effect",
)
async def port_ensure(site: Site) -> None:
    async with site.port() as queue:
        await queue.ensure(QueueSpec("dead"))
        for spec in (
            QueueSpec("a", visibility_s=600),
            QueueSpec("a", visibility_s=0.5, dead_letters="dead", max_receives=1),
            QueueSpec("a", visibility_s=0.5, dead_letters="dead", max_receives=1),
        ):
            await queue.ensure(spec)
        await asyncio.sleep(site.lag_s)
        await queue.send("a", [Outgoing("one")])
        await _take(queue, "a")
        expect(not await queue.receive("a", wait_s=3), "it comes once more than it should")
        (corpse,) = await _take(queue, "dead")
        expect(corpse.body == "one", "something else is dead")
        await queue.ensure(QueueSpec("a", visibility_s=1))
        await asyncio.sleep(site.lag_s)
        await queue.send("a", [Outgoing("two")])
        await _take(queue, "a")
        (again,) = await _take(queue, "a")
        expect(again.body == "two", "dead letters cannot be turned off")


@SQS_PORTS.check(
    "sqs-port-refused",
    NEEDED,
    rule="Invalid receipts are returned as refused, and the valid ones in the same call work.",
    source="SQS API, DeleteMessageBatch, ChangeMessageVisibilityBatch",
    promise="Queue.delete, change_visibility",
    otherwise="one foreign message stops the heartbeats of all messages",
)
async def port_refused(site: Site) -> None:
    async with site.port() as queue:
        await queue.ensure(QueueSpec("a", visibility_s=300))
        await queue.send("a", [Outgoing("one"), Outgoing("two")])
        one, two = await _take(queue, "a", 2)
        changes = [(one.receipt, 0.0), ("nonsense", 0.0), (two.receipt, 300.0)]
        refused = await queue.change_visibility("a", changes)
        expect(list(refused) == ["nonsense"], "other receipts are refused for a change")
        (again,) = await _take(queue, "a")
        expect(again.id == one.id, "the good one is not changed")
        refused = await queue.delete("a", [again.receipt, "nonsense", two.receipt])
        expect(list(refused) == ["nonsense"], "other receipts are refused for a delete")
        expect(not await queue.receive("a", wait_s=1), "the good ones are not deleted")


@SQS_PORTS.check(
    "sqs-port-missing",
    NEEDED,
    rule="Every call on a missing queue raises NotFound.",
    source="SQS API, common errors",
    promise="Queue raises NotFound",
    otherwise="a removed queue looks like an outage, and callers wait for it",
)
async def port_missing(site: Site) -> None:
    async with site.port() as queue:
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(queue.send, "nothing", [Outgoing("a")]),
            partial(queue.receive, "nothing", wait_s=0),
            partial(queue.delete, "nothing", ["a"]),
            partial(queue.change_visibility, "nothing", [("a", 1.0)]),
            partial(queue.depth, "nothing"),
            partial(queue.purge, "nothing"),
            partial(queue.ensure, QueueSpec("a", dead_letters="nothing")),
        ]
        for call in calls:
            try:
                await call()
            except NotFound:
                continue
            raise Differs("a call on it succeeds")
        await queue.remove("nothing")
