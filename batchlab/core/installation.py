"""Extras of an installation (packages that only a part of batchlab needs), and data folders.

Invariant: the check for a package does not import the package. The command that an error suggests installs extras from
the source of the existing installation, because batchlab does not own its name on the package index.

The data folders that ship with the code are backends, scenarios, compose, and examples.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from batchlab.core.errors import UsageError

MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "aws": ("boto3", "botocore", "packaging", "psycopg"),
        "docker": ("docker", "boto3", "botocore", "localstack_client", "packaging", "psycopg"),
        "ministack": ("boto3", "botocore"),
        # The OpenTelemetry API is not listed, because FastAPI installs it.
        "otel": ("opentelemetry.sdk", "opentelemetry.exporter"),
    }
)
"""Import names of the packages of each extra."""

_ELSEWHERE = "file:///…/batchlab-….whl"


def missing(extra: str, *modules: str) -> str | None:
    """Return the first module of the extra that is not installed, or None if all modules are installed.

    If `modules` are given, only the modules in `modules` are checked.
    """
    return next((module for module in modules or MODULES[extra] if not _is_here(module)), None)


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of the module is not installed
        return False


def extra_of(module: str) -> str | None:
    """Return the name of an extra that installs the module, or None if the module does not belong to an extra."""
    return next((extra for extra, modules in MODULES.items() if module in modules), None)


def check_platform() -> None:
    """Raise UsageError on Windows."""
    if sys.platform in ("win32", "cygwin"):
        raise UsageError(
            "batchlab does not run on Windows.",
            remedy="Install WSL2 (`wsl --install`), and then install and run batchlab in WSL2.",
        )


def need(extra: str, what: str, *modules: str) -> None:
    """Raise UsageError if the extra, or one of `modules`, is not installed.

    `what` is the feature that needs the extra, and the subject of the error's sentence.
    """
    if module := missing(extra, *modules):
        raise UsageError(sentence(extra, what, module), remedy=remedy(extra))


def sentence(extra: str, what: str, module: str) -> str:
    """Return the error text for a missing `module` of an extra."""
    return f"{what} needs batchlab's extra `{extra}`, which is not installed: there is no package {module!r}."


def remedy(*extras: str) -> str:
    """Return a sentence with the command that installs the extras into the current environment."""
    origin, names, python = _origin(), ",".join(extras), shlex.quote(sys.executable)
    url = str(origin.get("url") or _ELSEWHERE)
    if origin.get("dir_info", {}).get("editable"):
        what = "-e " + shlex.quote(f"{unquote(urlsplit(url).path)}[{names}]")
    else:
        if vcs := origin.get("vcs_info"):
            url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        what = shlex.quote(f"batchlab[{names}] @ {url}")
    installer = f"{python} -m pip install" if find_spec("pip") else f"uv pip install --python {python}"
    return f"`{installer} {what}` brings {'it' if len(extras) == 1 else 'them'}."


def anywhere(extra: str) -> str:
    """Return the sentence of `remedy` without paths of the local machine."""
    return f"`pip install 'batchlab[{extra}] @ {_ELSEWHERE}'` brings it."


def _origin() -> Mapping[str, Any]:
    """Return the source of the installation, which the installer recorded in direct_url.json."""
    from importlib import metadata  # a local import keeps the start of a worker fast

    try:
        text = metadata.distribution("batchlab").read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # the code in an image is not an installed distribution
        return {}
    origin: Mapping[str, Any] = json.loads(text) if text else {}
    return origin


FOLDERS = ("backends", "scenarios", "compose", "examples")

_PACKAGE = Path(__file__).resolve().parent.parent
_MADE = {"data", "out"}


def folder(name: str) -> Path:
    """Return the path of the data folder `name`, in an installed wheel or in a checkout.

    Raise UsageError if the folder does not exist.
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"This installation lacks its {name} folder.", remedy="Install it again.")


def starter() -> dict[str, str]:
    """Return the files of the job that `batchlab init` writes, as a dict from the relative name to the text of each
    file.
    """
    root = folder("examples") / "starter"
    # The files of the starter job have other names in the package. A folder with a job.yaml would count as an example
    # of `init --example`. A wheel omits folders with the name `data`, which contain the generated input of an example.
    files = {"job.yaml": "starter.yaml", "handlers.py": "handlers.py", "data/claims.csv": "claims.csv"}
    return {name: (root / file).read_text() for name, file in files.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """Return the document in a TOML file. Raise UsageError if the file cannot be read."""
    import tomllib  # tomllib is imported only here, because a worker does not need tomllib

    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        remedy = "Name an existing file that can be read."
        raise UsageError(f"{path} cannot be read: {error.strerror}.", remedy=remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.", remedy="Correct this line.") from error


def files() -> Iterator[tuple[str, Path]]:
    """Yield the path in a wheel and the local path of every file of the package, sorted by the path in the wheel.

    The files of a wheel are the code and the data folders. All paths in a wheel begin with "batchlab/". Raise
    UsageError if a data folder is missing.
    """
    paths = {f"{_PACKAGE.name}/{path}": _PACKAGE / path for path in _below(_PACKAGE)}
    for name in FOLDERS:
        root = folder(name)
        paths |= {
            f"{_PACKAGE.name}/_data/{name}/{path}": root / path
            for path in _below(root)
            if name != "examples" or not _is_made(path)
        }
    yield from sorted(paths.items())


def _is_made(path: str) -> bool:
    """Return whether the file was created by a run of an example, as input, as results, or as a part of a grid."""
    return any(part in _MADE or part.startswith(".") for part in path.split("/")[:-1])


def _below(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path.relative_to(root).as_posix()
