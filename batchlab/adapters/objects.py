"""A bucket over obstore: a folder of files here, S3 on AWS and its emulators.

Invariant: a key holds one whole object or none, whoever dies while writing it, and a conditional
create has one winner. On files that is a staged file (`<name>#1`) that is renamed, or for a
conditional create linked, to its name.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError
from obstore.store import LocalStore

from batchlab.adapters.limits import check_key, check_prefix
from batchlab.errors import AlreadyExists, BackendError, NotFound, Throttled, Unreachable
from batchlab.ports import ObjectInfo

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

PAGE = 1000

_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
# Up to here a file is read or written on the event loop: 10 to 50 µs, where obstore's way through
# its own threads costs 200 to 300 µs of CPU.
_IN_PLACE_BYTES = 64 * 1024

_BUSY = re.compile(r"status code: (429|503|409)\b")
_KINDS: tuple[tuple[re.Pattern[str], type[BackendError]], ...] = (
    (_BUSY, Throttled),
    (re.compile(r"HTTP error: |status code: 5\d\d\b"), Unreachable),
    # A key below an object, on files.
    (re.compile(r"Not a directory"), NotFound),
)


class ObstoreObjects:
    """The Objects port over one obstore store.

    `root` is the folder of a LocalStore, None for a remote store. On files an ETag is made of
    inode, mtime and size, so two contents that follow each other within a clock tick may share
    one; S3's is a hash. The object `a` excludes `a/b` on files; no key of the grid is so.
    """

    def __init__(self, store: ObjectStore, root: Path | None = None) -> None:
        self._store = store
        self._root = root

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> str:
        check_key(key)
        mode: Literal["create", "overwrite"] = "create" if if_absent else "overwrite"
        with _translated(key):
            if self._root is not None and len(data) <= _IN_PLACE_BYTES:
                result = obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            else:
                result = await obstore.put_async(self._store, key, data, mode=mode)
        return result["e_tag"] or ""

    async def get(self, key: str) -> bytes:
        check_key(key)
        with _translated(key):
            if self._root is not None:
                return await _read(self._root / key, 0, None)
            result = await obstore.get_async(self._store, key)
            return bytes(await result.bytes_async())

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        check_key(key)
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not {start}")
        if self._root is not None:
            with _translated(key):
                return await _read(self._root / key, start, max(stop - start, 0))
        # Stores refuse an empty range and one that begins at or after the end of the object.
        if stop > start:
            try:
                with _translated(key):
                    return bytes(
                        await obstore.get_range_async(self._store, key, start=start, end=stop)
                    )
            except NotFound:
                raise
            except BackendError:
                info = await self.head(key)
                if info is None or info.size > start:
                    raise
                return b""
        if await self.head(key) is None:
            raise NotFound(f"No object {key!r}.")
        return b""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        check_key(key)
        options: obstore.GetOptions = {} if etag is None else {"if_none_match": etag}
        with _translated(key):
            try:
                if self._root is not None:
                    result = obstore.get(self._store, key, options=options)
                else:
                    result = await obstore.get_async(self._store, key, options=options)
            except NotModifiedError:
                return None
            small = self._root is not None and result.meta["size"] <= _IN_PLACE_BYTES
            data = result.bytes() if small else await result.bytes_async()
            return bytes(data), result.meta["e_tag"] or ""

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        try:
            with _translated(key):
                if self._root is not None:
                    return _info(obstore.head(self._store, key))
                return _info(await obstore.head_async(self._store, key))
        except NotFound:
            return None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        page: list[ObjectInfo] = []
        folder = prefix.rpartition("/")[0]
        list_from = self._listed if self._root is None else self._walked
        found = list_from(folder, prefix, after)
        async for info in found:
            page.append(info)
            if len(page) == PAGE:
                yield page
                page = []
        if page:
            yield page

    async def _listed(self, folder: str, prefix: str, after: str) -> AsyncIterator[ObjectInfo]:
        # obstore's prefix is made of whole segments; the rest of ours is matched here.
        stream = obstore.list(self._store, folder or None, offset=after or None, chunk_size=PAGE)
        with _translated(prefix):
            async for chunk in stream:
                for meta in chunk:
                    if meta["path"].startswith(prefix):
                        yield _info(meta)

    async def _walked(self, folder: str, prefix: str, after: str) -> AsyncIterator[ObjectInfo]:
        """Files in key order, one folder's names in memory per level: obstore does not sort."""
        with _translated(folder):
            result = await obstore.list_with_delimiter_async(self._store, folder or None)
        # With its slash a folder's name sorts where its keys do: "a-b" before "a/".
        entries: dict[str, ObjectInfo | None] = {
            f"{path}/": None for path in result["common_prefixes"]
        }
        entries |= {meta["path"]: _info(meta) for meta in result["objects"]}
        for path in sorted(entries):
            info = entries[path]
            if info is not None:
                if path > after and path.startswith(prefix):
                    yield info
            elif path.startswith(prefix) and (path > after or after.startswith(path)):
                async for below in self._walked(path[:-1], prefix, after):
                    yield below

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        if self._root is not None:
            await asyncio.to_thread(_unlink, self._root, keys)
            return
        for start in range(0, len(keys), PAGE):
            with _translated(keys[start]):
                await obstore.delete_async(self._store, keys[start : start + PAGE])

    async def upload(self, key: str, path: Path) -> int:
        check_key(key)
        size = await asyncio.to_thread(_size, path)
        with _translated(key):
            await obstore.put_async(
                self._store,
                key,
                path,
                chunk_size=max(_PART_BYTES, size // _MAX_PARTS + 1),
                max_concurrency=_PARTS_AT_ONCE,
            )
        return size

    async def download(self, key: str, path: Path) -> int:
        check_key(key)
        # Another process may fetch to the same place; each stages its own, and the last one wins.
        staged = path.with_name(f"{path.name}.{os.getpid()}.part")
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        try:
            if self._root is not None:
                with _translated(key):
                    await asyncio.to_thread(shutil.copyfile, self._root / key, staged)
            else:
                await self._stream(key, staged)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return _publish(staged, path)

    async def _stream(self, key: str, path: Path) -> None:
        with _translated(key):
            result = await obstore.get_async(self._store, key)
            with path.open("wb") as file:
                async for chunk in result.stream(min_chunk_size=_PART_BYTES):
                    await asyncio.to_thread(file.write, chunk)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        if self._root is None:
            return None
        path = self._root / key
        return path if path.is_file() else None


def open_local(root: Path) -> ObstoreObjects:
    """The bucket that is the folder `root`, which is made where it is not there."""
    root.mkdir(parents=True, exist_ok=True)
    return ObstoreObjects(LocalStore(root), root)


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "")


