"""SQS checks: receipt handles that are current, expired, outdated, or invalid."""

from __future__ import annotations

import time
from typing import Any

from batchlab.conform.check import Differs, Severity, Table, expect
from batchlab.conform.site import OwnQueue, Received, Site
from batchlab.core.ports import MAX_VISIBILITY_S

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

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
    rule="After its timeout, a receipt still deletes the message if no other receiver has "
    "received it.",
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
    found = site.queue().delete("nonsense")
    expect(found.code == "ReceiptHandleIsInvalid", str(found))


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
    entries = [
        {"Id": "good", "ReceiptHandle": held.receipt},
        {"Id": "bad", "ReceiptHandle": "nonsense"},
    ]
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
    found = queue.hide(held.receipt, 2)
    if found.code:
        found.refused(400, "AWS.SimpleQueueService.MessageNotInflight", "MessageNotInflight")
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
