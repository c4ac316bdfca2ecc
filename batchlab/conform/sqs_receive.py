"""SQS checks: receives, long polls, and visibility timeouts.

SQS checks: receipt handles that are current, expired, outdated, or invalid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchlab.conform.check import Answer, Differs, Severity, Table, expect
from batchlab.conform.site import WAKES_S, OwnQueue, Received, Site
from batchlab.conform.sqs_send import EARLY_S
from batchlab.core.ports import MAX_VISIBILITY_S

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

POLL_S = 12
"""Wait time in seconds of a long poll: well above `WAKES_S`, and well below a check's timeout."""
SANE_MS = 300_000

SQS_RECEIVE = Table()


@SQS_RECEIVE.check(
    "sqs-hidden",
    NEEDED,
    rule="No other receiver gets a received message during its visibility timeout.",
    source="SQS Developer Guide, visibility timeout",
    promise="a bundle runs on one worker at a time",
    otherwise="every bundle runs on several workers",
)
def hidden(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="30")
    queue.send("a").accepted()
    queue.one()
    expect(queue.empty(wait_s=2), "it is received again at once")


@SQS_RECEIVE.check(
    "sqs-redelivery",
    NEEDED,
    rule="A message that was not deleted is received again after its visibility timeout, with the same id and body.",
    source="SQS Developer Guide, visibility timeout",
    promise="I2: the bundles of a killed worker are received again",
    otherwise="the bundles of a killed worker are lost",
)
def redelivery(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="2")
    queue.send("a").accepted()
    begun_s = time.monotonic()
    first = queue.one()
    second = queue.one(after_s=2)
    expect(time.monotonic() - begun_s > 2 - EARLY_S, "it comes before its timeout")
    expect((second.id, second.body) == (first.id, "a"), "it has another id or body")


@SQS_RECEIVE.check(
    "sqs-receive-count",
    NEEDED,
    rule="ApproximateReceiveCount is 1 at the first receive, and each further receive adds 1.",
    source="SQS API, ReceiveMessage",
    promise="Message.receive_count: it reveals suspects and poison tasks",
    otherwise="a task that kills its workers is tried forever",
)
def receive_count(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="0")
    queue.send("a").accepted()
    for number in (1, 2, 3):
        expect(queue.one().count == number, f"it is not {number} at receive {number}")


@SQS_RECEIVE.check(
    "sqs-new-handle",
    NOTED,
    rule="Each receive of a message returns a new receipt handle.",
    source="SQS Developer Guide, queue and message identifiers",
    promise="none: the commit decides, not the delete",
    otherwise="a late worker returns or deletes a message that another worker holds",
)
def new_handle(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="0")
    queue.send("a").accepted()
    handles = {queue.one().receipt for _ in range(3)}
    expect(len(handles) == 3, "the same handle comes again")


@SQS_RECEIVE.check(
    "sqs-times",
    NEEDED,
    rule="SentTimestamp and ApproximateFirstReceiveTimestamp are milliseconds since the "
    "epoch, and do not change at further receives.",
    source="SQS API, ReceiveMessage",
    promise="Message.sent_s, first_received_s",
    otherwise="waiting times in reports are wrong",
)
def times(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="1")
    queue.send("a").accepted()
    now_ms = site.target.clock.now_s() * 1000
    first = queue.one()
    sent_ms, received_ms = first.times_ms
    expect(sent_ms > 0 and received_ms > 0, "one is missing")
    expect(abs(sent_ms - now_ms) < SANE_MS, "the time it was sent is minutes off")
    expect(sent_ms <= received_ms + 50, "it is received before it is sent")
    expect(queue.one().times_ms == first.times_ms, "they change when it comes again")


@SQS_RECEIVE.check(
    "sqs-receive-visibility",
    NEEDED,
    rule="The VisibilityTimeout of a receive replaces the queue's.",
    source="SQS API, ReceiveMessage",
    promise="Queue.receive(visibility_s)",
    otherwise="messages are received again during the work, or much too late",
)
def receive_visibility(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="1")
    queue.send("a").accepted()
    queue.one(VisibilityTimeout=30)
    expect(queue.empty(wait_s=3), "the queue's timeout counts")


@SQS_RECEIVE.check(
    "sqs-receive-zero",
    NOTED,
    rule="A receive with VisibilityTimeout 0 leaves the message visible.",
    source="SQS API, ReceiveMessage; recorded answers of AWS",
    promise="none: a worker keeps what it receives",
    otherwise="nothing",
)
def receive_zero(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="30")
    queue.send("a").accepted()
    queue.one(VisibilityTimeout=0)
    queue.one(VisibilityTimeout=30)
    expect(queue.empty(), "the second receive does not hide it")


