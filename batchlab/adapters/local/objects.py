"""Objects port over a folder of files, with atomic writes and listings in key order.

Invariants: a key has one complete object or none, also after a process died during a write. Only one of several
concurrent conditional creates succeeds. A conditional create replaces a damaged file, and an empty document counts as
absent. A durable write flushes the content and the parent folders to disk before the name of the object appears. The
name of the object is flushed before the call returns, so a completed put of an object for a job is on disk.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchlab.adapters.limits import Bucket, check_key, check_prefix, check_size
from batchlab.core.atomic_write import NEVER_EMPTY, STAGED, VOLATILE, Sync, make_folder, private, sync_folder
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Unreachable
from batchlab.core.operating_system import flush_data
from batchlab.core.ports import ObjectInfo

# shutil copies with buffers of 256 KiB. The kernel's copy (sendfile) moves 64 KiB at a time and takes several times as
# long as shutil.
_COPY_BYTES = 256 * 1024

_DIGEST = re.compile(r"^(?:code|grid/templates)/([0-9a-f]{64})\.")
_KNOWN_FOLDERS = 10_000
_FLUSHES = 8
"""Number of threads that flush the names of new folders."""

Fill = bytes | Callable[[BinaryIO], object]
"""An object's content, or a function that writes the content into the object's file."""


_downloads = count()


def download_whole(path: Path, write: Callable[[Path], object]) -> int:
    """Let `write` fill a staged file, rename the staged file to `path`, and return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process, or a call whose caller was canceled, may download to the same path at the same time. Each
    # download has its own staged file, and the last rename determines the content.
    staged = path.with_name(f"{path.name}.{os.getpid()}-{next(_downloads)}.part")
    try:
        write(staged)
        size = staged.stat().st_size
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return size


def head(root: Path, key: str) -> ObjectInfo | None:
    """Return the size and the ETag of the object `key`, or None if the object does not exist."""
    return _info(f"{root}/{key}", key)


def walk(root: Path, prefix: str, after: str) -> Iterator[ObjectInfo]:
    """Yield objects under `prefix` with keys greater than `after`, in key order.

    The function holds the names of one folder of each level in memory. A listing may lack objects that are created or
    deleted during the call.
    """
    folder = prefix.rpartition("/")[0]
    return _below(f"{root}/", f"{folder}/" if folder else "", prefix, after)


