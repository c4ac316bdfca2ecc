"""Conformance checks of SQS for queues, attributes, message counts, dead-letter queues, and purges."""

from __future__ import annotations

import json
import time
from functools import partial
from urllib.parse import urlsplit

from batchlab.conform.check import Answer, Differs, Table, Untried, answer, expect
from batchlab.conform.site import OwnQueue, Received, Site

NO_QUEUE = "AWS.SimpleQueueService.NonExistentQueue"

SQS_QUEUES = Table("sqs")


def _create(site: Site, name: str, **attributes: str) -> Answer:
    return answer("CreateQueue", partial(site.target.create_queue, name, attributes))


@SQS_QUEUES.needed(
    source="SQS API, CreateQueue",
    promise="Queue.ensure may be repeated",
    otherwise="a restarted manager fails, or loses messages",
)
def create_same(site: Site) -> None:
    """CreateQueue with the name and attributes of an existing queue returns the URL of the existing queue, which keeps
    its messages.
    """
    name = site.new_name()
    first = site.queue_with("a", name=name, VisibilityTimeout="40")
    second = site.queue(name, VisibilityTimeout="40")
    expect(second.url == first.url, "CreateQueue returns another URL")
    second.one()


@SQS_QUEUES.needed(
    source="SQS API, CreateQueue; recorded answers of AWS",
    promise="Queue.ensure sets the required attributes",
    otherwise="a changed visibility timeout never takes effect",
)
def create_different(site: Site) -> None:
    """CreateQueue with the name of an existing queue and other attributes returns 400 QueueAlreadyExists."""
    queue = site.queue(VisibilityTimeout="40")
    _create(site, queue.name, VisibilityTimeout="41").expect_refused(400, "QueueAlreadyExists")


@SQS_QUEUES.needed(
    source="SQS API, common errors; recorded answers of AWS",
    promise="Queue raises NotFound",
    otherwise="a removed queue looks like an outage, and callers wait for it",
)
def queue_missing(site: Site) -> None:
    """Every action on a missing queue returns 400 AWS.SimpleQueueService.NonExistentQueue."""
    sqs = site.target.sqs
    name = site.new_name()
    answer("GetQueueUrl", lambda: sqs.get_queue_url(QueueName=name)).expect_refused(400, NO_QUEUE)
    existing = site.queue()
    missing = OwnQueue(site.target, name, existing.url.replace(existing.name, name))
    for response in (
        missing.send("a"),
        missing.send_batch("a"),
        missing.call("ReceiveMessage"),
        missing.call("GetQueueAttributes", AttributeNames=["All"]),
        missing.call("PurgeQueue"),
        missing.call("DeleteQueue"),
    ):
        response.expect_refused(400, NO_QUEUE)


@SQS_QUEUES.needed(
    source="SQS API, GetQueueUrl",
    promise="Queue: queues are addressed by name",
    otherwise="manager and workers use different queues",
)
def queue_url(site: Site) -> None:
    """GetQueueUrl returns the same URL as CreateQueue."""
    queue = site.queue()
    url = site.target.sqs.get_queue_url(QueueName=queue.name)["QueueUrl"]
    expect(url == queue.url, "GetQueueUrl returns another URL")


@SQS_QUEUES.noted(
    source="SQS Developer Guide, queue and message identifiers",
    promise="none: boto3 calls the configured endpoint",
    otherwise="other clients cannot reach the queue",
)
def queue_url_host(site: Site) -> None:
    """Clients can use the URL of a queue without changes."""
    if site.target.endpoint.url is None:
        raise Untried("the check does not apply to AWS itself")
    host = urlsplit(site.queue().url).netloc
    expect(host == urlsplit(site.target.endpoint.url).netloc, "the queue's URL has another host or port")


@SQS_QUEUES.noted(source="SQS API, CreateQueue", promise="none: the adapter refuses other names")
def queue_name(site: Site) -> None:
    """A queue's name has 1 to 80 letters, digits, -, or _. CreateQueue with any other name returns 400
    InvalidParameterValue.
    """
    run = site.target.run
    for name in (f"{run} spaces", f"{run}.dot", f"{run}-{'x' * (80 - len(run))}"):
        _create(site, name).expect_refused(400, "InvalidParameterValue")


@SQS_QUEUES.needed(
    source="SQS API, SetQueueAttributes",
    promise="Queue.ensure sets the required attributes",
    otherwise="a changed visibility timeout never takes effect",
)
def attributes_update(site: Site) -> None:
    """SetQueueAttributes applies to all later receives (within a minute)."""
    queue = site.queue(VisibilityTimeout="600")
    queue.call("SetQueueAttributes", Attributes={"VisibilityTimeout": "1"}).expect_accepted()
    is_current = site.until(lambda: queue.attributes().get("VisibilityTimeout") == "1")
    expect(is_current, "GetQueueAttributes returns the old timeout")
    time.sleep(site.lag_s)
    queue.send("a").expect_accepted()
    first = queue.one()
    expect(queue.one().id == first.id, "the old timeout applies")


