"""A proxy for PostgreSQL that cuts a connection before or after the next COMMIT."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto

_COMMIT = b"COMMIT\0"


class Cut(Enum):
    """The fate of the next COMMIT that passes the proxy."""

    BEFORE = auto()
    """The COMMIT and its connection are lost before the server receives the COMMIT."""
    AFTER = auto()
    """The server performs the COMMIT, and its answer is lost with the connection."""
    SILENT = auto()
    """The COMMIT is lost, but the connection stays open, so both sides wait."""


class Wire:
    """A TCP proxy in front of a server on 127.0.0.1."""

    def __init__(self, to_port: int) -> None:
        self.cut: Cut | None = None
        """The cut of the next COMMIT. After the cut, the value is None again."""
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Close the proxy and all of its connections."""
        # A thread that waits for a connection does not notice that its socket was closed.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for one in self._sockets:
            _hang_up(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to_port))
            self._sockets += [client, server]
            quiet = threading.Event()
            for target, args in ((self._ask, (client, server, quiet)), (self._answer, (client, server, quiet))):
                thread = threading.Thread(target=target, args=args)
                self._threads.append(thread)
                thread.start()

    def _ask(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if _COMMIT in data and self.cut:
                    cut, self.cut = self.cut, None
                    if cut is Cut.SILENT:
                        return
                    lost.set()
                    if cut is Cut.AFTER:
                        server.sendall(data)
                        return  # the client that waits for the answer closes the connection
                    break
                server.sendall(data)
        _hang_up(client)
        _hang_up(server)

    def _answer(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if lost.is_set():
                    break
                client.sendall(data)
        _hang_up(client)
        _hang_up(server)


def _hang_up(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire_to(port: int) -> Iterator[Wire]:
    """Start a proxy to that port, without a cut."""
    wire = Wire(port)
    try:
        yield wire
    finally:
        wire.close()
