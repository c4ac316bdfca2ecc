"""Unreadable objects in the bucket: each reader returns a value or raises one kind of error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.adapters.sim.objects import SimObjects
from batchlab.errors import BackendError, Malformed, TooNew
from batchlab.jobdef import InputDef, JobDef, NotifyDef
from batchlab.manager.retries import Retry
from batchlab.model import Control, JobId, JobState, TaskSet
from batchlab.ports import Cut, Ending, Reopening
from batchlab.protocol import definition, naming, wire
from batchlab.protocol.sealing import CommitKey
from batchlab.schedule import model
from batchlab.schedule.model import Definition, Run, RunState, Schedule, When
from batchlab.worker import environment, suspects, tails
from batchlab.worker.inputs import Manifest
from tests.attacks.test_malformed import BUNDLE, JOB, MAP, many, mutated
from tests.attacks.worker_rights import WorkerRights
from tests.integration.api_rig import TOKEN, Rig, job

KEY = CommitKey("0f" * 16)
TAIL = tails.Tail("map", 3, 1, 0, BUNDLE.id, "w-1-1", 0, 5, "hello")
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
    runs=(Run(4.0, "t", RunState.RUNNING, 5.0, JOB.id, peak=(("default", 2),), tasks=3),),
)

Reader = tuple[bytes, Callable[[bytes], Any], Callable[[Any], bytes]]


def document(read: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], Any]:
    return lambda data: read(wire.loads(data))


def text_of(write: Callable[[Any], Any]) -> Callable[[Any], bytes]:
    return lambda value: wire.to_bytes(write(value))


def readers() -> dict[str, Reader]:
    """Return the content, reader, and writer of each kind of stored object."""
    word = wire.Word(Control.CANCEL, JobState.CANCELLED, "why", 1, 2, 3.0)
    opening = definition.Opening([1, 2], CUT)
    ending = Ending(JobState.FAILED, "why", 9.0, {MAP: 1})
    retry = Retry((Reopening(MAP, 1, 2, 3, True),), (CUT,))
    manifest = Manifest(20, (0, 10), TaskSet.of([3]), 1, ("a", "b"))
    cut, end = text_of(wire.cut_to_json), text_of(wire.ending_to_json)
    spec = document(definition.from_json)
    there = text_of(environment.to_json)
    return {
        "control": (wire.word_to_bytes(word), wire.word_from_bytes, wire.word_to_bytes),
        "cut": (cut(CUT), document(wire.cut_from_json), cut),
        "end": (end(ending), document(wire.ending_from_json), end),
        "retry": (retry.to_bytes(), Retry.from_bytes, Retry.to_bytes),
        "manifest": (manifest.to_bytes(), Manifest.from_bytes, Manifest.to_bytes),
        "spec": (definition.to_bytes(FULL, opening), spec, lambda v: definition.to_bytes(*v)),
        "schedule": (model.to_bytes(SCHEDULE), model.from_bytes, model.to_bytes),
        "tails": (tails.to_bytes([TAIL]), tails.from_bytes, tails.to_bytes),
        "environment": (there(environment.here()), document(environment.from_json), there),
    }


READERS = readers()


@many
@given(
    st.sampled_from(sorted(READERS)).flatmap(
        lambda kind: st.tuples(st.just(kind), mutated(READERS[kind][0].decode()))
    )
)
def test_a_stored_object_is_a_value_that_can_be_written_again_or_one_error(
    given_: tuple[str, str],
) -> None:
    kind, text = given_
    _, read, write = READERS[kind]
    try:
        value = read(text.encode(errors="surrogatepass"))
    except (Malformed, TooNew):
        return
    written = write(value)
    assert write(read(written)) == written


@pytest.mark.parametrize("kind", sorted(READERS))
def test_what_is_written_is_read(kind: str) -> None:
    data, read, write = READERS[kind]
    assert write(read(data)) == data


GARBAGE = (b'{"v":1}', b'{"v":99}', b"x", b"\xff", b'{"v":1,"worker":"w","at_s":"never"}', b"[]")


def test_a_running_marker_that_cannot_be_read_counts_for_nothing() -> None:
    """Finding 5: any worker that lists the bucket can overwrite a running marker. Before, a marker
    without a time ended each worker that read it."""
    name = naming.running(BUNDLE, KEY)
    assert suspects.marked_s(suspects.marker("w-1", 5.0, name, KEY), name, KEY) == 5.0
    for data in (*GARBAGE, suspects.marker("w-1", 5.0, "other", KEY)):
        assert suspects.marked_s(data, name, KEY) is None


def test_an_environment_that_cannot_be_read_is_not_known() -> None:
    """A compromised worker overwrites the environment of another worker."""

    async def main() -> None:
        objects = SimObjects()

        async def once(call: Callable[[], Any]) -> Any:
            return await call()

        for data in GARBAGE:
            await objects.put(naming.environment("w-1"), data)
            assert await environment.of(objects, "w-1", once) is None  # type: ignore[arg-type]

    asyncio.run(main())


def test_live_logs_go_on_without_those_that_cannot_be_read(rig: Rig, worker: WorkerRights) -> None:
    """A compromised worker stores unreadable live logs for another job."""
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    for number, data in enumerate((*GARBAGE, b'{"v":1,"tails":[{"stage":[],"bundle":{}}]}')):
        worker.put(f"{naming.tails(JobId(name))}w-{number}.json", data)
    answer = rig.http.post(f"/v1/jobs/{name}/tails", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tails"] == []


def test_a_definition_with_values_of_another_type_is_refused() -> None:
    """A definition with wrong types must not end a manager or a worker."""
    for changes in (
        {"priority": "high"},
        {"submitted_s": None},
        {"params": [["a"]]},
        {"stages": [{**wire.job_to_json(JOB)["stages"][0], "slots": "two"}]},
        {"notify": [{"kind": 1, "to": "x", "on": []}]},
    ):
        with pytest.raises(BackendError):
            wire.job_from_json({**wire.job_to_json(JOB), **changes})
    assert isinstance(wire.job_from_json(wire.job_to_json(FULL)), JobDef)
