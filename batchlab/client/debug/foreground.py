"""Local run of a prepared task in the foreground, within the job's limits, and a shell for the task.

Invariant: the worker's code checks the limits, and all processes that the task started end with the task. The task gets
an environment variable only if the user names the variable or `environment.is_harmless` lists the variable. The list
contains harmless variables instead of secret variables, because a rule cannot recognize every secret. The foreground
run is not a sandbox, because the task runs with the user's rights. The process that runs the task imports this module,
so the module imports few other modules.
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
from batchlab.core.operating_system.processes import family, table
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.worker import programs
from batchlab.worker.child_process import Limits, describe_crash
from batchlab.worker.environment import is_harmless
from batchlab.worker.handlers import Problem, fault
from batchlab.worker.shared_memory import ChildState
from batchlab.worker.task_executor import decode

NAMED = 5
"""Maximum number of withheld variables that a message lists by name. The message only counts the other variables."""
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""Pattern of a user name and a password in a URL."""


def withheld(environ: Mapping[str, str], passed: Collection[str] = ()) -> list[str]:
    """Return the names of the environment variables that the task does not get.

    The task gets the variables in `passed`.
    """
    return sorted(
        name
        for name, value in environ.items()
        if name not in passed and (not is_harmless(name) or _LOGIN.search(value))
    )


def task_environment(environ: Mapping[str, str], passed: Collection[str] = ()) -> dict[str, str]:
    """Return the environment of a local run, without the environment variables that `withheld` returns."""
    kept_back = frozenset(withheld(environ, passed))
    return {name: value for name, value in environ.items() if name not in kept_back}


def withheld_text(names: list[str]) -> str:
    """Return a sentence about the withheld environment variables in `names`, or "" if `names` is empty."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    are = "is" if len(names) == 1 else "are"
    return (
        f"The task does not get {', '.join(names[:NAMED])}{more}, which {are} set here. --env NAME passes a variable."
    )


_STACK_S = 0.2
"""Time in seconds that a task has for printing its stack before the task is killed at a limit."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The user's options for a local run of a task.

    `pdb` starts pdb at the exception of the task, `at_start` also at the first line of the handler, and `debugpy` is
    the port for an IDE. With `no_limits`, the job's limits do not apply. `aside` redirects the output of the task to
    stderr, so that a program can read the command's stdout. The task gets the variables in `passed`, which may be
    secrets.
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
        """Return whether a debugger may wait for the user during the task, so that the time limit cannot apply."""
        return self.at_start or self.debugpy is not None


def run(task_run: TaskRun, how: RunOptions) -> RunResult:
    """Run the task to its end in a separate process."""
    (task_run.folder / ENDED).unlink(missing_ok=True)
    board = ChildState(task_run.board, create=True)
    with _interrupts_ignored():
        process = subprocess.Popen(
            argv(task_run, how),
            env=task_environment(os.environ, how.passed),
            # The local run cannot read from stdin, because a task on a worker cannot read from stdin.
            stdin=None if how.is_interactive else subprocess.DEVNULL,
            stdout=2 if how.aside else None,
        )
        try:
            return _watch(task_run, how, _Watched(process.pid, board), process)
        finally:
            _end(process)
            board.close()


def argv(task_run: TaskRun, how: RunOptions) -> list[str]:
    """Return the command line that starts the process of the task."""
    debugging = [
        *(["--pdb"] if how.pdb else []),
        *(["--break"] if how.at_start else []),
        *(["--debugpy", str(how.debugpy)] if how.debugpy is not None else []),
    ]
    inside = ("-P", "-m", "batchlab.client.debug.child", str(task_run.folder), "--supervised")
    return [sys.executable, *inside, *debugging]


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore SIGINT in this process.

    The terminal sends SIGINT to the task's process too, and the task or its debugger reacts to SIGINT.
    """
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
    """Memory of a process and its descendants.

    The measured process stays in the foreground process group of the terminal, so the process group does not identify
    the descendants of the process.
    """

    def resident_bytes(self, group: int, since_s: float) -> int:
        del since_s
        pids = family(group)
        return sum(process.resident_bytes for process in table() if process.pid in pids)


def _watch(task_run: TaskRun, how: RunOptions, watched: _Watched, process: subprocess.Popen[bytes]) -> RunResult:
    stage = StageDef(
        StageName(task_run.stage),
        handler=task_run.request["handler"],
        timeout_s=None if how.no_limits or how.takes_time else task_run.timeout_s,
        memory_bytes=None if how.no_limits else task_run.memory_bytes,
    )
    limits = Limits(stage, _Memory())
    began_s = time.monotonic()
    while True:
        try:
            code = process.wait(limits.wait_s(watched))
        except subprocess.TimeoutExpired:
            termination = limits.broken_termination(watched)
            if termination is None:
                continue
            # SIGUSR1 prints the stack of the task to stderr.
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(_STACK_S)
            _end(process)
            return RunResult(fault(termination.kind, termination.sentence), run_s=termination.ran_s)
        if ended := read_ended(task_run.folder):
            return ended
        kills = LOSS_LIMIT if code == -signal.SIGKILL else 0
        failure = fault(FailureKind.CRASH, describe_crash(code, kills), exit_code=code)
        return RunResult(failure, run_s=time.monotonic() - began_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its descendants one by one, because the process does not lead a process group of its own."""
    if process.poll() is None:
        for pid in family(process.pid):
            with suppress(ProcessLookupError):  # The process has already ended.
                os.kill(pid, signal.SIGKILL)
        process.wait()


def not_applied(task_run: TaskRun, how: RunOptions) -> list[str]:
    """Return one sentence for each limit of the job that did not apply to the local run."""
    sentences = []
    if task_run.timeout_s is not None and (how.no_limits or how.takes_time):
        sentences.append(f"The time limit of {task_run.timeout_s:g} s did not apply.")
    if task_run.memory_bytes is not None and how.no_limits:
        sentences.append(f"The memory limit of {task_run.memory_bytes / 2**20:g} MiB did not apply.")
    return sentences


# --- Shell for a command -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shell:
    """Prepared task of a stage that runs a command. `command` is the line that the user types in the shell."""

    command: str
    call: programs.Call


def shell(task_run: TaskRun, passed: Collection[str] = ()) -> Shell:
    """Prepare the task for a shell.

    Raise UsageError if the task does not run a command, or if the command line cannot be built. `passed` has the
    meaning of the field `passed` of RunOptions.
    """
    if not task_run.is_command:
        raise UsageError(
            f"{task_run.name} is a Python function, not a command.",
            remedy="Leave out --shell to debug the function, or add --keep DIR.",
        )
    task_run.clean()
    request = task_run.request
    try:
        item: Any = decode(task_run.item, pickles=task_run.request["objects"])
        call = programs.prepare(request["command"], request["stdout"], request["code"], item, task_run.context)
    except Problem as problem:
        raise UsageError(
            f"The command of {task_run.name} cannot be made: {problem}.", remedy="It fails so on the grid too."
        ) from problem
    return Shell(typed_command(call), call._replace(environment=task_environment(call.environment, passed)))


def typed_command(call: programs.Call) -> str:
    """Return the command of the task as a line that the user can type in a shell."""
    line = shlex.join(call.arguments)
    return f"{line} > {shlex.quote(str(call.stdout))}" if call.stdout else line


def open_shell(ready: Shell) -> int:
    """Run the user's shell in the current folder of the task's command, and return the exit code of the shell."""
    with _interrupts_ignored():
        return subprocess.run(
            [os.environ.get("SHELL") or "/bin/sh"], cwd=ready.call.cwd, env=ready.call.environment, check=False
        ).returncode
