"""Cost of the run, split by kind and by stage.

Invariant: the displayed parts of the cost add up exactly to the displayed total. Each part of the cost is a sum of rows
of the bill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from batchlab.core.pricing import price_book
from batchlab.core.text import span
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Shape
from batchlab.reports.html.source import ReportRun, adding_up, share, visible

KINDS = {
    "compute": "compute",
    "wasted": "wasted work",
    "idle": "idle",
    "sqs": "SQS",
    "s3": "S3 requests",
    "storage": "S3 storage",
    "ledger": "ledger",
}
"""Labels of the kinds of cost, in the order of the chart. Other kinds of cost come last, with their names as labels."""
BAR = 26.0


@dataclass(frozen=True, slots=True)
class Part:
    """Part of the cost. `usd` is the exact amount. The rounded amounts `shown` of all parts add up to the displayed
    total.
    """

    look: str
    name: str
    usd: Decimal
    shown: str
    share: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost section of the page.

    `total` comes from the job's row, and `lines` come from the bill. `kinds` and `stages` both split the total. `brief`
    is the total with few digits.
    """

    total: Decimal
    shown: str
    brief: str
    kinds: tuple[Part, ...]
    lines: tuple[Part, ...]
    stages: tuple[Part, ...]
    bar: tuple[Shape, ...]
    text: str
    prices: str
    is_whole: bool

    def of(self, kind: str) -> Decimal:
        """Return the exact amount of one kind of cost."""
        return sum((part.usd for part in self.kinds if part.name == KINDS.get(kind, kind)), ZERO)


ZERO = Decimal(0)


def cost(run: ReportRun) -> Cost | None:
    """Return the cost section of the page, or None for a run without prices."""
    rows = run.rows(
        """SELECT line, kind, pool, sum(cost_usd) AS usd, sum(seconds) AS seconds,
                  any_value(how) AS how
           FROM cost WHERE job = $job AND cost_usd IS NOT NULL
           GROUP BY line, kind, pool ORDER BY usd DESC, line"""
    )
    if not rows or run.job["cost_usd"] is None:
        return None
    total: Decimal = run.job["cost_usd"]
    decimals = price_book.decimals(float(total), least=2 if total >= 100 else 4 if total >= 1 else 6)
    looks = {kind: f"c{n}" for n, kind in enumerate(KINDS)}
    by_kind: dict[str, Decimal] = {}
    for row in rows:
        by_kind[row["kind"]] = by_kind.get(row["kind"], ZERO) + row["usd"]
    order = [*KINDS, *sorted(by_kind.keys() - KINDS.keys())]
    kinds = [(looks.get(k, "c6"), KINDS.get(k, visible(k, 40)), by_kind[k], "") for k in order if k in by_kind]
    lines = [
        (looks.get(row["kind"], "c6"), visible(row["line"], 80), row["usd"], _how(row["how"], row["seconds"]))
        for row in rows
    ]
    of_stages = run.rows(
        """SELECT stage, sum(cost_usd) AS usd FROM cost
           WHERE job = $job AND cost_usd IS NOT NULL GROUP BY stage ORDER BY usd DESC, stage"""
    )
    stages = [
        (
            run.looks.get(row["stage"], "c6") if row["stage"] is not None else "c2",
            visible(row["stage"], 60) if row["stage"] is not None else "not of a single stage",
            row["usd"],
            "",
        )
        for row in of_stages
    ]
    parts = _parts(kinds, decimals)
    return Cost(
        total,
        f"{total.quantize(Decimal(1).scaleb(-decimals)):,f} USD",
        price_book.shown(float(total)),
        parts,
        _parts(lines, decimals),
        _parts(stages, decimals),
        _bar(parts),
        "The cost of the run by purpose: " + ", ".join(f"{part.name} {part.share}" for part in parts) + ".",
        visible(run.job["prices"] or "", 300),
        bool(run.job["is_whole"]),
    )


def _how(how: str | None, seconds: float | None) -> str:
    if how:
        return visible(how, 300)
    return f"{span(seconds)} of instances" if seconds is not None else ""


def _parts(amounts: Sequence[tuple[str, str, Decimal, str]], decimals: int) -> tuple[Part, ...]:
    total = sum((usd for _, _, usd, _ in amounts), ZERO)
    rounded = adding_up([usd for _, _, usd, _ in amounts], decimals)
    return tuple(
        Part(look, name, usd, f"{shown:,f}", share(float(usd), float(total)), note)
        for (look, name, usd, note), shown in zip(amounts, rounded, strict=True)
    )


def _bar(parts: Sequence[Part]) -> tuple[Shape, ...]:
    total = float(sum((part.usd for part in parts), ZERO))
    shapes: list[Shape] = []
    left = 0.0
    for part in parts:
        right = left + (float(part.usd) / total if total else 0.0)
        if right > left:
            title = f"{part.name}: {part.shown} USD, {part.share}"
            shapes.append(Shape(charts.box(left, right, 0, BAR), f"fill {part.look}", title))
        left = right
    return tuple(shapes)
