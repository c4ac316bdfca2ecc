"""Who may see the page, and what its browser may do with it.

Invariant: without a session nothing answers but the login page and the static files; a request that
changes something comes from a page of ours; and whatever is answered, errors too, carries HEADERS.
"""

from __future__ import annotations

import re
from http.cookies import CookieError, SimpleCookie
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchlab.server.http.authentication import PAGE, SAFE, is_ours, name_of
from batchlab.server.http.sessions import Session, Sessions

HEADERS = MappingProxyType(
    {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self'",
                "connect-src 'self'",
                "img-src 'self' data:",
                "form-action 'self'",
                "frame-ancestors 'none'",
                "base-uri 'none'",
            )
        ),
        "X-Content-Type-Options": "nosniff",
        # Not no-referrer: by that a browser sends a form with the origin "null", and by http to any
        # address but this machine's own it says in no other way that the form is ours.
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cache-Control": "no-store",
    }
)
SESSION = "batchlab.session"
"""Where a request's session is in its scope."""

_OPEN = ("/login", "/static/")
_BELOW = re.compile(r"/s/(?P<place>[0-9a-f]+)(?=/)", re.ASCII)
"""The beginning of the paths of one session."""


def below(place: str) -> str:
    """Return the path below which the page of one session is."""
    return f"{PAGE}/s/{place}"


class Guard:
    """Stands before every route of the page."""

    def __init__(self, app: ASGIApp, sessions: Sessions, hosts: frozenset[str]) -> None:
        self.app = app
        self._sessions = sessions
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name not in headers or name != "Cache-Control":
                        headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        session = None
        if found := _BELOW.match(path):
            session = self._session(headers, found["place"])
            path = path.removeprefix(found[0])
            scope["root_path"] = f"{scope.get('root_path', '')}{found[0]}"
        scope[SESSION] = session
        refusal = self._refusal(scope["method"], path, headers, session)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(
        self, method: str, path: str, headers: Headers, session: Session | None
    ) -> Response | None:
        # A name that leads here by somebody else's DNS is another origin to the browser: its
        # pages would read ours (DNS rebinding).
        if name_of(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("This page does not answer to that name.\n", 421)
        if method not in SAFE and not is_ours(headers):
            return PlainTextResponse("The request comes from another page.\n", 403)
        if session is None and not (path == _OPEN[0] or path.startswith(_OPEN[1])):
            return _log_in(method, headers)
        return None

    def _session(self, headers: Headers, place: str) -> Session | None:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._sessions.cookie(place))
        except CookieError:
            return None
        return self._sessions.of(found.value, place) if found else None


def _log_in(method: str, headers: Headers) -> Response:
    to = f"{PAGE}/login"
    if "hx-request" in headers:
        return PlainTextResponse("", 401, {"HX-Redirect": to})
    wants_page = method in SAFE and "application/json" not in headers.get("accept", "")
    return RedirectResponse(to, 303) if wants_page else PlainTextResponse("Log in first.\n", 401)
