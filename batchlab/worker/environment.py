"""Environment of the tasks on a worker, with Python, packages, platform, image, and names of variables.

Invariant: only the environment variables in `SETTINGS` are stored with values, because any other variable may contain a
secret. Each worker stores its environment once as a separate object, and outcomes name the worker. An outcome without a
stored environment is valid.
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

_SETTING_NAMES = """
    LANG LC_ALL TZ OMP_NUM_THREADS MALLOC_ARENA_MAX PYTHONHASHSEED PYTHONUTF8 PYTHONOPTIMIZE PYTHONDEVMODE
    PYTHONWARNINGS
"""
SETTINGS = tuple(_SETTING_NAMES.split())
"""Environment variables that change how programs behave, and whose values are not secret."""

MAX_NAMES = 200
MAX_PACKAGES = 2000

_SESSION_NAMES = """
    _ COLUMNS COLORTERM DISPLAY EDITOR HOME HOSTNAME LINES LOGNAME LS_COLORS MAIL OLDPWD PAGER PATH PS1 PWD SHELL SHLVL
    TERM TMPDIR USER VIRTUAL_ENV VISUAL JOURNAL_STREAM INVOCATION_ID PYTHONPATH SYSTEMD_EXEC_PID MEMORY_PRESSURE_WATCH
    MEMORY_PRESSURE_WRITE
"""
_HARMLESS_NAMES = """
    LANGUAGE LD_LIBRARY_PATH LIBRARY_PATH DYLD_LIBRARY_PATH MANPATH NO_COLOR CONDA_DEFAULT_ENV CONDA_PREFIX JAVA_HOME
    TEMP TMP CI NO_PROXY no_proxy SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
"""
_SESSION = frozenset(_SESSION_NAMES.split())
_HARMLESS = _SESSION.union(_HARMLESS_NAMES.split())
_HARMLESS_KINDS = ("LC_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "CUDA_VISIBLE_")
_SESSIONS = ("AWS_", "BATCHLAB_", "DBUS_", "GIT_", "LESS", "PYTEST_", "SSH_", "TERM_", "XDG_")


@dataclass(frozen=True, slots=True)
class Environment:
    """Environment of one worker.

    `packages` maps normalized names to versions. `variables` has the names of variables that a user may have set on
    purpose.
    """

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
        """Python's minor version, for example 3.12, on which pickled functions depend."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        image = f", image {self.image}" if self.image else ""
        return (
            f"{self.implementation} {self.python} on {self.platform}, batchlab {self.batchlab}, "
            f"{len(self.packages)} packages{image}"
        )


def current(environ: Mapping[str, str] = os.environ, *, image: str = "") -> Environment:
    """Return the environment of the current process. The listing of packages takes a few milliseconds."""
    from batchlab import __version__

    names = [name for name in environ if not (name in _SESSION or name in SETTINGS or name.startswith(_SESSIONS))]
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
    """Return whether every program may have the variable `name`, because the value is never secret.

    A list of harmless names is used, because no rule recognizes each secret by its name.
    """
    return name in SETTINGS or name in _HARMLESS or name.startswith(_HARMLESS_KINDS)


def packages(path: list[str]) -> dict[str, str]:
    """Return the versions of installed packages by name.

    If several folders in `path` have a package, the first folder determines the version. The versions come from folder
    names, which is 100 times as fast as a read of metadata with importlib.
    """
    versions: dict[str, str] = {}
    for folder in path:
        for entry in _metadata(folder):
            stem = entry.removesuffix(".dist-info").removesuffix(".egg-info")
            name, _, version = stem.partition("-")
            if name and version:
                versions.setdefault(name.lower().replace("_", "-").replace(".", "-"), version)
    return dict(sorted(versions.items())[:MAX_PACKAGES])


def _metadata(folder: str) -> list[str]:
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208 - only names are needed
    except OSError:
        return []  # An entry of `path` may be a zip file or may not exist.
    return [name for name in names if name.endswith((".dist-info", ".egg-info"))]


# --- Storage -------------------------------------------------------------------------------------


async def record(objects: Objects, worker: str, environment: Environment, patience: Patience) -> None:
    """Store the environment of `worker` with one request."""
    data = json_format.to_bytes(to_json(environment))
    await patience(partial(objects.put, object_keys.environment(worker), data))


async def load(objects: Objects, worker: str, patience: Patience) -> Environment | None:
    """Return the stored environment of a worker, or None if the environment is missing or unreadable."""
    try:
        data = await patience(partial(objects.get, object_keys.environment(worker)))
        return from_json(json_format.loads(data))
    except (NotFound, Malformed, TooNew):
        return None


def to_json(environment: Environment) -> dict[str, Json]:
    return {"v": json_format.VERSION, **json_format.fields(environment)}


def from_json(doc: Mapping[str, Any]) -> Environment:
    """Return the environment in a JSON document. A malformed document raises Malformed.

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

MAX_LISTED = 8
"""Maximum number of packages or variables that a sentence lists.

A sentence with more names ends with the number of further names.
"""


def differences(worker: Environment, local: Environment) -> list[str]:
    """Return one sentence for each difference between `local` and the worker, sorted by relevance."""
    sentences = []
    if (worker.implementation, worker.python) != (local.implementation, local.python):
        sentences.append(
            f"Python is {local.implementation} {local.python} here and was {worker.implementation} "
            f"{worker.python} on the worker."
        )
    if worker.batchlab != local.batchlab:
        sentences.append(f"batchlab is {local.batchlab} here and was {worker.batchlab} there.")
    installed = local.packages
    other = [f"{n} ({installed[n]}, there {v})" for n, v in worker.packages.items() if installed.get(n, v) != v]
    if other:
        sentences.append(f"Other versions are installed here of {_list_text(other)}.")
    if missing := [f"{n} ({v})" for n, v in worker.packages.items() if n not in installed]:
        sentences.append(f"Installed there and not here: {_list_text(missing)}.")
    if worker.image and worker.image != local.image:
        sentences.append(f"The worker ran from the image {worker.image}.")
    if worker.platform != local.platform:
        sentences.append(f"The platform is {local.platform} here and was {worker.platform} there.")
    for name in SETTINGS:
        here, there = (
            "not set" if value is None else repr(value)
            for value in (local.settings.get(name), worker.settings.get(name))
        )
        if here != there:
            sentences.append(f"{name} is {here} here and was {there} there.")
    if missing := [name for name in worker.variables if name not in local.variables]:
        are = "is" if len(missing) == 1 else "are"
        sentences.append(f"{_list_text(missing)} {are} not set here and had a value there, which is not stored.")
    return sentences


def _list_text(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
