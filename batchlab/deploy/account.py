"""Access to one AWS account in one region, with the credentials that boto3 finds (see `Account.open`).

Invariant: the error for a call that AWS refuses names the caller and the missing permission. botocore's retry mode
"standard" repeats throttled calls and calls with a lost connection, up to ten attempts in total. `Account.notes`
receives a message for each attempt without a response from AWS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from batchlab.adapters.aws.endpoint import ANSWER_S, CONNECT_S, code_of, session, translate_errors
from batchlab.core import installation
from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError

MAX_ATTEMPTS = 10
DOCS = "docs/deploy.md"
"""Page that documents the permissions of a user who deploys the stack."""

_REGION = re.compile(r"[a-z]{2}(-[a-z]+){1,2}-\d")
_NOT_ALLOWED = re.compile(r"(?:User: (?P<who>\S+) is )?not authorized to perform: (?P<action>[\w-]+:\w+)")
_NO_ACCESS = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthFailure"}
_BAD_KEYS = {"InvalidClientTokenId", "UnrecognizedClient", "SignatureDoesNotMatch"}
_OLD_KEYS = {"ExpiredToken", "RequestExpired", "TokenRefreshRequired"}


class Notes(Protocol):
    """Receiver of messages about the retries of one call to AWS. The receiver decides which messages the user sees."""

    def say(self, text: str) -> None: ...


@dataclass
class Account:
    """AWS account with a client for each service.

    The client of a service is created on first use. The end of the account's `with` block closes all clients.
    """

    region: str
    id: str = ""
    who: str = ""
    """ARN of the user or role to which the credentials belong."""
    notes: Callable[[], Notes] | None = field(default=None, repr=False)
    """Function that creates, for each call to AWS, the receiver of messages about the call's retries."""
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, region: str | None = None, *, notes: Callable[[], Notes] | None = None) -> Account:
        """Return the account to which the credentials of the environment belong. The function asks AWS's service STS.

        Raise UsageError if the region or the credentials are missing.
        """
        account = cls(chosen_region(region), notes=notes)
        with aws_errors("AWS"):
            identity = account.client("sts").get_caller_identity()
        account.id, account.who = identity["Account"], identity["Arn"]
        return account

    def client(self, service: str) -> Any:
        if service not in self._clients:
            client = self._clients[service] = _client(service, self.region)
            if self.notes:
                _report_retries(client, self.notes)
        return self._clients[service]

    @property
    def is_real(self) -> bool:
        """Whether calls reach AWS. Calls reach an emulator if AWS_ENDPOINT_URL names an emulator."""
        host = urlsplit(self.client("cloudformation").meta.endpoint_url).hostname or ""
        return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))

    @property
    def arn(self) -> str:
        """Common prefix of the account's ARNs, with {} in place of the service, such as
        "arn:aws:{}:eu-west-1:123456789012:".
        """
        partition = self.who.split(":")[1] if self.who.startswith("arn:") else "aws"
        return f"arn:{partition}:{{}}:{self.region}:{self.id}:"

    def pages(self, service: str, operation: str, key: str, **asking: Any) -> Iterator[Any]:
        """Call a listing operation of a service, and yield the items under `key` from all pages of the response. Raise
        BackendError if AWS refuses the call.
        """
        with aws_errors(operation):
            for page in self.client(service).get_paginator(operation).paginate(**asking):
                yield from page.get(key) or ()

    def groups(self, names: Sequence[str]) -> list[Any]:
        """Return AWS's descriptions of the Auto Scaling groups with the names in `names`. Skip missing groups."""
        if not names:
            return []  # For an empty list of names, AWS would return all groups of the region.
        operation, key = "describe_auto_scaling_groups", "AutoScalingGroups"
        return list(self.pages("autoscaling", operation, key, AutoScalingGroupNames=list(names)))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chosen_region(named: str | None) -> str:
    """Return the region `named`, or else the region that boto3 finds. Raise UsageError if a region is not set."""
    installation.need("aws", "A deployment to AWS", "boto3")
    import boto3
    from botocore.exceptions import ProfileNotFound

    if named and not _REGION.fullmatch(named):
        raise UsageError(f"{named!r} is not a region.", remedy="An example is eu-west-1.")
    try:
        # Other AWS tools read the variable AWS_REGION, but boto3 ignores AWS_REGION.
        region = named or os.environ.get("AWS_REGION") or boto3.Session().region_name
    except ProfileNotFound as error:
        raise UsageError(f"{error}.", remedy="Set AWS_PROFILE to a profile of ~/.aws/config.") from error
    if not region:
        raise UsageError("No region is set.", remedy="Use --region eu-west-1, set AWS_REGION, or run `aws configure`.")
    return region


