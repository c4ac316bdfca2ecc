"""Atomic and durable writes of files and folders, and rules for object keys.

Invariant: after the end of a process, a power cut, or a full disk, a file that `write_whole` wrote has either its old
or its new content. When `write_whole` returns, the new content is on the disk.

`Sync` defines which writes of a local grid wait for the disk. A power cut on `local` ends the client, the manager, and
the workers together. A job outlives them, so its writes wait for the disk. The result of a single call has a reader
only while its client runs, so by default its writes do not wait.

Every child process imports the module at its start, so it needs only the standard library.
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
"""Errors of file systems that write names at once, or that cannot sync a folder."""


def write_whole(path: Path, content: str | bytes, *, mode: int = PRIVATE, durable: bool = True) -> None:
    """Replace the file's content and set its permissions. The file's folder must exist.

    The file is never readable for more users than `mode` allows. Without `durable`, the content survives the end of the
    process but not a power cut. Raise OSError if the file cannot be written.
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


def write_once(path: Path, content: str) -> None:
    """Create the file for its user only, unless it exists. The first of several writers wins."""
    staged = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    write_whole(staged, content)
    try:
        with suppress(FileExistsError):
            path.hardlink_to(staged)
    finally:
        staged.unlink()
    sync_folder(path.parent)


def private(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that only its user may read."""
    return os.open(path, flags, PRIVATE)


def make_private(path: Path) -> None:
    """Create the file, empty, if it does not exist, so that only its user may read it.

    SQLite gives the same permissions to the log and the index next to it. This function ignores errors, because SQLite
    later reports why it cannot open a file.
    """
    with suppress(OSError):
        os.close(private(path, os.O_CREAT | os.O_RDWR))


def make_folder(folder: Path) -> None:
    """Create the folder for its user only, and its parents. Wait until their names are on the disk."""
    new_folders = []
    while not folder.exists():
        new_folders.append(folder)
        folder = folder.parent
    for path in reversed(new_folders):
        # The parents get the permissions of the user's umask.
        path.mkdir(PRIVATE_FOLDER if path is new_folders[0] else 0o777, exist_ok=True)
        sync_folder(path.parent)


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


VARIABLE = "BATCHLAB_SYNC"

_single_call: ContextVar[bool] = ContextVar("single_call", default=False)
_repeated: ContextVar[bool] = ContextVar("repeated", default=False)


class Sync(StrEnum):
    """Choice of the writes that wait for the disk."""

    ALL = "all"
    """Writes of jobs and of single calls."""
    JOBS = "jobs"
    """Writes of jobs."""
    NONE = "none"

    @property
    def waits(self) -> bool:
        """Return whether a write in the current context waits for the disk."""
        if _repeated.get():
            return False
        return self is Sync.ALL or (self is Sync.JOBS and not _single_call.get())


def read_sync(environ: Mapping[str, str] = os.environ) -> Sync:
    """Return the choice in BATCHLAB_SYNC, by default `jobs`. Raise UsageError if the value is unknown."""
    value = environ.get(VARIABLE) or Sync.JOBS
    try:
        return Sync(value)
    except ValueError as error:
        raise UsageError(
            f"{VARIABLE} is {value!r}, which is not a choice.", remedy=f"Use one of {', '.join(Sync)}."
        ) from error


@contextmanager
def of_single_call(is_call: bool) -> Iterator[None]:
    """Mark the writes of this context as writes of a single call. Tasks that start in this context are included."""
    with _set(_single_call, is_call):
        yield


@contextmanager
def repeated() -> Iterator[None]:
    """Mark the writes of this context as writes that the next manager repeats after a power cut.

    These writes do not wait for the disk.
    """
    with _set(_repeated, True):
        yield


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


CONTROL = re.compile(r"[\x00-\x1f\x7f]")

STAGED = re.compile(r"#\d+$")
"""Ending of the local store's files that are still being written."""

NEVER_EMPTY = ("code/", "grid/", "jobs/", "logs/.workers/", "reports/")
"""Prefixes of documents and archives. An empty file there is the remains of a power cut."""

VOLATILE = re.compile(r"^(logs/(\.workers|[^/]+/\.tails)/|jobs/[^/]+/[^/]+/(running|starts)/)")
"""Keys of data about running workers, which does not need to survive a power cut: markers, their
environment, and live logs."""


def check_key(key: str) -> None:
    """Raise ValueError if some backend cannot store the key."""
    if CONTROL.search(key):
        raise ValueError(f"object key {key!r} holds a control character")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ValueError(f"object key {key!r} has an empty, '.' or '..' segment")
    if STAGED.search(key):
        raise ValueError(f"object key {key!r} ends like a file that is still being written")


def check_prefix(prefix: str) -> None:
    """Raise ValueError if no key can have the prefix."""
    check_key(f"{prefix}x")
