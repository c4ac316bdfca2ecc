"""`batchlab notify …`: whom the grid tells of its jobs, a test of that, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from batchlab.core.api_types import TargetView

app = typer.Typer(no_args_is_help=True)


@app.callback()
def notify() -> None:
    """Look at whom the grid notifies, and at what came of it.

    The grid's own targets stand in notify.toml in its folder, a job's in its file.

    \b
    Example: batchlab notify log
    """


@app.command("list")
def list_(home: HomeOption = None, json: JsonOption = False) -> None:
    """List the targets: the grid's own, and those of jobs that have not ended.

    \b
    Example: batchlab notify list
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.notify_targets()
    if json:
        output.show_json(found)
    elif not found:
        output.say("Nobody is notified: name somebody in notify.toml, or by notify: in a job file.")
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
    """Send a test to a target, once, and say what came of it; exit code 1 where it failed.

    \b
    Example: batchlab notify test ops
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        done = client.notify_test(target)
    if json:
        output.show_json(done)
    elif done["error"]:
        output.say(output.clean(f"{target} was not told: {done['error']}"))
    else:
        output.show(f"{target} was told.")
    if done["error"]:
        raise typer.Exit(1)


@app.command()
def log(
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many.")] = 20,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """List notifications: those on their way first, then what came of the others.

    \b
    Example: batchlab notify log --limit 50
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.notifications(limit=limit)
    if json:
        output.show_json(found)
    elif not found:
        output.say("Nobody has been notified yet.")
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
