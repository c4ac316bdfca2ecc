"""The command line as its user has it: each command is a process of its own.

They are forked from a server that has loaded batchlab already, so that a hundred of them cost
seconds, not a minute.
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
"""In the environment of every command; nothing may ever print it."""
WAIT_S = 120.0
"""Longer than any command takes on the slowest machine: past it, it hangs."""

_FORKS = multiprocessing.get_context("forkserver")
_TURN = threading.Lock()
"""Whoever starts a process asks about all that there are; of two threads that ask about one at the
same time the second is told 255."""
_COMMANDS = ("running", "jobs", "grid", "scenario", "schedule", "report", "cost", "admin")
_FORKS.set_forkserver_preload(
    ["batchlab.cli.app", "batchlab.spec", "batchlab.submission", *(f"batchlab.cli.{name}" for name in _COMMANDS)]
)


@dataclass(frozen=True, slots=True)
class Told:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, doc: Mapping[str, Any]) -> Self:
        return cls(**doc)


class Shell:
    """Runs commands in `folder`; what they say and the grid's home are in `world`."""

    def __init__(self, world: Path, folder: Path, **environment: str) -> None:
        self.world = world
        self.folder = folder
        self._environment = {"BATCHLAB_HOME": str(world / "home"), "AWS_SECRET_ACCESS_KEY": SECRET, **environment}
        self.home = Path(self._environment["BATCHLAB_HOME"])
        self._count = 0

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a command, which somebody has to `end`."""
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
        """Wait for its end; fails where it does not come."""
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
    """The command's process."""
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["batchlab", *arguments]
    from batchlab.cli import main

    main()
