"""Data folders that ship with the code: backends, scenarios, compose, examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from batchlab.core.errors import UsageError

FOLDERS = ("backends", "scenarios", "compose", "examples")

_PACKAGE = Path(__file__).resolve().parent.parent
_MADE = {"data", "out"}


def folder(name: str) -> Path:
    """Return the folder `name`, in an installed wheel or in a checkout.

    Raise UsageError if neither has it.
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"This installation lacks its {name} folder.", remedy="Install it again.")


def files() -> Iterator[tuple[str, Path]]:
    """Yield every file of the package as a wheel has it, with its path in the wheel, in order.

    The files are the code and the data folders. Paths begin with "batchlab/". Raise UsageError if a
    folder is missing.
    """
    found = {f"{_PACKAGE.name}/{path}": _PACKAGE / path for path in _below(_PACKAGE)}
    for name in FOLDERS:
        root = folder(name)
        found |= {
            f"{_PACKAGE.name}/_data/{name}/{path}": root / path
            for path in _below(root)
            if name != "examples" or not _is_made(path)
        }
    yield from sorted(found.items())


def _is_made(path: str) -> bool:
    """Return whether a run of an example created the file: its input, its results, or a grid."""
    return any(part in _MADE or part.startswith(".") for part in path.split("/")[:-1])


def _below(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path.relative_to(root).as_posix()
