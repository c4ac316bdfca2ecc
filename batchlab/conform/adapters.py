"""Conformance checks that call the endpoint through batchlab's own S3 and SQS adapters."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.conform.check import Differs, Table, expect
from batchlab.conform.s3_create import ODD_KEYS, ORDERED
from batchlab.conform.site import Site
from batchlab.core.errors import AlreadyExists, NotFound
from batchlab.core.ports import Message, Outgoing, QueueSpec

RACERS = 16
UPLOAD_BYTES = 17 * 1024 * 1024
"""Size in bytes of a file that batchlab's S3 adapter uploads in three parts."""

S3_PORTS = Table("s3")


@S3_PORTS.needed(
    source="S3 User Guide, conditional writes",
    promise="I1, Objects.put(if_absent)",
    otherwise="two workers both commit one bundle, or one worker treats the other worker's commit as an outage",
)
async def port_create(site: Site) -> None:
    """The loser of a conditional create gets AlreadyExists, even in a race of 16 calls."""
    objects = site.objects

    async def create(key: str, who: int) -> int | None:
        try:
            await objects.put(key, bytes([who]), if_absent=True)
        except AlreadyExists:
            return None
        return who

    for number in range(5):
        key = site.own(f"outcome-{number}")
        results = await asyncio.gather(*(create(key, who) for who in range(RACERS)))
        winners = [who for who in results if who is not None]
        expect(len(winners) == 1, "not exactly one call succeeds")
        expect(await objects.get(key) == bytes(winners), "the object does not have the content of the successful call")


@S3_PORTS.needed(
    source="S3 API, GetObject",
    promise="Objects.get_range",
    otherwise="the last part of an input, or an empty input, fails its task",
)
async def port_ranges(site: Site) -> None:
    """The adapter shortens a range that ends after the end of an object, and returns an empty range if it starts after
    this end.
    """
    objects, at = site.objects, site.own
    await objects.put(at("ten"), b"0123456789")
    await objects.put(at("empty"), b"")
    for start, stop in ((0, 3), (7, 20), (9, 10), (10, 12), (50, 60), (4, 4), (0, 10)):
        expected = b"0123456789"[start:stop]
        expect(await objects.get_range(at("ten"), start, stop) == expected, "a range returns other bytes")
    expect(await objects.get_range(at("empty"), 0, 1024) == b"", "a range of an empty object is not empty")


@S3_PORTS.needed(
    source="S3 User Guide, conditional reads",
    promise="I4, Objects.get_if_changed",
    otherwise="workers do not notice a cancellation, or read the control object every time",
)
async def port_unchanged(site: Site) -> None:
    """The adapter reads an object again only if the ETag of the object has changed."""
    objects, at = site.objects, site.own
    etag = await objects.put(at("control"), b"run")
    expect(await objects.get_if_changed(at("control"), etag) is None, "an unchanged object is read again")
    after = await objects.put(at("control"), b"cancel")
    changed = await objects.get_if_changed(at("control"), etag)
    expect(changed == (b"cancel", after), "a changed object is not read")


@S3_PORTS.needed(
    source="S3 API, GetObject, HeadObject, DeleteObjects",
    promise="Objects raises NotFound",
    otherwise="a bundle without an outcome looks like an outage",
)
async def port_missing(site: Site) -> None:
    """Every read of a missing object raises NotFound, and a delete of a missing object succeeds."""
    objects, at = site.objects, site.own
    reads: list[Callable[[], Awaitable[object]]] = [
        partial(objects.get, at("nothing")),
        partial(objects.get_range, at("nothing"), 0, 1),
        partial(objects.get_if_changed, at("nothing"), None),
        partial(objects.get_if_changed, at("nothing"), '"0123"'),
    ]
    for read in reads:
        try:
            await read()
        except NotFound:
            continue
        raise Differs("a read of a missing object succeeds")
    expect(await objects.head(at("nothing")) is None, "HeadObject of a missing object succeeds")
    await objects.delete([at("nothing")])


@S3_PORTS.needed(source="S3 API, ListObjectsV2", promise="Objects.list", otherwise="a rebuilt ledger misses outcomes")
async def port_list(site: Site) -> None:
    """A listing returns the keys under any prefix, after any key, in order."""
    objects, at = site.objects, site.own
    keys = [at(key) for key in sorted(ORDERED)]
    for key in keys:
        await objects.put(key, b"1")
    for prefix in ("", "a", "a/", "b/1", "q/"):
        for after in ("", "a", "a/", "b/1", "zzz"):
            pages = objects.list(at(prefix), after=at(after) if after else "")
            listed = [info.key async for page in pages for info in page]
            expected = [key for key in keys if key.startswith(at(prefix)) and key > at(after)]
            expect(listed == expected, "the listing contains other keys")


@S3_PORTS.needed(
    source="S3 User Guide, naming objects",
    promise="Objects: keys are UTF-8",
    otherwise="inputs and results with unusual names are lost or confused",
)
async def port_keys(site: Site) -> None:
    """Keys with spaces, accents, and special characters are returned as they were written."""
    objects, at = site.objects, site.own
    keys = {at(key): key.encode() for key in ODD_KEYS}
    for key, data in keys.items():
        await objects.put(key, data)
    for key, data in keys.items():
        expect(await objects.get(key) == data, f"GetObject does not return {data.decode()!r}")
    listed = {info.key async for page in objects.list(at("")) for info in page}
    expect(listed == keys.keys(), "the listing contains other names")
    await objects.delete(list(keys))
    expect([page async for page in objects.list(at(""))] == [], "some objects cannot be deleted")


