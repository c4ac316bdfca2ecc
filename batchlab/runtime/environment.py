"""Environment variables of a stack's manager and workers, which a release contains.

Invariants: no variable is a secret, because every reader of the stack's bucket can read the
release. systemd and Docker read each value in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from batchlab.core import logs
from batchlab.core.errors import UsageError

FILE = "environment"
"""Name of the file in a release."""
PASSED_ON = (
    logs.LEVEL_VARIABLE,
    logs.FORMAT_VARIABLE,
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_BSP_SCHEDULE_DELAY",
)
"""Variables that a grid in containers inherits from the environment of `grid up`.

OTEL_EXPORTER_OTLP_HEADERS is missing, because it may contain a key. Every task can read the
environment of its worker.
"""
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_./:,=@%+*?&~-]*")


def check(variables: Mapping[str, str], where: str) -> None:
    """Raise UsageError for a variable that cannot be passed on, or that must stay secret."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{where}: {name!r} is no name of a variable.",
                remedy="Use capital letters, digits and _.",
            )
        if list(logs.secrets_of({name: value})):
            raise UsageError(
                f"{where}: {name} is a secret by its name, and what stands here lies in the "
                "stack's bucket for all to read that run there.",
                remedy="Put it into /etc/batchlab/environment of an image of your own.",
            )
        if not _VALUE.fullmatch(value):
            raise UsageError(
                f"{where}: the value of {name} has characters that not everybody reads alike.",
                remedy="Use none of blanks, quotes, $, # and backslashes.",
            )


def content(variables: Mapping[str, str]) -> bytes:
    """Return the content of the file."""
    return "".join(f"{name}={value}\n" for name, value in sorted(variables.items())).encode()


def taken_over(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `PASSED_ON` that are set."""
    return {name: environ[name] for name in PASSED_ON if environ.get(name)}
