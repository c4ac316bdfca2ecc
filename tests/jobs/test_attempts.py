"""The attempts, log, and input of a task, read from the bucket alone."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, Follow, JobId, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import commit_keys, json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import Manifest
from batchlab.core.protocol.commit_keys import Opening
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey
from batchlab.jobs import attempts
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from tests.support.cli import runner

MAP, NEXT, SUM = StageName("map"), StageName("next"), StageName("sum")
JOB = JobDef(
    JobId("job-1"),
    "job",
    (
        StageDef(MAP, handler="m:f"),
        StageDef(NEXT, after=(MAP,), handler="m:g"),
        StageDef(SUM, after=(MAP,), gather="*", handler="m:h"),
    ),
    1.0,
    items=3,
)
PATIENCE = Patience(random.Random(0), limit_s=0.0)


async def a_bucket() -> SimObjects:
    """Return a bucket in which task 1 of `map` failed, was retried, and succeeded, and task 2 failed in its last
    attempt."""
    objects = SimObjects()
    opening = Opening(["a", "b", {"c": 1}])
    await objects.put(object_keys.spec(JOB.id), commit_keys.to_bytes(JOB, opening))
    first = Bundle(JOB.id, MAP, TaskSet.span(0, 3))
    log = object_keys.log(first, "w-1-1", UNSEALED)
    await objects.put(log, b"hello\nodd\n")
    failures = tuple(
        Failure(task, FailureKind.EXCEPTION, "no", "ValueError", run_s=0.5, final=final)
        for task, final in ((1, False), (2, True))
    )
    spans = ((0, 0, 6), (1, 6, 10))
    await _commit(
        objects,
        Outcome(
            first,
            "w-1-1",
            "w-1",
            1.0,
            2.0,
            TaskSet.from_indices([0]),
            (10,),
            (0.25,),
            failures,
            follows=(Follow(Bundle(JOB.id, MAP, TaskSet.from_indices([1]), attempt=2)),),
            log=log,
            log_spans=spans,
        ),
    )
    again = Bundle(JOB.id, MAP, TaskSet.from_indices([1]), attempt=2)
    done = Outcome(again, "w-2-1", "w-2", 3.0, 4.0, TaskSet.from_indices([1]), (20,), (0.1,))
    await _commit(objects, done)
    return objects


async def _commit(objects: SimObjects, outcome: Outcome) -> None:
    await objects.put(
        object_keys.outcome(outcome.bundle, UNSEALED), json_format.to_bytes(json_format.outcome_to_json(outcome))
    )


def test_each_attempt_has_its_end_and_output() -> None:
    async def main() -> None:
        objects = await a_bucket()
        found = await attempts.attempts(objects, JOB, MAP, 1, PATIENCE)
        assert [one.state for one in found] == ["RETRIED", "SUCCEEDED"]
        assert [one.run_s for one in found] == [0.5, 0.1]
        assert [bool(one.fingerprint) for one in found] == [True, False]
        assert found[1].value == 20
        logs = [await attempts.printed_output(objects, one.outcome, [1], PATIENCE) for one in found]
        assert [log[1] for log in logs] == [b"odd\n", b""]
        (other,) = await attempts.attempts(objects, JOB, MAP, 0, PATIENCE)
        assert (other.state, other.name) == ("SUCCEEDED", "map/0")
        assert not await attempts.attempts(objects, JOB, MAP, 3, PATIENCE)
        await objects.delete([found[0].outcome.log])
        with pytest.raises(NotFound):
            await attempts.printed_output(objects, found[0].outcome, [1], PATIENCE)

    asyncio.run(main())


def test_the_attempt_that_is_meant_is_the_last_one_that_failed() -> None:
    async def main() -> None:
        found = await attempts.attempts(await a_bucket(), JOB, MAP, 1, PATIENCE)
        assert attempts.choose(found) == found[0]
        assert attempts.choose(found, 2) == found[1]
        assert attempts.choose(found, 3) is None
        assert attempts.choose(found, 1, 1) is None
        assert attempts.choose([]) is None

    asyncio.run(main())


def test_a_task_is_given_what_its_worker_was_given() -> None:
    async def main() -> None:
        objects = await a_bucket()

        async def given(stage: StageName, task: int) -> Any:
            found = await attempts.attempts(objects, JOB, stage, task, PATIENCE)
            one = attempts.choose(found)
            bundle = one.bundle if one else await attempts.task_bundle(objects, JOB, stage, task, PATIENCE)
            return await attempts.task_input(objects, JOB, bundle, PATIENCE)

        assert await given(MAP, 2) == {"c": 1}
        # One task has not run yet, and the input of another task is the result of its upstream task.
        assert await given(NEXT, 1) == 20
        with pytest.raises(UsageError, match="map/2 has not succeeded"):
            await given(NEXT, 2)
        with pytest.raises(NotFound, match="does not contain task map/3"):
            await given(MAP, 3)
        await objects.put(object_keys.part(JOB.id, SUM, 0, object_keys.old_part(0)), _part(objects))
        await objects.put(object_keys.manifest(JOB.id, SUM, 0), Manifest(1, (0,)).to_bytes())
        assert await given(SUM, 0) == [10, 20]

    asyncio.run(main())


def test_an_input_that_only_a_retry_has_gathered_is_found() -> None:
    """A gather after failed tasks is planned only when these tasks have succeeded in a later round."""

    async def main() -> None:
        objects = await a_bucket()
        bundle = await attempts.task_bundle(objects, JOB, SUM, 0, PATIENCE)
        with pytest.raises(NotFound):
            await attempts.task_input(objects, JOB, bundle, PATIENCE)
        await objects.put(object_keys.retry(JOB.id, 1), b"{}")
        await objects.put(object_keys.part(JOB.id, SUM, 1, object_keys.old_part(0)), _part(objects))
        plan = Manifest(1, (0,), round=1)
        await objects.put(object_keys.manifest(JOB.id, SUM, 1), plan.to_bytes())
        bundle = await attempts.task_bundle(objects, JOB, SUM, 0, PATIENCE)
        assert await attempts.task_input(objects, JOB, bundle, PATIENCE) == [10, 20]

    asyncio.run(main())


def _part(_: SimObjects) -> bytes:
    first = Bundle(JOB.id, MAP, TaskSet.span(0, 3))
    again = Bundle(JOB.id, MAP, TaskSet.from_indices([1]), attempt=2)
    item = {"$gather": {MAP: [[first.id, [[0, 1]]], [again.id, [[1, 2]]]]}}
    return json_format.to_bytes({"v": json_format.VERSION, "items": [item]})


def test_an_input_is_described_in_a_few_words() -> None:
    describe = attempts.describe
    assert describe(values.file_ref("raw/j/a.csv", "a.csv", 1234)) == "the file a.csv (1,234 bytes)"
    part = values.part_ref("raw/j/a.csv", 100, 1100, name="a.csv", header=(0, 10))
    assert describe(part) == "1,000 bytes of a.csv, from byte 100, after its header"
    assert describe([1, values.file_ref("k", "n", 1)]) == "a list of 2, which refers to 1 object"
    assert describe({"a": [1]}) == '{"a":[1]}'
    assert len(describe("x" * 1000)) == 200
    assert json.loads(describe(5)) == 5


def test_keys_of_outcomes_are_read_back() -> None:
    bundle = Bundle(JOB.id, MAP, TaskSet.span(3, 9), attempt=2, round=1)
    for key in (UNSEALED, CommitKey("0f" * 16)):
        found = object_keys.outcome_key(object_keys.outcome(bundle, key))
        assert found == object_keys.OutcomeKey(JOB.id, MAP, bundle.id, 3, 8, 1, 2)
        assert object_keys.is_genuine(object_keys.outcome(bundle, key), key)
        assert not object_keys.is_genuine(object_keys.outcome(bundle, key), CommitKey("0e" * 16))
    assert object_keys.outcome_key(object_keys.manifest(JOB.id, MAP, 0)) is None


def test_end_of_a_log_in_several_places_is_found() -> None:
    """A task that was restarted after the loss of its process has output from before and after the restart."""
    log = b"first\nother\nsecond\n"
    outcome = Outcome(
        Bundle(JOB.id, MAP, TaskSet.span(0, 2)),
        "w-1-1",
        "w-1",
        1.0,
        2.0,
        TaskSet.span(0, 2),
        (1, 2),
        (0.1, 0.1),
        log="log",
        log_spans=((0, 0, 6), (1, 6, 12), (0, 12, 19)),
    )

    async def read(start: int, stop: int) -> bytes:
        return log[start:stop]

    def end(task: int, limit: int) -> tuple[bytes, int]:
        return asyncio.run(attempts.log_end(outcome, task, limit, read))

    assert end(0, 100) == (b"first\nsecond\n", 0)
    assert end(0, 9) == (b"t\nsecond\n"[-9:], 4)
    assert end(0, 7) == (b"second\n", 6)
    assert end(0, 3) == (b"nd\n", 10)
    assert end(1, 100) == (b"other\n", 0)
    assert end(5, 100) == (b"", 0)


def test_unknown_task_is_refused_with_the_existing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, `job show` reported that no attempt of the task had ended yet, and exited with 0."""
    run = runner(monkeypatch, capsys)
    objects = factory.load("local").open_objects(Home(tmp_path))
    spec = commit_keys.to_bytes(JOB, Opening(["a", "b", "c"]))
    asyncio.run(objects.put(object_keys.spec(JOB.id), spec))
    for task in ("map/3", "next/3"):
        code, out, err = run("job", "show", JOB.id, task, "--home", tmp_path)
        assert (code, out) == (2, "")
        assert f"does not contain task {task}." in err
        assert "Stage map has 3 tasks, counted from 0." in err
    # Tasks that have not started yet are shown.
    for task in ("map/2", "next/2", "sum/0"):
        code, out, _ = run("job", "show", JOB.id, task, "--home", tmp_path)
        assert code == 0
        assert "No attempt of the task has ended yet." in out


def test_unreadable_record_of_images_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    objects = factory.load("local").open_objects(Home(tmp_path))

    async def copy() -> None:
        bucket = await a_bucket()
        async for page in bucket.list(""):
            for one in page:
                await objects.put(one.key, await bucket.get(one.key))
        await objects.put(object_keys.POOL_IMAGES, b"{}")

    asyncio.run(copy())
    code, out, err = run("job", "show", JOB.id, "map/1", "--home", tmp_path)
    assert (code, "SUCCEEDED" in out) == (0, True)
    assert "Warning: The record of the images of pools cannot be read (KeyError: 'pools')." in err
    assert "Restore or delete the object grid/pool-images.json, and restart the manager." in err
