"""`batchlab job replay-task`: a task of a grid, run again in front of the user."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.bucket import AnyBackendOption, Bucket, TaskArgument, find, stage_of
from batchlab.cli.options import HomeOption, JobArgument, JsonOption, home_of
from batchlab.core.errors import UsageError
from batchlab.core.task_names import parse_task, task_name

if TYPE_CHECKING:
    from batchlab.client.debug.foreground import How
    from batchlab.client.debug.task_folder import Told
    from batchlab.client.debug.verdict import Verdict

AttemptOption = Annotated[
    int | None,
    typer.Option(
        "--attempt",
        min=1,
        metavar="N",
        help="That attempt; unless said, the last that failed, else the last.",
        show_default=False,
    ),
]
RoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        min=0,
        metavar="R",
        help="Of that round: 0 before the first `job retry`.",
        show_default=False,
    ),
]


def replay_task(
    job: JobArgument,
    task: TaskArgument,
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="On this machine, which is the only place there is.",
            show_default=False,
        ),
    ] = True,
    attempt: AttemptOption = None,
    round_: RoundOption = None,
    debug: Annotated[
        bool | None,
        typer.Option(
            "--debug/--no-debug",
            help="pdb where it fails; unless said, where a terminal is in front.",
            show_default=False,
        ),
    ] = None,
    break_: Annotated[
        bool, typer.Option("--break", help="pdb at the handler's first line too.")
    ] = False,
    debugpy: Annotated[
        int | None,
        typer.Option(
            "--debugpy",
            min=1,
            max=65535,
            metavar="PORT",
            help="Wait for an IDE to attach at that port of this machine.",
            show_default=False,
        ),
    ] = None,
    shell: Annotated[
        bool, typer.Option("--shell", help="Of a command: a shell where it would run.")
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="DIR",
            help="Only prepare that folder, with input, code and a README.",
            show_default=False,
        ),
    ] = None,
    no_limits: Annotated[
        bool, typer.Option("--no-limits", help="Without the job's time and memory limit.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME",
            help="Give it that variable of here too; again for more.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
    backend: AnyBackendOption = None,
    json: JsonOption = False,
) -> None:
    """Run a task again on this machine, under a debugger: its input, code and limits as there.

    It is the job's code that runs, with your rights. Of the environment it is given only
    what is never a secret, such as PATH and LANG, and what --env names.

    Nothing of it reaches the grid. At the end it says whether the task failed in the same way, and
    what is known to be different here. Exit code 0 where it succeeds, 1 where it fails.

    \b
    Example: batchlab job replay-task last parse/3 --local
    """
    del local
    how = _how(debug=debug, at_start=break_, debugpy=debugpy, no_limits=no_limits, json=json)
    how = replace(how, passed=_set_here(env or ()))
    named, index = parse_task(task)
    place = home_of(home)
    bucket = find(place, backend, job)
    with _folder(keep) as folder:
        told = _brought(bucket, named, index, folder, attempt, round_)
        if keep:
            _kept(told, json=json)
        elif shell:
            _shell(told, how)
        else:
            _run(told, how, json=json)


def _how(
    *, debug: bool | None, at_start: bool, debugpy: int | None, no_limits: bool, json: bool
) -> How:
    from batchlab.client.debug.foreground import How

    if debugpy is not None and find_spec("debugpy") is None:
        raise UsageError(
            "debugpy is not installed for this Python.",
            remedy=f"`{shlex.quote(sys.executable)} -m pip install debugpy` installs it; --debug "
            "needs nothing.",
        )
    if debug is None:
        debug = at_start or (sys.stdin.isatty() and sys.stdout.isatty() and not json)
    return How(
        pdb=debug and debugpy is None,
        at_start=at_start,
        debugpy=debugpy,
        no_limits=no_limits,
        aside=json,
    )


def _set_here(names: Iterable[str]) -> tuple[str, ...]:
    """UsageError where one is not set: a name that is mistyped would give nothing."""
    found = tuple(names)
    for name in found:
        if name not in os.environ:
            raise UsageError(
                f"There is no variable {name!r} here.",
                remedy="Set it, or leave out --env.",
            )
    return found


def _is_given(how: How) -> str:
    """What is to be known before a job's code runs here."""
    from batchlab.client.debug.foreground import told, withheld

    kept_back = told(withheld(os.environ, how.passed))
    return "It is the job's code, and runs with your rights." + (f" {kept_back}" * bool(kept_back))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to prepare: the user's, or one that goes afterwards."""
    from batchlab.client.debug.prepare import room

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="batchlab-task-") as made:
            yield Path(made)
        return
    folder = keep.absolute()
    room(folder)
    yield folder


def _brought(
    bucket: Bucket,
    stage: str | None,
    task: int,
    folder: Path,
    attempt: int | None,
    round_: int | None,
) -> Told:
    from batchlab.client.debug.prepare import bring
    from batchlab.core.model import JobId

    name = stage_of(bucket, stage)
    output.say(f"Fetching {task_name(name, task)} of {bucket.job}.")
    try:
        return bucket.read(
            lambda objects, patience: bring(
                objects,
                JobId(bucket.job),
                name,
                task,
                folder,
                patience=patience,
                number=attempt,
                round_=round_,
            )
        )
    except OSError as error:
        raise UsageError(
            f"The task cannot be brought to {folder}: {error.strerror or error}.",
            remedy="Free some space, or name a folder with --keep.",
        ) from error


def _kept(told: Told, *, json: bool) -> None:
    from batchlab.client.debug.task_folder import README, RUN

    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(told.folder / RUN))}"
    if json:
        output.show_json(
            {"folder": str(told.folder), "command": command, "readme": str(told.folder / README)}
        )
        return
    output.show(command)
    debugging = "" if told.is_command else " (--pdb and --break debug it)"
    output.say(f"{told.name} is in {told.folder}; this runs it{debugging}. {README} says more.")


def _shell(told: Told, how: How) -> None:
    from batchlab.client.debug import foreground

    ready = foreground.shell(told, how.passed)
    output.say(_is_given(how))
    output.say("A shell where the command would run; `exit` leaves it, and removes the folder.")
    output.show(output.visible(ready.command))
    code = foreground.open_shell(ready)
    if code:
        raise typer.Exit(1)


def _run(told: Told, how: How, *, json: bool) -> None:
    from batchlab.client.debug import foreground, verdict

    limits = "" if how.no_limits else _limits(told)
    output.say(f"Running {told.name}, attempt {told.attempt}, on this machine{limits}.")
    output.say(_is_given(how))
    ended = foreground.run(told, how)
    found = verdict.judge(told, ended)
    found.differences.extend(foreground.not_applied(told, how))
    if json:
        output.show_json(_document(told, found))
    else:
        sentence, *more = found.lines
        output.show(output.clean(sentence))
        for line in more:
            output.show(output.visible(line))
    if ended.failure or ended.left:
        raise typer.Exit(1)


def _limits(told: Told) -> str:
    from batchlab.client.debug.verdict import limits

    text = limits(told)
    return "" if text == "none" else f", within {text}"


def _document(told: Told, found: Verdict) -> dict[str, object]:
    return {
        "job": told.job,
        "stage": told.stage,
        "task": told.task,
        "attempt": told.attempt,
        "round": told.round,
        "verdict": found.word,
        "sentence": found.sentence,
        "fingerprint": found.here or None,
        "fingerprint_on_grid": found.there or None,
        "differences": found.differences,
    }
