"""What stands before the API: who has no token does not get to send anything.

Invariant: of a request without the token no byte of its body is read, so that nobody who may do
nothing fills the manager's memory, and no page of somebody else's either, which may send a request
anywhere, though not read the answer.
"""

from __future__ import annotations

from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATHS = ("/v1/", "/metrics")


class Door:
    """Shows a request without the token to the application as one with an empty body; that the
    token is missing, it says itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._word = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_PATHS) and not self._knows(scope):
            receive = _nothing_then(receive)
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        return compare_digest(f"{kind.lower()} {token.strip()}".encode(), self._word)


def _nothing_then(receive: Receive) -> Receive:
    first = True

    async def shown() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return shown
