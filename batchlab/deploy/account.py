"""One AWS account in one region, with the credentials that boto3 finds: `Account.open(region)`.

Invariant: every refusal by AWS becomes one sentence that names the caller and the permission.
botocore's standard mode retries throttled calls and lost connections, with jitter, up to ten
attempts in total. `notes` receives a line for each attempt without an answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from batchlab.adapters.aws.endpoint import ANSWER_S, CONNECT_S, code_of, session, translated
from batchlab.core import installation
from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError

ATTEMPTS = 10
DOCS = "docs/deploy.md"
"""Documentation of the permissions that a deployer needs."""

_REGION = re.compile(r"[a-z]{2}(-[a-z]+){1,2}-\d")
_NOT_ALLOWED = re.compile(r"(?:User: (?P<who>\S+) is )?not authorized to perform: (?P<action>[\w-]+:\w+)")
_NO_ACCESS = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthFailure"}
_BAD_KEYS = {"InvalidClientTokenId", "UnrecognizedClient", "SignatureDoesNotMatch"}
_OLD_KEYS = {"ExpiredToken", "RequestExpired", "TokenRefreshRequired"}


class Notes(Protocol):
    """Receiver of the progress of one call that may take long. It decides which lines to show."""

    def say(self, text: str) -> None: ...


@dataclass
class Account:
    """Clients of the services in one region, created on first use. A context manager."""

    region: str
    id: str = ""
    who: str = ""
    """The ARN of the caller."""
    notes: Callable[[], Notes] | None = field(default=None, repr=False)
    """Creates the receiver of retry messages. It is called once for each call to AWS."""
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, region: str | None = None, *, notes: Callable[[], Notes] | None = None) -> Account:
        """Return the account of the environment's credentials, read from STS. Raises UsageError
        without a region or credentials."""
        account = cls(chosen_region(region), notes=notes)
        with asked("AWS"):
            told = account.client("sts").get_caller_identity()
        account.id, account.who = told["Account"], told["Arn"]
        return account

    def client(self, service: str) -> Any:
        """Return boto3's client."""
        if service not in self._clients:
            made = self._clients[service] = _client(service, self.region)
            if self.notes:
                _tell_of_tries(made, self.notes)
        return self._clients[service]

    @property
    def is_real(self) -> bool:
        """Return whether this is AWS, not an emulator named in AWS_ENDPOINT_URL."""
        host = urlsplit(self.client("cloudformation").meta.endpoint_url).hostname or ""
        return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))

    @property
    def arn(self) -> str:
        """Return the first part of the account's ARNs, without the service: "arn:aws:{}:eu-west-1:123…:"."""
        partition = self.who.split(":")[1] if self.who.startswith("arn:") else "aws"
        return f"arn:{partition}:{{}}:{self.region}:{self.id}:"

    def pages(self, service: str, operation: str, key: str, **asking: Any) -> Iterator[Any]:
        """Yield the items under `key` of all pages of a listing. Raises BackendError."""
        with asked(operation):
            for page in self.client(service).get_paginator(operation).paginate(**asking):
                yield from page.get(key) or ()

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chosen_region(named: str | None) -> str:
    """Return the given region, or the one that boto3 finds. Raises UsageError without a region."""
    installation.need("aws", "What asks AWS", "boto3")
    import boto3
    from botocore.exceptions import ProfileNotFound

    if named and not _REGION.fullmatch(named):
        raise UsageError(f"{named!r} is not a region.", remedy="Write for example eu-west-1.")
    try:
        # boto3 does not read AWS_REGION, which all other AWS tools do.
        region = named or os.environ.get("AWS_REGION") or boto3.Session().region_name
    except ProfileNotFound as error:
        raise UsageError(f"{error}.", remedy="Set AWS_PROFILE to one of ~/.aws/config.") from error
    if not region:
        raise UsageError("No region is set.", remedy="Say --region eu-west-1, set AWS_REGION, or run `aws configure`.")
    return region


