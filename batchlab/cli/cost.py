"""`batchlab cost …`: what a run will cost on AWS, and what it has."""

from __future__ import annotations

from typing import Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import (
    FileArgument,
    HomeOption,
    JobArgument,
    JsonOption,
    PoolOption,
    SetOption,
    home_of,
)
from batchlab.core.errors import UsageError

app = typer.Typer(no_args_is_help=True)

TypesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--instance-type",
        metavar="[POOL=]TYPE",
        help="What the instances would be on AWS, where a pool does not say; may be repeated.",
        show_default=False,
    ),
]


@app.callback()
def cost() -> None:
    """Reckon what a run costs on AWS, in USD.

    At list prices, before the run and after it.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2.5
    """


@app.command()
def estimate(
    file: FileArgument,
    set_: SetOption = None,
    seconds: Annotated[
        list[str] | None,
        typer.Option(
            "--seconds",
            metavar="[STAGE=]S[-S]",
            help="How long a task takes, or from how long to how long; without it as in an earlier "
            "run of the job. May be repeated.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="[STAGE=]N",
            help="Tasks of the first stage, or of one, where they cannot be counted from the "
            "input. May be repeated.",
            show_default=False,
        ),
    ] = None,
    pool: PoolOption = None,
    instance_type: TypesOption = None,
    spot: Annotated[
        float, typer.Option("--spot", min=0, max=100, help="Per cent of instances on Spot.")
    ] = 0.0,
    results: Annotated[
        str,
        typer.Option(
            "--results",
            metavar="SIZE",
            help="How large the results will be that are fetched home, as in 500MB; without it as "
            "large as when they were fetched last.",
            show_default=False,
        ),
    ] = "",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a run of a job file will cost, as a range with every line.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2-5 --pool default:0-20x2 --spot 80
    """
    from batchlab.cli import estimates
    from batchlab.cli.submission import overrides

    if 0 < spot < 1:
        raise UsageError(
            f"--spot counts in per cent, and {spot:g} is less than one in a hundred.",
            remedy=f"Write --spot {spot * 100:g}.",
        )
    request = estimates.Request(
        file,
        home_of(home),
        overrides(set_ or ()),
        tuple(seconds or ()),
        tuple(tasks or ()),
        tuple(pool or ()),
        tuple(instance_type or ()),
        spot / 100,
        results,
    )
    found = estimates.run(request)
    if json:
        output.show_json(found.to_json())
    else:
        output.show(estimates.text(found))


@app.command()
def bill(
    job: JobArgument,
    instance_type: TypesOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a job has cost on AWS, or would have.

    Compute, wasted work, idle time, requests, storage, and data that has left AWS.

    \b
    Example: batchlab cost bill last --instance-type c7g.large
    """
    from batchlab.cli.bills import bill_of, bill_text
    from batchlab.cli.estimates import by_name
    from batchlab.runtime import factory

    place = home_of(home)
    record = place.record()
    known = factory.load(record.backend if record else "local").pools
    types = by_name(instance_type or (), [pool.name for pool in known])
    view, found = bill_of(place, job, types)
    if json:
        output.show_json({"job": view["id"], "state": view["state"], **found.to_json()})
    else:
        output.show(bill_text(view, found))
