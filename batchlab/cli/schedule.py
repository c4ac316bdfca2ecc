"""`batchlab schedule …`: jobs that run at a time, or again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import completion, output
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

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The schedule's name.",
        show_default=False,
        autocompletion=completion.schedules,
    ),
]


@app.callback()
def schedule() -> None:
    """Run jobs when they are due: once, or again and again.

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
            help="Minute, hour, day of month, month, weekday, such as '0 2 * * 1-5'.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Once: +10m, or a time such as 2026-03-29T06:00.",
            show_default=False,
        ),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            "--timezone",
            metavar="ZONE",
            help="IANA time zone that times are meant in; UTC unless said.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Unless said, the job's own name.", show_default=False
        ),
    ] = None,
    missed: Annotated[
        Missed,
        typer.Option("--missed", help="What to make of due times at which no manager was there."),
    ] = Missed.RUN_ONCE,
    missed_within: Annotated[
        str | None,
        typer.Option(
            "--missed-within",
            metavar="SPAN",
            help="Make up for nothing that was missed longer ago, such as 6h.",
            show_default=False,
        ),
    ] = None,
    overlap: Annotated[
        Overlap,
        typer.Option("--overlap", help="What to do while the run before has not ended."),
    ] = Overlap.SKIP,
    prewarm: Annotated[
        str | None,
        typer.Option(
            "--prewarm",
            metavar="SPAN",
            help="Have the fleet ready so long before, such as 10m.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            "--capacity",
            min=1,
            help="Instances to have ready; unless said what the last runs used.",
            show_default=False,
        ),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="PREFIX",
            help="Each run's input: the objects that are then below this prefix of the grid's "
            "bucket, such as raw/incoming/, in place of the file's own.",
            show_default=False,
        ),
    ] = None,
    due_param: Annotated[
        str | None,
        typer.Option(
            "--due-param",
            metavar="KEY",
            help="Parameter of the job that gets the due time.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    max_cost: MaxCostOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Change the schedule of that name.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Keep a job file as a schedule of the grid that is up.

    Code and input are uploaded now; a file that changes later changes nothing, until it is added
    again with --replace. Options take the place of the file's own cron, timezone and at.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * *' --missed run-all --prewarm 10m
    """
    from batchlab.cli import schedule_files

    given = schedule_files.Given(
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
    view = schedule_files.add(home_of(home), file, set_ or (), given, replacing=replace)
    if json:
        output.show_json(view)
        return
    coming = f"is due next at {_moment(view, view['next_s'])}" if view["next_s"] else "is not due"
    output.show(f"{view['name']} {coming}")


@app.command("list")
def list_(home: HomeOption = None, json: JsonOption = False) -> None:
    """List the schedules, when each is due next and how its last run ended.

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
        _came_to(last) if last else "-",
        (last["job"] if last else None) or "-",
    )


def _when(view: ScheduleView) -> str:
    if view["at_s"] is not None:
        return "once"
    return f"{view['cron']} {view['timezone']}"


def _moment(view: ScheduleView, at_s: float | None) -> str:
    from batchlab.core.schedules import due_times

    return "-" if at_s is None else due_times.shown(at_s, due_times.zone_of(view["timezone"]))


def _came_to(run: RunView) -> str:
    return run["result"] or run["state"]


@app.command()
def show(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Show one schedule with its runs, newest first, and why a due time was skipped.

    \b
    Example: batchlab schedule show nightly
    """
    from batchlab.cli import schedule_files
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = client.schedule(name)
    changed = schedule_files.since(view)
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
        _came_to(run),
        run["job"] or "-",
        _moment(view, run["started_s"]),
        took,
        run["reason"],
    )


@app.command("next")
def next_(
    name: NameArgument,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="How many.")] = 10,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """List the coming due times, in the schedule's zone and in UTC.

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
    """Start nothing until `schedule resume`; what falls due meanwhile is not run.

    \b
    Example: batchlab schedule pause nightly
    """
    _tell(home, lambda client: client.pause_schedule(name), json)


@app.command()
def resume(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Go on with what falls due from now on.

    \b
    Example: batchlab schedule resume nightly
    """
    _tell(home, lambda client: client.resume_schedule(name), json)


@app.command()
def remove(name: NameArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Forget a schedule; a job of it that runs is finished.

    \b
    Example: batchlab schedule remove nightly
    """
    _tell(home, lambda client: client.remove_schedule(name), json, "is removed")


def _tell(
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
    """Run a schedule's job now, beside its due times; prints the job's id.

    \b
    Example: batchlab schedule run nightly
    """
    from batchlab.cli import schedule_files
    from batchlab.cli.session import Session
    from batchlab.core.errors import Refused

    token = schedule_files.asked()
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
