"""Conformance checks of SQS for sends, size limits, batches, and delays."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from batchlab.conform.check import Answer, Table, Untried, expect
from batchlab.conform.site import OwnQueue, Site
from batchlab.core.ports import MAX_MESSAGE_BYTES

MIB = 1024 * 1024
EARLY_S = 0.3
"""Time in seconds by which a message's delay may end too early, because of clocks and rounding."""

SQS_SEND = Table("sqs")


@SQS_SEND.needed(source="SQS API, SendMessage", promise="Queue.send", otherwise="bundles arrive damaged")
def body(site: Site) -> None:
    """A body of any Unicode text, including line breaks and tabs, is received as it was sent. The response to
    SendMessage contains the MD5 of the body.
    """
    text = '{"text": "Grüße, 日本 😀 \\u0001", "quote": "\'", "xml": "<a>&amp;</a>", "n": "\r\n\t"}'
    queue = site.queue()
    sent = queue.send(text).expect_accepted().data
    md5 = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    expect(sent.get("MD5OfMessageBody") == md5, "the response contains another MD5 than the body's")
    received = queue.one()
    expect(received.body == text, "the message is received with another body")
    expect(received.id == sent.get("MessageId"), "the received message has another id than the response to the send")


@SQS_SEND.noted(
    source="SQS API, SendMessage",
    promise="none: JSON escapes control characters",
    otherwise="a body that works on the emulator fails on AWS",
)
def body_control(site: Site) -> None:
    """A body with a control character other than tabs and line breaks returns 400 InvalidMessageContents."""
    queue = site.queue()
    for sign in ("\0", "\x0b", "\x1f", "\uffff"):
        queue.send(f"a{sign}b").expect_refused(400, "InvalidMessageContents")


@SQS_SEND.noted(source="SQS API, SendMessage; recorded answers of AWS", promise="none: no message of the grid is empty")
def body_empty(site: Site) -> None:
    """An empty body returns 400 MissingParameter."""
    site.queue().send("").expect_refused(400, "MissingParameter")


@SQS_SEND.needed(
    source="SQS Developer Guide, message quotas",
    promise="Queue.send: 256 KiB per call",
    otherwise="large bundles cannot be sent",
)
def body_256k(site: Site) -> None:
    """The endpoint accepts a message of 256 KiB (the SQS of AWS accepts up to 1 MiB)."""
    queue = site.queue()
    queue.send("x" * MAX_MESSAGE_BYTES).expect_accepted()
    expect(len(queue.one().body) == MAX_MESSAGE_BYTES, "the message is received with another body")


@SQS_SEND.noted(
    source="SQS Developer Guide, message quotas", promise="none: the adapter refuses a message of more than 256 KiB"
)
def body_over_1m(site: Site) -> None:
    """A message of more than 1 MiB returns 400 InvalidParameterValue."""
    site.queue().send("x" * (MIB + 1)).expect_refused(400, "InvalidParameterValue")


@SQS_SEND.noted(
    source="SQS API, SetQueueAttributes", promise="none: the adapter refuses a message of more than 256 KiB"
)
def body_over_own_limit(site: Site) -> None:
    """A message larger than the queue's MaximumMessageSize returns 400 InvalidParameterValue."""
    queue = site.queue(MaximumMessageSize="1024")
    queue.send("x" * 1024).expect_accepted()
    queue.send("x" * 1025).expect_refused(400, "InvalidParameterValue")


@SQS_SEND.needed(source="SQS API, SendMessageBatch", promise="Queue.send", otherwise="bundles are lost, or sent twice")
def batch_10(site: Site) -> None:
    """A batch of 10 messages is sent completely, and the response contains the id of each entry."""
    queue = site.queue()
    bodies = [f"body-{n}" for n in range(10)]
    sent = queue.send_batch(*bodies).expect_accepted().data
    ids = {entry["Id"] for entry in sent.get("Successful", ())}
    expect(ids == {str(n) for n in range(10)}, "the response does not list every entry")
    expect(not sent.get("Failed"), "some entries failed")
    expect(sorted(entry.body for entry in queue.take(10)) == bodies, "other messages are received than were sent")


