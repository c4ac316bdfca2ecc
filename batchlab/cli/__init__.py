"""The command line: a client of the manager, and the services of a grid.

Invariant: results for programs go to stdout, everything else to stderr. This package imports no other
module of batchlab at its top, so that each command imports only the modules that it uses.
"""

from __future__ import annotations

import sys
import time

START_S = time.monotonic()
"""Monotonic time at which this process began, after Python's own start."""

SERVICES = ("manager", "worker", "connect")

REQUIRED_MODULES = frozenset(
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
"""Import names of the packages in every installation."""


def missing_module_message(error: ModuleNotFoundError) -> str | None:
    """Return the error text for a missing required package or extra, or None for other modules."""
    from batchlab.core import installation

    name = (error.name or "").partition(".")[0]
    if extra := installation.extra_of(name):
        sentence = installation.sentence(extra, "This command", name)
        return f"Error: {sentence}\n  {installation.remedy(extra)}"
    if name not in REQUIRED_MODULES:
        return None
    return (
        f"Error: The Python package {name!r} is not installed, and this command needs it.\n"
        f"  Install batchlab again with all its packages: in {sys.prefix} one of them is missing."
    )


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
