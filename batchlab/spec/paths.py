"""Local paths of a job file: where they lead, and what a pattern matches.

Invariant: symbolic links stay as they were written, and no name, however odd, makes a look-up
raise: what cannot be looked at is not there.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path


def absolute(path: Path) -> Path:
    """`path` from the root and without `..`."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def is_file(path: Path) -> bool:
    """Whether `path` is a file that can be looked at."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that can be looked at."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def matches(pattern: str, folder: Path) -> list[Path]:
    """The files that `pattern` names, seen from `folder`, sorted by path.

    A file of exactly that name comes before any meaning of `[` or `*`.
    """
    if is_file(folder / pattern):
        return [absolute(folder / pattern)]
    # Path.glob takes hidden files, and "**" at the end means something else from 3.13 on.
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - see above
    return [absolute(folder / name) for name in sorted(names) if is_file(folder / name)]
