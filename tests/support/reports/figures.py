"""Rows of a run as Python values, and figures computed from them without SQL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb

Row = dict[str, Any]


def rows_of(folder: Path, table: str) -> list[Row]:
    """Return all rows of a table's file."""
    with duckdb.connect(":memory:") as connection:
        found = connection.execute(f"SELECT * FROM read_parquet('{folder / table}.parquet')")
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def percentile(values: Iterable[float], share: float) -> float:
    """Return a percentile with linear interpolation between neighbors."""
    known = sorted(values)
    place = share * (len(known) - 1)
    below = int(place)
    above = min(below + 1, len(known) - 1)
    return known[below] + (known[above] - known[below]) * (place - below)


def overlap_s(a: float, b: float, c: float, d: float) -> float:
    return max(0.0, min(b, d) - max(a, c))


def means(spans: Sequence[tuple[float, float, float]], start_s: float, end_s: float, parts: int) -> list[float]:
    """Split a time range into equal parts, and return the mean sum of the weights in each part. A span is (begin, end,
    weight)."""
    width = (end_s - start_s) / parts
    edges = [start_s + k * width for k in range(parts + 1)]
    return [sum(w * overlap_s(b, e, edges[k], edges[k + 1]) for b, e, w in spans) / width for k in range(parts)]
