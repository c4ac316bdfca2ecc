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
    """The folder is not a task folder, or another version of batchlab made it."""


@dataclass(frozen=True, slots=True)
class Told:
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


def write(told: Told) -> None:
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
    """Return the run that a folder describes. Raise Unknown if it is not a task folder."""
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
    """End of a local run: `failure` (the fields of a Failure) or the encoded `value`. `left` is
    True if the user left the debugger before the end."""

    failure: dict[str, Any] | None = None
    value: Json = None
    run_s: float = 0.0
    left: bool = False


def write_ended(folder: Path, ended: Ended) -> None:
    """Write the end of a run atomically."""
    staged = folder / f".{ENDED}"
    staged.write_text(json.dumps(json_format.fields(ended)))
    staged.replace(folder / ENDED)


def read_ended(folder: Path) -> Ended | None:
    """Return the end of the last run, or None if it recorded none."""
    try:
        return Ended(**json.loads((folder / ENDED).read_text()))
    except FileNotFoundError:
        return None