@SQS_QUEUES.noted(
    source="SQS API, SetQueueAttributes",
    promise="none: the grid's settings stay within the limits",
    otherwise="a queue setting that works on the emulator fails on AWS",
)
def attributes_refused(site: Site) -> None:
    """A VisibilityTimeout over 12 h or a retention under 60 s returns 400 InvalidAttributeValue."""
    queue = site.queue()
    for name, value in (("VisibilityTimeout", "43201"), ("MessageRetentionPeriod", "59")):
        answer = queue.call("SetQueueAttributes", Attributes={name: value})
        answer.expect_refused(400, "InvalidAttributeValue")


@SQS_QUEUES.needed(
    source="SQS Developer Guide, available CloudWatch metrics; SQS API, GetQueueAttributes",
    promise="Queue.depth: the autoscaler's backlog",
    otherwise="the fleet does not grow, or never shrinks",
)
def counts(site: Site) -> None:
    """The counts of visible, in-flight, and delayed messages are approximate and current within a minute."""
    queue = site.queue_with("a", "b", "c", "d", "e", VisibilityTimeout="300")
    queue.send_batch("late", "later", DelaySeconds=300).expect_accepted()
    messages = queue.take(2)
    expected = {"visible": 3, "in flight": 2, "delayed": 2}
    expect(site.until(lambda: queue.counts() == expected), "the counts are not 3 visible, 2 in flight, and 2 delayed")
    queue.delete(messages[0].receipt).expect_accepted()
    queue.hide(messages[1].receipt, 0).expect_accepted()
    expected = {"visible": 4, "in flight": 0, "delayed": 2}
    expect(site.until(lambda: queue.counts() == expected), "the counts are not 4 visible, 0 in flight, and 2 delayed")


@SQS_QUEUES.needed(
    source="SQS API, PurgeQueue", promise="Queue.purge", otherwise="messages of a purged grid appear again"
)
def purge(site: Site) -> None:
    """PurgeQueue deletes every message, including hidden and delayed ones (within a minute). A message that is sent
    after PurgeQueue is not deleted.
    """
    queue = site.queue_with("a", "b", "c", VisibilityTimeout="2")
    queue.send("late", DelaySeconds=2).expect_accepted()
    queue.one()
    queue.call("PurgeQueue").expect_accepted()
    time.sleep(site.lag_s)
    expect(queue.empty(wait_s=4), "messages from before PurgeQueue are received")
    queue.send("after").expect_accepted()
    expect(queue.one().body == "after", "another message is received after PurgeQueue")


@SQS_QUEUES.noted(source="SQS API, PurgeQueue", promise="none: only an operator purges queues")
def purge_twice(site: Site) -> None:
    """A second PurgeQueue within 60 s returns 403 AWS.SimpleQueueService.PurgeQueueInProgress."""
    queue = site.queue()
    queue.call("PurgeQueue").expect_accepted()
    queue.call("PurgeQueue").expect_refused(403, "AWS.SimpleQueueService.PurgeQueueInProgress")


@SQS_QUEUES.noted(
    source="SQS API, CreateQueue",
    promise="none yet: a grid keeps its queues",
    otherwise="a restart of a grid within a minute fails only on AWS",
)
def recreate(site: Site) -> None:
    """For 60 s after DeleteQueue, CreateQueue with the same name returns 400
    AWS.SimpleQueueService.QueueDeletedRecently.
    """
    queue = site.queue()
    queue.call("DeleteQueue").expect_accepted()
    _create(site, queue.name).expect_refused(400, "AWS.SimpleQueueService.QueueDeletedRecently")


def _redrive(dead: OwnQueue, receives: int) -> str:
    return json.dumps({"deadLetterTargetArn": dead.arn(), "maxReceiveCount": receives})


def _poison_queues(site: Site, receives: int) -> tuple[OwnQueue, OwnQueue, Received]:
    """Create a queue and its dead-letter queue, and receive a message `receives` times without deleting the message."""
    dead = site.queue()
    queue = site.queue_with("poison", VisibilityTimeout="0", RedrivePolicy=_redrive(dead, receives))
    for number in range(1, receives + 1):
        message = queue.one()
        expect(message.count == number, f"ApproximateReceiveCount is {message.count} at receive {number}")
    return queue, dead, message


def _dead_letter(queue: OwnQueue, dead: OwnQueue) -> Received:
    # Receive once more, because emulators move the message to the dead-letter queue only during a receive. AWS moves
    # the message without a receive.
    expect(queue.empty(), "the message is received more often than maxReceiveCount")
    return dead.one()