def _client(service: str, region: str) -> Any:
    from botocore.config import Config

    here = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname in ("127.0.0.1", "localhost")
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        # A proxy cannot reach this machine's own address.
        proxies={} if here else None,
    )
    with asked("AWS"):
        # boto3's stubs have a separate type for each service.
        make: Any = session(region).client
        return make(service, config=config)


def _tell_of_tries(client: Any, notes: Callable[[], Notes]) -> None:
    """Report each attempt of the client's calls that got no answer."""
    now: list[Notes] = []

    def begin(**_: Any) -> None:
        now[:] = [notes()]

    def tried(attempts: int, endpoint: Any, caught_exception: Exception | None = None, **_: Any) -> None:
        # An error response is also an answer. The last attempt raises an error itself.
        if caught_exception is not None and attempts < ATTEMPTS:
            for one in now:
                one.say(f"{endpoint.host} does not answer; tried {attempts} of {ATTEMPTS} times.")

    client.meta.events.register("before-call", begin)
    client.meta.events.register("needs-retry", tried)


class Missing(NotFound):
    """The object of a call does not exist, or not yet."""


def _never(_code: str, _message: str) -> bool:
    return False


@contextmanager
def asked(what: str, is_missing: Callable[[str, str], bool] = _never) -> Iterator[None]:
    """Convert botocore's errors to batchlab's. `what` is the subject of their messages. Raises
    Missing if `is_missing` is true for an error's code and message."""
    from botocore.exceptions import (
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
        SSOError,
        TokenRetrievalError,
    )

    with _placed(), translated(what):
        try:
            yield
        except ClientError as error:
            if is_missing(code_of(error), message_of(error)):
                raise Missing(f"{what}: {message_of(error).rstrip('.')}.") from error
            if refused := refusal(error):
                raise refused from error
            raise
        except PartialCredentialsError as error:
            raise UsageError(
                f"A part of the AWS credentials is missing: {error.kwargs['cred_var']}.",
                remedy="Set that too, or leave the other part out.",
            ) from error
        except NoCredentialsError as error:
            raise UsageError(
                "There are no credentials for AWS.",
                remedy="Run `aws configure` or `aws sso login`, set AWS_PROFILE, or set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            ) from error
        except ProfileNotFound as error:
            raise UsageError(f"{error}.", remedy="Set AWS_PROFILE to one of ~/.aws/config.") from error
        except (SSOError, TokenRetrievalError) as error:
            raise UsageError("The sign-in to AWS has run out.", remedy="Run `aws sso login`.") from error


@contextmanager
def _placed() -> Iterator[None]:
    """Return the error for an endpoint that does not answer, with the remedy."""
    try:
        yield
    except Unreachable as error:
        if url := os.environ.get("AWS_ENDPOINT_URL"):
            remedy = (
                f"AWS_ENDPOINT_URL puts {url} in AWS's place: start what should answer there, with "
                "CloudFormation and all that a stack needs, or unset it."
            )
        else:
            remedy = "Check the network, its proxy, and the region; it can be said again."
        raise Unreachable(error.message, remedy=error.remedy or remedy) from error


def message_of(error: Any) -> str:
    """Return the message of AWS."""
    return str(error.response.get("Error", {}).get("Message", "")).strip()


def refusal(error: Any) -> BackendError | UsageError | None:
    """Return the error as one of permissions or credentials, or None if it is neither."""
    code, message = code_of(error), message_of(error)
    operation = error.operation_name
    if code in _OLD_KEYS:
        return UsageError(
            "The credentials for AWS have run out.", remedy="Run `aws sso login`, or get new ones where you got these."
        )
    if code in _BAD_KEYS:
        return UsageError(
            f"AWS does not know these credentials ({code}).",
            remedy="Check AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    if code in _NO_ACCESS or "not authorized to perform" in message:
        match = _NOT_ALLOWED.search(message)
        action = match["action"] if match else operation
        who = (match["who"] if match else "") or "The caller"
        return BackendError(
            f"{who} may not do {action}.", remedy=f"Allow it that action: {DOCS} lists all that deploying needs."
        )
    return None
