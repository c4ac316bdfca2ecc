"""Axes: where their marks are and what these say.

Invariant: every mark lies on its axis, and no two of an axis say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST = 7
"""Marks that an axis of time has room for."""
_TIMES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
)
"""Steps that a person counts time in."""
_POWERS_S = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0, 360000.0)
"""Marks of a logarithmic axis of time."""
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (0.001, "ms"), (1e-6, "µs"))


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: `at` in [0, 1] of its length, and what it says."""

    at: float
    label: str


def time_label(seconds: float, unit_s: float = 0.0) -> str:
    """A time on an axis, such as `90 s` or `1.5 h`: in the unit that is `unit_s` long, or in the
    largest of which it has a whole one."""
    if not seconds:
        return "0"
    if not unit_s:
        unit_s = next((u for u, _ in _UNITS if seconds >= u * 0.999), 1e-6)
    name = dict(_UNITS)[unit_s]
    return f"{seconds / unit_s:.6g} {name}"


def time_ticks(span_s: float) -> tuple[Tick, ...]:
    """Marks of an axis of [0, `span_s`], at most `MOST` beside that at 0."""
    if span_s <= 0:
        return (Tick(0.0, "0"),)
    step_s = next((s for s in _TIMES_S if span_s / s <= MOST), 0.0)
    if not step_s:
        step_s = 86400.0 * _step(span_s / 86400.0, MOST)
    unit_s = next((u for u, _ in _UNITS if step_s >= u * 0.999), 1e-6)
    # Half hours are read as such, not as 30, 60 and 90 minutes, where the axis has hours.
    unit_s = 3600.0 if unit_s == 60.0 and step_s >= 1800 else unit_s
    number = int(span_s / step_s * (1 + 1e-9))
    return tuple(
        Tick(n * step_s / span_s, time_label(n * step_s, unit_s)) for n in range(number + 1)
    )


def count_ticks(most: float, ticks: int = 4) -> tuple[float, tuple[Tick, ...]]:
    """The top of an axis of whole numbers that has room for `most`, and its marks from 0 on."""
    step = max(1.0, _step(max(most, 1.0), ticks))
    number = math.ceil(max(most, 1.0) / step * (1 - 1e-6))
    top = number * step
    return top, tuple(Tick(n / number, number_label(n * step)) for n in range(number + 1))


def number_label(number: float) -> str:
    """A number in little room: `1,200`, `120k`, `1.5M`."""
    if number >= 1e6:
        return f"{number / 1e6:.4g}M"
    if number >= 1e5:
        return f"{number / 1e3:.6g}k"
    return f"{number:,.6g}" if number % 1 else f"{number:,.0f}"


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic axis of time in bins, `PER_DECADE` to a power of ten; bin k is from
    10**(k / PER_DECADE) seconds on, and the axis has the bins `first` to `last`."""

    PER_DECADE = 6

    first: int
    last: int

    @property
    def bins(self) -> int:
        return self.last - self.first + 1

    def edge_s(self, number: int) -> float:
        """Where bin `number` begins, in seconds."""
        return float(10.0 ** (number / self.PER_DECADE))

    def at(self, seconds: float) -> float:
        """Where a time lies in [0, 1]; at the edge where it lies beyond."""
        if seconds <= 0:
            return 0.0
        place = (math.log10(seconds) * self.PER_DECADE - self.first) / self.bins
        return min(1.0, max(0.0, place))

    def ticks(self) -> tuple[Tick, ...]:
        """Marks at powers of ten, or where these are few at other times; at most `MOST`."""
        low, high = self.edge_s(self.first), self.edge_s(self.last + 1)
        inside = [s for s in _POWERS_S if low * 0.999 <= s <= high * 1.001]
        if len(inside) < 3:
            inside = [s for s in _TIMES_S if low * 0.999 <= s <= high * 1.001]
        every = -(-len(inside) // MOST) if inside else 1
        return tuple(Tick(self.at(s), time_label(s)) for s in inside[::every])


def _step(span: float, most: int) -> float:
    """The least of 1, 2, 5, 10 … that goes into `span` at most `most` times."""
    least = span / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