def _below(root: str, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(root + folder) as entries:
            # A folder's name with its slash sorts like the keys in the folder, so "a-b" comes before "a/".
            names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
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
        status = os.stat(path)  # noqa: PTH116 - a Path costs as much again
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(status.st_mode) or is_remains(key, status.st_size):
        return None
    return ObjectInfo(key, status.st_size, etag_of(status))


def etag_of(status: os.stat_result) -> str:
    """Return the ETag of a file. Two contents of a file within one clock tick may have the same ETag."""
    return f'"{status.st_ino:x}-{status.st_mtime_ns // 1000:x}-{status.st_size:x}"'


def is_remains(key: str, size: int) -> bool:
    """Return whether a file of this size is left from a power loss, so that the object counts as absent."""
    return not size and key.startswith(NEVER_EMPTY)


def damage(root: Path, key: str) -> str | None:
    """Return the damage of the object's content, or None if no damage is visible.

    Objects that are documents must be JSON. The content of an object that is named by its hash must have this hash.
    Raise OSError if the object's file cannot be read.
    """
    path = root / key
    if is_remains(key, path.stat().st_size):
        return "is empty"
    if match := _DIGEST.match(key):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == match[1] else "does not have the content that it is named by"
    if key.startswith(NEVER_EMPTY) and key.endswith(".json"):
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return "is not JSON"
    return None


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of the folder that contains `path`. Wait for the lock if necessary.

    Raise FileNotFoundError if the folder does not exist.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def find_damaged(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the key and the damage of every object that is visibly damaged."""
    for prefix in NEVER_EMPTY:
        for folder, _, names in os.walk(root / prefix):
            for name in sorted(names):
                key = (Path(folder) / name).relative_to(root).as_posix()
                if STAGED.search(name):
                    continue
                try:
                    problem = damage(root, key)
                except FileNotFoundError:
                    continue  # Another process deleted the object during the scan.
                if problem:
                    yield key, problem


class FileWriter:
    """Writer of the objects of one bucket. With `durable`, a call returns when the object is on disk.

    The file system commits concurrent flushes together, so the writer flushes the names of new folders at the same time
    as the object's content.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._threads = ThreadPoolExecutor(_FLUSHES, thread_name_prefix="folders")
        self._on_disk: set[str] = {self._root}
        """Folders whose names have been flushed to disk."""

    def replace(self, key: str, fill: Fill, *, durable: bool) -> str:
        """Write the object and return its ETag."""
        target = f"{self._root}/{key}"
        staged, etag = self._write(target, fill, durable=durable)
        with _remove_on_error(staged):
            os.rename(staged, target)  # noqa: PTH104 - a Path costs as much again
        _settle(target, durable=durable)
        return etag

    def create(self, key: str, fill: Fill, *, durable: bool) -> str:
        """Write the object in the same way as `replace`.

        Raise AlreadyExists if the object exists and is not damaged.
        """
        target = f"{self._root}/{key}"
        staged, etag = self._write(target, fill, durable=durable)
        with _remove_on_error(staged):
            try:
                os.link(staged, target)
            except FileExistsError:
                # The writer of the existing object may not have flushed the object's name yet. The caller relies on the
                # existing object, so this call flushes the object's name.
                _settle(target, durable=durable)
                self._replace_damaged(key, staged, target)
            else:
                os.unlink(staged)  # noqa: PTH108
        _settle(target, durable=durable)
        return etag

    def _replace_damaged(self, key: str, staged: str, target: str) -> None:
        # Under the folder's lock, the second of two writers finds the object of the first.
        with lock(Path(target)):
            if damage(Path(self._root), key) is None:
                raise AlreadyExists(f"Object {key!r} exists.")
            os.rename(staged, target)  # noqa: PTH104

    def _write(self, target: str, fill: Fill, *, durable: bool) -> tuple[str, str]:
        """Write the content to a new file next to `target`. Return the name and the ETag of the new file."""
        staged, file = _stage(target, self._root)
        with _remove_on_error(staged):
            try:
                if isinstance(fill, bytes):
                    _write_all(file, fill)
                else:
                    with open(file, "wb", closefd=False) as stream:
                        fill(stream)
                if durable:
                    self._flush(file, os.path.dirname(target))  # noqa: PTH120
                return staged, etag_of(os.fstat(file))
            finally:
                os.close(file)

    def _flush(self, file: int, folder: str) -> None:
        """Wait until the file's content and the names of its parent folders are on disk."""
        fresh = []
        while folder not in self._on_disk:
            fresh.append(folder)
            folder = os.path.dirname(folder)  # noqa: PTH120
        names = [self._threads.submit(sync_folder, os.path.dirname(parent)) for parent in fresh]  # noqa: PTH120
        try:
            flush_data(file)
        finally:
            wait(names)
        for name in names:
            name.result()
        if len(self._on_disk) > _KNOWN_FOLDERS:
            self._on_disk = {self._root}
        self._on_disk.update(fresh)


def _settle(target: str, *, durable: bool) -> None:
    """Wait until the name of the object is on disk, if `durable`."""
    if durable:
        sync_folder(os.path.dirname(target))  # noqa: PTH120


@contextmanager
def _remove_on_error(staged: str) -> Iterator[None]:
    # The staged file is removed only after an error, because its name may later belong to another writer.
    try:
        yield
    except BaseException:
        os.unlink(staged)  # noqa: PTH108
        raise


def _write_all(file: int, data: bytes) -> None:
    # A file object would make four more system calls, which counts for the small objects of short tasks.
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _stage(target: str, root: str) -> tuple[str, int]:
    """Open a new file next to `target`, with a name that cannot be a key. Return the file's name and descriptor."""
    for number in count(1):
        staged = f"{target}#{number}"
        try:
            return staged, private(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue  # The file belongs to another writer, or to a process that was killed.
        except FileNotFoundError:
            _make_folders(os.path.dirname(target), root)  # noqa: PTH120
    raise AssertionError("count() never ends")


def _make_folders(folder: str, root: str) -> None:
    """Create a folder and its missing parents. `os.makedirs` takes twice as long, because it looks for each parent.

    Raise OSError if the folder that contains the bucket `root` does not exist. A process of a deleted grid must not
    create the grid's folder again.
    """
    try:
        os.mkdir(folder)  # noqa: PTH102
    except FileExistsError:
        return
    except FileNotFoundError as error:
        if folder == root:
            raise OSError(errno.EIO, "the folder of the grid does not exist") from error
        _make_folders(os.path.dirname(folder), root)  # noqa: PTH120
        with suppress(FileExistsError):
            os.mkdir(folder)  # noqa: PTH102


def copy_into(source: BinaryIO) -> Fill:
    """Return a function that copies `source` into its argument."""
    return lambda target: _copy(source, target)


def copy_out(source: Path, target: Path) -> None:
    """Write the file `source` to `target`. `target` must not be a file of the bucket."""
    with source.open("rb") as file, target.open("wb") as copy:
        _copy(file, copy)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    shutil.copyfileobj(source, target, _COPY_BYTES)


T = TypeVar("T")

PAGE = 1000

_THREADS = 32
# Files of up to 64 KiB are read or written on the event loop in 10 to 50 µs. A change to another thread costs more time
# than the file access itself.
_IN_PLACE_BYTES = 64 * 1024

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalObjects:
    """The Objects port over the folder `root`.

    An ETag consists of inode, mtime, and size, so two contents within one clock tick may have the same ETag. The
    objects `a` and `a/b` cannot both exist, and the grid does not use such pairs of keys.
    """

    def __init__(self, root: Path, sync: Sync) -> None:
        self._root = root
        self._sync = sync
        self._writer = FileWriter(root)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    async def _do(self, key: str, call: Callable[[], T], *, in_place: bool = False) -> T:
        with _translate_errors(key):
            if in_place:
                return call()
            return await asyncio.wrap_future(self._threads.submit(call))

    def _is_durable(self, key: str) -> bool:
        return self._sync.waits and VOLATILE.match(key) is None

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        check_key(key)
        durable = self._is_durable(key)
        write: Callable[..., str] = self._writer.create if if_absent else self._writer.replace
        if if_match is not None:
            write = partial(self._exchange, if_match)
        return await self._do(
            key, partial(write, key, data, durable=durable), in_place=not durable and len(data) <= _IN_PLACE_BYTES
        )

    def _exchange(self, etag: str, key: str, fill: Fill, *, durable: bool) -> str:
        # The folder's lock excludes other conditional puts, but not an unconditional put. The folder has only one
        # manager, which makes all puts that need a stronger guarantee.
        with lock(self._root / key):
            object_info = head(self._root, key)
            if object_info is None or object_info.etag != etag:
                raise AlreadyExists(f"Another writer has replaced object {key!r}.")
            return self._writer.replace(key, fill, durable=durable)

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        check_key(key)
        size = await self._do(key, partial(self._size, key), in_place=True)
        check_size(key, size, limit)
        if size > _IN_PLACE_BYTES:
            return await self._do(key, partial(self._read, key))
        return await self._do(key, partial(self._read_small, key), in_place=True)

    def _read_small(self, key: str) -> bytes:
        file = os.open(f"{self._root}/{key}", os.O_RDONLY)
        try:
            # Another object may have replaced the object since its size was read, so the read ends at the file's end.
            data = os.read(file, _IN_PLACE_BYTES)
            while piece := os.read(file, _IN_PLACE_BYTES):
                data += piece
            return data
        finally:
            os.close(file)

    def _size(self, key: str) -> int:
        return self._info(key).size

    def _info(self, key: str) -> ObjectInfo:
        object_info = head(self._root, key)
        if object_info is None:
            raise NotFound(f"No object {key!r}.")
        return object_info

    def _read(self, key: str, start: int = 0, length: int = -1) -> bytes:
        with (self._root / key).open("rb") as file:
            if start:
                file.seek(start)
            return file.read(length)

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        check_key(key)
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not {start}")
        length = max(stop - start, 0)
        read = partial(self._read, key, start, length)
        return await self._do(key, read, in_place=length <= _IN_PLACE_BYTES)

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        check_key(key)
        info = await self._do(key, partial(self._info, key), in_place=True)
        if info.etag == etag:
            return None
        read = partial(self._read_with_etag, key, limit)
        return await self._do(key, read, in_place=info.size <= _IN_PLACE_BYTES)

    def _read_with_etag(self, key: str, limit: int | None) -> tuple[bytes, str]:
        with (self._root / key).open("rb") as file:
            status = os.fstat(file.fileno())
            check_size(key, status.st_size, limit)
            return file.read(), etag_of(status)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._do(key, partial(head, self._root, key), in_place=True)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        object_infos = walk(self._root, prefix, after)
        while page := await self._do(prefix, lambda: [*islice(object_infos, PAGE)]):
            yield page

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        for start in range(0, len(keys), PAGE):
            await self._do(keys[start], partial(self._unlink, keys[start : start + PAGE]))

    def _unlink(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                (self._root / key).unlink(missing_ok=True)
            except (NotADirectoryError, IsADirectoryError):
                # The key is below or above the key of another object, so an object with this key does not exist.
                continue
        for folder in {os.path.dirname(key) for key in keys}:  # noqa: PTH120
            self._remove_empty(folder)

    def _remove_empty(self, folder: str) -> None:
        """Remove a folder and its parents, as far as they are empty. The folders of the first level stay."""
        while "/" in folder:
            try:
                (self._root / folder).rmdir()
            except OSError:
                return  # The folder has other objects, or another process has removed it.
            folder = os.path.dirname(folder)  # noqa: PTH120

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        check_key(key)
        durable = self._is_durable(key)
        # The caller receives an error of the uploaded file unchanged. An error of the bucket is raised as an error of
        # batchlab.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            write = self._writer.create if if_absent else self._writer.replace
            copy = partial(write, key, copy_into(file), durable=durable)
            await self._do(key, copy, in_place=not durable and size <= _IN_PLACE_BYTES)
        return size

    async def download(self, key: str, path: Path) -> int:
        check_key(key)
        return await self._do(key, partial(self._download, key, path))

    def _download(self, key: str, path: Path) -> int:
        return download_whole(path, partial(copy_out, self._root / key))


class FilesInPlace:
    """LocalFiles port over the folder `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path | None:
        check_key(key)
        return self._root / key if head(self._root, key) else None

    def make_folder(self, key: str) -> None:
        check_key(key)
        _make_folders(str((self._root / key).parent), str(self._root))


def open_local(root: Path, sync: Sync = Sync.JOBS) -> LocalObjects:
    """Return the bucket in the folder `root`. Create the folder `root` if the folder does not exist."""
    make_folder(root)
    return LocalObjects(root, sync)


def open_objects(bucket: Bucket) -> LocalObjects:
    """Open a bucket that is a folder. See `Bucket`."""
    return open_local(bucket.folder, bucket.sync)


@contextmanager
def _translate_errors(key: str) -> Iterator[None]:
    try:
        yield
    except _MISSING as error:
        raise NotFound(f"No object {key!r}.") from error
    except OSError as error:
        # A full disk raises Unreachable, so the caller retries.
        kind = Unreachable if error.errno == errno.ENOSPC else BackendError
        raise kind(f"Object {key!r}: {error.strerror or error}.") from error
