"""The allowed types of a job's results, and the objects that a result may refer to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.client.grid_link import Link
from batchlab.client.results import decode_all
from batchlab.core.commit import commit
from batchlab.core.errors import TaskFailed, UsageError
from batchlab.core.job_definition import InputDef, JobDef, StageDef
from batchlab.core.model import Bundle, Failure, JobId, Json, Outcome, StageCounts, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import settlement, values
from batchlab.core.protocol.bundle_inputs import ForeignReference, JobObjects
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.manager import stage_plans
from batchlab.manager.state import Ports
from batchlab.worker import materialization
from batchlab.worker.handlers import Problem
from batchlab.worker.task_executor import decode as item_of
from tests.server.test_api_files import fetched, forged
from tests.support.server.api import Rig

JOB = JobDef(
    JobId("sums-1"),
    "sums",
    (StageDef(StageName("map"), handler="m:f"),),
    1.0,
    InputDef(("raw/shared/a.csv", "raw/shared/more/")),
)
PYTHON = replace(JOB, stages=(StageDef(StageName("map"), handler="pickle:code/x"),))
FOREIGN = (
    "grid/notifications.json",
    "grid/commit-secret.json",
    "logs/sums-1/x",
    "reports/sums-1/x",
    "files/other-1/x",
    "raw/other-1/x",
    "jobs/other-1/spec.json",
    "files/sums-1/../other-1/x",
    "raw/shared/b.csv",
    "raw/shared/more/../b.csv",
    "files/sums-10/x",
    "",
    "/etc/passwd",
)
OWN = (
    "files/sums-1/map/aa/x",
    "raw/sums-1/0",
    "jobs/sums-1/map/plan/0000/item-1.json",
    "raw/shared/a.csv",
    "raw/shared/more/b.csv",
)


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(path: Path) -> Json:
    return {"$pickle": base64.b64encode(pickle.dumps(Touch(path))).decode()}


class FakeLink:
    """A link to a bucket in memory."""

    def __init__(self, folder: Path, objects: SimObjects) -> None:
        self.folder, self.objects, self.run = folder, objects, asyncio.run
        self.files = None


def test_a_pickled_result_of_a_job_file_is_not_unpickled(tmp_path: Path) -> None:
    """A client and a worker refuse a pickled value at any depth, and name the task."""
    made = tmp_path / "made"
    objects = SimObjects()
    text = json.dumps(pickled(made)).encode()
    asyncio.run(objects.put("files/sums-1/v", text))
    inside = values.value_ref("files/sums-1/v", hashlib.sha256(text).hexdigest())
    link = cast(Link, FakeLink(tmp_path, objects))
    forms = [pickled(made), [pickled(made)], {"a": pickled(made)}, inside]
    for form in forms:
        (told,) = decode_all(link, JOB.id, "map", [3], [form], JobObjects.of_job(JOB))
        assert isinstance(told, TaskFailed)
        assert "map/3" in str(told)
        assert "a job from a job file never has" in str(told)
    for form in forms[:3]:
        with pytest.raises(Problem, match="never has"):
            item_of(form, pickles=False)
    assert not made.exists()
    list(decode_all(link, JOB.id, "map", [3], [pickled(made)], JobObjects.of_job(PYTHON)))
    assert made.exists(), "the attack would have worked"


def test_references_name_objects_of_their_own_job_alone() -> None:
    """A reference may name only files, raw data, and plans of its own job, and the job's declared input."""
    own = JobObjects.of_job(JOB)
    for kind in ("$file", "$part", "$value"):
        for key in OWN:
            assert own.key({kind: key}) == key
        odd: tuple[Json, ...] = (*FOREIGN, None, 7, ["files/sums-1/x"])
        for name in odd:
            with pytest.raises(ForeignReference):
                own.key({kind: name})
    passed_on = JobObjects.of_job(PYTHON)
    assert passed_on.key({"$file": "files/other-1/x"})
    shared = f"code/values/values-1/{'0' * 64}.pkl"
    assert passed_on.key({"$file": shared})
    with pytest.raises(ForeignReference):
        own.key({"$file": shared})
    for key in (
        "grid/use.json",
        "logs/sums-1/x",
        "jobs/other-1/spec.json",
        "files/../grid/x",
        shared[:-1],
        f"code/{'0' * 64}.pkl",
    ):
        with pytest.raises(ForeignReference):
            passed_on.key({"$value": key})


