"""The claims example without a parser. The module splits segments with `str.split`, and computes the rules in one SQL
query."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb

_RULES = """
WITH summed AS (
    SELECT claim, sum(charge) AS lines, sum(round(charge * CASE
        WHEN code[1:2] = '99' THEN 0.80
        WHEN code[1] = '9' THEN 0.75
        WHEN code[1] = '8' THEN 0.60
        WHEN code[1] = '7' THEN 0.70
        WHEN code[1] IN ('1', '2') THEN 0.65
        WHEN code[1] = 'J' THEN 0.85
        WHEN code[1] = 'G' THEN 0.90
        ELSE 0.50 END, 2)) AS allowed
    FROM lines GROUP BY claim
), decided AS (
    SELECT claims.*, coalesce(lines, 0) AS lines, allowed, CASE
        WHEN row_number() OVER (PARTITION BY file, provider, id ORDER BY claim) > 1
            THEN 'duplicate'
        WHEN charge = 0 THEN 'no charge'
        WHEN NOT diagnosed THEN 'no diagnosis'
        WHEN charge <> coalesce(lines, 0) THEN 'charge differs from its lines'
        ELSE 'paid' END AS fate
    FROM claims LEFT JOIN summed USING (claim)
), shared AS (
    SELECT *, least(allowed, CASE filing
            WHEN 'CI' THEN 25 WHEN 'BL' THEN 20 WHEN 'HM' THEN 15 WHEN 'MB' THEN 0
            WHEN 'MC' THEN 3 ELSE 30 END) AS copay,
        CASE filing WHEN 'CI' THEN 0.10 WHEN 'BL' THEN 0.15 WHEN 'HM' THEN 0.00
            WHEN 'MC' THEN 0.00 ELSE 0.20 END AS coinsurance
    FROM decided
)
SELECT payer, count(*), sum(charge),
    coalesce(sum(allowed) FILTER (fate = 'paid'), 0),
    coalesce(sum(allowed - copay - round((allowed - copay) * coinsurance, 2))
        FILTER (fate = 'paid'), 0),
    count(*) FILTER (fate = 'paid'),
    count(*) FILTER (fate IN ('duplicate', 'no charge', 'no diagnosis')),
    count(*) FILTER (fate = 'charge differs from its lines')
FROM shared GROUP BY payer
"""


def split(text: str) -> list[list[str]]:
    """Return the segments as lists of elements."""
    separator, terminator = text[3], text[105]
    return [s.strip().split(separator) for s in text.split(terminator) if s.strip()]


def expected_totals(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the expected result of the `totals` stage for each payer, without names and reasons."""
    claims: list[tuple[Any, ...]] = []
    lines: list[tuple[Any, ...]] = []
    for path in paths:
        _flatten(path, claims, lines)
    db = duckdb.connect()
    db.execute(
        "CREATE TABLE claims (claim INT, file TEXT, provider TEXT, id TEXT, payer TEXT,"
        " filing TEXT, charge DECIMAL(18,2), diagnosed BOOL)"
    )
    db.execute("CREATE TABLE lines (claim INT, code TEXT, charge DECIMAL(12,2))")
    for table, rows in (("claims", claims), ("lines", lines)):
        columns = [list(column) for column in zip(*rows, strict=True)]
        marks = ", ".join(["unnest(?)"] * len(columns))
        db.execute(f"INSERT INTO {table} SELECT {marks}", columns)
    names = ("claims", "charge_cents", "allowed_cents", "paid_cents", "paid", "denied", "pended")
    return {
        payer: {
            name: int(value * 100) if name.endswith("_cents") else value
            for name, value in zip(names, values, strict=True)
        }
        for payer, *values in db.execute(_RULES).fetchall()
    }


def _flatten(path: Path, claims: list[tuple[Any, ...]], lines: list[tuple[Any, ...]]) -> None:
    text = path.read_text()
    component = text[104]
    segments = split(text)
    starts = [i for i, segment in enumerate(segments) if segment[0] == "CLM"]
    for start in starts:
        before = segments[:start]
        end = next(i for i in range(start + 1, len(segments)) if segments[i][0] in ("CLM", "HL", "SE", "GE", "IEA"))
        body = segments[start + 1 : end]
        # The nearest segment before the claim is the right one. Segments further up belong to the inner loops of other
        # claims.
        payer = _last(before, "NM1", "PR")
        number = len(claims)
        claims.append(
            (
                number,
                path.name,
                _last(before, "NM1", "85")[9],
                segments[start][1],
                payer[9],
                (_last(before, "SBR", "P", "S") + [""] * 10)[9],
                segments[start][2],
                any(s[0] == "HI" and s[1].split(component)[1:] for s in body),
            )
        )
        for segment in body:
            if segment[0] == "SV1":
                code = [*segment[1].split(component), ""][1]
                lines.append((number, code, segment[2]))


def _last(segments: list[list[str]], name: str, *kinds: str) -> list[str]:
    return next(s for s in reversed(segments) if s[0] == name and s[1] in kinds)