@SQS_QUEUES.needed(
    source="SQS Developer Guide, dead-letter queues",
    promise="I7: poison tasks end as FAILED",
    otherwise="an unreadable bundle circulates forever",
)
def dead_letter(site: Site) -> None:
    """A message that was received maxReceiveCount times moves to the dead-letter queue with its body, instead of being
    received again.
    """
    queue, dead, _ = _poison_queues(site, 2)
    expect(_dead_letter(queue, dead).body == "poison", "the dead letter has another body")
    expect(queue.empty(), "the message is in both queues")


@SQS_QUEUES.noted(
    source="SQS Developer Guide, dead-letter queues; recorded answers of AWS",
    promise="none: the bundle's history is in its body and in the bucket",
    otherwise="a dead letter looks younger than it is",
)
def dead_letter_history(site: Site) -> None:
    """A dead letter keeps its message id, its sent time, and its receive count."""
    queue, dead, message = _poison_queues(site, 1)
    dead_letter = _dead_letter(queue, dead)
    expect(dead_letter.id == message.id, "the dead letter has another id")
    expect(dead_letter.times_ms[0] == message.times_ms[0], "the dead letter has another sent time")
    expect(dead_letter.count == message.count + 1, "the receive count of the dead letter starts again")


@SQS_QUEUES.noted(
    source="SQS API, ReceiveMessage; recorded answers of AWS", promise="none: the body of a message names its stage"
)
def dead_letter_source(site: Site) -> None:
    """DeadLetterQueueSourceArn of a dead letter names its source queue."""
    queue, dead, _ = _poison_queues(site, 1)
    facts = _dead_letter(queue, dead).raw.get("Attributes", {})
    expect(
        facts.get("DeadLetterQueueSourceArn") == queue.arn(), "DeadLetterQueueSourceArn does not name the source queue"
    )


@SQS_QUEUES.needed(
    source="SQS Developer Guide, dead-letter queues",
    promise="poison tasks do not block other tasks",
    otherwise="a poison task stops its stage",
)
def dead_letter_neighbours(site: Site) -> None:
    """Messages that move to the dead-letter queue do not block other messages."""
    dead = site.queue()
    queue = site.queue(VisibilityTimeout="600", RedrivePolicy=_redrive(dead, 1))
    queue.send_batch(*(f"poison-{number}" for number in range(10))).expect_accepted()
    for received in queue.take(10):
        queue.hide(received.receipt, 0).expect_accepted()
    queue.send("good").expect_accepted()
    expect(queue.one().body == "good", "a dead letter is received instead of the valid message")
    arrived: set[str] = set()
    ends_s = time.monotonic() + site.arrives_s
    while len(arrived) < 10 and time.monotonic() < ends_s:
        # Emulators move messages to the dead-letter queue only during a receive.
        expect(not queue.receive(), "a dead letter is received again")
        arrived |= {received.body for received in dead.receive(wait_s=1)}
    expect(len(arrived) == 10, f"{10 - len(arrived)} of 10 messages do not reach the dead-letter queue")


@SQS_QUEUES.noted(
    source="SQS Developer Guide, dead-letter queues",
    promise="Queue.ensure: the dead-letter queue exists already",
    otherwise="a wrong name of a dead-letter queue is noticed only when the first poison task is lost",
)
def dead_letter_missing(site: Site) -> None:
    """A RedrivePolicy that names a missing queue returns 400."""
    queue = site.queue()
    target = f"{queue.arn()}-nowhere"
    policy = json.dumps({"deadLetterTargetArn": target, "maxReceiveCount": 3})
    queue.call("SetQueueAttributes", Attributes={"RedrivePolicy": policy}).expect_refused(400)


@SQS_QUEUES.noted(source="SQS API, SetQueueAttributes", promise="none: the grid's maxReceiveCount is within the limits")
def dead_letter_limits(site: Site) -> None:
    """The maxReceiveCount of a RedrivePolicy is 1 to 1,000. Any other maxReceiveCount returns 400."""
    queue, dead = site.queue(), site.queue()
    for receives in (0, 1001):
        policy = _redrive(dead, receives)
        queue.call("SetQueueAttributes", Attributes={"RedrivePolicy": policy}).expect_refused(400)


@SQS_QUEUES.noted(
    source="recorded answers of AWS",
    promise="Queue.ensure without a dead-letter queue",
    otherwise="messages still move to an unused queue",
)
def dead_letter_off(site: Site) -> None:
    """SetQueueAttributes with an empty text as the RedrivePolicy removes the RedrivePolicy from the queue."""
    dead = site.queue()
    queue = site.queue(RedrivePolicy=_redrive(dead, 3))
    queue.call("SetQueueAttributes", Attributes={"RedrivePolicy": ""}).expect_accepted()
    if not site.until(lambda: "RedrivePolicy" not in queue.attributes()):
        raise Differs("SetQueueAttributes is accepted, but the policy still exists")
