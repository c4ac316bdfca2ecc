"""`batchlab notify`: notification targets, test notifications, and the notification log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from batchlab.core.api_types import TargetView

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `notify` to the root command."""
    root.add_typer(app, name="notify")


@app.callback()
def notify() -> None:
    """Show notification targets and sent notifications.

    The grid's own targets are in notify.toml in its folder, those of a job in its job file.

    \b
    Example: batchlab notify log
    """


@app.command("list")
def list_(home: HomeOption = None, json: JsonOption = False) -> None:
    """List the targets of the grid and of unfinished jobs.

    \b
    Example: batchlab notify list
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.notify_targets()
    if json:
        output.show_json(found)
    elif not found:
        output.say("There are no targets: add one to notify.toml, or under notify: in a job file.")
    else:
        columns = ("target", "kind", "to", "of", "signed", "for jobs")
        output.show(output.table(columns, map(_target_row, found)))


def _target_row(one: TargetView) -> tuple[object, ...]:
    moments = []
    for moment in one["on"]:
        more = ""
        if moment == "failures":
            more = f" from {one['failures']}"
        elif moment == "stuck":
            more = f" for {output.span(one['stuck_s'])}"
        moments.append(moment + more)
    signed = "yes" if one["signed"] else "no"
    jobs = "yes" if one["jobs"] else "no"
    return (one["name"], one["kind"], one["to"], ", ".join(moments) or "-", signed, jobs)


@app.command("test")
def try_(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="One of the grid's own targets.")],
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Send one test notification to a target. The exit code is 1 if that fails.

    \b
    Example: batchlab notify test ops
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        done = client.notify_test(target)
    if json:
        output.show_json(done)
    elif done["error"]:
        output.say(output.clean(f"{target} was not notified: {done['error']}"))
    else:
        output.show(f"{target} was notified.")
    if done["error"]:
        raise typer.Exit(1)


@app.command()
def log(
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=1000, help="Most notifications.")
    ] = 20,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """List notifications: first the pending ones, then the others with their results.

    \b
    Example: batchlab notify log --limit 50
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.notifications(limit=limit)
    if json:
        output.show_json(found)
    elif not found:
        output.say("There are no notifications yet.")
    else:
        rows = [
            (
                output.moment(one["at_s"]),
                one["job"] or "-",
                one["moment"],
                one["target"],
                one["state"],
                one["attempts"],
                one["error"] or "-",
            )
            for one in found
        ]
        columns = ("at", "job", "moment", "target", "state", "tries", "last error")
        output.show(output.table(columns, rows))
