"""Files that hold a whole text or the one before it, and folders whose names have reached the disk.

Invariant: after the end of a process, a power cut, or a full disk, a file that `write_whole` wrote
holds either its old or its new content. When `write_whole` returns, the new content is on the disk.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

PRIVATE = 0o600
PRIVATE_FOLDER = 0o700

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that write names at once, or that cannot sync a folder."""


def write_whole(
    path: Path, content: str | bytes, *, mode: int = PRIVATE, durable: bool = True
) -> None:
    """Replace the file's content and set its permissions; its folder must exist.

    The file is never readable for more users than `mode` names. Without `durable` the content
    survives the end of the process only. Raises OSError if the file cannot be written.
    """
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)  # a file of an interrupted write may be read-only
    data = content.encode() if isinstance(content, str) else content
    with open(staged, "xb", opener=private) as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    staged.replace(path)
    if durable:
        sync_folder(path.parent)


def private(path: str | os.PathLike[str], flags: int) -> int:
    """Opener of files that only their user may read."""
    return os.open(path, flags, PRIVATE)


def make_folder(folder: Path) -> None:
    """Make the folder, for its user only, and the folders above it; wait for their names."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for one in reversed(made):
        # The folders above belong to the user, with the permissions that the user's umask gives.
        one.mkdir(PRIVATE_FOLDER if one is made[0] else 0o777, exist_ok=True)
        sync_folder(one.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
