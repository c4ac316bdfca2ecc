"""Conformance checks of S3 for reads, ranges, conditional reads, deletes, and multipart uploads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchlab.conform.check import Answer, Table, answer, expect
from batchlab.conform.site import Site

TEN = b"0123456789"

S3_READ = Table("s3")


@S3_READ.needed(
    source="S3 User Guide, data consistency model",
    promise="Objects: read-after-write",
    otherwise="a worker does not find the inputs or the outcome that a message names",
)
def read_own_write(site: Site) -> None:
    """GetObject, HeadObject, and ListObjectsV2 return a new object at once, over any connection."""
    for number in range(20):
        key, data = f"{number:02d}", str(number).encode()
        site.put(key, data).expect_accepted()
        expect(site.get(key).body == data, "GetObject right after the write misses the object")
        expect(not site.head(key).code, "HeadObject right after the write misses the object")
        expect(site.keys(key) == [key], "a listing right after the write misses the object")


@S3_READ.needed(
    source="S3 User Guide, data consistency model",
    promise="I4, Objects: read-after-write",
    otherwise="a worker starts tasks of a job whose cancellation was acknowledged",
)
def read_own_overwrite(site: Site) -> None:
    """After the response to an overwrite, every read returns the new object."""
    for number in range(20):
        data = str(number).encode()
        etag = site.put("a", data).expect_accepted().data.get("ETag")
        answer = site.get("a").expect_accepted()
        expect(answer.body == data, "GetObject right after the overwrite returns the old object")
        expect(answer.data.get("ETag") == etag, "GetObject right after the overwrite returns the old ETag")


@S3_READ.needed(
    source="S3 User Guide, data consistency model", promise="Objects.delete", otherwise="a deleted object appears again"
)
def read_own_delete(site: Site) -> None:
    """After the response to a delete, no read or listing returns the object."""
    for number in range(10):
        key = f"{number:02d}"
        site.put(key, b"1").expect_accepted()
        site.delete(key).expect_accepted()
        site.get(key).expect_refused(404, "NoSuchKey")
        expect(site.keys(key) == [], "a deleted object is listed")


@S3_READ.needed(
    source="S3 API, GetObject",
    promise="Objects.get raises NotFound",
    otherwise="a bundle without an outcome looks like an outage",
)
def get_missing(site: Site) -> None:
    """GetObject of a missing key returns 404 NoSuchKey."""
    site.get("nothing").expect_refused(404, "NoSuchKey")
    site.get("nothing", IfNoneMatch='"0123"').expect_refused(404, "NoSuchKey")


@S3_READ.needed(
    source="S3 API, HeadObject", promise="Objects.head returns None", otherwise="a missing object looks like an outage"
)
def head_missing(site: Site) -> None:
    """HeadObject of a missing key returns 404 without a body."""
    site.head("nothing").expect_refused(404)


@S3_READ.noted(
    source="S3 API, error responses",
    promise="errors name the missing bucket or object",
    otherwise="a wrong bucket name is reported as a missing object",
)
def bucket_missing(site: Site) -> None:
    """Every read of a missing bucket returns 404 NoSuchBucket."""
    bucket = f"{site.target.run}-nothing"
    s3 = site.target.s3
    answer("GetObject", lambda: dict(s3.get_object(Bucket=bucket, Key="a"))).expect_refused(404, "NoSuchBucket")
    answer("ListObjectsV2", lambda: s3.list_objects_v2(Bucket=bucket)).expect_refused(404, "NoSuchBucket")


@S3_READ.needed(
    name="range",
    source="S3 API, GetObject",
    promise="Objects.get_range",
    otherwise="a worker reads the wrong part of its input",
)
def range_inside(site: Site) -> None:
    """GetObject with Range: bytes=3-5 returns 206 with the bytes 3 to 5, both included, and their Content-Range."""
    site.put("a", TEN).expect_accepted()
    answer = site.get("a", Range="bytes=3-5").expect_accepted()
    expect(answer.body == b"345", "GetObject returns other bytes")
    expect(answer.status == 206, f"the status is {answer.status}")
    expect(answer.data.get("ContentRange") == "bytes 3-5/10", "the Content-Range is wrong")


@S3_READ.needed(
    source="S3 API, GetObject; RFC 9110, range requests",
    promise="Objects.get_range",
    otherwise="the last part of an input cannot be read",
)
def range_cut(site: Site) -> None:
    """A range that ends after the end of the object is shortened."""
    site.put("a", TEN).expect_accepted()
    answer = site.get("a", Range="bytes=7-99").expect_accepted()
    expect(answer.body == b"789", "GetObject returns other bytes")
    expect(answer.status == 206, f"the status is {answer.status}")


@S3_READ.noted(
    source="S3 API, GetObject",
    promise="Objects.get_range: the adapter checks the size itself",
    otherwise="the adapter sends one more request for an empty part of an input",
)
def range_behind(site: Site) -> None:
    """A range that starts after the end of the object returns 416 InvalidRange."""
    site.put("a", TEN).expect_accepted()
    site.put("empty", b"").expect_accepted()
    site.get("a", Range="bytes=100-200").expect_refused(416, "InvalidRange")
    site.get("empty", Range="bytes=0-9").expect_refused(416, "InvalidRange")


@S3_READ.needed(
    source="S3 User Guide, conditional reads",
    promise="Objects.get_if_changed",
    otherwise="workers fetch the content of the control object even if the object has not changed",
)
def get_unchanged(site: Site) -> None:
    """GetObject with If-None-Match and the current ETag returns 304 without the body."""
    etag = str(site.put("a", b"1").expect_accepted().data.get("ETag"))
    site.get("a", IfNoneMatch=etag).expect_refused(304)


@S3_READ.needed(
    source="S3 User Guide, conditional reads",
    promise="I4, Objects.get_if_changed",
    otherwise="workers do not notice a cancellation",
)
def get_changed(site: Site) -> None:
    """GetObject with If-None-Match and an older ETag returns the new object."""
    etag = str(site.put("a", b"run").expect_accepted().data.get("ETag"))
    site.put("a", b"cancel").expect_accepted()
    answer = site.get("a", IfNoneMatch=etag).expect_accepted()
    expect(answer.body == b"cancel", "GetObject returns the old object")


@S3_READ.needed(
    source="S3 API, DeleteObject", promise="Objects.delete", otherwise="a cleanup cannot be repeated after a crash"
)
def delete_missing(site: Site) -> None:
    """DeleteObject of a missing key returns 204, as for an existing key."""
    answer = site.delete("nothing").expect_accepted()
    expect(answer.status == 204, f"the status is {answer.status}")


@S3_READ.needed(
    source="S3 API, DeleteObjects", promise="Objects.delete", otherwise="a cleanup stops halfway, or cannot be repeated"
)
def delete_many(site: Site) -> None:
    """DeleteObjects removes the named keys, and reports a missing key as deleted."""
    for key in ("a", "b", "c"):
        site.put(key, b"1").expect_accepted()
    done = site.delete_many(["a", "nothing", "c"]).expect_accepted().data
    expect(not done.get("Errors"), "a missing key is an error")
    expect(len(done.get("Deleted", ())) == 3, "DeleteObjects does not report every key as deleted")
    expect(site.keys() == ["b"], "the remaining objects are wrong")


@S3_READ.noted(source="S3 API, DeleteObjects", promise="none: the adapter sends at most 1,000 keys in one call")
def delete_over_1000(site: Site) -> None:
    """DeleteObjects with more than 1,000 keys returns 400 MalformedXML."""
    site.delete_many([f"{n:04d}" for n in range(1001)]).expect_refused(400, "MalformedXML")


SMALLEST_PART = 5 * 1024 * 1024

S3_UPLOAD = Table("s3")


class Upload:
    """Multipart upload to a key that belongs to a single check."""

    def __init__(self, site: Site, key: str) -> None:
        self._s3: Any = site.target.s3
        named = site.named(key)
        begun = answer("CreateMultipartUpload", lambda: self._s3.create_multipart_upload(**named))
        self._named = {**named, "UploadId": begun.expect_accepted().data["UploadId"]}
        self._parts: list[dict[str, object]] = []

    def part(self, data: bytes) -> Answer:
        """Upload the next part of the object, and return the response."""
        number = len(self._parts) + 1
        response = answer("UploadPart", lambda: self._s3.upload_part(**self._named, PartNumber=number, Body=data))
        self._parts.append({"PartNumber": number, "ETag": response.data.get("ETag")})
        return response

    def complete(self, *, if_absent: bool = False, etags: Sequence[str] = ()) -> Answer:
        """Call CompleteMultipartUpload. The argument `etags` replaces the ETags that UploadPart returned."""
        parts = self._parts
        if etags:
            parts = [{**part, "ETag": etag} for part, etag in zip(parts, etags, strict=True)]
        more = {"IfNoneMatch": "*"} if if_absent else {}
        return answer(
            "CompleteMultipartUpload",
            lambda: self._s3.complete_multipart_upload(**self._named, MultipartUpload={"Parts": parts}, **more),
        )

    def abort(self) -> Answer:
        """Call AbortMultipartUpload."""
        return answer("AbortMultipartUpload", lambda: self._s3.abort_multipart_upload(**self._named))


def _begin(site: Site, key: str, *parts: bytes) -> Upload:
    upload = Upload(site, key)
    for data in parts or (b"data",):
        upload.part(data).expect_accepted()
    return upload


@S3_UPLOAD.needed(
    source="S3 User Guide, multipart upload", promise="Objects.upload", otherwise="large inputs and results are damaged"
)
def multipart_whole(site: Site) -> None:
    """A completed multipart upload is one object with its parts in the order of their numbers."""
    parts = (b"1" * SMALLEST_PART, b"2" * SMALLEST_PART, b"three")
    _begin(site, "a", *parts).complete().expect_accepted()
    expect(site.get("a").expect_accepted().body == b"".join(parts), "GetObject returns other content")
    expect(site.get("a", Range="bytes=5242879-5242880").body == b"12", "a range returns other bytes")


@S3_UPLOAD.needed(
    source="S3 User Guide, multipart upload",
    promise="Objects: a key has one complete object or none",
    otherwise="a worker reads an incomplete input",
)
def multipart_unseen(site: Site) -> None:
    """Until a multipart upload is completed, no read or listing returns the new object, and the previous object still
    exists.
    """
    upload = _begin(site, "new")
    site.get("new").expect_refused(404, "NoSuchKey")
    expect(site.keys() == [], "an incomplete upload is listed")
    upload.complete().expect_accepted()
    replacing = _begin(site, "new", b"other")
    expect(site.get("new").body == b"data", "the previous object is missing before the upload is completed")
    replacing.complete().expect_accepted()
    expect(site.get("new").body == b"other", "the completed upload does not replace the object")


@S3_UPLOAD.noted(
    source="S3 API, AbortMultipartUpload",
    promise="a failed Objects.upload leaves nothing behind",
    otherwise="AWS bills the invisible parts of an aborted upload",
)
def multipart_abort(site: Site) -> None:
    """After AbortMultipartUpload, the object does not exist, and UploadPart returns 404 NoSuchUpload."""
    upload = _begin(site, "a")
    upload.abort().expect_accepted()
    site.get("a").expect_refused(404, "NoSuchKey")
    upload.part(b"more").expect_refused(404, "NoSuchUpload")


@S3_UPLOAD.noted(
    source="S3 User Guide, multipart upload limits",
    promise="none: the adapter's parts have 8 MiB",
    otherwise="an upload that works on the emulator fails on AWS",
)
def multipart_small_part(site: Site) -> None:
    """Every part of a multipart upload except the last part must have at least 5 MiB. If a part before the last
    part is smaller than 5 MiB, CompleteMultipartUpload returns 400 EntityTooSmall.
    """
    _begin(site, "a", b"1", b"2").complete().expect_refused(400, "EntityTooSmall")


@S3_UPLOAD.noted(
    source="S3 API, CompleteMultipartUpload",
    promise="Objects.upload",
    otherwise="the adapter does not notice that a part was overwritten during the upload",
)
def multipart_wrong_part(site: Site) -> None:
    """CompleteMultipartUpload with a wrong ETag of a part returns 400 InvalidPart."""
    upload = _begin(site, "a")
    upload.complete(etags=['"00000000000000000000000000000000"']).expect_refused(400, "InvalidPart")


@S3_UPLOAD.needed(
    source="S3 User Guide, conditional writes",
    promise="a large file of a task is stored once, and never overwritten",
    otherwise="a worker can overwrite a file of another job",
)
def multipart_create_taken(site: Site) -> None:
    """CompleteMultipartUpload with If-None-Match: * on a key that was created during the upload returns 412
    PreconditionFailed and does not change the object.
    """
    upload = _begin(site, "a")
    site.put("a", b"first").expect_accepted()
    upload.complete(if_absent=True).expect_refused(412, "PreconditionFailed")
    expect(site.get("a").body == b"first", "CompleteMultipartUpload is refused, but changes the object")


@S3_UPLOAD.needed(
    source="S3 User Guide, conditional writes",
    promise="a large file of a task is stored once, and never overwritten",
    otherwise="a task with a large file fails",
)
def multipart_create_free(site: Site) -> None:
    """CompleteMultipartUpload with If-None-Match: * on a free key stores the object."""
    _begin(site, "a").complete(if_absent=True).expect_accepted()
    expect(site.get("a").body == b"data", "GetObject returns other content")


@S3_UPLOAD.noted(
    source="S3 User Guide, conditional writes",
    promise="the adapter raises Throttled for 409, and the call is repeated",
    otherwise="batchlab receives the status 409 for the first time in production",
)
def multipart_create_conflict(site: Site) -> None:
    """CompleteMultipartUpload with If-None-Match: * returns 409 ConditionalRequestConflict if the key was deleted
    during the upload. The client must repeat the whole upload.
    """
    site.put("a", b"first").expect_accepted()
    upload = _begin(site, "a")
    site.delete("a").expect_accepted()
    upload.complete(if_absent=True).expect_refused(409, "ConditionalRequestConflict")
