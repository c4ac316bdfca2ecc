"""Client of SQS's JSON protocol for the SQS operations that every message needs.

Invariant: a call of `SqsWire` returns the same results and raises the same errors as a call of boto3, with a third of
the CPU time. A call raises ClientError if SQS refuses the request. A call raises botocore's errors if SQS does not
answer. The client makes each call once and never retries.

Sources: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/Welcome.html and
https://docs.aws.amazon.com/IAM/latest/UserGuide/create-signed-request.html
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError

from batchlab.adapters.aws.endpoint import ANSWER_S, CONNECT_S
from batchlab.core.errors import BackendError
from batchlab.core.http_connections import Connections

if TYPE_CHECKING:
    import boto3
    from botocore.credentials import Credentials

_TYPE = "application/x-amz-json-1.0"
_OK = 200


def connect(session: boto3.Session, url: str, *, loopback: bool) -> SqsWire | None:
    """Return connections to SQS at `url`.

    The connections use the region, credentials, and certificates of the `session`. Return None if the connection needs
    a proxy, because only boto3 supports proxies.
    """
    from botocore.utils import get_environ_proxies

    parts = urlsplit(url)
    if not loopback and parts.scheme in get_environ_proxies(url):
        return None
    tls = _trust(session._session.get_config_variable("ca_bundle")) if parts.scheme == "https" else None
    return SqsWire(url, session.region_name or "", session.get_credentials(), tls)


def _trust(named: str | None) -> ssl.SSLContext:
    """Return botocore's TLS context.

    Since Python 3.13, Python's own TLS context is stricter about certificates than botocore's.
    """
    from botocore.httpsession import create_urllib3_context, get_cert_path

    named = named or os.environ.get("REQUESTS_CA_BUNDLE")
    context: ssl.SSLContext = create_urllib3_context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    try:
        context.load_verify_locations(named or get_cert_path(True))
    except OSError as error:
        raise BackendError(
            f"The certificates in {named} cannot be read: {error}.",
            remedy="Check AWS_CA_BUNDLE, or `ca_bundle` in AWS's configuration.",
        ) from error
    return context


class SqsWire:
    """Connections to the endpoint of SQS. Several threads may share the connections."""

    def __init__(self, url: str, region: str, credentials: Credentials | None, tls: ssl.SSLContext | None) -> None:
        """Set the url of SQS and the credentials. The credentials may change during use."""
        self._url = url
        self._host = urlsplit(url).netloc
        self._path = urlsplit(url).path or "/"
        self._region = region
        self._credentials = credentials
        self._tls = tls
        self._connections = Connections(self._host, tls, connect_s=CONNECT_S)

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def call(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to an SQS operation in boto3's form."""
        keys = self._credentials.get_frozen_credentials() if self._credentials else None
        if keys is None or keys.access_key is None or keys.secret_key is None:
            raise NoCredentialsError
        body = json.dumps(request).encode()
        headers = {
            "Content-Type": _TYPE,
            "Host": self._host,
            "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
            "X-Amz-Target": f"AmazonSQS.{operation}",
            # With the header X-Amzn-Query-Mode, errors carry the codes of the older query protocol, which callers also
            # recognize.
            "X-Amzn-Query-Mode": "true",
        }
        if keys.token:
            headers["X-Amz-Security-Token"] = keys.token
        headers["Authorization"] = authorization(
            headers, self._path, body, self._region, keys.access_key, keys.secret_key
        )
        status, code, content = self._answer(body, headers)
        try:
            answer = json.loads(content) if content else {}
        except ValueError:
            answer = None
        if status != _OK:
            raise _client_error(operation, status, code, answer if isinstance(answer, dict) else {})
        if not isinstance(answer, dict):
            raise ResponseParserError("The answer is not a JSON object, as SQS would return.")
        return {name: value for name, value in answer.items() if value is not None}

    def _answer(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        """Return the HTTP status, the error code, and the body of SQS's answer."""
        connection: HTTPConnection | None = None
        is_reusable = False
        try:
            connection = self._connect()
            with suppress(BrokenPipeError):  # SQS refused the request early, and the answer of SQS has the reason.
                connection.request("POST", self._path, body, dict(headers))
            response = connection.getresponse()
            answer = response.status, response.headers.get("x-amzn-query-error", ""), response.read()
            is_reusable = not response.will_close
        except BotoCoreError:
            raise
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=self._url, error=error) from error
        except Exception as error:
            # The request is invalid, for example because of a header that cannot be encoded or an invalid host name.
            raise HTTPClientError(error=error) from error
        finally:
            if is_reusable and connection:
                self._connections.give_back(connection)
            elif connection:
                connection.close()
        return answer

    def _connect(self) -> HTTPConnection:
        try:
            connection = self._connections.take()
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=self._url, error=error) from error
        connection.sock.settimeout(ANSWER_S)
        return connection


def authorization(headers: Mapping[str, str], path: str, body: bytes, region: str, access_key: str, secret: str) -> str:
    """Return the Authorization header of a POST request (Signature Version 4).

    The signature covers all headers in `headers`.
    """
    at = headers["X-Amz-Date"]
    fields = sorted((name.lower(), value.strip()) for name, value in headers.items())
    names = ";".join(name for name, _ in fields)
    lines = "".join(f"{name}:{value}\n" for name, value in fields)
    canonical = f"POST\n{path}\n\n{lines}\n{names}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{at[:8]}/{region}/sqs/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{at}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signature = hmac.digest(_key(secret, at[:8], region), text.encode(), "sha256").hex()
    return f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"


@lru_cache(maxsize=8)
def _key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "sqs", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _client_error(operation: str, status: int, query_code: str, answer: Mapping[str, Any]) -> ClientError:
    kind = str(answer.get("__type", "")).partition(":")[0].rpartition("#")[2]
    code = query_code.partition(";")[0] or kind or str(status)
    message = str(answer.get("message") or answer.get("Message") or "")
    # The response of the ClientError contains only the fields that callers read.
    response: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, operation)
