"""What tasks find around them on a worker: Python, packages, platform, image, names of variables.

Invariant: no value of an environment variable is kept but those of a few that everybody may know
(`SETTINGS`): a secret may be in any other. Each worker stores it once, beside the outcomes that
name the worker, so that an outcome is as it was, and one without it is no error.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchlab.core.errors import Malformed, NotFound, TooNew
from batchlab.core.model import Json
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, fitted, known
from batchlab.core.retry import Patience

SETTINGS = (
    "LANG",
    "LC_ALL",
    "TZ",
    "OMP_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "PYTHONHASHSEED",
    "PYTHONUTF8",
    "PYTHONOPTIMIZE",
    "PYTHONDEVMODE",
    "PYTHONWARNINGS",
)
"""Variables that change what programs do, and whose values are nobody's secret."""

MOST_NAMES = 200
MOST_PACKAGES = 2000

_SESSION = frozenset(
    (
        "_",
        "COLUMNS",
        "COLORTERM",
        "DISPLAY",
        "EDITOR",
        "HOME",
        "HOSTNAME",
        "LINES",
        "LOGNAME",
        "LS_COLORS",
        "MAIL",
        "OLDPWD",
        "PAGER",
        "PATH",
        "PS1",
        "PWD",
        "SHELL",
        "SHLVL",
        "TERM",
        "TMPDIR",
        "USER",
        "VIRTUAL_ENV",
        "VISUAL",
        "JOURNAL_STREAM",
        "INVOCATION_ID",
        "PYTHONPATH",
        "SYSTEMD_EXEC_PID",
        "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
    )
)
_HARMLESS = _SESSION | {
    "LANGUAGE",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "MANPATH",
    "NO_COLOR",
    "CONDA_DEFAULT_ENV",
    "CONDA_PREFIX",
    "JAVA_HOME",
    "TEMP",
    "TMP",
    "CI",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
}
_HARMLESS_KINDS = ("LC_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "CUDA_VISIBLE_")
_SESSIONS = ("AWS_", "BATCHLAB_", "DBUS_", "GIT_", "LESS", "PYTEST_", "SSH_", "TERM_", "XDG_")


@dataclass(frozen=True, slots=True)
class Environment:
    """`packages` has the version of each by its normalised name; `variables` are the names of those
    that a program may have been given on purpose."""

    python: str
    implementation: str
    platform: str
    machine: str
    batchlab: str
    image: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    variables: tuple[str, ...] = ()

    @property
    def minor(self) -> str:
        """Python's version as pickled functions care for it: 3.12."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        image = f", image {self.image}" if self.image else ""
        return (
            f"{self.implementation} {self.python} on {self.platform}, batchlab {self.batchlab}, "
            f"{len(self.packages)} packages{image}"
        )


def here(environ: Mapping[str, str] = os.environ, *, image: str = "") -> Environment:
    """That of this process; reads the names of installed packages, a few milliseconds."""
    from batchlab import __version__

    names = [name for name in environ if not _is_of_a_session(name)]
    return Environment(
        platform.python_version(),
        platform.python_implementation(),
        platform.platform(),
        platform.machine(),
        __version__,
        image,
        packages(sys.path),
        {name: environ[name] for name in SETTINGS if name in environ},
        tuple(sorted(names)[:MOST_NAMES]),
    )


def is_harmless(name: str) -> bool:
    """Return whether every program may have this variable, because its value is never a secret.

    No rule recognizes each secret by its name, so the harmless names are listed instead.
    """
    return name in SETTINGS or name in _HARMLESS or name.startswith(_HARMLESS_KINDS)


def _is_of_a_session(name: str) -> bool:
    return name in _SESSION or name in SETTINGS or name.startswith(_SESSIONS)


def packages(path: list[str]) -> dict[str, str]:
    """Version by name of what is installed in the folders of `path`; the first one counts.

    By the names of folders: reading each package's metadata, as importlib does, takes a hundred
    times as long.
    """
    found: dict[str, str] = {}
    for folder in path:
        for entry in _metadata(folder):
            stem = entry.removesuffix(".dist-info").removesuffix(".egg-info")
            name, _, version = stem.partition("-")
            if name and version:
                found.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    return dict(sorted(found.items())[:MOST_PACKAGES])


def _metadata(folder: str) -> list[str]:
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []  # a zip, or a folder that is not there
    return [name for name in names if name.endswith((".dist-info", ".egg-info"))]


# --- Stored --------------------------------------------------------------------------------------


async def record(
    objects: Objects, worker: str, environment: Environment, patience: Patience
) -> None:
    """Store it for everything that `worker` does: one request."""
    data = json_format.to_bytes(to_json(environment))
    await patience(partial(objects.put, object_keys.environment(worker), data))


async def of(objects: Objects, worker: str, patience: Patience) -> Environment | None:
    """Return the environment of a worker; None if it has stored none that can be read, or it has
    expired."""
    try:
        data = await patience(partial(objects.get, object_keys.environment(worker)))
        return from_json(json_format.loads(data))
    except (NotFound, Malformed, TooNew):
        return None


def to_json(environment: Environment) -> dict[str, Json]:
    return {"v": json_format.VERSION, **json_format.fields(environment)}


def from_json(doc: Mapping[str, Any]) -> Environment:
    """Return the environment in a document; Malformed if it cannot be read. What a later batchlab
    has added is passed over."""
    try:
        fields = known(Environment, doc)
        made = Environment(**{**fields, "variables": tuple(fields.get("variables", ()))})
        for texts in (made.packages, made.settings):
            if type(texts) is not dict or not all(type(one) is str for one in texts.values()):
                raise ValueError("texts by name are expected")
        return fitted(made)
    except UNREADABLE as error:
        raise Malformed(f"An environment cannot be read: {json_format.brief(error)}.") from error


# --- Compared ------------------------------------------------------------------------------------

NAMED = 8
"""Packages and variables that are named before the rest is counted."""


def differences(there: Environment, now: Environment) -> list[str]:
    """What is not here as it was on the worker, a sentence each, the likeliest reason first."""
    found = []
    if (there.implementation, there.python) != (now.implementation, now.python):
        found.append(
            f"Python is {now.implementation} {now.python} here and was {there.implementation} "
            f"{there.python} on the worker."
        )
    if there.batchlab != now.batchlab:
        found.append(f"batchlab is {now.batchlab} here and was {there.batchlab} there.")
    found += _packages(there.packages, now.packages)
    if there.image and there.image != now.image:
        found.append(f"The worker ran from the image {there.image}.")
    if there.platform != now.platform:
        found.append(f"The platform is {now.platform} here and was {there.platform} there.")
    for name in SETTINGS:
        one, other = there.settings.get(name), now.settings.get(name)
        if one != other:
            found.append(f"{name} is {_shown(other)} here and was {_shown(one)} there.")
    if missing := [name for name in there.variables if name not in now.variables]:
        are = "is" if len(missing) == 1 else "are"
        found.append(
            f"{_some(missing)} {are} not set here and had a value there, which is not stored."
        )
    return found


def _packages(there: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    found = []
    other = [f"{n} ({now[n]}, there {v})" for n, v in there.items() if now.get(n, v) != v]
    missing = [f"{n} ({v})" for n, v in there.items() if n not in now]
    if other:
        found.append(f"Other versions are installed here of {_some(other)}.")
    if missing:
        found.append(f"Installed there and not here: {_some(missing)}.")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)
