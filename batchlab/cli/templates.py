"""Jobs to begin with: the starter, and the shipped examples.

Invariant: no file that is there is ever replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from batchlab import package_data
from batchlab.errors import UsageError

_LEFT_OUT = {"data", "out", "__pycache__"}


def starter_files() -> dict[str, bytes]:
    """The starter job: content by name."""
    from batchlab.spec.starter import starter

    return {name: text.encode() for name, text in starter().items()}


def example_files(name: str) -> dict[str, bytes]:
    """A shipped example without data or results; UsageError naming those there are."""
    root = package_data.folder("examples")
    names = sorted(path.parent.name for path in root.glob("*/job.yaml"))
    if name not in names:
        raise UsageError(f"There is no example {name!r}.", remedy=f"There are {', '.join(names)}.")
    return {
        path.relative_to(root / name).as_posix(): path.read_bytes()
        for path in sorted((root / name).rglob("*"))
        if path.is_file() and not _LEFT_OUT.intersection(path.relative_to(root / name).parts)
    }


def write(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write `files` below `folder`, all or none; UsageError where one is there already."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise UsageError(
            f"{folder / there[0]} is there already.", remedy="Name another folder, or remove it."
        )
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                file.write(content)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}.", remedy="Name another folder."
        ) from error
    return list(files)
