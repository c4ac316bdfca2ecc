"""Unreadable messages and objects of a compromised worker.

The environment variable BATCHLAB_MALFORMED sets the number of generated examples of each property.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.adapters.sql import open_memory
from batchlab.core.commit import follow_ups
from batchlab.core.errors import Malformed, TooLarge, TooNew
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, JobState, Ran, StageName, TaskMetrics, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import AddJob, Cut, Message, QueueSpec
from batchlab.core.pricing.request_costs import Requests, WorkerRequests
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.field_checks import MAX_TEXT
from batchlab.core.protocol.messages import (
    Beat,
    CounterReport,
    Duplicate,
    Events,
    HeldBundle,
    TaskMessage,
    events_message,
    read_events_message,
    read_task_message,
    task_message,
)
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.protocol.values import OUTCOME_WEIGHT
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.collector import Collector
from batchlab.manager.context import Context
from batchlab.manager.counters import Counters
from batchlab.manager.ledger_rebuild import rebuild
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.quarantine import OutcomeStore, Quarantine
from batchlab.manager.recorder import Recorder
from batchlab.manager.state import LiveJob, Ports
from batchlab.worker import exception_pickling, handlers, task_executor
from tests.support.attacks.worker_rights import WorkerRights
from tests.support.no_fleet import NoFleet
from tests.support.server import api as api_rig
from tests.support.server.api import Rig, job

EXAMPLES = int(os.environ.get("BATCHLAB_MALFORMED", "150"))
MAP, NEXT = StageName("map"), StageName("next")
JOB = JobDef(
    JobId("sums-0123456789"),
    "sums",
    (StageDef(MAP, handler="m:f", retry=RetryRule(attempts=2)), StageDef(NEXT, after=(MAP,), handler="m:g")),
    1.0,
    items=10,
)
BUNDLE = Bundle(JOB.id, MAP, TaskSet.span(0, 10))
FAILURE = Failure(0, FailureKind.EXCEPTION, "no", "ValueError", "Traceback", 1, 0.1)


def _outcome() -> Any:
    metrics = TaskMetrics(0.1, 100, 10, None, "a.csv")
    ran = [Ran(task, 0.25, {"x": [task, None]}, metrics=metrics) for task in range(6)]
    ran += [Ran(6, 0.1, failure=FAILURE), Ran(7, 0.1, failure=FAILURE)]
    log = object_keys.log(BUNDLE, "w-1-1", UNSEALED)
    return settlement.settle(
        job=JOB,
        bundle=BUNDLE,
        ran=ran,
        execution="w-1-1",
        worker="w-1",
        started_s=1.0,
        ended_s=2.0,
        log=log,
        log_spans=[(0, 0, 5), (1, 5, 9)],
    )


OUTCOME = _outcome()
HELD = HeldBundle("tasks-default", "receipt", JOB.id, MAP, BUNDLE.id, True)
BEAT = Beat("w-1", "i-1", "default", 1.0, 2, 1, (HELD,), 7)
EVENTS = Events(
    (settlement.completion(OUTCOME),),
    (object_keys.outcome(BUNDLE, UNSEALED),),
    (BEAT,),
    (OUTCOME,),
    (WorkerRequests("w-1", "i-1", Requests(10, 2, 3, 4, 5, 6)),),
    (Duplicate(JOB.id, MAP, "message", "w-1-1", 0.5),),
    (CounterReport("w-1", {"retried.timeout": 2}),),
    ((JOB.id, MAP, BUNDLE.id, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
)
TASK = TaskMessage(BUNDLE, list(range(10)), 12.5, trace="00-x", copy_s=40.0)

# --- Malformed texts -----------------------------------------------------------------------------

JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**30,
        -(10**30),
        1 << 63,
        1e300,
        -1e300,
        0.1,
        "",
        "\ud800",
        "x",
        "A/B/running/x",
        "../x",
        "\x00",
        "é" * 300,
        "x" * 5000,
        "lost",
        [],
        {},
        [[]],
        [[0, 10**12]],
        [[5, 2]],
        [[0, 3], [3, 5]],
        [[-1, 4]],
        [None],
        {"x": 1},
        [[0, 1 << 39]],
        [0, 1, 2],
        [[0, 10]],
        ["raw/big.csv"],
        "jobs/a/b/outcomes/aa/x.json",
    ]
)


def _places(doc: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a document with each of its keys."""
    if isinstance(doc, dict | list):
        for key, value in list(doc.items() if isinstance(doc, dict) else enumerate(doc)):
            yield doc, key
            yield from _places(value)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """Draw a document with one to three changed places, or a truncated or overwritten text."""
    how = draw(st.sampled_from(["tree", "tree", "tree", "tree", "cut", "bytes", "any", "deep"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if how == "bytes":
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + draw(st.text(max_size=6)) + text[at + draw(st.integers(0, 6)) :]
    if how == "any":
        return json.dumps(draw(JUNK | st.recursive(JUNK, lambda one: st.lists(one, max_size=3))))
    if how == "deep":
        depth = draw(st.sampled_from([300, 5_000, 50_000]))
        return '{"v":1,"o":' + "[" * depth + "]" * depth + "}"
    doc = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(doc))
        holder, key = places[draw(st.integers(0, len(places) - 1))] if places else (doc, None)
        if key is None:
            break
        match draw(st.sampled_from(["junk", "junk", "remove", "repeat"])):
            case "remove":
                del holder[key]
            case "repeat" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(draw(JUNK))
    return json.dumps(doc)


def outcome_text() -> str:
    return json_format.outcome_text(OUTCOME)


many = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def outcome_of(text: str) -> Any:
    return json_format.outcome_from_bytes(text.encode(errors="surrogatepass"), object_keys.outcome(BUNDLE, UNSEALED))


READERS: Sequence[tuple[str, Callable[[str], Any], Callable[[Any], str]]] = [
    (events_message(EVENTS), read_events_message, events_message),
    (task_message(TASK), read_task_message, task_message),
    (outcome_text(), outcome_of, json_format.outcome_text),
]


@many
@given(st.sampled_from(READERS).flatmap(lambda one: st.tuples(st.just(one), mutated(one[0]))))
def test_a_reader_returns_a_value_that_can_be_written_again_or_raises_one_error(
    given_: tuple[tuple[str, Callable[[str], Any], Callable[[Any], str]], str],
) -> None:
    """A reader raises only one kind of error for any text, and never returns a lone surrogate."""
    (_, read, write), text = given_
    try:
        value = read(text)
    except (Malformed, TooNew):
        return
    again = write(value)
    again.encode()
    assert read(again) == value


# --- The manager ---------------------------------------------------------------------------------


class Desk:
    """The components of a manager that read workers' data, with services in memory."""

    def __init__(self) -> None:
        self.clock, self.ledger = WallClock(), open_memory()
        self.objects, self.queue = SimObjects(), SimQueue(self.clock, Random(2))
        patience = Patience(Random(1), limit_s=0.0)
        self.ports = Ports(
            objects=self.objects,
            queue=self.queue,
            fleet=NoFleet(),
            ledger=self.ledger,
            clock=self.clock,
            ids=RandomIds(),
            patience=patience,
        )
        self.judge_anew()
        self.lives = LiveJobs()
        self.duplicates: set[Duplicate] = set()
        context = Context(self.ports, lives=self.lives, counts=self.counts)
        context.quarantine = self.quarantine
        context.recorder = cast(Recorder, SimpleNamespace(record_duplicates=self.duplicates.update))
        self.ledger_writer, self.registry = LedgerWriter(context, self._nobody), context.registry
        self.collector = Collector(context, self.ledger_writer)

    def judge_anew(self) -> None:
        """Forget which objects were unreadable."""
        self.counts = Counters()
        self.quarantine = Quarantine(self.counts)
        self.outcomes = OutcomeStore(self.ports, self.quarantine)

    async def _nobody(self, job: JobId) -> JobDef | None:
        return None

    async def open(self) -> None:
        await self.queue.ensure(QueueSpec(object_keys.tasks_queue("default")))
        cut = Cut(JOB.id, MAP, 0, 0, (BUNDLE,), TaskSet(), 10)
        spec = commit_keys.to_bytes(JOB, commit_keys.Opening(list(range(10)), cut))
        await self.objects.put(object_keys.spec(JOB.id), spec)
        written = await self.ledger.apply(AddJob(JOB, JobState.SUBMITTED, cut))
        live = LiveJob(written.rows.job, {s.counts.stage: s for s in written.rows.stages})
        live.add_outstanding([(BUNDLE, 0.0)])
        self.lives[JOB.id] = live

    async def take(self, *bodies: str, first: int = 0) -> None:
        """Let the collector process messages with these bodies."""
        messages = [Message(f"m-{first + n}", body, "r", 1, 0.0, 0.0) for n, body in enumerate(bodies)]
        await self.collector._process(messages)


def is_malformed(text: str) -> bool:
    try:
        read_events_message(text)
    except (Malformed, TooNew):
        return True
    return False


def test_the_manager_counts_nothing_of_malformed_events_and_reports_each_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch of malformed events arrives twice, together with a well-formed event."""
    seen = 0
    caplog.set_level(logging.ERROR)
    good = events_message(Events(duplicates=EVENTS.duplicates))

    async def main() -> None:
        desk = Desk()
        await desk.open()
        before = await desk.ledger.rows(JOB.id)
        loop = asyncio.get_running_loop()

        @many
        @given(st.lists(mutated(events_message(EVENTS)), min_size=1, max_size=10))
        def take(texts: list[str]) -> None:
            nonlocal seen
            bad = [text for text in texts if is_malformed(text)]
            batch = [*bad[:5], good, *bad[5:]]
            first, seen = seen, seen + len(batch)
            reported = desk.counts.unreadable["event"]
            caplog.clear()
            for _ in range(2):
                drive(loop, desk.take(*batch, first=first))
            assert desk.counts.unreadable["event"] - reported == len(bad)
            told = [record for record in caplog.records if "dropped an event" in record.getMessage()]
            assert len(told) == len(bad)

        await asyncio.to_thread(take)
        assert await desk.ledger.rows(JOB.id) == before
        assert desk.duplicates == {EVENTS.duplicates[0]}
        assert desk.counts.bundles == desk.counts.repeated == 0
        await desk.ledger.close()

    asyncio.run(main())
    assert seen


def drive(loop: asyncio.AbstractEventLoop, work: Any) -> Any:
    """Run a coroutine in `loop`, from the thread of hypothesis."""
    return asyncio.run_coroutine_threadsafe(work, loop).result(60)


def test_unreadable_outcome_is_replaced_and_a_rebuild_continues(caplog: pytest.LogCaptureFixture) -> None:
    """For any content at an outcome's key, the job continues, and a rebuild restores the job with the outcomes that its
    manager has counted."""
    caplog.set_level(logging.ERROR)

    key = object_keys.outcome(BUNDLE, UNSEALED)

    async def main() -> None:
        loop, desk = asyncio.get_running_loop(), Desk()
        await desk.open()

        @many
        @given(mutated(outcome_text()).map(lambda text: text.encode(errors="surrogatepass")))
        @example(b"")
        @example(b'{"v":1}')
        @example(b'{"v":99}')
        @example(b"\xff\xfe{\x00")
        @example(b'{"v":1,"x":[' + b"[]," * 1000 + b"[]]}")
        def replace_(data: bytes) -> None:
            drive(loop, one(desk, data))

        await asyncio.to_thread(replace_)
        await desk.ledger.close()

    async def one(desk: Desk, data: bytes) -> None:
        await desk.objects.delete([key, object_keys.replacement(BUNDLE)])
        await rebuild(desk.ports)  # the rebuild must restore the state from before
        desk.judge_anew()
        await desk.objects.put(key, data)
        caplog.clear()
        outcome = await desk.outcomes.read(JOB, BUNDLE)
        assert outcome
        assert await desk.outcomes.read(JOB, BUNDLE) == outcome
        is_replaced = outcome.execution == "manager"
        assert desk.counts.unreadable["outcome"] == is_replaced
        told = [line for line in caplog.records if "went on without" in line.getMessage()]
        assert len(told) == is_replaced
        if is_replaced:
            assert key in outcome.failed[0].reason
            assert [f.bundle.attempt for f in outcome.follows] == [2]
            assert key in desk.quarantine.trouble(JOB.id)
        await desk.ledger_writer.fold([settlement.completion(outcome)])
        before = await desk.ledger.rows(JOB.id)
        rebuilt = await rebuild(desk.ports)
        assert (rebuilt.jobs, rebuilt.unreadable) == (1, {})
        # A conductor plans the second stage, but this desk does not have a conductor.
        assert (await desk.ledger.rows(JOB.id)).stages[0] == before.stages[0]

    asyncio.run(main())


def test_a_number_beyond_all_floats_and_a_foreign_stage_are_not_taken() -> None:
    """The number 1e999 is read as infinity, which JSON cannot represent. Before, a follow-up in an unknown stage ended
    the manager with a KeyError."""
    infinite = outcome_text().replace('{"x":[0,null]}', '{"x":[1e999,null]}')
    assert infinite != outcome_text()
    with pytest.raises(Malformed):
        outcome_of(infinite)
    foreign = outcome_of(outcome_text().replace('"s":"next"', '"s":"foreign"'))
    assert foreign != OUTCOME
    with pytest.raises(Malformed):
        follow_ups(JOB, foreign, UNSEALED, now_s=1.0)

    async def main() -> None:
        desk = Desk()
        await desk.open()
        text = json_format.outcome_text(foreign)
        await desk.objects.put(object_keys.outcome(BUNDLE, UNSEALED), text.encode())
        found = await desk.outcomes.read(JOB, BUNDLE)
        assert found
        assert found.execution == "manager"
        await desk.take(events_message(Events((settlement.completion(foreign),))))
        assert desk.counts.bundles == 0
        await desk.ledger.close()

    asyncio.run(main())


def test_a_rebuild_names_each_unreadable_object_and_restores_every_other_job() -> None:
    """One unreadable object does not prevent the restore of its job or of other jobs (I7)."""

    async def main() -> None:
        desk = Desk()
        await desk.open()
        other = replace(JOB, id=JobId("other-0123456789"))
        broken = replace(JOB, id=JobId("broken-0123456789"))
        for one in (other, broken):
            await desk.objects.put(object_keys.spec(one.id), commit_keys.to_bytes(one))
        cut = object_keys.cut(broken.id, MAP, 0, 0)
        await desk.objects.put(cut, b"{}")
        await desk.objects.put(object_keys.outcome(BUNDLE, UNSEALED), b'{"v":1}')
        rebuilt = await rebuild(desk.ports)
        assert rebuilt.jobs == 2
        assert set(rebuilt.unreadable) == {cut, object_keys.outcome(BUNDLE, UNSEALED)}
        assert {rows.id for rows in await desk.ledger.jobs()} == {JOB.id, other.id}
        await desk.ledger.close()

    asyncio.run(main())


def test_a_worker_names_only_outcomes_and_none_is_read_that_is_too_large() -> None:
    """An event with a raw data key is refused, and an outcome that is too large is not read."""
    with pytest.raises(Malformed):
        read_events_message('{"v":1,"k":["raw/big.csv"]}')
    heavy = b'{"v":1,"x":[' + b"[]," * (OUTCOME_WEIGHT // 25) + b"[]]}"
    assert len(heavy) < OUTCOME_WEIGHT
    with pytest.raises(Malformed, match="larger than an outcome may be"):
        json_format.outcome_from_bytes(heavy, object_keys.outcome(BUNDLE, UNSEALED))

    async def main() -> None:
        objects = SimObjects()
        await objects.put("x", b"x" * 11)
        with pytest.raises(TooLarge):
            await objects.get("x", limit=10)
        assert await objects.get("x", limit=11) == b"x" * 11

    asyncio.run(main())


def test_a_worker_writes_no_outcome_that_is_too_heavy_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values above the limit are stored separately, and tracebacks are omitted."""
    monkeypatch.setattr(task_executor, "INLINE_WEIGHT", 2_000)
    monkeypatch.setattr(handlers, "load", lambda *_: lambda item, _: "x" * item)
    request = task_executor.ExecutionRequest(
        handler="m:f",
        function=None,
        command=[],
        stdout=None,
        code="",
        params_json="{}",
        job=JOB.id,
        stage=MAP,
        attempt=1,
        folder=str(tmp_path),
        cwd="",
        prefix="files/x/",
        objects=False,
    )
    made = task_executor.TaskExecutor(request)
    done = [made.run(task, 900) for task in range(4)] + [made.run(4, 3)]
    assert [bool(one.uploads) for one in done] == [False, False, True, True, False]
    long = replace(FAILURE, traceback="x" * 12_000, final=True, pickled="x" * 1000)
    ran = [Ran(task, 0.1, failure=long) for task in range(4096)]
    bundle = replace(BUNDLE, tasks=TaskSet.span(0, 4096), attempt=2)
    outcome = settlement.settle(
        job=JOB, bundle=bundle, ran=ran, execution="w-1-1", worker="w-1", started_s=1.0, ended_s=2.0
    )
    assert json_format.is_too_heavy(json_format.outcome_text(outcome))
    assert not json_format.is_too_heavy(json_format.outcome_text(json_format.fitting(outcome)))


def test_pickled_exceptions_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of a job file has no pickled exception, and an execution has a limited number of them."""
    monkeypatch.setattr(handlers, "load", lambda *_: lambda item, _: item)
    for objects in (True, False):
        request = task_executor.ExecutionRequest(
            handler="pickle:code/x.pkl",
            function=None,
            command=[],
            stdout=None,
            code="",
            params_json="{}",
            job=JOB.id,
            stage=MAP,
            attempt=1,
            folder=str(tmp_path),
            cwd="",
            prefix="files/x/",
            objects=objects,
        )
        made = task_executor.TaskExecutor(request)
        sent = [10, 100_000, *[20_000] * 100]
        faults = [made.explain(task, ValueError("x" * size)) for task, size in enumerate(sent)]
        sizes = [len(fault.get("pickled", "")) for fault in faults]
        if not objects:
            assert not any("pickled" in fault for fault in faults)
            continue
        assert 0 < sizes[0] <= task_executor.MAX_EXCEPTION_BYTES
        assert 0 < sizes[1] < 2 * exception_pickling.MAX_PART_BYTES
        assert faults[-1]["pickled"] == "@0"
        assert sum(sizes) <= task_executor.MAX_EXCEPTIONS_BYTES
    for wrong in (7, None, "x" * (MAX_TEXT + 1)):
        doc: Any = json_format.outcome_to_json(OUTCOME)
        doc["failed"][0]["pickled"] = wrong
        with pytest.raises(ValueError, match="text of at most"):
            json_format.outcome_from_json(doc)


# --- A whole manager -----------------------------------------------------------------------------

BAD_EVENTS = [
    '{"v":1,"c":[{"b":{}}]}',
    '{"v":1,"c":1}',
    "[]",
    "null",
    "",
    "{",
    '{"v":true}',
    '{"v":99}',
    '{"v":1,"k":["raw/big.csv"]}',
    '{"v":1,"k":["jobs/A/B/running/x/outcomes/00/00000000-00000000.0.1.json"]}',
    '{"v":1,"o":' + "[" * 5_000 + "]" * 5_000 + "}",
    '{"v":1,"h":[{"worker":"\\ud800"}]}',
]


def _forged(**changes: Any) -> str:
    doc = json_format.completion_to_json(settlement.completion(OUTCOME)) | changes
    return json.dumps({"v": 1, "c": [doc]})


BAD_EVENTS += [
    _forged(**{name: value})
    for name in ("b", "t0", "t1", "ok", "no", "x", "run", "next", "re", "w")
    for value in (10**30, 1e300, "\ud800", [[3, 1]], None, {"j": "A/B/running/x"})
]
BAD_EVENTS += [
    _forged(b={"j": "A/B/running/x", "s": "map", "t": [[0, 1]], "a": 1}),
    _forged(b={"j": JOB.id, "s": "map", "t": [], "a": 1}),
    _forged(b={"j": JOB.id, "s": "map", "t": [[0, 1 << 39]], "a": 1}),
]


@pytest.mark.parametrize("stored", [b'{"v":1}', b'{"v":99}'], ids=["empty", "of a later release"])
def test_manager_survives_any_bad_event_and_object(rig: Rig, worker: WorkerRights, stored: bytes) -> None:
    """The manager receives bad events and a bad outcome object, and both jobs end."""
    spared = rig.submit(job("spared", tasks=2))
    hurt = rig.submit(job("hurt", "u", tasks=1, retry=RetryRule(attempts=2, backoff_s=0.0)))
    rig.outstanding(spared, 2)
    live = rig.manager.lives[JobId(hurt)]
    (bundle,) = (one.bundle for one in rig.outstanding(hurt, 1))
    key = object_keys.outcome(bundle, rig.run(rig.manager.ports.keys.key_of(live.job)))
    worker.put(key, stored, if_absent=True)
    for body in BAD_EVENTS:
        worker.send_events(body)
    counts = rig.manager.counts
    rig.until(lambda: counts.unreadable["event"] == len(BAD_EVENTS), "the report of each event")
    # The message of the bundle is lost, and the bundle has been silent for a long time.
    rig.run(rig.queue.purge(object_keys.tasks_queue("default")))
    live.outstanding[bundle.stage][bundle.id].heard_s = -1e9
    rig.until(lambda: counts.unreadable["outcome"] == 1, "the report of the outcome")
    assert key in rig.client.why(hurt)
    rig.until(lambda: bundle.id not in live.outstanding[bundle.stage], "the replacement")
    rig.work(hurt, 1)
    rig.work(spared, 2)
    assert rig.ended(hurt)["state"] == rig.ended(spared)["state"] == "SUCCEEDED"
    assert rig.ended(spared)["stages"][0]["succeeded"] == 2
    metrics = api_rig.get(rig, "/metrics").text
    assert f'batchlab_unreadable_total{{kind="event"}} {len(BAD_EVENTS)}.0' in metrics
    assert rig.client.grid()["unreadable"] == len(BAD_EVENTS) + 1
    assert rig.client.rebuild_ledger() == {"jobs": 2, "unreadable": []}
