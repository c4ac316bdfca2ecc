"""HTTP connections to one host, kept to be used again.

Invariant: a connection has one user at a time, and none is used again that its server has closed.
Standard library only, and cheap to import: every command pays for it.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections import deque
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


class Connections:
    """Connections to one host, usable from several threads."""

    def __init__(
        self,
        host: str,
        tls: ssl.SSLContext | None,
        *,
        connect_s: float,
        idle_s: float = math.inf,
        unix: str = "",
    ) -> None:
        """`host` may name a port; `unix` is the path of its Unix socket. What was idle for `idle_s`
        is not used again: for a server that closes such connections sooner or later, a request that
        meets this moment fails."""
        self._host = host
        self._tls = tls
        self._unix = unix
        self._connect_s = connect_s
        self._idle_s = idle_s
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        """When each was last used (monotonic), and the connection; the last used comes last."""
        self._closed = False

    def close(self) -> None:
        """Close the connections that nobody uses, and each of the others once it is given back."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # other threads take connections too
            while True:
                self._idle.pop()[1].close()

    def take(self) -> HTTPConnection:
        """One that is connected; OSError where nobody answers. Who takes it closes it or gives it
        back, and sets its socket's timeout, which is `connect_s` or the last user's."""
        with suppress(IndexError):  # other threads take connections too
            while True:
                used_s, kept = self._idle.pop()
                if time.monotonic() - used_s < self._idle_s and _is_open(kept):
                    return kept
                kept.close()
        made = self._made()
        try:
            made.connect()
        except BaseException:
            made.close()
            raise
        return made

    def _made(self) -> HTTPConnection:
        if self._unix:
            return _UnixConnection(self._unix, self._connect_s)
        if self._tls:
            return HTTPSConnection(self._host, timeout=self._connect_s, context=self._tls)
        return HTTPConnection(self._host, timeout=self._connect_s)

    def give_back(self, connection: HTTPConnection) -> None:
        """Keep it for the next user: its last answer has been read to the end, and has not said
        that the connection ends with it."""
        self._idle.append((time.monotonic(), connection))
        if self._closed:  # asked last, or one that is given back meanwhile would stay open
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


def _is_open(kept: HTTPConnection) -> bool:
    if not kept.sock:
        return False
    # What can be read before anything was asked is the connection's end.
    look = select.poll()  # not select(), which knows a thousand descriptors
    look.register(kept.sock, select.POLLIN)
    return not look.poll(0)
