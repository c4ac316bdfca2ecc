"""Objects port over a folder of files.

Invariant: a key has one complete object or none, also after a process died while writing it. A
conditional create has one winner. An object that a job needs is on disk before its put returns. A
conditional create replaces a damaged file, and an empty document counts as absent.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from batchlab.adapters.bucket import Bucket
from batchlab.adapters.limits import check_key, check_prefix, check_size
from batchlab.adapters.local import local_files
from batchlab.adapters.local.local_files import FileWriter
from batchlab.core.atomic_write import Sync, make_folder
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Unreachable
from batchlab.core.object_names import VOLATILE
from batchlab.core.ports import ObjectInfo

T = TypeVar("T")

PAGE = 1000

_THREADS = 32
# Files up to this size are read or written on the event loop in 10 to 50 µs. A thread costs more.
_IN_PLACE_BYTES = 64 * 1024

_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalObjects:
    """The Objects port over the folder `root`.

    An ETag consists of inode, mtime, and size, so two contents within one clock tick may have the
    same one. The objects `a` and `a/b` cannot both exist, and the grid uses no such pair of keys.
    """

    def __init__(self, root: Path, sync: Sync) -> None:
        self._root = root
        self._sync = sync
        self._writer = FileWriter(root)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    async def _do(self, key: str, call: Callable[[], T], *, in_place: bool = False) -> T:
        with _translated(key):
            if in_place:
                return call()
            return await asyncio.wrap_future(self._threads.submit(call))

    def _is_durable(self, key: str) -> bool:
        return self._sync.waits and VOLATILE.match(key) is None

    async def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        check_key(key)
        durable = self._is_durable(key)
        write: Callable[..., str] = self._writer.create if if_absent else self._writer.replace
        if if_match is not None:
            write = partial(self._exchange, if_match)
        return await self._do(
            key,
            partial(write, key, lambda file: file.write(data), durable=durable),
            in_place=not durable and len(data) <= _IN_PLACE_BYTES,
        )

    def _exchange(self, etag: str, key: str, fill: local_files.Fill, *, durable: bool) -> str:
        # The lock excludes other conditional puts, but not an unconditional put. The folder has one
        # manager, and this manager makes all puts that need a stronger guarantee.
        with local_files.locked(self._root / key):
            found = local_files.head(self._root, key)
            if found is None or found.etag != etag:
                raise AlreadyExists(f"Object {key!r} is another one by now.")
            return self._writer.replace(key, fill, durable=durable)

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        check_key(key)
        size = await self._do(key, partial(self._size, key), in_place=True)
        check_size(key, size, limit)
        return await self._do(key, partial(self._read, key), in_place=size <= _IN_PLACE_BYTES)

    def _size(self, key: str) -> int:
        return self._info(key).size

    def _info(self, key: str) -> ObjectInfo:
        found = local_files.head(self._root, key)
        if found is None:
            raise NotFound(f"No object {key!r}.")
        return found

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

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        check_key(key)
        info = await self._do(key, partial(self._info, key), in_place=True)
        if info.etag == etag:
            return None
        read = partial(self._read_with_etag, key)
        return await self._do(key, read, in_place=info.size <= _IN_PLACE_BYTES)

    def _read_with_etag(self, key: str) -> tuple[bytes, str]:
        with (self._root / key).open("rb") as file:
            return file.read(), local_files.etag_of(os.fstat(file.fileno()))

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._do(key, partial(local_files.head, self._root, key), in_place=True)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        found = local_files.walk(self._root, prefix, after)
        while page := await self._do(prefix, lambda: [*islice(found, PAGE)]):
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
                # The key is below or above an object, so this object does not exist.
                continue

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        check_key(key)
        durable = self._is_durable(key)
        # The caller handles an error of the file. An error of the bucket is translated.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            write = self._writer.create if if_absent else self._writer.replace
            copy = partial(write, key, local_files.copy_into(file), durable=durable)
            await self._do(key, copy, in_place=not durable and size <= _IN_PLACE_BYTES)
        return size

    async def download(self, key: str, path: Path) -> int:
        check_key(key)
        return await self._do(key, partial(self._download, key, path))

    def _download(self, key: str, path: Path) -> int:
        return local_files.download_whole(path, partial(local_files.copy_out, self._root / key))


class FilesInPlace:
    """LocalFiles port over the folder `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path | None:
        check_key(key)
        return self._root / key if local_files.head(self._root, key) else None


def open_local(root: Path, sync: Sync = Sync.JOBS) -> LocalObjects:
    """Return the bucket over the folder `root`. Create the folder if it does not exist."""
    make_folder(root)
    return LocalObjects(root, sync)


def open_objects(bucket: Bucket) -> LocalObjects:
    """Open the bucket that is a folder. See `Bucket`."""
    return open_local(bucket.folder, bucket.sync)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except _MISSING as error:
        raise NotFound(f"No object {key!r}.") from error
    except OSError as error:
        # A full disk is retried like an outage.
        kind = Unreachable if error.errno == errno.ENOSPC else BackendError
        raise kind(f"Object {key!r}: {error.strerror or error}.") from error
