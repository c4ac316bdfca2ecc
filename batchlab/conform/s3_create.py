"""Conformance checks of S3 for conditional creates, overwrites, ETags, listings, and valid keys."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from batchlab.conform.check import Answer, Differs, Table, Untried, expect
from batchlab.conform.site import Site

RACERS = 16
ROUNDS = 12

S3_CREATE = Table("s3")


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes", promise="Objects.put(if_absent)", otherwise="commits fail"
)
def create_free(site: Site) -> None:
    """PutObject with If-None-Match: * on a free key stores the object."""
    site.put("a", b"first", if_absent=True).expect_accepted()
    expect(site.get("a").expect_accepted().body == b"first", "GetObject returns other content")


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="I1, Objects.put(if_absent)",
    otherwise="two workers both commit one bundle",
)
def create_taken(site: Site) -> None:
    """PutObject with If-None-Match: * on an existing key returns 412 PreconditionFailed and does not change the object,
    even if the object is empty or has the same content.
    """
    for key, before in (("full", b"first"), ("empty", b"")):
        site.put(key, before).expect_accepted()
        for data in (b"second", before):
            site.put(key, data, if_absent=True).expect_refused(412, "PreconditionFailed")
        expect(site.get(key).expect_accepted().body == before, "PutObject is refused, but changes the object")


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="I1, commit() after a lost response",
    otherwise="a worker cannot recognize its own commit after a lost response",
)
def create_repeated(site: Site) -> None:
    """A conditional PutObject that is repeated after its success is refused, and a read returns the content of the
    first call.
    """
    etag = site.put("a", b"mine", if_absent=True).expect_accepted().data.get("ETag")
    site.put("a", b"mine", if_absent=True).expect_refused(412, "PreconditionFailed")
    answer = site.get("a").expect_accepted()
    expect(answer.body == b"mine", "GetObject does not return the content of the first call")
    expect(answer.data.get("ETag") == etag, "the ETag differs from the ETag of the first call")


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="I1, Objects.put(if_absent)",
    otherwise="two workers both commit one bundle",
)
def create_race(site: Site) -> None:
    """When 16 conditional PutObject calls race for one key, one call succeeds. The other calls return 412, or 409
    ConditionalRequestConflict, after which the caller repeats the call.
    """
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
    winners = [racer for racer, answer in answers.items() if not answer.code]
    conflicts = 0
    for answer in answers.values():
        if answer.code == "ConditionalRequestConflict" and answer.status == 409:
            conflicts += 1
        elif answer.code:
            answer.expect_refused(412, "PreconditionFailed")
    if not winners and conflicts:
        # All competing calls may get a 409 conflict, after which a caller repeats the call. A repeated call without a
        # competing call must succeed.
        site.put(key, b"again", if_absent=True).expect_accepted()
        return
    expect(len(winners) == 1, "more than one call succeeds" if winners else "no call succeeds")
    expect(
        site.get(key).expect_accepted().body == str(winners[0]).encode(),
        "GetObject does not return the content of the successful call",
    )


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="Objects.put(if_absent)",
    otherwise="a deleted object can never be written again",
)
def create_after_delete(site: Site) -> None:
    """In a bucket without versioning, a conditional PutObject succeeds on a deleted key."""
    site.put("a", b"1", if_absent=True).expect_accepted()
    site.delete("a").expect_accepted()
    site.put("a", b"2", if_absent=True).expect_accepted()
    expect(site.get("a").expect_accepted().body == b"2", "GetObject returns other content")


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="I4, Objects.put(if_match)",
    otherwise="a late resume undoes a cancellation",
)
def match_stale(site: Site) -> None:
    """PutObject with an If-Match that is not the object's ETag returns 412 PreconditionFailed."""
    stale = str(site.put("a", b"1").expect_accepted().data.get("ETag"))
    current = str(site.put("a", b"2").expect_accepted().data.get("ETag"))
    site.put("a", b"3", IfMatch=stale).expect_refused(412, "PreconditionFailed")
    site.put("a", b"4", IfMatch=current).expect_accepted()


