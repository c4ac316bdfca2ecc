"""Foreground run of a prepared task, within the job's limits, or a shell for the task.

Invariant: the worker's code judges the limits, and all processes that the task started end with it.
A variable of the environment reaches the task only if the user names it or
`environment.is_harmless` lists it. No rule recognizes every secret, so a variable must be known to
be harmless. This is not a sandbox: the task runs with the user's rights. The process that runs the
task imports this module, so it uses few imports.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from batchlab.client.debug.task_folder import ENDED, RunResult, TaskRun, read_ended
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import FailureKind, StageName
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.worker import programs
from batchlab.worker.child_process import Limits, describe_crash, family, table
from batchlab.worker.environment import is_harmless
from batchlab.worker.handlers import Problem, fault
from batchlab.worker.shared_memory import ChildState
from batchlab.worker.task_executor import decoded

NAMED = 5
"""Number of variables that are listed by name. Further variables are only counted."""
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""A URL with a password."""


def withheld(environ: Mapping[str, str], passed: Collection[str] = ()) -> list[str]:
    """Return the names of the variables that the task does not get. `passed` are exceptions."""
    return sorted(
        name
        for name, value in environ.items()
        if name not in passed and (not is_harmless(name) or _LOGIN.search(value))
    )


def task_environment(environ: Mapping[str, str], passed: Collection[str] = ()) -> dict[str, str]:
    """Return the environment without the withheld variables."""
    kept_back = frozenset(withheld(environ, passed))
    return {name: value for name, value in environ.items() if name not in kept_back}


def withheld_text(names: list[str]) -> str:
    """Return a sentence about the withheld variables, or "" if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    are = "is" if len(names) == 1 else "are"
    return f"{', '.join(names[:NAMED])}{more} {are} set here and {are} not given to it: --env NAME gives it one."


_LOOK_S = 0.2
"""Time in seconds that a task over its time limit has to print its stack."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The user's options for a run.

    `pdb` debugs at the exception, `at_start` also at the first line, and `debugpy` is the port for
    an IDE. `no_limits` ignores the job's limits. `aside` redirects the output of the task to
    stderr, so that a program can read stdout. `passed` are variables that the task gets although
    they may be secrets.
    """

    pdb: bool = False
    at_start: bool = False
    debugpy: int | None = None
    no_limits: bool = False
    aside: bool = False
    passed: tuple[str, ...] = ()

    @property
    def is_interactive(self) -> bool:
        return self.pdb or self.at_start or self.debugpy is not None

    @property
    def takes_time(self) -> bool:
        """Return whether the user may be at a prompt while the task runs."""
        return self.at_start or self.debugpy is not None


def run(withheld_text: TaskRun, how: RunOptions) -> RunResult:
    """Run the task to its end in a separate process."""
    (withheld_text.folder / ENDED).unlink(missing_ok=True)
    board = ChildState(withheld_text.board, create=True)
    with _left_to_it():
        process = subprocess.Popen(
            argv(withheld_text, how),
            env=task_environment(os.environ, how.passed),
            # A task on a worker cannot read from stdin either.
            stdin=None if how.is_interactive else subprocess.DEVNULL,
            stdout=2 if how.aside else None,
        )
        try:
            return _watch(withheld_text, how, _Watched(process.pid, board), process)
        finally:
            _end(process)
            board.close()


def argv(withheld_text: TaskRun, how: RunOptions) -> list[str]:
    """Return the command of the task's process."""
    debugging = [
        *(["--pdb"] if how.pdb else []),
        *(["--break"] if how.at_start else []),
        *(["--debugpy", str(how.debugpy)] if how.debugpy is not None else []),
    ]
    inside = ("-P", "-m", "batchlab.client.debug.child", str(withheld_text.folder), "--supervised")
    return [sys.executable, *inside, *debugging]


