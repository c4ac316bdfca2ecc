"""`batchlab report …`: what a job did, asked in SQL, compared, and brought here from production.

Invariant: nothing here changes a job; and whatever is asked of a folder needs nothing but that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import completing, output, report_html
from batchlab.cli.options import EndpointOption, HomeOption, JsonOption, home_of

app = typer.Typer(no_args_is_help=True)

RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="A job of the grid (its id, the beginning of one, or 'last'), a folder that "
        "`report pull` has made, or the record of a `scenario replay` for all of its jobs; "
        "without any the last job.",
        autocompletion=completing.jobs,
        show_default=False,
    ),
]
JobsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...",
        help="A job's id, the beginning of one, or 'last'.",
        autocompletion=completing.jobs,
        show_default=False,
    ),
]
PulledArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...",
        help="A job's id, the beginning of one, or 'last'; or the record of a `scenario replay` "
        "for all of its jobs.",
        autocompletion=completing.jobs,
        show_default=False,
    ),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Whose bucket has the job; without it that of the grid that is up, or local.",
        autocompletion=completing.backends,
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
    from batchlab.cli.answers import show
    from batchlab.cli.reported import Source, folders
    from batchlab.report import store

    source = Source(home_of(home), backend, endpoint)
    with folders(source, runs or ()) as found, store.opened(found) as connection:
        show(*store.asked(connection, query), json=json, csv=csv)


@app.command()
def queries(json: JsonOption = False) -> None:
    """List the queries that have a name.

    \b
    Example: batchlab report queries
    """
    from batchlab.report.queries import known

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
    from batchlab.cli.answers import show
    from batchlab.cli.reported import Source, folders
    from batchlab.report import queries, store

    asked = queries.named(name).sql
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
    from batchlab.cli.reported import Source, job_of, meant
    from batchlab.cli.reported import pull as bring

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

    from batchlab.cli.reported import Source, job_of
    from batchlab.cli.reported import write as make
    from batchlab.protocol import naming

    source = Source(home_of(home), backend, endpoint)
    written = []
    for text in jobs:
        job = job_of(source, text)
        index = asyncio.run(make(source, job))
        key = naming.reports(job)
        written.append({"job": job, "prefix": key, "is_final": index.is_final, "rows": index.rows})
        if not json:
            ended = "" if index.is_final else ", which is not over yet"
            size = output.size(sum(index.sizes.values()))
            output.show(
                f"{output.count(index.rows['tasks'], 'task')} of {job}{ended}: {size} in {key}"
            )
    if json:
        output.show_json({"written": written})


app.command()(report_html.html)
