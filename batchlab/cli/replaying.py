"""`batchlab scenario replay` and `record`: scenarios in real time, and of what has run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli.options import (
    BackendOption,
    CalibrationOption,
    EndpointOption,
    HomeOption,
    JsonOption,
    ScenarioArgument,
    home_of,
    seconds_of,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("replay")(replay)
    app.command("record")(record)


def replay(
    scenario: ScenarioArgument,
    backend: BackendOption = "local",
    compress: Annotated[
        float | None,
        typer.Option(
            "--compress",
            metavar="K",
            min=0.001,
            help="Divide every time by so much; without it, by what the file says.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", help="In place of the file's own seed.", show_default=False
        ),
    ] = None,
    home: HomeOption = None,
    endpoint: EndpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where the record goes; without it, into records/ in the grid's folder.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="DURATION",
            help="End it after so long, such as 20m; without it, after twice what its work takes "
            "on the whole fleet, and five minutes.",
            show_default=False,
        ),
    ] = None,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast/--no-forecast", help="Simulate it too, and hold the one against the other."
        ),
    ] = True,
    calibration: CalibrationOption = None,
    keep_up: Annotated[
        bool, typer.Option("--keep-up", help="Leave the grid up afterwards.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a scenario in real time, and judge what it expects.

    A grid is brought up with the scenario's pools and policy, and taken down again; one that is up
    already is used if it has just those. Jobs are stand-ins that take exactly their time, or the
    real work that the scenario names. Exit code 1 where an expectation is red.

    \b
    Example: batchlab scenario replay claims-month-end --compress 600
    """
    from batchlab.cli import replays

    replays.run(
        replays.Request(
            scenario=scenario,
            home=home_of(home),
            backend=backend,
            endpoint=endpoint,
            compress=compress,
            seed=seed,
            out=out,
            limit_s=None if limit is None else seconds_of("--limit", limit, least_s=1.0),
            forecast=forecast,
            calibration=calibration,
            keep_up=keep_up,
        ),
        json=json,
    )


def record(
    job: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[JOB]...",
            help="Ids of jobs that have ended, the beginnings of some, or 'last'.",
            show_default=False,
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RECORD",
            help="The record of a replay, in place of jobs.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The scenario file; its trace goes beside it, with the suffix .jsonl. Without it, "
            "NAME.yaml here.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="The scenario's name; without it, the job's.", show_default=False
        ),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Make a scenario of what has run: its arrivals, its sizes, its measured task times.

    Simulated or replayed it has the same jobs and tasks again, which take as long in all.

    \b
    Example: batchlab scenario record last --out march.yaml
    """
    from batchlab.cli import recordings

    recordings.run(recordings.Request(tuple(job or ()), from_, out, name, home_of(home)), json=json)
