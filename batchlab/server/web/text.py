"""Texts of the web page: the formats of `batchlab/core/text.py`, and formats of states, progress bars, and times.

Invariant: the functions in the module are pure, and the returned HTML contains only escaped values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from markupsafe import Markup, escape

from batchlab.core.api_types import EtaView, JobView, StageView
from batchlab.core.pricing.price_book import DIGITS, Usd
from batchlab.core.text import count as count
from batchlab.core.text import significant
from batchlab.core.text import size as core_size
from batchlab.core.text import span as core_span
from batchlab.reports.html.source import visible as visible
from batchlab.reports.html.stage_graph import Progress as Progress

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
    "done": "success",
    "failed": "danger",
    "refused": "warning",
    "unknown": "warning",
    "allowed": "secondary",
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


def entered(usd: float | None) -> str:
    """Return a cap as the text in a form's field for an amount, or "" without a cap."""
    return "" if usd is None else significant(usd, DIGITS)


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
