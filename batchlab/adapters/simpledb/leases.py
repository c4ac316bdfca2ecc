"""Leases, and unique increasing numbers. Each is an item that is changed conditionally."""

from __future__ import annotations

from batchlab.adapters.simpledb.domain import Item, Store
from batchlab.adapters.simpledb.job_items import fresh
from batchlab.core.ports import Lease

_BLOCK = 1000
_STAMP = "v"


class Leases:
    """Leases of the Ledger port (see `ports.Ledger.lease`). Calls block.

    A released lease keeps its item, so its beat never repeats.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def take(self, name: str, owner: str, over: Lease | None) -> Lease:
        while True:
            item = self._store.get(_name(name))
            stands = _lease(item)
            if stands and stands.owner != owner and stands != over:
                return stands
            taken = Lease(owner, 1 + (int(item["beat"]) if item else 0))
            pairs = [(_STAMP, fresh()), ("owner", owner), ("beat", str(taken.beat))]
            pairs.append(("free", "no"))
            if self._store.put_if(_name(name), pairs, _STAMP, item[_STAMP] if item else None):
                return taken

    def give_back(self, name: str, owner: str) -> None:
        while True:
            item = self._store.get(_name(name))
            stands = _lease(item)
            if item is None or stands is None or stands.owner != owner:
                return
            pairs = [(_STAMP, fresh()), ("free", "yes")]
            if self._store.put_if(_name(name), pairs, _STAMP, item[_STAMP]):
                return


def _name(lease: str) -> str:
    return f"lease/{lease}"


def _lease(item: Item | None) -> Lease | None:
    """Return the lease, or None if it is free."""
    if item is None or item["free"] == "yes":
        return None
    return Lease(item["owner"], int(item["beat"]))


class Numbers:
    """Increasing numbers, each given once among all processes. Only one thread may use an object.

    Numbers are reserved in blocks, so most need no request.
    """

    _NAME = "counter/seq"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next, self._end = 0, 0

    def take(self, count: int, *, above: int) -> int:
        """Return the first of `count` successive numbers that are all greater than `above`."""
        if self._next <= above or self._next + count > self._end:
            self._fetch(max(count, _BLOCK), above)
        first = self._next
        self._next += count
        return first

    def _fetch(self, count: int, above: int) -> None:
        while True:
            item = self._store.get(self._NAME)
            start = max(int(item["next"]) if item else 1, above + 1)
            pairs = [(_STAMP, fresh()), ("next", str(start + count))]
            if self._store.put_if(self._NAME, pairs, _STAMP, item[_STAMP] if item else None):
                self._next, self._end = start, start + count
                return