@contextmanager
def _left_to_it() -> Iterator[None]:
    """Ignore SIGINT in this process while the task or its debugger handles it. The terminal sends
    it to both."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True)
class _Watched:
    pid: int
    board: ChildState


class _Memory:
    """Memory of a process and its descendants. The process is in this process group, because the
    terminal requires that."""

    def resident_bytes(self, group: int, since_s: float) -> int:
        del since_s
        ours = family(group)
        return sum(process.resident_bytes for process in table() if process.pid in ours)


def _watch(withheld_text: TaskRun, how: RunOptions, watched: _Watched, process: subprocess.Popen[bytes]) -> RunResult:
    limits = Limits(_limited(withheld_text, how), _Memory())
    began_s = time.monotonic()
    while True:
        try:
            code = process.wait(limits.wait_s(watched))
        except subprocess.TimeoutExpired:
            termination = limits.broken(watched)
            if termination is None:
                continue
            # SIGUSR1 prints the stack of the task to stderr.
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(_LOOK_S)
            _end(process)
            return RunResult(fault(termination.kind, termination.sentence), run_s=termination.ran_s)
        if ended := read_ended(withheld_text.folder):
            return ended
        slain = LOSS_LIMIT if code == -signal.SIGKILL else 0
        reason = describe_crash(code, slain)
        failure = fault(FailureKind.CRASH, reason, exit_code=code)
        return RunResult(failure, run_s=time.monotonic() - began_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its descendants. It does not lead a process group, unlike a worker's
    child process."""
    if process.poll() is None:
        for pid in family(process.pid):
            with suppress(ProcessLookupError):  # the process has just ended
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _limited(withheld_text: TaskRun, how: RunOptions) -> StageDef:
    unlimited = how.no_limits
    return StageDef(
        StageName(withheld_text.stage),
        handler=withheld_text.request["handler"],
        timeout_s=None if unlimited or how.takes_time else withheld_text.timeout_s,
        memory_bytes=None if unlimited else withheld_text.memory_bytes,
    )


def not_applied(withheld_text: TaskRun, how: RunOptions) -> list[str]:
    """Return one sentence for each limit of the job that does not apply to such a run."""
    found = []
    if withheld_text.timeout_s is not None and (how.no_limits or how.takes_time):
        found.append(f"Its time limit of {withheld_text.timeout_s:g} s did not hold.")
    if withheld_text.memory_bytes is not None and how.no_limits:
        found.append(f"Its memory limit of {withheld_text.memory_bytes / 2**20:g} MiB did not hold.")
    return found


# --- A shell -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shell:
    """Task of a command stage, ready for a shell. `command` is the line to type."""

    command: str
    call: programs.Call


def shell(withheld_text: TaskRun, passed: Collection[str] = ()) -> Shell:
    """Prepare the task for a shell. Raise UsageError if it is not a command, or if its command
    cannot be built. `passed` is as in RunOptions."""
    if not withheld_text.is_command:
        raise UsageError(
            f"{withheld_text.name} is a Python function, not a command.",
            remedy="Leave out --shell to debug it, or say --keep DIR.",
        )
    withheld_text.clean()
    request = withheld_text.request
    try:
        item: Any = decoded(withheld_text.item, pickles=withheld_text.request["objects"])
        call = programs.prepare(request["command"], request["stdout"], request["code"], item, withheld_text.context)
    except Problem as problem:
        raise UsageError(
            f"The command of {withheld_text.name} cannot be made: {problem}.", remedy="It fails so on the grid too."
        ) from problem
    return Shell(typed(call), call._replace(environment=task_environment(call.environment, passed)))


def typed(call: programs.Call) -> str:
    """Return a call as a line for a shell."""
    line = shlex.join(call.arguments)
    return f"{line} > {shlex.quote(str(call.stdout))}" if call.stdout else line


def open_shell(ready: Shell) -> int:
    """Run the user's shell in the folder of the command, and return its exit code."""
    with _left_to_it():
        return subprocess.run(
            [os.environ.get("SHELL") or "/bin/sh"], cwd=ready.call.cwd, env=ready.call.environment, check=False
        ).returncode
