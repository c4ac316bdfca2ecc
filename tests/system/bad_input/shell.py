"""The command line as a user runs it, with one process per command."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support import forked_cli
from tests.support.forked_cli import Told

__all__ = ["Told"]

SECRET = "wJalrXUtnFEMI-a-secret-of-the-user"
"""A secret in the environment of every command, which no command may print."""
WAIT_S = 120.0
"""A time longer than any command on the slowest machine. A command that takes longer counts as hanging."""


class Shell:
    """A runner of commands in `folder`. Their output and the grid's home are in `world`."""

    def __init__(self, world: Path, folder: Path, **environment: str) -> None:
        self.world = world
        self.folder = folder
        self._environment = {"BATCHLAB_HOME": str(world / "home"), "AWS_SECRET_ACCESS_KEY": SECRET, **environment}
        self.home = Path(self._environment["BATCHLAB_HOME"])
        self._count = 0

    def __call__(self, *arguments: str, **environment: str) -> Told:
        """Run a command to its end."""
        self._count += 1
        said = self.world / f"said-{self._count}"
        said.mkdir()
        given = {**os.environ, **self._environment, **environment}
        return forked_cli.start(arguments, self.folder, said, given).end(WAIT_S)
