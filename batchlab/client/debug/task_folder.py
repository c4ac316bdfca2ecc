"""Task folder: the input and the code of a task, and `task.json`, which describes the run.

Invariant: the folder contains only copies, and every path in `task.json` is relative to the folder,
so the folder can be moved and shared. The process that runs the task imports this module, which
uses few imports.

    README.md    a description of the folder, and the commands
    run.py       runs the task, also in an IDE
    task.json    the task, its limits, and how it ended on the grid
    code/        the job's code
    run/N/in/    the input of task N; each run creates and removes out/ and scratch/ next to it
    run/cwd/     the current folder of a Python handler
    ended.json   how the last local run ended

Comparison of a local run with the run on the grid, and the README and `run.py` of a task folder.

Invariant: the comparison depends only on `task.json`, the end of the run, and the environment. The
commands in the README work in any folder, with the Python that prepared it. The process that runs
the task imports this module, which uses few imports.
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
CODE, EXECUTION = "code", "run"


class NotATaskFolder(Exception):
    """The folder is not a task folder, or another version of batchlab made it."""


@dataclass(frozen=True, slots=True)
class TaskRun:
    """Contents of `task.json`.

    The paths in `request` and `item` are those of the folder's current place. `state` is the
    attempt's state on the grid, or "" if it has not ended. `failure` has the fields of its Failure,
    and `value` is its encoded result. `there` is the recorded environment of its worker. `notes`
    are differences that are already known.
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

    @property
    def name(self) -> str:
        return task_name(self.stage, self.task)

    @property
    def is_command(self) -> bool:
        return not self.request["handler"]

    @property
    def context(self) -> Context:
        """Return the context that the task receives."""
        return context(self.request, self.task)

    @property
    def board(self) -> Path:
        return self.folder / BOARD

    def clean(self) -> None:
        """Restore the state before the first run: delete the task's output and keep its input."""
        own = self.folder / EXECUTION / str(self.task)
        for name in ("out", "scratch", "value", "kept"):
            shutil.rmtree(own / name, ignore_errors=True)  # only some tasks create these
        shutil.rmtree(self.request["cwd"], ignore_errors=True)
        os.makedirs(self.request["cwd"])  # noqa: PTH103 - as the worker does
        (self.folder / ENDED).unlink(missing_ok=True)


def write(told: TaskRun) -> None:
    root = f"{told.folder}/"
    doc = {
        "v": VERSION,
        **{name: value for name, value in json_format.fields(told).items() if name != "folder"},
        "request": {key: one.removeprefix(root) if isinstance(one, str) else one for key, one in told.request.items()},
        "item": values.replace(told.item, lambda ref: _moved(ref, lambda p: p.removeprefix(root))),
    }
    (told.folder / TASK).write_text(json.dumps(doc, indent=2) + "\n")


def read(folder: Path) -> TaskRun:
    """Return the run that a folder describes. Raise NotATaskFolder if it is not a task folder."""
    folder = folder.absolute()
    try:
        doc = json.loads((folder / TASK).read_text())
        version = doc.pop("v")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise NotATaskFolder(f"{folder} holds no task: there is no {TASK} to be read.") from error
    if version != VERSION:
        raise NotATaskFolder(f"{folder} was made by another batchlab.")
    request = doc["request"]
    for key in ("folder", "cwd", "code", "function"):
        if request[key]:
            request[key] = str(folder / request[key])
    item = values.replace(doc["item"], lambda ref: _moved(ref, lambda p: str(folder / p)))
    return TaskRun(**{**doc, "folder": folder, "request": request, "item": item})


def _moved(reference: Json, move: Any) -> Json:
    return {**reference, "$file": move(reference["$file"])}


@dataclass(frozen=True, slots=True)
class RunResult:
    """End of a local run: `failure` (the fields of a Failure) or the encoded `value`. `left` is
    True if the user left the debugger before the end."""

    failure: dict[str, Any] | None = None
    value: Json = None
    run_s: float = 0.0
    left: bool = False


def write_ended(folder: Path, ended: RunResult) -> None:
    """Write the end of a run atomically."""
    staged = folder / f".{ENDED}"
    staged.write_text(json.dumps(json_format.fields(ended)))
    staged.replace(folder / ENDED)


def read_ended(folder: Path) -> RunResult | None:
    """Return the end of the last run, or None if it recorded none."""
    try:
        return RunResult(**json.loads((folder / ENDED).read_text()))
    except FileNotFoundError:
        return None


SAME, DIFFERENT, NOT_AT_ALL = "same", "different", "not at all"
SUCCEEDED, FAILED, LEFT = "succeeded", "failed", "left"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of the comparison.

    `word` is "same" (it failed as on the grid), "different", or "not at all" (it did not fail). It
    is "succeeded" or "failed" if the task did not fail on the grid, and "left" if the user left
    before the end. `here` and `there` are fingerprints, or "" without a failure.
    """

    word: str
    sentence: str
    here: str = ""
    there: str = ""
    differences: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Return the result as lines for the user."""
        if not self.differences:
            return [self.sentence]
        return [
            self.sentence,
            "What is known to be different here:",
            *(f"  - {difference}" for difference in self.differences),
        ]


def failure_of(told: dict[str, Any] | None) -> Failure | None:
    """Return the Failure with these fields."""
    if told is None:
        return None
    return Failure(**{"task": 0, **told, "kind": FailureKind(told["kind"])})


