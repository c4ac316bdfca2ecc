"""Server program of MiniStack, which runs in MiniStack's own Python environment.

The guard exits when its owner has ended, and instead of acknowledging an object that could not be written.

The guard passes a request to MiniStack only if the request is signed with the grid's own keys (Signature Version 4).
MiniStack itself accepts requests of any user of the machine and of any web page.

Invariant: this file does not import batchlab, because its Python has only MiniStack, uvicorn, and httptools. The
guard's owner holds a lock on a file, and the kernel releases the lock however the owner dies. The kernel's
PR_SET_PDEATHSIG is not used, because the next owner of the folder takes over the running emulator.

    python -I ministack_guard.py LISTENING_FD LOCK_FILE ORPHAN_S KEYS_FILE
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes

import uvicorn

POLL_S = 0.5
MAX_SKEW_S = 900.0
"""Maximum difference in seconds between a request's time and the clock, as on AWS."""
MAX_UNHASHED_BYTES = 4 * 1024 * 1024
"""Maximum size in bytes of a request body whose hash is not in the headers of the request.

Only SQS, SNS, and STS receive bodies without a hash. The largest request of SQS, SNS, and STS has 1 MiB.
"""

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]

_HEALTH = "/_ministack/health"
_HOST = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?")
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 +Credential=([^,\s]+),\s*SignedHeaders=([^,\s]+),\s*Signature=([^,\s]+)")
_CREDENTIAL = re.compile(r"([^/]+)/([0-9]{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request")
_SHA256 = re.compile("[0-9a-f]{64}")
_PLAIN = re.compile(rb"[A-Za-z0-9/_.~-]*")
_EXPIRES = re.compile("[0-9]{1,6}")


def main(listening: str, lock: str, orphan_s: float, keys: str) -> None:
    """Serve requests until SIGTERM."""
    threading.Thread(target=_end_when_orphaned, args=(lock, orphan_s), daemon=True).start()
    logging.getLogger("s3").addHandler(_ExitOnWriteError(logging.WARNING))
    # The owner also holds the listening socket, so clients of a killed emulator wait for the next emulator.
    listener = socket.socket(fileno=int(listening))
    pair = json.loads(Path(keys).read_text())
    # MiniStack itself verifies the signature of a presigned URL with the grid's keys.
    os.environ["AWS_ACCESS_KEY_ID"] = pair["access_key"]
    os.environ["AWS_SECRET_ACCESS_KEY"] = pair["secret_key"]
    # uvicorn serves MiniStack, because MiniStack's own server, Hypercorn, takes over half of a call's CPU time.
    config = uvicorn.Config(
        Signed(importlib.import_module("ministack.app").app, **pair),
        loop="asyncio",
        http="httptools",
        ws="none",
        lifespan="on",  # MiniStack saves its queues at the end of the lifespan.
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # MiniStack sets its own Date header.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,  # With a longer timeout, open long polls would delay the exit.
    )
    uvicorn.Server(config).run(sockets=[listener])


class Refusal(Exception):
    """An answer with the status 403. `code` is AWS's name of the error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Signature:
    """Parts of a request's signature. The signature is valid for `expires_s` seconds after `stamp`."""

    key: str
    date: str
    region: str
    service: str
    headers: str
    value: str
    stamp: str
    expires_s: float
    is_in_query: bool


