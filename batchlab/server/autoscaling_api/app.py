"""ASGI application that passes HTTP requests to the emulated AWS services.

Invariant: every request gets an answer in AWS's format, even a malformed request. The details of an internal error are
in the log and not in the answer.

Invariant: every request must name a credential, even if signatures are not checked. A web page cannot make a browser
send the Authorization header to another origin. A web page therefore cannot send valid requests to a server on the
user's machine. The signer of botocore computes the signatures.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from batchlab.adapters.local.state_files import Keys
from batchlab.core.ports import Clock

if TYPE_CHECKING:
    from botocore.model import ServiceModel

_COMMON = {
    "AccessDenied": 403,
    "IncompleteSignature": 400,
    "InternalFailure": 500,
    "InvalidClientTokenId": 403,
    "MissingAuthenticationToken": 403,
    "NotImplemented": 501,
    "RequestEntityTooLarge": 413,
    "SignatureDoesNotMatch": 403,
    "Throttling": 400,
}
"""HTTP status of the errors that every AWS service can return and that the service models do not list."""


class Fault(Exception):
    """Error answer of an AWS service. `code` is AWS's error code, and `message` is a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def invalid(message: str) -> Fault:
    """Return the ValidationError fault for a well-formed request that cannot be performed."""
    return Fault("ValidationError", message)


@dataclass(frozen=True, slots=True)
class FaultStatus:
    """HTTP status of a fault, and whether the sender caused the fault."""

    status: int
    is_senders: bool


class Faults:
    """HTTP statuses of the faults of one service, by the code of the fault."""

    def __init__(self, service: ServiceModel) -> None:
        self._statuses = {code: FaultStatus(status, status < 500) for code, status in _COMMON.items()}
        for shape in service.error_shapes:
            error = shape.metadata.get("error", {})
            status = int(error.get("httpStatusCode", 400))
            is_senders = bool(error.get("senderFault", status < 500))
            self._statuses[error.get("code", shape.name)] = FaultStatus(status, is_senders)

    def status(self, fault: Fault) -> FaultStatus:
        return self._statuses.get(fault.code, FaultStatus(400, True))


@contextmanager
def input_errors(where: str) -> Iterator[None]:
    """Convert a ValueError or OverflowError in the block into AWS's fault for malformed input, which names the value at
    `where`.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise Fault("MalformedInput", f"The value at {where!r} cannot be read.") from error


MAX_CLOCK_SKEW_S = 300.0
_STAMP = "%Y%m%dT%H%M%SZ"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256\s+Credential=(?P<key>[^/,\s]+)/(?P<date>\d{8})/(?P<region>[\w-]+)"
    r"/(?P<service>[\w-]+)/aws4_request,\s*SignedHeaders=(?P<headers>[a-z0-9;_-]+),"
    r"\s*Signature=(?P<signature>[0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True)
class Credential:
    """Parsed Authorization header of a request."""

    key: str
    date: str
    region: str
    service: str
    headers: tuple[str, ...]
    signature: str


def credential(request: Request) -> Credential:
    """Return the parsed Authorization header. Raise Fault if the header is missing or malformed."""
    text = request.header("authorization")
    if text is None:
        raise Fault("MissingAuthenticationToken", "Missing Authentication Token")
    match = _AUTHORIZATION.fullmatch(text)
    if match is None:
        raise Fault("IncompleteSignature", "The Authorization header is not one of AWS4-HMAC-SHA256.")
    parts = match.groupdict()
    headers = tuple(parts.pop("headers").split(";"))
    return Credential(**parts, headers=headers)


def check_signature(request: Request, signed: Credential, key: Keys, now_s: float) -> None:
    """Raise Fault unless the whole request was signed with `key` within the last five minutes."""
    if not hmac.compare_digest(signed.key.encode(), key.access_key.encode()):
        raise Fault("InvalidClientTokenId", "The security token included in the request is invalid.")
    stamp = request.header("x-amz-date") or ""
    try:
        signed_s = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Fault("IncompleteSignature", "The request has no valid X-Amz-Date header.") from error
    if not {"host", "x-amz-date"} <= set(signed.headers):
        raise Fault("IncompleteSignature", "The headers host and x-amz-date must be signed.")
    if abs(now_s - signed_s) > MAX_CLOCK_SKEW_S:
        at = datetime.fromtimestamp(now_s, UTC).strftime(_STAMP)
        raise Fault("SignatureDoesNotMatch", f"Signature expired: {stamp} is too far from {at} (5 min.)")
    digest = hashlib.sha256(request.body).hexdigest()
    has_digest = request.header("x-amz-content-sha256") in (None, digest)
    if not has_digest or not hmac.compare_digest(_signature(request, signed, key, stamp), signed.signature):
        raise Fault(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check"
            " your AWS Secret Access Key and signing method. Consult the service documentation for"
            " details.",
        )


class _AsSigned(SigV4Auth):
    """Signer that signs all headers of the request. The base class SigV4Auth does not sign some headers."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        return request.headers


