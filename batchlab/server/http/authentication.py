"""Checks before every route (signature, bearer token, host, and origin), and the sessions of the web page.

Invariant: the manager does not read the body of a request without a token, so a stranger cannot fill the manager's
memory. A user with the role view sends no body, so the manager does not read the body of such a user's request. The
token is the grid's token, or the token of a user who is neither expired nor revoked. A request from a web page of
another origin is refused. A signed request gets a signed answer. The body of a request with a token has at most
MAX_BYTES.

Invariant of the sessions: no cookie and no address contains a token. The name of a session contains the key of its
user, and each request of a session looks up the user's present role. A request of a session needs the cookie and the
place of the session, and the place is a part of the page's addresses. A browser sends a cookie to every port of a host,
but only below the cookie's path. A program on another port does not know the session's path. A one-time code opens the
web page once, within CODE_S. A session ends when the session expires or is closed, when its user closes too many
sessions, or when the grid's token changes.
The file of the closed sessions also contains the seed of the signing key. If the file of the closed sessions is lost,
all sessions end, so a closed session never becomes valid again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from secrets import compare_digest
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchlab.core import http_connections
from batchlab.core.errors import BackendError, BatchlabError, Unauthorized
from batchlab.core.http_connections import PROOF, WINDOW_S, Signed
from batchlab.core.ports import Clock
from batchlab.core.users import GRID_OWNER, Caller, Role, key_name_in, user_token
from batchlab.manager.user_directory import UserDirectory
from batchlab.server.http.permissions import CALLER

MAX_BYTES = 64 * 1024**2
"""Limit of a request body in bytes. A client stores larger data in the bucket or uploads files."""
MAX_SIGNATURES = 50_000
MAX_USER_SIGNATURES = 5_000
"""Maximum number of stored signatures of requests. Signatures are stored, because each signature is accepted only
once.
"""
PAGE = "/ui"
"""Path of the web page. `Guard` protects the web page."""
LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
"""HTTP methods of requests that do not change data."""

_PATHS = ("/v1/", "/metrics")
_FILES = "/v1/jobs/files"


class AccessCheck:
    """Middleware that checks requests before the API.

    The application receives the authenticated sender of a request in its scope, and a request without a token with an
    empty body.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        users: UserDirectory,
        on_refused: Callable[[Caller, str, str], None],
        now_s: Callable[[], float],
        hosts: frozenset[str],
        on_error: Callable[[Scope, Exception], Response],
    ) -> None:
        """`now_s` returns the wall-clock time.

        `on_refused` is called for a request with the token of an expired or revoked user, with the reason and the
        request. `hosts` are the host names of the manager. The function `on_error` returns the answer to an error that
        the application does not handle.
        """
        self._app = app
        self._token = token
        self._users = users
        self._on_refused = on_refused
        self._now_s = now_s
        self._hosts = hosts
        self._on_error = on_error
        self._signatures = {"": _Signatures(MAX_SIGNATURES)}
        """Received signatures of each active user by the name of the user's key, because a user who exceeds the limit
        must not affect other users."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["type"] != "http" or path in ("/", PAGE) or path.startswith(f"{PAGE}/"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        authorization = headers.get("authorization", "")
        key = http_connections.claimed_key(authorization)
        token = user_token(self._token, key) if key else self._token
        signed = http_connections.read(token, authorization, scope["method"], _target(scope))
        if signed:
            send = self._signing(token, signed, send)
        caller: Caller | None = None
        if signed is not None or _is_bearer(authorization, token):
            try:
                caller = await self._caller(key, scope)
            except BatchlabError as refusal:
                await self._on_error(scope, refusal)(scope, receive, send)
                return
        if signed and (error := self._signature_error(key, signed)):
            await JSONResponse(error, 401)(scope, receive, send)
            return
        scope[CALLER] = caller
        if refusal_answer := _refusal(headers, None if caller else self._hosts):
            await refusal_answer(scope, receive, send)
            return
        has_body = True
        if path.startswith(_PATHS):
            if caller is None or caller.role is Role.VIEW:
                receive, has_body = _without_body(receive), False
            elif path != _FILES:
                receive = _limit_body(receive)
        if signed:
            await self._call_signed(scope, _hash_body(receive, signed) if has_body else receive, send)
        else:
            await self._app(scope, receive, send)

    async def _caller(self, key: str, scope: Scope) -> Caller:
        """Return the user with the key `key`. Raise Unauthorized if the user is not active."""
        if not key:
            return GRID_OWNER
        user = await self._users.find(key)
        state = user.state(self._now_s()) if user else "not valid"
        if user is None or state != "active":
            name = key.partition(".")[0]
            caller = Caller(name, user.role if user else Role.VIEW, key)
            self._on_refused(caller, state, f"{scope['method']} {scope['path']}")
            raise Unauthorized(
                f"The token of the user {name} is {state}.", remedy="Ask an administrator of the grid for a new token."
            )
        return Caller(user.name, user.role, key)

    def _signature_error(self, key: str, signed: Signed) -> dict[str, str] | None:
        """Return the error for a signed request that is too old or repeated, or None if the request is valid."""
        now_s = self._now_s()
        if abs(now_s - signed.at_s) > WINDOW_S:
            return {
                "error": f"The clocks of the client and the manager differ by {abs(now_s - signed.at_s):.0f} s.",
                "remedy": f"Set the clocks. A difference of up to {WINDOW_S} s is allowed.",
            }
        if key not in self._signatures:
            self._signatures[key] = _Signatures(MAX_USER_SIGNATURES)
        if not self._signatures[key].is_first(signed, now_s):
            return {"error": "A request with this signature was received before.", "remedy": "Sign the request again."}
        return None

    async def _call_signed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and answer its unhandled errors.

        Starlette answers unhandled errors outside of every middleware, and an answer outside of the middleware would
        not be signed.
        """
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if not has_begun:
                await self._on_error(scope, error)(scope, receive, send_noted)
            raise

    def _signing(self, token: str, signed: Signed, send: Send) -> Send:
        """Return a `send` function that signs the answer. If the answer's body has several parts, the signature follows
        the body.
        """
        start: Message = {}
        streamed = hashlib.sha256()
        is_stream = False

        async def send_signed(message: Message) -> None:
            nonlocal start, is_stream
            if message["type"] == "http.response.start":
                start = message
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            headers = MutableHeaders(scope=start)
            status = start["status"]
            if not is_stream and not more:
                headers[PROOF] = http_connections.whole_proof(token, signed, status, body)
                await send(start)
                await send(message)
                return
            if not is_stream:
                is_stream = True
                headers[PROOF] = http_connections.stream_proof(token, signed, status)
                if size := headers.get("content-length"):
                    headers["content-length"] = str(int(size) + http_connections.MAC_BYTES)
                await send(start)
            streamed.update(body)
            if not more:
                mac = http_connections.answer_mac(token, signed.mac, status, streamed.hexdigest())
                message = {**message, "body": body + mac.encode()}
            await send(message)

        return send_signed