@S3_CREATE.needed(
    source="S3 User Guide, conditional writes",
    promise="I4, Objects.put(if_match)",
    otherwise="a late resume undoes a cancellation",
)
def match_missing(site: Site) -> None:
    """PutObject with If-Match on a free key returns 404 NoSuchKey."""
    etag = hashlib.md5(b"1", usedforsecurity=False).hexdigest()
    site.put("a", b"1", IfMatch=f'"{etag}"').expect_refused(404, "NoSuchKey")


@S3_CREATE.needed(
    source="S3 User Guide, data consistency model",
    promise="Objects: a key has one complete object or none",
    otherwise="a worker may read half a control object",
)
def overwrite_whole(site: Site) -> None:
    """A read during an overwrite returns the old or the new object, never a mixture."""
    size = 200_000
    site.put("a", b"\0" * size).expect_accepted()
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 16):
                site.put("a", bytes([number]) * size).expect_accepted()
        finally:
            done.set()

    with ThreadPoolExecutor(1, thread_name_prefix="conform-write") as threads:
        writing = threads.submit(write)
        while not done.is_set():
            body = site.get("a").expect_accepted().body
            expect(len(body) == size and len(set(body)) == 1, "GetObject returns a mixture of two objects")
        writing.result()


@S3_CREATE.needed(source="S3 API, PutObject", promise="Objects.put", otherwise="empty inputs and results are lost")
def put_empty(site: Site) -> None:
    """An object may have zero bytes."""
    site.put("a", b"").expect_accepted()
    answer = site.head("a").expect_accepted()
    expect(answer.data.get("ContentLength") == 0, "HeadObject returns a size other than 0")
    expect(site.get("a").expect_accepted().body == b"", "GetObject returns a body that is not empty")


@S3_CREATE.needed(
    source="S3 API, Object",
    promise="Objects.head, list, and get_if_changed",
    otherwise="workers read the control object before every task, or never again",
)
def etag_agrees(site: Site) -> None:
    """PutObject, HeadObject, GetObject, and ListObjectsV2 return the same ETag."""
    etag = site.put("a", b"1").expect_accepted().data.get("ETag")
    expect(bool(etag), "PutObject returns no ETag")
    listed = site.page().data.get("Contents", ({},))[0]
    for call, data in (
        ("HeadObject", site.head("a").expect_accepted().data),
        ("GetObject", site.get("a").expect_accepted().data),
        ("ListObjectsV2", listed),
    ):
        expect(data.get("ETag") == etag, f"{call} returns another ETag")


@S3_CREATE.needed(
    source="S3 API, Object", promise="I4, Objects.get_if_changed", otherwise="workers do not notice a cancellation"
)
def etag_changes(site: Site) -> None:
    """An overwrite with different content changes the ETag."""
    etags = {site.put("a", word).expect_accepted().data.get("ETag") for word in (b"run", b"cancel")}
    expect(len(etags) == 2, "the ETag stays the same")


@S3_CREATE.noted(source="S3 API, Object", promise="none: an ETag is opaque to batchlab")
def etag_md5(site: Site) -> None:
    """The ETag of an object from one PutObject is the MD5 of its bytes, in quotes (except with SSE-C and SSE-KMS)."""
    md5 = hashlib.md5(b"1", usedforsecurity=False).hexdigest()
    response = site.put("a", b"1").expect_accepted().data
    if str(response.get("ServerSideEncryption", "AES256")) != "AES256":
        raise Untried("the bucket encrypts with KMS")
    expect(response.get("ETag") == f'"{md5}"', "the ETag is not the MD5")


@S3_CREATE.noted(
    source="S3 User Guide, checking object integrity",
    promise="the bucket stores results as a worker computed them",
    otherwise="S3 stores a body that was damaged in transit",
)
def put_damaged(site: Site) -> None:
    """PutObject with a CRC32 that does not match the body returns 400 BadDigest and stores nothing."""
    site.put("a", b"1", ChecksumCRC32="AAAAAA==").expect_refused(400, "BadDigest")
    if site.head("a").status != 404:
        raise Differs("PutObject is refused, but stores the object")


MANY = 1100
AT_ONCE = 100

ODD_KEYS = (
    "a b",
    "grüße/日本",
    "😀",
    "100%25",
    "100%",
    "a+b=c&d",
    "x#y",
    "#1/z",
    "q?*[]{}^`",
    "t~'\"<>|",
    "..a",
    "a..",
    "\\",
    "a",
    "A",
    "a;b:c,d@e$f!(g)",
    "é",
    "e\u0301",
)
"""Object keys with unusual characters. The last two keys look the same, but consist of different characters."""

