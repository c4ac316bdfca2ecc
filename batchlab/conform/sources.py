"""Where AWS states a rule: the page behind each source that a check names.

A source is one or more of `BOOK, TOPIC, TOPIC ...` separated by semicolons; an API's topics are its
actions and types. What has no page of AWS's (an RFC, recorded answers) stays a text.
"""

from __future__ import annotations

_S3 = "https://docs.aws.amazon.com/AmazonS3/latest"
_SQS = "https://docs.aws.amazon.com/AWSSimpleQueueService/latest"

_ASG = "https://docs.aws.amazon.com/autoscaling/ec2"

_APIS = {
    "S3 API": f"{_S3}/API",
    "SQS API": f"{_SQS}/APIReference",
    "Auto Scaling API": f"{_ASG}/APIReference",
}
_API_PAGES = {"error responses": "ErrorResponses", "common errors": "CommonErrors"}
"""The pages of an API that are not about one action or type."""

_GUIDES = {
    "S3 User Guide": (
        f"{_S3}/userguide",
        {
            "checking object integrity": "checking-object-integrity",
            "conditional reads": "conditional-reads",
            "conditional writes": "conditional-writes",
            "data consistency model": "Welcome",
            "listing object keys": "ListingKeysUsingAPIs",
            "multipart upload": "mpuoverview",
            "multipart upload limits": "qfacts",
            "naming objects": "object-keys",
        },
    ),
    "Auto Scaling User Guide": (
        f"{_ASG}/userguide",
        {
            "completing a lifecycle action": "completing-lifecycle-hooks",
            "health checks": "ec2-auto-scaling-health-checks",
            "instance lifecycle": "ec2-auto-scaling-lifecycle",
            "launch templates": "launch-templates",
            "lifecycle hooks": "lifecycle-hooks",
            "scale-in protection": "ec2-auto-scaling-instance-protection",
            "scaling cooldowns": "ec2-auto-scaling-scaling-cooldowns",
            "scaling limits": "asg-capacity-limits",
            "suspending processes": "ec2-auto-scaling-suspend-resume-processes",
            "verifying a scaling activity": "as-verify-scaling-activity",
        },
    ),
    "SQS Developer Guide": (
        f"{_SQS}/SQSDeveloperGuide",
        {
            "at-least-once delivery": "standard-queues-at-least-once-delivery",
            "available CloudWatch metrics": "sqs-available-cloudwatch-metrics",
            "dead-letter queues": "sqs-dead-letter-queues",
            "message lifecycle": "sqs-basic-architecture",
            "message metadata": "sqs-message-metadata",
            "message quotas": "quotas-messages",
            "message timers": "sqs-message-timers",
            "queue and message identifiers": "sqs-queue-message-identifiers",
            "short and long polling": "sqs-short-and-long-polling",
            "visibility timeout": "sqs-visibility-timeout",
        },
    ),
}


def page(book: str, topic: str) -> str:
    """The address of AWS's page on a topic, empty for other books; KeyError where none is known."""
    if book in _APIS:
        return f"{_APIS[book]}/{_API_PAGES.get(topic, f'API_{topic}')}.html"
    if book in _GUIDES:
        base, pages = _GUIDES[book]
        return f"{base}/{pages[topic]}.html"
    return ""


def pages(source: str) -> list[tuple[str, str]]:
    """The parts of a source with their addresses, in order; empty where there is none."""
    found = []
    for part in source.split("; "):
        book, *topics = part.split(", ")
        if book not in _APIS and book not in _GUIDES:
            found.append((part, ""))
            continue
        for number, topic in enumerate(topics):
            found.append((topic if number else f"{book}, {topic}", page(book, topic)))
    return found


def linked(source: str) -> str:
    """A source in Markdown."""
    return ", ".join(f"[{text}]({url})" if url else text for text, url in pages(source))