@SQS_SEND.noted(
    source="SQS API, SendMessageBatch", promise="none: the adapter refuses a batch of more than 10 messages"
)
def batch_11(site: Site) -> None:
    """A batch of more than 10 messages returns 400 AWS.SimpleQueueService.TooManyEntriesInBatchRequest."""
    answer = site.queue().send_batch(*"abcdefghijk")
    answer.expect_refused(400, "AWS.SimpleQueueService.TooManyEntriesInBatchRequest")


@SQS_SEND.noted(source="SQS API, SendMessageBatch", promise="none: the adapter numbers the entries of a batch")
def batch_same_ids(site: Site) -> None:
    """A batch with two entries of the same id returns 400 AWS.SimpleQueueService.BatchEntryIdsNotDistinct."""
    entries = [{"Id": "a", "MessageBody": "1"}, {"Id": "a", "MessageBody": "2"}]
    answer = site.queue().call("SendMessageBatch", Entries=entries)
    answer.expect_refused(400, "AWS.SimpleQueueService.BatchEntryIdsNotDistinct")


@SQS_SEND.noted(source="SQS API, SendMessageBatch", promise="none: the adapter sends no empty batch")
def batch_empty(site: Site) -> None:
    """A batch without entries returns 400 AWS.SimpleQueueService.EmptyBatchRequest."""
    answer = site.queue().call("SendMessageBatch", Entries=[])
    answer.expect_refused(400, "AWS.SimpleQueueService.EmptyBatchRequest")


