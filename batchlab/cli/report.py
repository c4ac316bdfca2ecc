"""`batchlab report …`: what a job did, asked in SQL, compared, and brought here from production.

Invariant: nothing here changes a job; and whatever is asked of a folder needs nothing but that.

`batchlab report html`: what a job did, as one page that works without a network.

Invariant: what could not be had for a page is said, and nothing but its file is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import completion, output
from batchlab.cli.options import EndpointOption, HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.cli.report_source import Source
    from batchlab.reports.html.failures import Case, Sample
    from batchlab.reports.html.task_checks import Finding

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A job of the grid (its id, the beginning of one, or 'last'), or a folder that "
        "`report pull` has made; without it the last job.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="The file to write; without it the job's id and .html, here.",
        show_default=False,
    ),
]
NoLogsOption = Annotated[
    bool,
    typer.Option("--no-logs", help="Leave out tracebacks and logs of tasks that failed."),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Whose bucket has the job, and of a folder's job the logs; without it that of the "
        "grid that is up, or local.",
        autocompletion=completion.backends,
        show_default=False,
    ),
]


def html(
    run: RunArgument = "last",
    out: OutOption = None,
    no_logs: NoLogsOption = False,
    backend: BackendOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Write a run's report as one HTML file: summary, what to change next, workers, load, times,
    cost, failures. It can be read anywhere, offline.

    \b
    Example: batchlab report html last --out monday.html
    """
    from batchlab import __version__
    from batchlab.cli.report_source import Source, folders
    from batchlab.core import optional_dependencies
    from batchlab.reports.html import failures, page
    from batchlab.reports.html.source import Run, only_job
    from batchlab.reports.queries import store

    optional_dependencies.need("web", "The report as a page")
    source = Source(home_of(home), backend, endpoint)
    with folders(source, [run]) as found, store.opened(found) as connection:
        job = only_job(connection)
        file = out or Path(f"{job}.html")
        output.check_writable(file, folder=True)
        # A folder alone is enough for a page, so that nothing else is asked unless one says whom.
        is_bare = Path(run).is_dir() and not backend
        cases = [] if no_logs or is_bare else failures.cases(Run(connection, job))
        samples = _samples(source, job, cases) if cases else {}
        made = page.page(connection, job, samples=samples.get, version=__version__)
    size_bytes = _write(file, page.rendered(made))
    if json:
        output.show_json(
            {
                "job": job,
                "file": str(file),
                "size_bytes": size_bytes,
                "to_change": [_told(one) for one in made.to_do],
            }
        )
        return
    output.show(f"{file}: {output.size(size_bytes)}. {_said(made.to_do)}")


def _write(file: Path, text: str) -> int:
    """How many bytes it has; UsageError where it cannot be written."""
    from batchlab.core.errors import UsageError

    try:
        return file.write_bytes(text.encode())
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written: {error.strerror}.", remedy="Name another file with --out."
        ) from error


def _samples(source: Source, job: str, cases: Sequence[Case]) -> dict[Case, Sample]:
    """Nothing, and a word why, where the bucket cannot be asked."""
    import asyncio

    from batchlab.core.errors import BackendError
    from batchlab.core.retry import patiently
    from batchlab.reports.html.failures import samples
    from batchlab.runtime import factory

    async def asked() -> dict[Case, Sample]:
        objects = source.load().open_objects(source.home)
        return await samples(patiently(objects, factory.patience()), job, cases)

    try:
        return asyncio.run(asked())
    except BackendError as error:
        output.say(output.clean(f"The page has no tracebacks and no logs: {error}"))
        return {}


def _told(one: Finding) -> dict[str, str]:
    return {
        "check": one.check,
        "level": one.level.name.lower(),
        "title": one.title,
        "figure": one.figure,
        "setting": one.setting,
    }


def _said(to_do: Sequence[Finding]) -> str:
    if not to_do:
        return "Its checks found nothing to change."
    return f"{output.count(len(to_do), 'finding')}, first: {output.clean(to_do[0].title)}."


