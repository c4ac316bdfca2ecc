"""A notification through SNS, as a subscriber of the topic receives it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint, session
from batchlab.adapters.notifications import Topics
from batchlab.core.notifications import NotDelivered, Notification, Target

REGION = "us-east-1"
ONE = Notification("1d" * 16, "failed", "sums-1", "topic", None, '{"v":1,"job":{}}', 1.0)


def clients(endpoint: Endpoint) -> tuple[Any, Any]:
    """Return clients of SNS and of SQS."""
    own = session(REGION, keys=(endpoint.access_key, endpoint.secret_key))
    url = endpoint.url
    return own.client("sns", endpoint_url=url), own.client("sqs", endpoint_url=url)


def publish(endpoint: Endpoint, arn: str, one: Notification = ONE) -> None:
    topics = Topics(lambda region: Endpoint(endpoint.url, region))
    asyncio.run(topics.publish(Target("topic", "sns", arn), one))


def subscribed(endpoint: Endpoint, name: str) -> tuple[str, str]:
    """Create a topic and a queue that subscribes to it, and return the topic and the queue's URL."""
    sns, sqs = clients(endpoint)
    fifo = {"FifoTopic": "true"} if name.endswith(".fifo") else {}
    arn = sns.create_topic(Name=name, Attributes=fifo)["TopicArn"]
    more = {"FifoQueue": "true"} if fifo else {}
    url = sqs.create_queue(QueueName=name, Attributes=more)["QueueUrl"]
    wanted = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=wanted["Attributes"]["QueueArn"])
    return arn, url


def received(endpoint: Endpoint, url: str) -> list[dict[str, Any]]:
    _, sqs = clients(endpoint)
    found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
    return [json.loads(one["Body"]) for one in found.get("Messages", [])]


def test_a_subscriber_gets_the_notification(moto: Endpoint) -> None:
    arn, url = subscribed(moto, "batch")
    publish(moto, arn)
    (one,) = received(moto, url)
    assert one["Message"] == ONE.body
    assert one["Subject"] == "batchlab: sums-1 failed"
    assert {name: value["Value"] for name, value in one["MessageAttributes"].items()} == {
        "batchlab.id": ONE.id,
        "batchlab.moment": "failed",
        "batchlab.job": "sums-1",
    }


def test_a_fifo_topic_is_given_what_it_deduplicates_by(moto: Endpoint) -> None:
    arn, url = subscribed(moto, "batch.fifo")
    for _ in range(2):
        publish(moto, arn)
    assert len(received(moto, url)) == 1


def test_missing_topic_is_a_clear_error(moto: Endpoint) -> None:
    with pytest.raises(NotDelivered) as caught:
        publish(moto, f"arn:aws:sns:{REGION}:123456789012:missing")
    assert caught.value.message.startswith("SNS: ")
    assert not caught.value.final


def test_unreachable_endpoint_is_a_clear_error() -> None:
    with pytest.raises(NotDelivered) as caught:
        publish(Endpoint("http://127.0.0.1:9"), f"arn:aws:sns:{REGION}:123456789012:x")
    assert not caught.value.final
