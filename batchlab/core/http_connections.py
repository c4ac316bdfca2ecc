"""Pool of HTTP connections to one host, and signatures of requests and responses.

Invariants: a connection has one user at a time, and a connection that its server has closed is not used again. The
token of the client is the key of the signatures and is never sent. The token is the grid's token or the token of a
user, and a signature with the token of a user names its key. A program without the token can sign neither a request nor
a response. A signed response is valid for exactly one request. The module needs only the standard library,
because every command imports the module at its start.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import select
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from typing import TYPE_CHECKING

from batchlab.core import users

if TYPE_CHECKING:
    import ssl


class Connections:
    """Thread-safe pool of connections to one host."""

    def __init__(
        self, host: str, tls: ssl.SSLContext | None, *, connect_s: float, idle_s: float = math.inf, unix: str = ""
    ) -> None:
        """Create an empty pool of connections.

        `host` may contain a port. `unix` is the path of the host's Unix socket. A connection that was idle for `idle_s`
        seconds is not used again, because a request fails if the server closes its idle connection at the same moment.
        """
        self._host = host
        self._tls = tls
        self._unix = unix
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        """Idle connections with the time of their last use (monotonic), most recent last."""
        self._closed = False

    def close(self) -> None:
        """Close the idle connections now, and close each used connection when its user gives it back."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # Another thread may have taken the connection.
            while True:
                self._idle.pop()[1].close()

    def take(self) -> HTTPConnection:
        """Return an open connection. Raise OSError if the host does not respond.

        The caller closes the connection or gives it back. The caller also sets the timeout of the connection's socket,
        which is initially `connect_s` or the previous user's timeout.
        """
        with suppress(IndexError):  # Another thread may have taken the connection.
            while True:
                used_s, kept = self._idle.pop()
                if time.monotonic() - used_s < self._idle_s and _is_open(kept):
                    return kept
                kept.close()
        made = self._make()
        try:
            made.connect()
        except BaseException:
            made.close()
            raise
        return made

    def _make(self) -> HTTPConnection:
        if self._unix:
            return _UnixConnection(self._unix, self._connect_s)
        if self._tls:
            return HTTPSConnection(self._host, timeout=self._connect_s, context=self._tls)
        return HTTPConnection(self._host, timeout=self._connect_s)

    def give_back(self, connection: HTTPConnection) -> None:
        """Return the connection to the pool for the next user.

        The connection's last response must have been read to its end, and must not have announced that the server
        closes the connection.
        """
        self._idle.append((time.monotonic(), connection))
        # check `_closed` after the append, so that a connection that is given back during `close` is also closed
        if self._closed:
            self._close_idle()


