"""The extras of an installation: what only a part of batchlab needs, and what is said without it.

Invariant: whether one is here is found out without an import of it, and the command that is told
installs from where this batchlab came from: on a package index its name is not ours.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from batchlab.core.errors import UsageError

MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "aws": ("boto3", "botocore", "packaging", "psycopg"),
        "docker": ("docker", "boto3", "botocore", "localstack_client", "packaging", "psycopg"),
        "ministack": ("boto3", "botocore"),
        # FastAPI brings OpenTelemetry's API by itself.
        "otel": ("opentelemetry.sdk", "opentelemetry.exporter"),
        "web": ("jinja2",),
    }
)
"""By the name of each extra what it brings, by the names that it is imported by."""

_ELSEWHERE = "file:///…/batchlab-….whl"


def missing(extra: str, *modules: str) -> str | None:
    """The first module of the extra that is not installed here, of `modules` where only those are
    needed; None where all are there."""
    return next((one for one in modules or MODULES[extra] if not _is_here(one)), None)


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def bringing(module: str) -> str | None:
    """An extra that brings the module; None where every installation has it, or none has."""
    return next((extra for extra, modules in MODULES.items() if module in modules), None)


def need(extra: str, what: str, *modules: str) -> None:
    """UsageError where the extra is not here, or of it not `modules`; `what` needs it, and begins
    the sentence."""
    if module := missing(extra, *modules):
        raise UsageError(sentence(extra, what, module), remedy=remedy(extra))


def sentence(extra: str, what: str, module: str) -> str:
    """What is said where `module` of the extra is not here."""
    return (
        f"{what} needs batchlab's extra `{extra}`, which is not installed: "
        f"there is no package {module!r}."
    )


def remedy(*extras: str) -> str:
    """The command that installs them into this environment, in a sentence."""
    told, names = _origin(), ",".join(extras)
    url = str(told.get("url") or _ELSEWHERE)
    if told.get("dir_info", {}).get("editable"):
        what = "-e " + shlex.quote(f"{unquote(urlsplit(url).path)}[{names}]")
    else:
        if vcs := told.get("vcs_info"):
            url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        what = shlex.quote(f"batchlab[{names}] @ {url}")
    return f"`{_installer()} {what}` brings {'it' if len(extras) == 1 else 'them'}."


def anywhere(extra: str) -> str:
    """The same for whoever is not to hear where things lie on this machine."""
    return f"`pip install 'batchlab[{extra}] @ {_ELSEWHERE}'` brings it."


def for_a_manager(extra: str) -> str:
    """The same for whoever asks a manager that may run in a container or on AWS."""
    return (
        f"{anywhere(extra)} Where the manager runs in a container or on AWS, install it where the "
        "grid is brought up from, and bring the grid up again (on AWS: `deploy apply`)."
    )


def _origin() -> Mapping[str, Any]:
    """What the installer has written down of where batchlab came from (direct_url.json)."""
    from importlib import metadata  # a worker's start does not pay for it

    try:
        told = metadata.distribution("batchlab").read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # an image has the code alone
        return {}
    found: Mapping[str, Any] = json.loads(told) if told else {}
    return found


def _installer() -> str:
    here = shlex.quote(sys.executable)
    return f"{here} -m pip install" if find_spec("pip") else f"uv pip install --python {here}"
