"""Direct calls, which a client commits and sends without the manager."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.direct_calls import Caller, CommittedCall
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Pool
from batchlab.core.ports import AddJob, Outgoing
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.sim.world import World
from tests.sim.test_early_events import WARM, staffed
from tests.support.sim.scenes import A, around, around_change, ended_well, in_world, job, kill_manager, stage, takes

CALL = job(stage(A), items=1, token="")


async def begin(world: World, call: JobDef = CALL) -> CommittedCall:
    caller = Caller(world.objects, world.queue, CommitKeys(world.objects), world.clock)
    begun = await caller.commit(call, [0])
    await caller.send(begun)
    return begun


def count_messages(monkeypatch: pytest.MonkeyPatch, world: World) -> list[int]:
    sent: list[int] = []

    async def send(real: Any, queue: str, messages: list[Outgoing]) -> object:
        if queue == object_keys.tasks_queue("default"):
            sent.append(len(messages))
        return await real(queue, messages)

    around(monkeypatch, world.queue, "send", send)
    return sent


def test_the_manager_learns_of_a_call_from_the_workers_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        sent = count_messages(monkeypatch, world)
        manager = await staffed(world)
        await begin(world)
        await ended_well(world, CALL)
        assert sent == [1]
        assert (manager.counts.submitted, manager.counts.repeated) == (1, 0)

    in_world(act, script=takes(1.0), pools=WARM)


def test_a_call_that_takes_long_is_submitted_without_a_second_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        sent = count_messages(monkeypatch, world)
        await staffed(world)
        await begin(world)
        await world.ask(lambda m: m.job_commands.submit(CALL, [0], is_sent=True), "submit")
        await ended_well(world, CALL)
        assert sent == [1]
        assert len(world.starts) == 1

    in_world(act, script=takes(20.0), pools=WARM)


def test_a_claim_to_have_sent_a_call_creates_a_missing_job() -> None:
    """The claim may be false, or the bucket may have lost the definition."""

    async def act(world: World) -> None:
        await staffed(world)
        await world.ask(lambda m: m.job_commands.submit(CALL, [0], is_sent=True), "submit")
        await ended_well(world, CALL)

    in_world(act, script=takes(1.0), pools=WARM)


def test_a_lost_message_is_sent_again() -> None:
    async def act(world: World) -> None:
        await staffed(world)
        caller = Caller(world.objects, world.queue, CommitKeys(world.objects), world.clock)
        await caller.commit(CALL, [0])
        await world.ask(lambda m: m.job_commands.submit(CALL, [0], is_sent=True), "submit")
        await ended_well(world, CALL)

    in_world(act, script=takes(1.0), pools=WARM)


def test_a_report_adds_a_call_whose_event_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        async def send(real: Any, queue: str, messages: list[Outgoing]) -> object:
            kept = [m for m in messages if queue != object_keys.EVENTS or f'"{CALL.id}"' not in m.body]
            return await real(queue, kept) if kept else None

        around(monkeypatch, world.queue, "send", send)
        await staffed(world)
        call = await begin(world)
        while await world.objects.head(object_keys.outcome(call.bundle, call.key)) is None:
            await asyncio.sleep(1.0)
        assert await world.find(CALL.id) is None
        assert await world.ask(lambda m: m.job_commands.add_calls([CALL.id]), "report") == 1
        await ended_well(world, CALL)
        assert await world.ask(lambda m: m.job_commands.add_calls([CALL.id]), "report") == 0
        assert len(world.starts) == 1

    in_world(act, script=takes(1.0), pools=WARM)


def test_a_call_survives_the_manager_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        async def add_job(*_: Any) -> object:
            monkeypatch.undo()
            kill_manager(world)
            await asyncio.sleep(1.0)
            raise AssertionError("the manager lives")

        await staffed(world)
        around_change(monkeypatch, world.ledger, AddJob, add_job)
        await begin(world)
        await ended_well(world, CALL)

    in_world(act, script=takes(1.0), pools=WARM)


def test_a_call_may_be_cancelled_before_the_manager_knows_it() -> None:
    async def act(world: World) -> None:
        manager = await staffed(world)
        await begin(world)
        await world.ask(lambda m: m.job_record(CALL.id), "look")
        await world.ask(lambda m: m.job_commands.cancel(CALL.id), "cancel")
        record = await world.ended(CALL.id)
        assert record.state.value == "CANCELLED"
        assert manager.counts.submitted == 1

    in_world(act, script=takes(600.0), pools=(Pool("default", 2, 2, 1),))


def test_a_call_that_has_ended_meanwhile_is_not_adopted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        changes: list[AddJob] = []

        async def add_job(real: Any, change: AddJob) -> object:
            changes.append(change)
            if len(changes) == 1:
                await ended_well(world, CALL)
                await asyncio.sleep(5.0)
            return await real(change)

        manager = await staffed(world)
        around_change(monkeypatch, world.ledger, AddJob, add_job)
        await begin(world)
        await world.ask(lambda m: m.job_record(CALL.id), "look")
        assert len(changes) == 2
        assert CALL.id not in manager.lives

    in_world(act, script=takes(1.0), pools=WARM)