class Signed:
    """ASGI application that passes on only requests signed with the grid's pair of keys.

    A web page cannot sign a request. A request with the header Origin or with another machine's Host comes from a web
    page. The guard refuses such a request even if the request is signed. No answer of the guard has a CORS header.
    """

    def __init__(self, app: App, access_key: str, secret_key: str) -> None:
        self._app = app
        self._access_key = access_key
        self._signing_key = lru_cache(maxsize=64)(
            lambda date, region, service: _derive_key(secret_key, date, region, service)
        )

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _joined_headers(scope["headers"])
        try:
            if b"origin" in headers:
                raise Refusal("AccessDenied", "The emulator of a grid refuses requests of web pages.")
            if not _HOST.fullmatch(headers.get(b"host", b"")):
                raise Refusal("AccessDenied", "The Host header does not name this machine's loopback.")
            if scope["method"] != "GET" or scope["path"] != _HEALTH:
                receive = await self._check_body(scope, headers, receive)
        except Refusal as refusal:
            await _refuse(send, headers, refusal)
            return

        async def send_without_cors(event: Event) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    (name, value) for name, value in event["headers"] if not name.lower().startswith(b"access-control-")
                ]
            await send(event)

        await self._app(scope, receive, send_without_cors)

    async def _check_body(self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        """Return an ASGI `receive` function for the request's body. Raise Refusal unless the request is signed."""
        asked_query = scope["query_string"].decode("latin-1")
        query = parse_qsl(asked_query, keep_blank_values=True) if asked_query else []
        signature = _signature(headers, dict(query))
        if not hmac.compare_digest(signature.key.encode(), self._access_key.encode()):
            raise Refusal("InvalidAccessKeyId", "The access key is not a key of this grid.")
        _check_time(signature)
        payload = "UNSIGNED-PAYLOAD" if signature.is_in_query and signature.service == "s3" else ""
        payload = payload or headers.get(b"x-amz-content-sha256", b"").decode("latin-1")
        if payload:
            self._check(scope, headers, query, signature, payload)
        if payload and not _SHA256.fullmatch(payload):
            return receive  # Without a hash, the signature covers only the headers of the request.
        body, digest = await _body(receive, limit=None if payload else MAX_UNHASHED_BYTES)
        if not payload:
            self._check(scope, headers, query, signature, digest)
        elif payload != digest:
            raise Refusal("XAmzContentSHA256Mismatch", "The body does not match its hash.")
        whole: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Event:
            return whole.pop() if whole else await receive()

        return receive_again

    def _check(
        self,
        scope: Event,
        headers: Mapping[bytes, bytes],
        query: list[tuple[str, str]],
        signature: _Signature,
        payload: str,
    ) -> None:
        names = signature.headers.split(";")
        pairs = sorted(
            (quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in query if name != "X-Amz-Signature"
        )
        canonical = "\n".join(
            (
                scope["method"],
                _path(scope["raw_path"], signature.service),
                "&".join(f"{name}={value}" for name, value in pairs),
                *(f"{name}:{headers.get(name.encode(), b'').decode('utf-8', 'surrogateescape')}" for name in names),
                "",
                signature.headers,
                payload,
            )
        )
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogateescape")).hexdigest()
        realm = f"{signature.date}/{signature.region}/{signature.service}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{signature.stamp}\n{realm}\n{digest}"
        key = self._signing_key(signature.date, signature.region, signature.service)
        computed = hmac.digest(key, text.encode(), "sha256").hex()
        if "host" not in names or not hmac.compare_digest(computed, signature.value):
            raise Refusal("SignatureDoesNotMatch", "The signature was not made with the grid's keys.")


def _joined_headers(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the headers by name, with each value in the form that a signature uses."""
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        value = b" ".join(value.split()) if b"  " in value else value.strip()
        joined[name] = joined[name] + b"," + value if name in joined else value
    return joined


def _signature(headers: Mapping[bytes, bytes], query: Mapping[str, str]) -> _Signature:
    """Return the signature of a request, from its headers or its query string."""
    is_in_query = b"authorization" not in headers
    if is_in_query:
        names = ("X-Amz-Credential", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Date")
        credential, signed, value, stamp = (query.get(name, "") for name in names)
        expires = query.get("X-Amz-Expires", "")
        has_all = query.get("X-Amz-Algorithm") == "AWS4-HMAC-SHA256" and _EXPIRES.fullmatch(expires)
    else:
        has_all = _AUTHORIZATION.fullmatch(headers[b"authorization"].decode("latin-1"))
        credential, signed, value = has_all.groups() if has_all else ("", "", "")
        stamp, expires = headers.get(b"x-amz-date", b"").decode("latin-1"), str(int(MAX_SKEW_S))
    match = _CREDENTIAL.fullmatch(credential)
    if not has_all or not match or not value.isascii():
        raise Refusal(
            "AccessDenied", "The request is not signed with Signature Version 4. `batchlab grid env` prints the keys."
        )
    key, date, region, service = match.groups()
    return _Signature(key, date, region, service, signed, value, stamp, float(expires), is_in_query)


def _check_time(signature: _Signature) -> None:
    age_s = time.time() - _epoch_s(signature.stamp)
    if not -MAX_SKEW_S <= age_s <= signature.expires_s or signature.stamp[:8] != signature.date:
        raise Refusal("RequestTimeTooSkewed", "The request's signature has expired.")


@lru_cache(maxsize=64)  # Parsed times are cached, because a busy grid sends many requests each second.
def _epoch_s(stamp: str) -> float:
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Refusal("AccessDenied", "The request has no valid X-Amz-Date.") from error


def _path(raw: bytes, service: str) -> str:
    """Return the path in the form that the signature covers.

    S3's clients encode the path once, and clients of other services encode the path twice.
    """
    if _PLAIN.fullmatch(raw):
        return raw.decode()
    return quote(unquote_to_bytes(raw) if service == "s3" else raw, safe="/-_.~")


def _derive_key(secret: str, date: str, region: str, service: str) -> bytes:
    key = b"AWS4" + secret.encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


async def _body(receive: Receive, limit: int | None) -> tuple[bytes, str]:
    """Return the request's body and its hash."""
    parts, size, digest = [], 0, hashlib.sha256()
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise Refusal("RequestTimeout", "The request is incomplete.")
        part = event.get("body", b"")
        size += len(part)
        if limit is not None and size > limit:
            raise Refusal("EntityTooLarge", f"The body has more than {limit} bytes and no hash.")
        digest.update(part)
        parts.append(part)
        if not event.get("more_body", False):
            return b"".join(parts), digest.hexdigest()


async def _refuse(send: Send, headers: Mapping[bytes, bytes], refusal: Refusal) -> None:
    kind = headers.get(b"content-type", b"")
    if b"json" in kind:
        body = json.dumps({"__type": refusal.code, "message": str(refusal)})
        kind = b"application/x-amz-json-1.0"
    else:
        body = f"<Error><Code>{refusal.code}</Code><Message>{refusal}</Message></Error>"
        # SNS and STS put their errors into the element ErrorResponse.
        body = f"<ErrorResponse>{body}</ErrorResponse>" if b"form" in kind else body
        kind = b"application/xml"
    fields = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": fields})
    await send({"type": "http.response.body", "body": body.encode()})


class _ExitOnWriteError(logging.Handler):
    """Log handler that ends the process when MiniStack's S3 fails to write to disk.

    After a write error, MiniStack logs a warning and reports success, so the object would be lost or read as empty.
    After its exit, the process sends no answer, and the client retries at the next emulator.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Failed to "):
            os.write(2, f"the emulator exits without an answer: {record.getMessage()}\n".encode())
            os._exit(os.EX_IOERR)


def _end_when_orphaned(lock: str, orphan_s: float) -> None:
    alone_s = 0.0
    while alone_s < orphan_s:
        time.sleep(POLL_S)
        alone_s = 0.0 if _is_held(lock) else alone_s + POLL_S
    os.kill(os.getpid(), signal.SIGTERM)


def _is_held(lock: str) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False  # The folder of the emulator was removed, so no data is left to serve.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
