"""Unreadable objects in the bucket, for which each reader returns a value or raises one kind of error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core import schedules
from batchlab.core.errors import BackendError, Malformed, NotFound, TooNew
from batchlab.core.job_definition import InputDef, JobDef, NotifyDef
from batchlab.core.model import Bundle, Control, JobId, JobState, Json, StageCounts, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Cut, Depth, Ending, JobRecord, Reopening, StageRecord
from batchlab.core.protocol import commit_keys, json_format, messages, object_keys
from batchlab.core.protocol.bundle_inputs import Inputs, Manifest
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey
from batchlab.core.schedules import Definition, RunState, Schedule, ScheduledRun, When
from batchlab.manager import ledger_rebuild
from batchlab.manager.context import Context
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.quarantine import UnreadableObject
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.retry_rounds import Retry
from batchlab.manager.state import LiveJob, Superseded
from batchlab.worker import environment, poison_detection
from tests.attacks.test_malformed import BUNDLE, JOB, MAP, many, mutated
from tests.support.attacks.worker_rights import WorkerRights
from tests.support.server.api import TOKEN, Rig, job

KEY = CommitKey("0f" * 16)
TAIL = messages.Tail("map", 3, 1, 0, BUNDLE.id, "w-1-1", 0, 5, "hello")
FULL = replace(
    JOB,
    params=(("n", 3), ("deep", {"x": [1, None]})),
    tags=(("team", "a"),),
    notify=(NotifyDef("webhook", "https://x.example.org"),),
    input=InputDef(("raw/a.csv",)),
    items=None,
    max_cost_usd=1.5,
)
CUT = Cut(JOB.id, MAP, 0, 0, (BUNDLE,), TaskSet.span(10, 20), 20, 1.0)
SCHEDULE = Schedule(
    Definition("nightly", "sums", When("0 2 * * *"), "grid/templates/x.json"),
    1,
    2.0,
    3.0,
    runs=(ScheduledRun(4.0, "t", RunState.RUNNING, 5.0, JOB.id, peak=(("default", 2),), tasks=3),),
)

Reader = tuple[bytes, Callable[[bytes], Any], Callable[[Any], bytes]]


def document(read: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], Any]:
    return lambda data: read(json_format.loads(data))


def text_of(write: Callable[[Any], Any]) -> Callable[[Any], bytes]:
    return lambda value: json_format.to_bytes(write(value))


def readers() -> dict[str, Reader]:
    """Return the content, reader, and writer of each kind of stored object."""
    word = json_format.ControlCommand(Control.CANCEL, JobState.CANCELLED, "why", 1, 2, 3.0)
    opening = commit_keys.Opening([1, 2], CUT)
    ending = Ending(JobState.FAILED, "why", 9.0, {MAP: 1})
    retry = Retry((Reopening(MAP, 1, 2, 3, True),), (CUT,))
    manifest = Manifest(20, (0, 10), TaskSet.from_indices([3]), 1, ("a", "b"))
    cut, end = text_of(json_format.cut_to_json), text_of(json_format.ending_to_json)
    spec = document(commit_keys.from_json)
    there = text_of(environment.to_json)
    return {
        "control": (json_format.control_to_bytes(word), json_format.control_from_bytes, json_format.control_to_bytes),
        "cut": (cut(CUT), document(json_format.cut_from_json), cut),
        "end": (end(ending), document(json_format.ending_from_json), end),
        "retry": (retry.to_bytes(), Retry.from_bytes, Retry.to_bytes),
        "manifest": (manifest.to_bytes(), Manifest.from_bytes, Manifest.to_bytes),
        "spec": (commit_keys.to_bytes(FULL, opening), spec, lambda v: commit_keys.to_bytes(*v)),
        "schedule": (schedules.to_bytes(SCHEDULE), schedules.from_bytes, schedules.to_bytes),
        "tails": (messages.to_bytes([TAIL]), messages.from_bytes, messages.to_bytes),
        "environment": (there(environment.current()), document(environment.from_json), there),
    }


READERS = readers()


@many
@given(
    st.sampled_from(sorted(READERS)).flatmap(lambda kind: st.tuples(st.just(kind), mutated(READERS[kind][0].decode())))
)
def test_a_stored_object_is_a_value_that_can_be_written_again_or_one_error(given_: tuple[str, str]) -> None:
    kind, text = given_
    _, read, write = READERS[kind]
    try:
        value = read(text.encode(errors="surrogatepass"))
    except (Malformed, TooNew):
        return
    written = write(value)
    assert write(read(written)) == written


@pytest.mark.parametrize("kind", sorted(READERS))
def test_written_objects_are_readable(kind: str) -> None:
    data, read, write = READERS[kind]
    assert write(read(data)) == data


GARBAGE = (b'{"v":1}', b'{"v":99}', b"x", b"\xff", b'{"v":1,"worker":"w","at_s":"never"}', b"[]")


def test_a_running_marker_that_cannot_be_read_counts_for_nothing() -> None:
    """Any worker that lists the bucket can overwrite a running marker. Before, a marker without a time ended each
    worker that read the marker."""
    name = object_keys.running(BUNDLE, KEY)
    assert poison_detection.marked_s(poison_detection.marker("w-1", 5.0, name, KEY), name, KEY) == 5.0
    for data in (*GARBAGE, poison_detection.marker("w-1", 5.0, "other", KEY)):
        assert poison_detection.marked_s(data, name, KEY) is None


def test_unreadable_environment_is_treated_as_unknown() -> None:
    """A compromised worker overwrites the environment of another worker."""

    async def main() -> None:
        objects = SimObjects()

        async def once(call: Callable[[], Any]) -> Any:
            return await call()

        for data in GARBAGE:
            await objects.put(object_keys.environment("w-1"), data)
            assert await environment.load(objects, "w-1", once) is None  # type: ignore[arg-type]

    asyncio.run(main())


def test_live_logs_skip_unreadable_objects(rig: Rig, worker: WorkerRights) -> None:
    """A compromised worker stores unreadable live logs for another job."""
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    for number, data in enumerate((*GARBAGE, b'{"v":1,"tails":[{"stage":[],"bundle":{}}]}')):
        worker.put(f"{object_keys.tails(JobId(name))}w-{number}.json", data)
    answer = rig.http.post(f"/v1/jobs/{name}/tails", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tails"] == []


def test_definition_with_wrong_types_is_refused() -> None:
    """A definition with wrong types must not end a manager or a worker."""
    for changes in (
        {"priority": "high"},
        {"submitted_s": None},
        {"params": [["a"]]},
        {"stages": [{**json_format.job_to_json(JOB)["stages"][0], "slots": "two"}]},
        {"notify": [{"kind": 1, "to": "x", "on": []}]},
    ):
        with pytest.raises(BackendError):
            json_format.job_from_json({**json_format.job_to_json(JOB), **changes})
    assert isinstance(json_format.job_from_json(json_format.job_to_json(FULL)), JobDef)


# --- Documents of the right types that contradict themselves -------------------------------------

PATIENCE = Patience(Random(1))
LATER = TaskSet.span(10, 20)
INCONSISTENT: dict[str, dict[str, Json]] = {
    "a part without a name": {"starts": [0, 10], "parts": ["x"]},
    "no part": {"starts": [], "parts": []},
    "no first task": {"starts": [5], "parts": []},
    "a part that begins twice": {"starts": [0, 10, 10], "parts": []},
    "names of no part": {"count": 0, "starts": [], "parts": ["x"]},
}


@pytest.mark.parametrize("why", INCONSISTENT)
def test_a_plan_that_contradicts_itself_is_absent_for_its_tasks(why: str) -> None:
    """Before, an IndexError ended the manager and each worker that read such a plan."""
    made = json_format.loads(READERS["manifest"][0])
    data = json_format.to_bytes({**made, "round": 0, **INCONSISTENT[why]})
    with pytest.raises(Malformed, match="plan cannot be read"):
        Manifest.from_bytes(data)

    async def main() -> None:
        objects = SimObjects()
        await objects.put(object_keys.manifest(JOB.id, MAP, 0), data)
        with pytest.raises(NotFound, match="cannot be read"):
            await Inputs(objects, PATIENCE).resolve(JOB, replace(BUNDLE, tasks=LATER), UNSEALED)

    asyncio.run(main())


def test_plans_without_tasks_and_plans_of_the_first_release_are_read() -> None:
    for plan in (Manifest(0, ()), Manifest(0, (0,)), Manifest(20, (0, 10))):
        assert Manifest.from_bytes(plan.to_bytes()) == plan


def test_a_plan_that_names_a_lost_part_has_no_items_of_the_definition() -> None:
    """Before, a KeyError ended each worker that looked for the lost part of the plan."""

    async def main() -> None:
        objects = SimObjects()
        await objects.put(object_keys.spec(JOB.id), commit_keys.to_bytes(JOB, commit_keys.Opening([0] * 10)))
        plan = Manifest(10, (0,), parts=("lost",))
        await objects.put(object_keys.manifest(JOB.id, MAP, 0), plan.to_bytes())
        with pytest.raises(NotFound, match="lost"):
            await Inputs(objects, PATIENCE).resolve(JOB, BUNDLE, UNSEALED)

    asyncio.run(main())


@pytest.mark.parametrize(
    "gather", [5, {"map": 5}, {"map": [5]}, {"map": [["../x", [[0, 1]]]]}, {"map": [[BUNDLE.id, [[0]]]]}]
)
def test_task_with_an_unreadable_gathered_input_has_no_input(gather: Any) -> None:
    """Before, an AttributeError ended each worker that read such an input."""

    async def main() -> None:
        objects = SimObjects()
        part = json_format.to_bytes({"v": json_format.VERSION, "items": [{"$gather": gather}]})
        await objects.put(object_keys.manifest(JOB.id, MAP, 0), Manifest(1, (0,)).to_bytes())
        await objects.put(object_keys.part(JOB.id, MAP, 0, object_keys.old_part(0)), part)
        one = replace(BUNDLE, tasks=TaskSet.from_indices([0]))
        with pytest.raises(NotFound, match="input of a plan cannot be read"):
            await Inputs(objects, PATIENCE).resolve(JOB, one, UNSEALED)

    asyncio.run(main())


@pytest.mark.parametrize(
    "stranger",
    [replace(BUNDLE, job=JobId("other")), replace(BUNDLE, stage=StageName("next")), replace(BUNDLE, round=1)],
)
def test_cut_with_a_bundle_of_another_job_stage_or_round_is_refused(stranger: Bundle) -> None:
    with pytest.raises(Malformed, match="another job, stage or round"):
        json_format.cut_from_json(json_format.cut_to_json(replace(CUT, bundles=(BUNDLE, stranger))))


@pytest.mark.parametrize("cut", [replace(CUT, seq=1), replace(CUT, job=JobId("other"), bundles=())])
def test_definition_with_a_cut_of_another_job_is_refused(cut: Cut) -> None:
    doc = json_format.loads(commit_keys.to_bytes(JOB, commit_keys.Opening([1], cut)))
    with pytest.raises(Malformed, match="first cut"):
        commit_keys.from_json(doc)


def test_rebuild_does_not_count_a_cut_under_another_key() -> None:
    async def main() -> None:
        objects = SimObjects()
        keys = AsyncMock()
        keys.key_of.return_value = UNSEALED
        clock = SimpleNamespace(now_s=lambda: 1.0)
        ports: Any = SimpleNamespace(objects=objects, patience=PATIENCE, keys=keys, ledger=AsyncMock(), clock=clock)
        key = object_keys.cut(JOB.id, MAP, 0, 1)
        await objects.put(object_keys.spec(JOB.id), commit_keys.to_bytes(JOB))
        await objects.put(key, json_format.to_bytes(json_format.cut_to_json(CUT)))
        with pytest.raises(UnreadableObject, match="another cut") as caught:
            await ledger_rebuild.restore(ports, JOB.id)
        assert caught.value.key == key

    asyncio.run(main())


# --- Silent bundles ------------------------------------------------------------------------------


def reconciler_of(*lives: LiveJob) -> Reconciler:
    """Return a reconciler that has only a clock and a bucket."""
    clock = SimpleNamespace(monotonic_s=lambda: 1000.0)
    ports: Any = Mock(clock=clock, objects=SimObjects(), patience=PATIENCE)
    other: Any = None
    return Reconciler(Context(ports, lives=LiveJobs(lives), depths={"default": Depth(0, 0, 0)}), other, other)


def silent(name: str) -> LiveJob:
    made = replace(JOB, id=JobId(name))
    stages = {stage.name: StageRecord(StageCounts(stage.name)) for stage in made.stages}
    live = LiveJob(JobRecord(made, JobState.RUNNING), stages)
    live.add_outstanding([(replace(BUNDLE, job=made.id), 0.0)])
    return live


def test_a_bug_that_one_job_meets_does_not_keep_the_tick_from_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, over, last = silent("first"), silent("over"), silent("last")
    recovered: list[JobId] = []

    async def recover(_: Reconciler, live: LiveJob, __: object) -> None:
        recovered.append(live.id)
        if live is first:
            raise IndexError("damaged data")
        if live is over:
            raise Superseded(live)

    monkeypatch.setattr(Reconciler, "_recover", recover)
    look = reconciler_of(first, over, last).recover_silent
    asyncio.run(look())
    assert recovered == [first.id, over.id, last.id]
    assert "damaged data" in first.trouble
    assert "met a bug" in caplog.text
    assert over.ended.is_set()
    assert not last.ended.is_set()


def test_a_tick_that_is_cancelled_at_a_bug_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def recover(*_: object) -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            raise IndexError from None

    monkeypatch.setattr(Reconciler, "_recover", recover)

    async def main() -> None:
        look = reconciler_of(silent("first")).recover_silent()
        tick = asyncio.create_task(look)
        await asyncio.sleep(0)
        tick.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tick

    asyncio.run(main())


def test_a_tick_leaves_the_end_of_a_job_without_definition_to_the_task_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of such a job takes longer than a control lease, and a tick must not delay other jobs."""

    async def heed(*_: object) -> None:
        pass

    monkeypatch.setattr(Reconciler, "follow_control", heed)
    live = silent("first")
    for one in live.all_outstanding():
        one.resends = 1
    asyncio.run(reconciler_of(live).recover_silent())
    assert isinstance(live.unreadable, UnreadableObject)
    assert live.unreadable.key == object_keys.spec(live.id)
    assert live.wake.is_set()
