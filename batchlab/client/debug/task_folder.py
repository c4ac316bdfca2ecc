"""Task folder: the input and the code of a task, and `task.json`, which describes the run.

Invariant: a task folder contains only copies, and every path in `task.json` is relative to the task folder, so a task
folder can be moved and shared. The process that runs the task imports this module, so the module imports few other
modules.

    README.md    a description of the folder, and the commands
    run.py       runs the task, also in an IDE
    task.json    the task, its limits, and how it ended on the grid
    code/        the job's code
    run/N/in/    the input of task N; each run creates and removes out/ and scratch/ next to it
    run/cwd/     the current folder of a Python handler
    ended.json   how the last local run ended

The module also compares a local run with the run on the grid, and writes the README and `run.py` of a task folder. The
comparison of runs depends only on `task.json`, the result of the local run, and the environment.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import batchlab
from batchlab.core.job_definition import task_name
from batchlab.core.model import Failure, FailureKind, Json
from batchlab.core.protocol import json_format, values
from batchlab.core.protocol.settlement import fingerprint
from batchlab.core.task_context import Context
from batchlab.worker import environment
from batchlab.worker.task_executor import ExecutionRequest, context

VERSION = 1
TASK, ENDED, README, RUN, BOARD = "task.json", "ended.json", "README.md", "run.py", "board"
ENVIRONMENT = "environment.json"
"""Environment of a local run in a container image."""
CODE, EXECUTION = "code", "run"


class NotATaskFolder(Exception):
    """Error for a folder that is not a task folder, or that another version of batchlab prepared."""


@dataclass(frozen=True, slots=True)
class TaskRun:
    """Contents of `task.json`.

    The paths in `request` and `item` begin with the path of the task folder `folder`. `state` is the attempt's state on
    the grid, or "" if the attempt has not ended. `failure` has the fields of the attempt's Failure, and `value` is the
    attempt's encoded result. `there` is the recorded environment of the worker that ran the attempt. `notes` lists
    differences from the grid that the preparation of the folder found. `image` is the container image of the worker, as
    the manager has recorded it, or "". `mended_sha256` is the SHA-256 of the attempt's mended input, or "" if the
    attempt had the task's first input.
    """

    folder: Path
    job: str
    stage: str
    task: int
    attempt: int
    round: int
    request: ExecutionRequest
    item: Json
    timeout_s: float | None = None
    memory_bytes: int | None = None
    state: str = ""
    failure: dict[str, Any] | None = None
    value: Json = None
    there: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    mended_sha256: str = ""
    image: str = ""

    @property
    def name(self) -> str:
        return task_name(self.stage, self.task)

    @property
    def is_command(self) -> bool:
        return not self.request["handler"]

    @property
    def context(self) -> Context:
        """Return the Context object that the task's handler receives."""
        return context(self.request, self.task)

    @property
    def board(self) -> Path:
        return self.folder / BOARD

    def clean(self) -> None:
        """Delete the output of earlier local runs of the task, and keep the input of the task."""
        own = self.folder / EXECUTION / str(self.task)
        for name in ("out", "scratch", "value", "kept"):
            # Ignore a missing folder, because only some tasks create the folder.
            shutil.rmtree(own / name, ignore_errors=True)
        shutil.rmtree(self.request["cwd"], ignore_errors=True)
        os.makedirs(self.request["cwd"])  # noqa: PTH103 - the worker also calls `os.makedirs`
        (self.folder / ENDED).unlink(missing_ok=True)


def write(task_run: TaskRun) -> None:
    root = f"{task_run.folder}/"
    doc = {
        "v": VERSION,
        **{name: value for name, value in json_format.fields(task_run).items() if name != "folder"},
        "request": {
            key: one.removeprefix(root) if isinstance(one, str) else one for key, one in task_run.request.items()
        },
        "item": values.replace(task_run.item, lambda ref: _move(ref, lambda p: p.removeprefix(root))),
    }
    (task_run.folder / TASK).write_text(json.dumps(doc, indent=2) + "\n")


