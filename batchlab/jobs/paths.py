"""Local paths of a job file, and the files that match a pattern.

Invariants: symbolic links are not resolved. A lookup never raises an error, whatever the name is. A
path that cannot be accessed counts as missing. A lookup always ends, even if links form a cycle.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from batchlab.core.object_names import CONTROL, STAGED


def absolute(path: Path) -> Path:
    """Return `path` as an absolute path without `..`."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def is_file(path: Path) -> bool:
    """Return whether `path` is an accessible file."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def is_folder(path: Path) -> bool:
    """Return whether `path` is an accessible folder."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def unfit(name: str) -> str | None:
    """Return why an object's key cannot end in `name`, as the end of a sentence, or None."""
    if CONTROL.search(name):
        return "holds a control character"
    if STAGED.search(name):
        return "ends in '#' and digits, like a file that a store is still writing"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def matches(pattern: str, folder: Path) -> list[Path]:
    """Return the files that match `pattern` in `folder`, sorted by path.

    A file with exactly this name takes precedence over the meaning of `[` and `*`.
    """
    start = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    parts = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    names = set(_expand(folder, start, parts)) if parts else set()
    found = [absolute(folder / name) for name in sorted(names) if is_file(folder / name)]
    if is_file(folder / pattern) and absolute(folder / pattern) not in found:
        # The name contains brackets or similar characters, which are literal here.
        return [absolute(folder / pattern)]
    return found


def _expand(folder: Path, place: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the matches of `parts` in `place`. All paths are relative to `folder`.

    `place` is "" or ends in a slash. The function expands one part at a time. The "**" of `glob`
    follows links in cycles, and Path.glob includes hidden files.
    """
    first, rest = parts[0], parts[1:]
    if first == "**":
        for inner in _folders(folder, place):
            yield from _expand(folder, inner, rest or ["*"])
        return
    names = glob.glob(first, root_dir=folder / place)  # noqa: PTH207 - see above
    for name in names:
        if rest:
            yield from _expand(folder, f"{place}{name}/", rest)
        else:
            yield place + name


def _folders(folder: Path, place: str) -> Iterator[str]:
    """Yield `place` and every folder below it that is not hidden, each once.

    If links lead to the same folder, the path without links is used if it exists.
    """
    seen: set[tuple[int, int]] = set()
    waiting, linked = deque([place]), deque[str]()
    while waiting or linked:
        here = waiting.popleft() if waiting else linked.popleft()
        with suppress(OSError):  # skip folders that cannot be accessed
            info = os.stat(folder / here)  # noqa: PTH116 - like os.scandir below
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            yield here
            with os.scandir(folder / here) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and _leads_on(entry):
                        (linked if entry.is_symlink() else waiting).append(f"{here}{entry.name}/")


def _leads_on(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
