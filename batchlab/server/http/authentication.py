"""Checks before every route: signatures, the bearer token, the host, and the origin.

Invariant: the body of a request without the token is not read, so a stranger cannot fill the
manager's memory. A web page of another origin gets no answer. A signed request gets a signed
answer. The body of a request with the token has up to MAX_BYTES.

Sign-in to the web page: one-time codes, and sessions in a signed cookie.

Invariant: the grid's token is in no cookie and no address. A session needs its cookie and its
place, which is a part of the page's addresses. A browser sends a cookie to every port of a host,
but only below the cookie's path, and a program on another port does not know that path. A code
opens the page once, within CODE_S. A session ends when it expires, when it is closed, and when the
grid's token changes. Closed sessions are stored in the same file as the seed of the signing key. If
the file is lost, the sessions end too, so a closed session never becomes valid again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from secrets import compare_digest
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchlab.core import http_connections
from batchlab.core.errors import BackendError
from batchlab.core.http_connections import PROOF, WINDOW_S, Signed
from batchlab.core.ports import Clock

MAX_BYTES = 64 * 1024**2
"""Limit of a body. A client stores larger data in the bucket or sends it as files."""
MAX_SIGNATURES = 50_000
"""Number of stored signatures. A signature is accepted only once."""
PAGE = "/ui"
"""Path of the web page. `Guard` protects it."""
LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
"""Methods that change nothing."""

_PATHS = ("/v1/", "/metrics")
_FILES = "/v1/jobs/files"


class AccessCheck:
    """Middleware before the API. The application sees a signed request as one with the bearer
    token, and a request without the token as one with an empty body."""

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        now_s: Callable[[], float],
        hosts: frozenset[str],
        failed: Callable[[Scope, Exception], Response],
    ) -> None:
        """`now_s` is the wall clock. `hosts` are the manager's names. `failed` makes the answer to
        an error that the application does not handle."""
        self._app = app
        self._token = token
        self._word = f"bearer {token}".encode()
        self._now_s = now_s
        self._hosts = hosts
        self._failed = failed
        self._used = _Signatures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_page(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("authorization", "")
        signed = http_connections.read(self._token, given, scope["method"], _target(scope))
        if signed:
            send = self._proving(signed, send)
            scope["headers"] = _with_bearer(scope["headers"], self._token)
            if wrong := self._doubt(signed):
                await JSONResponse(wrong, 401)(scope, receive, send)
                return
        is_known = signed is not None or self._knows(given)
        if refusal := _refusal(headers, None if is_known else self._hosts):
            await refusal(scope, receive, send)
            return
        if scope["path"].startswith(_PATHS):
            if not is_known:
                receive = _nothing_then(receive)
            elif scope["path"] != _FILES:
                receive = _limited(receive)
        if signed:
            await self._answered(scope, _hashed(receive, signed), send)
        else:
            await self._app(scope, receive, send)

    def _knows(self, given: str) -> bool:
        kind, _, token = given.partition(" ")
        return compare_digest(f"{kind.lower()} {token.strip()}".encode(), self._word)

    def _doubt(self, signed: Signed) -> dict[str, str] | None:
        """Return the error for a signed request that is too old or repeated. Return None for other
        requests."""
        now_s = self._now_s()
        if abs(now_s - signed.at_s) > WINDOW_S:
            return {
                "error": "The request was signed at another time: the clocks of client and manager "
                f"differ by {abs(now_s - signed.at_s):.0f} s.",
                "remedy": f"Set the clock right; up to {WINDOW_S} s are allowed.",
            }
        if not self._used.is_first(signed, now_s):
            return {"error": "A request with this signature was received before.", "remedy": "Sign the request again."}
        return None

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and answer its unhandled errors. Starlette would answer them outside
        of every middleware, so that the answer would not be signed."""
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if not has_begun:
                await self._failed(scope, error)(scope, receive, noted)
            raise

    def _proving(self, signed: Signed, send: Send) -> Send:
        """Sign the answer. The signature of a body in several parts follows the body."""
        token = self._token
        start: Message = {}
        streamed = hashlib.sha256()
        is_stream = False

        async def proving(message: Message) -> None:
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

        return proving


