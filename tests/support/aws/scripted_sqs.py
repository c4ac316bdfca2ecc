"""A server of SQS's protocol that returns the answers that a test chooses, also ones that no
emulator returns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from batchlab.adapters.aws.endpoint import Endpoint

Answer = tuple[int, dict[str, Any] | str]
Script = Callable[[str, dict[str, Any]], Answer]
"""From an operation and its parameters to a status and a body."""


def refusal(code: str, status: int = 400, message: str = "No.") -> Answer:
    """An error as SQS words it."""
    return status, {"__type": f"com.amazonaws.sqs#{code}", "message": message}


@contextmanager
def scripted(script: Script) -> Iterator[tuple[Endpoint, list[tuple[str, dict[str, Any]]]]]:
    """Its endpoint, and the calls it gets; queues are found without the script."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0 closes the connection after each answer. One that is kept alive stays open for
        # as long as an exception holds its response, and the server's end waits for it.
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            operation = self.headers["X-Amz-Target"].rpartition(".")[2]
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if operation == "GetQueueUrl":
                self._answer(200, {"QueueUrl": f"http://sqs/1/{sent['QueueName']}"})
                return
            sent["authorization"] = self.headers["Authorization"]
            sent["token"] = self.headers["X-Amz-Security-Token"]
            calls.append((operation, sent))
            self._answer(*script(operation, sent))

        def _answer(self, status: int, body: dict[str, Any] | str) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False
        # Of connections that nobody has accepted yet: beyond 5, the default, they are tried again.
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}"), calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
