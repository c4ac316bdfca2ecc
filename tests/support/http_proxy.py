"""HTTP servers on 127.0.0.1 that answer themselves or forward requests to another server."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

from batchlab.core import http_connections

_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


@dataclass(frozen=True)
class Request:
    """A received request. `path` includes the query. `headers` keep the names as the client sent them."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def header(self, name: str) -> str:
        """Return the value of a header, or "" if the header is missing. The case of the name does not matter."""
        wanted = name.lower()
        return next((v for n, v in self.headers.items() if n.lower() == wanted), "")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def proven(token: str, request: Request, answer: Answer) -> Answer:
    """Sign the answer as a manager with that token does. If the request is not signed, the answer stays unsigned."""
    given = request.header("Authorization")
    signed = http_connections.read(token, given, request.method, request.path)
    if signed is None:
        return answer
    proof = http_connections.whole_proof(token, signed, answer.status, answer.body)
    return replace(answer, headers=[*answer.headers, (http_connections.PROOF, proof)])


class Listening:
    """A server that answers in its own thread while the context is active."""

    _server: ThreadingHTTPServer

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Server(Protocol):
    def answer(self, request: Request) -> Answer:
        """Answer a request. The method is called in any thread."""


class Front(Server, Protocol):
    target: str
    """The URL of the server to forward to."""


def forward(target: str, request: Request) -> Answer:
    """Forward the request unchanged to the server at `target`, and return its answer. The Host header stays unchanged
    too, because a signature may cover it."""
    parts = urlsplit(target)
    host = parts.hostname or ""
    with closing(
        # The test's own server has a certificate that no authority has signed.
        HTTPSConnection(host, parts.port, timeout=60, context=ssl._create_unverified_context())
        if parts.scheme == "https"
        else HTTPConnection(host, parts.port, timeout=60)
    ) as connection:
        connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in _HOP:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders(request.body)
        found = connection.getresponse()
        kept = [(name, value) for name, value in found.getheaders() if name.lower() not in _HOP]
        if request.method == "HEAD" and (length := found.getheader("Content-Length")):
            kept.append(("Content-Length", length))
        return Answer(found.status, kept, found.read())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, front: Server, *arguments: object) -> None:
        self._front = front
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = dict(self.headers.items())
        answer = self._front.answer(Request(self.command, self.path, headers, body))
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815 - their names

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def standing(front: Server) -> Iterator[str]:
    """Start the server, and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, front))
    server.daemon_threads = True
    serving = threading.Thread(target=server.serve_forever, args=(0.02,))
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
