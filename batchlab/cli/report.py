"""Commands of `batchlab report`, which show performance data of jobs as SQL results, HTML pages, and folders.

Invariant: the commands do not change jobs. A query of a folder needs only the folder, without a grid or a network.
Numbers in text output are rounded, and numbers in JSON and CSV have all digits.

`batchlab report diff` compares two runs or two sets of runs, with gates that make a CI job fail.
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

from batchlab import __version__
from batchlab.cli import options, output
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import home_of
from batchlab.cli.options import BUCKET_BACKEND, ENDPOINT, HOME, JSON, argument, flag, option
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.text import significant

if TYPE_CHECKING:
    from batchlab.cli.report_source import Source
    from batchlab.reports.comparison import Change, Comparison
    from batchlab.reports.html.failures import Case, Sample


def html(
    run: str = argument(
        "Job, or a folder that `report pull` wrote. Default: the last job.",
        "RUN",
        default="last",
        show_default=False,
        autocompletion=options.jobs,
    ),
    out: Path | None = option(
        "HTML file that is written. Default: a file in the current folder, with the job's id as its name.", "FILE"
    ),
    no_logs: bool = flag("Omit the tracebacks and the logs of failed tasks from the report.", "--no-logs"),
    backend: str = option(
        "Backend whose bucket contains the job. Default: the running grid's backend, or else local.",
        "NAME",
        default="",
        autocompletion=options.backends,
    ),
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Write the report of a job as one HTML file, which browsers show without a network.

    The report contains a summary, recommended changes, workers, load, times, cost, and failures.

    \b
    Example: batchlab report html last --out monday.html
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.html import failures, page
    from batchlab.reports.html.source import ReportRun, only_job
    from batchlab.reports.queries import store

    source = Source(home_of(home), backend, endpoint)
    with folders(source, [run]) as paths, store.open_store(paths) as connection:
        job = only_job(connection)
        file = out or Path(f"{job}.html")
        output.check_writable(file, folder=True)
        # If the user named a folder and did not use --backend, the command does not read a bucket.
        is_bare = Path(run).is_dir() and not backend
        cases = [] if no_logs or is_bare else failures.cases(ReportRun(connection, job))
        samples = _samples(source, job, cases) if cases else {}
        report_page = page.Page(connection, job, samples=samples.get, version=__version__)
    try:
        size_bytes = file.write_bytes(page.render(report_page).encode())
    except OSError as error:
        remedy = "Name another file with --out."
        raise UsageError(f"{file} cannot be written: {error.strerror}.", remedy=remedy) from error
    summary = "The checks found nothing to change."
    if findings := report_page.to_do:
        summary = f"{output.count(len(findings), 'finding')}, first: {output.clean(findings[0].title)}."
    to_change = [
        {
            "check": finding.check,
            "level": finding.level.name.lower(),
            **output.attributes(finding, "title", "figure", "setting"),
        }
        for finding in findings
    ]
    document = {"job": job, "file": str(file), "size_bytes": size_bytes, "to_change": to_change}
    output.answer(json, document, f"{file}: {output.size(size_bytes)}. {summary}")


def _samples(source: Source, job: str, cases: Sequence[Case]) -> dict[Case, Sample]:
    """Return the traceback and the log of an example task for each case of failure.

    If the bucket cannot be read, print a note and return an empty dictionary.
    """
    import asyncio

    from batchlab.core.port_retries import patiently
    from batchlab.reports.html.failures import samples
    from batchlab.runtime import factory

    try:
        objects = source.load().open_objects(source.home)
        return asyncio.run(samples(patiently(objects, factory.patience()), job, cases))
    except BackendError as error:
        output.say(output.clean(f"The page has no tracebacks and no logs: {error}"))
        return {}


app = command_group("report")

RUNS = argument(
    "Job, a folder that `report pull` wrote, or the record of a `scenario replay`. Default: the last job.",
    "RUN",
    default=None,
    autocompletion=options.jobs,
)
CSV = flag("Print the output as CSV, for spreadsheets.", "--csv")


@app.callback()
def report() -> None:
    """Query run times, waits, retries, scaling, and cost of jobs.

    \b
    Example: batchlab report query slowest_tasks last
    """


@app.command()
def query(
    query: str | None = argument(
        "Name of a query, or a SELECT statement in DuckDB's SQL. Default: list the named queries.",
        "NAME|SQL",
        default=None,
        autocompletion=options.queries,
    ),
    runs: list[str] | None = RUNS,
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    csv: bool = CSV,
    json: bool = JSON,
) -> None:
    """Query the performance data of jobs with a named query or in SQL.

    docs/report-data.md describes the tables. A query cannot read other files, and cannot write.

    \b
    Example: batchlab report query "select stage, median(run_s) from tasks group by stage" last
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.queries import store

    if query is None:
        _list_queries(json)
        return
    sql = store.find_query(query).sql if _NAME.fullmatch(query) else query
    with folders(Source(home_of(home), backend, endpoint), runs or ()) as paths, store.open_store(paths) as connection:
        show(*store.run_query(connection, sql), json=json, csv=csv)


