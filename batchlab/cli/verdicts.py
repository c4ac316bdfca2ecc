"""A verdict for a person: what was expected of a run, what it came to, green or red."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.cli import output
from batchlab.costs.money import shown
from batchlab.scenario.measures import Unit
from batchlab.scenario.verdict import Colour, Row

NOTHING = "-"


def text(rows: Sequence[Row]) -> str:
    """The table, and below it one sentence on all of it."""
    if not rows:
        return "The scenario expects nothing, so nothing is judged."
    cells = [
        (
            row.measure,
            row.template or "all",
            _expected(row),
            number(row.measured, row.unit),
            row.colour.value,
            row.why,
        )
        for row in rows
    ]
    columns = ("measure", "jobs", "expected", "measured", "verdict", "why")
    return f"{output.table(columns, cells)}\n\n{_sum(rows)}"


def number(value: float | None, unit: Unit) -> str:
    """A measure's number as a person reads it."""
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


def _expected(row: Row) -> str:
    least, most = (number(bound, row.unit) for bound in (row.least, row.most))
    if row.least is None:
        return NOTHING if row.most is None else f"at most {most}"
    if row.most is None:
        return f"at least {least}"
    return f"exactly {most}" if row.least == row.most else f"{least} to {most}"


def _sum(rows: Sequence[Row]) -> str:
    counts = {colour: sum(row.colour is colour for row in rows) for colour in Colour}
    told = ", ".join(f"{count} {colour.value}" for colour, count in counts.items() if count)
    if counts[Colour.RED]:
        return f"Red: {told}."
    return f"Green: {told}." if counts[Colour.GREEN] else f"Nothing was judged: {told}."
