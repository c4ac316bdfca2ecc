"""What a check is, and the three ways in which it can end.

Invariant: a check tries one rule of AWS's and ends silently (the endpoint agrees), with Differs
(what was seen instead) or with Untried (why the rule could not be put to the test).

Where AWS states a rule: the page behind each source that a check names.

A source is one or more of `BOOK, TOPIC, TOPIC ...` separated by semicolons; an API's topics are its
actions and types. What has no page of AWS's (an RFC, recorded answers) stays a text.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from batchlab.conform.site import Site

Run = Callable[["Site"], Coroutine[Any, Any, None] | None]
"""What a check does with its site: a function, or a coroutine function where it uses a port."""

LIMIT_S = 40.0
"""A check that takes longer is given up, where it need not wait for counts to settle."""


FAILURES = 500
"""The first status of HTTP by which a server says that it, and not the caller, has failed."""


class Differs(Exception):
    """The endpoint does something else; the text is one clause saying what."""


class Failed(Differs):
    """The endpoint says that it has failed (5xx). Once, that says nothing of a rule: AWS's services
    do so at times, and their clients try again."""


class Untried(Exception):
    """The rule could not be put to the test; the text is one clause saying why."""


class Severity(StrEnum):
    """Whether batchlab would break a promise where the rule does not hold."""

    NEEDED = "needed"
    NOTED = "noted"
    """batchlab copes either way, or refuses by itself what the service should refuse."""


class Verdict(StrEnum):
    """How a check came out."""

    AGREES = "agrees"
    DIFFERS = "differs"
    UNTRIED = "untried"


@dataclass(frozen=True, slots=True)
class Check:
    """One rule. `source` names AWS's own page of it, `promise` what of batchlab stands on it, and
    `otherwise` what follows where it does not hold."""

    name: str
    severity: Severity
    rule: str
    source: str
    promise: str
    otherwise: str
    run: Run

    @property
    def follows(self) -> str:
        """What follows for batchlab where the rule does not hold, and why it may be nothing."""
        why = self.promise.removeprefix("none: ")
        return f"nothing: {why}" if self.otherwise == "nothing" else self.otherwise

    @property
    def service(self) -> str:
        """`s3`, `sqs` or `autoscaling`."""
        return self.name.partition("-")[0]


class Table(list[Check]):
    """The checks of one file, in order; `Table.check` puts the decorated function in."""

    def check(
        self,
        name: str,
        severity: Severity,
        *,
        rule: str,
        source: str,
        promise: str,
        otherwise: str,
    ) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            self.append(Check(name, severity, rule, source, promise, otherwise, run))
            return run

        return add


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back on the wire; `code` is empty where the call was accepted."""

    call: str
    status: int
    code: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        if not self.code:
            return f"{self.call} is accepted"
        # Without a body (HEAD, 304) boto3 puts the status where the code would be.
        told = self.code if self.code == str(self.status) else f"{self.status} {self.code}"
        return f"{self.call} returns {told}"

    def accepted(self) -> Answer:
        """This, or Differs where the call was refused."""
        if self.code:
            raise self._otherwise()
        return self

    def refused(self, status: int, *codes: str) -> None:
        """Differs unless the call was refused with this status and one of these codes."""
        if not self.code or self.status != status or (codes and self.code not in codes):
            raise self._otherwise()

    def _otherwise(self) -> Differs:
        return (Failed if self.status >= FAILURES else Differs)(str(self))


def answer(call: str, request: Callable[[], Mapping[str, Any]]) -> Answer:
    """The answer to one request, be it an error; `call` is AWS's name of the action."""
    try:
        data = request()
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return Answer(call, status, error.response["Error"]["Code"], error.response)
    body = data["Body"].read() if call == "GetObject" else b""
    return Answer(call, data["ResponseMetadata"]["HTTPStatusCode"], data=data, body=body)


def snake(action: str) -> str:
    """boto3's name of an action: "create_queue" of CreateQueue."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in action).lstrip("_")


def expect(holds: bool, observed: str) -> None:
    """Differs with what was `observed` unless it `holds`."""
    if not holds:
        raise Differs(observed)


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
