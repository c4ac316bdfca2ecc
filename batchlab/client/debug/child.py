"""Process in which a task runs again: the worker's code for tasks, with a debugger around it.

Invariant: the code of a worker's child process finds, calls, and judges the handler. The run
changes nothing on the grid. This module imports only the standard library and a few light modules
of batchlab.

    python -P -m batchlab.client.debug.child FOLDER [--pdb] [--break] [--debugpy PORT]
                                          [--env NAME] [--supervised]
"""

from __future__ import annotations

import argparse
import bdb
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from batchlab.client.debug import debuggers, foreground, task_folder
from batchlab.client.debug.task_folder import NotATaskFolder, RunResult, TaskRun, read, write_ended
from batchlab.worker import handlers
from batchlab.worker.shared_memory import IMPORTING, ChildState
from batchlab.worker.task_executor import TaskExecutor

_PR_SET_PDEATHSIG = 1

USER_LEFT = (bdb.BdbQuit, KeyboardInterrupt)
"""Exceptions that mean that the user left the task before its end."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the task of a folder. Exit with 0 if it succeeded, and with 1 if it failed."""
    given = _parser().parse_args(arguments)
    # Python would use outdated bytecode for code that is changed within one second to a text of the
    # same length.
    sys.dont_write_bytecode = True
    try:
        told = read(given.folder)
    except NotATaskFolder as error:
        sys.exit(f"Error: {error}")
    if given.supervised:
        # The supervisor leaves Ctrl-C to this process. This process must not outlive the
        # supervisor.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the task exceeds its time limit, the supervisor sends SIGUSR1, and this process prints its
    # stack.
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    here = dict(os.environ)
    if not given.supervised:
        _keep_back(given.passed)
    debugger = debuggers.choose(pdb=given.pdb, at_start=given.at_start, port=given.debugpy)
    sys.argv = ["batchlab"]
    if code := told.request["code"]:
        sys.path.insert(0, code)
    told.clean()
    os.chdir(told.request["cwd"])
    ended = run(told, debugger, ChildState(told.board) if given.supervised else None)
    os.chdir(told.folder)
    write_ended(told.folder, ended)
    if not given.supervised:
        _say("\n".join(task_folder.judge(told, ended, here).lines))
    sys.stdout.flush()
    sys.stderr.flush()
    # As in a worker's child process, threads that a handler left behind are not joined.
    os._exit(1 if ended.failure or ended.left else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Run a task of a job again, here.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pdb", action="store_true", help="Debug where it fails.")
    parser.add_argument("--break", dest="at_start", action="store_true", help="Stop at the handler's first line.")
    parser.add_argument("--debugpy", type=int, metavar="PORT", help="Wait for an IDE there.")
    parser.add_argument(
        "--env",
        dest="passed",
        action="append",
        default=[],
        metavar="NAME",
        help="Give it that variable of here too; again for more.",
    )
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    return parser


def _keep_back(passed: Sequence[str]) -> None:
    """Remove the environment variables that the task does not get."""
    names = foreground.withheld(os.environ, passed)
    for name in names:
        del os.environ[name]
    if names:
        _say(foreground.withheld_text(names))


def run(told: TaskRun, debugger: debuggers.Debugger, board: ChildState | None) -> RunResult:
    """Run the task, and pass its exceptions to the debugger."""
    began_s = time.monotonic()

    def mark(task: int) -> None:
        if board:
            board.mark(task, time.monotonic())

    def rest() -> None:
        # The time limit does not apply while the user debugs.
        if board:
            board.rest()

    mark(IMPORTING)
    try:
        executor = TaskExecutor(told.request)
    except handlers.Problem as problem:
        rest()
        _tell(problem.fault)
        debugger.failed(problem.__cause__)
        return RunResult(problem.fault)
    rest()
    debugger.begin(told)
    mark(told.task)
    try:
        with debugger.around(told):
            done = executor.run(told.task, told.item)
    except USER_LEFT as error:
        rest()
        if (told.failure or {}).get("error") == type(error).__name__:
            return RunResult(executor.explain(error), run_s=time.monotonic() - began_s)
        return RunResult(left=True)
    except BaseException as error:  # noqa: BLE001 - every way to fail is the task's failure
        run_s = time.monotonic() - began_s
        rest()
        fault = executor.explain(error)
        _tell(fault)
        debugger.failed(None if isinstance(error, handlers.Problem) else error)
        return RunResult(fault, run_s=run_s)
    rest()
    return RunResult(value=json.loads(done.text), run_s=time.monotonic() - began_s)


def _tell(fault: handlers.Fault) -> None:
    sys.stdout.flush()
    _say(fault["traceback"].rstrip() or fault["reason"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - prints for the user


if __name__ == "__main__":
    main()
