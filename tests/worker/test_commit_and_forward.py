"""The early commit of a part of a bundle while the rest still runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.commit import committed
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Json, Ran, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Message, Outgoing, Queue
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Events, TaskMessage, read_events_message, read_task_message
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.retry_rule import RetryRule
from batchlab.core.service_settings import WorkerSettings
from batchlab.core.tracing import NO_TRACER, Attribute, Span, Subject
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.inflight_message import Identity, InflightMessage, WorkerContext
from batchlab.worker.outbox import Outbox

STAGE = StageName("map")
STAGES = (StageDef(STAGE, handler="m:f", retry=RetryRule(attempts=2)),)
JOB = JobDef(JobId("sums-1"), "sums", STAGES, 1.0)
BUNDLE = Bundle(JOB.id, STAGE, TaskSet.span(0, 6))
KEPT = Bundle(JOB.id, STAGE, TaskSet.span(2, 3))
ITEMS: Sequence[Json] = ["a", "b", "c", "d", "e", "f"]
RAN = (
    Ran(0, 0.5, value=1),
    Ran(1, 0.5, failure=Failure(1, FailureKind.EXCEPTION, "a user's words", error="ValueError")),
)
ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BELOW = ABOVE.replace("b7", "c8")


class Sent:
    """A queue that records sent messages."""

    def __init__(self) -> None:
        self.tasks: list[TaskMessage] = []
        self.events: list[Events] = []

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        return []

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            if queue == object_keys.EVENTS:
                self.events.append(read_events_message(message.body))
            else:
                self.tasks.append(read_task_message(message.body))


class Spans:
    """A tracer that records the names of started root spans."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(
        self,
        name: str,
        parent: str,
        about: Bundle | Subject,
        *,
        start_s: float | None = None,
        links: Sequence[str] = (),
        **attributes: Attribute,
    ) -> Span:
        assert (parent, about, start_s, links, attributes) == (ABOVE, BUNDLE, None, (), {})
        self.names.append(name)
        return NO_TRACER.begin(name, BELOW, about)

    root, record, close = NO_TRACER.root, NO_TRACER.record, NO_TRACER.close


class Rig:
    """A worker's commit code, and a bundle of six tasks, two of which have run."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.objects, self.sent, self.spans = (SimObjects(), Sent(), Spans())
        self.clock = SimClock(loop, 1_700_000_000.0)
        self.patience = Patience(Random(1), limit_s=0.0)
        self.inflight_messages: dict[str, InflightMessage] = {}

    def finisher(self, worker: str) -> BundleFinisher:
        queue = cast(Queue, self.sent)
        outbox = Outbox(queue, self.patience)
        self.counters = outbox.counters
        return BundleFinisher(
            WorkerContext(
                Identity(worker, "i-1", "default", 1),
                self.objects,
                queue,
                self.clock,
                self.patience,
                WorkerSettings(),
                outbox,
                self.spans,
                self.inflight_messages,
            )
        )

    def inflight(self, execution: str) -> InflightMessage:
        message = Message("m-1", "", "receipt", 1, 1.0, 1.0)
        inflight = InflightMessage("tasks-default", message, TaskMessage(BUNDLE), execution, 1.0, 1.0, "receipt")
        inflight.trace = ABOVE
        inflight.definition, inflight.items, inflight.ran, inflight.started_s = JOB, ITEMS, list(RAN), 1.0
        inflight.handle.log_spans += [(0, 0, 3), (1, 3, 6)]
        self.inflight_messages[execution] = inflight
        return inflight

    async def shed(self, worker: str) -> bool:
        return await self.finisher(worker).hand_off(self.inflight(f"{worker}-1"), KEPT)


def in_rig(act: Callable[[Rig], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        await act(Rig(asyncio.get_running_loop()))

    SimLoop().run(main())


def test_handed_over_tasks_are_committed_reported_and_traced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "batchlab")

    async def act(rig: Rig) -> None:
        assert await rig.shed("w-1")
        outcome = await committed(rig.objects, BUNDLE, rig.patience, UNSEALED)
        assert outcome
        assert (outcome.succeeded, [one.task for one in outcome.failed]) == (TaskSet.from_indices([0]), [1])
        assert outcome.log == object_keys.log(BUNDLE, "w-1-1", UNSEALED)
        assert KEPT in [follow.bundle for follow in outcome.follows]
        pairs = [zip(m.bundle.tasks, m.items or (), strict=True) for m in rig.sent.tasks]
        told = {task: item for pair in pairs for task, item in pair}
        assert told == {1: "b", 3: "d", 4: "e", 5: "f"}, "what is kept needs no message"
        assert rig.sent.events[-1].outcomes == (outcome,)
        assert rig.inflight_messages["w-1-1"].receipt == "receipt", "whoever gets it forwards once more"
        # Each hop has its own span, and later work continues below the last span.
        assert rig.spans.names == ["commit", "forward"]
        assert {message.trace for message in rig.sent.tasks} == {BELOW}
        assert rig.sent.events[-1].traces == ((JOB.id, STAGE, BUNDLE.id, BELOW),)
        assert rig.counters.unsent() == {"retried.exception": 1}

    in_rig(act)
    (line,) = [record for record in caplog.records if "the task failed" in record.message]
    assert line.message == "the task failed (exception: ValueError) and is tried again"
    assert vars(line)["task"] == 1


def test_bundle_with_a_foreign_outcome_hands_over_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The worker reports the bundle's outcome once, at its end."""
    caplog.set_level(logging.INFO, "batchlab")

    async def act(rig: Rig) -> None:
        assert await rig.shed("w-1")
        first = len(rig.sent.tasks), len(rig.sent.events), len(caplog.records)
        assert not await rig.shed("w-2")
        assert (len(rig.sent.tasks), len(rig.sent.events), len(caplog.records)) == first

    in_rig(act)


@pytest.mark.parametrize(
    ("receipt", "timeout_s", "handed_over", "is_sent"),
    [
        ("receipt", 10.0, False, True),
        ("receipt", 0.0, False, False),  # the timeout has ended
        (None, 10.0, False, False),  # the queue has refused to extend the timeout
        (None, 0.0, True, True),  # a watchdog message, which comes later, has replaced the message
    ],
)
def test_lapsed_message_is_not_sent_again(
    receipt: str | None, timeout_s: float, *, handed_over: bool, is_sent: bool
) -> None:
    """The queue delivers a lapsed message again, so a fresh message would be a second one."""

    async def act(rig: Rig) -> None:
        inflight = rig.inflight("w-1-1")
        rig.inflight("w-1-2")  # with another message in flight, a delete waits
        inflight.receipt, inflight.handed_over = receipt, handed_over
        inflight.visible_at_s = rig.clock.monotonic_s() + timeout_s
        await rig.finisher("w-1").send_again(inflight)
        assert len(rig.sent.tasks) == is_sent
        assert inflight.receipt is None

    in_rig(act)
