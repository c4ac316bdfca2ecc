"""OpenTelemetry traces over OTLP, configured by OpenTelemetry's own environment variables.

Invariant: recording adds a span to a queue without waiting for the receiver. If the receiver of traces is down, spans
are lost, but the work continues. This module is imported only if an endpoint is configured, because the import of the
SDK is slow.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan

from batchlab import __version__
from batchlab.core.model import Bundle
from batchlab.core.tracing import NO_SPAN, Attribute, Span, Subject, is_context

CLOSE_S = 3.0
SEND_S = 1.0
"""Interval in seconds at which spans are sent, unless OTEL_BSP_SCHEDULE_DELAY is set.

A killed process loses the spans since the last interval.
"""
_KINDS = {
    "submit": SpanKind.SERVER,
    "send": SpanKind.PRODUCER,
    "forward": SpanKind.PRODUCER,
    "receive": SpanKind.CONSUMER,
    "fold": SpanKind.CONSUMER,
}


class _RecordedSpan:
    """The Span port over a span of OpenTelemetry."""

    __slots__ = ("_span", "context")

    def __init__(self, span: OtelSpan, parent: str) -> None:
        self._span = span
        at = span.get_span_context()
        # If the sampler has dropped a span, the parent's context replaces the span's context.
        self.context = f"00-{at.trace_id:032x}-{at.span_id:016x}-01" if span.is_recording() else parent

    def note(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_prefix(attributes))

    def end(self, *, error: str = "", end_s: float | None = None) -> None:
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.set_attribute("error.type", error)
        self._span.end(None if end_s is None else _ns(end_s))


class OtelTracer:
    """The Tracer port over OpenTelemetry.

    OTEL_SERVICE_NAME overrides `service`. `instance` names the process in the traces.
    """

    def __init__(self, service: str, instance: str) -> None:
        own = {SERVICE_INSTANCE_ID: instance, "service.version": __version__}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            own[SERVICE_NAME] = service
        # The SDK's own shutdown at exit would delay the exit of the process while the receiver is down.
        self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        delay_ms = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else SEND_S * 1000
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=delay_ms))
        self._tracer = self._provider.get_tracer("batchlab", __version__)
        # By default, the SDK logs each batch of spans that a receiver does not accept.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)

    def root(self, name: str, about: Subject, *, parent: str = "") -> Span:
        recorded = self._begin(name, parent if is_context(parent) else "", about, None, (), {})
        return recorded if recorded.context.endswith("-01") else NO_SPAN

    def begin(
        self,
        name: str,
        parent: str,
        about: Bundle | Subject,
        *,
        start_s: float | None = None,
        links: Sequence[str] = (),
        **attributes: Attribute,
    ) -> Span:
        if not is_context(parent):
            return NO_SPAN
        return self._begin(name, parent, about, start_s, links, attributes)

    def record(
        self,
        name: str,
        parent: str,
        about: Bundle | Subject,
        *,
        start_s: float,
        end_s: float,
        error: str = "",
        **attributes: Attribute,
    ) -> str:
        if not is_context(parent):
            return ""
        recorded = self._begin(name, parent, about, start_s, (), attributes)
        recorded.end(error=error, end_s=max(start_s, end_s))
        return recorded.context

    def _begin(
        self,
        name: str,
        parent: str,
        about: Bundle | Subject,
        start_s: float | None,
        links: Sequence[str],
        attributes: Mapping[str, Attribute],
    ) -> _RecordedSpan:
        # The context of a span starts empty, because other traces of this thread do not belong to batchlab.
        above = Context()
        if parent:
            above = set_span_in_context(NonRecordingSpan(_read(parent)), above)
        span = self._tracer.start_span(
            name,
            above,
            _KINDS.get(name, SpanKind.INTERNAL),
            {**_subject_attributes(about), **_prefix(attributes)},
            [Link(_read(link)) for link in links if is_context(link)],
            None if start_s is None else _ns(start_s),
        )
        return _RecordedSpan(span, parent)

    async def close(self) -> None:
        """Send the remaining spans in a thread, and wait for the thread for at most `CLOSE_S` seconds."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # The event loop is already closed.
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="last spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await done.wait()


def _read(context: str) -> SpanContext:
    _, trace, span, flags = context.split("-")
    return SpanContext(int(trace, 16), int(span, 16), True, TraceFlags(int(flags, 16)))


def _subject_attributes(about: Bundle | Subject) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {"batchlab.job": about.job}
    if about.stage:
        attributes["batchlab.stage"] = about.stage
    if isinstance(about, Bundle):
        attributes["batchlab.bundle"] = about.id
        attributes["batchlab.tasks"] = len(about.tasks)
        attributes["batchlab.task.first"] = about.tasks.first
        attributes["batchlab.task.last"] = about.tasks.last
        attributes["batchlab.attempt"] = about.attempt
        attributes["batchlab.round"] = about.round
    return attributes


def _prefix(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"batchlab.{name}": value for name, value in attributes.items()}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