@SQS_RECEIVE.check(
    "sqs-extend",
    NEEDED,
    rule="ChangeMessageVisibility sets a new timeout from now on, any number of times.",
    source="SQS API, ChangeMessageVisibility",
    promise="Queue.change_visibility: heartbeats",
    otherwise="a task longer than the timeout runs twice",
)
def extend(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="2")
    queue.send("a").accepted()
    held = queue.one()
    for seconds in (300, 200):
        queue.hide(held.receipt, seconds).accepted()
    time.sleep(2.5)
    expect(queue.empty(wait_s=1), "it comes back although it was extended")
    queue.hide(held.receipt, 1).accepted()
    queue.one(after_s=1)


@SQS_RECEIVE.check(
    "sqs-give-back",
    NEEDED,
    rule="ChangeMessageVisibility to 0 makes the message visible at once.",
    source="SQS Developer Guide, visibility timeout",
    promise="I6: a worker that leaves returns its work at once",
    otherwise="unfinished work waits for a timeout",
)
def give_back(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="600")
    queue.send("a").accepted()
    held = queue.one()
    queue.hide(held.receipt, 0).accepted()
    again = queue.one()
    expect((again.id, again.count) == (held.id, held.count + 1), "another message comes")


def _woken(queue: OwnQueue, call: Callable[[], Answer]) -> Received:
    """Return the message that a waiting receive gets because of `call`."""
    with ThreadPoolExecutor(1, thread_name_prefix="conform-poll") as threads:
        polling = threads.submit(queue.receive, wait_s=POLL_S)
        time.sleep(0.5)
        begun_s = time.monotonic()
        call().accepted()
        receiveds = polling.result()
    expect(bool(receiveds), "a waiting receive ends empty")
    expect(time.monotonic() - begun_s < WAKES_S, "a waiting receive sleeps on")
    return receiveds[0]


@SQS_RECEIVE.check(
    "sqs-wake",
    NEEDED,
    rule="A long poll ends as soon as a message is sent.",
    source="SQS Developer Guide, short and long polling",
    promise="Queue.receive(wait_s)",
    otherwise="every bundle waits up to 20 s for an idle worker",
)
def wake(site: Site) -> None:
    queue = site.queue()
    expect(_woken(queue, lambda: queue.send("a")).body == "a", "something else comes")


@SQS_RECEIVE.check(
    "sqs-wake-given-back",
    NEEDED,
    rule="A long poll ends as soon as a message is made visible by ChangeMessageVisibility.",
    source="SQS Developer Guide, short and long polling",
    promise="I6: another worker continues returned work at once",
    otherwise="unfinished work waits up to 20 s",
)
def wake_given_back(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="600")
    queue.send("a").accepted()
    held = queue.one()
    found = _woken(queue, lambda: queue.hide(held.receipt, 0))
    expect(found.id == held.id, "something else comes")


@SQS_RECEIVE.check(
    "sqs-wake-due",
    NEEDED,
    rule="A long poll ends when a delayed message becomes due, or when the timeout of a hidden message ends.",
    source="SQS Developer Guide, short and long polling",
    promise="Queue.receive(wait_s)",
    otherwise="retries and the bundles of a killed worker wait up to 20 s longer",
)
def wake_due(site: Site) -> None:
    delayed = site.queue()
    delayed.send("a", DelaySeconds=1).accepted()
    hidden = site.queue(VisibilityTimeout="1")
    hidden.send("b").accepted()
    hidden.one()
    with ThreadPoolExecutor(2, thread_name_prefix="conform-poll") as threads:
        begun_s = time.monotonic()
        polls = [threads.submit(one.receive, wait_s=POLL_S) for one in (delayed, hidden)]
        found = [[one.body for one in poll.result()] for poll in polls]
        took_s = time.monotonic() - begun_s
    expect(found[0] == ["a"], "a waiting receive misses a delayed message that is due")
    expect(found[1] == ["b"], "a waiting receive misses a timeout that runs out")
    expect(took_s < 1 + WAKES_S, "a waiting receive notices it late")


@SQS_RECEIVE.check(
    "sqs-wait-empty",
    NEEDED,
    rule="A long poll of an empty queue ends without messages after WaitTimeSeconds, and not before.",
    source="SQS Developer Guide, short and long polling",
    promise="requests are billed: an idle worker sends three a minute",
    otherwise="idle workers poll without a pause",
)
def wait_empty(site: Site) -> None:
    queue = site.queue()
    begun_s = time.monotonic()
    expect(queue.empty(wait_s=4), "a message comes from nowhere")
    took_s = time.monotonic() - begun_s
    expect(took_s > 4 - EARLY_S, "it ends at once")
    expect(took_s < 4 + WAKES_S, "it ends much later")


