"""A proxy that changes the answers of S3 and SQS, to test that the conformance checks notice the changes."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}


@dataclass
class Request:
    """A client's request. `action` is the name of the SQS action, and is empty for S3."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def action(self) -> str:
        return self.headers.get("x-amz-target", "").rpartition(".")[2]

    @property
    def query(self) -> str:
        return urlsplit(self.path).query

    @property
    def is_object(self) -> bool:
        """Return whether the request is about one object of S3."""
        return not self.action and urlsplit(self.path).path.count("/") >= 2

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @json.setter
    def json(self, value: dict[str, Any]) -> None:
        self.body = json.dumps(value).encode()


@dataclass
class Response:
    """An answer to a client."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Send = Callable[[Request], Response]
Sabotage = Callable[[Request, Send], Response]
"""A function that answers a request, either by forwarding it or by itself."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        kept = {name: value for name, value in headers.items() if name not in _HOP}
        request = Request(self.command, self.path, kept, body)
        response = self.server.sabotage(request, self.server.send)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - named by http.server

    def log_message(self, *_: object) -> None:
        return


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, sabotage: Sabotage) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._upstream = urlsplit(upstream).netloc
        self.sabotage = sabotage

    def send(self, request: Request) -> Response:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            answer = connection.getresponse()
            headers = dict(answer.getheaders())
            if request.method != "HEAD":
                headers = {n: v for n, v in headers.items() if n.lower() not in _HOP}
            return Response(answer.status, answer.read(), headers)
        finally:
            connection.close()

    def handle_error(self, *_: object) -> None:
        # Ignore a client that has closed its connection.
        return


@contextmanager
def proxy(upstream: str, sabotage: Sabotage) -> Iterator[str]:
    """Start a proxy of `upstream` that applies the sabotage, and yield the proxy's address."""
    server = _Proxy(upstream, sabotage)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
