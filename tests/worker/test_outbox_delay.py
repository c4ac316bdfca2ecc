"""The delay of a worker's events, and the reports that share their messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.model import Bundle, JobId, Outcome, StageName, TaskSet
from batchlab.core.port_retries import STEP_BACK_S, Patience
from batchlab.core.ports import Message, QueueSpec
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Events, TaskMessage, read_events_message
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.child_process import TICK_S
from batchlab.worker.execution import gathering_s
from batchlab.worker.heartbeats import SETTLE_S, Heartbeats
from batchlab.worker.inflight_message import Identity, InflightMessage, WorkerContext
from batchlab.worker.outbox import LINGER_S, Outbox

JOB, STAGE = JobId("outbox-0123456789"), StageName("map")


def outcome(task: int) -> Outcome:
    bundle = Bundle(JOB, STAGE, TaskSet.from_indices([task]))
    return Outcome(bundle, f"w-1-{task}", "w-1", 0.0, 1.0, bundle.tasks, ("null",), (1.0,))


@dataclass
class World:
    """A worker's outbox and heartbeats with an events queue, in virtual time."""

    loop: SimLoop = field(default_factory=lambda: SimLoop(inline_executor=True))
    inflight_messages: dict[str, InflightMessage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = SimClock(self.loop, 1e9)
        self.queue = SimQueue(self.clock, Random(1))
        self.outbox = Outbox(self.queue, Patience(Random(1)))
        who = Identity("w-1", "i-1", "default", 1)
        patience = Patience(Random(1))
        self.beats = Heartbeats(
            WorkerContext(
                who,
                SimObjects(),
                self.queue,
                self.clock,
                patience,
                WorkerSettings(),
                self.outbox,
                inflight=self.inflight_messages,
            )
        )

    def take(self, task: int) -> None:
        bundle = Bundle(JOB, STAGE, TaskSet.from_indices([task]))
        message = Message(f"m-{task}", "", f"r-{task}", 1, 0.0, 0.0)
        taken = InflightMessage("tasks-default", message, TaskMessage(bundle), "w-1-7", 0.0, 0.0, "r-7")
        self.inflight_messages[str(task)] = taken
        self.beats.request()

    async def heard(self) -> list[Events]:
        found = []
        while some := await self.queue.receive(object_keys.EVENTS, wait_s=0.0):
            found += [read_events_message(one.body) for one in some]
        return found

    async def make(self) -> None:
        await self.queue.ensure(QueueSpec(object_keys.EVENTS))


def test_event_that_may_wait_is_sent_with_the_next() -> None:
    world = World()

    async def main() -> None:
        await world.make()
        world.outbox.heartbeats = None
        patient = asyncio.create_task(world.outbox.send_event(outcome(1), urgent=False))
        await asyncio.sleep(LINGER_S / 2)
        assert await world.heard() == []
        await world.outbox.send_event(outcome(2))
        await patient
        assert world.loop.time() == pytest.approx(LINGER_S / 2)
        (events,) = await world.heard()
        assert [one.execution for one in events.outcomes] == ["w-1-1", "w-1-2"]

    world.loop.run(main())


def test_event_that_may_wait_is_sent_alone_after_its_delay() -> None:
    world = World()

    async def main() -> None:
        await world.make()
        world.outbox.heartbeats = None
        await world.outbox.send_event(outcome(1), urgent=False)
        assert world.loop.time() == pytest.approx(LINGER_S)
        assert len(await world.heard()) == 1

    world.loop.run(main())


def test_held_bundles_are_reported_once_with_an_outcome() -> None:
    world = World()

    async def main() -> None:
        await world.make()
        keeping = asyncio.create_task(world.beats.run())
        await asyncio.sleep(SETTLE_S)
        assert [len(one.beats) for one in await world.heard()] == [1]
        # The time is shorter than the interval of heartbeats.
        world.take(7)
        await world.outbox.send_event(outcome(1))
        (events,) = await world.heard()
        assert [held.bundle for beat in events.beats for held in beat.held] == [
            Bundle(JOB, STAGE, TaskSet.from_indices([7])).id
        ]
        await asyncio.sleep(WorkerSettings().beat_gap_s * 3)
        assert await world.heard() == []
        # A heartbeat with a change is sent without another event.
        world.inflight_messages.clear()
        world.beats.request()
        await asyncio.sleep(WorkerSettings().beat_gap_s)
        (events,) = await world.heard()
        assert [beat.held for beat in events.beats] == [()]
        keeping.cancel()

    world.loop.run(main())


@pytest.mark.parametrize("left", [1, 4, 40, 4000])
@pytest.mark.parametrize("pace_s", [0.0, 1e-5, 0.005, 0.1, 60.0])
def test_answers_are_gathered_for_a_part_of_what_is_left_to_run(left: int, pace_s: float) -> None:
    """The delay must not hide the end of a bundle, and the death of a long bundle must be noticed soon."""
    gather_s = gathering_s(left, pace_s)
    assert 0 < gather_s <= max(0.001, min(TICK_S, left * pace_s / 4))
    assert gathering_s(2 * left, pace_s) >= gather_s
    assert gathering_s(0, pace_s) == 0


def test_concurrent_deletes_are_one_request() -> None:
    """The deletes come a moment after the event about the deleted messages, which is sent first."""
    world = World()
    asked: list[Sequence[str]] = []

    async def delete(queue: str, receipts: Sequence[str]) -> Sequence[str]:
        asked.append(list(receipts))
        return []

    async def main() -> None:
        world.queue.delete = delete  # type: ignore[method-assign]
        some = (world.outbox.delete("tasks-default", f"r-{n}", urgent=False) for n in range(3))
        await asyncio.gather(*some)
        assert asked == [["r-0", "r-1", "r-2"]]
        assert world.loop.time() == pytest.approx(STEP_BACK_S)

    world.loop.run(main())
