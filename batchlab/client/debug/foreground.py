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
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from batchlab.client.debug.task_folder import ENDED, ENVIRONMENT, RunResult, TaskRun, read_ended
from batchlab.core import container_images
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import FailureKind, StageName
from batchlab.core.operating_system.processes import family, is_in_container, table
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


_DOCKER_FAILED = (125, 126, 127)
"""Exit codes of `docker run` if the container does not start."""
_TMP = "/tmp:rw,exec,nosuid,nodev,mode=1777"  # noqa: S108 - in the container
_STACK_S = 0.2
"""Time in seconds that a task has for printing its stack before the task is killed at a limit."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The user's options for a local run of a task.

    `pdb` starts pdb at the exception of the task, `at_start` also at the first line of the handler, and `debugpy` is
    the port for an IDE. With `no_limits`, the job's limits do not apply. `aside` redirects the output of the task to
    stderr, so that a program can read the command's stdout. The task gets the variables in `passed`, which may be
    secrets. With `image`, the task runs in a container of the image that contains the image `reference` and batchlab.
    """

    pdb: bool = False
    at_start: bool = False
    debugpy: int | None = None
    no_limits: bool = False
    aside: bool = False
    passed: tuple[str, ...] = ()
    image: str = ""
    reference: str = ""

    @property
    def is_interactive(self) -> bool:
        return self.pdb or self.at_start or self.debugpy is not None

    @property
    def takes_time(self) -> bool:
        """Return whether a debugger may wait for the user during the task, so that the time limit cannot apply."""
        return self.at_start or self.debugpy is not None


def run(task_run: TaskRun, how: RunOptions) -> RunResult:
    """Run the task to its end in a separate process."""
    for name in (ENDED, ENVIRONMENT):
        (task_run.folder / name).unlink(missing_ok=True)
    board = ChildState(task_run.board, create=True)
    container = _container_name() if how.image else ""
    with _interrupts_ignored():
        process = subprocess.Popen(
            container_argv(task_run, how, container) if container else argv(task_run, how),
            # The client of Docker needs its own settings, and a container gets only the variables in its arguments.
            env=None if container else task_environment(os.environ, how.passed),
            # The local run cannot read from stdin, because a task on a worker cannot read from stdin.
            stdin=None if how.is_interactive else subprocess.DEVNULL,
            stdout=2 if how.aside else None,
        )
        watched = _Watched(process, container, board)
        try:
            return _watch(task_run, how, watched)
        finally:
            watched.end()
            board.close()


def _container_name() -> str:
    return f"batchlab-replay-{secrets.token_hex(6)}"


def container_argv(task_run: TaskRun, how: RunOptions, name: str) -> list[str]:
    """Return the command line that starts the process of the task in a container with the limits of a worker."""
    from batchlab.runtime.compose_project import PYTHON

    options = _docker_run(task_run, how, name, is_interactive=how.is_interactive)
    return [*options, "--entrypoint", PYTHON, how.image, *argv(task_run, how)[1:]]


def _docker_run(task_run: TaskRun, how: RunOptions, name: str, *, is_interactive: bool) -> list[str]:
    """Return `docker run` with the options of a container that can write only to the task folder and /tmp."""
    folder, environ = str(task_run.folder), {"HOME": "/tmp", container_images.VARIABLE: how.reference}  # noqa: S108
    return [
        *("docker", "run", "--rm", "--init", "--pull", "never", "--name", name),
        *(["--interactive"] if is_interactive else []),
        *(["--tty"] if is_interactive and sys.stdin.isatty() and sys.stdout.isatty() else []),
        *("--user", f"{os.getuid()}:{os.getgid()}", "--read-only", "--tmpfs", _TMP),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "1024"),
        *("--volume", f"{folder}:{folder}", "--workdir", folder),
        *(word for variable, value in environ.items() for word in ("--env", f"{variable}={value}")),
        # Without a value in the arguments, other users of this machine cannot read the value.
        *(word for variable in how.passed for word in ("--env", variable)),
    ]


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


@dataclass(slots=True)
class _Watched:
    """Process of the task. In a container, `process` is the client of Docker, and `container` is the container's
    name."""

    process: subprocess.Popen[bytes]
    container: str
    board: ChildState
    _pid: int = 0

    @property
    def pid(self) -> int:
        """Pid of the task's process on this machine, or 0 if it is unknown."""
        if not self.container:
            return self.process.pid
        if not self._pid:
            self._pid = _container_pid(self.container)
        return self._pid

    def print_stack(self) -> None:
        """Let the process print the stack of the task to stderr."""
        if self.container:
            _docker("kill", "--signal", "USR1", self.container)
        else:
            os.kill(self.process.pid, signal.SIGUSR1)

    def end(self) -> None:
        """Kill the process and its descendants."""
        if self.container and self.process.poll() is None:
            _docker("kill", self.container)
        _end(self.process)


def _docker(*arguments: str) -> str:
    """Return the output of a `docker` command, or "" if the command fails because the container has ended."""
    from batchlab.runtime.compose_project import docker

    return docker(*arguments).stdout.strip()


def _container_pid(name: str) -> int:
    """Return the pid of a container's first process on this machine, or 0 if Docker runs on another machine or the
    container has not started."""
    pid, _, container = _docker("inspect", "--format", "{{.State.Pid}} {{.Id}}", name).partition(" ")
    try:
        # Docker's pid may belong to another machine, so the process must have the control group of the container.
        return int(pid) if container and is_in_container(int(pid), container) else 0
    except ValueError:
        return 0


class _Memory:
    """Memory of a process and its descendants.

    The measured process stays in the foreground process group of the terminal, so the process group does not identify
    the descendants of the process.
    """

    def resident_bytes(self, group: int, since_s: float) -> int:
        del since_s
        pids = family(group) if group else set()
        return sum(process.resident_bytes for process in table() if process.pid in pids)


def _watch(task_run: TaskRun, how: RunOptions, watched: _Watched) -> RunResult:
    process = watched.process
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
            watched.print_stack()
            time.sleep(_STACK_S)
            watched.end()
            return RunResult(fault(termination.kind, termination.sentence), run_s=termination.ran_s)
        if ended := read_ended(task_run.folder):
            return ended
        if watched.container:
            if code in _DOCKER_FAILED:
                raise BackendError(f"The container of {task_run.name} could not start.", remedy="Use --no-image.")
            code = 128 - code if code > 128 else code
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


def open_shell(ready: Shell, task_run: TaskRun, how: RunOptions) -> int:
    """Run the user's shell in the current folder of the task's command, and return the exit code of the shell. In an
    image, the shell is the image's /bin/sh."""
    with _interrupts_ignored():
        if how.image:
            own = {name: value for name, value in ready.call.environment.items() if os.environ.get(name) != value}
            container = _docker_run(task_run, how, _container_name(), is_interactive=True)
            variables = [word for name, value in own.items() for word in ("--env", f"{name}={value}")]
            place = ["--workdir", str(ready.call.cwd), "--entrypoint", "/bin/sh", how.image]
            return subprocess.run([*container, *variables, *place], check=False).returncode
        return subprocess.run(
            [os.environ.get("SHELL") or "/bin/sh"], cwd=ready.call.cwd, env=ready.call.environment, check=False
        ).returncode
