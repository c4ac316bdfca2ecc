"""Options that many commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from batchlab.home import Home

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="The grid's folder; without it BATCHLAB_HOME, or .batchlab here.",
        show_default=False,
    ),
]
BackendOption = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="Where the grid lives.")
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Where S3 and SQS are, perhaps with a bucket as the path, in place of an emulator of "
        "the grid's own; without it BATCHLAB_ENDPOINT.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder for the results; without it out/<job name> here.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace the default of a parameter; may be repeated.",
        show_default=False,
    ),
]
PoolOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        metavar="NAME:MIN-MAXxSLOTS",
        help="A pool of workers, such as default:0-4x1, in place of the backend's own; may be "
        "repeated.",
        show_default=False,
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's id, the beginning of one, or 'last'.")
]
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="The job file.", show_default=False)
]


def home_of(option: Path | None) -> Home:
    """The grid's folder that --home or its default names."""
    from batchlab.home import find_home

    return find_home(option)
