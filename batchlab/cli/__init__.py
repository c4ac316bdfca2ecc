"""The command line: a client of the manager, and the services of a grid.

Invariant: results for programs go to stdout, everything else to stderr. This package imports no other
module of batchlab at its top, so that each command imports only the modules that it uses.
"""

from __future__ import annotations

import sys

from batchlab.cli.startup import SERVICES, missing_module_message


def main() -> None:
    """Run the command line of this process (console script)."""
    try:
        _run(sys.argv[1:])
    except ModuleNotFoundError as error:
        message = missing_module_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)  # noqa: T201 - batchlab.cli.output may not be importable
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in SERVICES:
        # The grid starts a worker for each instance. The Typer commands would take longer to import
        # than everything else that a worker needs.
        from batchlab.cli.services import serve

        serve(arguments)
    else:
        from batchlab.cli.app import start

        start(arguments)
