"""Plans are written in parts, in constant memory, and others have their turn meanwhile."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from batchlab.adapters.sim.objects import SimObjects
from batchlab.manager import plans
from batchlab.model import JobId, StageName, TaskSet
from batchlab.patience import Patience


@pytest.mark.parametrize(("parts", "turns"), [(3, 0), (4, 1), (9, 2)])
def test_others_have_a_turn_after_every_few_parts(
    monkeypatch: pytest.MonkeyPatch, parts: int, turns: int
) -> None:
    monkeypatch.setattr(plans, "PART_ITEMS", 10)
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            await asyncio.sleep(0)
            had += 1

    async def main() -> int:
        waiting = asyncio.create_task(other())
        await asyncio.sleep(0)
        # A bucket that never waits, as a folder of small objects.
        writer = plans.PartWriter(SimObjects(), Patience(Random(1)), JobId("j"), StageName("s"), 0)
        await writer.add(*range(10 * parts))
        meanwhile = had
        manifest = await writer.commit(TaskSet())
        waiting.cancel()
        assert manifest.starts == tuple(range(0, 10 * parts, 10))
        return meanwhile

    assert asyncio.run(main()) == turns