ORDERED = ("A", "B", "a", "a!", "a-b/x", "a.b", "a/b", "a0", "aa/b", "b/1", "b/10", "b/2")

S3_LIST = Table("s3")


def _fill(site: Site, *keys: str) -> None:
    for key in keys:
        site.put(key, b"1").expect_accepted()


@S3_LIST.needed(
    source="S3 User Guide, listing object keys",
    promise="Objects.list in key order",
    otherwise="a listing that continues after the last key skips objects",
)
def list_order(site: Site) -> None:
    """ListObjectsV2 returns keys in ascending order of their UTF-8 bytes."""
    _fill(site, *reversed(ORDERED))
    expect(site.keys() == sorted(ORDERED), "the keys have another order")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2", promise="Objects.list, I3", otherwise="a rebuilt ledger misses outcomes"
)
def list_pages(site: Site) -> None:
    """A page of a listing has at most MaxKeys keys. IsTruncated and NextContinuationToken lead to the next page, and
    all pages together contain each key once.
    """
    keys = [f"{number % 3}/{number:02d}" for number in range(25)]
    _fill(site, *keys)
    first = site.page(most=7)
    expect(len(site.keys_of(first)) == 7, "the first page does not contain MaxKeys keys")
    expect(bool(first.data.get("IsTruncated")), "IsTruncated is false on a page that is not the last")
    expect(bool(first.data.get("NextContinuationToken")), "NextContinuationToken is missing")
    expect(site.keys(most=7) == sorted(keys), "the pages miss or repeat keys")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2", promise="Objects.list, I3", otherwise="a rebuilt ledger misses outcomes"
)
async def list_1000(site: Site) -> None:
    """A page of a listing has at most 1,000 keys, and the next page continues after the last of these keys."""
    keys = [f"{number % 7}/{number:04d}" for number in range(MANY)]
    # The adapter creates the objects, because boto3 would need more time for 1,100 objects than all other checks take.
    for start in range(0, MANY, AT_ONCE):
        chunk = keys[start : start + AT_ONCE]
        await asyncio.gather(*(site.objects.put(site.own(key), b"1") for key in chunk))
    first = site.page()
    expect(len(site.keys_of(first)) <= 1000, "a page contains more than 1,000 keys")
    listed = site.keys()
    expect(all(a < b for a, b in pairwise(listed)), "pages repeat keys, or are not in order")
    expect(listed == sorted(keys), "the pages miss keys")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2",
    promise="Objects.list(after)",
    otherwise="the collector misses outcomes, or reads all outcomes every time",
)
def list_after(site: Site) -> None:
    """ListObjectsV2 with StartAfter skips all keys up to and including the given key, which does not need to exist."""
    _fill(site, *ORDERED)
    for after in (*ORDERED, "a/", "b/1/", "zzz"):
        expected = [key for key in sorted(ORDERED) if key > after]
        expect(site.keys(after=after) == expected, "StartAfter skips other keys")
    expected = [key for key in sorted(ORDERED) if key > "a"]
    expect(site.keys(after="a", most=3) == expected, "the pages after the first are wrong")


