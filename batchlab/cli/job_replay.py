"""Command `batchlab job replay-task`, which runs a task of a grid again on this machine, under a debugger."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.option_values import home_of
from batchlab.cli.options import ANY_BACKEND, HOME, JOB, JSON, TASK, flag, option
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.job_definition import parse_task, task_name
from batchlab.core.model import JobId

if TYPE_CHECKING:
    from batchlab.cli.session import Bucket
    from batchlab.client.debug.foreground import RunOptions
    from batchlab.client.debug.task_folder import TaskRun


def replay_task(
    job: str = JOB,
    task: str = TASK,
    local: bool = flag("Ignored: a task is always replayed on this machine.", "--local", hidden=True),
    attempt: int | None = option(
        "Number of the attempt that is replayed. Default: the last failed attempt, or else the last attempt.",
        "N",
        min=1,
    ),
    round_: int | None = option(
        "Round of the attempt that is replayed. Round 0 is the round before the first `job retry`.",
        "R",
        "--round",
        min=0,
    ),
    debug: bool | None = option(
        "Start the debugger pdb if the task fails. Default: --debug in a terminal, else --no-debug.",
        None,
        "--debug/--no-debug",
    ),
    break_: bool = flag("Start the debugger pdb also at the first line of the task's handler.", "--break"),
    debugpy: int | None = option(
        "Local port at which the task waits for the debugger of an IDE.", "PORT", min=1, max=65535
    ),
    shell: bool = flag("Open a shell instead of running the task's command.", "--shell"),
    keep: Path | None = option(
        "Write the task's input, its code, and a README to this folder, and do not run the task.", "DIR"
    ),
    no_limits: bool = flag("Run the task without the time limit and the memory limit of the job.", "--no-limits"),
    image: str | None = option(
        "Container image in which the task runs. Default: the image of the task's worker, if its pool has an image.",
        "IMAGE",
    ),
    no_image: bool = flag(
        "Run the task without a container, also if its worker ran in a container image.", "--no-image"
    ),
    env: list[str] | None = option("Environment variable that the task gets. Repeatable.", "NAME"),
    home: Path | None = HOME,
    backend: str | None = ANY_BACKEND,
    json: bool = JSON,
) -> None:
    """Run a task again on this machine, under a debugger, with its input, code, and limits.

    The job's code runs with your rights. It gets the variables of --env, and variables that are
    never secret, such as PATH.

    The run does not affect the grid. At its end, the command compares it with the attempt on
    the grid. The exit code is 1 if the task fails.

    \b
    Example: batchlab job replay-task last parse/3
    """
    from batchlab.cli.session import find_bucket

    del local
    how = _how(debug=debug, at_start=break_, debugpy=debugpy, no_limits=no_limits, json=json)
    for variable in env or ():
        if variable not in os.environ:
            raise UsageError(f"The environment variable {variable!r} is not set.", remedy="Set it, or leave out --env.")
    how = replace(how, passed=tuple(env or ()))
    if image is not None and (no_image or keep):
        raise UsageError("--image cannot be combined with --no-image or --keep.", remedy="Leave out one of them.")
    stage_name, index = parse_task(task)
    place = home_of(home)
    bucket = find_bucket(place, backend, job)
    with _folder(keep) as folder:
        task_folder = _fetch(bucket, stage_name, index, folder, attempt, round_)
        if keep:
            _show_folder(task_folder, json=json)
            return
        if not no_image:
            how = _in_image(task_folder, how, image)
        if shell:
            _shell(task_folder, how)
        else:
            _run(task_folder, how, json=json)


def _how(*, debug: bool | None, at_start: bool, debugpy: int | None, no_limits: bool, json: bool) -> RunOptions:
    from batchlab.client.debug.foreground import RunOptions

    if debugpy is not None and find_spec("debugpy") is None:
        raise UsageError(
            "debugpy is not installed for this Python.",
            remedy=f"`{shlex.quote(sys.executable)} -m pip install debugpy` installs it; --debug needs nothing.",
        )
    if debug is None:
        debug = at_start or (sys.stdin.isatty() and sys.stdout.isatty() and not json)
    return RunOptions(
        pdb=debug and debugpy is None, at_start=at_start, debugpy=debugpy, no_limits=no_limits, aside=json
    )


def _in_image(prepared: TaskRun, how: RunOptions, named: str | None) -> RunOptions:
    """Return the options with the image in which the task runs. Without Docker, print a sentence instead, unless the
    user named the image."""
    from batchlab.core.container_images import check_image
    from batchlab.runtime import pool_images

    image = check_image(named, "--image") if named else prepared.image
    if not image:
        return how
    if how.debugpy is not None:
        raise UsageError("--debugpy cannot debug a task in a container image.", remedy="Use --debug, or --no-image.")
    try:
        found = pool_images.provide(image, f"task {prepared.name}", prepared.folder / "image.log", output.say)
    except BatchlabError as error:
        if named:
            raise
        output.say(f"The task runs without the image of its worker. {error.message}")
        prepared.notes.append(f"The worker ran in the image {image}, and the task ran here without the image.")
        return how
    return replace(how, image=found.tag, reference=found.reference)


def _warning(how: RunOptions) -> str:
    """Return the warning that is printed before a job's code runs on this machine."""
    from batchlab.client.debug.foreground import withheld, withheld_text

    kept_back = withheld_text(withheld(os.environ, how.passed))
    return "It is the job's code, and runs with your rights." + (f" {kept_back}" * bool(kept_back))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder to prepare for the task: the user's folder, or a temporary folder."""
    from batchlab.client.debug.prepare import make_folder

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="batchlab-task-") as temporary:
            yield Path(temporary)
        return
    folder = keep.absolute()
    make_folder(folder)
    yield folder


