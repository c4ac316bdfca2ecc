"""A stub of Google Cloud Storage: the part of its XML API that obstore uses, in memory.

No emulator in the package registries serves that part: fake-gcs-server and gcp-storage-emulator serve the JSON API. The
stub follows Google's reference of the XML API. Writes and copies support `x-goog-if-generation-match`. A delete of a
missing object returns 404. The ETag of an object that was uploaded in parts is not the MD5 of its content.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_XMLNS = "http://doc.s3.amazonaws.com/2006-03-01"
_PAGE = 1000


class Refused(Exception):
    """An unsuccessful answer of the stub."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Stored:
    """One generation of an object."""

    data: bytes
    etag: str
    generation: int


@dataclass(slots=True)
class Stub:
    """The stub's buckets, and the requests so far as "METHOD path" without the values of the query."""

    buckets: dict[str, dict[str, Stored]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _generations: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000))
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.buckets:
            raise Refused(404, "NoSuchBucket")
        return self.buckets[name]

    def read(self, bucket: str, key: str) -> Stored:
        found = self.bucket(bucket).get(key)
        if found is None:
            raise Refused(404, "NoSuchKey")
        return found

    def write(self, bucket: str, key: str, data: bytes, condition: str | None, etag: str = "") -> Stored:
        """Store the data if the object has the generation in `condition`. Generation 0 means that the object does not
        exist."""
        with self.lock:
            objects = self.bucket(bucket)
            there = objects[key].generation if key in objects else 0
            if condition is not None and int(condition) != there:
                raise Refused(412, "PreconditionFailed")
            etag = etag or hashlib.md5(data, usedforsecurity=False).hexdigest()
            stored = Stored(data, f'"{etag}"', next(self._generations))
            objects[key] = stored
            return stored

    def delete(self, bucket: str, key: str) -> None:
        with self.lock:
            if self.bucket(bucket).pop(key, None) is None:
                raise Refused(404, "NoSuchKey")

    def begin_upload(self, bucket: str) -> str:
        self.bucket(bucket)
        upload = f"upload-{next(self._ids)}"
        self.uploads[upload] = {}
        return upload

    def complete_upload(self, bucket: str, key: str, upload: str, parts: list[int]) -> Stored:
        held = self.uploads.pop(upload)
        data = b"".join(held[number] for number in parts)
        return self.write(bucket, key, data, None, etag=f"composed-{upload}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    stub: Stub

    def _serve(self) -> None:
        split = urlsplit(self.path)
        query = {key: found[0] for key, found in parse_qs(split.query, True).items()}
        bucket, _, key = unquote(split.path).removeprefix("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.stub.requests.append(" ".join([self.command, unquote(split.path), *sorted(query)]))
        try:
            if not self.headers.get("Authorization"):
                raise Refused(401, "AuthenticationRequired")
            self._answer(bucket, key, query, body)
        except Refused as error:
            self._send(error.status, f"<Error><Code>{error.code}</Code></Error>".encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _answer(self, bucket: str, key: str, query: Mapping[str, str], body: bytes) -> None:
        if "uploads" in query or "uploadId" in query:
            self._upload(bucket, key, query, body)
        elif self.command == "DELETE":
            self.stub.delete(bucket, key)
            self._send(204)
        elif self.command == "PUT":
            self._put(bucket, key, body)
        elif key:
            self._get(self.stub.read(bucket, key))
        else:
            self._list(self.stub.bucket(bucket), query)

    def _put(self, bucket: str, key: str, body: bytes) -> None:
        condition = self.headers.get("x-goog-if-generation-match")
        if source := self.headers.get("x-goog-copy-source"):
            whose, _, what = unquote(source).removeprefix("/").partition("/")
            copied = self.stub.read(whose, what)
            self.stub.write(bucket, key, copied.data, condition, copied.etag.strip('"'))
            self._send(200, b"<CopyObjectResult></CopyObjectResult>")
            return
        self._send(200, b"", _headers(self.stub.write(bucket, key, body, condition)))

    def _get(self, found: Stored) -> None:
        headers = _headers(found)
        if self.headers.get("If-None-Match") == found.etag:
            self._send(304, b"", headers)
            return
        size, asked = len(found.data), self.headers.get("Range")
        if not asked:
            self._send(200, found.data, headers)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        assert match, asked
        start, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
        if start >= size:
            raise Refused(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{last}/{size}"
        self._send(206, found.data[start : last + 1], headers)

    def _list(self, objects: Mapping[str, Stored], query: Mapping[str, str]) -> None:
        after = query.get("continuation-token") or query.get("start-after", "")
        most = min(int(query.get("max-keys") or _PAGE), _PAGE)
        with self.stub.lock:
            keys = sorted(key for key in objects if key > after and key.startswith(query.get("prefix", "")))
            rows = "".join(_row(key, objects[key]) for key in keys[:most])
        more = len(keys) > most
        token = ""
        if more:
            token = f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>"
        self._send(
            200,
            f'<ListBucketResult xmlns="{_XMLNS}"><IsTruncated>{str(more).lower()}</IsTruncated>'
            f"{token}{rows}</ListBucketResult>".encode(),
        )

    def _upload(self, bucket: str, key: str, query: Mapping[str, str], body: bytes) -> None:
        if "uploads" in query:
            upload = self.stub.begin_upload(bucket)
            self._send(
                200,
                "<InitiateMultipartUploadResult>"
                f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
                "</InitiateMultipartUploadResult>".encode(),
            )
            return
        upload = query["uploadId"]
        if upload not in self.stub.uploads:
            raise Refused(404, "NoSuchUpload")
        if self.command == "PUT":
            self.stub.uploads[upload][int(query["partNumber"])] = body
            self._send(200, b"", {"ETag": f'"part-{query["partNumber"]}"'})
        elif self.command == "DELETE":
            del self.stub.uploads[upload]
            self._send(204)
        else:
            numbers = [int(one) for one in re.findall(r"<PartNumber>(\d+)<", body.decode())]
            if "x-goog-if-generation-match" in self.headers:
                raise Refused(400, "InvalidArgument")
            stored = self.stub.complete_upload(bucket, key, upload, numbers)
            self._send(
                200,
                "<CompleteMultipartUploadResult>"
                f"<ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>".encode(),
                {"x-goog-generation": str(stored.generation)},
            )

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Write nothing to stderr."""


def _headers(found: Stored) -> dict[str, str]:
    return {"ETag": found.etag, "x-goog-generation": str(found.generation), "Last-Modified": formatdate(0, usegmt=True)}


def _row(key: str, found: Stored) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><Generation>{found.generation}</Generation>"
        f"<LastModified>1970-01-01T00:00:00.000Z</LastModified><ETag>{escape(found.etag)}</ETag>"
        f"<Size>{len(found.data)}</Size></Contents>"
    )


@contextmanager
def served() -> Iterator[tuple[Stub, str]]:
    """Serve a stub, and return it with its URL."""
    stub = Stub()
    handler = type("Handler", (_Handler,), {"stub": stub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield stub, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
