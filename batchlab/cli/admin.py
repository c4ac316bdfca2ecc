"""Commands `schema`, `gc`, and `notify`, and the help texts of `manager`, `worker`, and `connect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from batchlab.cli import output
from batchlab.cli.deploy_options import REGION, DeployArguments, retry_notes, stack_and_region
from batchlab.cli.groups import Commands, command_group
from batchlab.cli.option_values import connect, home_of
from batchlab.cli.options import HOME, JSON, argument, flag, option
from batchlab.core.api_types import TargetView
from batchlab.core.errors import BackendError, Unreachable, UsageError

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
_ABOUT = {
    "manager": "Run a manager, which `grid up` and `run` normally start.",
    "worker": "Run a worker, which the manager normally starts.",
    "connect": "Keep open a connection to a manager on AWS, which `run` normally starts.",
}

app = Commands()
notify = command_group("notify")
app.add_typer(notify)


class Schema(StrEnum):
    """Kind of file that has a JSON Schema."""

    JOB = "job"
    SCENARIO = "scenario"


@app.command()
def schema(kind: Schema = argument("Kind of file: job or scenario.", "job|scenario", default=Schema.JOB)) -> None:
    """Print the JSON Schema of job files or of scenario files, for editors.

    \b
    Example: batchlab schema > job.schema.json
    """
    from batchlab.jobs import schema as job_schema
    from batchlab.scenarios.model import schema as scenario_schema

    output.show_json((job_schema if kind is Schema.JOB else scenario_schema).json_schema())


@app.command()
def gc(
    dry_run: bool = flag("List the leftovers that would be removed, and do not remove them.", "--dry-run"),
    images: bool = flag(
        "Also remove the images that batchlab has built and no container uses. Excludes --home and --aws.", "--images"
    ),
    aws: bool = flag("List the leftovers of stacks on AWS. Leftovers on AWS are removed only with --yes.", "--aws"),
    yes: bool = flag("With --aws: remove the leftovers of deleted stacks.", "--yes"),
    name: list[str] | None = option(
        "With --aws --yes: also remove the resource with this name, which only its name assigns to a stack. Repeatable."
    ),
    region: str | None = REGION,
    home: Path | None = option(
        "Folder of the only grid whose leftovers are listed and removed. With --aws: folder of the grid. Default with "
        "--aws: $BATCHLAB_HOME, or else .batchlab in the current folder.",
        "DIR",
    ),
    json: bool = JSON,
) -> None:
    """Remove leftovers of deleted grids on this machine or on AWS.

    On this machine, leftovers are processes, containers, networks, and volumes of a grid whose
    folder was deleted. The command keeps other grids, because `batchlab grid down` stops them.
    With --home, the command applies only to the grid that was in this folder. With --aws, the
    command skips this machine, and lists all resources in the region that have the tag of a stack.
    With --yes, the command removes the resources of deleted stacks, including buckets with all
    objects. SimpleDB domains and log groups of RDS are listed by name, and removed only if --name
    names them. The same applies to an IAM role, unless its tag names the stack and its policies
    name the region. The default of --region is the region of the stack in the grid's folder.

    \b
    Example: batchlab gc --dry-run
    """
    if aws:
        if images:
            raise UsageError("--images and --aws exclude each other.", remedy="Leave one of them out.")
        where = region or stack_and_region(DeployArguments(), home_of(home))[1]
        _sweep_aws(where, name or (), removing=yes and not dry_run, json=json)
        return
    if yes or region or name:
        raise UsageError("--yes, --name, and --region need --aws.", remedy="Add --aws, or leave them out.")
    if images and home:
        raise UsageError("--images and --home exclude each other.", remedy="Leave one of them out.")
    _sweep_machine(_Sweep(dry_run, home.resolve() if home else None), images=images, json=json)


@dataclass(slots=True)
class _Sweep:
    """Lines and documents about what `gc` has found on this machine."""

    dry_run: bool
    only: Path | None = None
    """Folder of the only grid to which the command applies, or None for all grids."""
    lines: list[str] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def covers(self, folder: str) -> bool:
        return self.only is None or (bool(folder) and Path(folder).resolve() == self.only)

    def note(self, what: str, kept: str, document: Mapping[str, Any], *, is_orphan: bool) -> None:
        """Note a find. `kept` is the reason to keep a find that is not an orphan."""
        outcome = ("would be removed" if self.dry_run else "removed") if is_orphan else f"{kept}: kept"
        self.lines.append(f"{what}, {outcome}.")
        self.documents.append({**document, "orphan": is_orphan, "removed": is_orphan and not self.dry_run})


def _sweep_machine(sweep: _Sweep, *, images: bool, json: bool) -> None:
    _sweep_processes(sweep)
    try:
        _sweep_docker(sweep, images=images)
    except Unreachable as error:
        # Without Docker, the machine cannot have running containers of a grid.
        output.say(f"Containers, networks, volumes, and images are not listed. {error}")
    if json:
        output.show_json(sweep.documents)
    elif sweep.lines:
        output.show("\n".join(sweep.lines))
    else:
        whose = f"the grid in {sweep.only}" if sweep.only else "a grid"
        output.say(f"This machine has no processes, containers, networks, or volumes of {whose}.")


def _sweep_processes(sweep: _Sweep) -> None:
    from batchlab.runtime.manager_process import grid_processes, kill_processes

    for found in grid_processes():
        if not sweep.covers(found.folder):
            continue
        if found.is_orphan and not sweep.dry_run:
            kill_processes(found)
        number = len(found.pids)
        what = f"{found.folder}: {number} {'process' if number == 1 else 'processes'}"
        document: dict[str, Any] = {"kind": "processes", "project": None, "folder": found.folder, "parts": number}
        sweep.note(what, "whose grid has a folder", document, is_orphan=found.is_orphan)


def _sweep_docker(sweep: _Sweep, *, images: bool) -> None:
    from batchlab.runtime.compose_project import projects, remove_image, remove_project, unused_images

    for project in projects():
        if not sweep.covers(project.home):
            continue
        if project.is_orphan and not sweep.dry_run:
            remove_project(project.project)
        owner = f"of the grid in {project.home}" if project.home else "not created by a grid"
        document: dict[str, Any] = {"kind": "containers", "project": project.project, "folder": project.home or None}
        what = f"{project.project}: {output.count(project.parts, 'part')}"
        sweep.note(what, owner, {**document, "parts": project.parts}, is_orphan=project.is_orphan)
    unused = {} if sweep.only else unused_images()
    if images:
        for tag, size_bytes in unused.items():
            if not sweep.dry_run:
                remove_image(tag)
            document = {"kind": "image", "project": tag, "folder": None, "parts": 1}
            sweep.note(f"{tag}: an image of {output.size(size_bytes)}", "", document, is_orphan=True)
    elif unused:
        output.say(
            f"No container uses {output.count(len(unused), 'image')} that batchlab has built. The next grid may use "
            f"{_it(len(unused))} again. `batchlab gc --images` removes {_it(len(unused))}."
        )


def service(context: typer.Context) -> None:
    """Run the service that the user named. The service parses its own arguments (see `cli.services`)."""
    from batchlab.cli.services import serve

    serve([str(context.info_name), *context.args])


for _name, _help in _ABOUT.items():
    app.command(_name, help=_help, context_settings=_PASSED_ON, hidden=True)(service)


def _sweep_aws(region: str | None, names: Sequence[str], *, removing: bool, json: bool) -> None:
    """List the AWS resources of batchlab stacks in the region. If `removing` is true, remove the resources of deleted
    stacks.

    A resource without batchlab's tag is removed only if `names` contains the resource's name. Raise BackendError if the
    removal of a resource fails.
    """
    from batchlab.deploy.account import Account
    from batchlab.deploy.leftovers import Leftovers, remove_left, select_removable

    with Account.open(region, notes=retry_notes) as account:
        leftovers = Leftovers(account)
        tagged = list(leftovers.tagged_resources())
        named = list(leftovers.named_resources({leftover.resource.name for leftover in tagged}, output.say))
        everything = sorted([*tagged, *named], key=lambda leftover: (leftover.resource.stack, leftover.resource.arn))
        going = select_removable(everything, names)
        rows, documents, failed = [], [], 0
        for leftover in everything:
            resource = leftover.resource
            is_chosen = removing and leftover in going
            problem = remove_left(account, leftover, output.say) if is_chosen else ""
            failed += bool(problem)
            state = "in use" if leftover.is_used else "left, by its name" if leftover.is_guessed else "left"
            if is_chosen:
                state = f"left: {problem}" if problem else "removed"
            rows.append((resource.stack, resource.kind, resource.name, state))
            documents.append(
                {
                    "stack": resource.stack,
                    "kind": resource.kind,
                    "name": resource.name,
                    "arn": resource.arn,
                    "known_by": "name" if leftover.is_guessed else "tag",
                    "left": not leftover.is_used,
                    "removed": is_chosen and not problem,
                    "why": problem or None,
                }
            )
        nothing = f"Account {account.id} has no resource with the tag or a name of a stack in {account.region}."
    output.listing(json, documents, ("stack", "kind", "name", "is"), rows, nothing)
    staying = [leftover for leftover in everything if not (leftover.is_used or (removing and leftover in going))]
    by_name = sum(leftover.is_guessed for leftover in staying)
    by_tag = len(staying) - by_name
    if by_tag and not json:
        output.say(f"{output.count(by_tag, 'resource')} left. `batchlab gc --aws --yes` removes {_it(by_tag)}.")
    if by_name and not json:
        output.say(
            f"{output.count(by_name, 'resource')} left that only the name assigns to a stack. Check the owner first. "
            f"`batchlab gc --aws --yes --name NAME` removes {_it(by_name)}."
        )
    if failed:
        raise BackendError(
            f"{output.count(failed, 'resource')} could not be removed.",
            remedy="The list has the reasons. Remove other kinds of resources in the console.",
        )


def _it(number: int) -> str:
    return "it" if number == 1 else "them"


@notify.callback()
def notify_() -> None:
    """Show notification targets and sent notifications.

    The file notify.toml in the grid's folder contains the targets of the grid. A job file contains
    the targets of its job.

    \b
    Example: batchlab notify log
    """


@notify.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the notification targets of the grid and of unfinished jobs.

    \b
    Example: batchlab notify list
    """
    from batchlab.runtime.settings import read_notifications

    place = home_of(home)
    with connect(place) as client:
        targets = client.notify_targets()
    try:
        read_notifications(place, in_container=True)
    except UsageError as error:
        # The manager writes this error only to its log. A variable may be set for the manager and not in this shell.
        output.say(f"In this shell, notify.toml is invalid, so the manager may use its earlier targets. {error}")
    columns = ("target", "kind", "to", "of", "signed", "for jobs")
    nothing = f"There are no targets. Add one to {place.notify_file}, or under notify: in a job file."
    output.listing(json, targets, columns, map(_target_row, targets), nothing)


