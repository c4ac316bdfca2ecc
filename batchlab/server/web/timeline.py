"""Drawing of a timeline of bundles: positions of lanes, bars, and the time axis.

Invariant: all positions are within the drawing, whatever a worker reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.api_types import BarView, LaneView, TimelineView
from batchlab.core.text import span
from batchlab.reports.html.charts import Tick, time_ticks
from batchlab.server.web import text

WIDTH = 100.0
"""Width of the time axis. Positions on the time axis are percentages, because the width of the page is unknown."""
BAR, GAP = 11, 5
"""Height of a row of bars, and the gap between two lanes, in pixels."""
LEAST = 0.15
"""Minimum width of a bar, so that a short bundle is visible."""
KEYS = (
    ("succeeded", "succeeded"),
    ("running", "running"),
    ("retried", "failed and retried"),
    ("failed", "failed"),
    ("cancelled", "canceled"),
)
"""States of bars with their names, in the order of the legend."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its position and width on the time axis, its upper edge in pixels, and its tooltip."""

    look: str
    x: float
    y: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A worker with the upper edge and the height of its lane in pixels."""

    worker: str
    y: float
    height: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A timeline as it is drawn. `height` is in pixels."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    height: float
    keys: tuple[tuple[str, str], ...]
    left_out: int
    """Number of workers without a lane."""
    merged_s: float
    description: str


def draw(view: TimelineView) -> Drawing:
    """Return the drawing of a timeline."""
    span_s = view["end_s"] - view["start_s"]
    lanes: list[Lane] = []
    y = float(GAP)
    for lane in view["lanes"]:
        height = float(lane["rows"] * BAR)
        lanes.append(_lane(lane, y, height, view["start_s"], span_s))
        y += height + GAP
    states = {bar["state"] for lane in view["lanes"] for bar in lane["bars"]}
    bundles = sum(bar["bundles"] for lane in view["lanes"] for bar in lane["bars"])
    keys = tuple(key for key in KEYS if key[0] in states)
    what = f"{text.count(bundles, 'bundle')} on {text.count(view['workers'], 'worker')} in {span(span_s)}"
    return Drawing(
        tuple(lanes), time_ticks(span_s), y, keys, view["workers"] - len(lanes), view["merged_s"], f"Timeline of {what}"
    )


def _lane(lane: LaneView, y: float, height: float, start_s: float, span_s: float) -> Lane:
    bars = []
    for bar in lane["bars"]:
        left = (bar["started_s"] - start_s) / span_s * WIDTH
        right = (bar["ended_s"] - start_s) / span_s * WIDTH
        width = max(right - left, LEAST)
        x = min(left, WIDTH - width)
        top = y + bar["row"] * BAR
        bars.append(Bar(bar["state"], round(x, 2), top, round(width, 2), _title(bar, start_s)))
    return Lane(lane["worker"], y, height, tuple(bars))


def _title(bar: BarView, start_s: float) -> str:
    state = dict(KEYS)[bar["state"]]
    when = f"{span(bar['ended_s'] - bar['started_s'])} from {span(bar['started_s'] - start_s)}"
    tasks = text.count(bar["tasks"], "task")
    if not bar["bundle"]:
        return f"{text.count(bar['bundles'], 'bundle')}, {tasks}, {when}, worst result: {state}"
    first = bar["bundle"].partition("-")[0].lstrip("0") or "0"
    again = f", attempt {bar['attempt']}" if bar["attempt"] > 1 else ""
    return f"{bar['stage']}/{first}, {tasks}{again}, {when}, {state}"