def _client(service: str, region: str) -> Any:
    from botocore.config import Config

    is_local = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname in ("127.0.0.1", "localhost")
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        retries={"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"},
        # A proxy cannot reach an endpoint on the loopback address of this machine.
        proxies={} if is_local else None,
    )
    with aws_errors("AWS"):
        # boto3's type stubs have a separate type for each service, so the type here is Any.
        make: Any = session(region).client
        return make(service, config=config)


def _report_retries(client: Any, notes: Callable[[], Notes]) -> None:
    """Report each attempt of a call to which AWS does not respond, except the last attempt."""
    call_notes: list[Notes] = []

    def on_call(**_: Any) -> None:
        call_notes[:] = [notes()]

    def on_attempt(attempts: int, endpoint: Any, caught_exception: Exception | None = None, **_: Any) -> None:
        # botocore caught an exception only if AWS did not respond. The last attempt is not reported, because a failed
        # last attempt raises an error.
        if caught_exception is not None and attempts < MAX_ATTEMPTS:
            for note in call_notes:
                note.say(f"{endpoint.host} does not respond. This was attempt {attempts} of {MAX_ATTEMPTS}.")

    client.meta.events.register("before-call", on_call)
    client.meta.events.register("needs-retry", on_attempt)


class Missing(NotFound):
    """Error for an AWS object that does not exist, or that AWS does not find yet."""


@contextmanager
def aws_errors(what: str, is_missing: Callable[[str, str], bool] = lambda _code, _message: False) -> Iterator[None]:
    """Convert botocore's errors to batchlab's errors, whose texts begin with `what`.

    Raise Missing if `is_missing` returns true for the error code and the message.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    )

    signed_out = ("The sign-in to AWS has expired.", "Run `aws sso login`.")
    lacking: dict[type[BotoCoreError], tuple[str, str]] = {
        PartialCredentialsError: (
            "A part of the AWS credentials is missing: {cred_var}.",
            "Set this part, or remove the other part.",
        ),
        NoCredentialsError: (
            "AWS credentials are missing.",
            "Run `aws configure` or `aws sso login`, set AWS_PROFILE, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
        ),
        ProfileNotFound: ("{error}.", "Set AWS_PROFILE to a profile of ~/.aws/config."),
        SSOError: signed_out,
        TokenRetrievalError: signed_out,
    }
    with _with_remedy(), translate_errors(what):
        try:
            yield
        except ClientError as error:
            if is_missing(code_of(error), message_of(error)):
                raise Missing(f"{what}: {message_of(error).rstrip('.')}.") from error
            if refused := refusal(error):
                raise refused from error
            raise
        except tuple(lacking) as error:
            text, remedy = next(texts for kind, texts in lacking.items() if isinstance(error, kind))
            raise UsageError(text.format(error=error, **error.kwargs), remedy=remedy) from error


@contextmanager
def _with_remedy() -> Iterator[None]:
    """Add a remedy to an Unreachable error, which means that the endpoint of AWS does not respond."""
    try:
        yield
    except Unreachable as error:
        remedy = "Check the network, its proxy, and the region. The command can be repeated."
        if url := os.environ.get("AWS_ENDPOINT_URL"):
            remedy = (
                f"AWS_ENDPOINT_URL replaces AWS with {url}. Start an emulator there that has CloudFormation and all "
                "services of the stack, or unset the variable."
            )
        raise Unreachable(error.message, remedy=error.remedy or remedy) from error


def message_of(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Message", "")).strip()


def refusal(error: Any) -> BackendError | UsageError | None:
    """Return batchlab's error for an AWS error about permissions or credentials, or None for any other AWS error."""
    code, message = code_of(error), message_of(error)
    operation = error.operation_name
    if code in _OLD_KEYS:
        return UsageError(
            "The AWS credentials have expired.", remedy="Run `aws sso login`, or get new credentials from their source."
        )
    if code in _BAD_KEYS:
        return UsageError(
            f"AWS rejects these credentials ({code}).",
            remedy="Check AWS_PROFILE, AWS_ACCESS_KEY_ID, and AWS_SECRET_ACCESS_KEY.",
        )
    if code in _NO_ACCESS or "not authorized to perform" in message:
        match = _NOT_ALLOWED.search(message)
        action = match["action"] if match else operation
        who = (match["who"] if match else "") or "The caller"
        return BackendError(
            f"{who} may not do {action}.", remedy=f"Allow this action. {DOCS} lists all actions of a deployment."
        )
    return None
