"""`batchlab schedule`: jobs that run at due times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import options, output
from batchlab.cli.options import (
    FileArgument,
    HomeOption,
    JsonOption,
    MaxCostOption,
    SetOption,
    cap_of,
    home_of,
)
from batchlab.core.schedules.model import Missed, Overlap

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_usage_types import RunView, ScheduleView

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `schedule` to the root command."""
    root.add_typer(app, name="schedule")


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The schedule's name.",
        show_default=False,
        autocompletion=options.schedules,
    ),
]


@app.callback()
def schedule() -> None:
    """Run jobs on a schedule, once or repeatedly.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin
    """


@app.command()
def add(
    file: FileArgument,
    cron: Annotated[
        str | None,
        typer.Option(
            "--cron",
            metavar="EXPR",
            help="Minute, hour, day of month, month, and weekday, such as '0 2 * * 1-5'.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Run once: +10m, or a time such as 2026-03-29T06:00.",
            show_default=False,
        ),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            "--timezone",
            metavar="ZONE",
            help="IANA time zone of the due times. Default: UTC.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Default: the job's name.", show_default=False),
    ] = None,
    missed: Annotated[
        Missed,
        typer.Option("--missed", help="Policy for due times while no manager was running."),
    ] = Missed.RUN_ONCE,
    missed_within: Annotated[
        str | None,
        typer.Option(
            "--missed-within",
            metavar="SPAN",
            help="Skip due times that were missed longer ago, such as 6h.",
            show_default=False,
        ),
    ] = None,
    overlap: Annotated[
        Overlap,
        typer.Option("--overlap", help="Policy while the previous run is active."),
    ] = Overlap.SKIP,
    prewarm: Annotated[
        str | None,
        typer.Option(
            "--prewarm",
            metavar="SPAN",
            help="Prepare the fleet this long before a due time, such as 10m.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            "--capacity",
            min=1,
            help="Instances to prepare. Default: as many as the last runs used.",
            show_default=False,
        ),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="PREFIX",
            help="Prefix in the grid's bucket, such as raw/incoming/. Its objects at the due time "
            "are the input of a run, instead of the file's own.",
            show_default=False,
        ),
    ] = None,
    due_param: Annotated[
        str | None,
        typer.Option(
            "--due-param",
            metavar="KEY",
            help="Parameter of the job that receives the due time.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    max_cost: MaxCostOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the schedule of the same name.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Add a job file as a schedule to the running grid.

    The command uploads code and input. Later changes of the files have no effect until the schedule
    is added again with --replace. Options override cron, timezone, and at of the file.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * *' --missed run-all --prewarm 10m
    """
    from batchlab.cli import schedule_upload

    given = schedule_upload.ScheduleArguments(
        name=name,
        cron=cron,
        at=at,
        timezone=timezone,
        missed=missed,
        missed_within=missed_within,
        overlap=overlap,
        prewarm=prewarm,
        capacity=capacity,
        input=input_,
        due_param=due_param,
        max_cost_usd=cap_of(max_cost) if max_cost else None,
    )
    view = schedule_upload.add(home_of(home), file, set_ or (), given, replacing=replace)
    if json:
        output.show_json(view)
        return
    coming = f"is due next at {_moment(view, view['next_s'])}" if view["next_s"] else "is not due"
    output.show(f"{view['name']} {coming}")


@app.command("list")
def list_(home: HomeOption = None, json: JsonOption = False) -> None:
    """List the schedules with their next due time and last result.

    \b
    Example: batchlab schedule list
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.schedules()
    if json:
        output.show_json(found["schedules"])
        return
    if found["schedules"]:
        columns = ("name", "state", "when", "next", "last due", "last run", "job")
        output.show(output.table(columns, map(_row, found["schedules"])))
    else:
        output.say("There are no schedules: `batchlab schedule add FILE` makes one.")
    for note in found["notes"]:
        output.say(f"Note: {output.clean(note)}")


def _row(view: ScheduleView) -> tuple[object, ...]:
    last = next(iter(view["runs"]), None)
    return (
        view["name"],
        view["state"],
        _when(view),
        _moment(view, view["next_s"]),
        _moment(view, last["due_s"]) if last else "-",
        _result(last) if last else "-",
        (last["job"] if last else None) or "-",
    )


def _when(view: ScheduleView) -> str:
    if view["at_s"] is not None:
        return "once"
    return f"{view['cron']} {view['timezone']}"


def _moment(view: ScheduleView, at_s: float | None) -> str:
    from batchlab.core.schedules import due_times

    return "-" if at_s is None else due_times.shown(at_s, due_times.zone_of(view["timezone"]))


def _result(run: RunView) -> str:
    return run["result"] or run["state"]


@app.command()
def show(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Show a schedule with its runs, newest first, and the reasons of skipped due times.

    \b
    Example: batchlab schedule show nightly
    """
    from batchlab.cli import schedule_upload
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = client.schedule(name)
    changed = schedule_upload.since(view)
    if json:
        output.show_json({**view, "changed": changed})
        return
    warm = "-"
    if view["prewarm_s"]:
        count = "what the last runs used" if view["capacity"] is None else str(view["capacity"])
        warm = f"{output.span(view['prewarm_s'])} before, {count}"
    within = view["missed_within_s"]
    facts = {
        "schedule": view["name"],
        "job": view["job"],
        "state": view["state"],
        "when": _when(view),
        "next": _moment(view, view["next_s"]),
        "missed": view["missed"] + ("" if within is None else f" within {output.span(within)}"),
        "overlap": view["overlap"],
        "warm": warm,
        "input": ", ".join(view["input"]) or "as it was uploaded",
        "file": view["source"] or "-",
        "added": _moment(view, view["added_s"]),
    }
    output.show("\n".join(f"{key:<10}{output.clean(value)}" for key, value in facts.items()))
    if changed:
        output.say(f"Note: {output.clean(changed)}")
    if view["runs"]:
        columns = ("due", "run", "job", "started", "took", "reason")
        rows = [_run_row(view, run) for run in view["runs"]]
        output.show("\n" + output.table(columns, rows))


def _run_row(view: ScheduleView, run: RunView) -> tuple[object, ...]:
    took = "-"
    if run["started_s"] is not None and run["ended_s"] is not None:
        took = output.span(run["ended_s"] - run["started_s"])
    return (
        _moment(view, run["due_s"]),
        _result(run),
        run["job"] or "-",
        _moment(view, run["started_s"]),
        took,
        run["reason"],
    )


@app.command("next")
def next_(
    name: NameArgument,
    count: Annotated[
        int, typer.Option("--count", min=1, max=1000, help="Number of due times.")
    ] = 10,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """List the next due times, in the schedule's zone and in UTC.

    \b
    Example: batchlab schedule next nightly --count 5
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.coming(name, count=count)
    if json:
        output.show_json(found)
    elif not found:
        output.say(f"{name} is not due any more.")
    else:
        rows = [(one["local"], one["utc"]) for one in found]
        output.show(output.table(("local", "utc"), rows))


@app.command()
def pause(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Pause a schedule until `schedule resume`. Due times in between are skipped.

    \b
    Example: batchlab schedule pause nightly
    """
    _change(home, lambda client: client.pause_schedule(name), json)


@app.command()
def resume(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Resume a paused schedule from the next due time on.

    \b
    Example: batchlab schedule resume nightly
    """
    _change(home, lambda client: client.resume_schedule(name), json)


@app.command()
def remove(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Remove a schedule. A running job of it continues.

    \b
    Example: batchlab schedule remove nightly
    """
    _change(home, lambda client: client.remove_schedule(name), json, "is removed")


def _change(
    home: Path | None, verb: Callable[[Client], ScheduleView], json: bool, did: str = ""
) -> None:
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = verb(client)
    if json:
        output.show_json(view)
        return
    output.show(f"{view['name']} {did or view['state']}")
    for run in view["runs"]:
        if run["state"] == "running":
            output.say(f"Its job {run['job']} runs.")


@app.command()
def run(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Run a schedule's job now, in addition to its due times, and print the job's id.

    \b
    Example: batchlab schedule run nightly
    """
    from batchlab.cli import schedule_upload
    from batchlab.cli.session import Session
    from batchlab.core.errors import Refused

    token = schedule_upload.asked()
    with Session.attached(home_of(home)) as session:
        view = session.call(lambda client: client.run_schedule(name, token))
    if view["state"] == "skipped" or view["result"] == "REFUSED":
        raise Refused(
            f"Schedule {name} has not run: {view['reason'].rstrip('.')}.",
            remedy=f"`batchlab schedule show {name}` says what it runs.",
        )
    if json:
        output.show_json(view)
    elif view["job"]:
        output.show(view["job"])
    else:
        output.show(f"{name} waits for the run before it")
