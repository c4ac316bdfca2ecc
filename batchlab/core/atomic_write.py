"""Atomic and durable writes of files and folders, and rules for object keys.

Invariant: after the end of a process, a power cut, or a full disk, a file that `write_whole` wrote has either its old
or its new content. By default, the new content is on the disk when `write_whole` returns.

`Sync` defines which writes of a local grid wait for the disk. On the backend `local`, a power cut ends the client, the
manager, and the workers together. Writes of a job wait for the disk, because a job must survive a power cut. By
default, writes for a single call of the Python API do not wait for the disk, because the client that waits for the
result does not survive a power cut.

Every child process imports the module at its start, so the module needs only the standard library.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path

from batchlab.core.errors import UsageError

PRIVATE = 0o600
PRIVATE_FOLDER = 0o700

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Error numbers of file systems that cannot sync a folder, or that write names without a sync."""


def write_whole(path: Path, content: str | bytes, *, mode: int = PRIVATE, durable: bool = True) -> None:
    """Replace the file's content and set its permissions. The file's folder must exist.

    During the write, the file is never readable for more users than `mode` allows. Without `durable`, the written
    content survives the end of the process but not a power cut. Raise OSError if the file cannot be written.
    """
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)  # a file left by an interrupted write may be read-only
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


def write_once(path: Path, content: str) -> None:
    """Create a file that only its user can read, unless the file exists.

    If several processes write the file at the same time, the first process creates the file.
    """
    staged = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    write_whole(staged, content)
    try:
        with suppress(FileExistsError):
            path.hardlink_to(staged)
    finally:
        staged.unlink()
    sync_folder(path.parent)


def private(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file, and create a missing file so that only its user may read it."""
    return os.open(path, flags, PRIVATE)


def make_private(path: Path) -> None:
    """Create an empty file that only its user may read, unless the file exists.

    SQLite creates its log and its index with the permissions of the database file. `make_private` ignores errors,
    because SQLite later reports why it cannot open a file.
    """
    with suppress(OSError):
        os.close(private(path, os.O_CREAT | os.O_RDWR))


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents, and wait until the names of all new folders are on the disk. Only the
    user can access the folder.
    """
    new_folders = []
    while not folder.exists():
        new_folders.append(folder)
        folder = folder.parent
    for path in reversed(new_folders):
        # Parent folders get the permissions of the user's umask.
        path.mkdir(PRIVATE_FOLDER if path is new_folders[0] else 0o777, exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names of the files in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


VARIABLE = "BATCHLAB_SYNC"

_single_call: ContextVar[bool] = ContextVar("single_call", default=False)


class Sync(StrEnum):
    """Choice of which writes of a local grid wait for the disk."""

    ALL = "all"
    """Writes of jobs and of single calls of the Python API wait for the disk."""
    JOBS = "jobs"
    """Only writes of jobs wait for the disk."""
    NONE = "none"

    @property
    def waits(self) -> bool:
        """Return whether a write in the current context waits for the disk."""
        return self is Sync.ALL or (self is Sync.JOBS and not _single_call.get())


def read_sync(environ: Mapping[str, str] = os.environ) -> Sync:
    """Return the Sync in BATCHLAB_SYNC, by default `jobs`. Raise UsageError if the value of the variable is unknown."""
    value = environ.get(VARIABLE) or Sync.JOBS
    try:
        return Sync(value)
    except ValueError as error:
        raise UsageError(
            f"{VARIABLE} is {value!r}, which is not a choice.", remedy=f"Use one of {', '.join(Sync)}."
        ) from error


@contextmanager
def of_single_call(is_call: bool) -> Iterator[None]:
    """Mark the writes of the current context, and of asyncio tasks that start in the context, as writes of a single
    call.
    """
    token = _single_call.set(is_call)
    try:
        yield
    finally:
        _single_call.reset(token)


CONTROL = re.compile(r"[\x00-\x1f\x7f]")

STAGED = re.compile(r"#\d+$")
"""Pattern of the end of a file's name while the local store is still writing the file."""

NEVER_EMPTY = ("code/", "grid/", "jobs/", "logs/.workers/", "reports/")
"""Prefixes of the keys of documents and archives, which are never empty.

An empty file with a prefix in NEVER_EMPTY is left over from a power cut.
"""

VOLATILE = re.compile(r"^(logs/(\.workers|[^/]+/\.tails)/|jobs/[^/]+/[^/]+/(running|starts)/)")
"""Pattern of the keys of data about running workers, which need not survive a power cut: markers, environments, and
live logs.
"""


def check_key(key: str) -> None:
    """Raise ValueError unless every backend can store an object with the key."""
    if CONTROL.search(key):
        raise ValueError(f"object key {key!r} holds a control character")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ValueError(f"object key {key!r} has an empty, '.' or '..' segment")
    if STAGED.search(key):
        raise ValueError(f"object key {key!r} ends like a file that is still being written")


def check_prefix(prefix: str) -> None:
    """Raise ValueError if the prefix cannot be the prefix of a valid key."""
    check_key(f"{prefix}x")
