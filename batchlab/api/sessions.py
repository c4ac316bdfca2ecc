"""Who has opened the web page: one-time codes, and sessions in a signed cookie.

Invariant: the grid's token is in no cookie and no address. A code opens the page once and for
CODE_S; a session ends at its time, when it is closed, and when the grid's token becomes another.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from batchlab.ports import Clock

CODE_S = 60.0
SESSION_S = 12 * 3600.0
MOST_CODES = 100


@dataclass(frozen=True, slots=True)
class Session:
    """One login, until `until_s` (seconds of the epoch)."""

    name: str
    until_s: int


class Sessions:
    """All of one manager. They survive its restart, since nothing but codes and what has been
    closed is kept here."""

    def __init__(self, token: str, clock: Clock) -> None:
        self._clock = clock
        self._token = token
        self._key = hmac.digest(token.encode(), b"the web page's sessions", "sha256")
        self._codes: dict[str, float] = {}
        """When each is over, monotonic seconds."""
        self._closed: dict[str, int] = {}
        """Sessions that were closed before their time, and when that would have been."""

    @property
    def cookie(self) -> str:
        """The cookie's name. Cookies know no ports: two grids of one machine must not share it."""
        return f"batchlab-{hashlib.sha256(self._key).hexdigest()[:12]}"

    def code(self) -> str:
        """A code that opens a session once."""
        now_s = self._clock.monotonic_s()
        self._codes = {code: over_s for code, over_s in self._codes.items() if over_s > now_s}
        while len(self._codes) >= MOST_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(24)
        self._codes[code] = now_s + CODE_S
        return code

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

    def of(self, cookie: str) -> Session | None:
        """The session that a cookie's value stands for, None where it is not ours, or over."""
        until, _, rest = cookie.partition(".")
        name, _, mark = rest.rpartition(".")
        if not (until.isascii() and until.isdigit() and len(until) < 15 and name):
            return None
        session = Session(name, int(until))
        is_ours = _is(mark, self._sign("session", session))
        is_over = session.until_s <= self._clock.now_s() or name in self._closed
        return session if is_ours and not is_over else None

    def close(self, session: Session) -> None:
        """End it before its time."""
        now_s = self._clock.now_s()
        self._closed = {name: end_s for name, end_s in self._closed.items() if end_s > now_s}
        self._closed[session.name] = session.until_s

    def form_token(self, session: Session) -> str:
        """What every form of the session carries, so that no other site can send one."""
        return self._sign("form", session)

    def has_sent(self, session: Session, given: str) -> bool:
        """Whether a form of this session has it."""
        return _is(given, self.form_token(session))

    def _sign(self, purpose: str, session: Session) -> str:
        text = f"{purpose}.{session.until_s}.{session.name}"
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def _is(given: str, known: str) -> bool:
    # Constant time: an answer's delay must not tell how much of a guess was right.
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())
