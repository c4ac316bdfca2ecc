"""`batchlab job failures` and `retry`: what failed, why, and which of it runs again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JobArgument, JsonOption, home_of
from batchlab.core.task_names import parse_tasks, task_name

if TYPE_CHECKING:
    from batchlab.core.api_types import FailureGroupView, FailureView


def failures(
    job: JobArgument,
    each: Annotated[
        bool, typer.Option("--each", help="List every task, not one line for each cause.")
    ] = False,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            "--fingerprint",
            metavar="FINGERPRINT",
            help="List every task that failed for this cause.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="With --each or --fingerprint at most so many.")
    ] = 100,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show why tasks failed for good: one line for each cause, with its first traceback.

    \b
    Example: batchlab job failures last
    """
    from batchlab.cli.session import connect, resolve

    with connect(home_of(home)) as client:
        name = resolve(client, job)["id"]
        if each or fingerprint:
            _show_each(client.failures(name, limit=limit, fingerprint=fingerprint), limit, json)
        else:
            _show_groups(client.failure_groups(name), json)


def _show_groups(found: list[FailureGroupView], json: bool) -> None:
    if json:
        output.show_json(found)
        return
    if not found:
        output.say("No task has failed for good.")
        return
    rows = [
        (
            one["fingerprint"],
            one["count"],
            one["stage"],
            one["first"]["kind"],
            _exit(one["first"]),
            one["first"]["reason"],
        )
        for one in found
    ]
    columns = ("fingerprint", "tasks", "stage", "kind", "exit", "reason, of the first")
    output.show(output.table(columns, rows))
    for one in found:
        _show_traceback(one["first"])
    output.say("`batchlab job retry JOB --fingerprint FINGERPRINT` runs the tasks of one again.")


def _show_each(found: list[FailureView], limit: int, json: bool) -> None:
    if json:
        output.show_json(found)
        return
    if not found:
        output.say("No such task has failed for good.")
        return
    columns = ("task", "attempt", "kind", "exit", "fingerprint", "reason")
    rows = [
        (
            task_name(f["stage"], f["task"]),
            f["attempt"],
            f["kind"],
            _exit(f),
            f["fingerprint"],
            f["reason"],
        )
        for f in found
    ]
    output.show(output.table(columns, rows))
    shown: set[str] = set()
    for one in found:
        if one["fingerprint"] not in shown:
            shown.add(one["fingerprint"])
            _show_traceback(one)
    if len(found) == limit:
        output.say(f"There may be more than {limit}; --limit shows more.")


def _exit(failure: FailureView) -> object:
    return "-" if failure["exit_code"] is None else failure["exit_code"]


def _show_traceback(failure: FailureView) -> None:
    if failure["traceback"]:
        output.show(f"\n--- {task_name(failure['stage'], failure['task'])}")
        output.show(output.visible(failure["traceback"]).rstrip("\n"))


def retry(
    job: JobArgument,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="TASKS",
            help="Of what failed only these tasks, such as parse/3,7-9; may be repeated.",
            show_default=False,
        ),
    ] = None,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            "--fingerprint",
            metavar="FINGERPRINT",
            help="Of what failed only the tasks of this cause; may be repeated.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Run again what did not succeed in a job that has ended; the rest is kept.

    With --tasks or --fingerprint the other failures stay as they are.

    \b
    Example: batchlab job retry last
    """
    from batchlab.cli.session import connect, resolve

    ranges: dict[str, list[tuple[int, int]]] = {}
    for stage, some in map(parse_tasks, tasks or ()):
        ranges.setdefault(stage, []).extend(some)
    with connect(home_of(home)) as client:
        name = resolve(client, job)["id"]
        if ranges or fingerprint:
            view = client.retry(name, fingerprints=fingerprint or (), tasks=ranges)
        else:
            view = client.retry(name)
    if json:
        output.show_json(view)
    else:
        output.show(f"{view['id']} {view['state']}")
