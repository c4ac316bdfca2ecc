"""Variables of the environment that a stack's manager and workers are given along with a release.

Invariant: none of them is a secret, since whoever may read the stack's bucket reads the release;
and each is written so that systemd and Docker read the same of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from batchlab.core import logs
from batchlab.core.errors import UsageError

FILE = "environment"
"""Its name in a release."""
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
"""What a grid in containers takes over of the environment that it is brought up in. Not
OTEL_EXPORTER_OTLP_HEADERS, which may hold a key: what a worker has, every task can read."""
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_./:,=@%+*?&~-]*")


def check(variables: Mapping[str, str], where: str) -> None:
    """UsageError for a variable that cannot go along, or must not."""
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
    """The file."""
    return "".join(f"{name}={value}\n" for name, value in sorted(variables.items())).encode()


def taken_over(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of `PASSED_ON` that are set."""
    return {name: environ[name] for name in PASSED_ON if environ.get(name)}