app = typer.Typer(no_args_is_help=True)

RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="A job of the grid (its id, the beginning of one, or 'last'), a folder that "
        "`report pull` has made, or the record of a `scenario replay` for all of its jobs; "
        "without any the last job.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]
JobsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...",
        help="A job's id, the beginning of one, or 'last'.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]
PulledArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...",
        help="A job's id, the beginning of one, or 'last'; or the record of a `scenario replay` "
        "for all of its jobs.",
        autocompletion=completion.jobs,
        show_default=False,
    ),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Whose bucket has the job; without it that of the grid that is up, or local.",
        autocompletion=completion.backends,
        show_default=False,
    ),
]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")]


@app.callback()
def report() -> None:
    """Ask what a job did: run times, waits, retries, scaling, cost.

    \b
    Example: batchlab report query slowest_tasks last
    """


@app.command()
def sql(
    query: Annotated[str, typer.Argument(metavar="SELECT", help="One SELECT of DuckDB's SQL.")],
    runs: RunsArgument = None,
    backend: FromOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Ask one or many runs in SQL. The tables are those of docs/report-data.md; nothing else can be
    read, and nothing be written.

    \b
    Example: batchlab report sql "select stage, median(run_s) from tasks group by stage" last
    """
    from batchlab.cli.query_output import show
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.queries import store

    source = Source(home_of(home), backend, endpoint)
    with folders(source, runs or ()) as found, store.opened(found) as connection:
        show(*store.asked(connection, query), json=json, csv=csv)


@app.command()
def queries(json: JsonOption = False) -> None:
    """List the queries that have a name.

    \b
    Example: batchlab report queries
    """
    from batchlab.reports.queries.named_queries import known

    every = known().values()
    if json:
        output.show_json(
            {"queries": [{"name": q.name, "answers": q.meaning, "sql": q.sql} for q in every]}
        )
        return
    output.show(output.table(("query", "what it answers"), [(q.name, q.meaning) for q in every]))


@app.command()
def query(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="One of those that `report queries` lists.")
    ],
    runs: RunsArgument = None,
    backend: FromOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    csv: CsvOption = False,
    json: JsonOption = False,
) -> None:
    """Ask one or many runs a query that has a name.

    \b
    Example: batchlab report query retries last
    """
    from batchlab.cli.query_output import show
    from batchlab.cli.report_source import Source, folders
    from batchlab.reports.queries import named_queries, store

    asked = named_queries.named(name).sql
    source = Source(home_of(home), backend, endpoint)
    with folders(source, runs or ()) as found, store.opened(found) as connection:
        show(*store.asked(connection, asked), json=json, csv=csv)


@app.command()
def pull(
    jobs: PulledArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to; a folder for each job in it.")
    ] = Path(),
    backend: FromOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the performance data of jobs here, as folders of Parquet files that need no account and
    no grid any more.

    \b
    Example: batchlab report pull month-end-0123456789 --backend aws --out runs
    """
    from batchlab.cli.report_source import Source, job_of, meant
    from batchlab.cli.report_source import pull as bring

    source = Source(home_of(home), backend, endpoint)
    brought = []
    for text in meant(jobs):
        job = job_of(source, text)
        index = bring(source, job, out / job)
        brought.append({"job": job, "folder": str(out / job), "is_final": index.is_final})
        if not json:
            ended = "" if index.is_final else ", which is not over yet"
            output.show(f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {out / job}")
    if json:
        output.show_json({"runs": brought})


@app.command()
def write(
    jobs: JobsArgument,
    backend: FromOption = "",
    endpoint: EndpointOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Write the performance data of jobs into the bucket, from the bucket alone. The manager does
    so at the end of each job that takes five seconds or more.

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
            ended = "" if index.is_final else ", which is not over yet"
            size = output.size(sum(index.sizes.values()))
            output.show(
                f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {size} in {key}"
            )
    if json:
        output.show_json({"written": written})


app.command()(html)