class _Signatures:
    """Signatures with one key that were received within WINDOW_S, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times_s: OrderedDict[bytes, int] = OrderedDict()
        self._floor_s = 0
        """Time in epoch seconds up to which all signatures are refused."""

    def is_first(self, signed: Signed, now_s: float) -> bool:
        """Record the signature of a request.

        Return False if the signature was recorded before, or if an earlier record of the signature may have been
        removed.
        """
        mac = bytes.fromhex(signed.mac)
        if signed.at_s <= self._floor_s or mac in self._times_s:
            return False
        self._times_s[mac] = signed.at_s
        while self._times_s:
            oldest_s = next(iter(self._times_s.values()))
            if len(self._times_s) > self._limit:
                self._floor_s = max(self._floor_s, oldest_s)
            elif oldest_s > now_s - WINDOW_S:
                break
            self._times_s.popitem(last=False)
        return True


def host_name(host: str) -> str:
    """Return the name in a `Host` header in lower case, or "" if the header is invalid."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def is_same_origin(headers: Headers) -> bool:
    """Return whether a page of the manager sent the request.

    A browser sends the header `Sec-Fetch-Site` only to HTTPS addresses and to the browser's own machine. Without
    `Sec-Fetch-Site`, the header `Origin` must name the manager's own origin.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin", "")
    return urlsplit(origin).scheme in ("http", "https") and (urlsplit(origin).netloc == headers.get("host", ""))


def _refusal(headers: Headers, hosts: frozenset[str] | None) -> Response | None:
    """Return the answer that refuses a request of another web page, or None for other requests.

    `hosts` are the allowed host names, or None for a request with the token, because web pages do not have the token.
    """
    # If an attacker's DNS name resolves to this machine, a browser lets the attacker's pages read the manager's answers
    # (DNS rebinding). An IP address in the Host header is safe, because an IP address cannot be rebound.
    name = host_name(headers.get("host", ""))
    if hosts is not None and not (name in hosts or ":" in name or name.replace(".", "").isdigit()):
        return PlainTextResponse("The manager does not accept this host name.\n", 421)
    is_typed = "origin" not in headers and headers.get("sec-fetch-site", "none") == "none"
    if not is_typed and not is_same_origin(headers):
        return PlainTextResponse("A page of another origin sent the request.\n", 403)
    return None


def _is_bearer(authorization: str, token: str) -> bool:
    kind, _, sent = authorization.partition(" ")
    # The comparison takes constant time, so the response time does not reveal which part of a guessed token was right.
    return compare_digest(f"{kind.lower()} {sent.strip()}".encode(), f"bearer {token}".encode())


def _target(scope: Scope) -> str:
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _hash_body(receive: Receive, signed: Signed) -> Receive:
    """Return a `receive` function that checks the signed SHA-256 of the request body.

    At the end of a body whose SHA-256 differs from the signed SHA-256, the returned function raises HTTPException.
    """
    digest = hashlib.sha256()

    async def hashed() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            digest.update(message.get("body", b""))
            if not message.get("more_body", False) and digest.hexdigest() != signed.body:
                raise HTTPException(400, "the signature belongs to another body")
        return message

    return hashed


def _limit_body(receive: Receive) -> Receive:
    read_bytes = 0

    async def counted() -> Message:
        nonlocal read_bytes
        message = await receive()
        read_bytes += len(message.get("body", b""))
        if read_bytes > MAX_BYTES:
            raise HTTPException(413, f"the limit of a body is {MAX_BYTES / 2**20:.0f} MiB")
        return message

    return counted


def _without_body(receive: Receive) -> Receive:
    """Return a `receive` function that returns an empty body first and does not read the real body."""
    first = True

    async def receive_empty() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return receive_empty


log = logging.getLogger(__name__)

CODE_S = 60.0
SESSION_S = 12 * 3600.0
PLACE_CHARS = 32
"""Length of a session's place in the page's addresses, in hexadecimal digits."""
MAX_CODES = 100
MAX_CLOSED = 1000
"""Maximum number of stored closed sessions. If more sessions are closed, all sessions of the user with the most closed
sessions end, so a user cannot end the sessions of others."""


class SessionStore(Protocol):
    """Storage of the sessions. The methods of a SessionStore raise BackendError if the storage fails."""

    def load(self) -> bytes | None: ...

    def save(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Session:
    """Session of the web page. A session is valid until `until_s`, in epoch seconds."""

    name: str
    until_s: int

    @property
    def key(self) -> str:
        """Name of the key of the session's user, or "" for the grid's token."""
        return self.name.partition(".")[2]


class Sessions:
    """All sessions of one manager. If `store` is given, the sessions survive a restart of the manager."""

    def __init__(self, token: str, clock: Clock, store: SessionStore | None = None) -> None:
        self._clock = clock
        self._token = token
        self._store = store
        self._codes: dict[str, tuple[float, str]] = {}
        """Expiry of each one-time code in monotonic seconds, and the key of its user."""
        self._seed = ""
        """Seed of the signing key. The seed is not secret, because the signing key also depends on the token."""
        self._closed: dict[str, int] = {}
        """Expiry of each session that was closed early."""
        self._ended: dict[str, int] = {}
        """Latest expiry of the sessions that have ended together, by the key of their user."""
        self._load()

    def _load(self) -> None:
        try:
            doc = json.loads((self._store.load() if self._store else None) or b"{}")
            seed, closed = str(doc["seed"]), {str(n): int(s) for n, s in doc["closed"].items()}
            ended = {str(key): int(s) for key, s in doc.get("ended", {}).items()}
        except KeyError:
            self._end_all()
        except (BackendError, ValueError, TypeError, AttributeError) as error:
            log.warning("all sessions of the web page have ended, because their file cannot be read: %s", error)
            self._end_all()
        else:
            self._seed, self._closed, self._ended = seed, closed, ended

    def _end_all(self) -> None:
        self._seed, self._closed, self._ended = secrets.token_hex(16), {}, {}
        self._save()

    def _save(self) -> None:
        if self._store is None:
            return
        try:
            self._store.save(json.dumps({"seed": self._seed, "closed": self._closed, "ended": self._ended}).encode())
        except BackendError as error:
            log.warning("closed sessions of the web page cannot be stored, and a restart reopens them: %s", error)

    def place(self, session: Session) -> str:
        """Return the part of the page's addresses that only the browser of the session knows."""
        return self._sign("place", session)[:PLACE_CHARS]

    def cookie(self, place: str) -> str:
        """Return the name of the cookie of the session with the place `place`."""
        digest = hmac.digest(self._token.encode(), f"the cookie at {place}".encode(), "sha256")
        return f"batchlab-{digest.hex()[:12]}"

    def new_code(self, key: str = "") -> str:
        """Return a new one-time code that opens one session for the user whose key has the name `key`."""
        now_s = self._clock.monotonic_s()
        self._codes = {code: one for code, one in self._codes.items() if one[0] > now_s}
        while len(self._codes) >= MAX_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = now_s + CODE_S, key
        return code

    def is_code_valid(self, name: str) -> bool:
        """Return whether the one-time code with the name `name` is still valid."""
        now_s = self._clock.monotonic_s()
        return any(page_session_name(code) == name and over_s > now_s for code, (over_s, _) in self._codes.items())

    def sign_in(self, secret: str) -> str | None:
        """Return the key of the user that `secret` belongs to, which is "" for the grid's token. Return None for a
        wrong secret.

        `secret` is the grid's token, a user's token, or a one-time code, which becomes invalid. The caller must check
        whether the user is active.
        """
        if _are_equal(secret, self._token):
            return ""
        if key := key_name_in(secret):
            return key if _are_equal(secret, user_token(self._token, key)) else None
        match = next((code for code in self._codes if _are_equal(secret, code)), None)
        if match is None:
            return None
        over_s, key = self._codes.pop(match)
        return key if over_s > self._clock.monotonic_s() else None

    def start(self, key: str = "") -> tuple[Session, str]:
        """Start a session of the user whose key has the name `key`. Return the session and the value of its cookie."""
        # A new session must not have the expiry of sessions that have ended together.
        until_s = max(int(self._clock.now_s() + SESSION_S), self._ended.get(key, 0) + 1)
        name = secrets.token_urlsafe(12)
        session = Session(f"{name}.{key}" if key else name, until_s)
        return session, f"{until_s}.{session.name}.{self._sign('session', session)}"

    def find(self, cookie: str, place: str) -> Session | None:
        """Return the session that belongs to the cookie value `cookie`.

        Return None if the cookie is not signed by the manager, has expired, or does not belong to `place`.
        """
        until, _, rest = cookie.partition(".")
        name, _, signature = rest.rpartition(".")
        if not (until.isascii() and until.isdigit() and len(until) < 15 and name):
            return None
        session = Session(name, int(until))
        is_signed = _are_equal(signature, self._sign("session", session)) and _are_equal(place, self.place(session))
        is_over = session.until_s <= max(self._clock.now_s(), self._ended.get(session.key, 0)) or name in self._closed
        return session if is_signed and not is_over else None

    def close(self, session: Session) -> None:
        """End a session before its expiry."""
        now_s = self._clock.now_s()
        self._closed = {name: end_s for name, end_s in self._closed.items() if end_s > now_s}
        self._closed[session.name] = session.until_s
        self._ended = {key: end_s for key, end_s in self._ended.items() if end_s > now_s}
        if len(self._closed) > MAX_CLOSED:
            numbers = Counter(Session(name, end_s).key for name, end_s in self._closed.items())
            self._end_sessions_of(numbers.most_common(1)[0][0])
        self._save()

    def _end_sessions_of(self, key: str) -> None:
        """End all sessions of the user whose key has the name `key`."""
        others = {name: end_s for name, end_s in self._closed.items() if Session(name, end_s).key != key}
        last_s = max(end_s for name, end_s in self._closed.items() if name not in others)
        self._ended[key] = max(int(self._clock.now_s() + SESSION_S), last_s)
        self._closed = others

    def form_token(self, session: Session) -> str:
        """Return the token that every form of the session contains.

        Other sites do not know the form token, so other sites cannot send a form.
        """
        return self._sign("form", session)

    def is_form_token(self, session: Session, token: str) -> bool:
        """Return whether `token` is the form token of the session."""
        return _are_equal(token, self.form_token(session))

    def _sign(self, purpose: str, session: Session) -> str:
        text = f"{purpose}.{session.until_s}.{session.name}"
        key = hmac.digest(self._token.encode(), self._seed.encode(), "sha256")
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def page_session_name(code: str) -> str:
    """Return the name of a one-time code, for places where the code itself must stay secret."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _are_equal(sent: str, expected: str) -> bool:
    # The comparison takes constant time, so the response time does not reveal which part of a guessed token was right.
    return compare_digest(sent.encode(errors="replace"), expected.encode())
