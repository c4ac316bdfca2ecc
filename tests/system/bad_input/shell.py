"""The command line as a user runs it, with one process per command.

The processes are forked from a server that has already loaded batchlab, so a hundred commands take seconds instead of a
minute.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

SECRET = "wJalrXUtnFEMI-a-secret-of-the-user"
"""A secret in the environment of every command, which no command may print."""
WAIT_S = 120.0
"""A time longer than any command on the slowest machine. A command that takes longer counts as hanging."""

_FORKS = multiprocessing.get_context("forkserver")
_TURN = threading.Lock()
"""A lock for starting processes. A start polls all processes of this one, and if two threads poll the same process at
once, the second one gets exit code 255."""
_COMMANDS = ("running", "jobs", "grid", "scenario", "schedule", "report", "cost", "admin")
_FORKS.set_forkserver_preload(
    ["batchlab.cli.app", "batchlab.spec", "batchlab.submission", *(f"batchlab.cli.{name}" for name in _COMMANDS)]
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


class Shell:
    """A runner of commands in `folder`. Their output and the grid's home are in `world`."""

    def __init__(self, world: Path, folder: Path, **environment: str) -> None:
        self.world = world
        self.folder = folder
        self._environment = {"BATCHLAB_HOME": str(world / "home"), "AWS_SECRET_ACCESS_KEY": SECRET, **environment}
        self.home = Path(self._environment["BATCHLAB_HOME"])
        self._count = 0

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a command. The caller must call `end`."""
        self._count += 1
        said = self.world / f"said-{self._count}"
        said.mkdir()
        given = {**self._environment, **environment}
        process = _FORKS.Process(target=_be, args=(arguments, str(self.folder), str(said), given))
        with _TURN:
            process.start()
        return Command(process, said, arguments)

    def __call__(self, *arguments: str, **environment: str) -> Told:
        """Run a command to its end."""
        return self.start(*arguments, **environment).end()


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was started."""

    process: multiprocessing.process.BaseProcess
    said: Path
    arguments: tuple[str, ...]

    def end(self, within_s: float = WAIT_S) -> Told:
        """Wait for the end of the command, and fail if it does not end."""
        wait([self.process.sentinel], within_s)
        with _TURN:
            self.process.join(0)
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


def _be(arguments: tuple[str, ...], folder: str, said: str, environment: Mapping[str, str]) -> None:
    """Run a command in the current process."""
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["batchlab", *arguments]
    from batchlab.cli import main

    main()