@S3_LIST.noted(
    source="S3 User Guide, listing object keys",
    promise="Objects.list(after): the grid passes only its own keys as StartAfter, and these keys are ASCII",
    otherwise="a listing that continues after the name of an input file misses some files",
)
def list_after_unicode(site: Site) -> None:
    """ListObjectsV2 with StartAfter compares keys by their UTF-8 bytes, even if the keys are not ASCII."""
    keys = ("a!", "aa", "aß", "日", "😀")
    _fill(site, *keys)
    for after in (*keys, "a", "a-"):
        expected = [key for key in sorted(keys, key=str.encode) if key.encode() > after.encode()]
        expect(site.keys(after=after) == expected, "StartAfter skips other keys")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2",
    promise="Objects.list, I2: users name their input files",
    otherwise="input files are missed or read twice",
)
def list_pages_unicode(site: Site) -> None:
    """The pages of a listing contain each key once and in order, even if the keys are not ASCII."""
    keys = sorted((*ODD_KEYS, *(f"ß{n}" for n in range(9)), "a!", "日"), key=str.encode)
    _fill(site, *keys)
    for most in (2, 5):
        expect(site.keys(most=most) == keys, "the pages miss or repeat keys, or are not in order")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2",
    promise="Objects.list(prefix)",
    otherwise="a job's listing contains objects of other jobs, or misses objects of the job",
)
def list_prefix(site: Site) -> None:
    """ListObjectsV2 compares the Prefix with keys character by character, and the Prefix does not need to end with a
    slash.
    """
    keys = ("p/a/1", "p/a/2", "p/ab/3", "p/b", "pa")
    _fill(site, *keys)
    for prefix in ("p", "p/", "p/a", "p/a/", "p/ab", "p/b", "p/a/2"):
        expected = [key for key in keys if key.startswith(prefix)]
        expect(site.keys(prefix) == expected, "the listing contains other keys")
    response = site.page("q/").data
    expect(not response.get("Contents") and response.get("KeyCount") == 0, "a listing without matches is not empty")


@S3_LIST.needed(
    source="S3 API, ListObjectsV2; S3 User Guide, data consistency model",
    promise="Objects.list, I3",
    otherwise="a ledger rebuilt while jobs run misses outcomes",
)
def list_changing(site: Site) -> None:
    """While other objects are created and deleted, a listing contains each unchanged key once."""
    keys = [f"k/{number:02d}" for number in range(20)]
    _fill(site, *keys)
    first = site.page(most=8)
    site.delete_many(keys[:5]).expect_accepted()
    site.put("k/00.5", b"1").expect_accepted()
    site.put("z", b"1").expect_accepted()
    listed = site.keys_of(first)
    token = first.data.get("NextContinuationToken", "")
    for _ in range(10):
        if not token:
            break
        page = site.page(most=8, token=token)
        listed += site.keys_of(page)
        token = page.data.get("NextContinuationToken", "")
    expect([key for key in listed if key in keys] == keys, "the pages miss or repeat keys")


@S3_LIST.needed(
    source="S3 User Guide, naming objects",
    promise="Objects: keys are UTF-8",
    otherwise="inputs and results with unusual names are lost or confused",
)
def keys_odd(site: Site) -> None:
    """A key is any sequence of Unicode characters. S3 returns a key as it was written, without changes of case,
    accents, or encoding.
    """
    for key in ODD_KEYS:
        answer = site.put(key, key.encode())
        expect(not answer.code, f"{key!r}: {answer}")
    for key in ODD_KEYS:
        expect(site.get(key).body == key.encode(), f"GetObject does not return {key!r}")
    listed = site.keys()
    expect(set(listed) == set(ODD_KEYS), "the listing contains other names")
    site.delete_many(ODD_KEYS).expect_accepted()
    expect(site.keys() == [], "some keys cannot be deleted by name")


@S3_LIST.noted(
    source="S3 User Guide, naming objects",
    promise="none: the keys of a grid are short, but users name input files",
    otherwise="a long file name that works on the emulator fails on AWS",
)
def key_length(site: Site) -> None:
    """A key has at most 1,024 bytes. A call with a longer key returns 400 KeyTooLongError."""
    # The key has segments, because some endpoints store each segment of a key as a file name.
    room = 1024 - len(site.named("")["Key"].encode())
    longest = ("x" * 99 + "/") * (room // 100) + "y" * (room % 100)
    site.put(longest, b"1").expect_accepted()
    site.put(longest + "z", b"1").expect_refused(400, "KeyTooLongError")


@S3_LIST.noted(
    source="S3 User Guide, naming objects",
    promise="none: the grid never uses a key and the same key with a suffix after a slash",
    otherwise="raw data with names such as a and a/b cannot be uploaded",
)
def key_below(site: Site) -> None:
    """The objects a and a/b may exist together, because a key is a name and not a path."""
    site.put("a", b"1").expect_accepted()
    site.put("a/b", b"2").expect_accepted()
    expect(site.get("a").body == b"1" and site.get("a/b").body == b"2", "an object is lost")
    expect(site.keys() == ["a", "a/b"], "an object is not listed")
