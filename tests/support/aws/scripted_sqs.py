"""A server of SQS's protocol with answers that a test chooses, including answers that emulators do not return."""

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
"""A function from an operation and its parameters to the status and the body of the answer."""


def refusal(code: str, status: int = 400, message: str = "No.") -> Answer:
    """Return an error in SQS's format."""
    return status, {"__type": f"com.amazonaws.sqs#{code}", "message": message}


@contextmanager
def scripted(script: Script) -> Iterator[tuple[Endpoint, list[tuple[str, dict[str, Any]]]]]:
    """Start the server, and yield its endpoint and the list of received calls. The server answers GetQueueUrl without
    the script."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        # HTTP/1.0 closes the connection after each answer. A connection that is kept alive stays open as long as an
        # exception references its response, and the server's shutdown would wait for it.
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
        # The maximum number of connections that wait to be accepted. With the default of 5, further connections are
        # delayed by retries.
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