@SQS_RECEIVE.check(
    "sqs-wait-partial",
    NEEDED,
    rule="A long poll ends with the first messages and does not wait for the requested number.",
    source="SQS API, ReceiveMessage",
    promise="Queue.receive waits for the first message",
    otherwise="a few bundles wait up to 20 s",
)
def wait_partial(site: Site) -> None:
    queue = site.queue()
    queue.send("a").accepted()
    begun_s = time.monotonic()
    expect(len(queue.receive(10, wait_s=POLL_S)) == 1, "it ends without the message")
    expect(time.monotonic() - begun_s < WAKES_S, "it waits for more")


@SQS_RECEIVE.check(
    "sqs-wait-21",
    NOTED,
    rule="WaitTimeSeconds over 20 returns 400 InvalidParameterValue.",
    source="SQS API, ReceiveMessage",
    promise="none: the adapter refuses it",
    otherwise="nothing",
)
def wait_21(site: Site) -> None:
    queue = site.queue()
    queue.send("a").accepted()
    queue.call("ReceiveMessage", WaitTimeSeconds=21).refused(400, "InvalidParameterValue")


@SQS_RECEIVE.check(
    "sqs-receive-11",
    NOTED,
    rule="MaxNumberOfMessages over 10 returns 400 InvalidParameterValue.",
    source="SQS API, ReceiveMessage",
    promise="none: the adapter refuses it",
    otherwise="nothing",
)
def receive_11(site: Site) -> None:
    queue = site.queue()
    queue.call("ReceiveMessage", MaxNumberOfMessages=11).refused(400, "InvalidParameterValue")


@SQS_RECEIVE.check(
    "sqs-receive-most",
    NEEDED,
    rule="A receive never returns more than MaxNumberOfMessages.",
    source="SQS API, ReceiveMessage",
    promise="Queue.receive(max_messages)",
    otherwise="a worker holds more bundles than its slots can run",
)
def receive_most(site: Site) -> None:
    queue = site.queue()
    queue.send_batch(*"abcdefghij").accepted()
    queue.send_batch(*"klmnopqrst").accepted()
    seen = 0
    for most in (1, 3, 10):
        found = len(queue.receive(most, wait_s=1))
        expect(found <= most, "it gives more")
        seen += found
    expect(seen > 0, "no message comes")


@SQS_RECEIVE.check(
    "sqs-share",
    NEEDED,
    rule="With many receivers, each message reaches one of them. Rarely, it may reach two.",
    source="SQS Developer Guide, at-least-once delivery",
    promise="I2: concurrent receives lose no message",
    otherwise="bundles are lost",
)
def share(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="60")
    sent = {str(number) for number in range(60)}
    for start in range(0, 60, 10):
        queue.send_batch(*map(str, range(start, start + 10))).accepted()

    def receiver() -> list[str]:
        got: list[str] = []
        while receiveds := queue.receive(3, wait_s=1):
            got += [one.body for one in receiveds]
            for one in receiveds:
                queue.delete(one.receipt).accepted()
        return got

    with ThreadPoolExecutor(6, thread_name_prefix="conform-share") as threads:
        receivers = [threads.submit(receiver) for _ in range(6)]
        got = [body for one in receivers for body in one.result()]
    expect(set(got) == sent, f"{len(sent - set(got))} of 60 reach nobody")


STALE = "SQS API, DeleteMessage"
LONGEST_S = int(MAX_VISIBILITY_S)

SQS_RECEIPTS = Table()


def _held(site: Site, **attributes: str) -> tuple[OwnQueue, Received]:
    queue = site.queue(**attributes)
    queue.send("a").accepted()
    return queue, queue.one()


def _twice_received(site: Site) -> tuple[OwnQueue, Received, Received]:
    """Receive a message twice.

    Return the receipts of both receivers. The second one still holds it.
    """
    queue, old = _held(site, VisibilityTimeout="1")
    return queue, old, queue.one(VisibilityTimeout=4)


@SQS_RECEIPTS.check(
    "sqs-delete",
    NEEDED,
    rule="A deleted message is not received again after its visibility timeout.",
    source="SQS API, DeleteMessage",
    promise="Queue.delete",
    otherwise="every bundle is received again and again",
)
def delete(site: Site) -> None:
    queue = site.queue(VisibilityTimeout="2")
    queue.send_batch("a", "b").accepted()
    first, second = queue.take(2)
    queue.delete(first.receipt).accepted()
    again = queue.one()
    expect(again.id == second.id, "it comes again")
    queue.delete(again.receipt).accepted()
    expect(queue.empty(wait_s=3), "it comes again")


