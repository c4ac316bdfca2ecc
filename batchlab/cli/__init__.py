"""Command line of batchlab, which calls the manager of a grid and runs the grid's services.

Invariant: commands write results for programs to stdout, and all other output to stderr. The package `batchlab.cli`
does not import other modules of batchlab at module level, so that each command imports only the modules that the
command uses.
"""

from __future__ import annotations

import sys

from batchlab.cli.startup import SERVICES, missing_module_message


def main() -> None:
    """Run the command line with the arguments of this process (entry point of the console script)."""
    if sys.platform in ("win32", "cygwin"):
        _refuse_platform()
    try:
        _run(sys.argv[1:])
    except ModuleNotFoundError as error:
        message = missing_module_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)  # noqa: T201 - the import of batchlab.cli.output may fail
        sys.exit(2)


def _refuse_platform() -> None:
    from batchlab.core.errors import UsageError
    from batchlab.core.installation import check_platform

    try:
        check_platform()
    except UsageError as error:
        print(f"Error: {error.message}\n  {error.remedy}", file=sys.stderr)  # noqa: T201 - other imports may fail
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in SERVICES:
        # A service starts without Typer, because the import of the Typer commands takes longer than all imports of a
        # worker. A grid starts a worker for each instance.
        from batchlab.cli.services import serve

        serve(arguments)
    else:
        from batchlab.cli.app import start

        start(arguments)
