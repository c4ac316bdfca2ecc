"""A receiver of traces (OTLP over HTTP) that stores the spans."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.http_proxy import Listening


@dataclass(frozen=True)
class Received:
    """A received span. Times are nanoseconds since the epoch."""

    name: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    kind: int
    error: str
    service: str
    process: str
    attributes: dict[str, Any] = field(hash=False)
    links: tuple[str, ...] = ()


class Receiver(Listening):
    """A context manager that receives spans. `url` is the value for OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self._spans: list[Received] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                receiver.take(body, dict(self.headers))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Write no log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes, headers: dict[str, str]) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self.headers.append(headers)
            for resource in request.resource_spans:
                own = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [_received(span, own) for span in scope.spans]

    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._spans)

    def until(self, enough: Callable[[list[Received]], object], *, within_s: float = 20.0) -> list[Received]:
        """Return the received spans, as soon as `enough` returns true."""
        end_s = time.monotonic() + within_s
        while not enough(found := self.spans()):
            assert time.monotonic() < end_s, sorted(one.name for one in found)
            time.sleep(0.05)
        return found


def _received(span: Any, resource: dict[str, str]) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.kind,
        span.status.message if span.status.code == 2 else "",
        resource["service.name"],
        resource["service.instance.id"],
        {attribute.key: _value(attribute.value) for attribute in span.attributes},
        tuple(link.span_id.hex() for link in span.links),
    )


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def named(spans: Iterable[Received], name: str, **attributes: Any) -> list[Received]:
    """Return the spans of that name with these attributes. The prefix `batchlab.` is added to each attribute name."""
    wanted = {f"batchlab.{key.replace('__', '.')}": value for key, value in attributes.items()}
    return [span for span in spans if span.name == name and wanted.items() <= span.attributes.items()]
