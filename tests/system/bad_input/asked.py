"""Questions to a running grid that the grid must decline, and similar ones that it must answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.bad_input import jobs
from tests.system.bad_input.shell import WAIT_S, Shell, Told


@dataclass(frozen=True, slots=True)
class Question:
    """A question to the grid. `command` may contain {done}, {failed}, and {running} for the ids of three jobs."""

    name: str
    does: str
    says: str
    command: tuple[str, ...]
    code: int = 2


SLOW = """\
name: slow
input: {files: data/*, split: items}
stages:
  - {name: one, command: [sleep, "600"]}
"""

HUGE = str(10**30)

QUESTIONS = [
    Question(
        "unknown job",
        "asks for a job that is not there",
        "The job 'nope-0123456789' does not exist",
        ("job", "show", "nope-0123456789"),
    ),
    Question("no id", "gives an empty id", "could be any of", ("job", "why", "")),
    Question("half an id", "gives the beginning of many ids", "could be any of", ("job", "why", "job")),
    Question("a path", "gives a path as id", "does not exist", ("job", "cancel", "../../etc/passwd")),
    Question("odd id", "gives an id with a line break", "does not exist", ("job", "logs", "job\n\x1b[31m")),
    Question(
        "cancel",
        "cancels a job that has ended",
        "is not running, so it cannot be cancelled",
        ("job", "cancel", "{done}"),
    ),
    Question(
        "pause", "pauses a job that has ended", "is not running, so it cannot be paused", ("job", "pause", "{done}")
    ),
    Question("resume", "resumes a job that is not paused", "is not paused", ("job", "resume", "{running}")),
    Question("retry", "retries a job that succeeded", "there is nothing to run again", ("job", "retry", "{done}")),
    Question("retry running", "retries a job that runs", "Wait, or cancel it first", ("job", "retry", "{running}")),
    Question(
        "early",
        "fetches the results of a job that runs",
        "0 results",
        ("job", "results", "{running}", "--out", "early"),
        0,
    ),
    Question(
        "stage",
        "fetches a stage that is not there",
        "does not have a stage 'two'",
        ("job", "results", "{done}", "--stage", "two"),
    ),
    Question(
        "out",
        "fetches into a file",
        "The results cannot be written to job.yaml",
        ("job", "results", "{done}", "--out", "job.yaml"),
    ),
    Question("failures", "asks a sound job for failures", "No task has failed", ("job", "failures", "{done}"), 0),
    Question(
        "logs", "asks for the output of a silent job", "No task has printed anything", ("job", "logs", "{done}"), 0
    ),
    Question("same file", "submits a job that runs again", "{running}", ("job", "submit", "job.yaml"), 0),
    Question("run it", "runs a job that runs already", "has not ended", ("run", "job.yaml")),
    Question("broken file", "submits a file that is none", "no such job file", ("job", "submit", "jobs.yaml")),
    Question("pool", "scales a pool that is not there", "big", ("grid", "scale", "big", "--max", "2")),
    Question(
        "order", "scales to a minimum over the maximum", "max", ("grid", "scale", "default", "--min", "5", "--max", "2")
    ),
    Question("huge pool", "scales to 10^30 workers", "max", ("grid", "scale", "default", "--max", HUGE)),
    Question(
        "up again", "brings the grid up with other pools", "A grid is up in", ("grid", "up", "--pool", "big:0-1x1")
    ),
    Question(
        "workers", "sizes a grid that is up", "so --workers cannot size one", ("run", "job.yaml", "--workers", "2")
    ),
    Question(
        "other backend",
        "runs it on another backend",
        "runs on backend local",
        ("run", "job.yaml", "--backend", "ministack", "--endpoint", "http://127.0.0.1:9"),
    ),
    Question("second manager", "starts a second manager", "A manager is already running in", ("manager",)),
]


def ask(world: Path, grid: Shell) -> dict[str, Any]:
    """Ask all questions while one job runs, and cancel the job at the end."""
    place = world / "asked"
    folder = place / "job"
    jobs.sound(folder)
    shell = Shell(place, folder, BATCHLAB_HOME=str(grid.home))
    done = _submitted(shell)
    shell("job", "watch", done)
    (folder / "work.py").write_text(jobs.HANDLERS.replace("return item", "raise ValueError", 1))
    failed = _submitted(shell)
    shell("job", "watch", failed)
    (folder / "job.yaml").write_text(SLOW)
    running = _submitted(shell)
    deadline_s = time.monotonic() + WAIT_S
    while "The job runs" not in shell("job", "why", running).out:
        assert time.monotonic() < deadline_s, "the job does not start"
    ids = {"done": done, "failed": failed, "running": running}
    found: dict[str, Any] = {"ids": ids, "told": {}}
    for one in QUESTIONS:
        command = [word.format(**ids) if word.startswith("{") else word for word in one.command]
        found["told"][one.name] = shell(*command).to_json()
    found["cancelled"] = shell("job", "cancel", running).to_json()
    # A second cancel before the end of the job is not an error.
    shell("job", "watch", running)
    found["twice"] = shell("job", "cancel", running).to_json()
    return found


def _submitted(shell: Shell) -> str:
    told: Told = shell("job", "submit", "job.yaml")
    assert told.code == 0, told
    return told.out.strip()
