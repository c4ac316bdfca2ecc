"""Base class of the Objects ports over remote stores of obstore.

Invariant: a key has one complete object or none, also after a process died while writing the object. Only one of
several concurrent conditional creates of an object succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError

from batchlab.adapters.aws.endpoint import CONNECT_S, loopback
from batchlab.adapters.limits import check_key, check_prefix, check_size
from batchlab.adapters.local.objects import download_whole
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Throttled, Unreachable
from batchlab.core.ports import ObjectInfo
from batchlab.core.pricing.request_costs import RequestCounter

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode, PutResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

T = TypeVar("T")

log = logging.getLogger(__name__)

PAGE = 1000

_THREADS = 32
_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
_CHUNK_BYTES = 5 * 1024 * 1024
"""Size in bytes of the largest object that obstore sends in one request by default."""

_SILENCE = timedelta(seconds=30)

_STAGED = "staged/"
"""Prefix of uploaded files that do not have their final key yet."""
_DELETES_AT_ONCE = 16
_STATUS = re.compile(r"status code: (\d{3})\b")
# A full disk during a download raises Unreachable, so the caller retries the download.
_OUTAGE = re.compile(r"HTTP error: |status code: 5\d\d\b|No space left on device")


class ObstoreObjects:
    """The Objects port over one remote store of obstore.

    Each kind of store is a subclass of ObstoreObjects. A subclass sets the class attributes and overrides the methods
    in which its store differs.
    """

    missing_bucket: ClassVar[str] = "NoSuchBucket"
    """Error code of the service for a bucket that does not exist."""
    busy_statuses: ClassVar[frozenset[str]] = frozenset({"409", "429", "503"})
    """HTTP statuses of requests that the caller should repeat later.

    With S3, status 409 means that another conditional write is still in progress.
    """
    deletes_in_batches: ClassVar[bool] = True
    """Whether one request deletes many objects."""
    remedy: ClassVar[str] = ""
    """Advice in the error for a bucket that cannot be listed."""

    def __init__(self, store: ObjectStore, tally: RequestCounter | None = None) -> None:
        """Set the store and the counter of requests, which does not count obstore's own retries."""
        self._store = store
        self._tally = tally or RequestCounter()
        self._created_count = 0
        self._making = threading.Lock()
        # The async calls of obstore are not used, because async calls can abort the process and are slower than
        # threads. Rust threads complete the futures of obstore's async calls, and abort a process (SIGABRT) that exits
        # at that moment. With obstore's async calls, a process that exited right after a put was aborted in 6 of 10
        # runs. The async calls of obstore also take 2 to 4 times the CPU time of a Python thread.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    def check(self) -> None:
        """Raise BackendError if the service does not answer, or if the bucket cannot be listed."""
        with self._translate_errors(""):
            self._with_bucket(lambda: next(iter(obstore.list(self._store, chunk_size=1)), None))

    async def _do(self, key: str, call: Callable[[], T]) -> T:
        with self._translate_errors(key):
            return await asyncio.wrap_future(self._threads.submit(self._with_bucket, call))

    def _with_bucket(self, call: Callable[[], T]) -> T:
        """Return the result of `call`. Create a missing bucket before the call if the store can create buckets."""
        count = self._created_count
        try:
            return call()
        except (FileNotFoundError, BaseError, NotFound) as error:
            if self.missing_bucket not in str(error):
                raise
            with self._making:
                # Another thread may have created the bucket meanwhile.
                if self._created_count == count:
                    if not self._make_bucket():
                        raise
                    self._created_count += 1
        return call()

    # --- Methods for subclasses ------------------------------------------------------------------

    def _make_bucket(self) -> bool:
        """Create the missing bucket, or return False if the store must not create buckets."""
        return False

    def _unless_changed(self, key: str, etag: str) -> PutMode:
        """Return the mode of a put that fails if the object's ETag is not `etag`.

        Raise AlreadyExists if the object's ETag already differs from `etag`.
        """
        del key
        return {"e_tag": etag}

    def _create_in_parts(self, key: str, path: Path, part_bytes: int) -> None:
        """Upload a file in parts of `part_bytes` bytes.

        Raise AlreadyExists if the object exists when the upload ends.
        """
        # A copy supports the condition that the object is absent, but an upload in parts does not. The copy inside the
        # store does not transfer data to this machine.
        staged = f"{_STAGED}{secrets.token_hex(16)}"
        obstore.put(self._store, staged, path, chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
        try:
            self._tally.put()
            obstore.copy(self._store, staged, key, overwrite=False)
        finally:
            self._delete([staged])

    def _delete(self, keys: Sequence[str]) -> None:
        """Delete at most PAGE objects, and ignore missing objects."""
        if self.deletes_in_batches:
            self._tally.delete()
            obstore.delete(self._store, keys)
        else:
            with ThreadPoolExecutor(_DELETES_AT_ONCE) as threads:
                for _ in threads.map(self._delete_one, keys):
                    pass

    def _delete_one(self, key: str) -> None:
        self._tally.delete()
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError as error:
            if self.missing_bucket in str(error):
                raise

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Raise batchlab's errors instead of obstore's errors. A missing bucket never raises NotFound."""
        try:
            yield
        except (BaseError, OSError, NotFound) as error:
            text = str(error)
            if self.missing_bucket in text:
                raise BackendError("The bucket does not exist.") from error
            if isinstance(error, FileNotFoundError | NotFound):
                raise NotFound(f"No object {key!r}.") from error
            is_busy = not self.busy_statuses.isdisjoint(_STATUS.findall(text))
            if isinstance(error, AlreadyExistsError | PreconditionError):
                # Status 412 means that another writer has changed the object. Status 409 of S3 means that another
                # conditional write is still in progress.
                kind = Throttled if is_busy else AlreadyExists
                raise kind(f"Object {key!r} exists, or another writer has replaced it.") from error
            outage = Unreachable if _OUTAGE.search(text) else BackendError
            subject = f"Object {key!r}: " if key else ""
            first_line = text.partition("\n")[0]
            raise (Throttled if is_busy else outage)(f"{subject}{first_line}.") from error

    # --- The port --------------------------------------------------------------------------------

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        check_key(key)
        mode: PutMode = "create" if if_absent else "overwrite"
        result = await self._do(key, partial(self._put, key, data, mode, if_match))
        return result["e_tag"] or ""

    def _put(self, key: str, data: bytes, mode: PutMode, if_match: str | None) -> PutResult:
        if if_match is not None:
            mode = self._unless_changed(key, if_match)
        # A conditional put cannot be sent in parts.
        self._tally.put(1 if mode != "overwrite" else _puts(len(data), _CHUNK_BYTES))
        return obstore.put(self._store, key, data, mode=mode, max_concurrency=PARTS_AT_ONCE)

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        check_key(key)
        self._tally.get()
        return await self._do(key, partial(self._get, key, limit))

    def _get(self, key: str, limit: int | None) -> bytes:
        result = obstore.get(self._store, key)
        # When obstore returns the result, the headers of the answer have arrived, but the content of the object has
        # not.
        check_size(key, result.meta["size"], limit)
        return bytes(result.bytes())

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        check_key(key)
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not {start}")
        length = max(stop - start, 0)
        if length:
            self._tally.get()
            try:
                return await self._do(
                    key, lambda: bytes(obstore.get_range(self._store, key, start=start, length=length))
                )
            except (NotFound, Throttled, Unreachable):
                raise
            except BackendError:
                # A store refuses a range that begins after the end of the object.
                info = await self.head(key)
                if info is None or info.size > start:
                    raise
        elif await self.head(key) is None:
            raise NotFound(f"No object {key!r}.")
        return b""

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        check_key(key)
        result = await self._do(key, partial(self._get_unless, key, etag, limit))
        if result is None:
            return None
        data = await self._do(key, lambda: bytes(result.bytes()))
        return data, result.meta["e_tag"] or ""

    def _get_unless(self, key: str, etag: str | None, limit: int | None) -> obstore.GetResult | None:
        self._tally.get()
        try:
            options: obstore.GetOptions = {} if etag is None else {"if_none_match": etag}
            result = obstore.get(self._store, key, options=options)
        except NotModifiedError:
            return None
        check_size(key, result.meta["size"], limit)
        return result

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        self._tally.get()
        try:
            return await self._do(key, lambda: _info(obstore.head(self._store, key)))
        except NotFound:
            return None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        object_infos = self._list(prefix, after)
        while page := await self._do(prefix, lambda: [*islice(object_infos, PAGE)]):
            yield page

    def _list(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        # obstore lists only prefixes of whole path segments, so this method matches the rest of `prefix`.
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
        for start in range(0, len(keys), PAGE):
            batch = keys[start : start + PAGE]
            await self._do(keys[start], partial(self._delete, batch))

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        check_key(key)
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        chunk_bytes = max(_PART_BYTES, size // _MAX_PARTS + 1)
        self._tally.put(_puts(size, chunk_bytes))
        if not if_absent:
            call = partial(obstore.put, self._store, key, path, chunk_size=chunk_bytes, max_concurrency=PARTS_AT_ONCE)
            await self._do(key, call)
        elif size <= chunk_bytes:
            await self._do(key, lambda: obstore.put(self._store, key, path, mode="create"))
        else:
            await self._do(key, partial(self._create_in_parts, key, path, chunk_bytes))
        return size

    async def download(self, key: str, path: Path) -> int:
        check_key(key)
        return await self._do(key, partial(self._download, key, path))

    def _download(self, key: str, path: Path) -> int:
        def write(staged: Path) -> None:
            self._tally.get()
            chunks = obstore.get(self._store, key).stream(min_chunk_size=_PART_BYTES)
            with staged.open("wb") as file:
                file.writelines(chunks)

        return download_whole(path, write)


def client_options(url: str) -> ClientConfig:
    """Return obstore's options for connections to the service at `url`."""
    options: ClientConfig = {
        "allow_http": url.startswith("http:"),
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "read_timeout": _SILENCE,
        # The timeout limits the whole transfer of an object of any size. The default timeout of obstore is 30 s.
        "timeout": timedelta(days=1),
    }
    if here := loopback(url):
        # Without `proxy_url` and `proxy_excludes`, obstore uses a proxy from the environment.
        options |= {"proxy_url": url, "proxy_excludes": here}
    return options


def retries() -> RetryConfig:
    """Return obstore's options for retries of a failed request."""
    return {
        "max_retries": 3,
        "backoff": {"init_backoff": timedelta(milliseconds=50)},
        "retry_timeout": timedelta(seconds=10),
    }


def _puts(size_bytes: int, chunk_bytes: int) -> int:
    """Return the number of requests to put an object: one, or the number of parts plus two."""
    return 1 if size_bytes <= chunk_bytes else -(-size_bytes // chunk_bytes) + 2


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "")
