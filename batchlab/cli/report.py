"""`batchlab report`: performance data of jobs as SQL results, HTML pages, and folders.

Invariant: the commands do not change jobs. A query of a folder needs only that folder. Text output
has rounded numbers, JSON and CSV have every digit.

`batchlab report diff`: a comparison of two runs or sets of runs, with gates for CI.
"""

from __future__ import annotations

import csv as csv_
import io
import json as json_
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchlab.cli import options, output
from batchlab.cli.options import BUCKET_BACKEND, ENDPOINT, HOME, JSON, argument, flag, home_of, option
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.cli.report_source import Source
    from batchlab.reports.comparison import Change, Comparison
    from batchlab.reports.html.checks import Finding
    from batchlab.reports.html.failures import Case, Sample


def html(
    run: str = argument(
        "A job of the grid (id, beginning of an id, or 'last'), or a folder of `report pull`. Default: the last job.",
        "RUN",
        default="last",
        show_default=False,
        autocompletion=options.jobs,
    ),
    out: Path | None = option("File to write. Default: the job's id with .html, here.", "FILE"),
    no_logs: bool = flag("Leave out tracebacks and logs of failed tasks.", "--no-logs"),
    backend: str = option(
        "Backend whose bucket has the job, or the logs of a folder's job. Default: that of "
        "the running grid, else local.",
        "NAME",
        default="",
        autocompletion=options.backends,
    ),
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Write the report of a run as one HTML file that needs no network.

    It has a summary, recommended changes, workers, load, times, cost, and failures.

    \b
    Example: batchlab report html last --out monday.html
    """
    from batchlab import __version__
    from batchlab.cli.report_source import Source, folders
    from batchlab.core import installation
    from batchlab.reports.html import failures, page
    from batchlab.reports.html.source import Run, only_job
    from batchlab.reports.queries import store

    installation.need("web", "The report as a page")
    source = Source(home_of(home), backend, endpoint)
    with folders(source, [run]) as paths, store.opened(paths) as connection:
        job = only_job(connection)
        file = out or Path(f"{job}.html")
        output.check_writable(file, folder=True)
        # A page of a folder reads no bucket unless --backend names one.
        is_bare = Path(run).is_dir() and not backend
        cases = [] if no_logs or is_bare else failures.cases(Run(connection, job))
        samples = _samples(source, job, cases) if cases else {}
        made = page.page(connection, job, samples=samples.get, version=__version__)
    size_bytes = _write(file, page.render(made))
    if json:
        output.show_json(
            {
                "job": job,
                "file": str(file),
                "size_bytes": size_bytes,
                "to_change": [_finding_json(finding) for finding in made.to_do],
            }
        )
        return
    output.show(f"{file}: {output.size(size_bytes)}. {_findings_text(made.to_do)}")


def _write(file: Path, text: str) -> int:
    """Write the file and return its size in bytes; raise UsageError."""
    from batchlab.core.errors import UsageError

    try:
        return file.write_bytes(text.encode())
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written: {error.strerror}.", remedy="Name another file with --out."
        ) from error


def _samples(source: Source, job: str, cases: Sequence[Case]) -> dict[Case, Sample]:
    """Return tracebacks and logs, or nothing and print a note if the bucket cannot be read."""
    import asyncio

    from batchlab.core.errors import BackendError
    from batchlab.core.port_retries import patiently
    from batchlab.reports.html.failures import samples
    from batchlab.runtime import factory

    async def fetched() -> dict[Case, Sample]:
        objects = source.load().open_objects(source.home)
        return await samples(patiently(objects, factory.patience()), job, cases)

    try:
        return asyncio.run(fetched())
    except BackendError as error:
        output.say(output.clean(f"The page has no tracebacks and no logs: {error}"))
        return {}


def _finding_json(one: Finding) -> dict[str, str]:
    return {
        "check": one.check,
        "level": one.level.name.lower(),
        "title": one.title,
        "figure": one.figure,
        "setting": one.setting,
    }


def _findings_text(to_do: Sequence[Finding]) -> str:
    if not to_do:
        return "Its checks found nothing to change."
    return f"{output.count(len(to_do), 'finding')}, first: {output.clean(to_do[0].title)}."


app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `report` to the root command."""

    app.command()(diff)
    root.add_typer(app, name="report")


RUNS = argument(
    "A job of the grid (id, beginning of an id, or 'last'), a folder of `report pull`, or "
    "the record of a `scenario replay` for all of its jobs. Default: the last job.",
    "[RUN]...",
    default=None,
    autocompletion=options.jobs,
)


CSV = flag("Print CSV, for spreadsheets.", "--csv")


@app.callback()
def report() -> None:
    """Query run times, waits, retries, scaling, and cost of jobs.

    \b
    Example: batchlab report query slowest_tasks last
    """


@app.command()
def sql(
    query: str = argument("One SELECT of DuckDB's SQL.", "SELECT"),
    runs: list[str] | None = RUNS,
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    csv: bool = CSV,
    json: bool = JSON,
) -> None:
    """Query runs in SQL. The tables are those of docs/report-data.md. Other files cannot be read,
    and nothing can be written.

    \b
    Example: batchlab report sql "select stage, median(run_s) from tasks group by stage" last
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.queries import store

    source = Source(home_of(home), backend, endpoint)
    with folders(source, runs or ()) as paths, store.opened(paths) as connection:
        show(*store.run_query(connection, query), json=json, csv=csv)


@app.command()
def queries(json: bool = JSON) -> None:
    """List the named queries.

    \b
    Example: batchlab report queries
    """
    from batchlab.reports.queries.store import named_queries

    every = named_queries().values()
    if json:
        output.show_json({"queries": [{"name": q.name, "answers": q.meaning, "sql": q.sql} for q in every]})
        return
    output.show(output.table(("query", "what it answers"), [(q.name, q.meaning) for q in every]))


@app.command()
def query(
    name: str = argument("A query of `report queries`.", "NAME"),
    runs: list[str] | None = RUNS,
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    csv: bool = CSV,
    json: bool = JSON,
) -> None:
    """Run a named query on one or more runs.

    \b
    Example: batchlab report query retries last
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.queries import store

    asked = store.named(name).sql
    source = Source(home_of(home), backend, endpoint)
    with folders(source, runs or ()) as paths, store.opened(paths) as connection:
        show(*store.run_query(connection, asked), json=json, csv=csv)


@app.command()
def pull(
    jobs: list[str] = argument(
        "Id of a job, beginning of an id, or 'last'; or the record of a `scenario replay` for all of its jobs.",
        "JOB...",
        autocompletion=options.jobs,
    ),
    out: Path = option("Folder that gets a folder for each job.", "DIR", default=Path()),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Copy the performance data of jobs to folders of Parquet files.

    The folders can be queried without an account or a grid.

    \b
    Example: batchlab report pull month-end-0123456789 --backend aws --out runs
    """
    from batchlab.cli.report_source import Source, expanded, job_of
    from batchlab.cli.report_source import pull as bring

    source = Source(home_of(home), backend, endpoint)
    brought = []
    for text in expanded(jobs):
        job = job_of(source, text)
        index = bring(source, job, out / job)
        brought.append({"job": job, "folder": str(out / job), "is_final": index.is_final})
        if not json:
            ended = "" if index.is_final else ", which has not ended"
            output.show(f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {out / job}")
    if json:
        output.show_json({"runs": brought})


@app.command()
def write(
    jobs: list[str] = argument("Id of a job, beginning of an id, or 'last'.", "JOB...", autocompletion=options.jobs),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Write the performance data of jobs to the bucket. Only the bucket is read.

    The manager does this at the end of each job that takes five seconds or more.

    \b
    Example: batchlab report write last
    """
    import asyncio

    from batchlab.cli.report_source import Source, job_of
    from batchlab.cli.report_source import write as make
    from batchlab.core.protocol import object_keys

    source = Source(home_of(home), backend, endpoint)
    written = []
    for text in jobs:
        job = job_of(source, text)
        index = asyncio.run(make(source, job))
        key = object_keys.reports(job)
        written.append({"job": job, "prefix": key, "is_final": index.is_final, "rows": index.rows})
        if not json:
            ended = "" if index.is_final else ", which has not ended"
            size = output.size(sum(index.sizes.values()))
            output.show(f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {size} in {key}")
    if json:
        output.show_json({"written": written})


app.command()(html)


def show(names: Sequence[str], rows: Sequence[Sequence[Any]], *, json: bool = False, csv: bool = False) -> None:
    """Print the rows as a table, as CSV, or as JSON: a list of objects under `rows`."""
    if json and csv:
        raise UsageError("--json and --csv are two answers.", remedy="Leave one of them out.")
    if json:
        objects = [dict(zip(names, map(_plain, row), strict=True)) for row in rows]
        output.show_json({"rows": objects})
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
    """Return a value of JSON. Other types become text, and infinite or undefined numbers null."""
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
        # Times need their fraction, and shares and prices their significant digits.
        return f"{value:.3f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


_SIDE = "A run, several runs separated by commas, or a folder of runs."


def diff(
    a: str = argument(f"Runs before the change. {_SIDE}", "A"),
    b: str = argument(f"Runs after the change. {_SIDE}", "B"),
    threshold: str | None = option(
        "Exit with 1 if the 95th percentile of a stage's run time, the tasks per second, "
        "or the cost per 1,000 tasks got worse by more than this.",
        "PERCENT",
    ),
    fail_on: list[str] | None = option(
        "Exit with 1 if this measure got worse by more than N%. For one stage write "
        "'STAGE.MEASURE > N%'. May be repeated.",
        "'MEASURE > N%'",
    ),
    seed: int = option("Seed of the resampling for confidence intervals.", default=0),
    markdown: bool = flag("Print Markdown, for a pull request.", "--markdown"),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Compare runs: measures that got worse from A to B, the confidence, and the causes.

    The exit code is 1 if a gate is broken.

    \b
    Example: batchlab report diff runs/main runs/branch --threshold 10% --markdown
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.comparison import compare, gates, runs

    if markdown and json:
        raise UsageError("--markdown and --json are two answers.", remedy="Leave one of them out.")
    wanted = gates(threshold, fail_on or ())
    source = Source(home_of(home), backend, endpoint)
    with folders(source, _named(a)) as before, folders(source, _named(b)) as after:
        comparison = compare(runs(before, seed), runs(after, seed), wanted, seed=seed)
    if json:
        output.show_json(comparison.to_json())
    else:
        output.show(_markdown(comparison, gated=bool(wanted)) if markdown else _text(comparison))
    if comparison.broken:
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
                _difference_text(one, one.a),
                _difference_text(one, one.b),
                _relative(one),
                between,
                verdict,
            )
        )
    return rows


def _difference_text(change: Change, value: float) -> str:
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
    told = [f"{output.clean(_sides(found))}: {_headline(found)}", "", output.table(_COLUMNS, _rows(found))]
    if found.causes:
        told += ["", "What got worse, and why", *(f"  {output.clean(cause)}" for cause in found.causes)]
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
    lines = [f"| {' | '.join(_md(cell) if row is not rows[1] else cell for cell in row)} |" for row in rows]
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
