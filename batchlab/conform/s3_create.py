"""S3 checks: conditional creates, overwrites, and ETags, which commits depend on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from batchlab.conform.check import Answer, Differs, Severity, Table, Untried, expect
from batchlab.conform.site import Site

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

RACERS = 16
ROUNDS = 12

S3_CREATE = Table()


@S3_CREATE.check(
    "s3-create-free",
    NEEDED,
    rule="PutObject with If-None-Match: * on a free key stores the object.",
    source="S3 User Guide, conditional writes",
    promise="Objects.put(if_absent)",
    otherwise="commits fail",
)
def create_free(site: Site) -> None:
    site.put("a", b"first", if_absent=True).accepted()
    expect(site.get("a").accepted().body == b"first", "the object has another content")


@S3_CREATE.check(
    "s3-create-taken",
    NEEDED,
    rule="PutObject with If-None-Match: * on an existing key returns 412 PreconditionFailed "
    "and does not change the object, even if it is empty or has the same content.",
    source="S3 User Guide, conditional writes",
    promise="I1, Objects.put(if_absent)",
    otherwise="two workers both commit one bundle",
)
def create_taken(site: Site) -> None:
    for key, before in (("full", b"first"), ("empty", b"")):
        site.put(key, before).accepted()
        for data in (b"second", before):
            site.put(key, data, if_absent=True).refused(412, "PreconditionFailed")
        expect(site.get(key).accepted().body == before, "refused, but the object has changed")


@S3_CREATE.check(
    "s3-create-repeated",
    NEEDED,
    rule="A conditional PutObject that is repeated after its success is refused, and a read "
    "returns the content of the first call.",
    source="S3 User Guide, conditional writes",
    promise="I1, commit() after a lost response",
    otherwise="a worker cannot recognize its own commit after a lost response",
)
def create_repeated(site: Site) -> None:
    etag = site.put("a", b"mine", if_absent=True).accepted().data.get("ETag")
    site.put("a", b"mine", if_absent=True).refused(412, "PreconditionFailed")
    found = site.get("a").accepted()
    expect(found.body == b"mine", "the first try's content is gone")
    expect(found.data.get("ETag") == etag, "the ETag is not the first try's")


@S3_CREATE.check(
    "s3-create-race",
    NEEDED,
    rule="When 16 conditional PutObject calls race for one key, one succeeds. The others get"
    " 412, or 409 ConditionalRequestConflict, which is retried.",
    source="S3 User Guide, conditional writes",
    promise="I1, Objects.put(if_absent)",
    otherwise="two workers both commit one bundle",
)
def create_race(site: Site) -> None:
    start = threading.Barrier(RACERS, timeout=20)

    def race(racer: int, key: str) -> Answer:
        start.wait()
        return site.put(key, str(racer).encode(), if_absent=True)

    with ThreadPoolExecutor(RACERS, thread_name_prefix="conform-race") as threads:
        for number in range(ROUNDS):
            key = f"{number:02d}"
            answers = list(threads.map(lambda racer, k=key: race(racer, k), range(RACERS)))
            _one_winner(site, key, dict(enumerate(answers)))


def _one_winner(site: Site, key: str, answers: Mapping[int, Answer]) -> None:
    winners = [racer for racer, one in answers.items() if not one.code]
    conflicts = 0
    for one in answers.values():
        if one.code == "ConditionalRequestConflict" and one.status == 409:
            conflicts += 1
        elif one.code:
            one.refused(412, "PreconditionFailed")
    if not winners and conflicts:
        # All calls may get a conflict, which means to try again. The next call is then the only
        # one.
        site.put(key, b"again", if_absent=True).accepted()
        return
    expect(len(winners) == 1, "more than one won" if winners else "nobody won")
    expect(
        site.get(key).accepted().body == str(winners[0]).encode(),
        "the object is not the winner's",
    )


@S3_CREATE.check(
    "s3-create-after-delete",
    NEEDED,
    rule="In a bucket without versioning, a conditional PutObject succeeds on a deleted key.",
    source="S3 User Guide, conditional writes",
    promise="Objects.put(if_absent)",
    otherwise="a deleted object can never be written again",
)
def create_after_delete(site: Site) -> None:
    site.put("a", b"1", if_absent=True).accepted()
    site.delete("a").accepted()
    site.put("a", b"2", if_absent=True).accepted()
    expect(site.get("a").accepted().body == b"2", "the object has another content")


@S3_CREATE.check(
    "s3-match-stale",
    NEEDED,
    rule="PutObject with an If-Match that is not the object's ETag returns 412 PreconditionFailed.",
    source="S3 User Guide, conditional writes",
    promise="I4, Objects.put(if_match)",
    otherwise="a late resume undoes a cancellation",
)
def match_stale(site: Site) -> None:
    stale = str(site.put("a", b"1").accepted().data.get("ETag"))
    current = str(site.put("a", b"2").accepted().data.get("ETag"))
    site.put("a", b"3", IfMatch=stale).refused(412, "PreconditionFailed")
    site.put("a", b"4", IfMatch=current).accepted()


@S3_CREATE.check(
    "s3-match-missing",
    NEEDED,
    rule="PutObject with If-Match on a free key returns 404 NoSuchKey.",
    source="S3 User Guide, conditional writes",
    promise="I4, Objects.put(if_match)",
    otherwise="a late resume undoes a cancellation",
)
def match_missing(site: Site) -> None:
    etag = hashlib.md5(b"1", usedforsecurity=False).hexdigest()
    site.put("a", b"1", IfMatch=f'"{etag}"').refused(404, "NoSuchKey")


@S3_CREATE.check(
    "s3-overwrite-whole",
    NEEDED,
    rule="A read during an overwrite returns the old or the new object, never a mixture.",
    source="S3 User Guide, data consistency model",
    promise="Objects: a key has one complete object or none",
    otherwise="a worker may read half a control object",
)
def overwrite_whole(site: Site) -> None:
    size = 200_000
    site.put("a", b"\0" * size).accepted()
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 16):
                site.put("a", bytes([number]) * size).accepted()
        finally:
            done.set()

    with ThreadPoolExecutor(1, thread_name_prefix="conform-write") as threads:
        writing = threads.submit(write)
        while not done.is_set():
            body = site.get("a").accepted().body
            expect(len(body) == size and len(set(body)) == 1, "a read gives a mixture")
        writing.result()


@S3_CREATE.check(
    "s3-put-empty",
    NEEDED,
    rule="An object may have zero bytes.",
    source="S3 API, PutObject",
    promise="Objects.put",
    otherwise="empty inputs and results are lost",
)
def put_empty(site: Site) -> None:
    site.put("a", b"").accepted()
    found = site.head("a").accepted()
    expect(found.data.get("ContentLength") == 0, "its size is not 0")
    expect(site.get("a").accepted().body == b"", "it is not empty")


@S3_CREATE.check(
    "s3-etag-agrees",
    NEEDED,
    rule="PutObject, HeadObject, GetObject, and ListObjectsV2 return the same ETag.",
    source="S3 API, Object",
    promise="Objects.head, list, and get_if_changed",
    otherwise="workers read the control object every time, or never again",
)
def etag_agrees(site: Site) -> None:
    etag = site.put("a", b"1").accepted().data.get("ETag")
    expect(bool(etag), "PutObject gives none")
    listed = site.page().data.get("Contents", ({},))[0]
    for call, data in (
        ("HeadObject", site.head("a").accepted().data),
        ("GetObject", site.get("a").accepted().data),
        ("ListObjectsV2", listed),
    ):
        expect(data.get("ETag") == etag, f"{call} gives another one")


@S3_CREATE.check(
    "s3-etag-changes",
    NEEDED,
    rule="An overwrite with different content changes the ETag.",
    source="S3 API, Object",
    promise="I4, Objects.get_if_changed",
    otherwise="workers do not notice a cancellation",
)
def etag_changes(site: Site) -> None:
    etags = {site.put("a", word).accepted().data.get("ETag") for word in (b"run", b"cancel")}
    expect(len(etags) == 2, "it stays the same")


@S3_CREATE.check(
    "s3-etag-md5",
    NOTED,
    rule="The ETag of an object from one PutObject is the MD5 of its bytes, in quotes "
    "(except with SSE-C and SSE-KMS).",
    source="S3 API, Object",
    promise="none: an ETag is opaque to batchlab",
    otherwise="nothing",
)
def etag_md5(site: Site) -> None:
    md5 = hashlib.md5(b"1", usedforsecurity=False).hexdigest()
    found = site.put("a", b"1").accepted().data
    if str(found.get("ServerSideEncryption", "AES256")) != "AES256":
        raise Untried("the bucket encrypts by KMS")
    expect(found.get("ETag") == f'"{md5}"', "it is something else")


@S3_CREATE.check(
    "s3-put-damaged",
    NOTED,
    rule="PutObject with a CRC32 that does not match the body returns 400 BadDigest and "
    "stores nothing.",
    source="S3 User Guide, checking object integrity",
    promise="results arrive as they were computed",
    otherwise="a body that was damaged in transit is stored",
)
def put_damaged(site: Site) -> None:
    site.put("a", b"1", ChecksumCRC32="AAAAAA==").refused(400, "BadDigest")
    if site.head("a").status != 404:
        raise Differs("refused, but stored")
