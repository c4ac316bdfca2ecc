"""Interface of tracers. A tracer records spans with their job and their parent span.

Invariants: for a job that is not traced, a call of a tracer only checks whether the trace context is empty. The only
trace data that processes send to each other is a W3C traceparent. An error in a tracer never causes a task or a job to
fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

from batchlab.core.model import Bundle, JobId

Attribute = str | int | float | bool
"""Type of a span's attributes."""

LINKS = 32
"""Maximum number of links from the span of a gather to spans of one upstream stage."""
_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Subject(NamedTuple):
    """Job, and optionally stage, of a span that does not belong to a bundle."""

    job: JobId
    stage: str = ""


class Span(Protocol):
    """A span that has begun."""

    @property
    def context(self) -> str:
        """W3C traceparent for child spans, or "" if the job is not traced."""

    def note(self, **attributes: Attribute) -> None:
        """Add attributes to the span before it ends."""

    def end(self, *, error: str = "") -> None:
        """End the span. `error` is the class name of the error that ended the span, or "" without an error."""


class Tracer(Protocol):
    """Receiver of spans. Times of spans are epoch seconds, by default the current time."""

    def root(self, name: str, about: Subject, *, parent: str = "") -> Span:
        """Begin the trace of a job, under the submitter's span `parent` if `parent` is valid.

        `root` decides once whether the job is traced. If the job is not traced, the context of the root span is empty.
        """

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
        """Begin a span under `parent`, or return a placeholder if `parent` is empty."""

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
        """Record a span that has already ended, and return its context."""

    async def close(self) -> None:
        """Send the remaining spans within a few seconds."""


class _Untraced:
    """Placeholder for a span that is not recorded. Children of the placeholder become children of its parent."""

    __slots__ = ("context",)

    def __init__(self, context: str) -> None:
        self.context = context

    def note(self, **attributes: Attribute) -> None:
        """Do nothing."""

    def end(self, *, error: str = "") -> None:
        """Do nothing."""


NO_SPAN: Span = _Untraced("")


class _NoTracer:
    """No-op tracer, which returns the context that it receives."""

    def root(self, *_args: object, **_more: object) -> Span:
        return NO_SPAN

    def begin(self, name: str, parent: str, *_args: object, **_more: object) -> Span:  # noqa: ARG002
        return _Untraced(parent) if parent else NO_SPAN

    def record(self, name: str, parent: str, *_args: object, **_more: object) -> str:  # noqa: ARG002
        return parent

    async def close(self) -> None:
        """Do nothing."""


NO_TRACER: Tracer = _NoTracer()


_OFF = nullcontext(NO_SPAN)


def span(
    tracer: Tracer,
    name: str,
    parent: str,
    about: Bundle | Subject,
    *,
    start_s: float | None = None,
    links: Sequence[str] = (),
    **attributes: Attribute,
) -> AbstractContextManager[Span]:
    """Return a span for a `with` block.

    If an exception ends the `with` block, the span records the exception's class name.
    """
    if not parent:
        return _OFF  # most jobs are not traced
    return ending(tracer.begin(name, parent, about, start_s=start_s, links=links, **attributes))


@contextmanager
def ending(open_span: Span) -> Iterator[Span]:
    """Return a span that ends with the `with` block."""
    try:
        yield open_span
    except BaseException as error:
        open_span.end(error=type(error).__name__)
        raise
    open_span.end()


def is_context(text: str) -> bool:
    """Return whether the text is a valid traceparent."""
    return _PARENT.fullmatch(text) is not None


def trace_of(context: str) -> str:
    """Return the trace id in a traceparent, as 32 hexadecimal digits, or "" if the traceparent is empty."""
    return context[3:35]
