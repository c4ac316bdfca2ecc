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


NEEDED = frozenset(
    {
        "alembic",
        "cloudpickle",
        "cronsim",
        "duckdb",
        "fastapi",
        "httptools",
        "httpx",
        "multipart",
        "obstore",
        "prometheus_client",
        "pydantic",
        "python_multipart",
        "rich",
        "sqlalchemy",
        "typer",
        "typing_extensions",
        "tzdata",
        "uvicorn",
        "yaml",
    }
)
"""What every installation has, by the names that it is imported by."""


def main() -> None:
    """The console script."""
    try:
        _main(sys.argv[1:])
    except ModuleNotFoundError as error:
        told = lacking(error)
        if told is None:
            raise
        print(told, file=sys.stderr)  # noqa: T201 - output may be what is lacking
        sys.exit(2)


def lacking(error: ModuleNotFoundError) -> str | None:
    """What is said of an installation without one of its packages, or without an extra, and what to
    do; None for a module that is neither's."""
    from batchlab.core import optional_dependencies

    name = (error.name or "").partition(".")[0]
    if extra := optional_dependencies.bringing(name):
        said = optional_dependencies.sentence(extra, "This command", name)
        return f"Error: {said}\n  {optional_dependencies.remedy(extra)}"
    if name not in NEEDED:
        return None
    return (
        f"Error: The Python package {name!r} is not installed, and this command needs it.\n"
        f"  Install batchlab again with all its packages: in {sys.prefix} one of them is missing."
    )


def _main(arguments: list[str]) -> None:
    if arguments and arguments[0] in SERVICES:
        # Started by the grid itself, for each instance: the rest of the command line would take
        # longer to import than all else that a worker needs.
        from batchlab.cli.services import serve

        serve(arguments)
    else:
        from batchlab.cli.app import start

        start(arguments)
