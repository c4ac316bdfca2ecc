"""What a query came to, for a person, a program or a spreadsheet.

Invariant: a person sees rounded numbers; a program and a spreadsheet get every digit.
"""

from __future__ import annotations

import csv as csv_
import io
import json as json_
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from batchlab.cli import output
from batchlab.core.errors import UsageError


def show(
    names: Sequence[str], rows: Sequence[Sequence[Any]], *, json: bool = False, csv: bool = False
) -> None:
    """Print the rows; as JSON a list of objects, under `rows`."""
    if json and csv:
        raise UsageError("--json and --csv are two answers.", remedy="Leave one of them out.")
    if json:
        told = [dict(zip(names, map(_plain, row), strict=True)) for row in rows]
        output.show_json({"rows": told})
    elif csv:
        output.show_exact(_csv(names, rows))
    elif rows:
        output.show(output.table(names, [[_shown(cell) for cell in row] for row in rows]))
    else:
        output.say("No rows.")


def _csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv_.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue().removesuffix("\n")


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json_.dumps(plain, ensure_ascii=False) if isinstance(plain, list | dict) else plain


def _plain(value: Any) -> Any:
    """A value of JSON; what that has no word for becomes text, and no number null."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        # Moments need their fraction, and a share or a price what counts of it.
        return f"{value:.3f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)
