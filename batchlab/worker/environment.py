"""Environment of the tasks on a worker: Python, packages, platform, image, and variable names.

Invariant: values are stored only for the few environment variables in `SETTINGS`, because any other
variable may contain a secret. Each worker stores its environment once as a separate object, and
outcomes name the worker. An outcome without a stored environment is valid.
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
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, decode

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
"""Variables that change how programs behave and whose values are not secret."""

MAX_NAMES = 200
MAX_PACKAGES = 2000

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
    """Environment of one worker. `packages` maps normalized names to versions, and `variables` has
    the names of variables that may have been set on purpose."""

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
        """Python's minor version, such as 3.12, on which pickled functions depend."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        image = f", image {self.image}" if self.image else ""
        return (
            f"{self.implementation} {self.python} on {self.platform}, batchlab {self.batchlab}, "
            f"{len(self.packages)} packages{image}"
        )


def current(environ: Mapping[str, str] = os.environ, *, image: str = "") -> Environment:
    """Return the environment of this process. Listing the packages takes a few milliseconds."""
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
        tuple(sorted(names)[:MAX_NAMES]),
    )


def is_harmless(name: str) -> bool:
    """Return whether every program may have this variable, because its value is never a secret.

    No rule recognizes each secret by its name, so the harmless names are listed instead.
    """
    return name in SETTINGS or name in _HARMLESS or name.startswith(_HARMLESS_KINDS)


def _is_of_a_session(name: str) -> bool:
    return name in _SESSION or name in SETTINGS or name.startswith(_SESSIONS)


def packages(path: list[str]) -> dict[str, str]:
    """Return the versions of installed packages by name. The first folder in `path` wins.

    Versions come from folder names, which is 100 times as fast as reading metadata with importlib.
    """
    found: dict[str, str] = {}
    for folder in path:
        for entry in _metadata(folder):
            stem = entry.removesuffix(".dist-info").removesuffix(".egg-info")
            name, _, version = stem.partition("-")
            if name and version:
                found.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    return dict(sorted(found.items())[:MAX_PACKAGES])


def _metadata(folder: str) -> list[str]:
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208 - only names are needed
    except OSError:
        return []  # The entry is a zip or does not exist.
    return [name for name in names if name.endswith((".dist-info", ".egg-info"))]


# --- Storage -------------------------------------------------------------------------------------


async def record(objects: Objects, worker: str, environment: Environment, patience: Patience) -> None:
    """Store the environment of `worker` with one request."""
    data = json_format.to_bytes(to_json(environment))
    await patience(partial(objects.put, object_keys.environment(worker), data))


async def load(objects: Objects, worker: str, patience: Patience) -> Environment | None:
    """Return the stored environment of a worker, or None if it is missing or unreadable."""
    try:
        data = await patience(partial(objects.get, object_keys.environment(worker)))
        return from_json(json_format.loads(data))
    except (NotFound, Malformed, TooNew):
        return None


def to_json(environment: Environment) -> dict[str, Json]:
    return {"v": json_format.VERSION, **json_format.fields(environment)}


def from_json(doc: Mapping[str, Any]) -> Environment:
    """Return the environment in a document. Raise Malformed if it cannot be read.

    Fields added by a newer batchlab version are ignored.
    """
    try:
        environment = decode(Environment, doc)
        for texts in (environment.packages, environment.settings):
            if type(texts) is not dict or not all(type(text) is str for text in texts.values()):
                raise ValueError("texts by name are expected")
        return environment
    except UNREADABLE as error:
        raise Malformed(f"An environment cannot be read: {json_format.brief(error)}.") from error


# --- Comparison ----------------------------------------------------------------------------------

NAMED = 8
"""Number of packages or variables that are named before the rest is counted."""


def differences(there: Environment, now: Environment) -> list[str]:
    """Return one sentence for each difference from the worker, most relevant first."""
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
        found.append(f"{_some(missing)} {are} not set here and had a value there, which is not stored.")
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