@SQS_SEND.needed(
    source="SQS Developer Guide, message quotas",
    promise="Queue.send: 256 KiB per call",
    otherwise="large bundles cannot be sent together",
)
def batch_256k(site: Site) -> None:
    """SQS accepts a batch of 256 KiB in total (AWS accepts up to 1 MiB)."""
    queue = site.queue()
    half = "x" * (MAX_MESSAGE_BYTES // 2)
    sent = queue.send_batch(half, half).expect_accepted().data
    expect(len(sent.get("Successful", ())) == 2, "some entries failed")
    expect([received.body for received in queue.take(2)] == [half, half], "the messages are received with other bodies")


@SQS_SEND.noted(
    source="SQS Developer Guide, message quotas", promise="none: the adapter refuses a batch of more than 256 KiB"
)
def batch_over_1m(site: Site) -> None:
    """A batch of more than 1 MiB in total returns 400 AWS.SimpleQueueService.BatchRequestTooLong."""
    answer = site.queue().send_batch("x" * (MIB // 2), "x" * (MIB // 2), "y")
    answer.expect_refused(400, "AWS.SimpleQueueService.BatchRequestTooLong")


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
    """Send a batch with a valid and an invalid entry. Return the queue and the entries under Failed in the response."""
    # The function tries several invalid entries, because an endpoint may accept some invalid entries. Other checks test
    # the rules that the entries break.
    for bad in _BAD_ENTRIES:
        queue, answer = _half_bad(site, bad)
        if failed := answer.expect_accepted().data.get("Failed"):
            return queue, failed
    raise Untried("the endpoint accepts every entry that AWS refuses")


@SQS_SEND.needed(
    source="SQS API, SendMessageBatch",
    promise="Queue.send sends all messages or raises an exception",
    otherwise="a bundle that was not sent counts as sent until the reconciler sends it again",
)
def batch_told(site: Site) -> None:
    """The response reports each entry of a batch that was not sent: under Failed, or by refusing the batch."""
    for bad in _BAD_ENTRIES:
        queue, answer = _half_bad(site, bad)
        if answer.code:
            continue
        failed = {entry["Id"] for entry in answer.data.get("Failed", ())}
        expect("good" not in failed, "a valid entry fails")
        late = "DelaySeconds" in bad
        expected = ["good"] if "bad" in failed or late else [bad["MessageBody"], "good"]
        arrived = sorted(entry.body for entry in queue.take(len(expected)))
        expect(arrived == sorted(expected), "the received messages do not match the response")


@SQS_SEND.noted(
    source="SQS API, SendMessageBatch",
    promise="none: after an exception, some messages may have been sent",
    otherwise="one invalid message blocks the other messages in its batch",
)
def batch_partial(site: Site) -> None:
    """If one entry of a batch is invalid, SQS sends the other entries. The response to such a batch is 200 and lists
    the invalid entry under Failed.
    """
    queue, failed = _first_refused(site)
    expect([entry["Id"] for entry in failed] == ["bad"], "Failed lists a valid entry")
    expect([entry.body for entry in queue.take()] == ["good"], "the valid entry is not received")
    expect(queue.empty(), "the invalid entry is received")


@SQS_SEND.noted(
    source="SQS API, BatchResultErrorEntry",
    promise="none: the adapter also recognizes an invalid body by its error code",
    otherwise="a permanent error looks like a temporary error",
)
def batch_fault(site: Site) -> None:
    """In the response to a batch, an entry under Failed states whether the error is the sender's fault, such as an
    invalid body.
    """
    _, failed = _first_refused(site)
    expect(failed[0].get("SenderFault") is True, "the error is not reported as the sender's fault")


@SQS_SEND.noted(
    source="SQS Developer Guide, message metadata",
    promise="none: the grid uses no message attributes",
    otherwise="the grid cannot read messages of other programs",
)
def message_attributes(site: Site) -> None:
    """Message attributes do not change the body of a message and the MD5 of the body. A receiver gets message
    attributes only on request.
    """
    queue = site.queue()
    attributes = {"trace": {"DataType": "String", "StringValue": "abc"}}
    queue.send("a", MessageAttributes=attributes).expect_accepted()
    received = queue.one()
    md5 = hashlib.md5(b"a", usedforsecurity=False).hexdigest()
    expect(received.body == "a", "the message is received with another body")
    expect(received.raw.get("MD5OfBody") == md5, "MD5OfBody is not the MD5 of the body")
    expect("MessageAttributes" not in received.raw, "the message attributes are returned without a request")


@SQS_SEND.needed(
    source="SQS Developer Guide, message timers",
    promise="Queue.send(delay_s): messages wait in the queue during a backoff",
    otherwise="a task is retried without its backoff, or never",
)
def delay(site: Site) -> None:
    """A message with DelaySeconds is received after this delay, and not before."""
    queue = site.queue()
    begun_s = time.monotonic()
    queue.send("much later", DelaySeconds=600).expect_accepted()
    queue.send("late", DelaySeconds=2).expect_accepted()
    _only_late(queue, begun_s)


@SQS_SEND.needed(
    source="SQS API, SendMessageBatch",
    promise="Queue.send(delay_s)",
    otherwise="a task is retried without its backoff, or waits for the backoff of another task",
)
def delay_each(site: Site) -> None:
    """Every entry of a batch has its own DelaySeconds."""
    queue = site.queue(VisibilityTimeout="600")
    begun_s = time.monotonic()
    entries = [
        {"Id": "0", "MessageBody": "now"},
        {"Id": "1", "MessageBody": "late", "DelaySeconds": 2},
        {"Id": "2", "MessageBody": "much later", "DelaySeconds": 600},
    ]
    queue.call("SendMessageBatch", Entries=entries).expect_accepted()
    expect(queue.one().body == "now", "the message without a delay is not received first")
    _only_late(queue, begun_s)


def _only_late(queue: OwnQueue, begun_s: float) -> None:
    messages = queue.take()
    expect([received.body for received in messages] == ["late"], "another message is received")
    expect(time.monotonic() - begun_s > 2 - EARLY_S, "the message is received too early")
    # A message with a delay of ten minutes must not arrive during the check, even on a slow machine.
    queue.delete(messages[0].receipt)
    expect(queue.empty(), "a message is received that is not due")


@SQS_SEND.noted(
    source="SQS API, SendMessage",
    promise="none: the adapter refuses a longer delay, and the grid uses several messages for longer delays",
)
def delay_901(site: Site) -> None:
    """A DelaySeconds over 900 returns 400 InvalidParameterValue."""
    site.queue().send("a", DelaySeconds=901).expect_refused(400, "InvalidParameterValue")