def _fetch(
    bucket: Bucket, stage: str | None, task: int, folder: Path, attempt: int | None, round_: int | None
) -> TaskRun:
    from batchlab.cli.session import find_stage
    from batchlab.client.debug.prepare import prepare_task

    name = find_stage(bucket, stage)
    output.say(f"Fetching {task_name(name, task)} of {bucket.job}.")
    try:
        return bucket.read(
            lambda objects, patience: prepare_task(
                objects, JobId(bucket.job), name, task, folder, patience=patience, number=attempt, round_=round_
            )
        )
    except OSError as error:
        raise UsageError(
            f"The files of the task cannot be written to {folder}: {error.strerror or error}.",
            remedy="Free some space, or name a folder with --keep.",
        ) from error


def _show_folder(prepared: TaskRun, *, json: bool) -> None:
    from batchlab.client.debug.task_folder import README, RUN

    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(prepared.folder / RUN))}"
    if json:
        output.show_json({"folder": str(prepared.folder), "command": command, "readme": str(prepared.folder / README)})
        return
    output.show(command)
    debugging = "" if prepared.is_command else ", under pdb with --pdb or --break"
    output.say(
        f"The folder of {prepared.name} is {prepared.folder}. The command runs the task{debugging}. See {README}."
    )


def _shell(prepared: TaskRun, how: RunOptions) -> None:
    from batchlab.client.debug import foreground

    ready = foreground.shell(prepared, how.passed)
    output.say(_warning(how))
    output.say("This shell is in the folder of the task's command. `exit` ends the shell and removes the folder.")
    output.show(output.visible(ready.command))
    if foreground.open_shell(ready, prepared, how):
        raise typer.Exit(1)


def _run(prepared: TaskRun, how: RunOptions, *, json: bool) -> None:
    from batchlab.client.debug import foreground
    from batchlab.client.debug.task_folder import compare, limits

    within = "none" if how.no_limits else limits(prepared)
    limits_text = "" if within == "none" else f", within {within}"
    mended = f", with the mended input {prepared.mended_sha256[:12]}" if prepared.mended_sha256 else ""
    where = f"in the image {how.reference}" if how.image else "on this machine"
    output.say(f"Running {prepared.name}, attempt {prepared.attempt}{mended}, {where}{limits_text}.")
    output.say(_warning(how))
    ended = foreground.run(prepared, how)
    comparison = compare(prepared, ended)
    comparison.differences.extend(foreground.not_applied(prepared, how))
    if json:
        output.show_json(
            {
                **output.attributes(prepared, "job", "stage", "task", "attempt", "round"),
                "verdict": comparison.word,
                "sentence": comparison.sentence,
                "image": how.reference or None,
                "fingerprint": comparison.here or None,
                "fingerprint_on_grid": comparison.there or None,
                "differences": comparison.differences,
                "mended_sha256": prepared.mended_sha256 or None,
            }
        )
    else:
        sentence, *more = comparison.lines
        output.show(output.clean(sentence))
        for line in more:
            output.show(output.visible(line))
    if ended.failure or ended.left:
        raise typer.Exit(1)