class _Signatures:
    """Signatures that were received within WINDOW_S, up to MAX_SIGNATURES."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._floor_s = 0
        """Requests that were signed at this time or before it are refused."""

    def is_first(self, signed: Signed, now_s: float) -> bool:
        """Record a signature. Return False if it was recorded before, or may have been."""
        mac = bytes.fromhex(signed.mac)
        if signed.at_s <= self._floor_s or mac in self._known:
            return False
        self._known[mac] = signed.at_s
        while self._known:
            oldest_s = next(iter(self._known.values()))
            if len(self._known) > MAX_SIGNATURES:
                self._floor_s = max(self._floor_s, oldest_s)
            elif oldest_s > now_s - WINDOW_S:
                break
            self._known.popitem(last=False)
        return True


def host_name(host: str) -> str:
    """Return the name in a `Host` header in lower case, or "" if the header has none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def is_same_origin(headers: Headers) -> bool:
    """Return whether a page of the manager sent the request. A browser sends `Sec-Fetch-Site` to a
    trusted origin. For another origin, such as a container's address, the `Origin` must be the
    manager's own."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin", "")
    return urlsplit(origin).scheme in ("http", "https") and (urlsplit(origin).netloc == headers.get("host", ""))


def _refusal(headers: Headers, hosts: frozenset[str] | None) -> Response | None:
    """Return the answer that refuses a request of another web page, or None. `hosts` are the
    allowed names, or None for a request with the token, which no web page has."""
    # A foreign name may resolve to this machine, and then the browser lets the pages of that name
    # read the answers (DNS rebinding). An IP address cannot be rebound.
    if hosts is not None and not _is_named(host_name(headers.get("host", "")), hosts):
        return PlainTextResponse("The manager does not answer to that name.\n", 421)
    is_typed = "origin" not in headers and headers.get("sec-fetch-site", "none") == "none"
    if not is_typed and not is_same_origin(headers):
        return PlainTextResponse("The request comes from another page.\n", 403)
    return None


def _is_named(name: str, hosts: frozenset[str]) -> bool:
    return name in hosts or ":" in name or name.replace(".", "").isdigit()


def _is_page(path: str) -> bool:
    return path in ("/", PAGE) or path.startswith(f"{PAGE}/")


def _target(scope: Scope) -> str:
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _with_bearer(headers: Iterable[tuple[bytes, bytes]], token: str) -> list[tuple[bytes, bytes]]:
    others = [header for header in headers if header[0].lower() != b"authorization"]
    return [*others, (b"authorization", f"Bearer {token}".encode())]


def _hashed(receive: Receive, signed: Signed) -> Receive:
    """Receive a body whose SHA-256 is signed. Raise HTTPException at the end of a different
    body."""
    found = hashlib.sha256()

    async def hashed() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            found.update(message.get("body", b""))
            if not message.get("more_body", False) and found.hexdigest() != signed.body:
                raise HTTPException(400, "the body is not the one that was signed")
        return message

    return hashed


def _limited(receive: Receive) -> Receive:
    read_bytes = 0

    async def counted() -> Message:
        nonlocal read_bytes
        message = await receive()
        read_bytes += len(message.get("body", b""))
        if read_bytes > MAX_BYTES:
            raise HTTPException(413, f"a body has up to {MAX_BYTES / 2**20:.0f} MiB")
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


log = logging.getLogger(__name__)

CODE_S = 60.0
SESSION_S = 12 * 3600.0
PLACE_CHARS = 32
"""Length of a session's place in hexadecimal digits."""
MAX_CODES = 100
MAX_CLOSED = 1000
"""Limit of stored closed sessions. Above it, all sessions end, and none needs to be stored."""


