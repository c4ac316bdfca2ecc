"""A grid of two releases during an update. Each release reads or ignores what the other one writes."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.commit import address, committed
from batchlab.core.errors import BackendError, Malformed, TooNew
from batchlab.core.job_definition import JobDef, NotifyDef, SplitBy, StageDef
from batchlab.core.model import Bundle, Control, FailureKind, JobId, Ran, StageName, TaskSet
from batchlab.core.notifications import Notification
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Outgoing, QueueSpec
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.json_format import ControlCommand, control_from_bytes, control_to_bytes
from batchlab.core.protocol.messages import (
    Tail,
    TaskMessage,
    events_message,
    from_bytes,
    read_events_message,
    read_task_message,
    task_message,
    to_bytes,
)
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.retry_rule import RetryRule
from batchlab.core.service_settings import WorkerSettings
from batchlab.manager.notifier import Outbox
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.commit_and_forward import OTHERS_S
from batchlab.worker.inflight_message import Handle, Identity, Work
from batchlab.worker.loop import Worker

BEFORE = Path(__file__).parent / "wire_before"
"""Messages of releases without notification targets, traces, and protocol numbers."""
A, B = StageName("a"), StageName("b")
JOB = JobDef(JobId("sums-0123456789"), "sums", (StageDef(A, handler="m:f"),), 1.5)
BUNDLE = Bundle(JOB.id, A, TaskSet.span(0, 2))
ABOVE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def before(name: str) -> dict[str, Any]:
    return json_format.loads((BEFORE / f"{name}.json").read_bytes())


def later(value: Any) -> Any:
    """Return the value as a later release might write it, with more fields in every object."""
    if isinstance(value, dict):
        return {**{key: later(one) for key, one in value.items()}, "hue": {"of": ["later"]}}
    return [later(one) for one in value] if isinstance(value, list) else value


# --- Data of an earlier release ------------------------------------------------------------------


def test_a_job_of_an_earlier_release_is_read_and_written_as_it_was() -> None:
    job = json_format.job_from_json(before("job"))
    assert job.stage("a").retry == RetryRule(kinds=(FailureKind.TIMEOUT,))
    assert job.stage("b").command == ("wc", "-l")
    assert job.input
    assert job.input.split is SplitBy.LINES
    assert (job.params, job.tags, job.notify, job.trace) == ((("n", 3),), (("team", "blue"),), (), "")
    assert json.loads(json_format.dumps(json_format.job_to_json(job))) == before("job")


def test_messages_and_outcomes_of_an_earlier_release_are_read() -> None:
    message = read_task_message((BEFORE / "message.json").read_text())
    assert message == TaskMessage(BUNDLE, [1, "a"])
    outcome = json_format.outcome_from_json(before("outcome"))
    assert (outcome.values, [one.kind for one in outcome.failed]) == ((7,), [FailureKind.TIMEOUT])
    events = read_events_message((BEFORE / "events.json").read_text())
    assert events.outcomes == (outcome,)
    assert [duplicate.execution for duplicate in events.duplicates] == ["w-1-1"]
    assert events.requests[0].requests.sqs_bytes == 6
    assert events.beats[0].held[0].bundle == BUNDLE.id
    assert control_from_bytes((BEFORE / "word.json").read_bytes()).control is Control.CANCEL
    for name in ("message", "events", "outcome", "word"):
        made = {
            "message": lambda: json.loads(task_message(message)),
            "events": lambda: json.loads(events_message(events)),
            "outcome": lambda: json.loads(json_format.dumps(json_format.outcome_to_json(outcome))),
            "word": lambda: json.loads(control_to_bytes(ControlCommand(Control.CANCEL, reason="x"))),
        }[name]()
        known = before(name)
        known.pop("job", None)  # a worker reads the definition itself
        assert made == known, "and an earlier release reads what this one writes"


# --- Data of a later release ---------------------------------------------------------------------


def test_fields_of_a_later_release_are_ignored() -> None:
    assert json_format.job_from_json(later(before("job"))) == json_format.job_from_json(before("job"))
    told = replace(JOB, notify=(NotifyDef("sns", "arn:x"),), trace=ABOVE, max_cost_usd=1.0)
    doc = json.loads(json_format.dumps(json_format.job_to_json(told)))
    assert json_format.job_from_json(later(doc)) == told
    found = read_task_message(json.dumps(later(before("message"))))
    assert found == read_task_message((BEFORE / "message.json").read_text())
    assert json_format.outcome_from_json(later(before("outcome"))) == json_format.outcome_from_json(before("outcome"))
    doc = before("events")
    del doc["m"]  # the field has names and numbers of any kind, see Counts
    known = read_events_message(json.dumps(doc))
    doc = later(doc)
    doc["q"][0].append(7)
    doc["d"][0].append("more")
    assert read_events_message(json.dumps(doc)) == known
    word = (BEFORE / "word.json").read_bytes()
    assert control_from_bytes(json.dumps(later(before("word"))).encode()) == (control_from_bytes(word))


def test_notifications_and_output_of_other_releases_are_readable() -> None:
    own = NotifyDef("sns", "arn:x")
    one = Notification("id-1", "failed", JOB.id, f"{JOB.id}#1", own, "{}", 1.5)
    book = later(json.loads(Outbox({one.id: one}, [replace(one, id="id-0")]).to_bytes()))
    assert Outbox.from_bytes(json.dumps(book).encode()).pending == {one.id: one}
    tail = Tail(A, 0, 1, 0, BUNDLE.id, "w-1-1", 0, 6, "hello\n")
    tails = later(json.loads(to_bytes([tail])))
    assert from_bytes(json.dumps(tails).encode()) == [tail]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v": 2}, "format 2, and this batchlab knows 1"),
        ({"needs": 5}, "needs protocol 5, and this batchlab knows 4"),
        ({"needs": "2"}, "needs protocol 2, and this batchlab knows 4"),
        ({"stages": [{"name": "a"}]}, "cannot be read"),
        ({"stages": 3}, "cannot be read"),
        ({"input": {"keys": [], "split": "by-moon", "size": 1, "header": False}}, "by-moon"),
    ],
)
def test_required_unknown_field_is_refused(change: dict[str, Any], told: str) -> None:
    data = json.dumps({**before("job"), **change})
    with pytest.raises(TooNew, match=told):
        json_format.job_from_json(json_format.loads(data))


def test_unknown_control_word_permits_nothing() -> None:
    with pytest.raises(BackendError, match="'drain'"):
        control_from_bytes(b'{"v":1,"control":"drain"}')


def test_worker_message_has_no_field_for_managers_only() -> None:
    secret = "https://hooks.example.org/T0/s3cret"
    job = replace(JOB, notify=(NotifyDef("webhook", secret),), trace=ABOVE, max_cost_usd=1.0)
    body = address(job, BUNDLE, UNSEALED, now_s=1.0).message.body
    assert "s3cret" not in body
    assert secret in json_format.dumps(json_format.job_to_json(job)), "the bucket has it"


# --- A worker of the earlier release -------------------------------------------------------------


class Doing:
    """A runner that returns the item of each task as its result."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        self.ran.append(work.job.id)
        for task, item in zip(work.bundle.tasks, work.items, strict=True):
            yield Ran(task, 0.1, item)

    async def close(self) -> None: ...


