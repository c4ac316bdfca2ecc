"""Files and large values of results: files are written to a folder, and values are read.

Invariants: a file is written to the folder of its own task, whatever its name is. Nothing is read
beyond the granted limits (`Within`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from batchlab.core.errors import UsageError
from batchlab.core.model import Json
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, values
from batchlab.core.protocol.references import Own
from batchlab.core.retry import Patience
from batchlab.core.task_context import name_problem
from batchlab.core.text import size

VALUES_AT_ONCE = 16
"""Results whose files and large values are fetched concurrently."""
_DEEPEST = 8
_PIECE_BYTES = 8 * 1024 * 1024
_BY_PIECES = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_WRITTEN = 4
"""Limit for the size of a written result, as a multiple of `Within.value_bytes`."""


@dataclass(frozen=True, slots=True)
class Within:
    """Limits of a fetch, for results that other users' tasks have written.

    `claim` is called before bytes are written to the disk, and raises an error if they are too
    many. `value_bytes` limits the total size of one result without its files. `remedy` is the
    remedy if the result is larger.
    """

    claim: Callable[[int], None]
    value_bytes: int
    remedy: str

    async def read(self, objects: Objects, key: str, most_bytes: int, patience: Patience) -> bytes:
        """Return an object of at most `most_bytes`. Raise UsageError if it is larger."""
        data = await patience(partial(objects.get_range, key, 0, most_bytes + 1))
        if len(data) > most_bytes:
            raise self.too_large(most_bytes)
        return data

    def too_large(self, most_bytes: int | None = None) -> UsageError:
        """Return the error for a result that is too large."""
        most = size(self.value_bytes if most_bytes is None else most_bytes)
        return UsageError(
            f"One of the results is larger than {most}, without being a file.", remedy=self.remedy
        )


def plain(encoded: Json, found: Mapping[str, Json]) -> Json:
    """Return the value as the task returned it, with references replaced by `found`.

    A pickled object stays encoded. Reading it would run code, and JSON cannot represent it.
    """
    if type(encoded) is list:
        return [plain(one, found) for one in encoded]
    if type(encoded) is not dict:
        return encoded
    kind = values.kind(encoded)
    if kind is None:
        return {
            key[1:] if key.startswith("$") else key: plain(one, found)
            for key, one in encoded.items()
        }
    return encoded if kind == "$pickle" else found[_id(encoded)]


def _id(reference: Json) -> str:
    return json.dumps(reference, sort_keys=True)


@dataclass(slots=True)
class Files:
    """Fetcher of the objects to which results refer.

    A file's path consists of its stage, its task, and its own name.
    """

    objects: Objects
    out: Path
    patience: Patience
    own: Own
    within: Within | None = None
    count: int = 0
    size_bytes: int = 0
    value_bytes: int = 0
    """Bytes of large values.

    They are part of the stage's file and do not have files of their own.
    """
    limit: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(VALUES_AT_ONCE))

    async def local(self, stage: str, task: int, value: Json) -> Json:
        """Return the result with its large values, and with paths relative to `out` for
        its files.
        """
        left = _Left(self.within.value_bytes if self.within else 0)
        return await self._value(value, Names(f"files/{stage}/{task}"), left, _DEEPEST)

    def line(self, doc: Json) -> str:
        """Return a line of JSON with the large values in place.

        A value is read once but may occur in several places, so its written size is known only
        while it is written. Raise UsageError if it is too large.
        """
        if self.within is None:
            return json_format.dumps(doc) + "\n"
        pieces: list[str] = []
        left_bytes = _WRITTEN * self.within.value_bytes
        for piece in _BY_PIECES.iterencode(doc):
            left_bytes -= len(piece)
            if left_bytes < 0:
                raise self.within.too_large()
            pieces.append(piece)
        return "".join((*pieces, "\n"))

    def claim(self, size_bytes: int) -> None:
        """Announce that bytes will be written. An error is raised if they are too many."""
        if self.within:
            self.within.claim(size_bytes)

    async def _read(self, key: str, left: _Left) -> bytes:
        async with self.limit:
            if self.within is None:
                return await self.patience(partial(self.objects.get, key))
            data = await self.within.read(self.objects, key, left.value_bytes, self.patience)
            left.value_bytes -= len(data)
            return data

    async def _value(self, value: Json, names: Names, left: _Left, depth: int) -> Json:
        references = {_id(one): one for one in values.references(value)}
        found: dict[str, Json] = {}
        for key, reference in references.items():
            if values.kind(reference) != "$value":
                found[key] = await self._file(reference, names)
            elif depth:
                data = await self._read(self.own.key(reference), left)
                self.value_bytes += len(data)
                inner = self.own.value(reference, data)
                found[key] = await self._value(inner, names, left, depth - 1)
            else:
                raise UsageError(
                    f"A result refers to objects more than {_DEEPEST} deep.",
                    remedy="No task writes such a one by itself; see who may write the bucket.",
                )
        return plain(value, found)

    async def _file(self, reference: Json, names: Names) -> str:
        name, is_new = names.of(reference)
        self.own.key(reference)
        if is_new:
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.within:
                self.within.claim(await self._told(reference))
            async with self.limit:
                if values.kind(reference) == "$part":
                    size_bytes = await self._part(reference, path)
                else:
                    get = partial(self.objects.download, reference["$file"], path)
                    size_bytes = await self.patience(get)
            # `+=` with await would use the value that the sum had before the wait.
            self.size_bytes += size_bytes
            self.count += 1
        return name

    async def _told(self, reference: Json) -> int:
        """Return the size of a file, or 0 if it does not exist. The later download then fails.

        The size in the reference is not trusted, because every writer of outcomes may have written
        it.
        """
        whole = await self.patience(
            partial(self.objects.head, reference.get("$file") or reference["$part"])
        )
        if whole is None:
            return 0
        if values.kind(reference) == "$file":
            return whole.size
        parts = [reference["header"] or (0, 0), (reference["start"], reference["stop"])]
        return sum(max(0, min(stop, whole.size) - start) for start, stop in parts)

    async def _part(self, reference: Json, path: Path) -> int:
        spans = [reference["header"]] if reference["header"] else []
        size_bytes = 0
        with path.open("wb") as file:
            for start, stop in [*spans, (reference["start"], reference["stop"])]:
                for at in range(start, stop, _PIECE_BYTES):
                    end = min(at + _PIECE_BYTES, stop)
                    get = partial(self.objects.get_range, reference["$part"], at, end)
                    piece = await self.patience(get)
                    size_bytes += file.write(piece)
                    if not piece:
                        break  # the reference ends beyond the end of the object
        return size_bytes


@dataclass(slots=True)
class _Left:
    """Remaining bytes for the large values of one result, if they are limited."""

    value_bytes: int


class Names:
    """Safe file names in one task's folder. No name equals another one or is inside another one."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._known: dict[str, str] = {}
        self._taken: set[str] = set()
        """Names and their folders in case-folded form, because some file systems ignore case."""

    def of(self, reference: Json) -> tuple[str, bool]:
        """Return the path of the referenced file, and whether it is new."""
        key = _id(reference)
        if key in self._known:
            return self._known[key], False
        name = str(reference["name"])
        if name_problem(name):
            # Do not trust the name. Every writer of outcomes may have written it.
            last = name.replace("\\", "/").rpartition("/")[2]
            name = "file" if name_problem(last) else last
        number, free = 1, name
        while self._clashes(free):
            number += 1
            # change the first part, because the folder may be the cause of the conflict
            free = f"{number}-{name}"
        parts = free.casefold().split("/")
        self._taken.update("/".join(parts[:i]) + "/" for i in range(1, len(parts)))
        self._taken.add("/".join(parts))
        self._known[key] = f"{self._folder}/{free}"
        return self._known[key], True

    def _clashes(self, name: str) -> bool:
        parts = name.casefold().split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        whole = "/".join(parts)
        return whole in self._taken or f"{whole}/" in self._taken or bool(above & self._taken)
