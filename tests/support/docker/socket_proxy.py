"""A proxy for Docker's socket that a test can cut off."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

SOCKET = "/var/run/docker.sock"


class Proxy:
    """A proxy that forwards everything between `path` and Docker. `cut` closes all connections and rejects new ones."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self._path = path
        self._listener: socket.socket | None = None
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads:
            self.cut()

    def mend(self) -> None:
        """Start listening again."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._run(self._accept, self._listener)

    def cut(self) -> None:
        """Close all connections, and return when all are closed."""
        assert self._listener is not None
        self._path.unlink()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads.pop(0).join()
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):  # the other side closed the connection first
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()
        self._threads.clear()
        self._ends.clear()

    def _run(self, work: object, *args: socket.socket) -> None:
        assert callable(work)
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(SOCKET)
            self._ends += [near, far]
            self._run(_pump, near, far)
            self._run(_pump, far, near)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
