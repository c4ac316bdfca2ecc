"""S3 checks: completed, aborted, and conditional multipart uploads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchlab.conform.check import Answer, Severity, Table, answer, expect
from batchlab.conform.site import Site

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

SMALLEST_PART = 5 * 1024 * 1024

S3_UPLOAD = Table()


class Upload:
    """Multipart upload to a key of a single check."""

    def __init__(self, site: Site, key: str) -> None:
        self._s3: Any = site.target.s3
        named = site.named(key)
        begun = answer("CreateMultipartUpload", lambda: self._s3.create_multipart_upload(**named))
        self._named = {**named, "UploadId": begun.accepted().data["UploadId"]}
        self._parts: list[dict[str, object]] = []

    def part(self, data: bytes) -> Answer:
        """Upload the next part."""
        number = len(self._parts) + 1
        found = answer(
            "UploadPart",
            lambda: self._s3.upload_part(**self._named, PartNumber=number, Body=data),
        )
        self._parts.append({"PartNumber": number, "ETag": found.data.get("ETag")})
        return found

    def complete(self, *, if_absent: bool = False, etags: Sequence[str] = ()) -> Answer:
        """Call CompleteMultipartUpload. `etags` replaces the ETags that UploadPart returned."""
        parts = self._parts
        if etags:
            parts = [{**one, "ETag": etag} for one, etag in zip(parts, etags, strict=True)]
        more = {"IfNoneMatch": "*"} if if_absent else {}
        return answer(
            "CompleteMultipartUpload",
            lambda: self._s3.complete_multipart_upload(
                **self._named, MultipartUpload={"Parts": parts}, **more
            ),
        )

    def abort(self) -> Answer:
        """Call AbortMultipartUpload."""
        return answer(
            "AbortMultipartUpload", lambda: self._s3.abort_multipart_upload(**self._named)
        )


def _begun(site: Site, key: str, *parts: bytes) -> Upload:
    upload = Upload(site, key)
    for data in parts or (b"data",):
        upload.part(data).accepted()
    return upload


@S3_UPLOAD.check(
    "s3-multipart-whole",
    NEEDED,
    rule="A completed multipart upload is one object with its parts in the order of their numbers.",
    source="S3 User Guide, multipart upload",
    promise="Objects.upload",
    otherwise="large inputs and results are damaged",
)
def multipart_whole(site: Site) -> None:
    parts = (b"1" * SMALLEST_PART, b"2" * SMALLEST_PART, b"three")
    _begun(site, "a", *parts).complete().accepted()
    expect(site.get("a").accepted().body == b"".join(parts), "it has another content")
    expect(site.get("a", Range="bytes=5242879-5242880").body == b"12", "ranges are off")


@S3_UPLOAD.check(
    "s3-multipart-unseen",
    NEEDED,
    rule="Until an upload is completed, no read or listing returns it, and the previous "
    "object still exists.",
    source="S3 User Guide, multipart upload",
    promise="Objects: a key has one complete object or none",
    otherwise="a worker reads an incomplete input",
)
def multipart_unseen(site: Site) -> None:
    upload = _begun(site, "new")
    site.get("new").refused(404, "NoSuchKey")
    expect(site.keys() == [], "it is listed")
    upload.complete().accepted()
    replacing = _begun(site, "new", b"other")
    expect(site.get("new").body == b"data", "what it will replace is gone")
    replacing.complete().accepted()
    expect(site.get("new").body == b"other", "what it should replace is still there")


@S3_UPLOAD.check(
    "s3-multipart-abort",
    NOTED,
    rule="After AbortMultipartUpload, the object does not exist, and UploadPart returns 404 "
    "NoSuchUpload.",
    source="S3 API, AbortMultipartUpload",
    promise="a failed Objects.upload leaves nothing behind",
    otherwise="invisible parts are billed",
)
def multipart_abort(site: Site) -> None:
    upload = _begun(site, "a")
    upload.abort().accepted()
    site.get("a").refused(404, "NoSuchKey")
    upload.part(b"more").refused(404, "NoSuchUpload")


@S3_UPLOAD.check(
    "s3-multipart-small-part",
    NOTED,
    rule="Every part except the last one has at least 5 MiB. Otherwise "
    "CompleteMultipartUpload returns 400 EntityTooSmall.",
    source="S3 User Guide, multipart upload limits",
    promise="none: the adapter's parts have 8 MiB",
    otherwise="an upload that works here fails on AWS",
)
def multipart_small_part(site: Site) -> None:
    _begun(site, "a", b"1", b"2").complete().refused(400, "EntityTooSmall")


@S3_UPLOAD.check(
    "s3-multipart-wrong-part",
    NOTED,
    rule="CompleteMultipartUpload with a wrong ETag of a part returns 400 InvalidPart.",
    source="S3 API, CompleteMultipartUpload",
    promise="Objects.upload",
    otherwise="a part that was overwritten in between is not noticed",
)
def multipart_wrong_part(site: Site) -> None:
    upload = _begun(site, "a")
    upload.complete(etags=['"00000000000000000000000000000000"']).refused(400, "InvalidPart")


@S3_UPLOAD.check(
    "s3-multipart-create-taken",
    NEEDED,
    rule="CompleteMultipartUpload with If-None-Match: * on a key that exists by then returns"
    " 412 PreconditionFailed and does not change the object.",
    source="S3 User Guide, conditional writes",
    promise="a large file of a task is stored once, and never overwritten",
    otherwise="a worker can overwrite a file of another job",
)
def multipart_create_taken(site: Site) -> None:
    upload = _begun(site, "a")
    site.put("a", b"first").accepted()
    upload.complete(if_absent=True).refused(412, "PreconditionFailed")
    expect(site.get("a").body == b"first", "refused, but the object has changed")


@S3_UPLOAD.check(
    "s3-multipart-create-free",
    NEEDED,
    rule="CompleteMultipartUpload with If-None-Match: * on a free key stores the object.",
    source="S3 User Guide, conditional writes",
    promise="a large file of a task is stored once, and never overwritten",
    otherwise="a task with a large file fails",
)
def multipart_create_free(site: Site) -> None:
    _begun(site, "a").complete(if_absent=True).accepted()
    expect(site.get("a").body == b"data", "it has another content")


@S3_UPLOAD.check(
    "s3-multipart-create-conflict",
    NOTED,
    rule="CompleteMultipartUpload with If-None-Match: * returns 409 "
    "ConditionalRequestConflict if the key was deleted during the upload. The upload "
    "must be repeated.",
    source="S3 User Guide, conditional writes",
    promise="the adapter raises Throttled for 409, and the call is repeated",
    otherwise="batchlab sees 409 for the first time in production",
)
def multipart_create_conflict(site: Site) -> None:
    site.put("a", b"first").accepted()
    upload = _begun(site, "a")
    site.delete("a").accepted()
    upload.complete(if_absent=True).refused(409, "ConditionalRequestConflict")
