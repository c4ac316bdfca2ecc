"""HTML page of a report with a summary, as one file that includes its style sheet and does not load other files.

Invariants: the template escapes all text from jobs and from the grid. The page does not contain scripts. The page's
Content-Security-Policy allows only the included style sheet, by the hash of the style sheet. The summary is computed
from the figures of the page's other sections.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core.capabilities import capabilities_of
from batchlab.core.pricing.price_book import shown
from batchlab.core.text import count, join_list, span
from batchlab.core.users import OWNER
from batchlab.reports.html import costs, distributions, gantt, load, stage_graph
from batchlab.reports.html import failures as failed
from batchlab.reports.html.charts import Data
from batchlab.reports.html.checks import Finding, Level, findings
from batchlab.reports.html.costs import Cost
from batchlab.reports.html.distributions import Spread
from batchlab.reports.html.failures import Failures, Samples
from batchlab.reports.html.metrics import RunFigures, run_figures
from batchlab.reports.html.source import ReportRun, moment, offset, share, visible

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from jinja2 import Environment
    from markupsafe import Markup

GOOD_STATES = frozenset({"SUCCEEDED"})
BAD_STATES = frozenset({"FAILED", "CANCELLED"})


@dataclass(frozen=True, slots=True)
class Tile:
    """Large figure at the top of the page, with a name and a note. `look` is a CSS class: good, bad, or empty."""

    name: str
    value: str
    note: str = ""
    look: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Data from which the summary of the page is computed."""

    run: ReportRun
    figures: RunFigures
    cost: Cost | None
    failures: Failures
    waits: Sequence[Spread]
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Answer:
    """Question of the summary with its answer in a few sentences."""

    question: str
    text: str


def answers(facts: Facts) -> list[Answer]:
    """Return the answers of the summary: the work, the fleet, the cost, the failures, and the next step."""
    sentences = {
        "Work": _work(facts),
        "Fleet": _fleet(facts),
        "Cost": _cost(facts),
        "Failures": _failures(facts),
        "Next step": _next_step(facts),
    }
    return [Answer(question, " ".join(texts)) for question, texts in sentences.items()]


_MENDED = "SELECT count(*) AS tasks FROM tasks WHERE job = $job AND mended_sha256 IS NOT NULL"


def _work(facts: Facts) -> Iterator[str]:
    run, job = facts.run, facts.run.job
    planned, succeeded = job["planned"] or 0, job["succeeded"] or 0
    failed, cancelled, retried = job["failed"] or 0, job["cancelled"] or 0, job["retried"] or 0
    end = f"ended {job['state']} after {span(run.span_s)}"
    if not job["is_final"]:
        end = f"was {job['state']} after {span(run.span_s)}, when its data was written"
    yield (
        f"{visible(job['name'] or run.id, 60)} ran {count(planned, 'task')} in {count(len(run.stages), 'stage')} on "
        f"the backend {visible(job['backend'] or '', 40)}. The job {end}."
    )
    if job["reason"]:
        yield f"The grid's reason: {_sentence(visible(job['reason'], 300))}"
    if job["rounds"] > 1:
        yield f"The user retried the job, so it has {job['rounds']} rounds."
    if mended := run.one(_MENDED)["tasks"]:
        verb = "has" if mended == 1 else "have"
        yield f"{count(mended, 'task')} {verb} a mended input from a retry (column mended_sha256 of the table tasks)."
    unfinished = planned - succeeded - failed - cancelled
    parts = [f"{count(succeeded, 'task')} succeeded"]
    parts += [f"{failed:,} failed for good"] if failed else []
    parts += [f"{cancelled:,} were canceled"] if cancelled else []
    parts += [f"{unfinished:,} had not ended"] if unfinished else []
    yield f"{join_list(parts)}."
    if retried:
        yield f"{count(retried, 'failed attempt')} {'was' if retried == 1 else 'were'} retried."


def _fleet(facts: Facts) -> Iterator[str]:
    figures = facts.figures
    if figures.slot_s:
        yield (
            f"{count(figures.instances, figures.noun)} had at most {figures.peak_slots:,.0f} slots in service at a "
            f"time. This job used {share(min(figures.busy_s, figures.slot_s), figures.slot_s)} of their slot time."
        )
    else:
        yield "No data of the fleet was recorded."
    if facts.waits:
        longest = max(facts.waits, key=lambda spread: spread.percentiles[95])
        yield (
            f"Tasks waited longest in {visible(longest.stage, 40)}: half of them waited at most "
            f"{span(longest.percentiles[50])}, and 95% waited at most {span(longest.percentiles[95])}."
        )


