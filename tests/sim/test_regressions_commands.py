"""Bugs with user requests and manager writes at the wrong moment. Each docstring describes the behavior before the
fix."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.errors import BackendError, Refused
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, JobState
from batchlab.core.ports import Reopen
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.manager import Manager
from batchlab.sim import invariants
from batchlab.sim.world import World
from tests.support.sim.scenes import (
    A,
    around,
    around_change,
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

CANCEL = json_format.ControlCommand(Control.CANCEL, reason="its user had enough")


async def _cancelled(world: World, made: JobDef) -> Manager:
    """Cancel the job, and wait until it has ended."""
    await submitted(world, made)
    await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
    assert (await ended(world, made)).state is JobState.CANCELLED
    return await leader(world)


# --- Late control writes -------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["resume", "pause"])
def test_former_leader_does_not_undo_a_cancellation(verb: str) -> None:
    """The leader had written and acknowledged the cancellation. Another manager, which did not know of the
    cancellation, was asked to resume the job. Before, "run" replaced "cancel", and workers started tasks again (I4)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=3)
        await submitted(world, made)
        if verb == "resume":
            await world.ask(lambda m: m.job_commands.pause(made.id), "pause")
        await world.objects.put(object_keys.control(made.id), json_format.control_to_bytes(CANCEL))
        manager = await leader(world)
        with pytest.raises(Refused, match="is being cancelled"):
            await getattr(manager.job_commands, verb)(made.id)
        record = await ended(world, made, within_s=100)
        assert (record.state, record.reason) == (JobState.CANCELLED, CANCEL.reason)
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(30.0))


def test_cancellation_between_two_reads_of_the_control_object_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=3)

        async def put(real: Any, key: str, data: bytes, **how: Any) -> object:
            if b"pause" in data and key == object_keys.control(made.id):
                await real(key, json_format.control_to_bytes(CANCEL))
            return await real(key, data, **how)

        around(monkeypatch, world.objects, "put", put)
        await submitted(world, made)
        manager = await leader(world)
        with pytest.raises(Refused, match="is being cancelled"):
            await manager.job_commands.pause(made.id)
        assert (await ended(world, made, within_s=100)).state is JobState.CANCELLED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(30.0))


def test_a_retry_that_is_carried_out_twice_does_not_undo_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the repeated retry wrote "run" after the round had already been canceled (I4)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=3)
        armed: list[str] = []

        async def put(real: Any, key: str, *args: Any, **how: Any) -> object:
            if armed == ["now"] and key == object_keys.control(made.id):
                armed.append("done")
                await manager.job_commands.retry(made.id)
                await manager.job_commands.cancel(made.id)
            return await real(key, *args, **how)

        around(monkeypatch, world.objects, "put", put)
        manager = await _cancelled(world, made)
        before = len(world.starts)
        armed.append("now")
        await manager.job_commands.retry(made.id)
        assert armed == ["now", "done"]
        word = json_format.control_from_bytes(await world.objects.get(object_keys.control(made.id)))
        assert (word.control, word.round) == (Control.CANCEL, 1)
        assert (await ended(world, made)).state is JobState.CANCELLED
        assert len(world.starts) == before
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(30.0))


# --- Retries that no client repeats --------------------------------------------------------------


def test_retry_of_a_dead_manager_is_completed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry was in the bucket, but not in the ledger. Before, the job stayed unchanged until its user asked again,
    but not in a ledger that was rebuilt from the bucket (I3)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=3)

        async def put(real: Any, key: str, *args: Any, **kwargs: Any) -> object:
            answer = await real(key, *args, **kwargs)
            if key == object_keys.retry(made.id, 1) and world.managers == 1:
                kill_manager(world)
                await asyncio.sleep(0)
            return answer

        around(monkeypatch, world.objects, "put", put)
        manager = await _cancelled(world, made)
        assert world.leader is not None
        request = world.leader.actor.spawn(manager.job_commands.retry(made.id), name="retry")
        await asyncio.wait([request])
        assert request.cancelled()
        assert (await world.ledger.job(made.id)).round == 0
        await _runs_again(world, made)

    in_world(act, script=takes(1.0))


def test_a_retry_that_ends_in_an_error_is_finished_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=3)
        failed: list[str] = []

        async def reopen(real: Any, change: Reopen) -> object:
            if not failed:
                failed.append("once")
                raise BackendError("The disk is broken.")
            return await real(change)

        around_change(monkeypatch, world.ledger, Reopen, reopen)
        manager = await _cancelled(world, made)
        with pytest.raises(BackendError, match="disk"):
            await manager.job_commands.retry(made.id)
        assert failed == ["once"]
        await _runs_again(world, made)
        assert world.managers == 1

    in_world(act, script=takes(1.0))


async def _runs_again(world: World, made: JobDef) -> None:
    async with asyncio.timeout(200):
        while not (await world.ledger.job(made.id)).round:
            await asyncio.sleep(1)
    await ended_well(world, made)
