"""Step plots over time as SVG text. The panels are below one another, and each panel has axes, units, and a legend.

The colors follow the reader's preference for light or dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_Scale = Callable[[float], float]

WIDTH, LEFT, RIGHT = 860, 56, 16
TITLE, KEY, FOOT = 24, 18, 34

STYLE = """\
text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600;font-size:13px}
.g{stroke:#8884;fill:none}.a{stroke:#888;fill:none}.s{fill:none;stroke-width:2}
.c0{stroke:#0969da}.c1{stroke:#cf222e}.c2{stroke:#1a7f37}.c3{stroke:#8250df}
.d{stroke-dasharray:5 4}
@media(prefers-color-scheme:dark){text{fill:#ddd}
.c0{stroke:#58a6ff}.c1{stroke:#ff7b72}.c2{stroke:#3fb950}.c3{stroke:#bc8cff}}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Line of a step plot.

    The value of a point (time, value) stays constant until the next point. `colour` is 0 to 3.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Panel of a step plot, with lines over a time in seconds. `unit` is the unit of the vertical axis."""

    title: str
    unit: str
    lines: Sequence[Line]
    height: int = 130


def svg(panels: Sequence[Panel], label: str) -> str:
    """Return the picture with all panels as SVG. `label` is the text of the picture for screen readers."""
    body, top = [], 0
    for panel in panels:
        body.append(f'<g transform="translate(0 {top})">{_panel(panel)}</g>')
        top += TITLE + KEY + panel.height + FOOT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
        f'width="{WIDTH}" height="{top}" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>"]) + "\n"


def _panel(panel: Panel) -> str:
    top, bottom = TITLE + KEY, TITLE + KEY + panel.height
    points = [point for line in panel.lines for point in line.points]
    start, end = min(at for at, _ in points), max(at for at, _ in points)
    most = max(1.0, max(value for _, value in points))

    def x(at: float) -> float:
        return LEFT + (at - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - value / (most * 1.05) * panel.height

    parts = [f'<text class="t" x="{LEFT}" y="16">{escape(panel.title)}</text>']
    for value in _ticks(0.0, most, 4):
        parts.append(f'<path class="g" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:,g}", "end"))
    for at in _ticks(start, end, 10):
        parts.append(f'<path class="a" d="M{x(at):.1f} {bottom}v4"/>')
        parts.append(_text(x(at), bottom + 16, f"{at:g} s"))
    parts.append(f'<path class="a" d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}"/>')
    middle = (top + bottom) / 2
    parts.append(
        f'<text transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">{escape(panel.unit)}</text>'
    )
    for n, line in enumerate(panel.lines):
        look = f"s c{line.colour}{' d' if line.dashed else ''}"
        at = LEFT + n * (WIDTH - LEFT) / 4
        parts.append(f'<path class="{look}" d="M{at:g} 32h20"/>')
        parts.append(_text(at + 26, 36, line.name, "start"))
        parts.append(f'<path class="{look}" d="{_path(line.points, x, y)}"/>')
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    """Return the data of an SVG path with a point at each change of the value."""
    first, value = points[0]
    drawn = [f"M{x(first):.1f} {y(value):.1f}"]
    for at, new in points[1:]:
        if new != value:
            drawn.append(f"H{x(at):.1f}V{y(new):.1f}")
            value = new
    drawn.append(f"H{x(points[-1][0]):.1f}")
    return "".join(drawn)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(first: float, last: float, about: int) -> list[float]:
    """Return about `about` round numbers between `first` and `last`, for the ticks of an axis."""
    rough = (last - first) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(1.0, next(power * n for n in (1, 2, 5, 10) if power * n >= rough))
    return [n * step for n in range(math.ceil(first / step), math.floor(last / step) + 1)]
