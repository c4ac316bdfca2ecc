"""Sign-in to the web page: one-time codes, and sessions in a signed cookie.

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
from dataclasses import dataclass
from typing import Protocol

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock

log = logging.getLogger(__name__)

CODE_S = 60.0
SESSION_S = 12 * 3600.0
PLACE_CHARS = 32
"""Length of a session's place in hexadecimal digits."""
MOST_CODES = 100
MOST_CLOSED = 1000
"""Limit of stored closed sessions. Above it, all sessions end, and none needs to be stored."""


class Store(Protocol):
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

    def __init__(self, token: str, clock: Clock, kept: Store | None = None) -> None:
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
        while len(self._codes) >= MOST_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = now_s + CODE_S
        return code

    def waits(self, name: str) -> bool:
        """Return whether the code with this name is still valid."""
        now_s = self._clock.monotonic_s()
        return any(name_of(code) == name and over_s > now_s for code, over_s in self._codes.items())

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
        is_ours = _is(mark, self._sign("session", session)) and _is(place, self.place(session))
        is_over = session.until_s <= self._clock.now_s() or name in self._closed
        return session if is_ours and not is_over else None

    def close(self, session: Session) -> None:
        """End a session before its expiry."""
        now_s = self._clock.now_s()
        self._closed = {name: end_s for name, end_s in self._closed.items() if end_s > now_s}
        self._closed[session.name] = session.until_s
        if len(self._closed) > MOST_CLOSED:
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


def name_of(code: str) -> str:
    """Return the name of a code, for places where the code itself must stay secret."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _is(given: str, known: str) -> bool:
    # The comparison takes constant time, so the response time does not reveal how much of a guess
    # was right.
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())
