"""What stands before the API: who has no token does not get to send anything.

Invariant: of a request without the token no byte of its body is read, so that nobody who may do
nothing fills the manager's memory, and no page of somebody else's either, which may send a request
anywhere, though not read the answer. Who has it sends what is read as a whole up to MOST_BYTES.
"""

from __future__ import annotations

from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 64 * 1024**2
"""Of a body; what is larger goes to the bucket, or comes as files, which are not read at once."""
_PATHS = ("/v1/", "/metrics")
_FILES = "/v1/jobs/files"


class Door:
    """Shows a request without the token to the application as one with an empty body; that the
    token is missing, it says itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._word = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_PATHS):
            if not self._knows(scope):
                receive = _nothing_then(receive)
            elif scope["path"] != _FILES:
                receive = _limited(receive)
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        return compare_digest(f"{kind.lower()} {token.strip()}".encode(), self._word)


def _limited(receive: Receive) -> Receive:
    read_bytes = 0

    async def counted() -> Message:
        nonlocal read_bytes
        message = await receive()
        read_bytes += len(message.get("body", b""))
        if read_bytes > MOST_BYTES:
            raise HTTPException(413, f"a body has up to {MOST_BYTES / 2**20:.0f} MiB")
        return message

    return counted


def _nothing_then(receive: Receive) -> Receive:
    first = True

    async def shown() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return shown