def read(folder: Path) -> TaskRun:
    """Return the TaskRun that `task.json` in a task folder describes. Raise NotATaskFolder for any other folder."""
    folder = folder.absolute()
    try:
        doc = json.loads((folder / TASK).read_text())
        version = doc.pop("v")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise NotATaskFolder(f"{folder} is not a task folder, because {TASK} cannot be read.") from error
    if version != VERSION:
        raise NotATaskFolder(f"Another version of batchlab prepared {folder}.")
    request = doc["request"]
    for key in ("folder", "cwd", "code", "function"):
        if request[key]:
            request[key] = str(folder / request[key])
    item = values.replace(doc["item"], lambda ref: _move(ref, lambda p: str(folder / p)))
    return TaskRun(**{**doc, "folder": folder, "request": request, "item": item})


def _move(reference: Json, move: Any) -> Json:
    return {**reference, "$file": move(reference["$file"])}


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of a local run, with either `failure` (the fields of a Failure) or the encoded `value`.

    `left` is True if the user ended the debugger before the end of the task.
    """

    failure: dict[str, Any] | None = None
    value: Json = None
    run_s: float = 0.0
    left: bool = False


def write_ended(folder: Path, ended: RunResult) -> None:
    """Write the result of a local run to the task folder atomically."""
    staged = folder / f".{ENDED}"
    staged.write_text(json.dumps(json_format.fields(ended)))
    staged.replace(folder / ENDED)


def read_ended(folder: Path) -> RunResult | None:
    """Return the result of the last local run, or None if the last local run did not write a result."""
    try:
        return RunResult(**json.loads((folder / ENDED).read_text()))
    except FileNotFoundError:
        return None


SAME, DIFFERENT, NOT_AT_ALL = "same", "different", "not at all"
SUCCEEDED, FAILED, LEFT = "succeeded", "failed", "left"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of the comparison of a local run with the run on the grid.

    If the task failed on the grid, `word` is "same" (the local failure has the same fingerprint), "different" (the
    local failure has another fingerprint), or "not at all" (the local run did not fail). If the task did not fail on
    the grid, `word` is "succeeded" or "failed", which is the result of the local run. If the user ended the debugger
    before the end of the task, `word` is "left". `here` and `there` are the fingerprints of the local failure and of
    the failure on the grid. The fingerprint is "" for a run without a failure.
    """

    word: str
    sentence: str
    here: str = ""
    there: str = ""
    differences: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Return the result of the comparison as lines for the user."""
        if not self.differences:
            return [self.sentence]
        return [
            self.sentence,
            "Known differences of this machine:",
            *(f"  - {difference}" for difference in self.differences),
        ]


def failure_of(task_run: dict[str, Any] | None) -> Failure | None:
    """Return a Failure with the fields in `task_run`, or None if `task_run` is None."""
    if task_run is None:
        return None
    return Failure(**{"task": 0, **task_run, "kind": FailureKind(task_run["kind"])})


def compare(task_run: TaskRun, ended: RunResult, environ: Mapping[str, str] = os.environ) -> Comparison:
    """Compare the local run with the run on the grid. `environ` contains the user's environment variables, including
    variables that the local run did not get.
    """
    differences = list(task_run.notes)
    if task_run.there is not None:
        there = environment.from_json(task_run.there)
        differences = [*environment.differences(there, _local_environment(task_run, environ)), *differences]
    failure, here = failure_of(task_run.failure), failure_of(ended.failure)
    prints = (fingerprint(here) if here else "", fingerprint(failure) if failure else "")
    word, sentence = _word(task_run, ended, failure, here, *prints)
    return Comparison(word, sentence, *prints, differences)


def _local_environment(task_run: TaskRun, environ: Mapping[str, str]) -> environment.Environment:
    """Return the environment of the last local run, which a run in a container image has written."""
    try:
        return environment.from_json(json.loads((task_run.folder / ENVIRONMENT).read_text()))
    except FileNotFoundError:
        return environment.current(environ)


def _word(
    task_run: TaskRun, ended: RunResult, there: Failure | None, here: Failure | None, print_here: str, print_there: str
) -> tuple[str, str]:
    name = task_run.name
    if ended.left:
        return LEFT, f"{name} did not run to its end, so it cannot be compared."
    if here and there:
        if print_here == print_there:
            return SAME, f"{name} failed the same way as on the grid ({print_here}): {here.reason}"
        return DIFFERENT, (
            f"{name} failed differently. Here ({print_here}): {here.reason} On the grid ({print_there}): {there.reason}"
        )
    if there:
        return NOT_AT_ALL, f"{name} did not fail here. On the grid it failed ({print_there}): {there.reason}"
    on_grid = "succeeded" if task_run.state == "SUCCEEDED" else "has not ended"
    if here:
        return FAILED, f"{name} failed here ({print_here}): {here.reason} On the grid it {on_grid}."
    if task_run.state != "SUCCEEDED":
        return SUCCEEDED, f"{name} succeeded here. On the grid it {on_grid}."
    return SUCCEEDED, f"{name} succeeded, as on the grid{_result(task_run, ended)}."


def _result(task_run: TaskRun, ended: RunResult) -> str:
    for value in (task_run.value, ended.value):
        if next(values.references(value), None) is not None or values.kind(value):
            # Results with files or pickled objects cannot be compared, because their names differ in every run.
            return ""
    return ", with the same result" if task_run.value == ended.value else ", with another result"


def text(task_run: TaskRun, input_text: str) -> str:
    """Return the text of the README. `input_text` describes the input of the task."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(task_run.folder / RUN))}"
    what = "Its command" if task_run.is_command else f"The handler `{task_run.request['handler']}`"
    files = f"`{EXECUTION}/{task_run.task}/in`" if _has_files(task_run) else f"`item` in `task.json`: {input_text}"
    lines = [
        f"# {task_run.name} of {task_run.job}",
        "",
        f"Attempt {task_run.attempt} of round {task_run.round}, prepared for this machine. {_on_grid(task_run)}",
        "A run on this machine does not change the grid.",
        "",
        f"- {what}, code in `{CODE}/`" + ("" if task_run.request["code"] else " (the job has no code)"),
        f"- input: {input_text}" + (f", in {files}" if _has_files(task_run) else ""),
        f"- limits on the grid: {limits(task_run)}; `{RUN}` applies no limits",
        "",
        "```sh",
        script,
        *([] if task_run.is_command else [f"{script} --pdb", f"{script} --break"]),
        "```",
        "",
        "`--pdb` debugs at the exception, and `--break` stops at the handler's first line. In an IDE, "
        f"set breakpoints below `{CODE}/`, and debug `{RUN}` with {sys.executable}.",
        "",
        "The job's code runs with your rights. The task does not get environment variables that may be secrets. "
        "`--env NAME` passes a variable.",
    ]
    if task_run.image:
        lines += ["", f"The worker ran in the image {task_run.image}. `{RUN}` runs without the image."]
    if task_run.there:
        there = environment.from_json(task_run.there)
        lines += ["", f"The worker on the grid: {there}."]
        if different := environment.differences(there, environment.current()):
            lines += ["", *(f"- {difference}" for difference in different)]
    if task_run.notes:
        lines += ["", *(f"- {note}" for note in task_run.notes)]
    if task_run.failure and task_run.failure["traceback"]:
        lines += ["", "On the grid:", "", "```", task_run.failure["traceback"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def script(task_run: TaskRun) -> str:
    """Return the text of `run.py`."""
    here = str(Path(batchlab.__file__).resolve().parent.parent)
    return (
        f'"""Runs {task_run.name} of {task_run.job} again. {README} has more information."""\n\n'
        "import sys\nfrom pathlib import Path\n\n"
        f"HERE = {here!r}\n"
        "sys.path[:1] = [] if HERE in sys.path[1:] else [HERE]\n\n"
        "from batchlab.client.debug.child import main  # noqa: E402\n\n"
        "main([str(Path(__file__).resolve().parent), *sys.argv[1:]])\n"
    )


def limits(task_run: TaskRun) -> str:
    """Return a text about the job's limits for a task."""
    texts = []
    if task_run.timeout_s is not None:
        texts.append(f"{task_run.timeout_s:g} s")
    if task_run.memory_bytes is not None:
        texts.append(f"{task_run.memory_bytes / 2**20:g} MiB")
    return " and ".join(texts) or "none"


def _has_files(task_run: TaskRun) -> bool:
    return (task_run.folder / EXECUTION / str(task_run.task) / "in").is_dir()


def _on_grid(task_run: TaskRun) -> str:
    failure = failure_of(task_run.failure)
    if failure:
        return f"On the grid it failed ({fingerprint(failure)}): {failure.reason}"
    return f"On the grid it ended {task_run.state}." if task_run.state else "It has not ended on the grid."
