"""Process that runs a task of a grid again on the user's machine, under a debugger.

Invariant: the code of a worker's child process finds and calls the handler, and classifies the handler's errors. The
run of the task does not change the grid. This module imports only the standard library and a few small modules of
batchlab.

    python -P -m batchlab.client.debug.child FOLDER [--pdb] [--break] [--debugpy PORT]
                                          [--env NAME] [--supervised]
"""

from __future__ import annotations

import argparse
import bdb
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from batchlab.client.debug import debuggers, foreground, task_folder
from batchlab.client.debug.task_folder import ENVIRONMENT, NotATaskFolder, RunResult, TaskRun, read, write_ended
from batchlab.core import container_images
from batchlab.core.operating_system import end_with_parent
from batchlab.worker import environment, handlers
from batchlab.worker.shared_memory import IMPORTING, ChildState
from batchlab.worker.task_executor import TaskExecutor

USER_LEFT = (bdb.BdbQuit, KeyboardInterrupt)
"""Exceptions that are raised in a task if the user ends the debugger."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the task of a task folder. Exit with code 0 if the task succeeded, and with code 1 if the task failed."""
    options = _parser().parse_args(arguments)
    # If the user changed a file of code within one second without changing its length, Python would use outdated
    # bytecode.
    sys.dont_write_bytecode = True
    try:
        task_run = read(options.folder)
    except NotATaskFolder as error:
        sys.exit(f"Error: {error}")
    if options.supervised:
        # The supervising process ignores Ctrl-C, so this process must react to Ctrl-C. This process ends with
        # the supervising process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_with_parent()
    # If the task exceeds a limit, the supervising process sends SIGUSR1, and this process prints the stack of the task.
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    environ = dict(os.environ)
    if not options.supervised:
        names = foreground.withheld(os.environ, options.passed)
        for name in names:
            del os.environ[name]
        if names:
            _say(foreground.withheld_text(names))
    debugger = debuggers.choose(pdb=options.pdb, at_start=options.at_start, port=options.debugpy)
    sys.argv = ["batchlab"]
    if code := task_run.request["code"]:
        sys.path.insert(0, code)
    task_run.clean()
    if image := os.environ.pop(container_images.VARIABLE, ""):
        here = environment.to_json(environment.current(image=image))
        (task_run.folder / ENVIRONMENT).write_text(json.dumps(here))
    os.chdir(task_run.request["cwd"])
    ended = run(task_run, debugger, ChildState(task_run.board) if options.supervised else None)
    os.chdir(task_run.folder)
    write_ended(task_run.folder, ended)
    if not options.supervised:
        _say("\n".join(task_folder.compare(task_run, ended, environ).lines))
    sys.stdout.flush()
    sys.stderr.flush()
    # `os._exit` does not wait for threads that a handler has started. A worker's child process exits in the same way.
    os._exit(1 if ended.failure or ended.left else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Run a task of a job again on this machine.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pdb", action="store_true", help="Start the debugger pdb if the task raises an exception.")
    parser.add_argument(
        "--break",
        dest="at_start",
        action="store_true",
        help="Start the debugger pdb at the first line of the task's handler.",
    )
    parser.add_argument(
        "--debugpy", type=int, metavar="PORT", help="Local port at which the task waits for the debugger of an IDE."
    )
    parser.add_argument(
        "--env",
        dest="passed",
        action="append",
        default=[],
        metavar="NAME",
        help="Name of an environment variable that is passed to the task. The option may be repeated.",
    )
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(task_run: TaskRun, debugger: debuggers.Debugger, board: ChildState | None) -> RunResult:
    """Run the task, and pass the task's exceptions to the debugger."""
    began_s = time.monotonic()

    def mark(task: int) -> None:
        if board:
            board.mark(task, time.monotonic())

    def rest() -> None:
        # The time limit of the task does not apply while the user debugs the task.
        if board:
            board.rest()

    mark(IMPORTING)
    try:
        executor = TaskExecutor(task_run.request)
    except handlers.Problem as problem:
        rest()
        _tell(problem.fault)
        debugger.on_failure(problem.__cause__)
        return RunResult(problem.fault)
    rest()
    debugger.begin(task_run)
    mark(task_run.task)
    try:
        with debugger.around(task_run):
            done = executor.run(task_run.task, task_run.item)
    except USER_LEFT as error:
        rest()
        if (task_run.failure or {}).get("error") == type(error).__name__:
            return RunResult(executor.explain(task_run.task, error), run_s=time.monotonic() - began_s)
        return RunResult(left=True)
    except BaseException as error:  # noqa: BLE001 - any exception is a failure of the task
        run_s = time.monotonic() - began_s
        rest()
        fault = executor.explain(task_run.task, error)
        _tell(fault)
        debugger.on_failure(None if isinstance(error, handlers.Problem) else error)
        return RunResult(fault, run_s=run_s)
    rest()
    return RunResult(value=json.loads(done.text), run_s=time.monotonic() - began_s)


def _tell(fault: handlers.Fault) -> None:
    sys.stdout.flush()
    _say(fault["traceback"].rstrip() or fault["reason"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - prints a message to the user


if __name__ == "__main__":
    main()