async def _read(path: Path, start: int, length: int | None) -> bytes:
    if (_size(path) if length is None else length) <= _IN_PLACE_BYTES:
        return _read_now(path, start, length)
    return await asyncio.to_thread(_read_now, path, start, length)


def _size(path: Path) -> int:
    return path.stat().st_size


def _read_now(path: Path, start: int, length: int | None) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(-1 if length is None else length)


def _publish(staged: Path, path: Path) -> int:
    staged.replace(path)
    return _size(path)


def _unlink(root: Path, keys: Sequence[str]) -> None:
    for key in keys:
        try:
            (root / key).unlink(missing_ok=True)
        except NotADirectoryError:
            # `a/b` where `a` is an object: there is no such key.
            continue
        except OSError as error:
            raise BackendError(f"Object {key!r}: {error}.") from error


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"No object {key!r}.") from error
    except AlreadyExistsError as error:
        # 409 is a race that nobody has won yet, where 412 says that the key is taken.
        kind = Throttled if _BUSY.search(str(error)) else AlreadyExists
        raise kind(f"Object {key!r} exists.") from error
    except (BaseError, OSError) as error:
        raise _kind(error)(f"Object {key!r}: {_first_line(error)}.") from error


def _kind(error: Exception) -> type[BackendError]:
    for pattern, kind in _KINDS:
        if pattern.search(str(error)):
            return kind
    return BackendError


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
