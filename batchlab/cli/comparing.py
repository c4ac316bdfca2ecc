"""Forecast against fact for a person: the numbers with their errors, and the curves drawn."""

from __future__ import annotations

from batchlab.cli import output
from batchlab.cli.drawing import AREA, LINE, Chart
from batchlab.cli.verdicts import number
from batchlab.forecast.comparison import Comparison, Curves, Difference, levels
from batchlab.scenario.measures import Unit


def text(comparison: Comparison) -> str:
    """All of it: `scenario compare` prints it, and a replay that was forecast."""
    told_of = (one for one in comparison.differences if (one.forecast, one.fact) != (None, None))
    rows = [_row(one) for one in told_of]
    columns = ("measure", "jobs", "forecast", "fact", "error", "relative")
    compressed = comparison.compressed
    at = "" if compressed == 1 else f", times divided by {compressed:g}"
    told = [
        f"Scenario {comparison.scenario}: forecast ({comparison.forecast_backend}) against fact "
        f"({comparison.fact_backend}){at}; an error is forecast minus fact",
        "",
        output.table(columns, rows),
        *(drawn for curves in comparison.curves for drawn in ("", _drawn(curves))),
    ]
    if comparison.notes:
        told += ["", *(f"Note: {note}." for note in comparison.notes)]
    return "\n".join(told)


def _row(one: Difference) -> tuple[str, ...]:
    relative = one.relative
    return (
        one.measure,
        one.template or "all",
        number(one.forecast, one.unit),
        number(one.fact, one.unit),
        _signed(one.absolute, one.unit),
        "-" if relative is None else f"{relative:+.1%}",
    )


def _signed(value: float | None, unit: Unit) -> str:
    if value is None:
        return "-"
    return f"{'-' if value < 0 else '+'}{number(abs(value), unit)}"


def _drawn(curves: Curves) -> str:
    most = max((level for _, level in (*curves.forecast, *curves.fact)), default=0.0)
    relative = "" if curves.relative is None else f", {curves.relative:.1%} of the fact's mean"
    title = (
        f"{curves.what} ({LINE} forecast, {AREA} fact); on average {curves.mean_error:,.3g} "
        f"apart{relative}"
    )
    if not most:
        return f"{curves.what}: none at any time in either"
    chart = Chart(curves.until_s, most)
    chart.area(levels(curves.fact, curves.until_s, chart.width))
    chart.line(levels(curves.forecast, curves.until_s, chart.width))
    return f"{title}\n{chart.text(output.span, lambda value: f'{value:,.4g}')}"
