"""Local paths of a job file: where they lead, and what a pattern matches.

Invariant: symbolic links stay as they were written, and no name, however odd, makes a look-up
raise: what cannot be looked at is not there. A look-up ends, whichever way links lead.
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
    """`path` from the root and without `..`."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def is_file(path: Path) -> bool:
    """Whether `path` is a file that can be looked at."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that can be looked at."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def unfit(name: str) -> str | None:
    """Why no object can have `name` as the end of its key, as the end of a sentence."""
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
    """The files that `pattern` names, seen from `folder`, sorted by path.

    A file of exactly that name comes before any meaning of `[` or `*`.
    """
    start = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    parts = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    names = set(_expand(folder, start, parts)) if parts else set()
    found = [absolute(folder / name) for name in sorted(names) if is_file(folder / name)]
    if is_file(folder / pattern) and absolute(folder / pattern) not in found:
        # Its name has brackets or the like, which are meant as they are.
        return [absolute(folder / pattern)]
    return found


def _expand(folder: Path, place: str, parts: Sequence[str]) -> Iterator[str]:
    """What `parts` match in `place`, which is "" or ends in a slash, and like the answers is seen
    from `folder`.

    Part by part, for a "**" of glob's own follows links in circles, and Path.glob takes hidden
    files.
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
    """`place` and every folder below it that is not hidden, each once, however many links lead
    there: by a path without links where it has one."""
    seen: set[tuple[int, int]] = set()
    waiting, linked = deque([place]), deque[str]()
    while waiting or linked:
        here = waiting.popleft() if waiting else linked.popleft()
        with suppress(OSError):  # what cannot be looked at is not there
            info = os.stat(folder / here)  # noqa: PTH116 - as the listing below
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
