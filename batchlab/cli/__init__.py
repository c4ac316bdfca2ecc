"""The command line: a client of the manager, and the services that a grid is made of.

Invariant: what a program may want to read goes to stdout, everything else to stderr. Importing
this package costs nothing; a command pays for what it uses.
"""

from __future__ import annotations

import sys
import time

BEGUN_S = time.monotonic()
"""When this process began, but for Python's own start; monotonic."""

SERVICES = ("manager", "worker", "connect")


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in SERVICES:
        # Started by the grid itself, for each instance: the rest of the command line would take
        # longer to import than all else that a worker needs.
        from batchlab.cli.service import serve

        serve(arguments)
    else:
        from batchlab.cli.app import start

        start(arguments)
