"""Raw input objects become task items, one after the other in constant memory.

Invariant: items come in the order of the keys and of their bytes; every byte beyond the header is
in exactly one part, and no record is cut. So a plan that is made again is the same plan.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from io import BytesIO

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import Json
from batchlab.core.ports import ObjectInfo, Objects
from batchlab.core.protocol import values

READ_BYTES = 8 * 1024 * 1024
"""Range that is read at once where everything is read."""
ITEMS_BYTES = 1024 * 1024
"""Range that is read at once for items: reading a line as JSON takes longer than fetching it."""
PEEK_BYTES = 64 * 1024
"""First range that is read around a boundary where the rest is not looked at."""
_PEEK_FROM = 16 * PEEK_BYTES
"""Parts smaller than this are cheaper to read through: requests cost more than bytes."""
_HEADS = 32
_BOM = b"\xef\xbb\xbf"
_NEWLINE = b"\n"


async def items(objects: Objects, raw: InputDef) -> AsyncIterator[Json]:
    """The encoded input of one task after the other.

    FILE gives `{"$file": key, "name", "size"}`; LINES and BYTES `{"$part": key, "start", "stop",
    "header": [0, end] or None, "name"}` (byte offsets), never of an empty part; ITEMS the values
    of JSON Lines. UsageError where an object is gone or a line is no JSON; BackendError as the
    port raises it.
    """
    async for info in _objects(objects, raw.keys):
        name = info.key.rsplit("/", 1)[-1]
        if raw.split is SplitBy.FILE:
            yield values.file_ref(info.key, name, info.size)
        elif raw.split is SplitBy.ITEMS:
            async for value in _items(objects, info, raw.size):
                yield value
        else:
            async for start, stop, header in _parts(objects, info, raw):
                span = (0, header) if header else None
                yield values.part_ref(info.key, start, stop, name=name, header=span)


async def _objects(objects: Objects, keys: Sequence[str]) -> AsyncIterator[ObjectInfo]:
    """Every input object in order; a key that ends in "/" stands for all objects under it."""
    for first in range(0, len(keys), _HEADS):
        window = keys[first : first + _HEADS]
        known = iter(
            await asyncio.gather(*(objects.head(key) for key in window if not key.endswith("/")))
        )
        for key in window:
            if key.endswith("/"):
                async for info in _under(objects, key):
                    yield info
                continue
            found = next(known)
            if found is None:
                raise _gone(key)
            yield found


async def _under(objects: Objects, prefix: str) -> AsyncIterator[ObjectInfo]:
    empty = True
    async for page in objects.list(prefix):
        for info in page:
            # The S3 console marks a folder by an empty object of that name.
            if not info.key.endswith("/"):
                empty = False
                yield info
    if empty:
        raise UsageError(
            f"There is no input object under {prefix}.", remedy="Check the prefix, then run again."
        )


def _gone(key: str) -> UsageError:
    return UsageError(
        f"The input object {key} is gone, or became shorter while it was read.",
        remedy="Submit the job again: files are then uploaded again.",
    )


# --- Parts of text -------------------------------------------------------------------------------


async def _parts(
    objects: Objects, info: ObjectInfo, how: InputDef
) -> AsyncIterator[tuple[int, int, int]]:
    """(start, stop, end of the header or 0) of each part."""
    peek = how.split is SplitBy.BYTES and how.size >= _PEEK_FROM
    text = _Text(objects, info, PEEK_BYTES if peek else READ_BYTES)
    header = await text.skip(0, 1) if how.header else 0
    start = header
    while start < info.size:
        if how.split is SplitBy.LINES:
            stop = await text.skip(start, how.size)
        elif start + how.size >= info.size:
            stop = info.size
        else:
            stop = await text.end_before(start, start + how.size)
        yield start, stop, header
        start = stop


class _Text:
    """An object seen through the range of it that was read last.

    `read_bytes` is the range to read at first; a search that finds nothing doubles it.
    """

    def __init__(self, objects: Objects, info: ObjectInfo, read_bytes: int) -> None:
        self._objects = objects
        self._info = info
        self._read_bytes = read_bytes
        self._at = 0
        self._data = b""

    async def skip(self, at: int, count: int) -> int:
        """Where the `count` records from `at` on end, or the end of the object."""
        length = self._read_bytes
        while count and at < self._info.size:
            if not self._at <= at < self._at + len(self._data):
                await self._load(at, length)
                length = min(2 * length, READ_BYTES)
            position, count = _skip(self._data, at - self._at, count)
            at = self._at + position
        return at

    async def end_before(self, start: int, limit: int) -> int:
        """The last end of a record in (start, limit], the first after it if there is none."""
        length = self._read_bytes
        stop = limit
        while stop > start:
            if not self._at < stop <= self._at + len(self._data):
                # A range longer than the part reaches beyond it, and serves the parts after it.
                await self._load(max(start, stop - length), length)
                length = min(2 * length, READ_BYTES)
            newline = self._data.rfind(_NEWLINE, max(start - self._at, 0), stop - self._at)
            if newline >= 0:
                return self._at + newline + 1
            stop = max(start, self._at)
        return await self.skip(limit, 1)

    async def _load(self, at: int, length: int) -> None:
        try:
            data = await self._objects.get_range(
                self._info.key, at, min(at + length, self._info.size)
            )
        except NotFound as error:
            raise _gone(self._info.key) from error
        if not data:
            raise _gone(self._info.key)
        self._at, self._data = at, data


def _skip(data: bytes, at: int, count: int) -> tuple[int, int]:
    """(position after `count` newlines from `at`, 0), or (end of data, how many are missing).

    Counting a range is an order of magnitude faster than finding each newline, so all but the
    last few are counted, in ranges that are guessed from the length of the lines before.
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


async def _items(objects: Objects, info: ObjectInfo, size: int) -> AsyncIterator[Json]:
    group: list[Json] = []
    number = 0
    async for block in _blocks(objects, info):
        # One after the other: a block may hold millions, each with an object's overhead.
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
    """The object in blocks of whole lines."""
    carried: list[bytes] = []
    at = 0
    length = min(READ_BYTES, ITEMS_BYTES)
    while at < info.size:
        try:
            data = await objects.get_range(info.key, at, min(at + length, info.size))
        except NotFound as error:
            raise _gone(info.key) from error
        if not data:
            raise _gone(info.key)
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
        raise UsageError(f"{where} is not JSON: {_reason(error)}.", remedy=remedy) from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:]} at column {error.colno}"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
