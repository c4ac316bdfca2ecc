"""Jobs whose items and first cut are committed together with their definition."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, JobState
from batchlab.core.ports import AddJob
from batchlab.core.protocol import object_keys
from batchlab.sim import invariants
from batchlab.sim.world import World
from tests.support.sim.scenes import (
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
    submitted,
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


def test_a_job_without_a_command_needs_no_control_object() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=8)
        await world.ask(lambda m: m.job_commands.submit(made, [0] * 8), "submit")
        await ended_well(world, made)
        assert await world.objects.head(object_keys.control(made.id)) is None

    in_world(act, script=takes(30.0))


def test_a_job_that_ends_while_a_page_of_jobs_is_read_is_not_adopted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        made, late = job(stage(A), items=4), asyncio.Event()

        async def jobs(real: Any, *args: Any, **kwargs: Any) -> object:
            page = await real(*args, **kwargs)
            if kwargs.get("active") and any(rows.id == made.id for rows in page) and not late.is_set():
                await manager.job_commands.cancel(made.id)
                while made.id in manager.lives:
                    await asyncio.sleep(0.1)
                late.set()
            return page

        around(monkeypatch, world.ledger, "jobs", jobs)
        manager = await leader(world)
        await world.ask(lambda m: m.job_commands.submit(made, [0] * 4), "submit")
        await late.wait()
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert made.id not in manager.lives

    in_world(act, script=takes(60.0))


@pytest.mark.parametrize("is_led_by_another", [False, True])
def test_a_resubmitted_job_that_the_ledger_lost_is_restored(is_led_by_another: bool) -> None:
    """Before, the ledger got a new row for a job whose cuts and cancellation were in the bucket. The job's tasks were
    then counted twice (I2, seed 678 of the weather `speculative`)."""

    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=20)
        await submitted(world, made)
        manager = await leader(world)
        await asyncio.sleep(40.0)
        await manager.job_commands.cancel(made.id)
        await world.ledger.forget()
        if is_led_by_another:
            kill_manager(world)
            manager = await leader(world)
        await world.ask(lambda m: m.job_commands.submit(made), "submit")
        assert (await world.ledger.job(made.id)).control is Control.CANCEL
        assert (await ended(world, made)).state is JobState.CANCELLED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(7.0))