_NAME = re.compile(r"[\w-]+")
"""Form of a query's name. A SELECT statement contains a space."""


def _list_queries(json: bool) -> None:
    from batchlab.reports.queries.store import named_queries

    all_queries = named_queries().values()
    documents = [{"name": query.name, "answers": query.meaning, "sql": query.sql} for query in all_queries]
    rows = [(query.name, query.meaning) for query in all_queries]
    output.answer(json, {"queries": documents}, output.table(("query", "what it answers"), rows))


@app.command()
def pull(
    jobs: list[str] = argument("Job, or the record of a `scenario replay`.", "JOB", autocompletion=options.jobs),
    out: Path = option("Folder in which the command creates a folder for each job.", "DIR", default=Path()),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Copy the performance data of jobs to folders of Parquet files.

    Queries of these folders do not need an AWS account or a grid.

    \b
    Example: batchlab report pull month-end-0123456789 --backend aws --out runs
    """
    from batchlab.cli.report_source import Source, copy_data, expand_runs, job_of

    source = Source(home_of(home), backend, endpoint)
    runs = []
    for text in expand_runs(jobs):
        job = job_of(source, text)
        index = copy_data(source, job, out / job)
        runs.append({"job": job, "folder": str(out / job), "is_final": index.is_final})
        if not json:
            ended = "" if index.is_final else ", which has not ended"
            output.show(f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {out / job}")
    if json:
        output.show_json({"runs": runs})


@app.command(hidden=True)
def write(
    jobs: list[str] = argument(
        "Id of a job, the beginning of an id, or 'last' for the newest job.", "JOB", autocompletion=options.jobs
    ),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Write the performance data of jobs to the bucket. The command reads only the bucket.

    The manager writes the same data at the end of each job that takes five seconds or more.

    \b
    Example: batchlab report write last
    """
    import asyncio

    from batchlab.cli.report_source import Source, job_of, write_data
    from batchlab.core.protocol import object_keys

    source = Source(home_of(home), backend, endpoint)
    written = []
    for text in jobs:
        job = job_of(source, text)
        index = asyncio.run(write_data(source, job))
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
    """Print rows as a table, as CSV, or as a JSON object with a list of objects under the key `rows`."""
    if json and csv:
        raise UsageError("--json and --csv exclude each other.", remedy="Leave one of them out.")
    if json:
        objects = [dict(zip(names, map(_plain, row), strict=True)) for row in rows]
        output.show_json({"rows": objects})
    elif csv:
        text = io.StringIO()
        writer = csv_.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(value) for value in row] for row in rows)
        output.show_exact(text.getvalue().removesuffix("\n"))
    elif rows:
        output.show(output.table(names, [[_format_value(cell) for cell in row] for row in rows]))
    else:
        output.say("No rows.")


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json_.dumps(plain, ensure_ascii=False) if isinstance(plain, list | dict) else plain


def _plain(value: Any) -> Any:
    """Return a value in a form that JSON can represent.

    An infinite or undefined number becomes null. A value of a type that JSON lacks becomes text.
    """
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)


def _format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        # A number of at least 1,000, such as an epoch time, keeps three decimal places. A smaller number, such as a
        # share or a price, keeps four significant digits.
        is_large = abs(value) >= 1000 or not math.isfinite(value)
        return f"{value:.3f}" if is_large else significant(value, 4)
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value))
    return str(value)


_SIDE = "Write one run, several runs separated by commas, or a folder of runs."


