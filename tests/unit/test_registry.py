"""What a manager knows of workers that nobody will tell it of any more."""

from __future__ import annotations

import asyncio
import random

import pytest

from batchlab.adapters.sim.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.errors import BatchlabError, Refused, Unreachable
from batchlab.manager.counts import DUPLICATE, Counts
from batchlab.manager.live import Ports
from batchlab.manager.registry import LOST_S, Registry
from batchlab.patience import Patience
from batchlab.ports import Fleet
from batchlab.protocol import wire
from batchlab.sim.clocks import SimClock, SimIds
from batchlab.sim.loop import SimLoop
from tests.no_fleet import NoFleet


def beat(instance: str, number: int) -> wire.Beat:
    return wire.Beat(f"w-{instance}", instance, "default", 1.0, 1, 0, (), number)


def ports(fleet: Fleet) -> Ports:
    rng = random.Random(1)
    return Ports(
        SimObjects(),
        None,  # type: ignore[arg-type]
        fleet,
        open_memory(),
        SimClock(asyncio.get_running_loop(), 1_700_000_000.0),
        SimIds(rng),
        Patience(rng),
    )


def test_a_worker_whose_end_another_leader_heard_of_is_forgotten() -> None:
    """It stood among the busy for ever, and its jobs could not stand still."""

    async def main() -> None:
        registry = Registry(ports(NoFleet()), {})
        for instance in ("i-gone", "i-here", "i-beats"):
            await registry.hear(beat(instance, 1))
        registry.keep({"i-here"})
        assert len(registry.workers) == 3, "the fleet may not tell of it yet"
        await asyncio.sleep(LOST_S + 1)
        await registry.hear(beat("i-beats", 2))
        registry.keep({"i-here"})
        assert set(registry.workers) == {"i-here", "i-beats"}
        # What it said long ago, and the queue brings now, does not bring it back.
        await registry.hear(beat("i-gone", 2))
        assert "i-gone" not in registry.workers
        assert registry.has_reported("i-gone")

    SimLoop().run(main())


@pytest.mark.parametrize("error", [Unreachable("It is away."), Refused("There is no such group.")])
def test_a_group_that_cannot_be_told_is_told_with_the_next_beat(error: BatchlabError) -> None:
    """What had come along with the beat was not counted, a refusal ended the manager, and nobody
    told the group again."""

    async def main() -> None:
        told: list[str] = []

        class Moody(NoFleet):
            async def ready(self, instance: str) -> None:
                told.append(instance)
                if len(told) == 1:
                    raise error

        registry = Registry(ports(Moody()), {})
        for number in range(1, 5):
            await registry.hear(beat("i-1", number))
        assert told == ["i-1"] * 2

    SimLoop().run(main())


def test_a_worker_that_still_tells_what_it_has_done_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchlab.manager.counts.HEARD_KEPT", 3)
    counts = Counts()
    for n in range(1, 10):
        counts.told(wire.Told("w-first", {DUPLICATE: n}))
        counts.told(wire.Told(f"w-{n}", {DUPLICATE: 1}))
    assert counts.duplicates == 9 + 9