@SQS_RECEIPTS.check(
    "sqs-delete-expired",
    NOTED,
    rule="After its timeout, a receipt still deletes the message if no other receiver has received it.",
    source="SQS API, DeleteMessage; recorded answers of AWS",
    promise="none: a late worker may find its message visible again",
    otherwise="a slightly late bundle is received again, although its outcome exists",
)
def delete_expired(site: Site) -> None:
    queue, held = _held(site, VisibilityTimeout="1")
    time.sleep(1.5)
    queue.delete(held.receipt).accepted()
    expect(queue.empty(wait_s=2), "accepted, but it comes again")


@SQS_RECEIPTS.check(
    "sqs-delete-twice",
    NOTED,
    rule="Deleting a deleted message is accepted.",
    source="SQS API, DeleteMessage; recorded answers of AWS",
    promise="Queue.delete: the adapter returns a refusal and does not raise",
    otherwise="a worker that repeats a delete after a lost response is refused",
)
def delete_twice(site: Site) -> None:
    queue, held = _held(site)
    queue.delete(held.receipt).accepted()
    queue.delete(held.receipt).accepted()


@SQS_RECEIPTS.check(
    "sqs-delete-nonsense",
    NOTED,
    rule="Deleting with an invalid receipt handle returns ReceiptHandleIsInvalid.",
    source="SQS API, DeleteMessage",
    promise="none: the adapter returns a refusal and does not raise",
    otherwise="nothing",
)
def delete_nonsense(site: Site) -> None:
    answer = site.queue().delete("nonsense")
    expect(answer.code == "ReceiptHandleIsInvalid", str(answer))


@SQS_RECEIPTS.check(
    "sqs-delete-foreign",
    NEEDED,
    rule="A receipt handle cannot delete a message of another queue.",
    source="SQS Developer Guide, queue and message identifiers",
    promise="Queue.delete: a receipt belongs to its queue",
    otherwise="bundles of another pool are lost",
)
def delete_foreign(site: Site) -> None:
    queue, held = _held(site, VisibilityTimeout="2")
    other = site.queue()
    other.send("b").accepted()
    # The response does not matter, only that both messages still exist.
    other.delete(held.receipt)
    expect(other.one().body == "b", "the other queue's message is gone")
    expect(queue.one().id == held.id, "its own message is gone")


@SQS_RECEIPTS.check(
    "sqs-delete-batch-partial",
    NOTED,
    rule="If one receipt of DeleteMessageBatch is invalid, the other messages are deleted. "
    "The response is 200 and lists the invalid receipt under Failed.",
    source="SQS API, DeleteMessageBatch",
    promise="none: the adapter then repeats the calls one by one",
    otherwise="more requests",
)
def delete_batch_partial(site: Site) -> None:
    queue, held = _held(site, VisibilityTimeout="2")
    entries = [{"Id": "good", "ReceiptHandle": held.receipt}, {"Id": "bad", "ReceiptHandle": "nonsense"}]
    found = queue.call("DeleteMessageBatch", Entries=entries).accepted().data
    _one_failed(found.get("Failed", ()))
    expect([one["Id"] for one in found.get("Successful", ())] == ["good"], "the good one fails")
    expect(queue.empty(wait_s=3), "the good one's message comes again")


def _one_failed(failed: Any) -> None:
    expect([one["Id"] for one in failed] == ["bad"], "the bad one is not named under Failed")
    expect(failed[0].get("Code") == "ReceiptHandleIsInvalid", f"its code is {failed[0]['Code']}")


@SQS_RECEIPTS.check(
    "sqs-change-batch-partial",
    NOTED,
    rule="If one receipt of ChangeMessageVisibilityBatch is invalid, the others are changed."
    " The response is 200 and lists the invalid receipt under Failed.",
    source="SQS API, ChangeMessageVisibilityBatch",
    promise="none: the adapter then repeats the calls one by one",
    otherwise="more requests",
)
def change_batch_partial(site: Site) -> None:
    queue, held = _held(site, VisibilityTimeout="600")
    entries = [
        {"Id": "good", "ReceiptHandle": held.receipt, "VisibilityTimeout": 0},
        {"Id": "bad", "ReceiptHandle": "nonsense", "VisibilityTimeout": 0},
    ]
    found = queue.call("ChangeMessageVisibilityBatch", Entries=entries).accepted().data
    _one_failed(found.get("Failed", ()))
    expect([one["Id"] for one in found.get("Successful", ())] == ["good"], "the good one fails")
    expect(queue.one().id == held.id, "the good one is not changed")


