"""Scenes of jobs whose items and first cut are committed with their definition."""

from __future__ import annotations

import asyncio

from batchlab.model import JobState
from batchlab.protocol import naming
from batchlab.sim import invariants
from batchlab.sim.world import World
from tests.sim.scenes import A, ended, ended_well, in_world, job, kill_manager, leader, stage, takes


def test_the_first_cut_in_the_definition_is_found_by_who_does_not_know_of_it() -> None:
    """Simulator, seed 110: a rebuild of the ledger was cut short after the job's row, and the next
    leader cut the job's tasks anew, since the place of the first cut was empty (I1)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=6)
        await world.ask(lambda m: m.requests.submit(made, list(range(6))), "submit")
        await asyncio.sleep(3)
        kill_manager(world)
        await world.ledger.clear()
        await world.ledger.add_job(made, state=JobState.SUBMITTED)
        await leader(world)
        await ended_well(world, made)
        cut = naming.cut(made.id, A, 0, 0)
        assert await world.objects.head(cut) is None, "it is in the definition"

    in_world(act, script=takes(2.0))


def test_a_cancellation_finds_the_first_cut_in_the_definition() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=6)
        await world.ask(lambda m: m.requests.submit(made, list(range(6))), "submit")
        await asyncio.sleep(3)
        kill_manager(world)
        await world.ledger.clear()
        await world.ledger.add_job(made, state=JobState.SUBMITTED)
        await world.ask(lambda m: m.requests.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(30.0))
