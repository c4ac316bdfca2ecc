"""Text charts of scenarios, and tables of verdicts.

The charts are plain text, so that a chart looks the same in a terminal, a pipe, and a ticket.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from math import ceil, log10

from batchlab.cli import output
from batchlab.core.pricing.price_book import shown
from batchlab.scenarios.model.expansion import Curve, PoolLoad
from batchlab.scenarios.model.values import LASTING_FAULTS, Fault, FaultName, Scenario
from batchlab.scenarios.verdicts import Color, Unit, VerdictRow

_BLOCKS, _LINE, _FLOOR, _MARKS = " ▁▂▃▄▅▆▇█", "┄", "─", "123456789abcdefghijklmnopqrstuvwxyz"
_PLAIN_BLOCKS, _PLAIN_LINE, _PLAIN_FLOOR = " ....::##", "-", "-"
_SEVERAL = "+"
_MARGIN = 8
_TALL = 10
_LOW = 4


def text(scenario: Scenario, curve: Curve, *, fancy: bool = True) -> str:
    """Return a chart of the arriving work for each pool, a chart of the jobs, and a list of the faults.

    If `fancy` is false, the text contains only ASCII characters.
    """
    width = len(curve.columns)
    column = span(curve.width_s)
    parts = []
    several = len(curve.asks) > 1
    for ask in curve.asks:
        of = f" of the pool {ask.pool}" if several else ""
        if not ask.peak:
            parts.append(f"No work{of} arrives.")
            continue
        title = f"Arriving work{of}, in slots that the work keeps busy; a column is {column}"
        lines = [title, chart(ask.busy, _TALL, fancy=fancy, line=ask.slots, says="the largest fleet")]
        if scenario.faults:
            lines.append(_fault_marks(width, scenario.faults, curve.width_s))
        parts.append("\n".join([*lines, _axis(curve.span_s, width), _compare_to_fleet(ask)]))
    jobs = [float(bucket.jobs) for bucket in curve.columns]
    parts.append(f"Jobs that arrive in {column}\n" + chart(jobs, _LOW, fancy=fancy) + "\n" + _axis(curve.span_s, width))
    if scenario.faults:
        lines = [f"  {_mark(i)}  {fault_text(fault)}" for i, fault in enumerate(scenario.faults)]
        parts.append("\n".join(["Faults", *lines]))
    return "\n\n".join(parts)


def chart(values: Sequence[float], rows: int, *, fancy: bool, line: float | None = None, says: str = "") -> str:
    """Return a column chart of the values, `rows` lines high, with a horizontal line at the value `line`."""
    peak = max(*values, 0.0, 1e-9)
    # A horizontal line far above all columns is not drawn, because the chart's scale would make the columns too low to
    # read.
    is_shown = line is not None and line <= 4 * peak
    top = _round(max(peak, line if is_shown and line else 0.0))
    step = top / rows
    at = None
    if is_shown and line is not None:
        at = min(rows - 1, max(0, ceil(line / step - 1e-9) - 1))
    lines = []
    for row in range(rows - 1, -1, -1):
        fill = _LINE if fancy else _PLAIN_LINE
        cells = "".join(_cell(value, row, step, fancy) for value in values)
        label = _number(top) if row == rows - 1 else ""
        if row == at and line is not None:
            label = _number(line)
            cells = cells.replace(" ", fill) + f" {says}"
        lines.append(f"{label:>{_MARGIN - 1}} {cells}".rstrip())
    lines.append(f"{'0':>{_MARGIN - 1}} {(_FLOOR if fancy else _PLAIN_FLOOR) * len(values)}")
    if line is not None and not is_shown:
        lines.insert(0, f"{'':{_MARGIN}}({says}: {_number(line)} slots, above this chart)")
    return "\n".join(lines)


def _cell(value: float, row: int, step: float, fancy: bool) -> str:
    blocks = _BLOCKS if fancy else _PLAIN_BLOCKS
    part = value / step - row
    if row == 0 and value > 0:
        part = max(part, 1 / 8)
    return blocks[max(0, min(8, round(part * 8)))]


def _round(top: float) -> float:
    """Return the smallest round number from `top` on, such as 1.5, 20, or 600, as the upper end of a chart's axis."""
    scale = 10.0 ** (ceil(log10(top)) - 1)
    return next(one * scale for one in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if one * scale >= top)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _fault_marks(width: int, faults: Sequence[Fault], width_s: float) -> str:
    cells = [" "] * width
    for i, fault in enumerate(faults):
        first = min(width - 1, int(fault.at_s / width_s))
        last = first
        if fault.name in LASTING_FAULTS:
            last = min(width - 1, max(first, ceil((fault.at_s + fault.for_s) / width_s) - 1))
        for at in range(first, last + 1):
            cells[at] = _SEVERAL if cells[at].strip() else _mark(i)
    return f"{'faults':>{_MARGIN - 1}} {''.join(cells)}".rstrip()


