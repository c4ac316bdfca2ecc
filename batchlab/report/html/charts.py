"""Charts as geometry: paths, marks and words, which the page's template draws as SVG.

Invariant: a chart's size does not follow the size of the run; it has at most as many shapes as it
has bins or lanes, and always a table that says the same.

The plot is drawn 1,000 units wide and stretched to the page's width; heights are in pixels, and
what is written stands beside the plot, so that text is never stretched or shrunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchlab.report.html.scales import Tick

WIDTH = 1000.0
"""Of a plot, in its own units."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A path in the plot's units. `look` is a class of the style sheet, `title` what a pointer
    that rests on it is told."""

    path: str
    look: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A pointer on the time axis, `at` in [0, 1]."""

    at: float
    look: str
    title: str


@dataclass(frozen=True, slots=True)
class Key:
    """A line of the legend."""

    look: str
    name: str


@dataclass(frozen=True, slots=True)
class Data:
    """A table. A column whose name begins with `#` holds numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart for the template. `text` says in words what there is to see; of a `quiet` one it is
    not written above it. With `lanes` there are names on the left in place of numbers, and more
    room for them."""

    id: str
    title: str
    text: str
    height: float
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    shapes: tuple[Shape, ...]
    keys: tuple[Key, ...] = ()
    marks: tuple[Mark, ...] = ()
    data: Data | None = None
    lanes: bool = False
    quiet: bool = False


def number(value: float) -> str:
    """A coordinate to a tenth, as short as it can be written."""
    text = f"{value:.1f}"
    return (text[:-2] if text.endswith(".0") else text) if text != "-0.0" else "0"


def area(levels: Sequence[float], top: float, height: float) -> str:
    """Bins of equal width, filled from the axis up to a level each; `top` is the level at which
    the plot ends. Empty where there is nothing to fill."""
    if not any(levels):
        return ""
    return f"M0 {number(height)}{_steps(levels, top, height)}V{number(height)}Z"


def line(levels: Sequence[float | None], top: float, height: float) -> str:
    """The same as a line that steps from bin to bin, broken where there is no level."""
    width = WIDTH / max(1, len(levels))
    path: list[str] = []
    before: float | None = None
    for k, level in enumerate(levels):
        if level is not None:
            y = number(height - min(level, top) / top * height)
            if before is None:
                path.append(f"M{number(k * width)} {y}")
            elif level != before:
                path.append(f"V{y}")
            if k + 1 == len(levels) or levels[k + 1] != level:
                path.append(f"H{number((k + 1) * width)}")
        before = level
    return "".join(path)


def _steps(levels: Sequence[float], top: float, height: float) -> str:
    width = WIDTH / len(levels)
    path: list[str] = []
    for k, level in enumerate(levels):
        if k == 0 or level != levels[k - 1]:
            path.append(f"V{number(height - min(level, top) / top * height)}")
        if k + 1 == len(levels) or levels[k + 1] != level:
            path.append(f"H{number((k + 1) * width)}")
    return "".join(path)


def stacked(layers: Sequence[Sequence[float]], top: float, height: float) -> list[str]:
    """Areas on top of each other, the first at the bottom: a path each, empty for nothing."""
    below = [0.0] * (len(layers[0]) if layers else 0)
    paths: list[str] = []
    for levels in layers:
        above = [a + b for a, b in zip(below, levels, strict=True)]
        paths.append(_band(below, above, top, height) if any(levels) else "")
        below = above
    return paths


def _band(below: Sequence[float], above: Sequence[float], top: float, height: float) -> str:
    width = WIDTH / len(below)
    path = [f"M0 {number(height - min(below[0], top) / top * height)}", _steps(above, top, height)]
    for k in reversed(range(len(below))):
        y = number(height - min(below[k], top) / top * height)
        if k + 1 == len(below) or below[k + 1] != below[k]:
            path.append(f"V{y}")
        if k == 0 or below[k - 1] != below[k]:
            path.append(f"H{number(k * width)}")
    return f"{''.join(path)}Z"


def columns(heights: Sequence[float], top: float, height: float) -> str:
    """A histogram's columns, with a gap between them; what is not 0 is seen."""
    width = WIDTH / max(1, len(heights))
    path: list[str] = []
    for k, level in enumerate(heights):
        if level > 0:
            tall = max(1.5, level / top * height)
            path.append(_box(k * width + width * 0.06, height - tall, width * 0.88, tall))
    return "".join(path)


def box(left: float, right: float, top: float, height: float) -> str:
    """A box from `left` to `right`, in [0, 1] of the plot's width, at least as wide as is seen."""
    return _box(left * WIDTH, top, max(0.6, (right - left) * WIDTH), height)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h{number(-width)}Z"


def cells(runs: Iterable[tuple[int, int, float]], bins: int, height: float) -> str:
    """Cells of a lane that are alike: (first bin, bin after the last, top of the lane)."""
    width = WIDTH / bins
    return "".join(
        _box(first * width, top, (after - first) * width, height) for first, after, top in runs
    )