@app.command()
def diff(
    a: str = argument(f"Runs before the change. {_SIDE}", "A"),
    b: str = argument(f"Runs after the change. {_SIDE}", "B"),
    threshold: str | None = option(
        "Exit with 1 if a stage's 95th percentile, the throughput, or the cost got worse by more than this percentage.",
        "PERCENT",
    ),
    fail_on: list[str] | None = option(
        "Exit with 1 if the measure MEASURE got worse by more than N%. 'STAGE.MEASURE > N%' limits the measure of "
        "one stage. Repeatable.",
        "'MEASURE > N%'",
    ),
    seed: int = option("Seed of the random resampling that computes the confidence intervals.", default=0),
    markdown: bool = flag("Print the output as Markdown, for a pull request.", "--markdown"),
    backend: str = BUCKET_BACKEND,
    endpoint: str | None = ENDPOINT,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Compare the runs A and B of jobs: the measures that got worse from A to B, the confidence, and the causes.

    The exit code is 1 if a measure got worse by more than --threshold or --fail-on allows.

    \b
    Example: batchlab report diff runs/main runs/branch --threshold 10% --markdown
    """
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.comparison import compare, gates, runs

    if markdown and json:
        raise UsageError("--markdown and --json exclude each other.", remedy="Leave one of them out.")
    wanted = gates(threshold, fail_on or ())
    source = Source(home_of(home), backend, endpoint)
    with folders(source, _runs_in(a)) as before, folders(source, _runs_in(b)) as after:
        comparison = compare(runs(before, seed), runs(after, seed), wanted, seed=seed)
    output.answer(
        json, comparison.to_json(), _markdown(comparison, gated=bool(wanted)) if markdown else _text(comparison)
    )
    if comparison.broken:
        raise typer.Exit(1)


def _runs_in(side: str) -> list[str]:
    # The text of an existing folder is not split, because the name of a folder may contain a comma.
    return [side] if Path(side).is_dir() else [run for run in side.split(",") if run]


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    broken = {(change.measure.name, change.stage) for _, change in comparison.broken}
    rows: list[tuple[str, ...]] = []
    for change in comparison.changes:
        if not change.a and not change.b:
            continue  # A measure without a value, or with the value 0, on both sides is not shown.
        name, stage = change.measure.name, change.stage
        verdict = "TOO MUCH" if (name, stage) in broken else change.verdict
        between = "" if change.low is None else f"{change.low:+.1%} and {change.high:+.1%}"
        values = (_difference_text(change, change.a), _difference_text(change, change.b))
        measure = f"{name} per {change.measure.per}" if change.measure.per else name
        rows.append((stage or "all", measure, *values, _relative(change), between, verdict))
    return rows


def _difference_text(change: Change, value: float) -> str:
    if change.measure.unit == "s":
        return output.span(value)
    if change.measure.unit == "usd":
        return f"{significant(value, 4)} USD"
    unit = change.measure.unit
    return f"{significant(value, 4, ',')} {unit.removesuffix('s') if value == 1 and '/' not in unit else unit}"


def _relative(change: Change) -> str:
    return f"{change.relative:+.1%}" if math.isfinite(change.relative) else "new"


def _sides(comparison: Comparison) -> str:
    if len(comparison.a) == len(comparison.b) == 1:
        return f"{comparison.a[0].job} (A) against {comparison.b[0].job} (B)"
    a, b = (output.count(len(runs), "run") for runs in (comparison.a, comparison.b))
    return f"{a} (A) against {b} (B), medians"


def _headline(comparison: Comparison) -> str:
    if comparison.broken:
        measures = []
        for _, change in comparison.broken:
            stage = f"{change.stage}." if change.stage else ""
            measures.append(f"{stage}{change.measure.name} {_relative(change)}")
        return f"Too much: {', '.join(dict.fromkeys(measures))}."
    worse = sum(change.verdict == "worse" for change in comparison.changes)
    better = sum(change.verdict == "better" for change in comparison.changes)
    return f"{output.count(worse, 'measure')} worse, {better} better."


def _text(comparison: Comparison) -> str:
    columns = ("stage", "measure", "A", "B", "change", "95% between", "")
    headline = f"{output.clean(_sides(comparison))}: {_headline(comparison)}"
    lines = [headline, "", output.table(columns, _rows(comparison))]
    if comparison.causes:
        lines += ["", "What got worse, and why", *(f"  {output.clean(cause)}" for cause in comparison.causes)]
    if comparison.notes:
        lines += ["", *(f"Note: {output.clean(note)}." for note in comparison.notes)]
    return "\n".join(lines)


def _markdown(comparison: Comparison, *, gated: bool) -> str:
    mark = "❌ " if comparison.broken else "✅ " if gated else ""
    lines = [f"### {mark}Performance: {_md(_headline(comparison))}", "", f"{_md(_sides(comparison))}.", ""]
    lines += [f"- {_md(cause)}" for cause in comparison.causes]
    if comparison.causes:
        lines.append("")
    lines += ["<details><summary>All measures</summary>", ""]
    lines += ["| stage | measure | A | B | change | 95% between | verdict |", f"|{' --- |' * 7}"]
    lines += [f"| {' | '.join(map(_md, row))} |" for row in _rows(comparison)]
    lines += ["", "</details>"]
    lines += ["", *(f"*{_md(note)}.*" for note in comparison.notes)] if comparison.notes else []
    return "\n".join(lines)


def _md(text: str) -> str:
    """Escape a text of a job for Markdown, so that the text cannot contain markup, mentions, references, or links."""
    cleaned = output.clean(text)
    escaped = "".join(f"\\{c}" if c in "\\`*_[]|<>#" else c for c in cleaned)
    # An invisible comment inside a link prevents the link in the rendered page. A backslash does not prevent a link.
    return _LINKS.sub(lambda match: f"{match[0]}<!-- -->", escaped)


_LINKS = re.compile(r"[@#!](?=\w)|:(?=//)|\bwww(?=\.)|\bGH(?=-)", re.IGNORECASE)
