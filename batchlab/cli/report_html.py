"""`batchlab report html`: what a job did, as one page that works without a network.

Invariant: what could not be had for a page is said, and nothing but its file is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import completing, output
from batchlab.cli.options import EndpointOption, HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.cli.reported import Source
    from batchlab.report.html.failed import Case, Sample
    from batchlab.report.html.findings import Finding

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A job of the grid (its id, the beginning of one, or 'last'), or a folder that "
        "`report pull` has made; without it the last job.",
        autocompletion=completing.jobs,
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
        autocompletion=completing.backends,
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
    from batchlab import __version__, extras
    from batchlab.cli.reported import Source, folders
    from batchlab.report import store
    from batchlab.report.html import failed, page
    from batchlab.report.html.source import Run, only_job

    extras.need("web", "The report as a page")
    source = Source(home_of(home), backend, endpoint)
    with folders(source, [run]) as found, store.opened(found) as connection:
        job = only_job(connection)
        file = out or Path(f"{job}.html")
        output.check_writable(file, folder=True)
        # A folder alone is enough for a page, so that nothing else is asked unless one says whom.
        is_bare = Path(run).is_dir() and not backend
        cases = [] if no_logs or is_bare else failed.cases(Run(connection, job))
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
    from batchlab.errors import UsageError

    try:
        return file.write_bytes(text.encode())
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written: {error.strerror}.", remedy="Name another file with --out."
        ) from error


def _samples(source: Source, job: str, cases: Sequence[Case]) -> dict[Case, Sample]:
    """Nothing, and a word why, where the bucket cannot be asked."""
    import asyncio

    from batchlab import backends
    from batchlab.errors import BackendError
    from batchlab.patience import patiently
    from batchlab.report.html.samples import samples

    async def asked() -> dict[Case, Sample]:
        objects = source.load().open_objects(source.home)
        return await samples(patiently(objects, backends.patience()), job, cases)

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
