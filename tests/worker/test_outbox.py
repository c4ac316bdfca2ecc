"""A worker's additional reports, which reach the queue with its events even after a failed send."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import Unreachable
from batchlab.core.model import Bundle, JobId, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Message, Outgoing, Queue
from batchlab.core.protocol import settlement
from batchlab.core.protocol.messages import Beat, Duplicate, Events, read_events_message
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.inflight_message import Identity, Runner
from batchlab.worker.loop import Worker
from batchlab.worker.outbox import DUPLICATES_AT_ONCE, MAX_DUPLICATES, Outbox, WorkerCounters

JOB, STAGE = JobId("sums-1"), StageName("map")


class Sent:
    """A queue that records sent messages while it is available."""

    def __init__(self) -> None:
        self.away = False
        self.events: list[Events] = []

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        if self.away:
            raise Unreachable("The queue is away.")
        self.events += [read_events_message(message.body) for message in messages]

    async def receive(self, queue: str, **_: object) -> Sequence[Message]:
        await asyncio.sleep(20.0)
        return ()

    @property
    def duplicates(self) -> list[str]:
        return [duplicate.execution for events in self.events for duplicate in events.duplicates]


def beat(number: int) -> Beat:
    return Beat("w-1", "i-1", "default", 1.0, 1, 0, (), number)


def duplicate(number: int) -> Duplicate:
    return Duplicate(JOB, STAGE, "message", f"w-1-{number}", 0.5)


def outcome(execution: str) -> Outcome:
    bundle = Bundle(JOB, STAGE, TaskSet.span(0, 1))
    return settlement.seal(bundle, execution=execution, worker="w-1", now_s=1.0)


def made() -> tuple[Sent, WorkerCounters, Outbox]:
    sent = Sent()
    outbox = Outbox(cast(Queue, sent), Patience(Random(1), limit_s=0.0))
    return sent, outbox.counters, outbox


def test_unsent_report_is_part_of_the_next_event() -> None:
    async def main() -> None:
        sent, counters, outbox = made()
        counters.count_commit(outcome("w-1-1"), outcome("w-2-1"))
        outbox.report_duplicate(duplicate(1))
        sent.away = True
        for number in (1, 2):
            with pytest.raises(Unreachable):
                await outbox.send_event(beat(number))
        sent.away = False
        await outbox.send_event(beat(3))
        assert sent.duplicates == ["w-1-1"]
        assert [counter.counts for events in sent.events for counter in events.counters] == [{"duplicate": 1}]
        # The report is sent exactly once.
        await outbox.send_event(beat(4))
        assert not sent.events[-1].duplicates
        assert not sent.events[-1].counters

    asyncio.run(main())


def test_report_during_a_send_is_part_of_the_next_event() -> None:
    async def main() -> None:
        sent, counters, outbox = made()
        begun, goes_on, send = asyncio.Event(), asyncio.Event(), sent.send

        async def slow(queue: str, messages: Sequence[Outgoing]) -> None:
            begun.set()
            await goes_on.wait()
            await send(queue, messages)

        sent.send = slow  # type: ignore[method-assign]
        counters.count_commit(outcome("w-1-1"), outcome("w-2-1"))
        outbox.report_duplicate(duplicate(1))
        first = asyncio.create_task(outbox.send_event(beat(1)))
        await begun.wait()
        counters.count_commit(outcome("w-1-2"), outcome("w-2-2"))
        outbox.report_duplicate(duplicate(2))
        goes_on.set()
        await first
        await outbox.send_event(beat(2))
        assert [[one.execution for one in events.duplicates] for events in sent.events] == [["w-1-1"], ["w-1-2"]]
        assert [events.counters[0].counts["duplicate"] for events in sent.events] == [1, 2]

    asyncio.run(main())


def test_waiting_reports_are_bounded_and_fit_into_messages() -> None:
    async def main() -> None:
        sent, _, outbox = made()
        for number in range(MAX_DUPLICATES + 50):
            outbox.report_duplicate(duplicate(number))
        number = 0
        while len(sent.duplicates) < MAX_DUPLICATES:
            number += 1
            await outbox.send_event(beat(number))
            assert len(sent.events[-1].duplicates) == DUPLICATES_AT_ONCE
        assert sent.duplicates == [f"w-1-{n}" for n in range(MAX_DUPLICATES)]

    asyncio.run(main())


def test_worker_with_a_failing_last_event_ends_its_processes() -> None:
    """Before, the worker ended with an error and left the processes of its tasks running."""

    async def main() -> None:
        sent, closed = Sent(), 0

        class Idle:
            async def close(self) -> None:
                nonlocal closed
                closed += 1

        loop = asyncio.get_running_loop()
        clock = SimClock(loop, 1_700_000_000.0)
        worker = Worker(
            Identity("w-1", "i-1", "default", 1),
            objects=SimObjects(),
            queue=cast(Queue, sent),
            clock=clock,
            runner=cast(Runner, Idle()),
            patience=Patience(Random(1), limit_s=0.0),
            settings=WorkerSettings(),
        )
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(1.0)
        sent.away = True
        worker.drain()
        await running
        assert closed == 1

    SimLoop().run(main())
