"""A bucket over obstore: a folder of files here, S3 on AWS and its emulators.

Invariant: a key holds one whole object or none, whoever dies while writing it, and a conditional
create has one winner. On files that is a staged file (`<name>#1`) that is renamed, or for a
conditional create linked, to its name.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PreconditionError,
)
from obstore.store import LocalStore

from batchlab.adapters import folders
from batchlab.adapters.limits import check_key, check_prefix
from batchlab.errors import AlreadyExists, BackendError, NotFound, Throttled, Unreachable
from batchlab.ports import ObjectInfo
from batchlab.tally import Tally

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode, PutResult
    from obstore.store import ClientConfig, ObjectStore, S3Config

    from batchlab.adapters.aws import Endpoint

T = TypeVar("T")

PAGE = 1000

_THREADS = 32
_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
_CHUNK_BYTES = 5 * 1024 * 1024
"""What obstore puts in one request unless told otherwise."""
# A file up to this size is read or written on the event loop, in 10 to 50 µs: a thread costs more.
_IN_PLACE_BYTES = 64 * 1024

_SILENCE = timedelta(seconds=30)

_NO_BUCKET = "NoSuchBucket"
_BUSY = re.compile(r"status code: (429|503|409)\b")
_KINDS: tuple[tuple[re.Pattern[str], type[BackendError]], ...] = (
    (_BUSY, Throttled),
    (re.compile(r"HTTP error: |status code: 5\d\d\b"), Unreachable),
    # A full disk is waited out like an outage.
    (re.compile(r"No space left on device"), Unreachable),
    # A key below an object, on files.
    (re.compile(r"Not a directory"), NotFound),
)


class ObstoreObjects:
    """The Objects port over one obstore store.

    `root` is the folder of a LocalStore, None for a remote store. On files an ETag is made of
    inode, mtime and size, so two contents that follow each other within a clock tick may share
    one; S3's is a hash. The object `a` excludes `a/b` on files; no key of the grid is so.
    """

    def __init__(
        self,
        store: ObjectStore,
        root: Path | None = None,
        *,
        make_bucket: Callable[[], None] | None = None,
        tally: Tally | None = None,
    ) -> None:
        """Requests of a remote store are counted in `tally`, but for those that obstore makes
        again by itself."""
        self._store = store
        self._root = root
        self._make_bucket = make_bucket
        self._tally = tally or Tally()
        self._made = 0
        self._making = threading.Lock()
        self._staged = count()
        """Numbers the files that are being fetched."""
        # Not obstore's own async calls: their futures are completed by Rust threads, which abort
        # the process (SIGABRT) if it ends just then; a process that exits right after a put did
        # so 6 times in 10. They also take 2 to 4 times the CPU of a thread of ours.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    async def _do(self, key: str, call: Callable[[], T], *, in_place: bool = False) -> T:
        with _translated(key):
            if in_place:
                return call()
            return await asyncio.wrap_future(self._threads.submit(self._sure, call))

    def _sure(self, call: Callable[[], T]) -> T:
        """The result of `call`, for which a bucket that may be made is made where it is missing."""
        made = self._made
        try:
            return call()
        except (FileNotFoundError, BaseError) as error:
            if self._make_bucket is None or _NO_BUCKET not in str(error):
                raise
        with self._making:
            # Unless another thread has made it meanwhile.
            if self._made == made:
                self._make_bucket()
                self._made += 1
        return call()

    async def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        check_key(key)
        if if_match is not None:
            mode: PutMode = {"e_tag": if_match}
        else:
            mode = "create" if if_absent else "overwrite"
        result = await self._do(
            key,
            partial(self._put, key, data, mode),
            in_place=self._root is not None and len(data) <= _IN_PLACE_BYTES,
        )
        return result["e_tag"] or ""

    def _put(self, key: str, data: bytes, mode: PutMode) -> PutResult:
        put = partial(obstore.put, self._store, key, data, max_concurrency=_PARTS_AT_ONCE)
        if self._root is None:
            # A condition cannot be put in parts.
            self._tally.put(1 if mode != "overwrite" else _puts(len(data), _CHUNK_BYTES))
        if self._root is None or isinstance(mode, str):
            return put(mode=mode)
        # A LocalStore cannot do it. Others that overwrite under a condition are kept off here, but
        # none that does without: what needs more than that is put by the one manager of a folder.
        with folders.locked(self._root / key):
            found = folders.head(self._root, key)
            if found is None or found.etag != mode["e_tag"]:
                raise AlreadyExists(f"Object {key!r} is another one by now.")
            return put()

    async def get(self, key: str) -> bytes:
        check_key(key)
        if self._root is None:
            self._tally.get()
            return await self._do(key, lambda: bytes(obstore.get(self._store, key).bytes()))
        path = self._root / key
        size = await self._do(key, lambda: path.stat().st_size, in_place=True)
        return await self._do(key, partial(_read, path), in_place=size <= _IN_PLACE_BYTES)

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        check_key(key)
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not {start}")
        length = max(stop - start, 0)
        if self._root is None:
            return await self._remote_range(key, start, length)
        read = partial(_read, self._root / key, start, length)
        return await self._do(key, read, in_place=length <= _IN_PLACE_BYTES)

    async def _remote_range(self, key: str, start: int, length: int) -> bytes:
        if length:
            self._tally.get()
            try:
                return await self._do(
                    key,
                    lambda: bytes(obstore.get_range(self._store, key, start=start, length=length)),
                )
            except (NotFound, Throttled, Unreachable):
                raise
            except BackendError:
                # Perhaps the range begins behind the end, which a store refuses.
                info = await self.head(key)
                if info is None or info.size > start:
                    raise
        elif await self.head(key) is None:
            raise NotFound(f"No object {key!r}.")
        return b""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        check_key(key)
        result = await self._do(
            key, partial(self._get_unless, key, etag), in_place=self._root is not None
        )
        if result is None:
            return None
        small = self._root is not None and result.meta["size"] <= _IN_PLACE_BYTES
        data = await self._do(key, lambda: bytes(result.bytes()), in_place=small)
        return data, result.meta["e_tag"] or ""

    def _get_unless(self, key: str, etag: str | None) -> obstore.GetResult | None:
        if self._root is None:
            self._tally.get()
        try:
            options: obstore.GetOptions = {} if etag is None else {"if_none_match": etag}
            return obstore.get(self._store, key, options=options)
        except NotModifiedError:
            return None

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        if self._root is not None:
            return await self._do(key, partial(folders.head, self._root, key), in_place=True)
        self._tally.get()
        try:
            return await self._do(key, lambda: _info(obstore.head(self._store, key)))
        except NotFound:
            return None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        found = (
            self._listed(prefix, after)
            if self._root is None
            else folders.walk(self._root, prefix, after)
        )
        while page := await self._do(prefix, lambda: [*islice(found, PAGE)]):
            yield page

    def _listed(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        # obstore takes whole segments; what our prefix and `after` say beyond them is matched here.
        self._tally.put()
        folder = prefix.rpartition("/")[0] or None
        chunks = obstore.list(self._store, folder, offset=after or None, chunk_size=PAGE)
        for number, chunk in enumerate(chunks):
            if number:
                self._tally.put()
            for meta in chunk:
                if meta["path"] > after and meta["path"].startswith(prefix):
                    yield _info(meta)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        delete = self._unlink if self._root is not None else partial(obstore.delete, self._store)
        for start in range(0, len(keys), PAGE):
            if self._root is None:
                self._tally.delete()
            await self._do(keys[start], partial(delete, keys[start : start + PAGE]))

    def _unlink(self, keys: Sequence[str]) -> None:
        assert self._root is not None
        for key in keys:
            try:
                (self._root / key).unlink(missing_ok=True)
            except (NotADirectoryError, IsADirectoryError):
                # A key below an object, or above one: there is no such object.
                continue

    async def upload(self, key: str, path: Path) -> int:
        check_key(key)
        if self._root is not None:
            return await self._copy_in(key, path, self._root / key)
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        chunk_bytes = max(_PART_BYTES, size // _MAX_PARTS + 1)
        self._tally.put(_puts(size, chunk_bytes))
        await self._do(
            key,
            lambda: obstore.put(
                self._store,
                key,
                path,
                chunk_size=chunk_bytes,
                max_concurrency=_PARTS_AT_ONCE,
            ),
        )
        return size

    async def _copy_in(self, key: str, path: Path, target: Path) -> int:
        # What is wrong with the file is the caller's to know, what is wrong with the bucket is not.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            copy = partial(folders.copy_in, file, target)
            await self._do(key, copy, in_place=size <= _IN_PLACE_BYTES)
        return size

    async def download(self, key: str, path: Path) -> int:
        check_key(key)
        return await self._do(key, partial(self._download, key, path))

    def _download(self, key: str, path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may fetch to the same place: another process, or a call of ours whose caller was
        # cancelled. Each stages its own, and the last one wins.
        staged = path.with_name(f"{path.name}.{os.getpid()}-{next(self._staged)}.part")
        try:
            if self._root is not None:
                folders.copy_out(self._root / key, staged)
            else:
                self._tally.get()
                chunks = obstore.get(self._store, key).stream(min_chunk_size=_PART_BYTES)
                with staged.open("wb") as file:
                    file.writelines(chunks)
            size = staged.stat().st_size
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        return size

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


def open_s3(endpoint: Endpoint, bucket: str, tally: Tally | None = None) -> ObstoreObjects:
    """The bucket of that name; nothing is asked of the service yet. `tally` counts requests.

    At an endpoint's url a bucket that is not there is made, also later: an emulator that has lost
    its state is empty, which is what the grid must see. On AWS a missing bucket is a BackendError
    and never a NotFound, which would say that nothing has been committed.
    """
    from obstore.store import S3Store

    from batchlab.adapters import aws

    url = aws.s3_url(endpoint)
    config: S3Config = {"region": endpoint.region, "conditional_put": "etag", "endpoint": url}
    options: ClientConfig = {
        "allow_http": url.startswith("http:"),
        "connect_timeout": timedelta(seconds=aws.CONNECT_S),
        "read_timeout": _SILENCE,
        # Of a whole transfer, however large; the default is 30 s.
        "timeout": timedelta(days=1),
    }
    if here := aws.loopback(url):
        # The only way to say "no proxy": one from the environment is else taken.
        options |= {"proxy_url": url, "proxy_excludes": here}
    store = S3Store(
        bucket,
        config=config,
        client_options=options,
        retry_config={
            "max_retries": 3,
            "backoff": {"init_backoff": timedelta(milliseconds=50)},
            "retry_timeout": timedelta(seconds=10),
        },
        credential_provider=aws.credentials(endpoint),
    )
    make = partial(aws.create_bucket, endpoint, bucket) if endpoint.url else None
    return ObstoreObjects(store, make_bucket=make, tally=tally)


def _puts(size_bytes: int, chunk_bytes: int) -> int:
    """Requests that an object of that size takes: one, or one for each part and two around them."""
    return 1 if size_bytes <= chunk_bytes else -(-size_bytes // chunk_bytes) + 2


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "")


def _read(path: Path, start: int = 0, length: int = -1) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if _NO_BUCKET in str(error):
            raise BackendError("The bucket is not there.") from error
        raise NotFound(f"No object {key!r}.") from error
    except (AlreadyExistsError, PreconditionError) as error:
        # 409 is a race that nobody has won yet, where 412 says that somebody has.
        kind = Throttled if _BUSY.search(str(error)) else AlreadyExists
        raise kind(f"Object {key!r} exists, or is another one by now.") from error
    except (BaseError, OSError) as error:
        text = str(error)
        kinds = (kind for pattern, kind in _KINDS if pattern.search(text))
        first_line = text.partition("\n")[0]
        raise next(kinds, BackendError)(f"Object {key!r}: {first_line}.") from error
