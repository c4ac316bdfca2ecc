"""boto3 clients and credentials for an `Endpoint`, and the translation of botocore's errors.

Invariant: an endpoint with a url ignores the user's AWS configuration and receives none of the user's credentials. An
endpoint without a url uses the configuration that boto3 finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast, overload
from urllib.parse import urlsplit

from batchlab.core.errors import (
    AlreadyExists,
    BackendError,
    BatchlabError,
    Denied,
    NotFound,
    Refused,
    Throttled,
    TooLarge,
    Unreachable,
)

if TYPE_CHECKING:
    import boto3
    from botocore.exceptions import ClientError
    from botocore.loaders import Loader
    from mypy_boto3_autoscaling import AutoScalingClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.literals import BucketLocationConstraintType
    from mypy_boto3_s3.type_defs import CreateBucketConfigurationTypeDef
    from mypy_boto3_sqs import SQSClient
    from obstore.store import S3Credential, S3CredentialProvider

CONNECT_S = 5.0
ANSWER_S = 30.0
"""Timeout of a call to AWS in seconds. A healthy AWS service answers every call of batchlab's clients within 30 s."""

_THROTTLED = {
    "KmsThrottled",
    "OverLimit",
    "QueueDeletedRecently",
    "ConditionalRequestConflict",
    "RequestLimitExceeded",
    "RequestThrottled",
    "ResourceContention",
    "ScalingActivityInProgress",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
}
_MISSING = {"NonExistentQueue", "QueueDoesNotExist", "NoSuchBucket"}
_TOO_LARGE = {"BatchRequestTooLong", "TooManyEntriesInBatchRequest"}
_DENIED = {
    "AccessDenied",
    "AuthorizationError",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClient",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """AWS in `region`, or with `url` a service that replaces AWS: an emulator or another S3.

    The access key and the secret key are used only with a url. On AWS, boto3's credential chain finds the credentials.
    """

    url: str | None = None
    region: str = "us-east-1"
    access_key: str = "test"
    secret_key: str = field(default="test", repr=False)

    @property
    def loopback(self) -> str:
        """Return the host of `url` if the host is this machine, else "". A proxy cannot reach this machine."""
        return loopback(self.url or "")


def loopback(url: str) -> str:
    """Return the host of `url` if the host is this machine, else ""."""
    host = urlsplit(url).hostname or ""
    return host if host in ("127.0.0.1", "::1", "localhost") else ""


def s3_url(endpoint: Endpoint) -> str:
    """Return the url that boto3 uses for S3.

    The url comes from the endpoint, from AWS_ENDPOINT_URL_S3, from a profile, or from AWS's default.
    """
    if endpoint.url:
        return endpoint.url
    with closing(client(endpoint, "s3", connections=1)) as s3:
        return s3.meta.endpoint_url


def credentials(endpoint: Endpoint) -> S3CredentialProvider:
    """Return the credentials of `client` in obstore's form."""
    if endpoint.url is None:
        from obstore.auth.boto3 import Boto3CredentialProvider

        with translate_errors("AWS"):
            return Boto3CredentialProvider()
    keys: S3Credential = {
        "access_key_id": endpoint.access_key,
        "secret_access_key": endpoint.secret_key,
        "token": None,
        "expires_at": None,
    }
    return lambda: keys


@overload
def client(
    endpoint: Endpoint, service: Literal["sqs"], *, connections: int, of: boto3.Session | None = None
) -> SQSClient: ...
@overload
def client(endpoint: Endpoint, service: Literal["s3"], *, connections: int) -> S3Client: ...
@overload
def client(endpoint: Endpoint, service: Literal["autoscaling"], *, connections: int) -> AutoScalingClient: ...
@overload
def client(
    endpoint: Endpoint, service: Literal["ec2", "rds", "sdb", "secretsmanager", "sns", "ssm"], *, connections: int
) -> Any: ...
def client(
    endpoint: Endpoint,
    service: Literal["sqs", "s3", "autoscaling", "ec2", "rds", "sdb", "secretsmanager", "sns", "ssm"],
    *,
    connections: int,
    of: boto3.Session | None = None,
) -> Any:
    """Return a boto3 client that sends each request once, because the callers of the client retry.

    The client belongs to the boto3 session `of`. Without `of`, the client belongs to a new session.
    """
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # boto3's check of parameter types takes 25% of a call's CPU time, and mypy has already checked the types.
        parameter_validation=False,
        s3={"addressing_style": "path"} if endpoint.url else {},
        # With None, botocore uses the proxies of the environment variables.
        proxies={} if endpoint.loopback else None,
    )
    with translate_errors("AWS"):
        return (of or session_of(endpoint)).client(service, endpoint_url=endpoint.url, config=config)


def session_of(endpoint: Endpoint) -> boto3.Session:
    """Return a boto3 session for clients of the endpoint."""
    with translate_errors("AWS"):
        if endpoint.url is None:
            return session(endpoint.region)
        return session(endpoint.region, keys=(endpoint.access_key, endpoint.secret_key))


