"""ASGI application that passes HTTP requests to the emulated AWS services.

Invariant: every request gets an answer in AWS's format, even a malformed one. The answer to an
internal error contains no details. The log contains them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batchlab.adapters.local.access_keys import Keys
from batchlab.core.ports import Clock
from batchlab.server.autoscaling_api import signature
from batchlab.server.autoscaling_api.errors import Fault

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
"""Limit of a request body. The largest request of Auto Scaling, a group with its tags, hooks, and
overrides, has a tenth of this size."""

_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """HTTP request. The names of the headers are in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known == name), None)


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/xml"
    headers: tuple[tuple[str, str], ...] = ()


class Service(Protocol):
    """One AWS service. The implementation determines its wire protocol."""

    async def answer(self, request: Request, request_id: str) -> Response:
        """Return the answer to a request. Raise Fault if the service refuses it."""

    def refuse(self, request: Request, fault: Fault, request_id: str) -> Response:
        """Return the answer that reports a fault."""


class App:
    """ASGI application. The keys of `services` are the service names in request signatures. The
    service `default` answers requests for an unknown name. Without `key`, signatures are not
    checked."""

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

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send
    ) -> None:
        if scope["type"] != "http":
            raise ValueError(f"asked for {scope['type']}, and speaks http only")
        request_id = self._request_id()
        try:
            body = await _body(receive)
        except _GoneAway:
            return
        request = _request(scope, body or b"")
        if body is None:
            fault = Fault("RequestEntityTooLarge", f"More than {MAX_BODY_BYTES} bytes.")
            response = self._default.refuse(request, fault, request_id)
        elif request.method in ("GET", "HEAD"):
            response = _greeting(request.path)
        else:
            response = await self._respond(request, request_id)
        await _send_all(send, response, request_id)

    async def _respond(self, request: Request, request_id: str) -> Response:
        service = self._default
        try:
            asks = signature.credential(request)
            service = self._services.get(asks.service, service)
            if self._key is not None:
                signature.check(request, asks, self._key, self._clock.now_s())
            return await service.answer(request, request_id)
        except Fault as fault:
            return service.refuse(request, fault, request_id)
        except Exception:
            log.exception("request %s: something unexpected happened", request_id)
            ours = Fault("InternalFailure", "Something unexpected happened; the log says what.")
            return service.refuse(request, ours, request_id)


class _GoneAway(Exception):
    """The client disconnected before it had sent the whole request."""


async def _body(receive: _Receive) -> bytes | None:
    """Return the request body, or None if it is larger than MAX_BODY_BYTES."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneAway
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _request(scope: Mapping[str, Any], body: bytes) -> Request:
    return Request(
        scope["method"],
        scope["raw_path"].decode("latin-1"),
        scope["query_string"].decode("latin-1"),
        [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
        body,
    )


def _greeting(path: str) -> Response:
    """Answer a GET or HEAD request, as health checks and browsers send it."""
    if path != "/":
        return Response(404, b"Nothing here.\n", "text/plain")
    return Response(200, b"EC2 Auto Scaling, by batchlab.\n", "text/plain")


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
