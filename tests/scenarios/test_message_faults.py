"""Duplicate and late messages, in a queue without other receivers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from batchlab.client.http import Client
from batchlab.core.ports import Message, Outgoing, QueueSpec
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios.faults import services
from batchlab.scenarios.faults.target_grid import FaultResult, TargetGrid
from batchlab.scenarios.model.values import Fault, FaultName
from tests.scenarios.test_fault_table import grid
from tests.support.scenarios.fault_injection import numbers

pytestmark = pytest.mark.anyio

QUEUE, DEAD = "tasks-a", "dead"
COUNT = 25


class Pools(Client):
    def __init__(self) -> None:
        pass

    def grid(self) -> Any:
        return grid(a=[], b=[])


class Place:
    """A queue of the backend `local` that contains messages."""

    def __init__(self, folder: Path) -> None:
        self.scene = TargetGrid(factory.load("local"), Home(folder), Pools())
        self.queue = self.scene.backend.open_queue(self.scene.home, self.scene.backend.open_clock())

    async def fill(self) -> None:
        await self.queue.ensure(QueueSpec(DEAD))
        await self.queue.ensure(QueueSpec(QUEUE, 60.0, dead_letters=DEAD, max_receives=10))
        for number in range(COUNT):
            await self.queue.send(QUEUE, [Outgoing(str(number))])

    async def take(self) -> list[Message]:
        """Receive all visible messages."""
        found: list[Message] = []
        while batch := await self.queue.receive(QUEUE, wait_s=0):
            found += batch
        return found


@pytest.fixture
async def place(tmp_path: Path) -> Any:
    there = Place(tmp_path)
    await there.fill()
    yield there
    await there.queue.close()


def inject(place: Place, name: FaultName, **more: Any) -> Coroutine[Any, Any, FaultResult]:
    do = services.duplicates if name == FaultName.SQS_DUPLICATES else services.delays
    return do(place.scene, Fault(name, 0.0, pool="a", **more))


async def test_every_message_is_delivered_under_two_ids(place: Place) -> None:
    seen = await inject(place, FaultName.SQS_DUPLICATES, rate=1.0, for_s=8.0)
    assert seen.targets == (QUEUE,)
    hit, came, given, again = numbers(seen.evidence)[:4]
    assert hit == came == given == COUNT
    assert again > 0
    left = await place.take()
    assert sorted(int(one.body) for one in left) == sorted([*range(COUNT), *range(COUNT)])
    assert len({one.id for one in left}) == 2 * COUNT
    assert max(one.receive_count for one in left) <= 5, "far from a dead letter"


async def test_a_share_of_them(place: Place) -> None:
    seen = await inject(place, FaultName.SQS_DUPLICATES, rate=0.4, for_s=2.0)
    hit, came = numbers(seen.evidence)[:2]
    assert came == COUNT
    assert 0 < hit < COUNT
    assert len(await place.take()) == COUNT + hit


async def test_late_messages_are_nobodys_until_it_is_over(place: Place) -> None:
    doing = asyncio.ensure_future(inject(place, FaultName.SQS_DELAYS, rate=0.4, for_s=3.0))
    await asyncio.sleep(2.0)
    meanwhile = {one.body for one in await place.take()}
    seen = await doing
    hit, came, kept = numbers(seen.evidence)[:3]
    assert came == COUNT
    assert 0 < hit == kept < COUNT
    after = {one.body for one in await place.take()}
    assert len(after) == hit
    assert not after & meanwhile
    assert len(after | meanwhile) == COUNT


async def test_undo_releases_messages_at_once(place: Place) -> None:
    doing = asyncio.ensure_future(inject(place, FaultName.SQS_DELAYS, rate=1.0, for_s=600.0))
    await asyncio.sleep(1.5)
    assert not await place.take()
    doing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await doing
    assert len(await place.take()) == COUNT
