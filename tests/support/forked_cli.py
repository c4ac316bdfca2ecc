"""Commands of batchlab in processes forked from a server that has already imported batchlab.

Imports take most of the CPU time of a short command. Tests of signals, terminals, and start-up run
`python -m batchlab` instead. With the portable operating system, each command starts a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from batchlab.cli.app import COMMANDS
from batchlab.core.operating_system import PORTABLE_VARIABLE

_FORKS = (
    multiprocessing.get_context("spawn")
    if PORTABLE_VARIABLE in os.environ
    else multiprocessing.get_context("forkserver")
)
_TURN = threading.Lock()
"""Lock for starts and joins of processes. A start polls all child processes. If two threads poll the same process at
the same time, one of them gets exit code 255."""
_ON_FIRST_USE = (
    "batchlab.cli.run_job",
    "batchlab.cli.session",
    "batchlab.cli.submission",
    "batchlab.client.http",
    "batchlab.jobs.job_file",
    "batchlab.jobs.submission",
    "typer._adapters",
)
"""Modules that commands import only when they run, and that many commands need."""
_FORKS.set_forkserver_preload(
    ["batchlab.cli.app", *sorted({f"batchlab.cli.{one.module}" for one in COMMANDS.values()}), *_ON_FIRST_USE]
)


@dataclass(frozen=True, slots=True)
class Told:
    """The output and the exit code of a command."""

    code: int
    out: str
    err: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, doc: Mapping[str, Any]) -> Self:
        return cls(**doc)


@dataclass(frozen=True, slots=True)
class Command:
    """A started command. Its output is in the files `out` and `err` of the folder `said`."""

    process: multiprocessing.process.BaseProcess
    said: Path
    arguments: Sequence[str]

    def end(self, within_s: float) -> Told:
        """Wait for the end of the command, and return its output. After `within_s` seconds, kill the command and raise
        AssertionError."""
        has_ended = wait([self.process.sentinel], within_s)
        with _TURN:
            self.process.join(10 if has_ended else 0)  # the sentinel of a new process is ready just before its end
        hangs = self.process.exitcode is None
        if hangs:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        out, err = ((self.said / name).read_bytes().decode() for name in ("out", "err"))
        assert not hangs, f"{self.arguments} has not ended after {within_s:g} s: {out}{err}"
        assert code is not None
        return Told(code, out, err)


def start(arguments: Sequence[str], folder: Path, said: Path, environment: Mapping[str, str]) -> Command:
    """Start a command in the working folder `folder`. The command writes its output to files in the folder `said`.

    The caller must call `end`.
    """
    process = _FORKS.Process(target=_be, args=(arguments, str(folder), str(said), dict(environment)))
    with _TURN:
        process.start()
    return Command(process, said, arguments)


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    within_s: float,
    *,
    folder: Path | None = None,
    is_merged: bool = False,
) -> Told:
    """Run a command to its end, in the current folder or in `folder`. With `is_merged`, `Told.out` also has the error
    output."""
    with tempfile.TemporaryDirectory(prefix="said-") as said:
        if is_merged:
            Path(said, "err").symlink_to("out")
        return start(arguments, folder or Path.cwd(), Path(said), environment).end(within_s)


def _be(arguments: Sequence[str], folder: str, said: str, environment: Mapping[str, str]) -> None:
    """Run a command in the current process, which `start` has created for the command."""
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["batchlab", *arguments]
    from batchlab.cli import main

    main()
