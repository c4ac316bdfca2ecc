"""S3 checks: the order and the pages of listings, and valid keys."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from batchlab.conform.check import Severity, Table, expect
from batchlab.conform.site import Site

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

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
"""Keys with unusual characters. The last two look alike but differ."""

ORDERED = ("A", "B", "a", "a!", "a-b/x", "a.b", "a/b", "a0", "aa/b", "b/1", "b/10", "b/2")

S3_LIST = Table()


def _fill(site: Site, *keys: str) -> None:
    for key in keys:
        site.put(key, b"1").accepted()


@S3_LIST.check(
    "s3-list-order",
    NEEDED,
    rule="ListObjectsV2 returns keys in ascending order of their UTF-8 bytes.",
    source="S3 User Guide, listing object keys",
    promise="Objects.list in key order",
    otherwise="a listing that continues after the last key skips objects",
)
def list_order(site: Site) -> None:
    _fill(site, *reversed(ORDERED))
    expect(site.keys() == sorted(ORDERED), "the order is another")


@S3_LIST.check(
    "s3-list-pages",
    NEEDED,
    rule="A page has at most MaxKeys keys. IsTruncated and NextContinuationToken lead to the"
    " next page, and all pages together contain each key once.",
    source="S3 API, ListObjectsV2",
    promise="Objects.list, I3",
    otherwise="a rebuilt ledger misses outcomes",
)
def list_pages(site: Site) -> None:
    keys = [f"{number % 3}/{number:02d}" for number in range(25)]
    _fill(site, *keys)
    first = site.page(most=7)
    expect(len(site.keys_of(first)) == 7, "the first page does not hold MaxKeys keys")
    expect(bool(first.data.get("IsTruncated")), "a page that is not the last says it is")
    expect(bool(first.data.get("NextContinuationToken")), "it gives no token for the next page")
    expect(site.keys(most=7) == sorted(keys), "the pages miss or repeat keys")


@S3_LIST.check(
    "s3-list-1000",
    NEEDED,
    rule="A page has at most 1,000 keys, and the next page continues after it.",
    source="S3 API, ListObjectsV2",
    promise="Objects.list, I3",
    otherwise="a rebuilt ledger misses outcomes",
)
async def list_1000(site: Site) -> None:
    keys = [f"{number % 7}/{number:04d}" for number in range(MANY)]
    # Use the adapter, because boto3 would need more time for 1,100 objects than all other checks.
    for start in range(0, MANY, AT_ONCE):
        some = keys[start : start + AT_ONCE]
        await asyncio.gather(*(site.objects.put(site.own(key), b"1") for key in some))
    first = site.page()
    expect(len(site.keys_of(first)) <= 1000, "a page holds more than 1,000 keys")
    found = site.keys()
    expect(all(a < b for a, b in pairwise(found)), "pages repeat keys, or are not in order")
    expect(found == sorted(keys), "the pages miss keys")


@S3_LIST.check(
    "s3-list-after",
    NEEDED,
    rule="StartAfter skips all keys up to and including the given key, which does not need "
    "to exist.",
    source="S3 API, ListObjectsV2",
    promise="Objects.list(after)",
    otherwise="the collector misses outcomes, or reads all of them every time",
)
def list_after(site: Site) -> None:
    _fill(site, *ORDERED)
    for after in (*ORDERED, "a/", "b/1/", "zzz"):
        expected = [key for key in sorted(ORDERED) if key > after]
        expect(site.keys(after=after) == expected, "it skips other keys")
    expected = [key for key in sorted(ORDERED) if key > "a"]
    expect(site.keys(after="a", most=3) == expected, "the pages after the first are wrong")


@S3_LIST.check(
    "s3-list-after-unicode",
    NOTED,
    rule="StartAfter compares keys by their UTF-8 bytes, also for non-ASCII keys.",
    source="S3 User Guide, listing object keys",
    promise="Objects.list(after): the grid uses only its own keys here, which are ASCII",
    otherwise="a listing that continues after the name of an input file misses some files",
)
def list_after_unicode(site: Site) -> None:
    keys = ("a!", "aa", "aß", "日", "😀")
    _fill(site, *keys)
    for after in (*keys, "a", "a-"):
        expected = [key for key in sorted(keys, key=str.encode) if key.encode() > after.encode()]
        expect(site.keys(after=after) == expected, "it skips other keys")


@S3_LIST.check(
    "s3-list-pages-unicode",
    NEEDED,
    rule="Pages contain each key once and in order, also for non-ASCII keys.",
    source="S3 API, ListObjectsV2",
    promise="Objects.list, I2: users name their input files",
    otherwise="input files are missed or read twice",
)
def list_pages_unicode(site: Site) -> None:
    keys = sorted((*ODD_KEYS, *(f"ß{n}" for n in range(9)), "a!", "日"), key=str.encode)
    _fill(site, *keys)
    for most in (2, 5):
        expect(site.keys(most=most) == keys, "the pages miss or repeat keys, or are not in order")


@S3_LIST.check(
    "s3-list-prefix",
    NEEDED,
    rule="Prefix is compared by character and does not need to end with a slash.",
    source="S3 API, ListObjectsV2",
    promise="Objects.list(prefix)",
    otherwise="a job's listing contains objects of other jobs, or misses its own",
)
def list_prefix(site: Site) -> None:
    keys = ("p/a/1", "p/a/2", "p/ab/3", "p/b", "pa")
    _fill(site, *keys)
    for prefix in ("p", "p/", "p/a", "p/a/", "p/ab", "p/b", "p/a/2"):
        expected = [key for key in keys if key.startswith(prefix)]
        expect(site.keys(prefix) == expected, "it gives other keys")
    found = site.page("q/").data
    expect(not found.get("Contents") and found.get("KeyCount") == 0, "nothing is not nothing")


@S3_LIST.check(
    "s3-list-changing",
    NEEDED,
    rule="While other objects are created and deleted, a listing contains each unchanged key once.",
    source="S3 API, ListObjectsV2; S3 User Guide, data consistency model",
    promise="Objects.list, I3",
    otherwise="a ledger rebuilt while jobs run misses outcomes",
)
def list_changing(site: Site) -> None:
    keys = [f"k/{number:02d}" for number in range(20)]
    _fill(site, *keys)
    first = site.page(most=8)
    site.delete_many(keys[:5]).accepted()
    site.put("k/00.5", b"1").accepted()
    site.put("z", b"1").accepted()
    found = site.keys_of(first)
    token = first.data.get("NextContinuationToken", "")
    for _ in range(10):
        if not token:
            break
        page = site.page(most=8, token=token)
        found += site.keys_of(page)
        token = page.data.get("NextContinuationToken", "")
    expect([key for key in found if key in keys] == keys, "it misses or repeats keys")


@S3_LIST.check(
    "s3-keys-odd",
    NEEDED,
    rule="A key is any sequence of Unicode characters. It is returned as it was written, "
    "without changes of case, accents, or encoding.",
    source="S3 User Guide, naming objects",
    promise="Objects: keys are UTF-8",
    otherwise="inputs and results with such names are lost or confused",
)
def keys_odd(site: Site) -> None:
    for key in ODD_KEYS:
        found = site.put(key, key.encode())
        expect(not found.code, f"{key!r}: {found}")
    for key in ODD_KEYS:
        expect(site.get(key).body == key.encode(), f"{key!r} does not come back")
    listed = site.keys()
    expect(set(listed) == set(ODD_KEYS), "a listing gives other names")
    site.delete_many(ODD_KEYS).accepted()
    expect(site.keys() == [], "some cannot be deleted by their names")


@S3_LIST.check(
    "s3-key-length",
    NOTED,
    rule="A key has at most 1,024 bytes. A longer key returns 400 KeyTooLongError.",
    source="S3 User Guide, naming objects",
    promise="none: the keys of a grid are short, but users name input files",
    otherwise="a name that works here fails on AWS",
)
def key_length(site: Site) -> None:
    # Use segments, because some endpoints store each segment as a file with its name.
    room = 1024 - len(site.named("")["Key"].encode())
    longest = ("x" * 99 + "/") * (room // 100) + "y" * (room % 100)
    site.put(longest, b"1").accepted()
    site.put(longest + "z", b"1").refused(400, "KeyTooLongError")


@S3_LIST.check(
    "s3-key-below",
    NOTED,
    rule="The objects a and a/b may exist together, because a key is a name and not a path.",
    source="S3 User Guide, naming objects",
    promise="none: the grid never uses a key and the same key with a suffix after a slash",
    otherwise="raw data with such names cannot be uploaded",
)
def key_below(site: Site) -> None:
    site.put("a", b"1").accepted()
    site.put("a/b", b"2").accepted()
    expect(site.get("a").body == b"1" and site.get("a/b").body == b"2", "one is lost")
    expect(site.keys() == ["a", "a/b"], "one is not listed")
