"""Server side of Signature Version 4, computed with botocore's signer.

Invariant: every request must name a credential, even if signatures are not checked. A web page
cannot make a browser send the Authorization header to another origin, so a page cannot send
requests to a server on the user's machine.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from batchlab.adapters.local.access_keys import Keys
from batchlab.server.autoscaling_api.errors import Fault

if TYPE_CHECKING:
    from batchlab.server.autoscaling_api.app import Request

MAX_SKEW_S = 300.0
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
    """Return the parsed Authorization header. Raise Fault if it is missing or malformed."""
    text = request.header("authorization")
    if text is None:
        raise Fault("MissingAuthenticationToken", "Missing Authentication Token")
    found = _AUTHORIZATION.fullmatch(text)
    if found is None:
        raise Fault(
            "IncompleteSignature", "The Authorization header is not one of AWS4-HMAC-SHA256."
        )
    named = found.groupdict()
    headers = tuple(named.pop("headers").split(";"))
    return Credential(**named, headers=headers)


def check(request: Request, asks: Credential, key: Keys, now_s: float) -> None:
    """Raise Fault unless the whole request was signed with `key` within the last five minutes."""
    if not hmac.compare_digest(asks.key.encode(), key.access_key.encode()):
        raise Fault(
            "InvalidClientTokenId", "The security token included in the request is invalid."
        )
    stamp = request.header("x-amz-date") or ""
    try:
        signed_s = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Fault("IncompleteSignature", "The request has no valid X-Amz-Date header.") from error
    if not {"host", "x-amz-date"} <= set(asks.headers):
        raise Fault("IncompleteSignature", "The headers host and x-amz-date must be signed.")
    if abs(now_s - signed_s) > MAX_SKEW_S:
        at = datetime.fromtimestamp(now_s, UTC).strftime(_STAMP)
        raise Fault(
            "SignatureDoesNotMatch", f"Signature expired: {stamp} is too far from {at} (5 min.)"
        )
    digest = hashlib.sha256(request.body).hexdigest()
    whole = request.header("x-amz-content-sha256") in (None, digest)
    signature = _signature(request, asks, key, stamp)
    if not whole or not hmac.compare_digest(signature, asks.signature):
        raise Fault(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check"
            " your AWS Secret Access Key and signing method. Consult the service documentation for"
            " details.",
        )


class _AsSigned(SigV4Auth):
    """Signer that signs all given headers. botocore leaves some out."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        return request.headers


def _signature(request: Request, asks: Credential, key: Keys, stamp: str) -> str:
    auth = _AsSigned(Credentials(asks.key, key.secret_key), asks.service, asks.region)
    url = f"http://{request.header('host')}{request.path}"
    again = AWSRequest(
        method=request.method,
        url=f"{url}?{request.query}" if request.query else url,
        data=request.body,
    )
    for name, value in _signed(request.headers, asks.headers):
        again.headers[name] = value
    again.context["timestamp"] = stamp
    canonical = auth.canonical_request(again)
    return str(auth.signature(auth.string_to_sign(again, canonical), again))


def _signed(headers: Sequence[tuple[str, str]], names: Sequence[str]) -> Sequence[tuple[str, str]]:
    return [(name, value) for name, value in headers if name in names]
