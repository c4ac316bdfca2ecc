"""`batchlab report diff`: a comparison of two runs or sets of runs, with gates for CI."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import (
    BucketBackendOption,
    EndpointOption,
    HomeOption,
    JsonOption,
    home_of,
)
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.reports.compare.comparison import Change, Comparison

_SIDE = "A run, several runs separated by commas, or a folder of runs."


def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help=f"Runs before the change. {_SIDE}", show_default=False),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help=f"Runs after the change. {_SIDE}", show_default=False)
    ],
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            metavar="PERCENT",
            help="Exit with 1 if the 95th percentile of a stage's run time, the tasks per second, "
            "or the cost per 1,000 tasks got worse by more than this.",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="'MEASURE > N%'",
            help="Exit with 1 if this measure got worse by more than N%. For one stage write "
            "'STAGE.MEASURE > N%'. May be repeated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the resampling for confidence intervals.")
    ] = 0,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")
    ] = False,
    backend: BucketBackendOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Compare runs: measures that got worse from A to B, the confidence, and the causes.

    The exit code is 1 if a gate is broken.

    \b
    Example: batchlab report diff runs/main runs/branch --threshold 10% --markdown
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.compare.comparison import compare, gates
    from batchlab.reports.compare.measures import runs

    if markdown and json:
        raise UsageError("--markdown and --json are two answers.", remedy="Leave one of them out.")
    wanted = gates(threshold, fail_on or ())
    source = Source(home_of(home), backend, endpoint)
    with folders(source, _named(a)) as before, folders(source, _named(b)) as after:
        found = compare(runs(before, seed), runs(after, seed), wanted, seed=seed)
    if json:
        output.show_json(found.to_json())
    else:
        output.show(_markdown(found, gated=bool(wanted)) if markdown else _text(found))
    if found.broken:
        raise typer.Exit(1)


def _named(side: str) -> list[str]:
    # A folder may have a comma in its name.
    return [side] if Path(side).is_dir() else [one for one in side.split(",") if one]


_COLUMNS = ("stage", "measure", "A", "B", "change", "95% between", "")


def _rows(found: Comparison) -> list[tuple[str, ...]]:
    broken = {(change.measure.name, change.stage) for _, change in found.broken}
    rows: list[tuple[str, ...]] = []
    for one in found.changes:
        if not one.a and not one.b:
            continue  # both values are 0, such as failures
        verdict = "TOO MUCH" if (one.measure.name, one.stage) in broken else one.verdict
        between = "" if one.low is None else f"{one.low:+.1%} and {one.high:+.1%}"
        rows.append(
            (
                one.stage or "all",
                one.measure.name,
                _shown(one, one.a),
                _shown(one, one.b),
                _relative(one),
                between,
                verdict,
            )
        )
    return rows


def _shown(change: Change, value: float) -> str:
    if change.measure.unit == "s":
        return output.span(value)
    if change.measure.unit == "usd":
        return f"{value:.4g} USD"
    return f"{value:,.4g}"


def _relative(change: Change) -> str:
    return f"{change.relative:+.1%}" if math.isfinite(change.relative) else "new"


def _sides(found: Comparison) -> str:
    def side(runs: Sequence[object]) -> str:
        return output.count(len(runs), "run")

    if len(found.a) == len(found.b) == 1:
        return f"{found.a[0].job} (A) against {found.b[0].job} (B)"
    return f"{side(found.a)} (A) against {side(found.b)} (B), medians"


def _headline(found: Comparison) -> str:
    if found.broken:
        told = ", ".join(dict.fromkeys(_broken(change) for _, change in found.broken))
        return f"Too much: {told}."
    worse = sum(one.verdict == "worse" for one in found.changes)
    better = sum(one.verdict == "better" for one in found.changes)
    return f"{output.count(worse, 'measure')} worse, {better} better."


def _broken(change: Change) -> str:
    where = f"{change.stage}." if change.stage else ""
    return f"{where}{change.measure.name} {_relative(change)}"


def _text(found: Comparison) -> str:
    told = [
        f"{output.clean(_sides(found))}: {_headline(found)}",
        "",
        output.table(_COLUMNS, _rows(found)),
    ]
    if found.causes:
        told += [
            "",
            "What got worse, and why",
            *(f"  {output.clean(cause)}" for cause in found.causes),
        ]
    if found.notes:
        told += ["", *(f"Note: {output.clean(note)}." for note in found.notes)]
    return "\n".join(told)


def _markdown(found: Comparison, *, gated: bool) -> str:
    mark = "❌ " if found.broken else "✅ " if gated else ""
    told = [f"### {mark}Performance: {_md(_headline(found))}", "", f"{_md(_sides(found))}.", ""]
    told += [f"- {_md(cause)}" for cause in found.causes]
    if found.causes:
        told.append("")
    head = ("stage", "measure", "A", "B", "change", "95% between", "verdict")
    rows = [head, ("---",) * len(head), *_rows(found)]
    lines = [
        f"| {' | '.join(_md(cell) if row is not rows[1] else cell for cell in row)} |"
        for row in rows
    ]
    told += ["<details><summary>All measures</summary>", "", *lines, "", "</details>"]
    told += ["", *(f"*{_md(note)}.*" for note in found.notes)] if found.notes else []
    return "\n".join(told)


def _md(text: str) -> str:
    """Escape a text of a job for Markdown, without markup, mentions, references, or links."""
    cleaned = output.clean(text)
    escaped = "".join(f"\\{c}" if c in "\\`*_[]|<>#" else c for c in cleaned)
    # A backslash does not prevent links in the rendered page. An invisible comment in the middle
    # of the pattern does.
    return _LINKS.sub(lambda found: f"{found[0]}{_APART}", escaped)


_LINKS = re.compile(r"[@#!](?=\w)|:(?=//)|\bwww(?=\.)|\bGH(?=-)", re.IGNORECASE)
_APART = "<!-- -->"
