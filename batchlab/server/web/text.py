"""Texts of the web page: the formats of `batchlab/core/text.py`, and formats of states, progress bars, and times.

Invariant: the functions in the module are pure, and the returned HTML contains only escaped values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from markupsafe import Markup, escape

from batchlab.core.api_types import EtaView, JobView, StageView
from batchlab.core.pricing.bill import DIGITS
from batchlab.core.pricing.price_book import Usd
from batchlab.core.text import count as count
from batchlab.core.text import size as core_size
from batchlab.core.text import span as core_span
from batchlab.reports.html.source import visible as visible

_TICKS = re.compile(r"`([^`]+)`")
_TONES = {
    "RUNNING": "primary",
    "STARTING": "info",
    "SUCCEEDED": "success",
    "FAILED": "danger",
    "PAUSED": "warning",
    "InService": "success",
    "Pending": "info",
    "Terminated": "secondary",
    "Successful": "success",
    "Failed": "danger",
    "InProgress": "info",
    "REFUSED": "danger",
    "active": "success",
    "running": "primary",
    "paused": "warning",
    "CANCELLED": "secondary",
    "WAITING": "secondary",
    "RETRIED": "warning",
}


def tone(state: str) -> str:
    """Return the Bootstrap color of a state."""
    return _TONES.get(state, "warning" if state.startswith("Terminating") else "info")


def span(seconds: float | None) -> str:
    """Return a duration, or "–" for None."""
    return "–" if seconds is None else core_span(seconds)


def size(size_bytes: float | None) -> str:
    """Return a size, or "–" for None."""
    return "–" if size_bytes is None else core_size(size_bytes)


def number(value: float | None) -> str:
    """Return a number in the form 1,234,567, or "–" for None."""
    return "–" if value is None else f"{value:,.0f}"


def amount(usd: Usd) -> tuple[str, str]:
    """Return the most likely amount and the range of the amount as texts. The range of a certain amount is ""."""
    text, _, between = str(usd).partition(" (")
    return text, between.removesuffix(")")


def exactly(usd: Usd) -> tuple[Markup, str]:
    """Return an amount as `amount` does, with all digits of the most likely amount for programs."""
    shown, between = amount(usd)
    return Markup('<data value="{}">{}</data>').format(f"{usd.typical:.{DIGITS}f}", shown), between


def to_go(view: EtaView) -> tuple[str, str]:
    """Return the remaining time of a job as text, and a remark about the remaining time."""
    if view["low_s"] is None or view["high_s"] is None:
        return "–", view["text"].removeprefix("unknown: ")
    time, _, remark = view["text"].partition("; ")
    return time.removesuffix(" left"), remark


def when(at_s: float | None, *, unless: str = "", before: str = "") -> Markup:
    """Return a time as an element that the browser shows in the reader's time zone, after the text `before`. The
    browser hides the element if the reader's time zone is `unless`.
    """
    if at_s is None:
        return Markup("–")
    at = datetime.fromtimestamp(at_s, UTC)
    machine, shown = at.isoformat(timespec="seconds"), at.strftime("%Y-%m-%d %H:%M:%S UTC")
    if not unless:
        return Markup('<local-time datetime="{}">{}</local-time>').format(machine, shown)
    return Markup('<local-time unless="{}" before="{}" datetime="{}">{}{}</local-time>').format(
        unless, before, machine, before, shown
    )


def ticks(text: str) -> Markup:
    """Return the sentence as HTML, with each command in backticks as code."""
    return Markup(_TICKS.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - the text is escaped


def query(fields: Mapping[str, str], **changes: str) -> str:
    """Return the query of a URL with the fields after the changes. A field without a value is left out."""
    given = {name: value for name, value in {**fields, **changes}.items() if value}
    return f"?{urlencode(given)}" if given else ""


def path(text: object) -> str:
    """Return a name, quoted as a segment of a URL path."""
    return quote(str(text), safe="")


# --- Progress -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a progress bar. `start` and `width` are percentages of the bar."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of tasks. `planned` is None if the number of planned tasks is not known yet."""

    planned: int | None
    succeeded: int
    failed: int
    cancelled: int
    running: int
    is_open: bool = False
    """Whether more tasks may be planned."""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled

    def of(self, state: str) -> int:
        """Return the number of tasks in a state, or of all tasks for "". Tasks that are not planned do not count."""
        known = max(self.planned or 0, self.ended + self.running)
        if state == "waiting":
            return known - self.ended - self.running
        count: int = getattr(self, state) if state else known
        return count

    @property
    def percent(self) -> int:
        """Return the percentage of planned tasks that have ended. The percentage of ended tasks is rounded down."""
        planned = max(self.planned or 0, self.ended)
        return self.ended * 100 // planned if planned else 0

    @property
    def parts(self) -> list[Part]:
        """Return the parts of the progress bar. Each part of the bar is wide enough to be visible."""
        whole = max(self.planned or 0, self.ended + self.running, 1)
        parts: list[Part] = []
        at = 0.0
        for kind in ("succeeded", "failed", "cancelled", "running"):
            tasks: int = getattr(self, kind)
            if tasks:
                width = min(max(tasks * 100 / whole, 0.6), 100 - at)
                parts.append(Part(kind, round(at, 3), round(width, 3)))
                at += width
        return parts

    @property
    def description(self) -> str:
        """Return the progress as text, for screen readers."""
        of = "?" if self.planned is None else str(self.planned)
        return (
            f"{self.ended} of {of}{'+' if self.is_open else ''} tasks ended: "
            f"{self.succeeded} succeeded, {self.failed} failed, "
            f"{self.cancelled} canceled, {self.running} running"
        )


def of_stage(stage: StageView) -> Progress:
    """Return the progress of one stage."""
    return Progress(stage["planned"], stage["succeeded"], stage["failed"], stage["cancelled"], stage["running"])


def of_job(job: JobView) -> Progress:
    """Return the progress of all stages of a job."""
    return of_stages(job["stages"])


def of_stages(views: Sequence[StageView]) -> Progress:
    """Return the progress of several stages together."""
    stages = [of_stage(stage) for stage in views]
    return Progress(
        sum(progress.planned or 0 for progress in stages),
        sum(progress.succeeded for progress in stages),
        sum(progress.failed for progress in stages),
        sum(progress.cancelled for progress in stages),
        sum(progress.running for progress in stages),
        is_open=any(progress.planned is None for progress in stages),
    )


def took_s(job: JobView, now_s: float) -> float | None:
    """Return the seconds from the start of the job's first task to the job's end, or to `now_s`.

    Return None before the job's first task starts.
    """
    if job["started_s"] is None:
        return None
    return (job["ended_s"] or now_s) - job["started_s"]
