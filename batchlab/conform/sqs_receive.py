"""Conformance checks of SQS for receives, long polls, visibility timeouts, and receipt handles."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchlab.conform.check import Answer, Differs, Table, expect
from batchlab.conform.site import WAKES_S, OwnQueue, Received, Site
from batchlab.conform.sqs_send import EARLY_S
from batchlab.core.service_settings import MAX_VISIBILITY_S

POLL_S = 12
"""Wait time in seconds of a long poll. The wait time is longer than `WAKES_S`, and shorter than the timeout of a check.
"""
SANE_MS = 300_000

SQS_RECEIVE = Table("sqs")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, visibility timeout",
    promise="a bundle runs on one worker at a time",
    otherwise="every bundle runs on several workers",
)
def hidden(site: Site) -> None:
    """During the visibility timeout of a received message, no other receiver gets the message."""
    queue = site.queue_with("a", VisibilityTimeout="30")
    queue.one()
    expect(queue.empty(wait_s=2), "the message is received again at once")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, visibility timeout",
    promise="I2: the bundles of a killed worker are received again",
    otherwise="the bundles of a killed worker are lost",
)
def redelivery(site: Site) -> None:
    """A message that was not deleted is received again after its visibility timeout, with the same id and body."""
    queue = site.queue_with("a", VisibilityTimeout="2")
    begun_s = time.monotonic()
    first = queue.one()
    second = queue.one(after_s=2)
    expect(time.monotonic() - begun_s > 2 - EARLY_S, "the message is received again before its timeout")
    expect((second.id, second.body) == (first.id, "a"), "the message has another id or body")


@SQS_RECEIVE.needed(
    source="SQS API, ReceiveMessage",
    promise="Message.receive_count reveals suspects and poison tasks",
    otherwise="a task that kills its workers is tried forever",
)
def receive_count(site: Site) -> None:
    """ApproximateReceiveCount is 1 at the first receive, and each further receive adds 1."""
    queue = site.queue_with("a", VisibilityTimeout="0")
    for number in (1, 2, 3):
        expect(queue.one().count == number, f"ApproximateReceiveCount is not {number} at receive {number}")


@SQS_RECEIVE.noted(
    source="SQS Developer Guide, queue and message identifiers",
    promise="none: the commit of an outcome decides which result counts, not the delete of a message",
    otherwise="a late worker returns or deletes a message that another worker holds",
)
def new_handle(site: Site) -> None:
    """Each receive of a message returns a new receipt handle."""
    queue = site.queue_with("a", VisibilityTimeout="0")
    handles = {queue.one().receipt for _ in range(3)}
    expect(len(handles) == 3, "two receives return the same handle")


@SQS_RECEIVE.needed(
    source="SQS API, ReceiveMessage",
    promise="Message.sent_s, first_received_s",
    otherwise="waiting times in reports are wrong",
)
def times(site: Site) -> None:
    """SentTimestamp and ApproximateFirstReceiveTimestamp are milliseconds since the epoch, and do not change at further
    receives.
    """
    queue = site.queue_with("a", VisibilityTimeout="1")
    now_ms = site.target.clock.now_s() * 1000
    first = queue.one()
    sent_ms, received_ms = first.times_ms
    expect(sent_ms > 0 and received_ms > 0, "a timestamp is missing")
    expect(abs(sent_ms - now_ms) < SANE_MS, "SentTimestamp is minutes off")
    expect(sent_ms <= received_ms + 50, "the time of the first receive is before the time of the send")
    expect(queue.one().times_ms == first.times_ms, "the timestamps change at the second receive")


@SQS_RECEIVE.needed(
    source="SQS API, ReceiveMessage",
    promise="Queue.receive(visibility_s)",
    otherwise="messages are received again while a worker processes them, or much too late",
)
def receive_visibility(site: Site) -> None:
    """The VisibilityTimeout in a ReceiveMessage call replaces the visibility timeout of the queue."""
    queue = site.queue_with("a", VisibilityTimeout="1")
    queue.one(VisibilityTimeout=30)
    expect(queue.empty(wait_s=3), "the queue's timeout applies")


@SQS_RECEIVE.noted(
    source="SQS API, ReceiveMessage; recorded answers of AWS",
    promise="none: a worker keeps the messages that it receives",
)
def receive_zero(site: Site) -> None:
    """A ReceiveMessage call with VisibilityTimeout 0 leaves the message visible."""
    queue = site.queue_with("a", VisibilityTimeout="30")
    queue.one(VisibilityTimeout=0)
    queue.one(VisibilityTimeout=30)
    expect(queue.empty(), "the second receive does not hide the message")


@SQS_RECEIVE.needed(
    source="SQS API, ChangeMessageVisibility",
    promise="Queue.change_visibility: heartbeats",
    otherwise="a task that is longer than the visibility timeout runs twice",
)
def extend(site: Site) -> None:
    """ChangeMessageVisibility sets a new visibility timeout, which starts at the call. A message may have any number of
    such calls.
    """
    queue, message = site.received_message(VisibilityTimeout="2")
    for seconds in (300, 200):
        queue.hide(message.receipt, seconds).expect_accepted()
    time.sleep(2.5)
    expect(queue.empty(wait_s=1), "the message is received during its extended timeout")
    queue.hide(message.receipt, 1).expect_accepted()
    queue.one(after_s=1)


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, visibility timeout",
    promise="I6: a worker that leaves returns its work at once",
    otherwise="unfinished work waits for the visibility timeout",
)
def give_back(site: Site) -> None:
    """ChangeMessageVisibility to 0 makes the message visible at once."""
    queue, message = site.received_message(VisibilityTimeout="600")
    queue.hide(message.receipt, 0).expect_accepted()
    again = queue.one()
    expect((again.id, again.count) == (message.id, message.count + 1), "another message is received")


def _woken(queue: OwnQueue, call: Callable[[], Answer]) -> Received:
    """Start a long poll of the queue, run `call`, and return the message that the long poll received."""
    with ThreadPoolExecutor(1, thread_name_prefix="conform-poll") as threads:
        polling = threads.submit(queue.receive, wait_s=POLL_S)
        time.sleep(0.5)
        begun_s = time.monotonic()
        call().expect_accepted()
        messages = polling.result()
    expect(bool(messages), "a long poll ends without the message")
    expect(time.monotonic() - begun_s < WAKES_S, "a long poll does not end when the message is visible")
    return messages[0]


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, short and long polling",
    promise="Queue.receive(wait_s)",
    otherwise="every bundle waits up to 20 s for an idle worker",
)
def wake(site: Site) -> None:
    """A long poll ends as soon as a message is sent."""
    queue = site.queue()
    expect(_woken(queue, lambda: queue.send("a")).body == "a", "another message is received")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, short and long polling",
    promise="I6: another worker continues returned work at once",
    otherwise="unfinished work waits up to 20 s",
)
def wake_given_back(site: Site) -> None:
    """A long poll ends as soon as a message is made visible by ChangeMessageVisibility."""
    queue, message = site.received_message(VisibilityTimeout="600")
    received = _woken(queue, lambda: queue.hide(message.receipt, 0))
    expect(received.id == message.id, "another message is received")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, short and long polling",
    promise="Queue.receive(wait_s)",
    otherwise="retries and the bundles of a killed worker wait up to 20 s longer",
)
def wake_due(site: Site) -> None:
    """A long poll ends when a delayed message becomes due, or when the timeout of a hidden message ends."""
    delayed = site.queue()
    delayed.send("a", DelaySeconds=1).expect_accepted()
    hidden = site.queue_with("b", VisibilityTimeout="1")
    hidden.one()
    with ThreadPoolExecutor(2, thread_name_prefix="conform-poll") as threads:
        begun_s = time.monotonic()
        polls = [threads.submit(queue.receive, wait_s=POLL_S) for queue in (delayed, hidden)]
        bodies = [[queue.body for queue in poll.result()] for poll in polls]
        took_s = time.monotonic() - begun_s
    expect(bodies[0] == ["a"], "a long poll misses a delayed message that becomes due")
    expect(bodies[1] == ["b"], "a long poll misses a message whose timeout ends")
    expect(took_s < 1 + WAKES_S, "a long poll returns the message late")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, short and long polling",
    promise="AWS bills requests: an idle worker sends three requests a minute",
    otherwise="idle workers poll without a pause",
)
def wait_empty(site: Site) -> None:
    """A long poll of an empty queue ends without messages after WaitTimeSeconds, and not before."""
    queue = site.queue()
    begun_s = time.monotonic()
    expect(queue.empty(wait_s=4), "an empty queue returns a message")
    took_s = time.monotonic() - begun_s
    expect(took_s > 4 - EARLY_S, "the long poll ends too early")
    expect(took_s < 4 + WAKES_S, "the long poll ends too late")


@SQS_RECEIVE.needed(
    source="SQS API, ReceiveMessage",
    promise="Queue.receive waits for the first message",
    otherwise="a few bundles wait up to 20 s",
)
def wait_partial(site: Site) -> None:
    """A long poll ends with the first messages and does not wait for the requested number."""
    queue = site.queue_with("a")
    begun_s = time.monotonic()
    expect(len(queue.receive(10, wait_s=POLL_S)) == 1, "the long poll ends without the message")
    expect(time.monotonic() - begun_s < WAKES_S, "the long poll waits for more messages")


@SQS_RECEIVE.noted(source="SQS API, ReceiveMessage", promise="none: the adapter refuses a longer wait")
def wait_21(site: Site) -> None:
    """WaitTimeSeconds over 20 returns 400 InvalidParameterValue."""
    queue = site.queue_with("a")
    queue.call("ReceiveMessage", WaitTimeSeconds=21).expect_refused(400, "InvalidParameterValue")


@SQS_RECEIVE.noted(source="SQS API, ReceiveMessage", promise="none: the adapter refuses a larger number of messages")
def receive_11(site: Site) -> None:
    """MaxNumberOfMessages over 10 returns 400 InvalidParameterValue."""
    queue = site.queue()
    queue.call("ReceiveMessage", MaxNumberOfMessages=11).expect_refused(400, "InvalidParameterValue")


@SQS_RECEIVE.needed(
    source="SQS API, ReceiveMessage",
    promise="Queue.receive(max_messages)",
    otherwise="a worker holds more bundles than its slots can run",
)
def receive_most(site: Site) -> None:
    """A ReceiveMessage call never returns more messages than MaxNumberOfMessages."""
    queue = site.queue()
    queue.send_batch(*"abcdefghij").expect_accepted()
    queue.send_batch(*"klmnopqrst").expect_accepted()
    total = 0
    for most in (1, 3, 10):
        count = len(queue.receive(most, wait_s=1))
        expect(count <= most, "a receive returns more messages")
        total += count
    expect(total > 0, "no message is received")


@SQS_RECEIVE.needed(
    source="SQS Developer Guide, at-least-once delivery",
    promise="I2: concurrent receives lose no message",
    otherwise="bundles are lost",
)
def share(site: Site) -> None:
    """With many receivers, each message reaches one of the receivers. In rare cases, a message may reach two
    receivers.
    """
    queue = site.queue(VisibilityTimeout="60")
    sent = {str(number) for number in range(60)}
    for start in range(0, 60, 10):
        queue.send_batch(*map(str, range(start, start + 10))).expect_accepted()

    def receiver() -> list[str]:
        bodies: list[str] = []
        while messages := queue.receive(3, wait_s=1):
            bodies += [message.body for message in messages]
            for message in messages:
                queue.delete(message.receipt).expect_accepted()
        return bodies

    with ThreadPoolExecutor(6, thread_name_prefix="conform-share") as threads:
        receivers = [threads.submit(receiver) for _ in range(6)]
        bodies = [body for message in receivers for body in message.result()]
    expect(set(bodies) == sent, f"{len(sent - set(bodies))} of 60 messages reach no receiver")


MAX_TIMEOUT_S = int(MAX_VISIBILITY_S)

SQS_RECEIPTS = Table("sqs")


def _twice_received(site: Site) -> tuple[OwnQueue, Received, Received]:
    """Receive a message twice, and return the queue and both received messages.

    Only the receipt of the second receive is the latest receipt of the message.
    """
    queue, old = site.received_message(VisibilityTimeout="1")
    return queue, old, queue.one(VisibilityTimeout=4)


@SQS_RECEIPTS.needed(
    source="SQS API, DeleteMessage", promise="Queue.delete", otherwise="every bundle is received again and again"
)
def delete(site: Site) -> None:
    """A deleted message is not received again after its visibility timeout."""
    queue = site.queue_with("a", "b", VisibilityTimeout="2")
    first, second = queue.take(2)
    queue.delete(first.receipt).expect_accepted()
    again = queue.one()
    expect(again.id == second.id, "a deleted message is received again")
    queue.delete(again.receipt).expect_accepted()
    expect(queue.empty(wait_s=3), "a deleted message is received again")


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessage; recorded answers of AWS",
    promise="none: a late worker may find its message visible again",
    otherwise="a slightly late bundle is received again, although its outcome exists",
)
def delete_expired(site: Site) -> None:
    """After the visibility timeout of a message, its receipt still deletes the message if no other receiver has
    received the message.
    """
    queue, message = site.received_message(VisibilityTimeout="1")
    time.sleep(1.5)
    queue.delete(message.receipt).expect_accepted()
    expect(queue.empty(wait_s=2), "DeleteMessage is accepted, but the message is received again")


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessage; recorded answers of AWS",
    promise="Queue.delete: the adapter returns a refusal and does not raise an exception",
    otherwise="the emulator refuses a worker that repeats a delete after a lost response",
)
def delete_twice(site: Site) -> None:
    """SQS accepts a second DeleteMessage for a message that was already deleted."""
    queue, message = site.received_message()
    queue.delete(message.receipt).expect_accepted()
    queue.delete(message.receipt).expect_accepted()


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessage", promise="none: the adapter returns a refusal and does not raise an exception"
)
def delete_nonsense(site: Site) -> None:
    """DeleteMessage with an invalid receipt handle returns ReceiptHandleIsInvalid."""
    answer = site.queue().delete("nonsense")
    expect(answer.code == "ReceiptHandleIsInvalid", str(answer))


@SQS_RECEIPTS.needed(
    source="SQS Developer Guide, queue and message identifiers",
    promise="Queue.delete: a receipt belongs to its queue",
    otherwise="bundles of another pool are lost",
)
def delete_foreign(site: Site) -> None:
    """A receipt handle cannot delete a message of another queue."""
    queue, message = site.received_message(VisibilityTimeout="2")
    other = site.queue_with("b")
    # The endpoint may accept or refuse the deletion, but both messages must still exist.
    other.delete(message.receipt)
    expect(other.one().body == "b", "the other queue's message is deleted")
    expect(queue.one().id == message.id, "the message is deleted through another queue")


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessageBatch",
    promise="none: the adapter repeats the calls of a refused batch one by one",
    otherwise="the adapter sends more requests",
)
def delete_batch_partial(site: Site) -> None:
    """If one receipt of DeleteMessageBatch is invalid, SQS deletes the other messages. The response to such a batch is
    200 and lists the invalid receipt under Failed.
    """
    queue, message = site.received_message(VisibilityTimeout="2")
    _call_with_invalid_receipt(queue, "DeleteMessageBatch", message)
    expect(queue.empty(wait_s=3), "the message of the valid receipt is received again")


def _call_with_invalid_receipt(queue: OwnQueue, action: str, message: Received, **more: Any) -> None:
    """Call a batch action with the receipt of the message and with an invalid receipt."""
    receipts = {"good": message.receipt, "bad": "nonsense"}
    entries = [{"Id": name, "ReceiptHandle": receipt, **more} for name, receipt in receipts.items()]
    response = queue.call(action, Entries=entries).expect_accepted().data
    failed = response.get("Failed", ())
    expect([entry["Id"] for entry in failed] == ["bad"], "Failed does not list the invalid receipt")
    expect(failed[0].get("Code") == "ReceiptHandleIsInvalid", f"the error code is {failed[0]['Code']}")
    successful = [entry["Id"] for entry in response.get("Successful", ())]
    expect(successful == ["good"], "the entry with the valid receipt fails")


@SQS_RECEIPTS.noted(
    source="SQS API, ChangeMessageVisibilityBatch",
    promise="none: the adapter repeats the calls of a refused batch one by one",
    otherwise="the adapter sends more requests",
)
def change_batch_partial(site: Site) -> None:
    """If one receipt of ChangeMessageVisibilityBatch is invalid, SQS changes the other messages. The response to such a
    batch is 200 and lists the invalid receipt under Failed.
    """
    queue, message = site.received_message(VisibilityTimeout="600")
    _call_with_invalid_receipt(queue, "ChangeMessageVisibilityBatch", message, VisibilityTimeout=0)
    expect(queue.one().id == message.id, "the message of the valid receipt is not changed")


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessage",
    promise="Queue.delete: the adapter returns a refusal and does not raise an exception",
    otherwise="on the emulator, a worker is notified that it lost its message, but AWS does not report this loss",
)
def stale_delete_answer(site: Site) -> None:
    """SQS accepts DeleteMessage with the receipt of an earlier receive."""
    queue, old, _ = _twice_received(site)
    queue.delete(old.receipt).expect_accepted()


@SQS_RECEIPTS.noted(
    source="SQS API, DeleteMessage",
    promise="none: the commit of an outcome decides which result counts, not the delete of a message",
    otherwise=(
        "a late worker deletes a message that another worker holds. If the other worker dies too, the "
        "reconciler sends the bundle again"
    ),
)
def stale_delete_spares(site: Site) -> None:
    """The receipt of an earlier receive may fail to delete a message that was received again. Only the latest receipt
    of a message always deletes the message.
    """
    queue, old, new = _twice_received(site)
    queue.delete(old.receipt)
    for again in queue.receive(wait_s=8):
        expect(again.id == new.id, "another message is received")
        return
    raise Differs("DeleteMessage deletes a message that another worker holds")


@SQS_RECEIPTS.noted(
    source="recorded answers of AWS; the API reference does not state the rule",
    promise="Queue.change_visibility: the adapter returns a refusal and does not raise an exception",
    otherwise="the emulator refuses a late heartbeat, but AWS accepts a late heartbeat",
)
def stale_change(site: Site) -> None:
    """SQS accepts ChangeMessageVisibility with the receipt of an earlier receive."""
    queue, old, _ = _twice_received(site)
    queue.hide(old.receipt, 10).expect_accepted()


@SQS_RECEIPTS.needed(
    source="SQS API, ChangeMessageVisibility; recorded answers of AWS",
    promise="I2: a late heartbeat loses nothing",
    otherwise="a bundle whose worker was late is lost",
)
def change_expired(site: Site) -> None:
    """SQS accepts ChangeMessageVisibility after the visibility timeout, or refuses the call with 400
    MessageNotInflight. A receiver receives the message again in both cases.
    """
    queue, message = site.received_message(VisibilityTimeout="1")
    time.sleep(2.5)
    answer = queue.hide(message.receipt, 2)
    if answer.code:
        answer.expect_refused(400, "AWS.SimpleQueueService.MessageNotInflight", "MessageNotInflight")
    expect(queue.one().id == message.id, "another message is received")


@SQS_RECEIPTS.noted(
    source="recorded answers of AWS", promise="none: the adapter returns a refusal and does not raise an exception"
)
def change_deleted(site: Site) -> None:
    """ChangeMessageVisibility of a deleted message returns 400 InvalidParameterValue."""
    queue, message = site.received_message()
    queue.delete(message.receipt).expect_accepted()
    queue.hide(message.receipt, 30).expect_refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.noted(
    source="SQS API, ChangeMessageVisibility",
    promise="Queue.change_visibility: at most 12 h",
    otherwise="a heartbeat that works on the emulator fails on AWS",
)
def change_over_12h(site: Site) -> None:
    """A VisibilityTimeout over 43,200 s returns 400 InvalidParameterValue."""
    queue, message = site.received_message()
    queue.hide(message.receipt, MAX_TIMEOUT_S + 1).expect_refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.noted(
    source="SQS Developer Guide, visibility timeout",
    promise="a task that is longer than the limit gets a new message before the limit, so the task continues",
    otherwise="a task of more than 12 hours works on the emulator and runs twice on AWS",
)
def change_total_12h(site: Site) -> None:
    """The limit of 12 hours for the visibility timeout starts when a message is received. A visibility timeout that
    would end after this limit returns 400 InvalidParameterValue, and an extension does not restart the limit.
    """
    queue, message = site.received_message()
    time.sleep(2)
    queue.hide(message.receipt, MAX_TIMEOUT_S).expect_refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.noted(
    source="SQS API, CreateQueue",
    promise="none: the adapter rounds times up to whole seconds",
    otherwise="a fraction of a second that works on the emulator fails on AWS",
)
def whole_seconds(site: Site) -> None:
    """Visibility timeouts and delays are whole seconds. A call with a value such as 1.5 returns 400."""
    queue = site.queue()
    queue.call("SetQueueAttributes", Attributes={"VisibilityTimeout": "1.5"}).expect_refused(400)
