"""A receiver of webhooks that returns the status codes of a test."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.http_proxy import Listening


@dataclass(frozen=True)
class Call:
    """One received POST request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def doc(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Hook(Listening):
    """A context manager. The receiver answers with each of `statuses` in turn, and repeats the last one."""

    def __init__(self, *statuses: int, wait_s: float = 0.0, tls: tuple[Path, Path] | None = None) -> None:
        self.statuses: Sequence[int] = statuses or (200,)
        self.wait_s = wait_s
        self.calls: list[Call] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                number = len(hook.calls)
                hook.calls.append(Call(self.path, dict(self.headers), body))
                time.sleep(hook.wait_s)
                status = hook.statuses[min(number, len(hook.statuses) - 1)]
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{hook.url}elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Write no log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme = "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.port = self._server.server_port
        self.url = f"{scheme}://127.0.0.1:{self.port}/"
