"""Bucket in memory, for the simulator.

Invariant: no operation awaits anything, so each operation is atomic, and equal calls return equal answers. The ETag of
an object is the MD5 of its content, as in S3.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from batchlab.adapters.limits import check_key, check_prefix, check_size
from batchlab.core.errors import AlreadyExists, NotFound
from batchlab.core.ports import ObjectInfo

PAGE = 1000

# Up to 64 single insertions are cheaper than sorting a million keys again.
_MAX_INSERTIONS = 64


class SimObjects:
    """The Objects port over one dict in memory. The keys of objects are sorted when a caller lists the keys."""

    def __init__(self) -> None:
        # The value None marks a deleted key that is still among the sorted keys.
        self._objects: dict[str, tuple[bytes, str] | None] = {}
        self._keys: list[str] = []
        self._unsorted: list[str] = []
        self._gone = 0
        self.writes = 0
        """Number of puts that have taken effect."""
        self.written: Callable[[str, bytes | None, bytes, bool], None] = lambda *_: None
        """Callback with (key, earlier content or None, data, if_absent) for each write."""

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        check_key(key)
        if if_match is not None and self._stored(key)[1] != if_match:
            raise AlreadyExists(f"Another writer has replaced object {key!r}.")
        if key not in self._objects:
            self._unsorted.append(key)
        elif self._objects[key] is None:
            self._gone -= 1
        elif if_absent:
            raise AlreadyExists(f"Object {key!r} exists.")
        before = self._objects.get(key)
        self.written(key, before[0] if before else None, data, if_absent)
        self.writes += 1
        etag = _etag(data)
        self._objects[key] = (bytes(data), etag)
        return etag

    def _stored(self, key: str) -> tuple[bytes, str]:
        stored = self._objects.get(key)
        if stored is None:
            check_key(key)  # Only unknown keys are checked, because the keys of stored objects have been checked.
            raise NotFound(f"No object {key!r}.")
        return stored

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        data = self._stored(key)[0]
        check_size(key, len(data), limit)
        return data

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        if start < 0:
            raise ValueError(f"a range starts at 0 or later, not {start}")
        return self._stored(key)[0][start : max(stop, start)]

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        stored = self._stored(key)
        if stored[1] == etag:
            return None
        check_size(key, len(stored[0]), limit)
        return stored

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        stored = self._objects.get(key)
        return None if stored is None else ObjectInfo(key, len(stored[0]), stored[1])

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        check_prefix(prefix)
        while True:
            page = self._page(prefix, after)
            if page:
                yield page
            if len(page) < PAGE:
                return
            after = page[-1].key

    def _page(self, prefix: str, after: str) -> Sequence[ObjectInfo]:
        self._sort()
        keys = self._keys
        page: list[ObjectInfo] = []
        at = max(bisect_left(keys, prefix), bisect_right(keys, after))
        while at < len(keys) and len(page) < PAGE and keys[at].startswith(prefix):
            stored = self._objects[keys[at]]
            if stored is not None:
                page.append(ObjectInfo(keys[at], len(stored[0]), stored[1]))
            at += 1
        return page

    def _sort(self) -> None:
        if len(self._unsorted) <= _MAX_INSERTIONS:
            for key in self._unsorted:
                insort(self._keys, key)
        else:
            self._keys += self._unsorted
            self._keys.sort()
        self._unsorted.clear()
        if self._gone * 2 > len(self._keys):
            self._objects = {key: stored for key, stored in self._objects.items() if stored is not None}
            self._keys = [key for key in self._keys if key in self._objects]
            self._gone = 0

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        for key in keys:
            if self._objects.get(key) is not None:
                self._objects[key] = None
                self._gone += 1

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        check_key(key)
        data = _read(path)
        await self.put(key, data, if_absent=if_absent)
        return len(data)

    async def download(self, key: str, path: Path) -> int:
        return _write(path, self._stored(key)[0])

    # --- Access for tests ------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        return sorted(key for key, stored in self._objects.items() if stored is not None)

    def content(self, key: str) -> bytes | None:
        stored = self._objects.get(key)
        return stored[0] if stored else None

    def damage(self, key: str, data: bytes | None) -> None:
        """Inject a fault: set the content of an object, or delete the object if `data` is None.

        The injected change does not call `written`.
        """
        assert self._objects[key] is not None
        self._gone += data is None
        self._objects[key] = None if data is None else (data, _etag(data))


def _etag(data: bytes) -> str:
    # A put of the same content returns the same ETag, as in S3.
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _write(path: Path, data: bytes) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(data)
