"""`ledger`, `doctor`, `schema`, and the services."""

from __future__ import annotations

from typing import Annotated

import typer

from batchlab.cli import SERVICES, output
from batchlab.cli.deploy_options import RegionOption
from batchlab.cli.options import BackendOption, EndpointOption, HomeOption, JsonOption, home_of

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_ABOUT = {
    "manager": "Run a manager (`grid up` and `run` do so).",
    "worker": "Run a worker (the manager does so).",
    "connect": "Keep a way to a manager on AWS open (`run` does so).",
}

ledger = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(ledger, name="ledger")
    app.command()(schema)
    app.command()(doctor)
    app.command()(gc)
    for name in SERVICES:
        app.command(name, help=_ABOUT[name], context_settings=_PASSED_ON)(service)


@ledger.callback()
def ledger_() -> None:
    """Repair the database that people and the planner read.

    \b
    Example: batchlab ledger rebuild
    """


@ledger.command()
def rebuild(home: HomeOption = None, json: JsonOption = False) -> None:
    """Make the ledger anew from the bucket alone, which holds all that counts.

    The rebuild goes on past objects that cannot be read, and lists them at its end.

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
    output.show(f"The ledger is made anew: {output.count(view['jobs'], 'job')}.")
    for one in unreadable:
        output.show(f"Not read: {one['key']}: {one['reason']}")


def schema() -> None:
    """Print the job file's JSON Schema, for editors.

    \b
    Example: batchlab schema > job.schema.json
    """
    from batchlab.jobs.json_schema import json_schema

    output.show_json(json_schema())


def doctor(
    home: HomeOption = None,
    backend: BackendOption = "local",
    endpoint: EndpointOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move damaged objects of `local` away.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check that a grid can run here.

    Each line is ok, warn or fail, with what to do; exit code 1 where anything fails.
    Empty and torn objects in the grid's folder are named, and moved away with --repair.

    \b
    Example: batchlab doctor
    """
    from batchlab.cli.doctor import Level, examine

    findings = examine(home_of(home), backend, endpoint, repair=repair)
    if json:
        output.show_json([one.to_json() for one in findings])
    else:
        for one in findings:
            output.show(f"{one.level:<5} {one.about:<12} {output.clean(one.text)}")
            if one.remedy:
                output.show(f"{'':<18} {output.clean(one.remedy)}")
    if any(one.level is Level.FAIL for one in findings):
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    aws: Annotated[
        bool,
        typer.Option("--aws", help="What stacks have left behind on AWS; removed only with --yes."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --aws: remove what is left.")] = False,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="With --aws: also this one, which only its name says to be a stack's; may be "
            "repeated.",
            show_default=False,
        ),
    ] = None,
    region: RegionOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what grids that are gone have left, in Docker or on AWS.

    Grids whose folder still knows of them are left alone: `batchlab grid down` ends those. With
    --aws Docker is not looked at: everything in the region that has a stack's tag is listed, and
    what no stack has any more is removed where --yes says so, buckets with all objects. What can
    have no tag, as SimpleDB's domains, is listed by its name, and removed where --name says so too.
    Without --region it is that of the stack that the grid's folder knows.

    \b
    Example: batchlab gc --dry-run
    """
    from batchlab.core.errors import UsageError

    if aws:
        from batchlab.cli.deploy_options import sweep_aws
        from batchlab.cli.deploy_output import Given, place

        where = region or place(Given(), home_of(home))[1]
        sweep_aws(where, name or (), removing=yes and not dry_run, json=json)
        return
    if yes or region or name or home:
        raise UsageError(
            "--yes, --name, --region and --home are for what is on AWS.",
            remedy="Say --aws, or leave them out.",
        )
    _sweep_docker(dry_run=dry_run, json=json)


def _sweep_docker(*, dry_run: bool, json: bool) -> None:
    from batchlab.runtime.compose.project import projects, sweep

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
