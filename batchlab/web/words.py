"""How the page says things: durations, sizes, states, bars.

Invariant: pure; what is returned as markup holds only what was escaped here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from markupsafe import Markup, escape

from batchlab.views import EtaView, JobView, StageView

_TICKS = re.compile(r"`([^`]+)`")
_TONES = {
    "RUNNING": "primary",
    "STARTING": "info",
    "SUCCEEDED": "success",
    "FAILED": "danger",
    "CANCELLED": "secondary",
    "PAUSED": "warning",
    "InService": "success",
    "Pending": "info",
    "Terminated": "secondary",
    "Successful": "success",
    "Failed": "danger",
    "InProgress": "info",
    "succeeded": "success",
    "failed": "danger",
    "cancelled": "secondary",
}


def tone(state: str) -> str:
    """The colour of a state, among Bootstrap's."""
    return _TONES.get(state, "warning" if state.startswith("Terminating") else "info")


def span(seconds: float | None) -> str:
    """A duration: 0.3 ms, 40 ms, 3.2 s, 12 min 05 s, 3 h 20 min; "–" where there is none."""
    if seconds is None:
        return "–"
    seconds = max(0.0, seconds)
    if 0 < seconds < 0.00005:
        return "<0.1 ms"
    if 0 < seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def number(value: float | None) -> str:
    """A count with thin spaces between thousands; "–" where there is none."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def count(value: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number(value)} {noun}" + ("" if value == 1 else "s")


def to_go(view: EtaView) -> tuple[str, str]:
    """How long a job still takes, and what is to be said beside."""
    if view["low_s"] is None or view["high_s"] is None:
        return "–", view["text"].removeprefix("unknown: ")
    band, _, beside = view["text"].partition("; ")
    return band.removesuffix(" left"), beside


def when(at_s: float | None) -> Markup:
    """A moment, which the browser shows in its reader's zone."""
    if at_s is None:
        return Markup("–")
    at = datetime.fromtimestamp(at_s, UTC)
    machine, shown = at.isoformat(timespec="seconds"), at.strftime("%Y-%m-%d %H:%M:%S UTC")
    return Markup('<local-time datetime="{}">{}</local-time>').format(machine, shown)


def ticks(text: str) -> Markup:
    """A sentence with its `commands` set as code."""
    return Markup(_TICKS.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def path(text: object) -> str:
    """A name as one part of an address."""
    return quote(str(text), safe="")


# --- Progress -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar, in percent of its width."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far tasks have come; `planned` is None where the number is not known yet."""

    planned: int | None
    succeeded: int
    failed: int
    cancelled: int
    running: int
    is_open: bool = False
    """More may be planned."""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled

    @property
    def percent(self) -> int:
        """Of what is planned; 100 only where all has ended."""
        planned = max(self.planned or 0, self.ended)
        return self.ended * 100 // planned if planned else 0

    @property
    def parts(self) -> list[Part]:
        """The pieces of its bar, each wide enough to be seen."""
        whole = max(self.planned or 0, self.ended + self.running, 1)
        found: list[Part] = []
        at = 0.0
        for kind in ("succeeded", "failed", "cancelled", "running"):
            tasks: int = getattr(self, kind)
            if tasks:
                width = min(max(tasks * 100 / whole, 0.6), 100 - at)
                found.append(Part(kind, round(at, 3), round(width, 3)))
                at += width
        return found

    @property
    def told(self) -> str:
        """For who does not see the bar."""
        of = "?" if self.planned is None else str(self.planned)
        return (
            f"{self.ended} of {of}{'+' if self.is_open else ''} tasks ended: "
            f"{self.succeeded} succeeded, {self.failed} failed, {self.cancelled} cancelled; "
            f"{self.running} running"
        )


def of_stage(stage: StageView) -> Progress:
    """How far one stage has come."""
    return Progress(
        stage["planned"],
        stage["succeeded"],
        stage["failed"],
        stage["cancelled"],
        stage["running"],
    )


def of_job(job: JobView) -> Progress:
    """How far all of its stages have come together."""
    stages = [of_stage(stage) for stage in job["stages"]]
    return Progress(
        sum(one.planned or 0 for one in stages),
        sum(one.succeeded for one in stages),
        sum(one.failed for one in stages),
        sum(one.cancelled for one in stages),
        sum(one.running for one in stages),
        is_open=any(one.planned is None for one in stages),
    )


def took_s(job: JobView, now_s: float) -> float | None:
    """Seconds since its first task began, up to its end; None before."""
    if job["started_s"] is None:
        return None
    return (job["ended_s"] or now_s) - job["started_s"]
