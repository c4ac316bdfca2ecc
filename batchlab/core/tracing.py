"""The seam to a tracer: what began and ended, for which job, and below what.

Invariants: a job that is not traced costs a look at an empty text; what is handed from process to
process is a W3C traceparent and nothing else; no tracer ever makes the work fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

from batchlab.core.model import Bundle, JobId

Attribute = str | int | float | bool
"""A value that a span may have beside its times."""

LINKS = 32
"""Spans of a stage that a gather is linked to at the most."""
_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Subject(NamedTuple):
    """What a span is about that is about no bundle."""

    job: JobId
    stage: str = ""


class Span(Protocol):
    """Something that has begun."""

    @property
    def context(self) -> str:
        """The traceparent of what comes below it; "" where the job is not traced."""

    def note(self, **attributes: Attribute) -> None:
        """Say more of it, before its end."""

    def end(self, *, error: str = "") -> None:
        """It has ended; `error` names what kind of error did that."""


class Tracer(Protocol):
    """Where spans go. Times are seconds of the epoch; without one it is now."""

    def root(self, name: str, about: Subject, *, parent: str = "") -> Span:
        """Begin a job's trace, below `parent` where the submitter has one that is valid. Whether
        the job is traced is decided here, once: where not, the span's context is empty."""

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
        """Begin a span below `parent`; nothing happens where that is empty."""

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
        """A span that has ended already; its context."""

    async def close(self) -> None:
        """Hand over what is left, within seconds."""


class _Untraced:
    """Stands for a span where nobody records any: what is below goes below its parent."""

    __slots__ = ("context",)

    def __init__(self, context: str) -> None:
        self.context = context

    def note(self, **attributes: Attribute) -> None:
        """Nobody hears it."""

    def end(self, *, error: str = "") -> None:
        """Likewise."""


NO_SPAN: Span = _Untraced("")


class _Nobody:
    """The tracer of who has none. A context that has come along is passed on all the same."""

    def root(self, name: str, about: Subject, *, parent: str = "") -> Span:  # noqa: ARG002
        return NO_SPAN

    def begin(
        self,
        name: str,  # noqa: ARG002
        parent: str,
        about: Bundle | Subject,  # noqa: ARG002
        *,
        start_s: float | None = None,  # noqa: ARG002
        links: Sequence[str] = (),  # noqa: ARG002
        **attributes: Attribute,  # noqa: ARG002
    ) -> Span:
        return _Untraced(parent) if parent else NO_SPAN

    def record(
        self,
        name: str,  # noqa: ARG002
        parent: str,
        about: Bundle | Subject,  # noqa: ARG002
        *,
        start_s: float,  # noqa: ARG002
        end_s: float,  # noqa: ARG002
        error: str = "",  # noqa: ARG002
        **attributes: Attribute,  # noqa: ARG002
    ) -> str:
        return parent

    async def close(self) -> None:
        """There is nothing."""


NOBODY: Tracer = _Nobody()


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
    """A span for a block; an exception ends it too, and is named."""
    if not parent:
        return _OFF  # most jobs are not traced
    return ending(tracer.begin(name, parent, about, start_s=start_s, links=links, **attributes))


@contextmanager
def ending(made: Span) -> Iterator[Span]:
    """A span that ends with the block."""
    try:
        yield made
    except BaseException as error:
        made.end(error=type(error).__name__)
        raise
    made.end()


def is_context(text: str) -> bool:
    """Whether it is a traceparent that can be gone on from."""
    return _PARENT.fullmatch(text) is not None


def trace_of(context: str) -> str:
    """The trace's id in a traceparent, 32 hexadecimal digits; "" where there is none."""
    return context[3:35]
