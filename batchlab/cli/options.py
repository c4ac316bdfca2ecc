"""Options that many commands share, so that they read the same everywhere.

A number on the command line that is none, or out of range, in a sentence.

Invariant: an option is called by its name, an argument as the help calls it, and the range that is
said is the one that is declared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import BadParameter

from batchlab.cli import completion
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.runtime.home import Home

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
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Where the grid lives.",
        autocompletion=completion.backends,
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="The URL of S3 and SQS, perhaps with a bucket as the path, in place of an emulator of "
        "the grid's own. On the backend gcs, gs://BUCKET. Without it, BATCHLAB_ENDPOINT.",
        show_default=False,
    ),
]
ScenarioArgument = Annotated[
    str,
    typer.Argument(
        metavar="SCENARIO",
        help="A scenario's file, or the name of a shipped one.",
        autocompletion=completion.scenarios,
        show_default=False,
    ),
]
LikeOption = Annotated[
    str,
    typer.Option(
        "--like",
        metavar="BACKEND",
        help="Whose settings the simulated grid has.",
        autocompletion=completion.backends,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="What was measured of a grid, as `scenario calibrate` has written it.",
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
AsIfOption = Annotated[
    bool,
    typer.Option(
        "--as-if-aws", help="Say what it costs also where it is free: what AWS would ask for it."
    ),
]
MaxCostOption = Annotated[
    str | None,
    typer.Option(
        "--max-cost",
        metavar="AMOUNT",
        help="Launch nothing more for it once it has cost so much on AWS, such as 5USD.",
        show_default=False,
    ),
]
LogFormatOption = Annotated[
    str | None,
    typer.Option(
        "--log-format",
        metavar="text|json",
        help="What the grid's logs are written as; without it BATCHLAB_LOG_FORMAT, or text.",
        show_default=False,
    ),
]
PortOption = Annotated[
    int,
    typer.Option(
        "--port", min=0, max=65535, help="Where the manager listens on 127.0.0.1; 0: any free one."
    ),
]
CapArgument = Annotated[
    str, typer.Argument(metavar="AMOUNT", help="Such as 5USD, or 'none'.", show_default=False)
]
JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="A job's id, the beginning of one, or 'last'.",
        autocompletion=completion.jobs,
    ),
]
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="The job file.", show_default=False)
]


def home_of(option: Path | None) -> Home:
    """The grid's folder that --home or its default names."""
    from batchlab.runtime.home import find_home

    return find_home(option)


def seconds_of(option: str, text: str, *, least_s: float = 0.0) -> float:
    """The seconds of `10m`, or of a number, `least_s` at the least; UsageError, which names the
    option."""
    from batchlab.core.units import DURATION_FORMS, seconds, shown

    try:
        found = seconds(float(text) if text.replace(".", "", 1).isdigit() else text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.", remedy=f"Write {DURATION_FORMS}.") from error
    if found < least_s:
        raise UsageError(
            f"{option}: {shown(text)} is too short.", remedy=f"Write {least_s:g}s or more."
        )
    return found


def cap_of(text: str) -> float | None:
    """The dollars of `5USD`, None of `none`; UsageError."""
    from batchlab.core.pricing.money import parse

    return None if text == "none" else parse(text)


_KINDS = {
    "greater_than_equal": "a number",
    "less_than_equal": "a number",
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
}
"""What is asked for, by the mistakes that the parser of values knows by these names."""


def plainly(error: BadParameter) -> UsageError | None:
    """The same as a person would say it; None where it is about something else than a number."""
    # By Any: which classes these are is typer's own business.
    option: Any = error.param
    mistakes: Any = getattr(error.__cause__, "errors", None)
    if option is None or mistakes is None:
        return None
    first = mistakes()[0]
    kind = _KINDS.get(first["type"])
    if kind is None:
        return None
    name = next((one for one in option.opts if one.startswith("-")), "")
    range_ = _range(option.min, option.max)
    return UsageError(
        f"{name or option.metavar} is {kind}{range_}, not {str(first['input'])[:40]}.",
        remedy=f"Write for example {name}{' ' if name else ''}{_example(option):g}.",
    )


def _range(least: float | None, most: float | None) -> str:
    if most is None:
        return "" if least is None else f" from {least:g} on"
    return f" up to {most:g}" if least is None else f" from {least:g} to {most:g}"


def _example(option: Any) -> float:
    usual, least = option.default, option.min
    return float(usual if isinstance(usual, int | float) else max(1, least or 0))