def _signature(request: Request, signed: Credential, key: Keys, stamp: str) -> str:
    auth = _AsSigned(Credentials(signed.key, key.secret_key), signed.service, signed.region)
    url = f"http://{request.header('host')}{request.path}"
    copy = AWSRequest(method=request.method, url=f"{url}?{request.query}" if request.query else url, data=request.body)
    for name, value in request.headers:
        if name in signed.headers:
            copy.headers[name] = value
    copy.context["timestamp"] = stamp
    return str(auth.signature(auth.string_to_sign(copy, auth.canonical_request(copy)), copy))


log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
"""Maximum size of a request body in bytes.

The largest request of Auto Scaling creates a group with tags, hooks, and overrides, and needs a tenth of the limit.
"""

_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """HTTP request. The names of the request's headers are in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for header, value in self.headers if header == name), None)


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/xml"
    headers: tuple[tuple[str, str], ...] = ()


class Service(Protocol):
    """One AWS service. The implementation of a service determines its wire protocol."""

    async def answer(self, request: Request, request_id: str) -> Response:
        """Return the answer to a request. Raise Fault if the service refuses the request."""

    def refuse(self, request: Request, fault: Fault, request_id: str) -> Response:
        """Return the answer that reports a fault to the sender of the request."""


class App:
    """ASGI application. The keys of `services` are the service names in request signatures. The service `default`
    answers requests with an unknown service name. Without `key`, signatures are not checked.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        default: str,
        clock: Clock,
        request_id: Callable[[], str],
        *,
        key: Keys | None = None,
    ) -> None:
        self._services = services
        self._default = services[default]
        self._clock = clock
        self._request_id = request_id
        self._key = key

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the application does not support the ASGI scope {scope['type']}")
        request_id = self._request_id()
        try:
            body = await _body(receive)
        except _Disconnected:
            return
        request = Request(
            scope["method"],
            scope["raw_path"].decode("latin-1"),
            scope["query_string"].decode("latin-1"),
            [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
            body or b"",
        )
        if body is None:
            fault = Fault("RequestEntityTooLarge", f"More than {MAX_BODY_BYTES} bytes.")
            response = self._default.refuse(request, fault, request_id)
        elif request.method in ("GET", "HEAD"):  # the sender is a health check or a browser
            response = Response(404, b"Nothing here.\n", "text/plain")
            if request.path == "/":
                response = Response(200, b"EC2 Auto Scaling, by batchlab.\n", "text/plain")
        else:
            response = await self._respond(request, request_id)
        await _send_all(send, response, request_id)

    async def _respond(self, request: Request, request_id: str) -> Response:
        service = self._default
        try:
            signed = credential(request)
            service = self._services.get(signed.service, service)
            if self._key is not None:
                check_signature(request, signed, self._key, self._clock.now_s())
            return await service.answer(request, request_id)
        except Fault as fault:
            return service.refuse(request, fault, request_id)
        except Exception:
            log.exception("request %s: internal error", request_id)
            failure = Fault("InternalFailure", "Internal error. The log of the endpoint has the details.")
            return service.refuse(request, failure, request_id)


class _Disconnected(Exception):
    """The client disconnected before the whole request was received."""


async def _body(receive: _Receive) -> bytes | None:
    """Return the request body, or None if the body is larger than MAX_BODY_BYTES."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send_all(send: _Send, response: Response, request_id: str) -> None:
    headers = [
        ("content-type", response.content_type),
        ("content-length", str(len(response.body))),
        ("x-amzn-requestid", request_id),
        *response.headers,
    ]
    await send(
        {
            "type": "http.response.start",
            "status": response.status,
            "headers": [(name.encode("latin-1"), text.encode("latin-1")) for name, text in headers],
        }
    )
    await send({"type": "http.response.body", "body": response.body})
