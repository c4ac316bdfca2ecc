"""SQS checks: sends, size limits, batches, and delays."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from batchlab.conform.check import Answer, Severity, Table, Untried, expect
from batchlab.conform.site import OwnQueue, Site
from batchlab.core.ports import MAX_MESSAGE_BYTES

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

MIB = 1024 * 1024
EARLY_S = 0.3
"""Tolerance in seconds for a delay that ends too early, because of clocks and rounding."""

SQS_SEND = Table()


@SQS_SEND.check(
    "sqs-body",
    NEEDED,
    rule="A body of any Unicode text, including line breaks and tabs, is received as it was "
    "sent. The response contains its MD5.",
    source="SQS API, SendMessage",
    promise="Queue.send",
    otherwise="bundles arrive damaged",
)
def body(site: Site) -> None:
    text = '{"text": "Grüße, 日本 😀 \\u0001", "quote": "\'", "xml": "<a>&amp;</a>", "n": "\r\n\t"}'
    queue = site.queue()
    sent = queue.send(text).accepted().data
    md5 = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    expect(sent.get("MD5OfMessageBody") == md5, "the MD5 answered is not the body's")
    received = queue.one()
    expect(received.body == text, "another body arrives")
    expect(received.id == sent.get("MessageId"), "the message has another id than was answered")


@SQS_SEND.check(
    "sqs-body-control",
    NOTED,
    rule="A body with a control character other than tabs and line breaks returns 400 InvalidMessageContents.",
    source="SQS API, SendMessage",
    promise="none: JSON escapes them",
    otherwise="a body that works here fails on AWS",
)
def body_control(site: Site) -> None:
    queue = site.queue()
    for sign in ("\0", "\x0b", "\x1f", "\uffff"):
        queue.send(f"a{sign}b").refused(400, "InvalidMessageContents")


@SQS_SEND.check(
    "sqs-body-empty",
    NOTED,
    rule="An empty body returns 400 MissingParameter.",
    source="SQS API, SendMessage; recorded answers of AWS",
    promise="none: no message of the grid is empty",
    otherwise="nothing",
)
def body_empty(site: Site) -> None:
    site.queue().send("").refused(400, "MissingParameter")


@SQS_SEND.check(
    "sqs-body-256k",
    NEEDED,
    rule="A message may have 256 KiB (and up to 1 MiB).",
    source="SQS Developer Guide, message quotas",
    promise="Queue.send: 256 KiB per call",
    otherwise="large bundles cannot be sent",
)
def body_256k(site: Site) -> None:
    queue = site.queue()
    queue.send("x" * MAX_MESSAGE_BYTES).accepted()
    expect(len(queue.one().body) == MAX_MESSAGE_BYTES, "another body arrives")


@SQS_SEND.check(
    "sqs-body-over-1m",
    NOTED,
    rule="A message of more than 1 MiB returns 400 InvalidParameterValue.",
    source="SQS Developer Guide, message quotas",
    promise="none: the adapter refuses more than 256 KiB",
    otherwise="nothing",
)
def body_over_1m(site: Site) -> None:
    site.queue().send("x" * (MIB + 1)).refused(400, "InvalidParameterValue")


@SQS_SEND.check(
    "sqs-body-over-own-limit",
    NOTED,
    rule="A message larger than the queue's MaximumMessageSize returns 400 InvalidParameterValue.",
    source="SQS API, SetQueueAttributes",
    promise="none: the adapter refuses more than 256 KiB",
    otherwise="nothing",
)
def body_over_own_limit(site: Site) -> None:
    queue = site.queue(MaximumMessageSize="1024")
    queue.send("x" * 1024).accepted()
    queue.send("x" * 1025).refused(400, "InvalidParameterValue")


@SQS_SEND.check(
    "sqs-batch-10",
    NEEDED,
    rule="A batch of 10 messages is sent completely, and the response contains the id of each entry.",
    source="SQS API, SendMessageBatch",
    promise="Queue.send",
    otherwise="bundles are lost, or sent twice",
)
def batch_10(site: Site) -> None:
    queue = site.queue()
    bodies = [f"body-{n}" for n in range(10)]
    sent = queue.send_batch(*bodies).accepted().data
    ids = {one["Id"] for one in sent.get("Successful", ())}
    expect(ids == {str(n) for n in range(10)}, "the response does not name every entry")
    expect(not sent.get("Failed"), "some entries failed")
    expect(sorted(one.body for one in queue.take(10)) == bodies, "others arrive than were sent")


@SQS_SEND.check(
    "sqs-batch-11",
    NOTED,
    rule="A batch of more than 10 messages returns 400 AWS.SimpleQueueService.TooManyEntriesInBatchRequest.",
    source="SQS API, SendMessageBatch",
    promise="none: the adapter refuses more than 10",
    otherwise="nothing",
)
def batch_11(site: Site) -> None:
    answer = site.queue().send_batch(*"abcdefghijk")
    answer.refused(400, "AWS.SimpleQueueService.TooManyEntriesInBatchRequest")


@SQS_SEND.check(
    "sqs-batch-same-ids",
    NOTED,
    rule="A batch with two entries of the same id returns 400 AWS.SimpleQueueService.BatchEntryIdsNotDistinct.",
    source="SQS API, SendMessageBatch",
    promise="none: the adapter numbers its entries",
    otherwise="nothing",
)
def batch_same_ids(site: Site) -> None:
    entries = [{"Id": "a", "MessageBody": "1"}, {"Id": "a", "MessageBody": "2"}]
    answer = site.queue().call("SendMessageBatch", Entries=entries)
    answer.refused(400, "AWS.SimpleQueueService.BatchEntryIdsNotDistinct")


@SQS_SEND.check(
    "sqs-batch-empty",
    NOTED,
    rule="A batch without entries returns 400 AWS.SimpleQueueService.EmptyBatchRequest.",
    source="SQS API, SendMessageBatch",
    promise="none: the adapter sends no empty batch",
    otherwise="nothing",
)
def batch_empty(site: Site) -> None:
    answer = site.queue().call("SendMessageBatch", Entries=[])
    answer.refused(400, "AWS.SimpleQueueService.EmptyBatchRequest")


@SQS_SEND.check(
    "sqs-batch-256k",
    NEEDED,
    rule="A batch may have 256 KiB in total (and up to 1 MiB).",
    source="SQS Developer Guide, message quotas",
    promise="Queue.send: 256 KiB per call",
    otherwise="large bundles cannot be sent together",
)
def batch_256k(site: Site) -> None:
    queue = site.queue()
    half = "x" * (MAX_MESSAGE_BYTES // 2)
    sent = queue.send_batch(half, half).accepted().data
    expect(len(sent.get("Successful", ())) == 2, "some entries failed")
    expect([received.body for received in queue.take(2)] == [half, half], "other bodies arrive")


@SQS_SEND.check(
    "sqs-batch-over-1m",
    NOTED,
    rule="A batch of more than 1 MiB in total returns 400 AWS.SimpleQueueService.BatchRequestTooLong.",
    source="SQS Developer Guide, message quotas",
    promise="none: the adapter refuses more than 256 KiB",
    otherwise="nothing",
)
def batch_over_1m(site: Site) -> None:
    answer = site.queue().send_batch("x" * (MIB // 2), "x" * (MIB // 2), "y")
    answer.refused(400, "AWS.SimpleQueueService.BatchRequestTooLong")


_BAD_ENTRIES: tuple[dict[str, Any], ...] = (
    {"MessageBody": "a\x01b"},
    {"MessageBody": "x" * 2000},
    {"MessageBody": "a", "DelaySeconds": 901},
)


def _half_bad(site: Site, bad: dict[str, Any]) -> tuple[OwnQueue, Answer]:
    queue = site.queue(MaximumMessageSize="1024")
    entries = [{"Id": "good", "MessageBody": "good"}, {"Id": "bad", **bad}]
    return queue, queue.call("SendMessageBatch", Entries=entries)


def _first_refused(site: Site) -> tuple[OwnQueue, Any]:
    """Send a batch with a valid and an invalid entry. Return the queue and the failed entries."""
    # Other checks test which entries are invalid. This one uses the first that the endpoint
    # refuses.
    for bad in _BAD_ENTRIES:
        queue, answer = _half_bad(site, bad)
        if failed := answer.accepted().data.get("Failed"):
            return queue, failed
    raise Untried("no entry that AWS refuses is refused")


@SQS_SEND.check(
    "sqs-batch-told",
    NEEDED,
    rule="The response reports each entry of a batch that was not sent: under Failed, or by refusing the batch.",
    source="SQS API, SendMessageBatch",
    promise="Queue.send: all or an exception",
    otherwise="a bundle that was not sent counts as sent until the reconciler sends it again",
)
def batch_told(site: Site) -> None:
    for bad in _BAD_ENTRIES:
        queue, answer = _half_bad(site, bad)
        if answer.code:
            continue
        failed = {one["Id"] for one in answer.data.get("Failed", ())}
        expect("good" not in failed, "a good entry fails")
        late = "DelaySeconds" in bad
        told = ["good"] if "bad" in failed or late else [bad["MessageBody"], "good"]
        arrived = sorted(one.body for one in queue.take(len(told)))
        expect(arrived == sorted(told), "what arrives is not what was told")


@SQS_SEND.check(
    "sqs-batch-partial",
    NOTED,
    rule="If one entry of a batch is invalid, the others are sent. The response is 200 and "
    "lists the invalid entry under Failed.",
    source="SQS API, SendMessageBatch",
    promise="none: after an exception, some messages may have been sent",
    otherwise="one invalid message blocks the others in its batch",
)
def batch_partial(site: Site) -> None:
    queue, failed = _first_refused(site)
    expect([one["Id"] for one in failed] == ["bad"], "a good entry failed too")
    expect([one.body for one in queue.take()] == ["good"], "the good entry does not arrive")
    expect(queue.empty(), "the bad entry arrives as well")


@SQS_SEND.check(
    "sqs-batch-fault",
    NOTED,
    rule="An entry under Failed states whether the error is the sender's fault, such as an invalid body.",
    source="SQS API, BatchResultErrorEntry",
    promise="none: the adapter also recognizes an invalid body by its error code",
    otherwise="a permanent error looks like a temporary one",
)
def batch_fault(site: Site) -> None:
    _, failed = _first_refused(site)
    expect(failed[0].get("SenderFault") is True, "it is not reported as the sender's fault")


@SQS_SEND.check(
    "sqs-message-attributes",
    NOTED,
    rule="Message attributes do not change the body and its MD5, and a receiver gets them only on request.",
    source="SQS Developer Guide, message metadata",
    promise="none: the grid uses no message attributes",
    otherwise="the grid cannot read messages of other programs",
)
def message_attributes(site: Site) -> None:
    queue = site.queue()
    attributes = {"trace": {"DataType": "String", "StringValue": "abc"}}
    queue.send("a", MessageAttributes=attributes).accepted()
    received = queue.one()
    md5 = hashlib.md5(b"a", usedforsecurity=False).hexdigest()
    expect(received.body == "a", "another body arrives")
    expect(received.raw.get("MD5OfBody") == md5, "the MD5 is not the body's")
    expect("MessageAttributes" not in received.raw, "they come unasked")


@SQS_SEND.check(
    "sqs-delay",
    NEEDED,
    rule="A message with DelaySeconds is received after this time, and not before.",
    source="SQS Developer Guide, message timers",
    promise="Queue.send(delay_s): messages wait in the queue during a backoff",
    otherwise="a task is retried without its backoff, or never",
)
def delay(site: Site) -> None:
    queue = site.queue()
    begun_s = time.monotonic()
    queue.send("much later", DelaySeconds=600).accepted()
    queue.send("late", DelaySeconds=2).accepted()
    _only_late(queue, begun_s)


@SQS_SEND.check(
    "sqs-delay-each",
    NEEDED,
    rule="Every entry of a batch has its own DelaySeconds.",
    source="SQS API, SendMessageBatch",
    promise="Queue.send(delay_s)",
    otherwise="a task is retried without its backoff, or waits for the backoff of another task",
)
def delay_each(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="600")
    begun_s = time.monotonic()
    entries = [
        {"Id": "0", "MessageBody": "now"},
        {"Id": "1", "MessageBody": "late", "DelaySeconds": 2},
        {"Id": "2", "MessageBody": "much later", "DelaySeconds": 600},
    ]
    queue.call("SendMessageBatch", Entries=entries).accepted()
    expect(queue.one().body == "now", "the one without delay does not come first")
    _only_late(queue, begun_s)


def _only_late(queue: OwnQueue, begun_s: float) -> None:
    receiveds = queue.take()
    expect([received.body for received in receiveds] == ["late"], "something else comes")
    expect(time.monotonic() - begun_s > 2 - EARLY_S, "it comes too early")
    # A slow machine may miss a delay of two seconds, but not one of ten minutes.
    queue.delete(receiveds[0].receipt)
    expect(queue.empty(), "one comes that is not due")


@SQS_SEND.check(
    "sqs-delay-901",
    NOTED,
    rule="A DelaySeconds over 900 returns 400 InvalidParameterValue.",
    source="SQS API, SendMessage",
    promise="none: the adapter refuses it, and longer delays use several messages",
    otherwise="nothing",
)
def delay_901(site: Site) -> None:
    site.queue().send("a", DelaySeconds=901).refused(400, "InvalidParameterValue")
