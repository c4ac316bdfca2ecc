"""A bucket over obstore: S3 on AWS and its emulators. A folder of files is in local_objects.py.

Invariant: a key holds one whole object or none, whoever dies while writing it, and a conditional
create has one winner.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PreconditionError,
)

from batchlab.adapters.folders import download_whole
from batchlab.adapters.limits import check_key, check_prefix, check_size
from batchlab.errors import (
    AlreadyExists,
    BackendError,
    BatchlabError,
    NotFound,
    Throttled,
    Unreachable,
)
from batchlab.ports import ObjectInfo
from batchlab.tally import Tally

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef
    from obstore import ObjectMeta, PutMode, PutResult
    from obstore.store import ClientConfig, ObjectStore, S3Config

    from batchlab.adapters.aws import Endpoint

T = TypeVar("T")

log = logging.getLogger(__name__)

PAGE = 1000

_THREADS = 32
_PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
_CHUNK_BYTES = 5 * 1024 * 1024
"""What obstore puts in one request unless told otherwise."""

_SILENCE = timedelta(seconds=30)

_NO_BUCKET = "NoSuchBucket"
_BUSY = re.compile(r"status code: (429|503|409)\b")
_KINDS: tuple[tuple[re.Pattern[str], type[BackendError]], ...] = (
    (_BUSY, Throttled),
    (re.compile(r"HTTP error: |status code: 5\d\d\b"), Unreachable),
    # A full disk, of a download, is waited out like an outage.
    (re.compile(r"No space left on device"), Unreachable),
)


class ObstoreObjects:
    """The Objects port over one remote store of obstore."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        create_in_parts: Callable[[str, Path, int], None] | None = None,
        make_bucket: Callable[[], None] | None = None,
        tally: Tally | None = None,
    ) -> None:
        """`create_in_parts` uploads a file in parts of so many bytes; AlreadyExists. obstore cannot
        do that on a condition. Requests are counted in `tally`, but for those that obstore makes
        again by itself."""
        self._store = store
        self._create_in_parts = create_in_parts
        self._make_bucket = make_bucket
        self._tally = tally or Tally()
        self._made = 0
        self._making = threading.Lock()
        """Numbers the files that are being fetched."""
        # Not obstore's own async calls: their futures are completed by Rust threads, which abort
        # the process (SIGABRT) if it ends just then; a process that exits right after a put did
        # so 6 times in 10. They also take 2 to 4 times the CPU of a thread of ours.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    async def _do(self, key: str, call: Callable[[], T]) -> T:
        with _translated(key):
            return await asyncio.wrap_future(self._threads.submit(self._sure, call))

    def _sure(self, call: Callable[[], T]) -> T:
        """The result of `call`, for which a bucket that may be made is made where it is missing."""
        made = self._made
        try:
            return call()
        except (FileNotFoundError, BaseError, NotFound) as error:
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
        result = await self._do(key, partial(self._put, key, data, mode))
        return result["e_tag"] or ""

    def _put(self, key: str, data: bytes, mode: PutMode) -> PutResult:
        # A condition cannot be put in parts.
        self._tally.put(1 if mode != "overwrite" else _puts(len(data), _CHUNK_BYTES))
        return obstore.put(self._store, key, data, mode=mode, max_concurrency=_PARTS_AT_ONCE)

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        check_key(key)
        self._tally.get()
        return await self._do(key, partial(self._get, key, limit))

    def _get(self, key: str, limit: int | None) -> bytes:
        result = obstore.get(self._store, key)
        # The headers of the answer are here, and its body is not yet.
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
        result = await self._do(key, partial(self._get_unless, key, etag))
        if result is None:
            return None
        data = await self._do(key, lambda: bytes(result.bytes()))
        return data, result.meta["e_tag"] or ""

    def _get_unless(self, key: str, etag: str | None) -> obstore.GetResult | None:
        self._tally.get()
        try:
            options: obstore.GetOptions = {} if etag is None else {"if_none_match": etag}
            return obstore.get(self._store, key, options=options)
        except NotModifiedError:
            return None

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        self._tally.get()
        try:
            return await self._do(key, lambda: _info(obstore.head(self._store, key)))
        except NotFound:
            return None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        found = self._listed(prefix, after)
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
        for start in range(0, len(keys), PAGE):
            self._tally.delete()
            some = keys[start : start + PAGE]
            await self._do(keys[start], partial(obstore.delete, self._store, some))

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        check_key(key)
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        chunk_bytes = max(_PART_BYTES, size // _MAX_PARTS + 1)
        self._tally.put(_puts(size, chunk_bytes))
        if not if_absent:
            call = partial(
                obstore.put,
                self._store,
                key,
                path,
                chunk_size=chunk_bytes,
                max_concurrency=_PARTS_AT_ONCE,
            )
            await self._do(key, call)
        elif size <= chunk_bytes or self._create_in_parts is None:
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
    in_parts = partial(_create_in_parts, endpoint, bucket)
    return ObstoreObjects(store, create_in_parts=in_parts, make_bucket=make, tally=tally)


def _create_in_parts(
    endpoint: Endpoint, bucket: str, key: str, path: Path, part_bytes: int
) -> None:
    """Upload a file in parts. AlreadyExists if there is such an object at the end."""
    from batchlab.adapters import aws

    def upload(number: int) -> CompletedPartTypeDef:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        part = s3.upload_part(
            Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data
        )
        return {"PartNumber": number, "ETag": part["ETag"]}

    with (
        closing(aws.client(endpoint, "s3", connections=_PARTS_AT_ONCE)) as s3,
        aws.translated(f"Object {key!r}"),
    ):
        upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        count = -(-path.stat().st_size // part_bytes)
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as threads:
                parts = [*threads.map(upload, range(1, count + 1))]
            s3.complete_multipart_upload(
                Bucket=bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except s3.exceptions.NoSuchUpload as error:
            # A request that boto3 repeats may have completed the upload the first time.
            found = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
            if any(one["Key"] == key for one in found):
                raise AlreadyExists(f"Object {key!r} exists.") from error
            raise
        except BaseException:
            _abort(s3, bucket, key, upload_id)
            raise


def _abort(s3: S3Client, bucket: str, key: str, upload_id: str) -> None:
    """Remove the parts of an upload. If that fails, the bucket's lifecycle rule removes them."""
    from batchlab.adapters import aws

    try:
        with aws.translated(f"Object {key!r}"):
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except BatchlabError as error:
        log.warning("parts of an unfinished upload stay for a while: %s", error)


def _puts(size_bytes: int, chunk_bytes: int) -> int:
    """Requests that an object of that size takes: one, or one for each part and two around them."""
    return 1 if size_bytes <= chunk_bytes else -(-size_bytes // chunk_bytes) + 2


def _info(meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "")


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotFound) as error:
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
