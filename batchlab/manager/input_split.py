"""Splitting of raw input objects into task items, in constant memory.

Invariant: items follow the order of keys and bytes. Every byte after the header is in exactly one part, and each record
is in one part. Repeated planning of the same input produces the same plan.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from io import BytesIO

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import Json
from batchlab.core.ports import ObjectInfo, Objects
from batchlab.core.protocol import json_format, values

READ_BYTES = 8 * 1024 * 1024
"""Number of bytes per read request when a whole input object is read."""
ITEMS_BYTES = 1024 * 1024
"""Number of bytes per read request for an object with JSON items. The number is smaller than READ_BYTES, because
parsing JSON takes longer than reading."""
PEEK_BYTES = 64 * 1024
"""Number of bytes in the first read around a boundary when the rest of the part is not read."""
_PEEK_FROM = 16 * PEEK_BYTES
"""Minimum part size for reads around boundaries. Objects with smaller parts are read completely, because requests cost
more than bytes."""
_HEADS = 32
_BOM = b"\xef\xbb\xbf"
_NEWLINE = b"\n"


async def items(objects: Objects, raw: InputDef) -> AsyncIterator[Json]:
    """Yield the encoded input of each task.

    FILE yields `{"$file": key, "name", "size"}`. LINES and BYTES yield `{"$part": key, "start", "stop", "header": [0,
    end] or None, "name"}` with byte offsets, without empty parts. ITEMS yields the values of JSON Lines. Raise
    UsageError if an object does not exist or a line is not JSON.
    """
    read = _READERS[raw.split]
    async for info in _objects(objects, raw.keys):
        async for item in read(objects, info, raw):
            yield item


async def _objects(objects: Objects, keys: Sequence[str]) -> AsyncIterator[ObjectInfo]:
    """Yield every input object in the order of `keys`. An element of `keys` that ends in "/" is a prefix of object
    keys."""
    for first in range(0, len(keys), _HEADS):
        window = keys[first : first + _HEADS]
        object_infos = iter(await asyncio.gather(*(objects.head(key) for key in window if not key.endswith("/"))))
        for key in window:
            if key.endswith("/"):
                async for info in _under(objects, key):
                    yield info
                continue
            object_info = next(object_infos)
            if object_info is None:
                raise _missing_object(key)
            yield object_info


async def _under(objects: Objects, prefix: str) -> AsyncIterator[ObjectInfo]:
    empty = True
    async for page in objects.list(prefix):
        for info in page:
            # The S3 console marks a folder with an empty object named like the folder.
            if not info.key.endswith("/"):
                empty = False
                yield info
    if empty:
        raise UsageError(
            f"The prefix {prefix} does not contain input objects.", remedy="Check the prefix, then run again."
        )


def _missing_object(key: str) -> UsageError:
    return UsageError(
        f"The input object {key} does not exist, or became shorter while it was read.",
        remedy="Submit the job again: files are then uploaded again.",
    )


# --- Whole files, and parts of text --------------------------------------------------------------


async def _files(_objects: Objects, info: ObjectInfo, _raw: InputDef) -> AsyncIterator[Json]:
    yield values.file_ref(info.key, _name(info), info.size)


def _lines(objects: Objects, info: ObjectInfo, raw: InputDef) -> AsyncIterator[Json]:
    text = _Text(objects, info, READ_BYTES)
    return _parts(text, info, raw, lambda start: text.skip(start, raw.size))


def _bytes(objects: Objects, info: ObjectInfo, raw: InputDef) -> AsyncIterator[Json]:
    text = _Text(objects, info, PEEK_BYTES if raw.size >= _PEEK_FROM else READ_BYTES)
    return _parts(text, info, raw, lambda start: text.end_before(start, start + raw.size))


async def _parts(
    text: _Text, info: ObjectInfo, raw: InputDef, end_of: Callable[[int], Awaitable[int]]
) -> AsyncIterator[Json]:
    """Yield the parts of a text object. `end_of` returns the end of the part that begins at a given position."""
    start = await text.skip(0, 1) if raw.header else 0
    header = (0, start) if start else None
    while start < info.size:
        stop = await end_of(start)
        yield values.part_ref(info.key, start, stop, name=_name(info), header=header)
        start = stop


def _name(info: ObjectInfo) -> str:
    return info.key.rsplit("/", 1)[-1]


class _Text:
    """A text object, read through one cached range.

    `read_bytes` is the size of the first range that is read. Each search without a result doubles the range size.
    """

    def __init__(self, objects: Objects, info: ObjectInfo, read_bytes: int) -> None:
        self._objects = objects
        self._info = info
        self._read_bytes = read_bytes
        self._at = 0
        self._data = b""

    async def skip(self, at: int, count: int) -> int:
        """Return the position after `count` records from position `at`, or the end of the object."""
        length = self._read_bytes
        while count and at < self._info.size:
            if not self._at <= at < self._at + len(self._data):
                await self._load(at, length)
                length = min(2 * length, READ_BYTES)
            position, count = _skip_lines(self._data, at - self._at, count)
            at = self._at + position
        return at

    async def end_before(self, start: int, limit: int) -> int:
        """Return the position of the last end of a record in (start, limit], or of the first end of a record after
        `limit`."""
        if limit >= self._info.size:
            return self._info.size
        length = self._read_bytes
        stop = limit
        while stop > start:
            if not self._at < stop <= self._at + len(self._data):
                # A range that is longer than the current part also covers the next parts.
                await self._load(max(start, stop - length), length)
                length = min(2 * length, READ_BYTES)
            newline = self._data.rfind(_NEWLINE, max(start - self._at, 0), stop - self._at)
            if newline >= 0:
                return self._at + newline + 1
            stop = max(start, self._at)
        return await self.skip(limit, 1)

    async def _load(self, at: int, length: int) -> None:
        try:
            data = await self._objects.get_range(self._info.key, at, min(at + length, self._info.size))
        except NotFound as error:
            raise _missing_object(self._info.key) from error
        if not data:
            raise _missing_object(self._info.key)
        self._at, self._data = at, data


def _skip_lines(data: bytes, at: int, count: int) -> tuple[int, int]:
    """Return (position after `count` newlines from `at`, 0), or (end of data, number of missing newlines).

    The function counts all newlines but the last few, because counting newlines in a range is ten times faster than
    finding each newline. The length of the previous lines determines the size of the next counted range.
    """
    end = len(data)
    span = 32 * count
    while count > 8 and at < end:
        stop = min(at + span, end)
        seen = data.count(_NEWLINE, at, stop)
        if seen < count:
            span = int(0.9 * (stop - at) * (count - seen) / seen) + 1 if seen else 2 * span
            at, count = stop, count - seen
        else:
            span = (stop - at) // 2
    while count and at < end:
        newline = data.find(_NEWLINE, at)
        if newline < 0:
            return end, count
        at, count = newline + 1, count - 1
    return at, count


# --- Items ---------------------------------------------------------------------------------------


async def _items(objects: Objects, info: ObjectInfo, raw: InputDef) -> AsyncIterator[Json]:
    size = raw.size
    group: list[Json] = []
    number = 0
    async for block in _blocks(objects, info):
        # The loop reads one line at a time, because a block may have millions of lines and each line is a Python
        # object.
        for line in BytesIO(block):
            number += 1
            text = line.removesuffix(_NEWLINE)
            if number == 1:
                text = text.removeprefix(_BOM)
            if not text.strip():
                continue
            value = _value(text, info.key, number)
            if size == 1:
                yield value
                continue
            group.append(value)
            if len(group) == size:
                yield group
                group = []
    if group:
        yield group


async def _blocks(objects: Objects, info: ObjectInfo) -> AsyncIterator[bytes]:
    """Yield the content of the object in blocks of whole lines."""
    carried: list[bytes] = []
    at = 0
    length = min(READ_BYTES, ITEMS_BYTES)
    while at < info.size:
        try:
            data = await objects.get_range(info.key, at, min(at + length, info.size))
        except NotFound as error:
            raise _missing_object(info.key) from error
        if not data:
            raise _missing_object(info.key)
        at += len(data)
        cut = data.rfind(_NEWLINE) + 1
        if cut:
            yield b"".join([*carried, data[:cut]])
            carried = []
        carried.append(data[cut:])
    rest = b"".join(carried)
    if rest:
        yield rest


def _value(line: bytes, key: str, number: int) -> Json:
    remedy = "With split: items each line is one JSON value; split: lines takes any text."
    where = f"Line {number} of {key}"
    try:
        return values.encode(json.loads(line.decode()), what=where)
    except values.NotAValue as error:
        raise UsageError(error.message, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        if number == 1 and isinstance(error, json.JSONDecodeError) and line.lstrip().startswith(b"["):
            raise _array(key) from error
        raise UsageError(f"{where} is not JSON: {_reason(error)}.", remedy=remedy) from error


def _array(name: str) -> UsageError:
    return UsageError(
        f"{name} is one JSON array, and split: items reads JSON Lines, with one JSON value on each line.",
        remedy="`jq -c '.[]' data.json > data.jsonl` writes the values of an array as JSON Lines.",
    )


def check_items(beginning: bytes, name: str, *, is_whole: bool) -> None:
    """Raise UsageError if a file is not JSON Lines, according to its first line.

    `beginning` is the beginning of the file, or the whole file. A file with the suffix .json and only one line with an
    array is refused, because the file would be a single item. A long first line with an array counts as the only line.
    """
    lines = beginning.removeprefix(_BOM).split(_NEWLINE)
    if len(lines) == 1 and name.endswith(".json") and not is_whole and lines[0].lstrip().startswith(b"["):
        raise _array(name)
    # The last line of a beginning may be incomplete.
    texts = [(number, line) for number, line in enumerate(lines if is_whole else lines[:-1], 1) if line.strip()]
    for number, line in texts[:1]:
        _value(line, name, number)
        if is_whole and len(texts) == 1 and name.endswith(".json") and line.lstrip().startswith(b"["):
            raise _array(name)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{json_format.json_mistake(error)} at column {error.colno}"
    return json_format.brief(error)


_READERS: dict[SplitBy, Callable[[Objects, ObjectInfo, InputDef], AsyncIterator[Json]]] = {
    SplitBy.FILE: _files,
    SplitBy.LINES: _lines,
    SplitBy.BYTES: _bytes,
    SplitBy.ITEMS: _items,
}
"""Function that yields the items of one input object, by the way in which the object is split."""
