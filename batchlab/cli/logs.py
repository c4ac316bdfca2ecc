"""`batchlab job logs`: what a job's tasks have printed, or print."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JobArgument, JsonOption, home_of, seconds_of
from batchlab.errors import UsageError

if TYPE_CHECKING:
    from batchlab.cli.following import Line, Which
    from batchlab.home import Home


def logs(
    job: JobArgument,
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="[TASK]",
            help="Only this task, such as parse/3; 3 alone is that of every stage.",
            show_default=False,
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="All of this stage.", show_default=False),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Line by line, as it comes, until the job ends."),
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only of tasks that failed for good.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="DURATION",
            help="Only of attempts that ended within it, such as 10m, or still run.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="At most so many attempts; not with --follow.")
    ] = 100,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Print what tasks printed, their failed attempts included; with --follow as they print it.

    --follow puts the task's name before each line, and with --json prints a JSON object a line.
    What a running task prints is stored by its worker only while somebody follows.

    \b
    Example: batchlab job logs last --follow
    """
    from batchlab.cli.following import Which
    from batchlab.tasknames import parse_task

    index: int | None = None
    if task is not None:
        if stage is not None:
            raise UsageError(
                "A task and --stage exclude each other.",
                remedy="Write the stage and the index, such as parse/3.",
            )
        stage, index = parse_task(task)
    which = Which(stage, index, failed, seconds_of("--since", since) if since else None)
    if follow:
        _follow(home_of(home), job, which, json=json)
    else:
        _print(home_of(home), job, which, limit, json=json)


def _print(home: Home, job: str, which: Which, limit: int, *, json: bool) -> None:
    from batchlab.cli.session import connect, resolve
    from batchlab.tasknames import attempt_name

    with connect(home) as client:
        found = client.logs(
            resolve(client, job)["id"],
            stage=which.stage,
            task=which.task,
            limit=limit,
            failed=which.failed,
            since_s=which.since_s,
        )
    if json:
        output.show_json(found)
    for one in [] if json else found:
        name = attempt_name(one["stage"], one["task"], one["attempt"])
        output.show(f"--- {name}")
        output.show(output.visible(one["text"]).rstrip("\n"))
    if not found:
        output.say("No task has printed anything, or not yet.")
    elif len(found) == limit:
        output.say(f"There may be more than {limit}; --limit shows more.")


def _follow(home: Home, job: str, which: Which, *, json: bool) -> None:
    from batchlab.cli.following import Follower, to_json
    from batchlab.cli.session import Session, resolve
    from batchlab.cli.signals import Stopped

    with Session.attached(home) as session:
        view = session.call(lambda client: resolve(client, job))
        name = view["id"]

        def tell(line: Line) -> None:
            if json:
                output.show_json(to_json(name, line), indent=None)
            elif line.is_note:
                output.show(f"{line.name} | [{output.clean(line.text)}]")
            else:
                output.show(f"{line.name} | {output.visible(line.text)}")

        follower = Follower(name, which, session.call, tell)
        try:
            follower.run()
        except Stopped:
            # What has no line's end yet is shown all the same.
            with suppress(Stopped):
                follower.close()
            raise
    if not json:
        _say_end(home, name, which)


def _say_end(home: Home, job: str, which: Which) -> None:
    from batchlab.cli.session import connect

    with connect(home) as client:
        state = client.job(job)["state"]
    if which.task is None:
        output.say(f"{job} is {state}.")
