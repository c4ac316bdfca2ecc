"""HTML page of a report: one file that includes its style sheet and loads nothing else.

Invariant: the template escapes all text from jobs and from the grid. The page does not contain
scripts. Its Content-Security-Policy allows only the one style sheet, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.reports.html import costs, durations, gantt, load, summary
from batchlab.reports.html import failures as failed
from batchlab.reports.html.charts import Chart, Data
from batchlab.reports.html.costs import Cost
from batchlab.reports.html.failures import Failures, Samples
from batchlab.reports.html.fleet_checks import findings
from batchlab.reports.html.load import Decision
from batchlab.reports.html.metrics import Signs, signs
from batchlab.reports.html.source import Run
from batchlab.reports.html.task_checks import Finding, Level
from batchlab.reports.html.text import visible

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from jinja2 import Environment
    from markupsafe import Markup

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Page:
    """Data for the template."""

    title: str
    state: str
    particulars: Sequence[tuple[str, str]]
    words: Sequence[summary.Said]
    tiles: Sequence[summary.Tile]
    stages: Data
    to_do: Sequence[Finding]
    good: Sequence[Finding]
    gantt: Chart | None
    load: Sequence[Chart]
    decisions: Sequence[Decision]
    decisions_in_all: int
    run_times: Data
    wait_times: Data
    run_charts: Sequence[Chart]
    wait_charts: Sequence[Chart]
    longest: Data
    cost: Cost | None
    failures: Failures
    twice: Data | None
    signs: Signs
    version: str


def page(
    connection: DuckDBPyConnection, job: str, *, samples: Samples | None = None, version: str = ""
) -> Page:
    """Return the page of a job in an opened store (`batchlab.reports.queries.store.opened`).

    `samples` returns tracebacks and logs of failed attempts. `version` is the version of batchlab.
    Raise UsageError if the store does not contain the job.
    """
    run = Run(connection, job)
    over_time = load.series(run)
    decisions, in_all = load.decisions(run)
    cost = costs.cost(run)
    seen = signs(run, over_time, cost)
    found = findings(seen)
    failures = failed.failures(run, samples)
    ran, waited = durations.spreads(run, "run_s"), durations.spreads(run, "wait_s")
    told = summary.Found(run, seen, cost, failures, waited, found)
    return Page(
        title=visible(run.job["name"] or job, 80),
        state=visible(str(run.job["state"]), 20),
        particulars=summary.particulars(run),
        words=summary.words(told),
        tiles=summary.tiles(told),
        stages=summary.stages(run),
        to_do=[one for one in found if one.level > Level.GOOD],
        good=[one for one in found if one.level is Level.GOOD],
        gantt=gantt.drawn(run),
        load=load.drawn(run, over_time, decisions),
        decisions=decisions,
        decisions_in_all=in_all,
        run_times=durations.table(ran),
        wait_times=durations.table(waited),
        run_charts=durations.drawn(run, ran, "run_s"),
        wait_charts=durations.drawn(run, waited, "wait_s"),
        longest=durations.longest(run),
        cost=cost,
        failures=failures,
        twice=failed.twice(run),
        signs=seen,
        version=version,
    )


def rendered(found: Page) -> str:
    """Return the page as HTML text."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    from markupsafe import Markup

    template = _environment().get_template("page.html.jinja")
    # The style sheet is a file of this package. Escaping would change it, and then the hash would
    # not match.
    return template.render(page=found, style=Markup(style), style_hash=digest)  # noqa: S704


def _environment() -> Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["code"] = _code
    made.filters["heading"] = lambda name: str(name).removeprefix("# ")
    made.filters["is_number"] = lambda name: str(name).startswith("# ")
    return made


def _code(text: str) -> Markup:
    """Escape `text`, and turn the parts between backticks into code elements."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return Markup("`").join(parts)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts)
    )
