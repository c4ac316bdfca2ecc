"""Pool of HTTP connections to one host.

Invariant: a connection has one user at a time, and a connection that its server has closed is not
used again. The module needs the standard library only and is cheap to import, because every command
imports it.
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
        """Create an empty pool.

        `host` may contain a port. `unix` is the path of the host's Unix socket. A connection that
        was idle for `idle_s` is not used again, because some servers close idle connections, and a
        request at that moment fails.
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
        """Close the idle connections. Connections in use are closed when they are given back."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # other threads take connections too
            while True:
                self._idle.pop()[1].close()

    def take(self) -> HTTPConnection:
        """Return an open connection. Raise OSError if the host does not answer.

        The caller closes it or gives it back. The caller also sets the timeout of its socket, which
        is `connect_s` or the last user's.
        """
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
        """Keep the connection for the next user.

        Its last response must have been read to the end, and must not have announced that the
        server closes the connection.
        """
        self._idle.append((time.monotonic(), connection))
        # the check follows the append, so a connection returned during `close` is closed too
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


def _is_open(kept: HTTPConnection) -> bool:
    if not kept.sock:
        return False
    # An idle connection is readable only if its server has closed it.
    look = select.poll()  # select() supports only about a thousand descriptors
    look.register(kept.sock, select.POLLIN)
    return not look.poll(0)