@SQS_RECEIPTS.check(
    "sqs-stale-delete-answer",
    NOTED,
    rule="Deleting with the receipt of an earlier receive is accepted.",
    source=STALE,
    promise="Queue.delete: the adapter returns a refusal and does not raise",
    otherwise="a worker learns that it lost its message, which AWS does not report",
)
def stale_delete_answer(site: Site) -> None:
    queue, old, _ = _twice_received(site)
    queue.delete(old.receipt).accepted()


@SQS_RECEIPTS.check(
    "sqs-stale-delete-spares",
    NOTED,
    rule="The receipt of an earlier receive may fail to delete a message that was received "
    "again. Only the latest receipt always deletes it.",
    source=STALE,
    promise="none: the commit decides, not the delete",
    otherwise="a late worker deletes a message that another worker holds. If that worker dies, "
    "too, the reconciler sends the bundle again",
)
def stale_delete_spares(site: Site) -> None:
    queue, old, new = _twice_received(site)
    queue.delete(old.receipt)
    for again in queue.receive(wait_s=8):
        expect(again.id == new.id, "another message comes")
        return
    raise Differs("it deletes a message that another worker holds")


@SQS_RECEIPTS.check(
    "sqs-stale-change",
    NOTED,
    rule="ChangeMessageVisibility with the receipt of an earlier receive is accepted.",
    source="recorded answers of AWS; the reference does not say",
    promise="Queue.change_visibility: the adapter returns a refusal and does not raise",
    otherwise="a late heartbeat is refused, but AWS accepts it",
)
def stale_change(site: Site) -> None:
    queue, old, _ = _twice_received(site)
    queue.hide(old.receipt, 10).accepted()


@SQS_RECEIPTS.check(
    "sqs-change-expired",
    NEEDED,
    rule="ChangeMessageVisibility after the timeout is accepted, or refused with 400 "
    "MessageNotInflight. In both cases, the message is received again.",
    source="SQS API, ChangeMessageVisibility; recorded answers of AWS",
    promise="I2: a late heartbeat loses nothing",
    otherwise="a bundle whose worker was late is lost",
)
def change_expired(site: Site) -> None:
    queue, held = _held(site, VisibilityTimeout="1")
    time.sleep(2.5)
    answer = queue.hide(held.receipt, 2)
    if answer.code:
        answer.refused(400, "AWS.SimpleQueueService.MessageNotInflight", "MessageNotInflight")
    expect(queue.one().id == held.id, "another message comes")


@SQS_RECEIPTS.check(
    "sqs-change-deleted",
    NOTED,
    rule="ChangeMessageVisibility of a deleted message returns 400 InvalidParameterValue.",
    source="recorded answers of AWS",
    promise="none: the adapter returns a refusal and does not raise",
    otherwise="nothing",
)
def change_deleted(site: Site) -> None:
    queue, held = _held(site)
    queue.delete(held.receipt).accepted()
    queue.hide(held.receipt, 30).refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.check(
    "sqs-change-over-12h",
    NOTED,
    rule="A VisibilityTimeout over 43,200 s returns 400 InvalidParameterValue.",
    source="SQS API, ChangeMessageVisibility",
    promise="Queue.change_visibility: at most 12 h",
    otherwise="a heartbeat that works here fails on AWS",
)
def change_over_12h(site: Site) -> None:
    queue, held = _held(site)
    queue.hide(held.receipt, LONGEST_S + 1).refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.check(
    "sqs-change-total-12h",
    NOTED,
    rule="The limit of 12 hours starts at the receive. A timeout that would end later returns 400 "
    "InvalidParameterValue, and an extension does not restart the limit.",
    source="SQS Developer Guide, visibility timeout",
    promise="a longer task gets a new message before the limit, so it continues",
    otherwise="a task of more than 12 hours works here and runs twice on AWS",
)
def change_total_12h(site: Site) -> None:
    queue, held = _held(site)
    time.sleep(2)
    queue.hide(held.receipt, LONGEST_S).refused(400, "InvalidParameterValue")


@SQS_RECEIPTS.check(
    "sqs-whole-seconds",
    NOTED,
    rule="Timeouts and delays are whole seconds. 1.5 returns 400.",
    source="SQS API, CreateQueue",
    promise="none: the adapter rounds up",
    otherwise="a fraction that works here fails on AWS",
)
def whole_seconds(site: Site) -> None:
    queue = site.queue()
    queue.call("SetQueueAttributes", Attributes={"VisibilityTimeout": "1.5"}).refused(400)
