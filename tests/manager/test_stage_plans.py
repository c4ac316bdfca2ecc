"""Plans, which are written in parts and in constant memory, while other jobs continue."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import bundle_inputs, json_format
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.manager import stage_plans


@pytest.mark.parametrize(("parts", "turns"), [(3, 0), (4, 1), (9, 2)])
def test_planning_yields_after_a_few_parts(monkeypatch: pytest.MonkeyPatch, parts: int, turns: int) -> None:
    monkeypatch.setattr(stage_plans, "PART_ITEMS", 10)
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            await asyncio.sleep(0)
            had += 1

    async def main() -> int:
        waiting = asyncio.create_task(other())
        await asyncio.sleep(0)
        # The bucket never waits, like a folder of small objects.
        writer = stage_plans.PartWriter(SimObjects(), Patience(Random(1)), JobId("j"), StageName("s"), 0)
        await writer.add(*range(10 * parts))
        meanwhile = had
        manifest = await writer.commit(TaskSet())
        waiting.cancel()
        assert manifest.starts == tuple(range(0, 10 * parts, 10))
        return meanwhile

    assert asyncio.run(main()) == turns


def test_a_planner_that_stood_still_replaces_nothing_of_the_plan_that_counts() -> None:
    """Two managers list an input that has changed in between. The parts of the first manager's plan are written after
    the manifest of the second one. Before, both plans used the same keys for their parts. One input ran twice as a
    result, and another input never ran."""
    job = JobDef(JobId("j"), "j", (StageDef(StageName("s"), handler="a:b"),), 0.0)
    bundle = Bundle(job.id, StageName("s"), TaskSet.span(0, 3))
    large = "x" * (stage_plans.ITEM_BYTES + 1)

    async def main() -> None:
        objects, patience = SimObjects(), Patience(Random(1))
        stale, leader = (stage_plans.PartWriter(objects, patience, job.id, StageName("s"), 0) for _ in range(2))
        await leader.add("b", "c", large + "d")
        committed = await leader.commit(TaskSet())
        await stale.add("a", "b", large + "c")
        assert await stale.commit(TaskSet()) == committed
        items = await Inputs(objects, patience).resolve(job, bundle, UNSEALED)
        assert list(items[:2]) == ["b", "c"]
        assert await objects.get(items[2]["$value"]) == json_format.to_bytes(large + "d")

    asyncio.run(main())


def test_manager_of_many_jobs_with_one_item_caches_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the cache counted only the JSON text of the items, so the limit of 8 MiB allowed a million jobs with one
    item each, which took hundreds of MB."""
    monkeypatch.setattr(bundle_inputs, "_MAX_BYTES", 64 * 1024)
    inputs = Inputs(SimObjects(), Patience(Random(1)))
    for number in range(500):
        inputs.keep(JobId(f"j-{number}"), StageName("s"), [number])
    assert 50 < len(inputs._parts) <= 64
    assert inputs._bytes == sum(size for _, size in inputs._parts.values())
