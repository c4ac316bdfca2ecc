"""Charts as paths, marks, and labels, which the template of the page draws as SVG.

Invariants: the size of a chart is independent of the size of the run. A chart has at most as many shapes as bins or
lanes. Each chart has a table with the data of the chart. Every tick is on its axis, and the labels of an axis differ
from each other.

The plot of a chart is 1,000 units wide and is stretched to the page's width. Heights are in pixels. Labels are outside
the plot, so stretching does not distort text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_TICKS = 7
"""Maximum number of ticks of a time axis."""
_TIMES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
)
"""Round steps between the ticks of a time axis."""
_POWERS_S = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0, 360000.0)
"""Tick positions of a logarithmic time axis."""
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (0.001, "ms"), (1e-6, "µs"))


_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True)
class Tick:
    """Tick of an axis. `at` is the tick's position on the axis, from 0 to 1."""

    at: float
    label: str


def time_label(seconds: float, unit_s: float = 0.0) -> str:
    """Return the label of a time, such as `90 s` or `1.5 h`.

    The label's unit has `unit_s` seconds. If `unit_s` is 0, the unit is the largest unit that is not longer than the
    time.
    """
    if not seconds:
        return "0"
    if not unit_s:
        unit_s = next((u for u, _ in _UNITS if seconds >= u * 0.999), 1e-6)
    name = dict(_UNITS)[unit_s]
    return f"{seconds / unit_s:.6g} {name}"


def time_ticks(span_s: float) -> tuple[Tick, ...]:
    """Return the ticks of an axis from 0 to `span_s`: one tick at 0, and at most `MAX_TICKS` other ticks."""
    if span_s <= 0:
        return (Tick(0.0, "0"),)
    step_s = next((s for s in _TIMES_S if span_s / s <= MAX_TICKS), 0.0)
    if not step_s:
        step_s = 86400.0 * _step(span_s / 86400.0, MAX_TICKS)
    unit_s = next((u for u, _ in _UNITS if step_s >= u * 0.999), 1e-6)
    # Ticks at half hours have labels in hours, such as 0.5 h, 1 h, and 1.5 h.
    unit_s = 3600.0 if unit_s == 60.0 and step_s >= 1800 else unit_s
    number = int(span_s / step_s * (1 + 1e-9))
    return tuple(Tick(n * step_s / span_s, time_label(n * step_s, unit_s)) for n in range(number + 1))


def count_ticks(most: float, ticks: int = 4) -> tuple[float, tuple[Tick, ...]]:
    """Return the largest value of an integer axis that includes `most`, and the ticks of the axis from 0."""
    step = max(1.0, _step(max(most, 1.0), ticks))
    number = math.ceil(max(most, 1.0) / step * (1 - 1e-6))
    top = number * step
    return top, tuple(Tick(n / number, number_label(n * step)) for n in range(number + 1))


def number_label(number: float) -> str:
    """Return a short label of a number, such as `1,200`, `120k`, or `1.5M`."""
    if number >= 1e6:
        return f"{number / 1e6:.4g}M"
    if number >= 1e5:
        return f"{number / 1e3:.6g}k"
    return f"{number:,.6g}" if number % 1 else f"{number:,.0f}"


def size_label(size_bytes: float) -> str:
    """Return the label of a size, such as `500 KiB` or `2 GiB`."""
    power = min(len(_SIZE_UNITS) - 1, int(math.log(max(size_bytes, 1), 1024) + 1e-9))
    return f"{size_bytes / 1024**power:.6g} {_SIZE_UNITS[power]}"


@dataclass(frozen=True, slots=True)
class Scale:
    """Scale of a logarithmic axis, with `per_decade` bins for each power of ten.

    The ticks are at `powers`, or at `steps` if the axis is short. `label` returns the label of a value.
    """

    per_decade: int
    powers: Sequence[float]
    steps: Sequence[float]
    label: Callable[[float], str]


TIMES = Scale(6, _POWERS_S, _TIMES_S, time_label)
"""Scale of times in seconds."""
SIZES = Scale(
    24,
    [step * 1024**power for power in range(len(_SIZE_UNITS)) for step in (1, 10, 100)],
    [step * 1024**power for power in range(len(_SIZE_UNITS)) for step in (1, 2, 5, 10, 20, 50, 100, 200, 500)],
    size_label,
)
"""Scale of sizes in bytes, whose bins are narrow because the tasks of a stage often have similar sizes."""


