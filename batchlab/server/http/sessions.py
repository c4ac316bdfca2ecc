"""Who has opened the web page: one-time codes, and sessions in a signed cookie.

Invariant: the grid's token is in no cookie and no address. A session needs its cookie and its
place, which is a part of the page's addresses. A browser sends a cookie to every port of a host,
but only below the cookie's path, and a program on another port does not know that path. A code
opens the page once and for CODE_S. A session ends at its time, when it is closed, and when the
grid's token becomes another. What is closed stays closed: it is kept beside what all sessions are
signed by, so that whoever has lost the one has lost the other.
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
"""Of a session's place, in hexadecimal digits."""
MOST_CODES = 100
MOST_CLOSED = 1000
"""Beyond so many all sessions end, and none need be remembered."""


class Store(Protocol):
    """Where it is kept; BackendError where that fails."""

    def load(self) -> bytes | None: ...

    def save(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Session:
    """One login, until `until_s` (seconds of the epoch)."""

    name: str
    until_s: int


class Sessions:
    """All of one manager. With `kept` they survive its restart."""

    def __init__(self, token: str, clock: Clock, kept: Store | None = None) -> None:
        self._clock = clock
        self._token = token
        self._kept = kept
        self._codes: dict[str, float] = {}
        """When each is over, monotonic seconds."""
        self._seed = ""
        """With the token it makes the key that signs. No secret by itself."""
        self._closed: dict[str, int] = {}
        """Sessions that were closed before their time, and when that would have been."""
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
        """End all sessions there are."""
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
        """Return the part of the page's addresses that only this session's browser knows."""
        return self._sign("place", session)[:PLACE_CHARS]

    def cookie(self, place: str) -> str:
        """Return the name of the cookie of the session at that place."""
        own = hmac.digest(self._token.encode(), f"the cookie at {place}".encode(), "sha256")
        return f"batchlab-{own.hex()[:12]}"

    def code(self) -> str:
        """A code that opens a session once."""
        now_s = self._clock.monotonic_s()
        self._codes = {code: over_s for code, over_s in self._codes.items() if over_s > now_s}
        while len(self._codes) >= MOST_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = now_s + CODE_S
        return code

    def waits(self, name: str) -> bool:
        """Whether the code of that name may still be used."""
        now_s = self._clock.monotonic_s()
        return any(name_of(code) == name and over_s > now_s for code, over_s in self._codes.items())

    def opens(self, word: str) -> bool:
        """Whether the word is the token, or a code that was not used yet."""
        if _is(word, self._token):
            return True
        known = next((code for code in self._codes if _is(word, code)), None)
        return known is not None and self._codes.pop(known) > self._clock.monotonic_s()

    def begin(self) -> tuple[Session, str]:
        """A new session, and its cookie's value."""
        until_s = int(self._clock.now_s() + SESSION_S)
        session = Session(secrets.token_urlsafe(12), until_s)
        return session, f"{until_s}.{session.name}.{self._sign('session', session)}"

    def of(self, cookie: str, place: str) -> Session | None:
        """The session that a cookie's value stands for, None where it is not ours, is over, or has
        another place."""
        until, _, rest = cookie.partition(".")
        name, _, mark = rest.rpartition(".")
        if not (until.isascii() and until.isdigit() and len(until) < 15 and name):
            return None
        session = Session(name, int(until))
        is_ours = _is(mark, self._sign("session", session)) and _is(place, self.place(session))
        is_over = session.until_s <= self._clock.now_s() or name in self._closed
        return session if is_ours and not is_over else None

    def close(self, session: Session) -> None:
        """End it before its time."""
        now_s = self._clock.now_s()
        self._closed = {name: end_s for name, end_s in self._closed.items() if end_s > now_s}
        self._closed[session.name] = session.until_s
        if len(self._closed) > MOST_CLOSED:
            self._begin_anew()
        else:
            self._save()

    def form_token(self, session: Session) -> str:
        """What every form of the session carries, so that no other site can send one."""
        return self._sign("form", session)

    def has_sent(self, session: Session, given: str) -> bool:
        """Whether a form of this session has it."""
        return _is(given, self.form_token(session))

    def _sign(self, purpose: str, session: Session) -> str:
        text = f"{purpose}.{session.until_s}.{session.name}"
        key = hmac.digest(self._token.encode(), self._seed.encode(), "sha256")
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def name_of(code: str) -> str:
    """What a code is called where it must not be read."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _is(given: str, known: str) -> bool:
    # Constant time: an answer's delay must not tell how much of a guess was right.
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())
