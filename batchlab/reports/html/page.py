"""HTML page of a report: one file that includes its style sheet and loads nothing else.

Invariant: the template escapes all text from jobs and from the grid. The page does not contain
scripts. Its Content-Security-Policy allows only the one style sheet, by its hash.

Summary of the run: a few sentences and a few large figures.

Invariant: every sentence is computed from the figures of the page's other sections.
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
from batchlab.core.text import count, listed, span
from batchlab.reports.html import costs, durations, gantt, load
from batchlab.reports.html import failures as failed
from batchlab.reports.html.charts import Chart, Data
from batchlab.reports.html.checks import Finding, Level, findings
from batchlab.reports.html.costs import Cost
from batchlab.reports.html.durations import Spread
from batchlab.reports.html.failures import Failures, Samples
from batchlab.reports.html.load import Decision
from batchlab.reports.html.metrics import Signs, signs
from batchlab.reports.html.source import Run, moment, offset, share, visible

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from jinja2 import Environment
    from markupsafe import Markup

GOOD_STATES = frozenset({"SUCCEEDED"})
BAD_STATES = frozenset({"FAILED", "CANCELLED"})


@dataclass(frozen=True, slots=True)
class Tile:
    """Large figure with its name and a note. `look` is a CSS class: good, bad, or empty."""

    name: str
    value: str
    note: str = ""
    look: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """Data for the summary."""

    run: Run
    signs: Signs
    cost: Cost | None
    failures: Failures
    waits: Sequence[Spread]
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Said:
    """Sentences that answer one question."""

    about: str
    words: str


def words(found: Found) -> list[Said]:
    """Return the sentences: what ran, on which fleet, its cost, its failures, and the next step."""
    parts = (
        ("What ran", _ran(found)),
        ("On what", _fleet(found)),
        ("What it cost", _cost(found)),
        ("What went wrong", _wrong(found)),
        ("What next", _next(found)),
    )
    return [Said(about, " ".join(said)) for about, said in parts]


def _ran(found: Found) -> Iterator[str]:
    run, job = found.run, found.run.job
    planned = job["planned"] or 0
    where = visible(job["backend"] or "", 40)
    stages = count(len(run.stages), "stage")
    what = f"{visible(job['name'] or run.id, 60)} ran {count(planned, 'task')} in {stages}"
    if not job["is_final"]:
        yield (
            f"{what} on the backend {where}, and was {job['state']} after {span(run.span_s)} when its data was written."
        )
    else:
        yield f"{what} on the backend {where} and ended {job['state']} after {span(run.span_s)}."
    if job["reason"]:
        yield f"In the words of the grid: {_sentence(visible(job['reason'], 300))}"
    if job["rounds"] > 1:
        yield f"It was retried by hand: these are {job['rounds']} rounds."
    failed, cancelled = job["failed"] or 0, job["cancelled"] or 0
    open_ = planned - (job["succeeded"] or 0) - failed - cancelled
    parts = [f"{count(job['succeeded'] or 0, 'task')} succeeded"]
    parts += [f"{failed:,} failed for good"] if failed else []
    parts += [f"{cancelled:,} were cancelled"] if cancelled else []
    parts += [f"{open_:,} had not ended"] if open_ else []
    again = job["retried"] or 0
    tried = f"; {count(again, 'attempt')} failed and {'was' if again == 1 else 'were'} tried again"
    yield f"{listed(parts)}{tried if again else ''}."


def _fleet(found: Found) -> Iterator[str]:
    signs = found.signs
    if signs.slot_s:
        yield (
            f"{count(signs.instances, signs.noun)} had at most {signs.peak_slots:,.0f} slots in "
            f"service at a time; {share(min(signs.busy_s, signs.slot_s), signs.slot_s)} of their "
            "time went to this job."
        )
    else:
        yield "Nothing is known of the fleet."
    if found.waits:
        most = max(found.waits, key=lambda one: one.percentiles_s[95])
        yield (
            f"Tasks waited longest in {visible(most.stage, 40)}: half of them for at most "
            f"{span(most.percentiles_s[50])}, 95% for at most {span(most.percentiles_s[95])}."
        )


def _cost(found: Found) -> Iterator[str]:
    cost, job = found.cost, found.run.job
    if cost is None:
        yield "That is not known: no prices were put to this run."
        return
    verb = "It cost" if capabilities_of(job["backend"]).billed else "On AWS it would have cost"
    parts = sorted((part for part in cost.kinds if part.usd), key=lambda part: -part.usd)[:2]
    split = f", of which {' and '.join(f'{p.share} {p.name}' for p in parts)}" if parts else ""
    each = ""
    if succeeded := job["succeeded"]:
        each = f"; that is {shown(float(cost.total) * 1000 / succeeded)} for 1,000 tasks"
    yield f"{verb} {cost.brief} at list prices{split}{each}."


def _wrong(found: Found) -> Iterator[str]:
    failures, signs = found.failures, found.signs
    if failures.groups:
        most = failures.groups[0]
        of = f"{most.title} in {most.stages}"
        many = f"for {failures.causes:,} causes; most often {of}"
        yield (
            f"{count(failures.attempts, 'attempt')} failed{f', all with {of}' if failures.causes == 1 else f' {many}'}."
        )
        bad = count(failures.tasks, "task")
        yield (f"{bad} failed for good." if failures.tasks else "None of it made a task fail for good.")
    waste = []
    if signs.lost_s:
        waste.append(f"{span(signs.lost_s)} of slot time went with instances that ended")
    if signs.repeated_s:
        waste.append(f"{span(signs.repeated_s)} went to work that was done twice")
    if waste:
        yield _sentence(listed(waste))
    if signs.harmful:
        yield f"{count(signs.harmful, 'task')} got two results, which must never happen."
    elif not failures.groups and not waste:
        yield "Nothing: no attempt failed, and no work was lost or done twice."


def _next(found: Found) -> Iterator[str]:
    to_do = [finding for finding in found.findings if finding.level > Level.GOOD]
    if not to_do:
        yield "None of the checks found anything to change."
        return
    yield f"{to_do[0].title}."
    if len(to_do) > 1:
        yield f"{count(len(to_do) - 1, 'more finding')} below."


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


# --- Figures -------------------------------------------------------------------------------------


def tiles(found: Found) -> list[Tile]:
    """Return six figures, or five for a run without prices."""
    job, signs, cost = found.run.job, found.signs, found.cost
    state = str(job["state"])
    look = "good" if state in GOOD_STATES else "bad" if state in BAD_STATES else ""
    failed = job["failed"] or 0
    succeeded = job["succeeded"] or 0
    tiles = [
        Tile("state", state, "" if job["is_final"] else "had not ended", look),
        Tile("took", span(found.run.span_s), f"from {moment(found.run.start_s)}"),
        Tile(
            "tasks",
            f"{job['planned'] or 0:,}",
            f"{failed:,} failed for good" if failed else "none failed for good",
            "bad" if failed else "",
        ),
        Tile("throughput", f"{succeeded / found.run.span_s:,.3g}", "tasks a second that succeeded"),
        Tile(
            "slots busy",
            share(min(signs.busy_s, signs.slot_s), signs.slot_s) if signs.slot_s else "–",
            f"of at most {signs.peak_slots:,.0f} in service" if signs.slot_s else "no fleet is known",
        ),
    ]
    if cost:
        is_billed = capabilities_of(job["backend"]).billed
        note = "at AWS's list prices" if is_billed else "what AWS would ask for"
        tiles.append(Tile("cost", cost.brief, note))
    return tiles


def stages(run: Run) -> Data:
    """Return a table with one row per stage, and a total if there are several stages."""
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
    names = ("# tasks", "# succeeded", "# failed", "# cancelled", "# retried", "# bundles")
    columns = ("stage", "pool", *names, "# run time", "# began", "# ended")
    return Data(columns, tuple(rows))


_COUNTS = ("planned", "succeeded", "failed", "cancelled", "retried", "bundles")


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _at(run: Run, at_s: float | None) -> str:
    return "–" if at_s is None else offset(at_s - run.start_s, run.span_s)


def particulars(run: Run) -> list[tuple[str, str]]:
    """Return further facts about the job as pairs of name and value."""
    job = run.job
    try:
        tags = json.loads(job["tags"] or "{}")
    except ValueError:
        tags = {}
    found = [
        ("job", visible(run.id, 120)),
        ("backend", visible(job["backend"] or "", 40)),
        ("submitted", moment(job["submitted_s"])),
        ("began", moment(job["started_s"])),
        ("ended", moment(job["ended_s"])),
    ]
    if job["priority"]:
        found.append(("priority", str(job["priority"])))
    if isinstance(tags, dict):
        found += [(f"tag {visible(str(k), 60)}", visible(str(v), 120)) for k, v in tags.items()]
    return found


_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Page:
    """Data for the template."""

    title: str
    state: str
    particulars: Sequence[tuple[str, str]]
    words: Sequence[Said]
    tiles: Sequence[Tile]
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


def page(connection: DuckDBPyConnection, job: str, *, samples: Samples | None = None, version: str = "") -> Page:
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
    told = Found(run, seen, cost, failures, waited, found)
    return Page(
        title=visible(run.job["name"] or job, 80),
        state=visible(str(run.job["state"]), 20),
        particulars=particulars(run),
        words=words(told),
        tiles=tiles(told),
        stages=stages(run),
        to_do=[finding for finding in found if finding.level > Level.GOOD],
        good=[finding for finding in found if finding.level is Level.GOOD],
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
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))
