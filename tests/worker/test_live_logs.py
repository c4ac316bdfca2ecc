"""Live logs of running tasks, which are stored only while a client follows them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.core.errors import Unreachable
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import JobRecord, Message, Objects, Queue, StageRecord
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.json_format import ControlCommand, control_from_bytes, control_to_bytes
from batchlab.core.protocol.messages import ASKED_S, Tail, TaskMessage, from_bytes, to_bytes
from batchlab.core.service_settings import WorkerSettings
from batchlab.manager import live_logs
from batchlab.manager.context import Context
from batchlab.manager.state import LiveJob, Ports
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from batchlab.worker import task_log
from batchlab.worker.inflight_message import Identity, InflightMessage, Peek, WorkerContext
from batchlab.worker.job_cache import MAX_CLOCK_SKEW_S, ControlPoller
from batchlab.worker.live_logs import MAX_LOG_BYTES_PER_JOB, LiveLogs
from batchlab.worker.outbox import Outbox
from tests.support.no_fleet import NoFleet

JOB = JobId("talk-0123456789")
EVERY_S = 5.0
KEY = object_keys.tail(JOB, "w-1")


def _clock() -> SimClock:
    return SimClock(asyncio.get_running_loop(), 1_700_000_000.0)


def _in_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    SimLoop().run(main)


def _context(
    objects: Objects, inflight_messages: dict[str, InflightMessage] | None = None, lease_s: float = 1.0
) -> WorkerContext:
    queue, patience = cast(Queue, None), Patience(random.Random(1))
    settings = WorkerSettings(control_lease_s=lease_s)
    messages = {} if inflight_messages is None else inflight_messages
    who, outbox = Identity("w-1", "i-1", "default", 1), Outbox(queue, patience)
    return WorkerContext(who, objects, queue, _clock(), patience, settings, outbox, inflight=messages)


class Bucket(SimObjects):
    """A bucket that counts puts, and can fail."""

    puts = 0
    away = False

    def counted(self) -> int:
        return self.puts

    async def put(self, key: str, data: bytes, **how: Any) -> str:
        self.puts += key == KEY
        if self.away:
            raise Unreachable("away")
        return await super().put(key, data, **how)


class Talk:
    """A task that has printed `data`."""

    def __init__(self, inflight_messages: dict[str, InflightMessage], task: int, job: JobId = JOB) -> None:
        self.data = b""
        self.task: int | None = task
        bundle = Bundle(job, StageName("talk"), TaskSet.from_indices([task]), attempt=2)
        message = Message("m", "", "r", 1, 0.0, 0.0)
        inflight = InflightMessage("q", message, TaskMessage(bundle), f"w-1-{task}", 0.0, 0.0, "r")
        inflight.running = True
        inflight.handle.peek = self.peek
        inflight_messages[inflight.execution] = inflight

    def peek(self, most: int) -> Peek | None:
        if self.task is None:
            return None
        start = max(0, len(self.data) - most)
        return Peek(self.task, 1000, 1000 + start, self.data[start:])


def test_live_logs_cost_nothing_without_a_follower() -> None:
    async def main() -> None:
        objects = Bucket()
        inflight_messages: dict[str, InflightMessage] = {}
        talk = Talk(inflight_messages, 3)
        other = Talk(inflight_messages, 4, JobId("other-0123456789"))
        tails = LiveLogs(_context(objects, inflight_messages, EVERY_S))
        keeping = asyncio.create_task(tails.run())
        talk.data = other.data = b"secret of nobody"
        await asyncio.sleep(3600)
        assert objects.counted() == 0

        tails.follow(JOB)
        await asyncio.sleep(0.1)
        (tail,) = from_bytes(await objects.get(KEY))
        assert (tail.stage, tail.task, tail.attempt, tail.execution) == ("talk", 3, 2, "w-1-3")
        assert (tail.start, tail.stop, tail.text) == (0, 16, "secret of nobody")
        # Without new output, nothing is stored. New output is stored once per step.
        await asyncio.sleep(2 * EVERY_S)
        assert objects.counted() == 1
        for _ in range(100):
            talk.data += b"x\n"
            await asyncio.sleep(0.1)
        assert objects.counted() == 3
        # The request has expired, and another request starts live logs again.
        await asyncio.sleep(ASKED_S)
        before = objects.puts
        talk.data += b"later"
        await asyncio.sleep(3600)
        assert objects.puts == before
        tails.follow(JOB)
        await asyncio.sleep(0.1)
        assert from_bytes(await objects.get(KEY))[0].text.endswith("later")
        keeping.cancel()

    _in_virtual_time(main())


def test_a_talkative_worker_stores_the_ends_only() -> None:
    async def main() -> None:
        objects = Bucket()
        inflight_messages: dict[str, InflightMessage] = {}
        talks = [Talk(inflight_messages, task) for task in range(16)]
        for talk in talks:
            talk.data = b"a" * 100_000 + b"end"
        tails = LiveLogs(_context(objects, inflight_messages, EVERY_S))
        keeping = asyncio.create_task(tails.run())
        tails.follow(JOB)
        await asyncio.sleep(0.1)
        found = from_bytes(await objects.get(KEY))
        assert len(found) == 16
        assert all(one.text.endswith("end") for one in found)
        assert all(one.stop == 100_003 and one.stop - one.start == len(one.text) for one in found)
        assert sum(len(one.text) for one in found) <= MAX_LOG_BYTES_PER_JOB
        # Ended tasks are not stored any more.
        for talk in talks[1:]:
            talk.task = None
        await asyncio.sleep(EVERY_S)
        assert [one.task for one in from_bytes(await objects.get(KEY))] == [0]
        keeping.cancel()

    _in_virtual_time(main())


def test_unreachable_bucket_costs_one_step() -> None:
    async def main() -> None:
        objects = Bucket()
        inflight_messages: dict[str, InflightMessage] = {}
        Talk(inflight_messages, 0).data = b"hello"
        tails = LiveLogs(_context(objects, inflight_messages, EVERY_S))
        keeping = asyncio.create_task(tails.run())
        objects.away = True
        tails.follow(JOB)
        await asyncio.sleep(1.0)
        objects.away = False
        await asyncio.sleep(EVERY_S)
        assert from_bytes(await objects.get(KEY))[0].text == "hello"
        assert not keeping.done()
        keeping.cancel()

    _in_virtual_time(main())


def test_request_for_live_logs_is_part_of_the_control_object() -> None:
    async def main() -> None:
        objects = SimObjects()
        asked: list[JobId] = []
        word = json_format.ControlCommand(Control.RUN)
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(word))
        controls = ControlPoller(_context(objects), asked.append)
        await controls.read(JOB)
        assert not asked
        await objects.put(object_keys.control(JOB), control_to_bytes(replace(word, tail=1)))
        for _ in range(3):
            assert (await controls.read(JOB))[0] is Control.RUN
        assert asked == [JOB]
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(replace(word, tail=2)))
        await controls.read(JOB)
        assert asked == [JOB, JOB]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("ago_s", "is_heard"), [(0.0, True), (ASKED_S, True), (-MAX_CLOCK_SKEW_S, True), (3600.0, False), (-3600.0, False)]
)
def test_expired_request_is_ignored_by_a_new_worker(ago_s: float, is_heard: bool) -> None:
    """Before, each new worker of the job stored output for 30 s without a client, and did so again after each pause."""

    async def main() -> None:
        objects, clock = SimObjects(), _clock()
        asked: list[JobId] = []
        word = json_format.ControlCommand(Control.RUN, tail=7, tail_s=clock.now_s() - ago_s)
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(word))
        controls = ControlPoller(_context(objects), asked.append)
        await controls.read(JOB)
        assert asked == [JOB] * is_heard
        # A request that arrives while the worker reads the control object is new, whatever the clocks say.
        await asyncio.sleep(0.3)
        again = replace(word, tail=8)
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(again))
        await controls.read(JOB)
        assert asked[is_heard:] == [JOB]
        # After a pause, the request may be expired again.
        await asyncio.sleep(30.0)
        await objects.put(object_keys.control(JOB), json_format.control_to_bytes(replace(word, tail=9)))
        await controls.read(JOB)
        assert len(asked) == 1 + 2 * is_heard - (is_heard and ago_s + 30.0 > ASKED_S + MAX_CLOCK_SKEW_S)

    _in_virtual_time(main())


def test_request_of_an_earlier_release_without_a_time_is_valid() -> None:
    async def main() -> None:
        objects = SimObjects()
        asked: list[JobId] = []
        await objects.put(object_keys.control(JOB), b'{"v":1,"control":"run","tail":3}')
        controls = ControlPoller(_context(objects), asked.append)
        await controls.read(JOB)
        assert asked == [JOB]

    _in_virtual_time(main())


# --- The manager's side --------------------------------------------------------------------------


class Reads(SimObjects):
    """A bucket that counts reads of live logs."""

    gets = 0

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        self.gets += key.startswith(object_keys.tails(JOB))
        return await super().get(key, limit=limit)


class Followed:
    """A job with stored live logs, and the clients that follow it."""

    def __init__(self) -> None:
        self.objects = Reads()
        self.clock = _clock()
        rng = random.Random(1)
        ports = Ports(
            self.objects,
            None,  # type: ignore[arg-type]
            NoFleet(),
            open_memory(),
            self.clock,
            SimIds(rng),
            Patience(rng, limit_s=0.0),
        )
        self.tails = live_logs.LiveLogs(Context(ports))
        self.live = self.job(JOB)

    def job(self, name: JobId) -> LiveJob:
        stage = StageName("talk")
        job = JobDef(name, "talk", (StageDef(stage, handler="m:f"),), 0.0)
        return LiveJob(JobRecord(job, JobState.RUNNING), {stage: StageRecord(StageCounts(stage))})

    async def stored(self, live: LiveJob, worker: str, text: str, task: int = 0) -> None:
        bundle = Bundle(live.id, StageName("talk"), TaskSet.from_indices([task]))
        live.add_outstanding([(bundle, 0.0)])
        tail = Tail("talk", task, 1, 0, bundle.id, f"{worker}-1", 0, len(text), text)
        await self.objects.put(object_keys.tail(live.id, worker), to_bytes([tail]))

    def kept(self) -> int:
        jobs = self.tails._jobs.values()
        return sum(one.size for looked in jobs for one in looked.stored.values())


def test_manager_forgets_unfollowed_logs() -> None:
    async def main() -> None:
        scene = Followed()
        await scene.stored(scene.live, "w-1", "hello")
        assert [one.text for one in await scene.tails.read(scene.live)] == ["hello"]
        await asyncio.sleep(ASKED_S)
        scene.tails.drop_unused()
        assert scene.kept()
        await asyncio.sleep(2 * ASKED_S)
        scene.tails.drop_unused()
        assert not scene.tails._jobs
        assert [one.text for one in await scene.tails.read(scene.live)] == ["hello"]

    _in_virtual_time(main())


def test_live_logs_of_many_workers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_logs, "MAX_JOB_BYTES", 10_000)
    monkeypatch.setattr(live_logs, "MAX_BYTES", 25_000)

    async def main() -> None:
        scene = Followed()
        jobs = [scene.live, *(scene.job(JobId(f"other-{n}")) for n in range(4))]
        for live in jobs:
            for n in range(20):
                await scene.stored(live, f"w-{n:02}", "x" * 900, n)
        for live in jobs:
            found = await scene.tails.read(live)
            assert 5 < len(found) < 20, "some are shown"
            assert scene.kept() <= 25_000
        # Cached live logs are not read again, but evicted ones are.
        gets = scene.objects.gets
        await asyncio.sleep(scene.tails.every_s)
        assert len(await scene.tails.read(scene.live)) > 5
        assert scene.objects.gets > gets
        assert scene.kept() <= 25_000

    _in_virtual_time(main())


def test_live_logs_of_ended_bundles_free_their_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_logs, "MAX_JOB_BYTES", 1_500)

    async def main() -> None:
        scene = Followed()
        await scene.stored(scene.live, "w-1", "x" * 900, 1)
        await scene.stored(scene.live, "w-2", "y" * 900, 2)
        assert [one.task for one in await scene.tails.read(scene.live)] == [1]
        scene.live.remove_outstanding(Bundle(JOB, StageName("talk"), TaskSet.from_indices([1])))
        await asyncio.sleep(scene.tails.every_s)
        assert [one.task for one in await scene.tails.read(scene.live)] == [2]

    _in_virtual_time(main())


def test_a_word_without_a_tail_is_written_as_before() -> None:
    for word in (ControlCommand(Control.RUN), ControlCommand(Control.CANCEL, reason="x", round=1)):
        assert "tail" not in json.loads(control_to_bytes(word))
        assert control_from_bytes(control_to_bytes(word)) == word
        more = replace(word, tail=7)
        assert control_from_bytes(control_to_bytes(more)) == more


def test_text_has_as_many_bytes_as_what_was_printed() -> None:
    for data in (b"plain", "ü☃".encode(), b"\xff\xfe half \xc3", "☃".encode()[1:] + b"x"):
        assert len(task_log.text(data).encode()) == len(data)
    assert task_log.text(b"a\xffb") == "a?b"