def _cost(facts: Facts) -> Iterator[str]:
    cost, job = facts.cost, facts.run.job
    if cost is None:
        yield "The cost is unknown, because the run has no prices."
        return
    verb = "The run cost" if capabilities_of(job["backend"]).billed else "On AWS, the run would have cost"
    parts = sorted((part for part in cost.kinds if part.usd), key=lambda part: -part.usd)[:2]
    split = f", of which {' and '.join(f'{part.share} is {part.name}' for part in parts)}" if parts else ""
    yield f"{verb} {cost.brief} at list prices{split}."
    if succeeded := job["succeeded"]:
        yield f"1,000 successful tasks cost {shown(float(cost.total) * 1000 / succeeded)}."


def _failures(facts: Facts) -> Iterator[str]:
    failures, figures = facts.failures, facts.figures
    if failures.groups:
        largest = failures.groups[0]
        cause = f"{largest.title} in {largest.stages}"
        attempts = count(failures.attempts, "attempt")
        if failures.causes == 1:
            yield f"{attempts} failed with one cause: {cause}."
        else:
            yield f"{attempts} failed with {failures.causes:,} causes, most often with {cause}."
        yield f"{count(failures.tasks, 'task')} failed for good." if failures.tasks else "No task failed for good."
    waste = []
    if figures.lost_s:
        waste.append(f"{span(figures.lost_s)} of slot time was lost with ended instances")
    if figures.repeated_s:
        waste.append(f"{span(figures.repeated_s)} was spent on repeated work")
    if waste:
        yield _sentence(join_list(waste))
    if figures.copies:
        copies = f"{figures.copies:,} speculative {'copy' if figures.copies == 1 else 'copies'}"
        yield f"Stragglers had {copies}, of which {figures.copies_won:,} ended before the original run."
    if figures.harmful:
        yield f"{count(figures.harmful, 'task')} got two results, which must never happen."
    elif not failures.groups and not waste and not figures.copies:
        yield "No attempt failed, and no work was lost or repeated."


def _next_step(facts: Facts) -> Iterator[str]:
    problems = [finding for finding in facts.findings if finding.level > Level.GOOD]
    if not problems:
        yield "The checks found nothing to change."
        return
    yield f"{problems[0].title}."
    if len(problems) > 1:
        yield f"{count(len(problems) - 1, 'more finding')} below."


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


# --- Figures -------------------------------------------------------------------------------------


def tiles(facts: Facts) -> list[Tile]:
    """Return the large figures of the page: six figures, or five figures for a run without prices."""
    job, figures, cost = facts.run.job, facts.figures, facts.cost
    state = str(job["state"])
    look = "good" if state in GOOD_STATES else "bad" if state in BAD_STATES else ""
    failed, succeeded = job["failed"] or 0, job["succeeded"] or 0
    failed_text, failed_look = (f"{failed:,} failed for good", "bad") if failed else ("none failed for good", "")
    busy, slots = "–", "the fleet is unknown"
    if figures.slot_s:
        busy = share(min(figures.busy_s, figures.slot_s), figures.slot_s)
        slots = f"of at most {figures.peak_slots:,.0f} in service"
    tiles = [
        Tile("state", state, "" if job["is_final"] else "had not ended", look),
        Tile("run time", span(facts.run.span_s), f"from {moment(facts.run.start_s)}"),
        Tile("tasks", f"{job['planned'] or 0:,}", failed_text, failed_look),
        Tile("throughput", f"{succeeded / facts.run.span_s:,.3g}", "successful tasks per second"),
        Tile("slots busy", busy, slots),
    ]
    if cost:
        is_billed = capabilities_of(job["backend"]).billed
        tiles.append(Tile("cost", cost.brief, "at AWS's list prices" if is_billed else "on AWS at list prices"))
    return tiles


def stages(run: ReportRun) -> Data:
    """Return a table with one row for each stage, and with a row of totals if the job has several stages."""
    rows = [
        (
            visible(row["stage"], 60),
            visible(row["pool"] or "", 40),
            *(_whole(row[name]) for name in _COUNTS),
            span(row["run_s"] or 0.0),
            _at(run, row["started_s"]),
            _at(run, row["ended_s"]),
        )
        for row in run.stages
    ]
    if len(rows) > 1:
        job = run.job
        rows.append(("all", "", *(_whole(job[name]) for name in _COUNTS), span(job["run_s"] or 0.0), "", ""))
    names = ("# tasks", "# succeeded", "# failed", "# canceled", "# retried", "# bundles")
    columns = ("stage", "pool", *names, "# run time", "# started", "# ended")
    return Data(columns, tuple(rows))


