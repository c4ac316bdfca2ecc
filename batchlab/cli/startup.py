"""Facts that the command line needs before the import of a command: start time, services, and packages."""

from __future__ import annotations

import sys
import time

START_S = time.monotonic()
"""Monotonic time in seconds at which this process began to run batchlab's code."""

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
        "jinja2",
        "multipart",
        "obstore",
        "prometheus_client",
        "psutil",
        "pydantic",
        "python_multipart",
        "rich",
        "sqlalchemy",
        "starlette",
        "typer",
        "typing_extensions",
        "tzdata",
        "uvicorn",
        "yaml",
    }
)
"""Import names of the packages that every installation of batchlab requires."""


def missing_module_message(error: ModuleNotFoundError) -> str | None:
    """Return the error text for a missing package that batchlab or an extra requires, or None for any other module."""
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
