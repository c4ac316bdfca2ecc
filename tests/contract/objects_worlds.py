"""The worlds in which the one suite for the Objects port runs; a new adapter adds its own here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from batchlab.adapters.objects import ObstoreObjects, open_local
from batchlab.adapters.sim.objects import SimObjects
from batchlab.ports import Objects
from batchlab.sim.loop import SimLoop


@dataclass(frozen=True, slots=True)
class ObjectsWorld:
    """An empty bucket, and a folder of this machine to upload from and download to."""

    objects: Objects
    folder: Path

    async def keys(self, prefix: str = "", *, after: str = "") -> list[str]:
        """Every key under the prefix, in the order in which they are listed."""
        pages = self.objects.list(prefix, after=after)
        return [info.key async for page in pages for info in page]


Check = Callable[[ObjectsWorld], Awaitable[None]]


def _world(objects: Objects, tmp_path: Path) -> ObjectsWorld:
    folder = tmp_path / "files"
    folder.mkdir()
    return ObjectsWorld(objects, folder)


async def _done(check: Check, world: ObjectsWorld) -> None:
    await check(world)


def _sim(check: Check, tmp_path: Path) -> None:
    SimLoop().run(_done(check, _world(SimObjects(), tmp_path)))


def _files(check: Check, tmp_path: Path) -> None:
    asyncio.run(_done(check, _world(open_local(tmp_path / "bucket"), tmp_path)))


def _remote(check: Check, tmp_path: Path) -> None:
    """What a remote store goes through, short of the network."""
    asyncio.run(_done(check, _world(ObstoreObjects(MemoryStore()), tmp_path)))


OBJECTS_WORLDS: Mapping[str, Callable[[Check, Path], None]] = {
    "sim": _sim,
    "files": _files,
    "remote": _remote,
}


def on_every_bucket(check: Check) -> Callable[[str, Path], None]:
    """Turn an async check of a world into a test that runs in each of them."""

    @pytest.mark.parametrize("world", list(OBJECTS_WORLDS))
    def test(world: str, tmp_path: Path) -> None:
        OBJECTS_WORLDS[world](check, tmp_path)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test