@S3_PORTS.needed(
    source="S3 User Guide, multipart upload",
    promise="Objects.upload and download",
    otherwise="large inputs and results are damaged",
)
async def port_upload(site: Site) -> None:
    """A file that was uploaded in parts is downloaded unchanged."""
    with tempfile.TemporaryDirectory(prefix="batchlab-conform-") as name:
        await _up_and_down(site, Path(name))


async def _up_and_down(site: Site, folder: Path) -> None:
    objects, at = site.objects, site.own
    source, target = folder / "up", folder / "down"
    content = bytes(range(256)) * (UPLOAD_BYTES // 256)
    source.write_bytes(content)
    expect(await objects.upload(at("big"), source) == len(content), "the upload reports another size")
    expect(await objects.download(at("big"), target) == len(content), "the download has another size")
    expect(target.read_bytes() == content, "the download has other content")


SQS_PORTS = Table("sqs")


async def _receive(queue: SqsQueue, name: str, count: int = 1) -> Sequence[Message]:
    messages: list[Message] = []
    for _ in range(4):
        messages += await queue.receive(name, max_messages=count - len(messages), wait_s=3)
        if len(messages) == count:
            return messages
    raise Differs(f"{len(messages)} of {count} messages arrive")


@SQS_PORTS.needed(
    source="SQS Developer Guide, message lifecycle", promise="Queue", otherwise="a grid cannot run on this endpoint"
)
async def port_round(site: Site) -> None:
    """A message is sent, received, returned, received again, and deleted."""
    async with site.port() as queue:
        await queue.ensure(QueueSpec("a", visibility_s=300))
        await queue.send("a", [Outgoing("one")])
        (first,) = await _receive(queue, "a")
        expect((first.body, first.receive_count) == ("one", 1), "another message is received")
        refused = await queue.change_visibility("a", [(first.receipt, 0)])
        expect(not refused, "ChangeMessageVisibility refuses the message's receipt")
        (second,) = await _receive(queue, "a")
        expect((second.id, second.receive_count) == (first.id, 2), "the second receive returns another message")
        expect(second.sent_s == first.sent_s, "the sent time changes at the second receive")
        expect(not await queue.delete("a", [second.receipt]), "DeleteMessage refuses the message's receipt")
        expect(not await queue.receive("a", wait_s=1), "a deleted message is received")


@SQS_PORTS.needed(
    source="SQS API, CreateQueue, SetQueueAttributes",
    promise="Queue.ensure",
    otherwise="a changed visibility timeout never takes effect",
)
async def port_ensure(site: Site) -> None:
    """The adapter can change the attributes of an existing queue, and can turn its dead-letter queue on and off."""
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
        await _receive(queue, "a")
        expect(not await queue.receive("a", wait_s=3), "the message is received more often than max_receives")
        (dead_letter,) = await _receive(queue, "dead")
        expect(dead_letter.body == "one", "the dead-letter queue has another message")
        await queue.ensure(QueueSpec("a", visibility_s=1))
        await asyncio.sleep(site.lag_s)
        await queue.send("a", [Outgoing("two")])
        await _receive(queue, "a")
        (again,) = await _receive(queue, "a")
        expect(again.body == "two", "the redrive policy cannot be removed")


@SQS_PORTS.needed(
    source="SQS API, DeleteMessageBatch, ChangeMessageVisibilityBatch",
    promise="Queue.delete, change_visibility",
    otherwise="one foreign message stops the heartbeats of all messages",
)
async def port_refused(site: Site) -> None:
    """The adapter returns invalid receipts as refused, and the valid receipts in the same call work."""
    async with site.port() as queue:
        await queue.ensure(QueueSpec("a", visibility_s=300))
        await queue.send("a", [Outgoing("one"), Outgoing("two")])
        message, two = await _receive(queue, "a", 2)
        changes = [(message.receipt, 0.0), ("nonsense", 0.0), (two.receipt, 300.0)]
        refused = await queue.change_visibility("a", changes)
        expect(list(refused) == ["nonsense"], "a change refuses other receipts")
        (again,) = await _receive(queue, "a")
        expect(again.id == message.id, "the message of the valid receipt is not changed")
        refused = await queue.delete("a", [again.receipt, "nonsense", two.receipt])
        expect(list(refused) == ["nonsense"], "a delete refuses other receipts")
        expect(not await queue.receive("a", wait_s=1), "the messages of the valid receipts are not deleted")


@SQS_PORTS.needed(
    name="port-missing",
    source="SQS API, common errors",
    promise="Queue raises NotFound",
    otherwise="a removed queue looks like an outage, and callers wait for it",
)
async def port_missing_queue(site: Site) -> None:
    """Every call on a missing queue raises NotFound."""
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
            raise Differs("a call on a missing queue succeeds")
        await queue.remove("nothing")