def graph_stages(run: ReportRun) -> list[stage_graph.Stage]:
    """Return the stages of the job for their graph."""
    return [
        stage_graph.Stage(
            visible(row["stage"], 60),
            [visible(name, 60) for name in row["after"] or ()],
            stage_graph.Progress(
                row["planned"], row["succeeded"] or 0, row["failed"] or 0, row["cancelled"] or 0, running=0
            ),
        )
        for row in run.stages
    ]


_COUNTS = ("planned", "succeeded", "failed", "cancelled", "retried", "bundles")


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _at(run: ReportRun, at_s: float | None) -> str:
    return "–" if at_s is None else offset(at_s - run.start_s, run.span_s)


def particulars(run: ReportRun) -> list[tuple[str, str]]:
    """Return further facts about the job as pairs of name and value."""
    job = run.job
    try:
        tags = json.loads(job["tags"] or "{}")
    except ValueError:
        tags = {}
    facts = [
        ("job", visible(run.id, 120)),
        ("backend", visible(job["backend"] or "", 40)),
        ("submitted", moment(job["submitted_s"])),
        ("started", moment(job["started_s"])),
        ("ended", moment(job["ended_s"])),
    ]
    if job["owner"] not in (None, OWNER):
        facts.append(("owner", visible(job["owner"], 40)))
    if run.share:
        facts.append(("share", visible(run.share, 60)))
    if job["dependencies"]:
        others = ", ".join(other.removesuffix(":succeeded") for other in job["dependencies"])
        facts.append(("after", visible(others, 400)))
    if job["priority"]:
        facts.append(("priority", str(job["priority"])))
    if isinstance(tags, dict):
        facts += [(f"tag {visible(str(k), 60)}", visible(str(v), 120)) for k, v in tags.items()]
    return facts


_HERE = Path(__file__).parent


class Page:
    """Data of the page's template for a job in an opened store (`batchlab.reports.queries.store.open_store`).

    The function `samples` returns the traceback and log of a failed attempt. `version` is the version of batchlab. The
    constructor raises UsageError if the store does not contain the job.
    """

    def __init__(
        self, connection: DuckDBPyConnection, job: str, *, samples: Samples | None = None, version: str = ""
    ) -> None:
        run = ReportRun(connection, job)
        series = load.series(run)
        decisions, total_decisions = load.decisions(run)
        cost = costs.cost(run)
        figures = run_figures(run, series, cost)
        all_findings = findings(figures)
        failures = failed.failures(run, samples)
        waits = distributions.spreads(run, distributions.WAIT)
        facts = Facts(run, figures, cost, failures, waits, all_findings)
        self.id = visible(job, 100)
        self.title = visible(run.job["name"] or job, 80)
        self.state = visible(str(run.job["state"]), 20)
        self.particulars = particulars(run)
        self.answers = answers(facts)
        self.tiles = tiles(facts)
        self.stages = stages(run)
        self.graph = stage_graph.graph(graph_stages(run)) if len(run.stages) > 1 else None
        self.to_do = [finding for finding in all_findings if finding.level > Level.GOOD]
        self.good = [finding for finding in all_findings if finding.level is Level.GOOD]
        self.gantt = gantt.draw(run)
        self.load = load.draw(run, series, decisions)
        self.decisions = decisions
        self.decisions_in_all = total_decisions
        self.distributions = [
            distributions.distribution(run, one, distributions.spreads(run, one))
            for one in (distributions.RUN, distributions.CPU, distributions.MEMORY)
        ]
        self.distributions.append(distributions.distribution(run, distributions.WAIT, waits))
        self.task_orders = distributions.task_orders(run)
        self.most_tasks = distributions.MAX_SORTED_TASKS
        self.cost = cost
        self.failures = failures
        self.twice = failed.twice(run)
        self.version = version


def render(page: Page) -> str:
    """Return the page as HTML text."""
    from markupsafe import Markup

    style = _style()

    template = _environment().get_template("page.html.jinja")
    # The style sheet is a file of this package and is not escaped, because the hash of an escaped style sheet would not
    # match.
    return template.render(page=page, style=Markup(style), style_hash=style_hash())  # noqa: S704


def style_hash() -> str:
    """Return the hash of the page's style sheet in the form that a Content-Security-Policy contains."""
    return base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()


def _style() -> str:
    return (_HERE / "style.css").read_text(encoding="utf-8")


def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    environment.filters["heading"] = lambda name: str(name).removeprefix("# ")
    environment.filters["is_number"] = lambda name: str(name).startswith("# ")
    return environment


def _code(text: str) -> Markup:
    """Escape `text`, and turn the parts between backticks into code elements."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return Markup("`").join(parts)
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))