def session(region: str | None, *, keys: tuple[str, str] | None = None) -> boto3.Session:
    """Return a boto3 session. With `keys` (access key, secret key), the session ignores the user's profiles.

    All sessions of a process share one loader of botocore's service models. If each session had its own loader, the
    first client of each session would search 400 folders. Searching 400 folders takes 0.5 s for some services.
    """
    import boto3
    import botocore.session

    # A session with keys ignores the AWS profile that an environment variable names, because the profile may be
    # missing.
    core = botocore.session.Session({"profile": (None, None, None, None)} if keys else None)
    models = _models(core.get_config_variable("data_path"))
    core.register_component("data_loader", models)
    key, secret = keys or (None, None)
    new = boto3.Session(key, secret, region_name=region, botocore_session=core)
    # Each new boto3 session adds boto3's data folder to the search paths of the shared loader, so duplicate paths are
    # removed.
    models.search_paths[:] = dict.fromkeys(models.search_paths)
    return new


@cache
def _models(data_path: str | None) -> Loader:
    from botocore.loaders import create_loader

    return create_loader(data_path)


def code_of(error: ClientError) -> str:
    """Return the code of a botocore error in the form of `short_code`."""
    return short_code(str(error.response.get("Error", {}).get("Code", "")))


def short_code(code: str) -> str:
    """Return an error code without its service name and "Exception", such as "NonExistentQueue"."""
    return code.rpartition(".")[2].removesuffix("Exception")


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise batchlab's errors instead of botocore's errors. The messages of batchlab's errors begin with `what`."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        raise _refusal(what, error) from error
    except (HTTPClientError, NoConnection) as error:
        raise Unreachable(f"{what}: {error}") from error
    except ResponseParserError as error:
        # The answer may be from another program, such as a proxy, or from a service that is still starting.
        raise Unreachable(f"{what}: the answer does not have the form of AWS's answers.") from error
    except BotoCoreError as error:
        raise BackendError(f"{what}: {error}", remedy="Check AWS's configuration.") from error


def _refusal(what: str, error: ClientError) -> BatchlabError:
    code = code_of(error)
    message = str(error.response.get("Error", {}).get("Message", "")).strip() or code
    text = f"{what}: {message.rstrip('.')} ({code})."
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MISSING:
        return NotFound(text)
    if code in _TOO_LARGE:
        return TooLarge(text)
    if code in ("AlreadyExists", "PreconditionFailed"):
        return AlreadyExists(text)
    if code == "ValidationError":
        return Refused(text)
    if code in _THROTTLED or status in (429, 503):
        return Throttled(text)
    if code in _DENIED:
        return Denied(text, remedy="Check the credentials and their permissions.")
    return Unreachable(text) if status >= 500 else BackendError(text)


def check(endpoint: Endpoint) -> None:
    """Send one request to S3 and one request to SQS at the endpoint's url.

    Raise Unreachable if S3 or SQS at the url does not answer as AWS does.
    """
    s3, sqs = client(endpoint, "s3", connections=1), client(endpoint, "sqs", connections=1)
    try:
        _answers(endpoint, "S3", lambda: s3.list_buckets()["Buckets"])
        _answers(endpoint, "SQS", lambda: sqs.list_queues(QueueNamePrefix="batchlab-"))
    finally:
        s3.close()
        sqs.close()


def _answers(endpoint: Endpoint, service: str, ask: Callable[[], object]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ReadTimeoutError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.parsers import ResponseParserError

    try:
        ask()
        return
    except ReadTimeoutError as error:
        cause: Exception = error
        text = f"{endpoint.url} accepts connections, but does not answer requests."
    except (HTTPClientError, NoConnection) as error:
        cause, text = error, f"No service answers at {endpoint.url}."
    except (ClientError, ResponseParserError, BotoCoreError, KeyError) as error:
        code = code_of(error) if isinstance(error, ClientError) else ""
        # If botocore cannot parse an answer, botocore uses the HTTP status as the error code.
        shown = f" (its error code is {code})" if code and not code.isdigit() else ""
        cause, text = error, f"{endpoint.url} does not answer like {service}{shown}."
    raise Unreachable(text, remedy="Start an emulator of S3 and SQS at this URL, or name another URL.") from cause


def create_bucket(endpoint: Endpoint, bucket: str) -> None:
    """Create the S3 bucket. Do nothing if this account already owns the bucket."""
    from botocore.exceptions import ClientError

    s3 = client(endpoint, "s3", connections=1)
    try:
        with translate_errors(f"Bucket {bucket!r}"):
            try:
                if endpoint.region == "us-east-1":
                    s3.create_bucket(Bucket=bucket)
                else:
                    region = cast("BucketLocationConstraintType", endpoint.region)
                    place: CreateBucketConfigurationTypeDef = {"LocationConstraint": region}
                    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
            except ClientError as error:
                if code_of(error) != "BucketAlreadyOwnedByYou":
                    raise
    finally:
        s3.close()
