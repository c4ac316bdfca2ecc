"""Jobs whose items and first cut are committed together with their definition."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobState, Pool
from batchlab.core.ports import AddJob
from batchlab.core.protocol import object_keys
from batchlab.manager import job_coordinator
from batchlab.sim import invariants
from batchlab.sim.world import MANAGER, World
from tests.support.sim.scenes import (
    UNHURRIED,
    A,
    B,
    around,
    ended,
    ended_well,
    in_world,
    job,
    kill_manager,
    leader,
    stage,
    takes,
)


async def _half_rebuilt(world: World) -> JobDef:
    """Run a job of few items, and kill its manager. The ledger then contains only the job itself."""
    plain = job(stage(A), items=6)
    await world.ask(lambda m: m.job_commands.submit(plain, list(range(6))), "submit")
    made = (await world.ledger.job(plain.id)).job
    await asyncio.sleep(3)
    kill_manager(world)
    await world.ledger.forget()
    await world.ledger.apply(AddJob(made, JobState.SUBMITTED))
    return made


def test_first_cut_in_the_definition_is_found_by_another_manager() -> None:
    """Before, a rebuild that was interrupted after the job's row let the next leader cut the job's tasks again, because
    the place of the first cut was empty (I1, seed 110 of the simulator)."""

    async def act(world: World) -> None:
        made = await _half_rebuilt(world)
        await leader(world)
        await ended_well(world, made)
        cut = object_keys.cut(made.id, A, 0, 0)
        assert await world.objects.head(cut) is None, "it is in the definition"

    in_world(act, script=takes(2.0))


def test_a_cancellation_finds_the_first_cut_in_the_definition() -> None:
    async def act(world: World) -> None:
        made = await _half_rebuilt(world)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(30.0))


def test_follow_ups_of_the_first_bundle_may_precede_the_control_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a worker that received the follow-up considered the job as removed, and dropped the message (seed 567 of
    the simulator)."""

    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=1)

        async def put(real: Any, key: str, *args: Any, **kwargs: Any) -> object:
            if key == object_keys.control(made.id):
                await asyncio.sleep(8.0)
            return await real(key, *args, **kwargs)

        around(monkeypatch, world.objects, "put", put)
        await world.ask(lambda m: m.job_commands.submit(made, [0]), "submit")
        await ended_well(world, made)
        assert world.clock.monotonic_s() < MANAGER.silence_s, "before the reconciler looks for it"

    in_world(act, script=takes(0.1), pools=(Pool("default", 4, 4, 1),))


@pytest.mark.parametrize(("begun_s", "is_there"), [(0.0, True), (60.0, False)])
def test_a_job_that_ends_at_once_needs_no_control_object(
    monkeypatch: pytest.MonkeyPatch, begun_s: float, is_there: bool
) -> None:
    monkeypatch.setattr(job_coordinator, "CONTROL_OBJECT_DELAY_S", begun_s)

    async def act(world: World) -> None:
        manager = await leader(world)
        while not manager.registry.workers:
            await asyncio.sleep(1.0)
        await asyncio.sleep(25.0)  # a tick notices the worker before the job is submitted
        made = job(stage(A), items=1)
        await world.ask(lambda m: m.job_commands.submit(made, [0]), "submit")
        await ended_well(world, made)
        assert (await world.objects.head(object_keys.control(made.id)) is not None) == is_there

    # The tick is long here, so the manager does not look at any job while this job runs.
    in_world(act, script=takes(0.1), pools=(Pool("default", 1, 1, 1),), **UNHURRIED)