def judge(told: TaskRun, ended: RunResult, environ: Mapping[str, str] = os.environ) -> Comparison:
    """Compare the local run with the run on the grid. `environ` is the user's environment, from
    which the command withholds variables."""
    differences = [*_differences(told, environ), *told.notes]
    failure, here = failure_of(told.failure), failure_of(ended.failure)
    prints = (fingerprint(here) if here else "", fingerprint(failure) if failure else "")
    word, sentence = _word(told, ended, failure, here, *prints)
    return Comparison(word, sentence, *prints, differences)


def _word(
    told: TaskRun, ended: RunResult, there: Failure | None, here: Failure | None, print_here: str, print_there: str
) -> tuple[str, str]:
    name = told.name
    if ended.left:
        return LEFT, f"{name} was left before its end, so it cannot be compared."
    if here and there:
        if print_here == print_there:
            return SAME, f"{name} failed the same way as on the grid ({print_here}): {here.reason}"
        return DIFFERENT, (
            f"{name} failed differently. Here ({print_here}): {here.reason} On the grid ({print_there}): {there.reason}"
        )
    if there:
        return NOT_AT_ALL, (f"{name} did not fail here. On the grid it did ({print_there}): {there.reason}")
    on_grid = "succeeded" if told.state == "SUCCEEDED" else "has not come to an end"
    if here:
        return FAILED, f"{name} failed here ({print_here}): {here.reason} On the grid it {on_grid}."
    if told.state != "SUCCEEDED":
        return SUCCEEDED, f"{name} succeeded here. On the grid it {on_grid}."
    return SUCCEEDED, f"{name} succeeded, as on the grid{_result(told, ended)}."


def _result(told: TaskRun, ended: RunResult) -> str:
    for value in (told.value, ended.value):
        if next(values.references(value), None) is not None or values.kind(value):
            return ""  # the names of files and pickled objects always differ
    return ", with the same result" if told.value == ended.value else ", with another result"


def _differences(told: TaskRun, environ: Mapping[str, str]) -> list[str]:
    if told.there is None:
        return []
    return environment.differences(environment.from_json(told.there), environment.current(environ))


def text(told: TaskRun, given: str) -> str:
    """Return the text of the README. `given` describes the input."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(told.folder / RUN))}"
    what = "Its command" if told.is_command else f"The handler `{told.request['handler']}`"
    files = f"`{EXECUTION}/{told.task}/in`" if _has_files(told) else f"`item` in `task.json`: {given}"
    lines = [
        f"# {told.name} of {told.job}",
        "",
        f"Attempt {told.attempt} of round {told.round}, to be run again here. {_on_grid(told)}",
        "Nothing of a run here reaches the grid.",
        "",
        f"- {what}, code in `{CODE}/`" + ("" if told.request["code"] else " (the job brought none)"),
        f"- input: {given}" + (f", in {files}" if _has_files(told) else ""),
        f"- limits on the grid: {limits(told)}; a run by `{RUN}` has none",
        "",
        "```sh",
        script,
        *([] if told.is_command else [f"{script} --pdb", f"{script} --break"]),
        "```",
        "",
        "`--pdb` debugs where it fails, `--break` stops at the handler's first line. In an IDE, "
        f"set breakpoints below `{CODE}/`, and debug `{RUN}` with {sys.executable}.",
        "",
        "It is the job's code, and runs with your rights. Variables that look like secrets are not "
        "given to it; `--env NAME` gives it one.",
    ]
    if told.there:
        there = environment.from_json(told.there)
        lines += ["", f"Its worker: {there}."]
        if different := environment.differences(there, environment.current()):
            lines += ["", *(f"- {one}" for one in different)]
    if told.notes:
        lines += ["", *(f"- {note}" for note in told.notes)]
    if told.failure and told.failure["traceback"]:
        lines += ["", "On the grid:", "", "```", told.failure["traceback"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def script(told: TaskRun) -> str:
    """Return the text of `run.py`."""
    here = str(Path(batchlab.__file__).resolve().parent.parent)
    return (
        f'"""Runs {told.name} of {told.job} again; {README} says more."""\n\n'
        "import sys\nfrom pathlib import Path\n\n"
        f"HERE = {here!r}\n"
        "sys.path[:1] = [] if HERE in sys.path[1:] else [HERE]\n\n"
        "from batchlab.client.debug.child import main  # noqa: E402\n\n"
        "main([str(Path(__file__).resolve().parent), *sys.argv[1:]])\n"
    )


def limits(told: TaskRun) -> str:
    """Return the job's limits in words."""
    found = []
    if told.timeout_s is not None:
        found.append(f"{told.timeout_s:g} s")
    if told.memory_bytes is not None:
        found.append(f"{told.memory_bytes / 2**20:g} MiB")
    return " and ".join(found) or "none"


def _has_files(told: TaskRun) -> bool:
    return (told.folder / EXECUTION / str(told.task) / "in").is_dir()


def _on_grid(told: TaskRun) -> str:
    failure = failure_of(told.failure)
    if failure:
        return f"On the grid it failed ({fingerprint(failure)}): {failure.reason}"
    return f"On the grid it ended {told.state}." if told.state else "It has not ended on the grid."
