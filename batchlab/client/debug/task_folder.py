"""A task's folder: its input, its code, and `task.json`, which says what to run.

Invariant: all that is in it is a copy, and every path in `task.json` is relative to the folder, so
that it can be moved and given away. Imported by the process that runs the task: standard library
only.

    README.md    what this is, and the commands
    run.py       runs the task; point an IDE to it
    task.json    the task, its limits, and how it ended on the grid
    code/        the job's code
    run/N/in/    the input of task N; out/ and scratch/ beside it come and go with each run
    run/cwd/     the current folder of a Python handler
    ended.json   how the last run here ended
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchlab.core.model import Json
from batchlab.core.protocol import json_format, values
from batchlab.core.task_context import Context
from batchlab.core.task_names import task_name
from batchlab.worker.task_executor import ExecutionRequest, context

VERSION = 1
TASK, ENDED, README, RUN, BOARD = "task.json", "ended.json", "README.md", "run.py", "board"
CODE, EXECUTION = "code", "run"


class Unknown(Exception):
    """The folder is none of these, or of another batchlab."""


@dataclass(frozen=True, slots=True)
class Told:
    """What `task.json` says. `request` and `item` have the paths of where the folder is now.

    `state` is how the attempt ended on the grid ("" where it has not), `failure` the fields of its
    Failure, `value` its encoded result. `there` is what its worker has told of its surroundings,
    `notes` are differences that are known already.
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
        """What the task is told of itself."""
        return context(self.request, self.task)

    @property
    def board(self) -> Path:
        return self.folder / BOARD

    def clean(self) -> None:
        """Make it as it was before the first run: what the task has written goes, its input
        stays."""
        own = self.folder / EXECUTION / str(self.task)
        for name in ("out", "scratch", "value", "kept"):
            shutil.rmtree(own / name, ignore_errors=True)  # most tasks make none of them
        shutil.rmtree(self.request["cwd"], ignore_errors=True)
        os.makedirs(self.request["cwd"])  # noqa: PTH103 - as the worker does
        (self.folder / ENDED).unlink(missing_ok=True)


def write(told: Told) -> None:
    """Write `task.json`."""
    root = f"{told.folder}/"
    doc = {
        "v": VERSION,
        **{name: value for name, value in json_format.fields(told).items() if name != "folder"},
        "request": {
            key: one.removeprefix(root) if isinstance(one, str) else one
            for key, one in told.request.items()
        },
        "item": values.replace(told.item, lambda ref: _moved(ref, lambda p: p.removeprefix(root))),
    }
    (told.folder / TASK).write_text(json.dumps(doc, indent=2) + "\n")


def read(folder: Path) -> Told:
    """What is to be run in a folder; Unknown where it is none."""
    folder = folder.absolute()
    try:
        doc = json.loads((folder / TASK).read_text())
        version = doc.pop("v")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Unknown(f"{folder} holds no task: there is no {TASK} to be read.") from error
    if version != VERSION:
        raise Unknown(f"{folder} was made by another batchlab.")
    request = doc["request"]
    for key in ("folder", "cwd", "code", "function"):
        if request[key]:
            request[key] = str(folder / request[key])
    item = values.replace(doc["item"], lambda ref: _moved(ref, lambda p: str(folder / p)))
    return Told(**{**doc, "folder": folder, "request": request, "item": item})


def _moved(reference: Json, move: Any) -> Json:
    return {**reference, "$file": move(reference["$file"])}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run here ended: with `failure` (the fields of a Failure), or the encoded `value`;
    `left` says that somebody left the debugger before its end."""

    failure: dict[str, Any] | None = None
    value: Json = None
    run_s: float = 0.0
    left: bool = False


def write_ended(folder: Path, ended: Ended) -> None:
    """Say how a run ended; whole or not at all."""
    staged = folder / f".{ENDED}"
    staged.write_text(json.dumps(json_format.fields(ended)))
    staged.replace(folder / ENDED)


def read_ended(folder: Path) -> Ended | None:
    """How the last run ended; None where it has not said so."""
    try:
        return Ended(**json.loads((folder / ENDED).read_text()))
    except FileNotFoundError:
        return None