class SessionStore(Protocol):
    """Storage of the sessions. Its methods raise BackendError if they fail."""

    def load(self) -> bytes | None: ...

    def save(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Session:
    """One sign-in. It is valid until `until_s`, in epoch seconds."""

    name: str
    until_s: int


class Sessions:
    """All sessions of one manager. With `kept`, they survive its restart."""

    def __init__(self, token: str, clock: Clock, kept: SessionStore | None = None) -> None:
        self._clock = clock
        self._token = token
        self._kept = kept
        self._codes: dict[str, float] = {}
        """Expiry of each code in monotonic seconds."""
        self._seed = ""
        """The key that signs is derived from it and from the token. It is not secret by itself."""
        self._closed: dict[str, int] = {}
        """Sessions that were closed before their expiry, and their expiry."""
        self._load()

    def _load(self) -> None:
        try:
            doc = json.loads((self._kept.load() if self._kept else None) or b"{}")
            seed, closed = str(doc["seed"]), {str(n): int(s) for n, s in doc["closed"].items()}
        except KeyError:
            self._begin_anew()
        except (BackendError, ValueError, TypeError, AttributeError) as error:
            log.warning("sessions of the web page have ended, since they cannot be read: %s", error)
            self._begin_anew()
        else:
            self._seed, self._closed = seed, closed

    def _begin_anew(self) -> None:
        """End all sessions."""
        self._seed, self._closed = secrets.token_hex(16), {}
        self._save()

    def _save(self) -> None:
        if self._kept is None:
            return
        try:
            self._kept.save(json.dumps({"seed": self._seed, "closed": self._closed}).encode())
        except BackendError as error:
            log.warning("who has logged out of the web page is known until a restart: %s", error)

    def place(self, session: Session) -> str:
        """Return the part of the page's addresses that only the browser of this session knows."""
        return self._sign("place", session)[:PLACE_CHARS]

    def cookie(self, place: str) -> str:
        """Return the name of the cookie of the session with this place."""
        own = hmac.digest(self._token.encode(), f"the cookie at {place}".encode(), "sha256")
        return f"batchlab-{own.hex()[:12]}"

    def code(self) -> str:
        """Return a new code that opens one session."""
        now_s = self._clock.monotonic_s()
        self._codes = {code: over_s for code, over_s in self._codes.items() if over_s > now_s}
        while len(self._codes) >= MAX_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = now_s + CODE_S
        return code

    def waits(self, name: str) -> bool:
        """Return whether the code with this name is still valid."""
        now_s = self._clock.monotonic_s()
        return any(page_session_name(code) == name and over_s > now_s for code, over_s in self._codes.items())

    def opens(self, word: str) -> bool:
        """Return whether the word is the token or a valid code. A code becomes invalid with this
        call."""
        if _is(word, self._token):
            return True
        known = next((code for code in self._codes if _is(word, code)), None)
        return known is not None and self._codes.pop(known) > self._clock.monotonic_s()

    def begin(self) -> tuple[Session, str]:
        """Start a session. Return it and the value of its cookie."""
        until_s = int(self._clock.now_s() + SESSION_S)
        session = Session(secrets.token_urlsafe(12), until_s)
        return session, f"{until_s}.{session.name}.{self._sign('session', session)}"

    def of(self, cookie: str, place: str) -> Session | None:
        """Return the session of a cookie's value. Return None if the cookie is not signed by this
        manager, has expired, or has another place."""
        until, _, rest = cookie.partition(".")
        name, _, mark = rest.rpartition(".")
        if not (until.isascii() and until.isdigit() and len(until) < 15 and name):
            return None
        session = Session(name, int(until))
        is_same_origin = _is(mark, self._sign("session", session)) and _is(place, self.place(session))
        is_over = session.until_s <= self._clock.now_s() or name in self._closed
        return session if is_same_origin and not is_over else None

    def close(self, session: Session) -> None:
        """End a session before its expiry."""
        now_s = self._clock.now_s()
        self._closed = {name: end_s for name, end_s in self._closed.items() if end_s > now_s}
        self._closed[session.name] = session.until_s
        if len(self._closed) > MAX_CLOSED:
            self._begin_anew()
        else:
            self._save()

    def form_token(self, session: Session) -> str:
        """Return the token that every form of the session contains, so that no other site can send
        a form."""
        return self._sign("form", session)

    def has_sent(self, session: Session, given: str) -> bool:
        """Return whether `given` is the form token of this session."""
        return _is(given, self.form_token(session))

    def _sign(self, purpose: str, session: Session) -> str:
        text = f"{purpose}.{session.until_s}.{session.name}"
        key = hmac.digest(self._token.encode(), self._seed.encode(), "sha256")
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def page_session_name(code: str) -> str:
    """Return the name of a code, for places where the code itself must stay secret."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _is(given: str, known: str) -> bool:
    # The comparison takes constant time, so the response time does not reveal how much of a guess
    # was right.
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())
