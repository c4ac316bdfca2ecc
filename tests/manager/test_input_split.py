"""The split of raw input into tasks, which loses, doubles, or cuts no record."""

from __future__ import annotations

import asyncio
import json
import re
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import Json
from batchlab.core.ports import ObjectInfo, Objects
from batchlab.core.protocol import values
from batchlab.manager import input_split


class Bucket:
    """The read methods of an Objects port, which record the requested ranges."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.reads: list[tuple[int, int]] = []

    async def head(self, key: str) -> ObjectInfo | None:
        await asyncio.sleep(0)
        return ObjectInfo(key, len(self.content[key]), "") if key in self.content else None

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        await asyncio.sleep(0)
        if key not in self.content:
            raise NotFound(f"no {key}")
        self.reads.append((start, stop))
        return self.content[key][start:stop]

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        keys = sorted(key for key in self.content if key.startswith(prefix) and key > after)
        for key in keys:
            yield [ObjectInfo(key, len(self.content[key]), "")]


def tasks(content: dict[str, bytes] | Bucket, by: SplitBy, size: int = 1, **more: Any) -> list[Json]:
    bucket = content if isinstance(content, Bucket) else Bucket(content)
    keys = more.pop("keys", tuple(bucket.content))

    async def collect() -> list[Json]:
        given = InputDef(keys, by, size, **more)
        return [item async for item in input_split.items(cast(Objects, bucket), given)]

    return asyncio.run(collect())


def records(data: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


line = st.one_of(st.text(max_size=6), st.text("ab,é\t \r", max_size=30)).map(
    lambda text: text.replace("\n", "").encode("utf-8", "surrogatepass")
)
mixed = st.builds(
    lambda lines, ending, last: ending.join(lines) + last,
    st.lists(line, max_size=25),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
)
content = mixed | st.text("a\n", max_size=120).map(str.encode)
ranges = st.sampled_from([(1, 1, 1), (3, 2, 5), (16, 4, 8), (64, 8, 1), (1 << 20, 1 << 16, 1 << 20)])
"""Triples (READ_BYTES, PEEK_BYTES, smallest peeked size). The small values make every search cross a boundary."""


def parts_of(data: bytes, by: SplitBy, size: int, header: bool, ranges: tuple[int, int, int]) -> list[Json]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_split, "READ_BYTES", ranges[0])
        patch.setattr(input_split, "PEEK_BYTES", ranges[1])
        patch.setattr(input_split, "_PEEK_FROM", ranges[2])
        found = tasks({"raw/a.txt": data}, by, size, header=header)
    for item in found:
        assert item == {**item, "$part": "raw/a.txt", "name": "a.txt"}
    return found


def check_parts(data: bytes, header: bool, found: list[Json]) -> list[list[bytes]]:
    """Check that the parts form the file, and return the records of each part."""
    first = records(data)[:1] if header else []
    body = data[len(b"".join(first)) :]
    pieces = [data[item["start"] : item["stop"]] for item in found]
    assert b"".join(pieces) == body
    assert all(pieces)
    cut = [records(piece) for piece in pieces]
    assert [record for piece in cut for record in piece] == records(body)
    for item in found:
        expected = [0, len(first[0])] if first else None
        assert item["header"] == expected
    return cut


@given(content, st.integers(1, 40), st.booleans(), ranges)
def test_lines_give_every_record_to_one_task_of_at_most_size_records(
    data: bytes, size: int, header: bool, ranges: tuple[int, int, int]
) -> None:
    cut = check_parts(data, header, parts_of(data, SplitBy.LINES, size, header, ranges))
    assert all(len(piece) == size for piece in cut[:-1])
    assert all(len(piece) <= size for piece in cut)


@given(content, st.integers(1, 60), st.booleans(), ranges)
def test_bytes_give_every_record_to_one_task_as_full_as_size_allows(
    data: bytes, size: int, header: bool, ranges: tuple[int, int, int]
) -> None:
    cut = check_parts(data, header, parts_of(data, SplitBy.BYTES, size, header, ranges))
    for piece in cut:
        assert len(b"".join(piece)) <= size or len(piece) == 1
    for piece, following in pairwise(cut):
        assert len(b"".join([*piece, following[0]])) > size


def test_lines_that_end_with_their_range_leave_what_follows_to_the_next_part() -> None:
    for count in range(1, 100):
        found = tasks({"a": b"1\n" * count + b"rest"}, SplitBy.LINES, count)
        assert [item["stop"] for item in found] == [2 * count, 2 * count + 4]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["$file", "$$x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    st.lists(json_values, max_size=12),
    st.integers(1, 5),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_items_round_trip_in_order(given_values: list[Any], size: int, ending: bytes, ended: bool, read: int) -> None:
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in given_values]
    data = ending.join(lines) + (ending if ended else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_split, "READ_BYTES", read)
        found = tasks({"a": data}, SplitBy.ITEMS, size)
    decoded = [values.decode(item, no_file, pickles=True) for item in found]
    if size > 1:
        assert all(len(group) == size for group in decoded[:-1])
        decoded = [value for group in decoded for value in group]
    assert decoded == given_values


def no_file(reference: Json) -> Any:
    raise AssertionError(f"{reference} was taken for a file")


def test_a_file_is_one_task_even_when_it_is_empty() -> None:
    found = tasks({"raw/j/x/a.csv": b"12", "raw/j/b": b""}, SplitBy.FILE)
    assert found == [
        {"$file": "raw/j/x/a.csv", "name": "a.csv", "size": 2},
        {"$file": "raw/j/b", "name": "b", "size": 0},
    ]


@pytest.mark.parametrize("by", [SplitBy.LINES, SplitBy.BYTES, SplitBy.ITEMS])
def test_an_empty_file_gives_no_part(by: SplitBy) -> None:
    assert tasks({"a": b""}, by, 10) == []


@pytest.mark.parametrize("by", [SplitBy.LINES, SplitBy.BYTES])
@pytest.mark.parametrize("data", [b"name,paid\n", b"name,paid", b"name,paid\r\n"])
def test_a_file_of_a_header_alone_gives_no_part(by: SplitBy, data: bytes) -> None:
    assert tasks({"a": data}, by, 10, header=True) == []


def test_files_keep_their_order_and_a_part_never_spans_two() -> None:
    found = tasks({"b": b"1\n2\n3\n", "a": b"4\n"}, SplitBy.LINES, 2)
    assert [(item["$part"], item["start"], item["stop"]) for item in found] == [("b", 0, 4), ("b", 4, 6), ("a", 0, 2)]


def test_more_keys_than_are_looked_up_at_once_keep_their_order() -> None:
    content = {f"raw/{i * 7 % 100:03d}": b"x" for i in range(100)}
    assert [item["$file"] for item in tasks(content, SplitBy.FILE)] == list(content)


def test_a_key_that_ends_in_a_slash_stands_for_all_objects_under_it() -> None:
    content = {"in/": b"", "in/b": b"1", "in/a/c": b"2", "other": b"3", "z": b"4"}
    found = tasks(content, SplitBy.FILE, keys=("z", "in/", "other"))
    assert [item["$file"] for item in found] == ["z", "in/a/c", "in/b", "other"]


def test_an_empty_prefix_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match="prefix in/ does not contain input objects"):
        tasks({"in/": b""}, SplitBy.FILE, keys=("in/",))


@pytest.mark.parametrize("by", list(SplitBy))
def test_a_vanished_object_is_an_error_that_names_it(by: SplitBy) -> None:
    """The job ends with a reason and does not hang (I7)."""
    with pytest.raises(UsageError, match="raw/a does not exist"):
        tasks({}, by, 10, keys=("raw/a",))


@pytest.mark.parametrize("by", [SplitBy.LINES, SplitBy.BYTES, SplitBy.ITEMS])
@pytest.mark.parametrize("left", [b"", None])
def test_an_object_that_shrinks_or_vanishes_while_it_is_read_is_an_error(by: SplitBy, left: bytes | None) -> None:
    class Shrinking(Bucket):
        async def head(self, key: str) -> ObjectInfo | None:
            info = await super().head(key)
            if left is None:
                del self.content[key]
            else:
                self.content[key] = left
            return info

    with pytest.raises(UsageError, match="does not exist, or became shorter"):
        tasks(Shrinking({"a": b"1\n" * 9}), by, 4)


@pytest.mark.parametrize(
    ("data", "number", "reason"),
    [
        (b'{"a": 1}\n\n{"a": \n', 3, "expecting value at column 7"),
        (b"1\n2 3\n", 2, "extra data at column 3"),
        (b'1\n"\xff"\n', 2, "it is not UTF-8 text"),
        (b"1\r\n\r\nNaN", 3, "nan"),
        (b"1e999\n", 1, "inf"),
        (b'"\\ud800"', 1, "UTF-8 cannot represent"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b"9" * 5000, 1, "4300 digits"),
    ],
)
def test_a_malformed_line_is_named_with_its_number_and_reason(data: bytes, number: int, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        tasks({"raw/a.jsonl": data}, SplitBy.ITEMS)
    assert f"Line {number} of raw/a.jsonl" in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.remedy


def test_line_numbers_count_across_reads() -> None:
    data = b"[1, 2]\n" * 5 + b"\n" * 3 + b"oops"
    for read in range(1, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(input_split, "READ_BYTES", read)
            with pytest.raises(UsageError, match="Line 9 of"):
                tasks({"a": data}, SplitBy.ITEMS)


def test_a_byte_order_mark_before_the_first_item_is_passed_over() -> None:
    assert tasks({"a": b"\xef\xbb\xbf1\n2\n"}, SplitBy.ITEMS) == [1, 2]


@pytest.mark.slow
def test_memory_is_a_few_times_the_range_that_is_read_however_short_the_lines() -> None:
    bucket = Bucket({"a": b"1\n" * 400_000})

    async def count() -> int:
        given = InputDef(("a",), SplitBy.ITEMS, 1)
        return len([None async for _ in input_split.items(cast(Objects, bucket), given)])

    tracemalloc.start()
    try:
        assert asyncio.run(count()) == 400_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The list of counted records is half of the peak memory. An object per line would add 14 MB.
    assert peak < 10_000_000


def test_large_parts_are_cut_by_a_look_around_their_ends_only() -> None:
    """Requests and bytes are billed. A part of 8 MiB needs reads of 64 KiB instead of the whole file."""
    bucket = Bucket({"a": b"x" * 99 + b"\n"})
    bucket.content["a"] *= 500_000
    found = tasks(bucket, SplitBy.BYTES, 8 << 20, header=True)
    assert len(found) == 6
    assert len(bucket.reads) == 6
    assert all(stop - start <= input_split.PEEK_BYTES for start, stop in bucket.reads)


@pytest.mark.parametrize(("by", "size"), [(SplitBy.LINES, 1000), (SplitBy.BYTES, 100_000)])
def test_small_parts_are_cut_in_few_large_reads(by: SplitBy, size: int) -> None:
    bucket = Bucket({"a": b"x" * 99 + b"\n"})
    bucket.content["a"] *= 320_000
    assert len(tasks(bucket, by, size)) == 320
    assert len(bucket.reads) == 4
    assert all(stop - start <= input_split.READ_BYTES for start, stop in bucket.reads)


def test_a_line_of_many_reads_is_one_part_and_read_in_growing_ranges() -> None:
    bucket = Bucket({"a": b"1\n" + b"x" * (20 << 20) + b"\n2\n"})
    found = tasks(bucket, SplitBy.BYTES, 1 << 20)
    assert [item["stop"] - item["start"] for item in found] == [2, (20 << 20) + 1, 2]
    assert len(bucket.reads) < 20
    assert all(stop - start <= input_split.READ_BYTES for start, stop in bucket.reads)
