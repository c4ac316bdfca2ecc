"""Classes of conformance checks and their verdicts, and URLs of AWS's pages about the tested rules.

Invariant: a check tests one rule that AWS's service follows. The function of a check returns if the endpoint follows
the rule. If the endpoint breaks the rule, the function of the check raises Differs with the observed behavior. If the
rule cannot be tested, the function of the check raises Untried with the reason.

The source of a check consists of parts `BOOK, TOPIC, TOPIC ...`, separated by semicolons. The topics of an API
reference are actions and types. A part of the source that is not a book of AWS, such as an RFC, is shown as plain text.
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
"""Function of a check. If the check uses a port of batchlab, the function is a coroutine function."""

TIMEOUT_S = 40.0
"""Timeout of a check in seconds. `run` adds twice the time `settles_s` that the endpoint needs for message counts."""
MIN_SERVER_ERROR = 500
"""Lowest HTTP status of a server error."""


class Differs(Exception):
    """Error of a check whose rule the endpoint breaks. The text of the exception is one clause about the observed
    behavior.
    """


class Failed(Differs):
    """Error of a check to whose call the endpoint returned a server error (5xx).

    A single server error does not prove that an endpoint breaks a rule, because AWS's services sometimes return server
    errors. Clients repeat a call after a server error.
    """


class Untried(Exception):
    """Error of a check whose rule could not be tested. The text of the exception is one clause with the reason."""


class Severity(StrEnum):
    """Importance of a rule for batchlab.

    If an endpoint breaks a NEEDED rule, a part of batchlab does not work correctly on the endpoint. If an endpoint
    breaks only NOTED rules, batchlab works correctly on the endpoint.
    """

    NEEDED = "needed"
    NOTED = "noted"


class CheckVerdict(StrEnum):
    AGREES = "agrees"
    DIFFERS = "differs"
    UNTRIED = "untried"


@dataclass(frozen=True, slots=True)
class Check:
    """Conformance check: a rule, and the function that tests the rule.

    `source` names AWS's pages about the rule. `promise` names the part of batchlab that needs the rule. `otherwise` is
    the effect on batchlab if the endpoint breaks the rule.
    """

    name: str
    severity: Severity
    rule: str
    source: str
    promise: str
    otherwise: str
    run: Run

    @property
    def follows(self) -> str:
        """Effect on batchlab if the endpoint breaks the rule, or "nothing" with the reason why batchlab is not
        affected.
        """
        why = self.promise.removeprefix("none: ")
        return f"nothing: {why}" if self.otherwise == "nothing" else self.otherwise

    @property
    def service(self) -> str:
        return self.name.partition("-")[0]


class Table(list[Check]):
    """Table of the checks that a module defines for one service. The decorators `needed` and `noted` add a check to the
    table.

    The docstring of a check's function is the tested rule. The name of a check ends with the argument `name`, or else
    with the name of the function.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def needed(self, *, source: str, promise: str, otherwise: str, name: str = "") -> Callable[[Run], Run]:
        return self._adder(Severity.NEEDED, name, source, promise, otherwise)

    def noted(self, *, source: str, promise: str, otherwise: str = "nothing", name: str = "") -> Callable[[Run], Run]:
        return self._adder(Severity.NOTED, name, source, promise, otherwise)

    def _adder(self, severity: Severity, name: str, source: str, promise: str, otherwise: str) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            full_name = f"{self._service}-{name or run.__name__.replace('_', '-')}"
            rule = " ".join((run.__doc__ or "").split())
            self.append(Check(full_name, severity, rule, source, promise, otherwise, run))
            return run

        return add


@dataclass(frozen=True, slots=True)
class Answer:
    """Response of the endpoint to a call of an AWS action. `code` is the error code, or "" if the endpoint accepted the
    call.
    """

    call: str
    status: int
    code: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        if not self.code:
            return f"{self.call} is accepted"
        # For a response without a body (HEAD, 304), boto3 uses the status as the code.
        error = self.code if self.code == str(self.status) else f"{self.status} {self.code}"
        return f"{self.call} returns {error}"

    def expect_accepted(self) -> Answer:
        """Return the response unchanged. Raise Differs if the endpoint refused the call."""
        if self.code:
            raise self._difference()
        return self

    def expect_refused(self, status: int, *codes: str) -> None:
        """Raise Differs unless the endpoint refused the call with HTTP status `status` and one of the error codes."""
        if not self.code or self.status != status or (codes and self.code not in codes):
            raise self._difference()

    def _difference(self) -> Differs:
        return (Failed if self.status >= MIN_SERVER_ERROR else Differs)(str(self))


def answer(call: str, request: Callable[[], Mapping[str, Any]]) -> Answer:
    """Send a request, and return the response, even for an error. `call` is AWS's name of the action."""
    try:
        data = request()
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return Answer(call, status, error.response["Error"]["Code"], error.response)
    body = data["Body"].read() if call == "GetObject" else b""
    return Answer(call, data["ResponseMetadata"]["HTTPStatusCode"], data=data, body=body)


def snake(action: str) -> str:
    """Return boto3's method name for an AWS action, such as "create_queue" for CreateQueue."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in action).lstrip("_")


def expect(holds: bool, observed: str) -> None:
    """Raise Differs with the observed behavior unless `holds` is true."""
    if not holds:
        raise Differs(observed)


_S3 = "https://docs.aws.amazon.com/AmazonS3/latest"
_SQS = "https://docs.aws.amazon.com/AWSSimpleQueueService/latest"

_ASG = "https://docs.aws.amazon.com/autoscaling/ec2"

_APIS = {"S3 API": f"{_S3}/API", "SQS API": f"{_SQS}/APIReference", "Auto Scaling API": f"{_ASG}/APIReference"}
_API_PAGES = {"error responses": "ErrorResponses", "common errors": "CommonErrors"}
"""Pages of an API reference that describe neither a single action nor a single type."""

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
    """Return the URL of AWS's page about a topic of a book, or "" if AWS does not publish the book.

    Raise KeyError if the topic is unknown.
    """
    if book in _APIS:
        return f"{_APIS[book]}/{_API_PAGES.get(topic, f'API_{topic}')}.html"
    if book in _GUIDES:
        base, pages = _GUIDES[book]
        return f"{base}/{pages[topic]}.html"
    return ""


def pages(source: str) -> list[tuple[str, str]]:
    """Return the parts of a check's source, each with the URL of AWS's page. The URL is "" if AWS does not publish the
    part.
    """
    linked_parts = []
    for part in source.split("; "):
        book, *topics = part.split(", ")
        if book not in _APIS and book not in _GUIDES:
            linked_parts.append((part, ""))
            continue
        for number, topic in enumerate(topics):
            linked_parts.append((topic if number else f"{book}, {topic}", page(book, topic)))
    return linked_parts


def link(source: str) -> str:
    """Return the source of a check as Markdown with links to AWS's pages."""
    return ", ".join(f"[{text}]({url})" if url else text for text, url in pages(source))
