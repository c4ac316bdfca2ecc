"""The page of a job with 100,000 tasks and many failures, which is as fast as that of a small job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from batchlab.core.commit import commit
from batchlab.core.job_definition import InputDef, JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, JobState, Outcome, StageName, TaskSet
from batchlab.core.ports import AddCut, AddJob, Cut, Fold
from batchlab.core.protocol import settlement
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.server.http.failures import MAX_OUTCOMES_READ
from tests.support.server.api import MAP, TOKEN, Rig

BUNDLES, TASKS, BAD = 2000, 50, 5
"""The number of bundles, of tasks per bundle, and of failed tasks in every second bundle."""
JOB = JobDef(
    JobId("large-0123456789"),
    "large",
    (StageDef(MAP, handler="m:f"), StageDef(StageName("sum"), after=(MAP,), gather="*", handler="m:g")),
    1_700_000_000.0,
    input=InputDef(keys=("raw/x",)),
    max_failures=10_000,
)


def outcome(number: int) -> Outcome:
    tasks = TaskSet.span(number * TASKS, (number + 1) * TASKS)
    bad = tasks.split_at(BAD)[0] if number % 2 else TaskSet()
    good = tasks - bad
    failures = tuple(
        Failure(task, FailureKind.EXCEPTION, f"row {task} of kind {'ab'[task % 2]}", "ValueError") for task in bad
    )
    return Outcome(
        Bundle(JOB.id, MAP, tasks),
        "x",
        "w",
        1_700_000_000.0,
        1_700_000_050.0,
        good,
        values=tuple(range(len(good))),
        run_s=(1.0,) * len(good),
        failed=failures,
    )


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        made.run(_fill(made))
        yield made


async def _fill(rig: Rig) -> None:
    ports = rig.manager.ports
    await ports.ledger.apply(AddJob(JOB, JobState.SUBMITTED))
    outcomes = [outcome(number) for number in range(BUNDLES)]
    bundles = tuple(one.bundle for one in outcomes)
    await ports.ledger.apply(AddCut(Cut(JOB.id, MAP, 0, 0, bundles, TaskSet(), BUNDLES * TASKS)))
    for one in outcomes:
        if one.failed:
            await commit(ports.objects, one, ports.patience, UNSEALED)
    for first in range(0, BUNDLES, 200):
        done = [settlement.completion(one) for one in outcomes[first : first + 200]]
        await ports.ledger.apply(Fold(done, [{} for _ in done]))


@pytest.fixture
def reads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the keys of the objects that are read from now on."""
    found: list[str] = []
    get = rig.objects.get

    async def counted(key: str, *, limit: int | None = None) -> bytes:
        found.append(key)
        return await get(key, limit=limit)

    monkeypatch.setattr(rig.objects, "get", counted)
    return found


def asked(rig: Rig, path: str) -> httpx.Response:
    answer = rig.http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return answer


def test_failures_are_read_some_at_a_time(rig: Rig, reads: list[str]) -> None:
    path = f"/v1/jobs/{JOB.id}/failures/groups"
    first = asked(rig, path).json()
    assert (len(reads), first["read"], first["failed"]) == (MAX_OUTCOMES_READ, MAX_OUTCOMES_READ * BAD, 5000)
    assert not first["is_whole"]
    asked(rig, path)
    whole = asked(rig, path).json()
    assert whole["is_whole"]
    assert sorted(one["count"] for one in whole["groups"]) == [2000, 3000]
    before = len(reads)
    assert asked(rig, path).json() == whole
    assert len(reads) == before  # no object is read twice


def test_every_failure_is_on_one_page(rig: Rig) -> None:
    found = rig.client.failures(JOB.id, limit=10_000)
    assert len({one["task"] for one in found}) == len(found) == 5000


def test_no_answer_takes_long(rig: Rig, reads: list[str]) -> None:
    """The test measures CPU time, which does not depend on the load of the machine."""
    page = httpx.Client(base_url=rig.url, trust_env=False, verify=False)
    with page:
        ours = {"Sec-Fetch-Site": "same-origin"}
        opened = page.post("/ui/login", data={"word": TOKEN}, headers=ours)
        ui = opened.headers["location"].removesuffix("/")
        job = f"/jobs/{JOB.id}"
        first: Any = asked(rig, f"/v1{job}/failures?limit=1").json()["failures"][0]
        paths = [
            f"/v1{job}",
            f"/v1{job}/why",
            f"/v1{job}/eta",
            "/v1/jobs",
            "/v1/grid",
            f"{ui}/",
            f"{ui}{job}",
            f"{ui}{job}?part=live",
            f"{ui}{job}/tasks",
            f"{ui}{job}/tasks?state=failed",
            f"{ui}{job}/tasks?stage=sum",
            f"{ui}{job}/tasks?search=w",
            f"/v1{job}/tasks?after=map/99000",
            f"{ui}/failures",
            f"{ui}/grid",
            f"{ui}/schedules",
            f"{ui}{job}/failures",
            f"{ui}{job}/failures/{first['fingerprint']}",
            f"{ui}{job}/stages/map/tasks/{first['task']}?seq={first['seq']}",
        ]
        for path in paths:
            answers: list[httpx.Response] = []
            took_s: list[float] = []
            for _ in range(5):
                begun_s = time.process_time()
                answers.append(asked(rig, path) if path.startswith("/v1") else page.get(path))
                took_s.append(time.process_time() - begun_s)
            assert answers[-1].status_code == 200
            assert len(answers[-1].content) < 100_000, path
            assert sorted(took_s)[2] < 0.1, (path, took_s)
