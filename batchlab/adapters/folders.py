"""A bucket that is a folder: what lies in it, in key order, and files copied whole.

Invariant: a name appears with all of its content or not at all. Says of an object exactly what
obstore's LocalStore says of it, which writes into the same folder, but takes a few system calls
for it and no thread.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

from batchlab.objectnames import STAGED
from batchlab.ports import ObjectInfo

# The kernel's own copying (sendfile) moves 64 KiB at a time, and takes several times as long.
_COPY_BYTES = 256 * 1024


def head(root: Path, key: str) -> ObjectInfo | None:
    """The object `key`, None where there is none."""
    return _info(f"{root}/{key}", key)


def walk(root: Path, prefix: str, after: str) -> Iterator[ObjectInfo]:
    """Objects under `prefix` with keys greater than `after`, in key order.

    One folder's names in memory per level. What comes or goes meanwhile may be missing.
    """
    folder = prefix.rpartition("/")[0]
    return _below(f"{root}/", f"{folder}/" if folder else "", prefix, after)


def _below(root: str, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(root + folder) as entries:
            # With its slash a folder's name sorts where its keys do: "a-b" before "a/".
            names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        key = folder + name
        if name.endswith("/"):
            if key.startswith(prefix) and (key > after or after.startswith(key)):
                yield from _below(root, key, prefix, after)
        elif key > after and key.startswith(prefix) and not STAGED.search(name):
            info = _info(root + key, key)
            if info is not None:
                yield info


def _info(path: str, key: str) -> ObjectInfo | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path costs as much again
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    etag = f'"{found.st_ino:x}-{found.st_mtime_ns // 1000:x}-{found.st_size:x}"'
    return ObjectInfo(key, found.st_size, etag)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of the folder that `path` is in, and hold it; FileNotFoundError where there
    is no such folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def copy_in(source: BinaryIO, target: Path) -> None:
    """Make `target` a copy of `source`; where that fails, nothing has happened."""
    staged, file = _stage(target)
    try:
        with file:
            _copy(source, file)
        staged.replace(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _stage(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `target`, of a name that no key has."""
    for number in count(1):
        staged = target.with_name(f"{target.name}#{number}")
        try:
            return staged, staged.open("xb")
        except FileExistsError:
            continue  # somebody else's, or left behind by a process that was killed
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _stage(target)
    raise AssertionError("numbers do not end")


def copy_out(source: Path, target: Path) -> None:
    """Write the file `source` to `target`, which must not be a file of the bucket."""
    with source.open("rb") as file, target.open("wb") as copy:
        _copy(file, copy)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target, _COPY_BYTES)