def _target_row(target: TargetView) -> tuple[object, ...]:
    limits = {"failures": f" from {target['failures']}", "stuck": f" for {output.span(target['stuck_s'])}"}
    moments = ", ".join(moment + limits.get(moment, "") for moment in target["on"]) or "-"
    signed, jobs = ("yes" if is_set else "no" for is_set in (target["signed"], target["jobs"]))
    return (target["name"], target["kind"], target["to"], moments, signed, jobs)


@notify.command("test")
def try_(
    target: str = argument("Name of a notification target of the grid.", "TARGET"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Send a test notification to a target. The exit code is 1 if the test notification was not delivered.

    \b
    Example: batchlab notify test ops
    """
    with connect(home) as client:
        result = client.notify_test(target)
    if result["error"] and not json:
        output.say(output.clean(f"{target} was not notified: {result['error']}"))
    else:
        output.answer(json, result, f"{target} was notified.")
    if result["error"]:
        raise typer.Exit(1)


@notify.command()
def log(
    limit: int = option("Maximum number of listed notifications.", default=20, min=1, max=1000),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List notifications: first the pending notifications, then the finished notifications with their results.

    \b
    Example: batchlab notify log --limit 50
    """
    with connect(home) as client:
        notifications = client.notifications(limit=limit)
    rows = []
    for view in notifications:
        subject = (output.moment(view["at_s"]), view["job"] or "-", view["moment"], view["target"])
        rows.append((*subject, view["state"], view["attempts"], view["error"] or "-"))
    columns = ("at", "job", "moment", "target", "state", "tries", "last error")
    output.listing(json, notifications, columns, rows, "There are no notifications yet.")
