"""`batchlab ledger`, `schema`, `gc`, and the help of the services.

`batchlab notify`: notification targets, test notifications, and the notification log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.deploy_options import REGION
from batchlab.cli.options import HOME, JSON, argument, flag, home_of, option
from batchlab.cli.startup import SERVICES

if TYPE_CHECKING:
    from batchlab.core.api_types import TargetView

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_ABOUT = {
    "manager": "Run a manager (`grid up` and `run` do this).",
    "worker": "Run a worker (the manager does this).",
    "connect": "Keep a connection to a manager on AWS open (`run` does this).",
}

ledger = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the commands."""
    root.add_typer(app, name="notify")
    root.add_typer(ledger, name="ledger")
    root.command()(schema)
    root.command()(gc)
    for name in SERVICES:
        root.command(name, help=_ABOUT[name], context_settings=_PASSED_ON)(service)


@ledger.callback()
def ledger_() -> None:
    """Repair the ledger's database.

    \b
    Example: batchlab ledger rebuild
    """


@ledger.command()
def rebuild(home: Path | None = HOME, json: bool = JSON) -> None:
    """Rebuild the ledger from the bucket, which contains all durable state.

    Unreadable objects do not stop the rebuild. They are listed at its end.

    \b
    Example: batchlab ledger rebuild
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = client.rebuild_ledger()
    # A manager of an earlier version stops at the first unreadable object instead.
    unreadable = view.get("unreadable", [])
    if json:
        output.show_json({"jobs": view["jobs"], "unreadable": unreadable})
        return
    output.show(f"The ledger is rebuilt: {output.count(view['jobs'], 'job')}.")
    for one in unreadable:
        output.show(f"Not read: {one['key']}: {one['reason']}")


def schema() -> None:
    """Print the job file's JSON Schema, for editors.

    \b
    Example: batchlab schema > job.schema.json
    """
    from batchlab.jobs.schema import json_schema

    output.show_json(json_schema())


def gc(
    dry_run: bool = flag("Only list what would be removed.", "--dry-run"),
    aws: bool = flag("List leftovers of stacks on AWS. They are removed only with --yes.", "--aws"),
    yes: bool = flag("With --aws: remove the leftovers.", "--yes"),
    name: list[str] | None = option(
        "With --aws --yes: also remove this resource, which only its name assigns to a stack. May be repeated."
    ),
    region: str | None = REGION,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Remove leftovers of deleted grids in Docker or on AWS.

    Grids with an existing folder are kept: `batchlab grid down` stops those. With --aws the command
    skips Docker, and lists all resources in the region with the tag of a stack. --yes removes those
    of deleted stacks, including buckets with all objects. Resources without tags, such as SimpleDB
    domains, are listed by name, and removed only if --name names them. The default of --region is
    that of the stack in the grid's folder.

    \b
    Example: batchlab gc --dry-run
    """
    from batchlab.core.errors import UsageError

    if aws:
        from batchlab.cli.deploy_options import DeployArguments, stack_and_region

        where = region or stack_and_region(DeployArguments(), home_of(home))[1]
        _sweep_aws(where, name or (), removing=yes and not dry_run, json=json)
        return
    if yes or region or name or home:
        raise UsageError("--yes, --name, --region, and --home need --aws.", remedy="Add --aws, or leave them out.")
    _sweep_docker(dry_run=dry_run, json=json)


def _sweep_docker(*, dry_run: bool, json: bool) -> None:
    from batchlab.runtime.compose_project import projects, sweep

    found = projects()
    for one in found:
        if one.is_orphan and not dry_run:
            sweep(one.project)
    if json:
        output.show_json(
            [
                {
                    "project": one.project,
                    "folder": one.home or None,
                    "parts": one.parts,
                    "orphan": one.is_orphan,
                    "removed": one.is_orphan and not dry_run,
                }
                for one in found
            ]
        )
        return
    if not found:
        output.say("There is nothing of any grid on this machine's Docker.")
    for one in found:
        parts = output.count(one.parts, "part")
        if not one.is_orphan:
            whose = f"of the grid in {one.home}" if one.home else "of whoever made it by hand"
            output.show(f"{one.project}: {parts}, {whose}: left alone.")
        elif dry_run:
            output.show(f"{one.project}: {parts}, would be removed.")
        else:
            output.show(f"{one.project}: {parts}, removed.")