def test_a_worker_fetches_no_foreign_object(tmp_path: Path) -> None:
    """The task fails without a read of the foreign object."""
    objects = SimObjects()
    inputs = materialization.Inputs(objects, tmp_path, asyncio.to_thread, JobObjects.of_job(JOB))
    for number, key in enumerate(FOREIGN):
        if key and ".." not in key:
            asyncio.run(objects.put(key.lstrip("/"), b'"secret"'))
        item = {"deep": [values.value_ref(key), values.file_ref(key, "x", 1)]}
        [(task, got)] = asyncio.run(inputs.fetch([(number, item)]))
        assert isinstance(got, Failure)
        assert (task, "not an object of job sums-1" in got.reason) == (number, True)


def test_a_large_value_that_was_written_over_is_refused(tmp_path: Path) -> None:
    """A reference to a large value contains the hash of the object."""
    objects = SimObjects()
    text = b'{"n": 1}'
    reference = values.value_ref("files/sums-1/v", hashlib.sha256(text).hexdigest())
    old = values.value_ref("files/sums-1/v")
    inputs = materialization.Inputs(objects, tmp_path, asyncio.to_thread, JobObjects.of_job(JOB))
    asyncio.run(objects.put("files/sums-1/v", text))
    assert asyncio.run(inputs.fetch([(0, reference), (1, old)])) == [(0, {"n": 1}), (1, {"n": 1})]
    asyncio.run(objects.put("files/sums-1/v", b'{"n": 2}'))
    [(_, got)] = asyncio.run(inputs.fetch([(0, reference)]))
    assert isinstance(got, Failure)
    assert "not the one that a task stored there" in got.reason


def test_an_archive_of_results_has_no_foreign_object(rig: Rig) -> None:
    """The manager may read every object, but does not read a foreign object for a result."""
    for number, key in enumerate(("grid/commit-secret.json", "grid/use.json", "logs/x")):
        for value in ({"$value": key}, {"$file": key, "name": "x", "size": 1}):
            name = forged(rig, f"{number}{len(value)}", value)
            answer = fetched(rig, name)
            assert answer.status_code == 422
            assert "is not an object of job" in answer.text


# --- Large results in the manager ----------------------------------------------------------------


class OneOutcome:
    """A ledger with one outcome of a stage."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    async def bundles(self, *_: Any, **__: Any) -> list[BundleRecord]:
        return [BundleRecord(self._outcome.bundle, settlement.completion(self._outcome), 1)]


@pytest.mark.parametrize(
    "data", [b'"' + b"x" * 2_000 + b'"', b"[" + b",".join([b"[]"] * 100) + b"]", b"[" * 600, b"{", b"\xff"]
)
def test_a_large_result_is_bounded_and_may_be_unreadable(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """A worker can store a large or unreadable result as a separate object, which the manager reads to gather by a
    field. The stage fails because of the object."""
    monkeypatch.setattr(stage_plans, "RESULT_WEIGHT", 1_500)
    gather = StageDef(StageName("sum"), (StageName("map"),), "key", handler="m:f")
    job = replace(JOB, stages=(*JOB.stages, gather))
    bundle = Bundle(job.id, StageName("map"), TaskSet.from_indices([0]))
    reference = {"$value": "files/sums-1/map/x"}
    outcome = Outcome(bundle, "e-1", "w", 1.0, 2.0, bundle.tasks, (reference,), (1.0,))

    async def main() -> None:
        objects, patience = SimObjects(), Patience(Random(1))
        await objects.put(reference["$value"], data)
        await commit(objects, outcome, patience, UNSEALED)
        ledger = cast(Any, OneOutcome(outcome))
        nothing = cast(Any, None)
        ports = Ports(objects, nothing, nothing, ledger, nothing, nothing, patience)
        counts = {StageName("map"): StageCounts(StageName("map"), 1, succeeded=1)}
        with pytest.raises(UsageError, match="cannot be read"):
            await stage_plans.StagePlans(ports).plan_stage(job, gather, 0, counts)

    asyncio.run(main())
