"""A lying worker in fixed scenes, and promise I8 in random worlds."""

from __future__ import annotations

import asyncio
import random

import pytest

from batchlab.core.model import JobId
from batchlab.sim import fuzz, trial
from batchlab.sim.faults import FaultKind
from batchlab.sim.users import bring_items
from batchlab.sim.world import SimWorker, World
from tests.support.sim import scenes


async def a_worker(world: World) -> SimWorker:
    """Return the first worker, before it has received a message."""
    while not world.workers:
        await asyncio.sleep(0.1)
    return next(iter(world.workers.values()))


def test_a_job_is_touched_only_by_a_liar_that_received_its_messages() -> None:
    """The liar may have received the messages while it was honest."""

    async def act(world: World) -> set[str]:
        first, second = scenes.job(scenes.stage(scenes.A)), scenes.job(scenes.stage(scenes.A))
        await scenes.submitted(world, first)
        await scenes.ended(world, first)
        liar = await a_worker(world)
        assert not world.watch.trust.touched
        liar.begin_to_lie(random.Random(1), 1.0)
        liar.rights.deaf = True
        await bring_items(world, second)
        return set(world.watch.trust.touched)

    assert scenes.in_world(act, script=scenes.takes(1.0)) == {JobId("job")}


@pytest.mark.slow
def test_lying_workers_are_drawn_and_try_calls_outside_their_rights() -> None:
    """A seed without a lie or without a forbidden call proves nothing."""
    missing = {f" {FaultKind.CORRUPTED} ", "AccessDenied"}
    for seed in range(7, 13):
        log: list[str] = []
        with fuzz.silence():
            fuzz.replay(seed, "lies", None, log)
        missing = {text for text in missing if not any(text in line for line in log)}
        if not missing:
            return
    pytest.fail(f"no seed shows {missing}")


def test_every_world_of_the_weather_may_have_a_liar_and_has_bystanders() -> None:
    rates = [trial.weather_of(seed, trial.LIES).corrupted for seed in range(20)]
    assert set(rates) == {trial.LIES.corrupted}
