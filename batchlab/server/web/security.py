"""Access checks and security headers of the web page.

Invariant: without a session, only the login page and the static files are available. A request that changes data must
come from a page of this manager. Each request of a session has the present role of the session's user. Every answer,
including errors, carries HEADERS.
"""

from __future__ import annotations

import re
from http.cookies import CookieError, SimpleCookie
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchlab.core.errors import BackendError
from batchlab.manager.user_directory import UserDirectory
from batchlab.server.http.authentication import PAGE, SAFE_METHODS, Session, Sessions, host_name, is_same_origin
from batchlab.server.http.permissions import CALLER

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
        # The policy is not no-referrer, because a browser with no-referrer sends forms with the origin "null". Over
        # plain HTTP to another machine, a browser sends the origin of a form only in the header Origin.
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cache-Control": "no-store",
    }
)
POLICY = "Content-Security-Policy"


def report_policy(style_hash: str) -> str:
    """Return the policy of a page with one style sheet, which has this hash.

    The page cannot run scripts, load files, or send forms.
    """
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; img-src data:; form-action 'none'; "
        "frame-ancestors 'none'; base-uri 'none'"
    )


SESSION = "batchlab.session"
"""Key of a request's session in its ASGI scope."""

_OWN = ("Cache-Control", POLICY)
"""Headers that an answer may set itself."""
_OPEN = ("/login", "/static/")
_BELOW = re.compile(r"/s/(?P<place>[0-9a-f]+)(?=/)", re.ASCII)
"""Prefix of the paths of one session."""


def below(place: str) -> str:
    """Return the path that contains the pages of one session."""
    return f"{PAGE}/s/{place}"


class Guard:
    """ASGI wrapper that checks each request to the web page."""

    def __init__(self, app: ASGIApp, sessions: Sessions, users: UserDirectory, hosts: frozenset[str]) -> None:
        self._app = app
        self._sessions = sessions
        self._users = users
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name not in headers or name not in _OWN:
                        headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        session = None
        if match := _BELOW.match(path):
            session = self._session(headers, match["place"])
            path = path.removeprefix(match[0])
            scope["root_path"] = f"{scope.get('root_path', '')}{match[0]}"
        try:
            caller = await self._users.caller(session.key) if session else None
        except BackendError as error:
            await PlainTextResponse(f"{error}\n", 503)(scope, receive, send_guarded)
            return
        if caller is None:
            session = None  # The user was revoked or has expired since the start of the session.
        scope[SESSION], scope[CALLER] = session, caller
        refusal = self._refusal(scope["method"], path, headers, session)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, method: str, path: str, headers: Headers, session: Session | None) -> Response | None:
        # If an attacker's DNS name resolves to this machine, the attacker's pages could read the manager's pages (DNS
        # rebinding).
        if host_name(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse("The web page does not accept this host name.\n", 421)
        if method not in SAFE_METHODS and not is_same_origin(headers):
            return PlainTextResponse("A page of another origin sent the request.\n", 403)
        if session is None and not (path == _OPEN[0] or path.startswith(_OPEN[1])):
            return _log_in(method, headers)
        return None

    def _session(self, headers: Headers, place: str) -> Session | None:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._sessions.cookie(place))
        except CookieError:
            return None
        return self._sessions.find(found.value, place) if found else None


def _log_in(method: str, headers: Headers) -> Response:
    login = f"{PAGE}/login"
    if "hx-request" in headers:
        return PlainTextResponse("", 401, {"HX-Redirect": login})
    wants_page = method in SAFE_METHODS and "application/json" not in headers.get("accept", "")
    return RedirectResponse(login, 303) if wants_page else PlainTextResponse("Log in first.\n", 401)
