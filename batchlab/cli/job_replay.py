"""`batchlab job replay-task`: runs a task of a grid on this machine, under a debugger."""

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
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.options import ANY_BACKEND, HOME, JOB, JSON, TASK, flag, home_of, option
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import parse_task, task_name

if TYPE_CHECKING:
    from batchlab.cli.session import Bucket
    from batchlab.client.debug.foreground import How
    from batchlab.client.debug.task_folder import Told, Verdict


def replay_task(
    job: str = JOB,
    task: str = TASK,
    local: bool = option(
        "Run on this machine, which is the only choice.", None, "--local", default=True, show_default=False
    ),
    attempt: int | None = option("Number of the attempt. Default: the last failed one, else the last.", "N", min=1),
    round_: int | None = option("Round of the attempt: 0 is before the first `job retry`.", "R", "--round", min=0),
    debug: bool | None = option("Start pdb at a failure. Default: only in a terminal.", None, "--debug/--no-debug"),
    break_: bool = flag("Start pdb at the handler's first line too.", "--break"),
    debugpy: int | None = option("Wait for an IDE to attach at this local port.", "PORT", min=1, max=65535),
    shell: bool = flag("Open a shell in the place of a task's command.", "--shell"),
    keep: Path | None = option("Only prepare this folder with input, code, and a README.", "DIR"),
    no_limits: bool = flag("Run without the job's time and memory limits.", "--no-limits"),
    env: list[str] | None = option("Pass this environment variable to the task. May be repeated.", "NAME"),
    home: Path | None = HOME,
    backend: str | None = ANY_BACKEND,
    json: bool = JSON,
) -> None:
    """Run a task again on this machine, under a debugger, with its input, code, and limits.

    The job's code runs with your rights. It gets only environment variables that are never secret,
    such as PATH and LANG, and those that --env names.

    The run does not affect the grid. At its end the command reports whether the task failed in the
    same way, and known differences of this machine. Exit code 0 if the task succeeds, 1 if it
    fails.

    \b
    Example: batchlab job replay-task last parse/3 --local
    """
    from batchlab.cli.session import find

    del local
    how = _how(debug=debug, at_start=break_, debugpy=debugpy, no_limits=no_limits, json=json)
    how = replace(how, passed=_variables(env or ()))
    stage_name, index = parse_task(task)
    place = home_of(home)
    bucket = find(place, backend, job)
    with _folder(keep) as folder:
        task_folder = _fetched(bucket, stage_name, index, folder, attempt, round_)
        if keep:
            _show_folder(task_folder, json=json)
        elif shell:
            _shell(task_folder, how)
        else:
            _run(task_folder, how, json=json)


def _how(*, debug: bool | None, at_start: bool, debugpy: int | None, no_limits: bool, json: bool) -> How:
    from batchlab.client.debug.foreground import How

    if debugpy is not None and find_spec("debugpy") is None:
        raise UsageError(
            "debugpy is not installed for this Python.",
            remedy=f"`{shlex.quote(sys.executable)} -m pip install debugpy` installs it; --debug needs nothing.",
        )
    if debug is None:
        debug = at_start or (sys.stdin.isatty() and sys.stdout.isatty() and not json)
    return How(pdb=debug and debugpy is None, at_start=at_start, debugpy=debugpy, no_limits=no_limits, aside=json)


def _variables(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names; raise UsageError if a variable is not set, as a mistyped name is not."""
    found = tuple(names)
    for name in found:
        if name not in os.environ:
            raise UsageError(f"The environment variable {name!r} is not set.", remedy="Set it, or leave out --env.")
    return found


def _warning(how: How) -> str:
    """Return the warning before a job's code runs on this machine."""
    from batchlab.client.debug.foreground import told, withheld

    kept_back = told(withheld(os.environ, how.passed))
    return "It is the job's code, and runs with your rights." + (f" {kept_back}" * bool(kept_back))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder to prepare: the user's, or a temporary one."""
    from batchlab.client.debug.prepare import room

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="batchlab-task-") as made:
            yield Path(made)
        return
    folder = keep.absolute()
    room(folder)
    yield folder


def _fetched(
    bucket: Bucket, stage: str | None, task: int, folder: Path, attempt: int | None, round_: int | None
) -> Told:
    from batchlab.cli.session import stage_of
    from batchlab.client.debug.prepare import bring
    from batchlab.core.model import JobId

    name = stage_of(bucket, stage)
    output.say(f"Fetching {task_name(name, task)} of {bucket.job}.")
    try:
        return bucket.read(
            lambda objects, patience: bring(
                objects, JobId(bucket.job), name, task, folder, patience=patience, number=attempt, round_=round_
            )
        )
    except OSError as error:
        raise UsageError(
            f"The task cannot be brought to {folder}: {error.strerror or error}.",
            remedy="Free some space, or name a folder with --keep.",
        ) from error


def _show_folder(told: Told, *, json: bool) -> None:
    from batchlab.client.debug.task_folder import README, RUN

    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(told.folder / RUN))}"
    if json:
        output.show_json({"folder": str(told.folder), "command": command, "readme": str(told.folder / README)})
        return
    output.show(command)
    debugging = "" if told.is_command else " (--pdb and --break debug it)"
    output.say(f"{told.name} is in {told.folder}; this runs it{debugging}. {README} says more.")


def _shell(told: Told, how: How) -> None:
    from batchlab.client.debug import foreground

    ready = foreground.shell(told, how.passed)
    output.say(_warning(how))
    output.say("A shell where the command would run; `exit` leaves it, and removes the folder.")
    output.show(output.visible(ready.command))
    code = foreground.open_shell(ready)
    if code:
        raise typer.Exit(1)


def _run(told: Told, how: How, *, json: bool) -> None:
    from batchlab.client.debug import foreground
    from batchlab.client.debug import task_folder as verdict

    limits = "" if how.no_limits else _limits(told)
    output.say(f"Running {told.name}, attempt {told.attempt}, on this machine{limits}.")
    output.say(_warning(how))
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
    from batchlab.client.debug.task_folder import limits

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
