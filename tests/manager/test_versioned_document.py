"""Documents of the leader whose stored object is too large."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import Malformed, Refused
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import object_keys
from batchlab.core.users import Role
from batchlab.manager import versioned_document
from batchlab.manager.state import Ports
from batchlab.manager.user_directory import UserDirectory
from batchlab.manager.versioned_document import VersionedDocument
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop

KEY = "grid/document.json"
LIMIT = 10
LARGE = b"x" * (LIMIT + 1)
MESSAGE = r"^The stored object grid/\S+ has 11 bytes, and the limit is 10 bytes\. Restore the object"


class Bucket(SimObjects):
    """A bucket that records the size of each read."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes: list[int] = []

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        found = await super().get_if_changed(key, etag, limit=limit)
        self.read_bytes.append(len(found[0]) if found else 0)
        return found


def in_bucket(main: Callable[[Bucket, Ports], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `main` with a bucket whose documents may have LIMIT bytes."""
    monkeypatch.setattr(versioned_document, "MAX_BYTES", LIMIT)

    async def run() -> None:
        bucket, rng = Bucket(), random.Random(1)
        clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        absent: Any = None
        await main(bucket, Ports(bucket, absent, absent, absent, clock, SimIds(rng), Patience(rng)))
        assert max(bucket.read_bytes, default=0) <= LIMIT

    SimLoop().run(run())


def test_a_large_object_is_not_read_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bucket: Bucket, ports: Ports) -> None:
        merged: list[bytes] = []
        document = VersionedDocument(ports, KEY, merged.append)
        await bucket.put(KEY, LARGE)
        with pytest.raises(Malformed, match=MESSAGE):
            await document.read()
        await document.load()
        assert not document.is_readable
        await document.write(lambda: b"new")
        assert (await bucket.get(KEY), document.is_readable, merged) == (b"new", True, [])

    in_bucket(main, monkeypatch)


def test_a_large_object_appears_before_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bucket: Bucket, ports: Ports) -> None:
        merged: list[bytes] = []
        document = VersionedDocument(ports, KEY, merged.append)
        keeper = VersionedDocument(ports, KEY, merged.append, keeps_unreadable=True)
        for one in (document, keeper):
            await one.load()
        await bucket.put(KEY, LARGE)
        with pytest.raises(Refused, match="cannot be read, so the manager does not replace it"):
            await keeper.write(lambda: b"new")
        assert await bucket.get(KEY) == LARGE
        await document.write(lambda: b"new")
        assert (await bucket.get(KEY), merged) == (b"new", [])

    in_bucket(main, monkeypatch)


def test_a_large_list_of_users_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(bucket: Bucket, ports: Ports) -> None:
        users = UserDirectory(ports, "token")
        await bucket.put(object_keys.USERS, LARGE)
        assert await users.caller("sam.0123456789abcdef") is None
        with pytest.raises(Malformed, match=MESSAGE):
            await users.all()
        with pytest.raises(Malformed, match=MESSAGE):
            await users.add("sam", Role.VIEW, by="owner")
        assert await bucket.get(object_keys.USERS) == LARGE

    in_bucket(main, monkeypatch)
