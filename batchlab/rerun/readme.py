"""What a task's folder says of itself, and the script by which an IDE runs it.

Invariant: the commands in it work from any folder, with the Python that prepared it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import batchlab
from batchlab.protocol.fingerprint import fingerprint
from batchlab.rerun import verdict
from batchlab.rerun.folder import CODE, EXECUTION, README, RUN, Told
from batchlab.worker import environment


def text(told: Told, given: str) -> str:
    """The README; `given` describes the input."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(told.folder / RUN))}"
    what = "Its command" if told.is_command else f"The handler `{told.request['handler']}`"
    files = (
        f"`{EXECUTION}/{told.task}/in`" if _has_files(told) else f"`item` in `task.json`: {given}"
    )
    lines = [
        f"# {told.name} of {told.job}",
        "",
        f"Attempt {told.attempt} of round {told.round}, to be run again here. {_on_grid(told)}",
        "Nothing of a run here reaches the grid.",
        "",
        f"- {what}, code in `{CODE}/`"
        + ("" if told.request["code"] else " (the job brought none)"),
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
        if different := environment.differences(there, environment.here()):
            lines += ["", *(f"- {one}" for one in different)]
    if told.notes:
        lines += ["", *(f"- {one}" for one in told.notes)]
    if told.failure and told.failure["traceback"]:
        lines += ["", "On the grid:", "", "```", told.failure["traceback"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def script(told: Told) -> str:
    """`run.py`."""
    here = str(Path(batchlab.__file__).resolve().parent.parent)
    return (
        f'"""Runs {told.name} of {told.job} again; {README} says more."""\n\n'
        "import sys\nfrom pathlib import Path\n\n"
        f"HERE = {here!r}\n"
        "sys.path[:1] = [] if HERE in sys.path[1:] else [HERE]\n\n"
        "from batchlab.rerun.inside import main  # noqa: E402\n\n"
        "main([str(Path(__file__).resolve().parent), *sys.argv[1:]])\n"
    )


def limits(told: Told) -> str:
    """The job's, in words."""
    found = []
    if told.timeout_s is not None:
        found.append(f"{told.timeout_s:g} s")
    if told.memory_bytes is not None:
        found.append(f"{told.memory_bytes / 2**20:g} MiB")
    return " and ".join(found) or "none"


def _has_files(told: Told) -> bool:
    return (told.folder / EXECUTION / str(told.task) / "in").is_dir()


def _on_grid(told: Told) -> str:
    there = verdict.failure_of(told.failure)
    if there:
        return f"On the grid it failed ({fingerprint(there)}): {there.reason}"
    return f"On the grid it ended {told.state}." if told.state else "It has not ended on the grid."
