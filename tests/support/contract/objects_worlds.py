"""The object stores of the contract suite of the Objects port. A new adapter is one more entry.

`DIFFERENCES` names the rules of S3 that an emulator breaks. On this emulator, the check of such a
rule must fail.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from batchlab.adapters import gcs
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.limits import Bucket
from batchlab.adapters.local.objects import open_local
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.obstore_objects import ObstoreObjects
from batchlab.core.ports import Objects
from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Faults
from batchlab.sim.port_wrappers import wrap
from tests.support import gcs_stub
from tests.support.contract.emulator_worlds import at_emulators

_BUCKETS = itertools.count()


@dataclass(frozen=True, slots=True)
class ObjectsWorld:
    """An empty bucket, and a local folder for uploads and downloads.

    `many` is a number of keys that needs more than one page and that the service stores within seconds.
    """

    objects: Objects
    folder: Path
    many: int

    async def keys(self, prefix: str = "", *, after: str = "") -> list[str]:
        """Return every key with the prefix, in the order of the listing."""
        pages = self.objects.list(prefix, after=after)
        return [info.key async for page in pages for info in page]

    async def fill(self, keys: Iterable[str]) -> None:
        """Store an empty object under each key."""
        await asyncio.gather(*(self.objects.put(key, b"") for key in keys))


Check = Callable[[ObjectsWorld], Awaitable[None]]


def _world(objects: Objects, tmp_path: Path, many: int = 2500) -> ObjectsWorld:
    folder = tmp_path / "files"
    folder.mkdir()
    return ObjectsWorld(objects, folder, many)


async def _done(check: Check, world: ObjectsWorld) -> None:
    await check(world)


def _sim(check: Check, tmp_path: Path) -> None:
    SimLoop().run(_done(check, _world(SimObjects(), tmp_path)))


def _wrapped(check: Check, tmp_path: Path) -> None:
    """Run a check on the store as an actor of the simulator sees it, without faults."""
    seen = wrap(SimObjects(), "objects", Actor("a"), Faults(random.Random(1)))
    SimLoop().run(_done(check, _world(seen, tmp_path)))


def _files(check: Check, tmp_path: Path) -> None:
    asyncio.run(_done(check, _world(open_local(tmp_path / "bucket"), tmp_path)))


def _remote(check: Check, tmp_path: Path) -> None:
    """Run a check on the code of a remote store, without a network."""
    asyncio.run(_done(check, _world(ObstoreObjects(MemoryStore()), tmp_path)))


def _gcs(check: Check, tmp_path: Path) -> None:
    with gcs_stub.served() as (stub, url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        stub.buckets["suite"] = {}
        objects = gcs.open_objects(Bucket("suite"))
        asyncio.run(_done(check, _world(objects, tmp_path, many=1050)))
        assert not stub.uploads
        assert not [key for key in stub.buckets["suite"] if key.startswith("staged/")]


def _at_endpoint(check: Check, tmp_path: Path, endpoint: Endpoint) -> None:
    objects = open_s3(endpoint, f"suite-{next(_BUCKETS)}")
    asyncio.run(_done(check, _world(objects, tmp_path, many=1050)))


OBJECTS_WORLDS: Mapping[str, Callable[[Check, Path], None]] = {
    "sim": _sim,
    "sim wrapped": _wrapped,
    "files": _files,
    "remote": _remote,
    "gcs": _gcs,
}

DIFFERENCES: Mapping[str, tuple[str, tuple[str, ...]]] = {}
"""The rule of S3 that emulators break, and the names of these emulators, by check."""

UNTRIED: Mapping[str, tuple[str, tuple[str, ...]]] = dict.fromkeys(
    (
        "test_long_listings_are_paged_without_gaps_or_repetitions",
        "test_listing_continues_during_puts_and_deletes",
        "test_delete_accepts_many_keys_and_ignores_missing_ones",
    ),
    ("a thousand puts take it ten seconds", ("moto",)),
)
"""The reason why a check is not run, and the emulators that this concerns, by check."""


def on_every_bucket(check: Check) -> Callable[[str, Path, pytest.FixtureRequest], None]:
    """Turn an async check of a world into a test that runs in each world."""

    @pytest.mark.parametrize("world", [*OBJECTS_WORLDS, *at_emulators(check, DIFFERENCES, UNTRIED)])
    def test(world: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        if world in OBJECTS_WORLDS:
            OBJECTS_WORLDS[world](check, tmp_path)
        else:
            _at_endpoint(check, tmp_path, request.getfixturevalue(world))

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test
