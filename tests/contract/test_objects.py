"""The contract of every Objects adapter, on which the commit of a bundle depends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise

import pytest

from batchlab.core.errors import AlreadyExists, NotFound, TooLarge
from tests.support.contract.objects_worlds import ObjectsWorld, on_every_bucket

EVERY_BYTE = bytes(range(256)) * 3


@on_every_bucket
async def test_object_is_returned_as_stored(world: ObjectsWorld) -> None:
    await world.objects.put("a/b/c.bin", EVERY_BYTE)
    assert await world.objects.get("a/b/c.bin") == EVERY_BYTE


@on_every_bucket
async def test_an_empty_object_is_an_object(world: ObjectsWorld) -> None:
    await world.objects.put("empty", b"")
    assert await world.objects.get("empty") == b""
    info = await world.objects.head("empty")
    assert info is not None
    assert info.size == 0


@on_every_bucket
async def test_a_put_replaces_the_object_and_its_etag(world: ObjectsWorld) -> None:
    first = await world.objects.put("a", b"one")
    second = await world.objects.put("a", b"three")
    assert await world.objects.get("a") == b"three"
    assert first != second


@on_every_bucket
async def test_put_head_list_and_get_agree_on_size_and_etag(world: ObjectsWorld) -> None:
    etag = await world.objects.put("x/y", b"12345")
    head = await world.objects.head("x/y")
    assert head is not None
    assert (head.key, head.size, head.etag) == ("x/y", 5, etag)
    assert [list(page) async for page in world.objects.list("x/")] == [[head]]
    assert await world.objects.get_if_changed("x/y", None) == (b"12345", etag)


@on_every_bucket
async def test_an_object_above_the_limit_is_not_read(world: ObjectsWorld) -> None:
    etag = await world.objects.put("x", b"12345")
    for read in (world.objects.get("x", limit=4), world.objects.get_if_changed("x", None, limit=4)):
        with pytest.raises(TooLarge):
            await read
    assert await world.objects.get_if_changed("x", None, limit=5) == (b"12345", etag)
    assert await world.objects.get_if_changed("x", etag, limit=4) is None


@on_every_bucket
async def test_conditional_create_fails_for_an_existing_object(world: ObjectsWorld) -> None:
    etag = await world.objects.put("outcome", b"first", if_absent=True)
    with pytest.raises(AlreadyExists) as caught:
        await world.objects.put("outcome", b"second", if_absent=True)
    assert "outcome" in str(caught.value)
    assert await world.objects.get_if_changed("outcome", None) == (b"first", etag)


@on_every_bucket
async def test_a_large_conditional_create_loses_too(world: ObjectsWorld) -> None:
    await world.objects.put("outcome", b"first" * 100_000, if_absent=True)
    with pytest.raises(AlreadyExists):
        await world.objects.put("outcome", b"second" * 100_000, if_absent=True)
    assert await world.objects.get("outcome") == b"first" * 100_000


@on_every_bucket
async def test_one_of_16_concurrent_conditional_creates_wins(world: ObjectsWorld) -> None:
    """Two workers that hold the same bundle must not both commit an outcome."""
    for size in (10, 200_000):
        key = f"outcome-{size}"

        async def create(who: int, key: str = key, size: int = size) -> int | None:
            try:
                await world.objects.put(key, bytes([who]) * size, if_absent=True)
            except AlreadyExists:
                return None
            return who

        results = await asyncio.gather(*(create(who) for who in range(16)))
        winners = [who for who in results if who is not None]
        assert len(winners) == 1
        assert await world.objects.get(key) == bytes(winners) * size


@on_every_bucket
async def test_an_object_is_overwritten_as_it_was_seen_or_not_at_all(world: ObjectsWorld) -> None:
    """A conditional overwrite needs the ETag of the last read. A late "run" must not replace "cancel" (I4)."""
    run = await world.objects.put("control", b"run")
    pause = await world.objects.put("control", b"pause", if_match=run)
    assert await world.objects.get_if_changed("control", None) == (b"pause", pause)
    await world.objects.put("control", b"cancel")
    with pytest.raises(AlreadyExists) as caught:
        await world.objects.put("control", b"run", if_match=pause)
    assert "control" in str(caught.value)
    assert await world.objects.get("control") == b"cancel"
    await world.objects.delete(["control"])
    with pytest.raises((AlreadyExists, NotFound)):
        await world.objects.put("control", b"run", if_match=pause)
    assert await world.keys() == []


@on_every_bucket
async def test_one_of_16_concurrent_conditional_overwrites_wins(world: ObjectsWorld) -> None:
    for size in (10, 200_000):
        seen = await world.objects.put("control", b"run")

        async def overwrite(who: int, seen: str = seen, size: int = size) -> int | None:
            try:
                await world.objects.put("control", bytes([who]) * size, if_match=seen)
            except AlreadyExists:
                return None
            return who

        results = await asyncio.gather(*(overwrite(who) for who in range(16)))
        winners = [who for who in results if who is not None]
        assert len(winners) == 1
        assert await world.objects.get("control") == bytes(winners) * size


@on_every_bucket
async def test_a_deleted_key_may_be_created_again(world: ObjectsWorld) -> None:
    await world.objects.put("a", b"1", if_absent=True)
    await world.objects.delete(["a"])
    await world.objects.put("a", b"2", if_absent=True)
    assert await world.objects.get("a") == b"2"
    assert await world.keys() == ["a"]


@on_every_bucket
async def test_missing_object_is_not_found(world: ObjectsWorld) -> None:
    await world.objects.put("folder/object", b"1")
    # The last three names are not objects in any store: a folder, a folder's parent, and a key below an object.
    for key in ("nothing", "folder", "folder/nothing", "folder/object/below"):
        reads: list[Callable[[], Awaitable[object]]] = [
            partial(world.objects.get, key),
            partial(world.objects.get_range, key, 0, 1),
            partial(world.objects.get_range, key, 1, 1),
            partial(world.objects.get_if_changed, key, None),
            partial(world.objects.get_if_changed, key, '"etag"'),
            partial(world.objects.download, key, world.folder / "down"),
        ]
        for read in reads:
            with pytest.raises(NotFound) as caught:
                await read()
            assert key in str(caught.value)
        assert await world.objects.head(key) is None


@on_every_bucket
async def test_a_range_is_cut_off_at_the_end_of_the_object(world: ObjectsWorld) -> None:
    await world.objects.put("ten", b"0123456789")
    expected = {(0, 3): b"012", (7, 20): b"789", (9, 10): b"9", (10, 12): b"", (50, 60): b""}
    expected |= {(4, 4): b"", (0, 10): b"0123456789"}
    for (start, stop), data in expected.items():
        assert await world.objects.get_range("ten", start, stop) == data


@on_every_bucket
async def test_a_range_of_an_empty_object_is_empty(world: ObjectsWorld) -> None:
    await world.objects.put("empty", b"")
    assert await world.objects.get_range("empty", 0, 1024) == b""


@on_every_bucket
async def test_an_unchanged_object_is_not_read_again(world: ObjectsWorld) -> None:
    etag = await world.objects.put("control", b"run")
    assert await world.objects.get_if_changed("control", etag) is None
    after = await world.objects.put("control", b"cancel")
    assert await world.objects.get_if_changed("control", etag) == (b"cancel", after)
    assert await world.objects.get_if_changed("control", after) is None


@on_every_bucket
async def test_a_listing_is_in_key_order(world: ObjectsWorld) -> None:
    keys = ["a!", "a", "a-b/x", "a-b/y/z", "a.b", "a0", "aa/b", "aß", "b/1", "b/10", "b/2", "C"]
    await world.fill(reversed(keys))
    assert await world.keys() == sorted(keys)
    for after in (*keys, "a/", "b/1/", "zzz", "B"):
        assert await world.keys(after=after) == sorted(key for key in keys if key > after)


@on_every_bucket
async def test_a_prefix_need_not_end_at_a_slash(world: ObjectsWorld) -> None:
    keys = ["p/a/1", "p/a/2", "p/ab/3", "p/b", "pa"]
    await world.fill(keys)
    for prefix in ("p", "p/", "p/a", "p/a/", "p/ab", "p/b", "p/a/2", "q/"):
        assert await world.keys(prefix) == [key for key in keys if key.startswith(prefix)]


@on_every_bucket
async def test_long_listings_are_paged_without_gaps_or_repetitions(world: ObjectsWorld) -> None:
    keys = [f"outcomes/{number % 7:02x}/{number:05d}.json" for number in range(world.many)]
    await world.fill(keys)
    pages = [list(page) async for page in world.objects.list("outcomes/")]
    assert all(0 < len(page) <= 1000 for page in pages)
    listed = [info.key for page in pages for info in page]
    assert listed == sorted(keys)
    assert all(before < after for before, after in pairwise(listed))
    assert await world.keys("outcomes/", after=listed[1034]) == listed[1035:]


@on_every_bucket
async def test_listing_nothing_gives_no_page(world: ObjectsWorld) -> None:
    assert [page async for page in world.objects.list("")] == []
    await world.objects.put("a/b", b"")
    assert [page async for page in world.objects.list("a/b/")] == []
    assert [page async for page in world.objects.list("nothing/")] == []


@on_every_bucket
async def test_listing_continues_during_puts_and_deletes(world: ObjectsWorld) -> None:
    keys = [f"k/{number:05d}" for number in range(world.many)]
    await world.fill(keys)
    seen: list[str] = []
    async for page in world.objects.list("k/"):
        seen += [info.key for info in page]
        if len(seen) == len(page):
            await world.objects.delete(keys[:10])
            await world.objects.put("k/00000.5", b"")
            await world.objects.put("z", b"")
    assert seen == keys


@on_every_bucket
async def test_delete_accepts_many_keys_and_ignores_missing_ones(world: ObjectsWorld) -> None:
    keys = [f"d/{number:04d}" for number in range(world.many)]
    await world.fill(keys)
    await world.objects.delete([])
    await world.objects.delete(["d/none", *keys[:1020], "none", "d/0001/below"])
    assert await world.keys() == keys[1020:]
    await world.objects.delete(keys)
    assert await world.keys() == []


@on_every_bucket
async def test_files_stream_up_and_down(world: ObjectsWorld) -> None:
    source, target = world.folder / "source", world.folder / "new" / "target"
    content = EVERY_BYTE * 30_000
    source.write_bytes(content)
    assert await world.objects.upload("raw/big", source) == len(content)
    head = await world.objects.head("raw/big")
    assert head is not None
    assert head.size == len(content)
    assert await world.objects.download("raw/big", target) == len(content)
    assert target.read_bytes() == content
    assert await world.objects.get("raw/big") == content
    assert await world.objects.get_if_changed("raw/big", None) == (content, head.etag)
    assert await world.objects.get_range("raw/big", 1000, 500_000) == content[1000:500_000]


@on_every_bucket
async def test_an_upload_replaces_the_object(world: ObjectsWorld) -> None:
    source = world.folder / "source"
    source.write_bytes(b"new")
    await world.objects.put("raw/a", b"older")
    assert await world.objects.upload("raw/a", source) == 3
    assert await world.objects.get("raw/a") == b"new"


@on_every_bucket
async def test_a_conditional_upload_replaces_nothing(world: ObjectsWorld) -> None:
    source = world.folder / "source"
    for key, size in (("files/whole", 3), ("files/in-parts", 9 * 1024 * 1024)):
        stored = random.Random(1).randbytes(size)
        source.write_bytes(stored)
        assert await world.objects.upload(key, source, if_absent=True) == size
        source.write_bytes(b"x" * size)
        with pytest.raises(AlreadyExists):
            await world.objects.upload(key, source, if_absent=True)
        assert await world.objects.get(key) == stored


@on_every_bucket
async def test_a_download_replaces_the_file_or_leaves_it_alone(world: ObjectsWorld) -> None:
    target = world.folder / "target"
    target.write_bytes(b"what was there before")
    with pytest.raises(NotFound):
        await world.objects.download("none", target)
    assert target.read_bytes() == b"what was there before"
    await world.objects.put("a", b"new")
    assert await world.objects.download("a", target) == 3
    assert target.read_bytes() == b"new"
    assert [path.name for path in world.folder.iterdir()] == ["target"]


@on_every_bucket
async def test_upload_of_a_missing_file_fails_and_stores_nothing(world: ObjectsWorld) -> None:
    with pytest.raises(FileNotFoundError):
        await world.objects.upload("raw/a", world.folder / "missing")
    assert await world.keys() == []


BAD_KEYS = ["", "/a", "a/", "a//b", "../a", "a/../b", "a/..", "./a", "a/.", "a\0b", "a\nb", "a#12"]


@on_every_bucket
async def test_keys_that_some_store_cannot_hold_are_refused_everywhere(world: ObjectsWorld) -> None:
    for key in BAD_KEYS:
        calls: list[Callable[[], Awaitable[object]]] = [
            partial(world.objects.put, key, b""),
            partial(world.objects.get, key),
            partial(world.objects.get_range, key, 0, 1),
            partial(world.objects.get_if_changed, key, None),
            partial(world.objects.head, key),
            partial(world.objects.delete, ["fine", key]),
            partial(world.objects.upload, key, world.folder / "x"),
            partial(world.objects.download, key, world.folder / "x"),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="object key"):
                await call()
    for prefix in ("/", "a//", "../", "a/../"):
        with pytest.raises(ValueError, match="object key"):
            await world.keys(prefix)
    assert list(world.folder.iterdir()) == []


@on_every_bucket
async def test_unusual_keys_are_keys(world: ObjectsWorld) -> None:
    keys = ["a b", "grüße/日本", "100%25", "a+b=c&d", "x#y", "#1/z", "q?*[]", "t~'\"<>|", "..a", "\\"]
    for key in keys:
        await world.objects.put(key, key.encode())
    for key in keys:
        assert await world.objects.get(key) == key.encode()
    assert await world.keys() == sorted(keys)