@dataclass(frozen=True, slots=True)
class LogAxis:
    """Logarithmic axis with the bins `first` to `last`. Bin k starts at 10**(k / scale.per_decade)."""

    first: int
    last: int
    scale: Scale = TIMES

    @property
    def bins(self) -> int:
        return self.last - self.first + 1

    def edge(self, number: int) -> float:
        """Return the value at the start of a bin."""
        return float(10.0 ** (number / self.scale.per_decade))

    def at(self, value: float) -> float:
        """Return the position of a value on the axis, from 0 to 1. A value outside the axis gets the position of the
        nearest end.
        """
        if value <= 0:
            return 0.0
        place = (math.log10(value) * self.scale.per_decade - self.first) / self.bins
        return min(1.0, max(0.0, place))

    def ticks(self) -> tuple[Tick, ...]:
        """Return at most `MAX_TICKS` ticks."""
        low, high = self.edge(self.first), self.edge(self.last + 1)
        inside = [value for value in self.scale.powers if low * 0.999 <= value <= high * 1.001]
        if len(inside) < 3:
            inside = [value for value in self.scale.steps if low * 0.999 <= value <= high * 1.001]
        every = -(-len(inside) // MAX_TICKS) if inside else 1
        return tuple(Tick(self.at(value), self.scale.label(value)) for value in inside[::every])


def _step(span: float, most: int) -> float:
    """Return the smallest of the numbers 1, 2, 5, 10, … that divides `span` into at most `most` steps."""
    least = span / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


WIDTH = 1000.0
"""Width of every plot, in units of the plot."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Path in the plot's units. `look` is a CSS class, and `title` is the tooltip."""

    path: str
    look: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Marker on the time axis. `at` is the marker's position on the axis, from 0 to 1."""

    at: float
    look: str
    title: str


@dataclass(frozen=True, slots=True)
class Key:
    """Entry of a chart's legend."""

    look: str
    name: str


@dataclass(frozen=True, slots=True)
class Data:
    """Table of a chart or a section. A column whose name starts with `#` contains numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Chart that the page's template draws.

    `text` describes the chart. The template shows the text above the chart unless `quiet` is set. If `lanes` is True,
    the left axis shows names instead of numbers and is wider.
    """

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
    """Return a coordinate as text, rounded to a tenth, in the shortest form."""
    text = f"{value:.1f}"
    return (text[:-2] if text.endswith(".0") else text) if text != "-0.0" else "0"


def area(levels: Sequence[float], top: float, height: float) -> str:
    """Return the path of a filled area over bins of equal width, or "" if all levels are 0.

    `top` is the value of a level at the top edge of the plot.
    """
    if not any(levels):
        return ""
    return f"M0 {number(height)}{_steps(levels, top, height)}V{number(height)}Z"


def line(levels: Sequence[float | None], top: float, height: float) -> str:
    """Return the path of a line that steps from bin to bin. A level of None makes a gap in the line."""
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


def stack(layers: Sequence[Sequence[float]], top: float, height: float) -> list[str]:
    """Return one path for each layer, with the first layer at the bottom. The path of an empty layer is ""."""
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
    """Return the path of a histogram with gaps between its columns. A column above 0 is always high enough to be
    visible.
    """
    width = WIDTH / max(1, len(heights))
    path: list[str] = []
    for k, level in enumerate(heights):
        if level > 0:
            tall = max(1.5, level / top * height)
            path.append(_box(k * width + width * 0.06, height - tall, width * 0.88, tall))
    return "".join(path)


def box(left: float, right: float, top: float, height: float) -> str:
    """Return the path of a box between two positions from 0 to 1. A short box is always wide enough to be visible."""
    return _box(left * WIDTH, top, max(0.6, (right - left) * WIDTH), height)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h{number(-width)}Z"


def cells(runs: Iterable[tuple[int, int, float]], bins: int, height: float) -> str:
    """Return the path of cells with equal colors. Each entry of `runs` is (first bin, bin after the last bin, top of
    the lane).
    """
    width = WIDTH / bins
    return "".join(_box(first * width, top, (after - first) * width, height) for first, after, top in runs)