def _mark(number: int) -> str:
    return _MARKS[number] if number < len(_MARKS) else "*"


def span(seconds: float) -> str:
    """Return a duration as text without zero parts, such as "3 h" or "1 h 30 min"."""
    return re.sub(r" 0?0 (h|min|s)$|\.0(?= )", "", output.span(seconds))


def _axis(span_s: float, width: int) -> str:
    """Return a line of labels for the time axis of a chart. The line has as many labels as fit, but at most five."""
    line = [" "] * (width + 12)
    parts = max(1, min(4, width // 14))
    for part in range(parts + 1):
        start = width * part // parts
        label = span(span_s * start / width) if part else "0"
        line[start : start + len(label)] = label
    return f"{'':{_MARGIN}}{''.join(line)}".rstrip()


def _compare_to_fleet(ask: PoolLoad) -> str:
    peak, slots = _number(ask.peak), output.count(ask.slots, "slot")
    if ask.peak <= ask.slots:
        return f"The peak needs {peak} slots. The largest fleet has {slots}, so no work waits once the fleet is up."
    return (
        f"The peak needs {peak} slots. The largest fleet has {slots}, so work waits: at most {span(ask.behind_s)}, for "
        f"work that arrives about {span(ask.behind_at_s)} after the scenario's start. All work is done "
        f"{span(ask.idle_from_s)} after the start or later."
    )


def fault_text(fault: Fault) -> str:
    """Return a line of text that describes a fault of a scenario."""
    text = f"{span(fault.at_s)}: {fault.name.value}, {fault.name.meaning}"
    if fault.name in (FaultName.S3_ERRORS, FaultName.SQS_DUPLICATES, FaultName.SQS_DELAYS):
        text += f" ({fault.rate:.0%})"
    if fault.name is FaultName.ZONE_LOSS:
        text += f" (zone {fault.zone or 'a'})"
    if fault.name in (FaultName.KILL, FaultName.PAUSE, FaultName.PARTITION, FaultName.SPOT_WAVE, FaultName.SLOW_DISK):
        whose = f" of {fault.pool}" if fault.pool else ""
        many = f"{fault.share:.0%}" if fault.count is None else str(fault.count)
        text += f" ({many}{whose})"
    return f"{text}, for {span(fault.for_s)}" if fault.name in LASTING_FAULTS else text


WIDTH, HEIGHT = 64, 10
AREA, LINE = "░", "●"

Label = Callable[[float], str]


class Chart:
    """Text chart of `width` × `height` characters, with x values from 0 to `most_x` and y values from 0 to `most_y`.

    A later mark replaces an earlier mark in the same cell. If `most_x` or `most_y` is 0, the chart uses 1 as the
    maximum.
    """

    def __init__(self, most_x: float, most_y: float, *, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.width = width
        self._height = height
        self._most_x = most_x if most_x > 0.0 else 1.0
        self._most_y = most_y if most_y > 0.0 else 1.0
        self._rows = [[" "] * width for _ in range(height)]
        """Rows of cells, from the top of the chart to the bottom."""

    def area(self, levels: Sequence[float], mark: str = AREA) -> None:
        """Fill each column from its level down to the axis. Each level above 0 fills at least one cell."""
        for column, level in enumerate(levels[: self.width]):
            if level > 0.0:
                for row in range(self._row(level), self._height):
                    self._rows[row][column] = mark

    def line(self, levels: Sequence[float], mark: str = LINE) -> None:
        """Draw a mark in each column at the height of its level."""
        for column, level in enumerate(levels[: self.width]):
            self._rows[self._row(level)][column] = mark

    def dot(self, x: float, y: float, mark: str = LINE) -> None:
        """Mark a point of the chart. A point outside the chart is marked at the edge."""
        column = round(x / self._most_x * (self.width - 1))
        self._rows[self._row(y)][min(self.width - 1, max(0, column))] = mark

    def wall(self, x: float, mark: str = "┊") -> None:
        """Draw a vertical line at `x` in the empty cells of the column, if `x` is inside the chart."""
        if 0.0 <= x <= self._most_x:
            column = round(x / self._most_x * (self.width - 1))
            for row in self._rows:
                row[column] = mark if row[column] == " " else row[column]

    def text(self, x: Label, y: Label) -> str:
        """Return the chart with its axes as text. The functions `x` and `y` format the numbers at the axes."""
        top, bottom = y(self._most_y), y(0.0)
        margin = max(len(top), len(bottom))
        names = [top, *[""] * (self._height - 2), bottom]
        lines = [f"{name.rjust(margin)} │{''.join(row)}".rstrip() for name, row in zip(names, self._rows, strict=True)]
        first, last = x(0.0), x(self._most_x)
        gap = max(1, self.width - len(first) - len(last))
        lines.append(f"{' ' * margin} └{'─' * self.width}")
        lines.append(f"{' ' * margin}  {first}{' ' * gap}{last}")
        return "\n".join(lines)

    def _row(self, level: float) -> int:
        up = round(level / self._most_y * (self._height - 1))
        return self._height - 1 - min(self._height - 1, max(0, up))


NOTHING = "-"


def verdict_text(rows: Sequence[VerdictRow]) -> str:
    """Return a table of the expectations' verdicts as text, and a sentence with the number of each verdict."""
    if not rows:
        return "The scenario expects nothing, so nothing is judged."
    cells = [
        (
            row.measure,
            row.template or "all",
            _expected_text(row),
            number(row.measured, row.unit),
            row.verdict.value,
            row.why,
        )
        for row in rows
    ]
    columns = ("measure", "jobs", "expected", "measured", "verdict", "why")
    return f"{output.table(columns, cells)}\n\n{_sum(rows)}"


def number(value: float | None, unit: Unit) -> str:
    """Return a measured value as text with its unit."""
    if value is None:
        return NOTHING
    if math.isinf(value):
        return "never"
    if unit is Unit.SECONDS:
        return output.span(value)
    if unit is Unit.USD:
        return shown(value)
    if unit is Unit.SHARE:
        return f"{value:.1%}"
    return f"{value:,.10g}"


def _expected_text(row: VerdictRow) -> str:
    least, most = (number(bound, row.unit) for bound in (row.least, row.most))
    if row.least is None:
        return NOTHING if row.most is None else f"at most {most}"
    if row.most is None:
        return f"at least {least}"
    return f"exactly {most}" if row.least == row.most else f"{least} to {most}"


def _sum(rows: Sequence[VerdictRow]) -> str:
    counts = {colour: sum(row.verdict is colour for row in rows) for colour in Color}
    counts_text = ", ".join(f"{count} {colour.value}" for colour, count in counts.items() if count)
    if counts[Color.RED]:
        return f"Red: {counts_text}."
    return f"Green: {counts_text}." if counts[Color.GREEN] else f"Nothing was judged: {counts_text}."


def duration(seconds: float) -> str:
    """Return a duration in the format of scenario files, such as "90m", in the largest unit with a whole number."""
    for unit, size_s in (("h", 3600), ("m", 60)):
        if seconds and seconds % size_s == 0:
            return f"{seconds / size_s:.0f}{unit}"
    return f"{seconds:.10g}s"