class _UnixConnection(HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(self.timeout)
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        self.sock = made


def _is_open(connection: HTTPConnection) -> bool:
    if not connection.sock:
        return False
    # An idle connection is readable only if the server has closed the connection.
    look = select.poll()  # select() does not support file descriptors above about 1,000
    look.register(connection.sock, select.POLLIN)
    return not look.poll(0)


SCHEME = "Batchlab-HMAC-SHA256"
"""Scheme of the `Authorization` header of a signed request."""
PROOF = "Batchlab-Proof"
"""Header with the signature of a response."""
WINDOW_S = 300
"""Maximum difference in seconds between a request's time and the manager's clock."""
MAC_BYTES = 64
"""Length of a signature in hexadecimal digits."""
_WHOLE, _STREAM = "whole", "stream"
_FIELDS = 4
_LONGEST_TIME = 15


class Unproven(Exception):
    """Error for a response that is not signed with the grid's token."""


@dataclass(frozen=True, slots=True)
class Signed:
    """Fields of a signed request's `Authorization` header.

    `at_s` is in epoch seconds, and `body` is the SHA-256 of the request's body. `key` is the name of the key of a
    user's token, or "" for the grid's token.
    """

    at_s: int
    nonce: str
    body: str
    mac: str
    key: str = ""

    @property
    def header(self) -> str:
        key = f".{self.key}" if self.key else ""
        return f"{SCHEME} {self.at_s}.{self.nonce}.{self.body}.{self.mac}{key}"


def digest(body: bytes) -> str:
    """Return the SHA-256 of a body in hexadecimal digits."""
    return hashlib.sha256(body).hexdigest()


def sign(token: str, method: str, target: str, body: bytes, at_s: float | None = None) -> Signed:
    """Sign a request with the time `at_s`, by default the current time.

    `target` is the path and the query of the request as sent.
    """
    if at_s is None:
        at_s = time.time()  # noqa: TID251 - a client has no Clock
    fields = int(at_s), secrets.token_hex(16), digest(body)
    return Signed(*fields, _request_mac(token, method, target, *fields), users.key_name_in(token))


def claimed_key(header: str) -> str:
    """Return the name of the user's key that an `Authorization` header claims to use, or "" for other headers."""
    scheme, _, text = header.partition(" ")
    if scheme.lower() == "bearer":
        return users.key_name_in(text.strip())
    _, key = _split(header)
    return key if users.is_key_name(key) else ""


def read(token: str, header: str, method: str, target: str) -> Signed | None:
    """Return the signature in an `Authorization` header, or None if the signature is not valid.

    The caller must check the time of the signature, the reuse of the signature, and the body of the request.
    """
    fields, key = _split(header)
    if len(fields) != _FIELDS or key != users.key_name_in(token):
        return None
    at, nonce, body, mac = fields
    if not (at.isascii() and at.isdigit() and len(at) <= _LONGEST_TIME):
        return None
    expected = _request_mac(token, method, target, int(at), nonce, body)
    return Signed(int(at), nonce, body, mac, key) if _same(mac, expected) else None


def _split(header: str) -> tuple[list[str], str]:
    """Return the fields and the name of the key in a signed request's `Authorization` header, or no fields for other
    headers.
    """
    scheme, _, text = header.partition(" ")
    if scheme.lower() != SCHEME.lower():
        return [], ""
    fields = text.strip().split(".")
    return fields[:_FIELDS], ".".join(fields[_FIELDS:])


def whole_proof(token: str, request: Signed, status: int, body: bytes) -> str:
    """Return the value of the PROOF header of a response whose body is `body`."""
    return f"{_WHOLE} {answer_mac(token, request.mac, status, digest(body))}"


def stream_proof(token: str, request: Signed, status: int) -> str:
    """Return the value of the PROOF header of a response whose body ends with the body's signature."""
    return f"{_STREAM} {answer_mac(token, request.mac, status, _STREAM)}"


def answer_mac(token: str, request_mac: str, status: int, body: str) -> str:
    """Return the signature of a response. `body` is the SHA-256 of the response's body."""
    return _mac(token, "batchlab answer", request_mac, str(status), body)


class Expected:
    """Check of the signature of one response. The check raises Unproven if the signature is not valid."""

    def __init__(self, token: str, request: Signed, status: int, proof: str | None) -> None:
        self._token = token
        self._request_mac = request.mac
        self._status = status
        kind, _, self._proof = (proof or "").partition(" ")
        self._is_stream = kind == _STREAM
        if kind not in (_WHOLE, _STREAM):
            raise Unproven
        if self._is_stream and not _same(self._proof, self._mac(_STREAM)):
            raise Unproven

    def check_answer(self, content: bytes) -> bytes:
        """Return the body of a response from its complete content, after checking the signature."""
        body, proof = content, self._proof
        if self._is_stream:
            body = content[:-MAC_BYTES]
            proof = content[-MAC_BYTES:].decode("ascii", "replace")
        if not _same(proof, self._mac(digest(body))):
            raise Unproven
        return body

    def _mac(self, body: str) -> str:
        return answer_mac(self._token, self._request_mac, self._status, body)


def _request_mac(token: str, method: str, target: str, at_s: int, nonce: str, body: str) -> str:
    return _mac(token, "batchlab request", method, target, str(at_s), nonce, body)


def _mac(token: str, *fields: str) -> str:
    # The length of each field precedes the field, so that two different lists of fields never form the same text.
    text = "".join(f"{len(field)}:{field}" for field in fields)
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def _same(mac: str, expected: str) -> bool:
    # Compare in constant time, so that the duration of the comparison does not reveal a part of the signature.
    return hmac.compare_digest(mac.encode(errors="replace"), expected.encode())
