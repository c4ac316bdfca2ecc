"""The processing of a backlog of events in the manager."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.adapters.sql.ledger import SqlLedger
from batchlab.core.errors import BackendError, Unreachable
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Completion, JobId, JobState, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import MAX_BATCH, AddCut, AddJob, ChangeResult, Cut, Depth, Fold, FoldResult, Message, Outgoing
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Duplicate, Events, events_message
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.collector import Collector, events_queue
from batchlab.manager.context import Context
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.recorder import Recorder
from batchlab.manager.state import LiveJob, Ports
from tests.support.no_fleet import NoFleet

STAGE = StageName("map")
JOB = JobDef(JobId("backlog-0123456789"), "backlog", (StageDef(STAGE, handler="work:one"),), 0.0)
EVENTS = 4 * MAX_BATCH


class Counting:
    """A ledger's method `apply` that records the number of completions in each fold."""

    def __init__(self, ledger: SqlLedger) -> None:
        self.sizes: list[int] = []
        self._apply = ledger.apply

    async def __call__(self, change: Any) -> FoldResult | ChangeResult:
        if isinstance(change, Fold):
            self.sizes.append(len(change.completions))
        answer: FoldResult | ChangeResult = await self._apply(change)
        return answer


class Failing(SqliteQueue):
    """A queue that raises an outage for the receives with these numbers, counted from 0."""

    fails: Sequence[int] = ()
    _receives = -1

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        self._receives += 1
        if self._receives in self.fails:
            raise Unreachable("The queue is away.")
        return await super().receive(queue, max_messages=max_messages, wait_s=wait_s, visibility_s=visibility_s)


async def nobody(_: JobId) -> JobDef | None:
    """Return None, because the ledger already contains all jobs of the bucket."""
    return None


def completion(number: int) -> Completion:
    tasks, nothing = TaskSet.span(number, number + 1), TaskSet()
    return Completion(Bundle(JOB.id, STAGE, tasks), "w", 1.0, 2.0, tasks, nothing, nothing, 1.0)


async def collected(ledger_writer: Path, fails: Sequence[int]) -> list[int]:
    """Return the sizes of the folds for a backlog of one completion per message."""
    clock, ledger = WallClock(), open_memory()
    queue = Failing(ledger_writer / "queues.db", clock)
    queue.fails = fails
    counting = Counting(ledger)
    ledger.apply = counting  # type: ignore[assignment, method-assign]
    ports = Ports(SimObjects(), queue, NoFleet(), ledger, clock, RandomIds(), Patience(Random(1)))
    settings = replace(ManagerSettings(), wait_s=1.0)
    done = [completion(number) for number in range(EVENTS)]
    await ledger.apply(AddJob(JOB, JobState.SUBMITTED))
    bundles = tuple(one.bundle for one in done)
    written = await ledger.apply(AddCut(Cut(JOB.id, STAGE, 0, 0, bundles, TaskSet(), EVENTS)))
    await queue.ensure(events_queue(settings))
    for first in range(0, EVENTS, MAX_BATCH):
        some = done[first : first + MAX_BATCH]
        bodies = [Outgoing(events_message(Events((one,)))) for one in some]
        await queue.send(object_keys.EVENTS, bodies)
    live = LiveJob(written.rows.job, {s.counts.stage: s for s in written.rows.stages})
    context = Context(ports, settings, lives=LiveJobs([live]))
    collector = Collector(context, LedgerWriter(context, nobody))
    collecting = asyncio.create_task(collector.collect())
    while sum(counting.sizes) < EVENTS or await queue.depth(object_keys.EVENTS) != Depth(0, 0, 0):
        assert not collecting.done()
        await asyncio.sleep(0.02)
    assert live.stages[STAGE].counts.succeeded == EVENTS
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    await queue.close()
    return counting.sizes


@pytest.mark.parametrize(
    ("fails", "folds"),
    [
        pytest.param((), [EVENTS], id="a backlog is one transaction"),
        pytest.param((1,), [MAX_BATCH, EVENTS - MAX_BATCH], id="what came does not wait"),
    ],
)
def test_a_backlog_is_folded_together(tmp_path: Path, fails: Sequence[int], folds: Sequence[int]) -> None:
    assert asyncio.run(collected(tmp_path, fails)) == folds


def test_collector_reports_an_unreachable_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While events cannot be received or a backlog exists, no worker counts as silent."""

    async def main(queue: SqliteQueue) -> None:
        clock = WallClock()
        patience = Patience(Random(1))
        ports = Ports(SimObjects(), queue, NoFleet(), open_memory(), clock, RandomIds(), patience)
        settings = replace(ManagerSettings(), wait_s=0.0, tick_s=0.1)
        context = Context(ports, settings)
        registry = context.registry
        collector = Collector(context, LedgerWriter(context, nobody))
        await queue.ensure(events_queue(settings))
        some = [Outgoing(events_message(Events())) for _ in range(MAX_BATCH)]
        await queue.send(object_keys.EVENTS, some)
        assert len(await collector._receive_batch()) == MAX_BATCH
        assert registry.outage_s is None, "it has heard them all"
        monkeypatch.setattr("batchlab.manager.collector.FOLD_BYTES", 1)
        await queue.send(object_keys.EVENTS, some)
        await asyncio.sleep(0.15)  # a backlog is older than a tick
        await collector._receive_batch()
        backlog_s = registry.outage_s
        assert backlog_s is not None

        async def denied(*_: object, **__: object) -> Sequence[Message]:
            raise BackendError("Access denied.")

        with monkeypatch.context() as patch:
            patch.setattr(queue, "receive", denied)
            with pytest.raises(BackendError):
                await collector._collect_once()
        assert registry.outage_s == math.inf, "as long as it lasts"
        await queue.send(object_keys.EVENTS, some[:1])
        await collector._collect_once()
        assert backlog_s < registry.outage_s < math.inf
        # Messages that were received but not processed do not count as heard either.
        monkeypatch.setattr(collector, "_collect_once", denied)
        collecting = asyncio.create_task(collector._collect())
        async with asyncio.timeout(10):
            while registry.outage_s != math.inf:
                await asyncio.sleep(0.001)
        collecting.cancel()
        await queue.close()

    asyncio.run(main(SqliteQueue(tmp_path / "queues.db", WallClock())))


def test_invalid_event_is_dropped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before, a duplicate with an unchecked shape ended each manager that led."""

    async def main(queue: SqliteQueue) -> None:
        told: list[Duplicate] = []
        ledger, clock = open_memory(), WallClock()
        patience = Patience(Random(1))
        ports = Ports(SimObjects(), queue, NoFleet(), ledger, clock, RandomIds(), patience)
        context = Context(ports)
        context.recorder = cast(Recorder, SimpleNamespace(record_duplicates=told.extend))
        collector = Collector(context, LedgerWriter(context, nobody))
        await ledger.apply(AddJob(JOB, JobState.SUBMITTED))
        good = Duplicate(JOB.id, STAGE, "message", "w-1-1", 0.5)
        bodies = [
            '{"v":1,"d":[["backlog-0123456789","map","message",["w-1-1"],"long"]]}',
            events_message(Events(duplicates=(good,))),
        ]
        await collector._process([Message("m", body, "r", 1, 0.0, 0.0) for body in bodies])
        assert told == [good]
        await queue.close()

    asyncio.run(main(SqliteQueue(tmp_path / "queues.db", WallClock())))
    assert "dropped an event of 69 characters that cannot be read" in caplog.text