def service(context: typer.Context) -> None:
    """See cli.service, which reads the arguments itself."""
    from batchlab.cli.services import serve

    serve([str(context.info_name), *context.args])


_AWS_COLUMNS = ("stack", "kind", "name", "is")


def _sweep_aws(region: str | None, names: Sequence[str], *, removing: bool, json: bool) -> None:
    """List resources of stacks, and with `removing` remove those of deleted stacks.

    Resources without a tag are removed only if `names` contains them. Raise BackendError if a
    removal fails.
    """
    from batchlab.cli.deploy_options import retry_notes
    from batchlab.core.errors import BackendError
    from batchlab.deploy.account import Account
    from batchlab.deploy.leftovers import Leftovers, remove_left, select_removable

    with Account.open(region, notes=retry_notes) as account:
        leftovers = Leftovers(account)
        tagged = list(leftovers.tagged())
        named = list(leftovers.named({one.resource.name for one in tagged}, output.say))
        lefts = sorted([*tagged, *named], key=lambda one: (one.resource.stack, one.resource.arn))
        going = select_removable(lefts, names)
        rows, shown, stays = [], [], 0
        for one in lefts:
            resource = one.resource
            goes = removing and one in going
            why = remove_left(account, one, output.say) if goes else ""
            stays += bool(why)
            fate = "in use" if one.is_used else "left, by its name" if one.is_guessed else "left"
            if goes:
                fate = f"left: {why}" if why else "removed"
            rows.append((resource.stack, resource.kind, resource.name, fate))
            shown.append(
                {
                    "stack": resource.stack,
                    "kind": resource.kind,
                    "name": resource.name,
                    "arn": resource.arn,
                    "known_by": "name" if one.is_guessed else "tag",
                    "left": not one.is_used,
                    "removed": goes and not why,
                    "why": why or None,
                }
            )
        where = f"account {account.id}, {account.region}"
    if json:
        output.show_json(shown)
    elif rows:
        output.show(output.table(_AWS_COLUMNS, rows))
    else:
        output.say(f"Nothing in {where} has the tag of a stack, or a name as a stack gives them.")
    if not json:
        _say_how(
            0 if removing else sum(1 for one in tagged if not one.is_used),
            sum(1 for one in named if not (one.is_used or (removing and one in going))),
        )
    if stays:
        raise BackendError(
            f"{output.count(stays, 'thing')} could not be removed.",
            remedy="The list has the reasons. Remove other kinds of resources in the console.",
        )


def _say_how(by_tag: int, by_name: int) -> None:
    """Print the commands that remove the leftovers."""
    if by_tag:
        output.say(f"{output.count(by_tag, 'thing')} left; `batchlab gc --aws --yes` removes it.")
    if by_name:
        output.say(
            f"{output.count(by_name, 'thing')} left that only the name says to be a stack's: look "
            "whose it is; `batchlab gc --aws --yes --name NAME` removes it."
        )


app = typer.Typer(no_args_is_help=True)


@app.callback()
def notify() -> None:
    """Show notification targets and sent notifications.

    The grid's own targets are in notify.toml in its folder, those of a job in its job file.

    \b
    Example: batchlab notify log
    """


@app.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
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
    target: str = argument("One of the grid's own targets.", "TARGET"), home: Path | None = HOME, json: bool = JSON
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
    limit: int = option("Most notifications.", default=20, min=1, max=1000), home: Path | None = HOME, json: bool = JSON
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