class Scene:
    """A worker with its bucket and its queues."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        self.objects = SimObjects()
        self.queue = SimQueue(self.clock, rng)
        self.runner = Doing()
        self.patience = Patience(rng, limit_s=0.0)
        who = Identity("w-1", "i-1", "default", 2)
        self.tasks = object_keys.tasks_queue("default")
        self.worker = Worker(
            who=who,
            objects=self.objects,
            queue=self.queue,
            clock=self.clock,
            runner=self.runner,
            patience=self.patience,
            settings=WorkerSettings(),
        )

    async def prepare(self) -> None:
        dead = object_keys.dead_letters("default")
        for spec in (QueueSpec(object_keys.EVENTS), QueueSpec(dead)):
            await self.queue.ensure(spec)
        await self.queue.ensure(QueueSpec(self.tasks, dead_letters=dead, max_receives=3))

    async def send(self, job: JobDef, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
        bundle = replace(BUNDLE, job=job.id)
        doc = json.loads(task_message(TaskMessage(bundle, [1, 2])))
        spec = json.loads(commit_keys.to_bytes(job))
        change(doc, spec)
        await self.objects.put(object_keys.spec(job.id), json_format.to_bytes(spec))
        body = json.dumps(doc)
        await self.queue.send(self.tasks, [Outgoing(body)])
        return body


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def nothing(doc: dict[str, Any], spec: dict[str, Any]) -> None: ...


def newer_format(doc: dict[str, Any], spec: dict[str, Any]) -> None:
    doc["v"] = json_format.MENDED + 1


def newer_job(doc: dict[str, Any], spec: dict[str, Any]) -> None:
    spec["needs"] = json_format.PROTOCOL + 1


@pytest.mark.parametrize("change", [newer_format, newer_job])
def test_job_for_newer_workers_is_left_in_the_queue(
    change: Callable[[dict[str, Any], dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        scene = Scene()
        await scene.prepare()
        running = asyncio.create_task(scene.worker.run())
        body = await scene.send(JOB, change)
        # The message is returned more often than the maximum receive count.
        await asyncio.sleep(10 * OTHERS_S)
        assert not scene.runner.ran
        assert await committed(scene.objects, BUNDLE, scene.patience, UNSEALED) is None
        # The worker continues with the jobs that it knows.
        other = replace(JOB, id=JobId("other"))
        await scene.send(other, nothing)
        await asyncio.sleep(2.0)
        assert scene.runner.ran == ["other"]
        # A newer worker receives the message unchanged, and not as a suspect.
        scene.worker.drain()
        await running
        await asyncio.sleep(OTHERS_S)
        (message,) = await scene.queue.receive(scene.tasks, wait_s=1.0)
        assert (message.body, message.receive_count) == (body, 1)
        assert "is left for a newer worker" in caplog.text
        assert "this batchlab knows" in caplog.text

    play(main)


def test_bundle_received_by_older_workers_stays_suspect() -> None:
    async def main() -> None:
        scene = Scene()
        await scene.prepare()
        await scene.send(JOB, newer_format)
        (first,) = await scene.queue.receive(scene.tasks, wait_s=1.0)
        await scene.queue.change_visibility(scene.tasks, [(first.receipt, 0.0)])
        running = asyncio.create_task(scene.worker.run())
        await asyncio.sleep(1.0)
        scene.worker.drain()
        await running
        await asyncio.sleep(OTHERS_S)
        (message,) = await scene.queue.receive(scene.tasks, wait_s=1.0)
        assert (message.id, message.receive_count) == (first.id, 3)

    play(main)


# --- Invalid events ------------------------------------------------------------------------------

HELD = {"queue": "q", "receipt": "r", "job": "j", "stage": "s", "bundle": "00000000-00000009.0.1", "running": True}
BEAT = {"worker": "w", "instance": "i", "pool": "p", "at_s": 1.0, "slots": 1, "busy": 0}
DONE = {"b": {"j": "j", "s": "a", "t": [[0, 1]], "a": 1}, "w": "w", "t0": 1.0, "t1": 2.0}
DONE |= {"ok": [[0, 1]], "no": [], "x": [], "run": 0.1, "next": [], "re": 0}


@pytest.mark.parametrize(
    "mischief",
    [
        {"d": [["j", "s", "message", "w-1"]]},
        {"d": [["j", "s", "message", ["w-1"], 0.5]]},
        {"d": [[{"j": 1}, "s", "message", "w-1", 0.5]]},
        {"d": [["j", ["s"], "message", "w-1", 0.5]]},
        {"d": [["j", "s", 7, "w-1", 0.5]]},
        {"d": [["j", "s", "message", "w-1", "much"]]},
        {"d": [["j", "s", "message", "w-1", float("nan")]]},
        {"d": ["jsmwx"]},
        {"d": [7]},
        {"d": 7},
        {"q": [["w", ["i"], False, 1]]},
        {"q": [["w", "i", False, "1"]]},
        {"q": [["w", "i", False, float("inf")]]},
        {"q": [["w"]]},
        {"h": [{**BEAT, "number": 1, "held": [], "instance": ["i"]}]},
        {"h": [{**BEAT, "number": "1", "held": []}]},
        {"h": [{**BEAT, "number": 1, "held": [], "busy": None}]},
        {"h": [{**BEAT, "number": 1, "held": [{**HELD, "job": ["j"]}]}]},
        {"h": [{**BEAT, "number": 1, "held": [{**HELD, "receipt": 7}]}]},
        {"c": [{**DONE, "w": 7}]},
        {"c": [{**DONE, "t0": "early"}]},
        {"c": [{**DONE, "run": None}]},
        {"c": [{**DONE, "re": "often"}]},
        {"c": [{**DONE, "b": {**DONE["b"], "j": ["j"]}}]},  # type: ignore[dict-item]
        {"c": [{**DONE, "b": {**DONE["b"], "a": "1"}}]},  # type: ignore[dict-item]
        {"k": [7]},
        {"k": 7},
    ],
)
def test_event_of_another_shape_is_refused(mischief: dict[str, Any]) -> None:
    assert read_events_message(json.dumps({"v": 1, "c": [DONE]})).completions
    beat = {**BEAT, "number": 1, "held": [HELD]}
    assert read_events_message(json.dumps({"v": 1, "h": [beat]})).beats
    with pytest.raises(Malformed):
        read_events_message(json.dumps({"v": 1, **mischief}))
