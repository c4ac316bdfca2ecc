"""Lists of tasks, tasks that have not ended, and timelines over HTTP."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.commit import commit, committed
from batchlab.core.job_definition import StageDef
from batchlab.core.model import JobId, Outcome, Ran, StageName, TaskMetrics
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.messages import Events, Tail, to_bytes
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.state import Outstanding
from tests.support.server.api import Rig, get, job

TOTAL = StageDef(StageName("total"), handler="m:g", after=(StageName("map"),), gather="*")


def listed(rig: Rig, name: str, query: str = "") -> list[dict[str, Any]]:
    """Return the tasks on all pages of a list."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = get(rig, f"/v1/jobs/{name}/tasks?{query}{after}").json()
        found += page["tasks"]
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


def names(tasks: Sequence[dict[str, Any]]) -> str:
    return " ".join(f"{one['task']}{one['state'][0]}" for one in tasks)


async def measured(rig: Rig, one: Outstanding, name: str, file: str = "") -> None:
    """Commit an outcome with metrics and with the name of an input file. The name of the worker is `name`."""
    live = rig.manager.lives[JobId(one.bundle.job)]
    figures = TaskMetrics(0.25, 3_000, 40, 5)
    ran = [
        Ran(task, 0.5, task, None, figures._replace(input=f"{file or name}-{task}.csv")) for task in one.bundle.tasks
    ]
    outcome = settlement.settle(
        job=live.job, bundle=one.bundle, ran=ran, execution="x", worker=name, started_s=1.0, ended_s=2.0
    )
    await commit(rig.objects, outcome, rig.manager.ports.patience, await rig.manager.ports.keys.key_of(live.job))
    await rig.tell(Events(completions=(settlement.completion(outcome),)))


def test_tasks_are_listed_by_state_and_page(rig: Rig) -> None:
    name = rig.submit(job(tasks=6, after=[TOTAL]))
    rig.work_on(name, 6, [0, 2, 3], bad=[2])
    one = rig.outstanding(name, 3)[0]
    worker = rig.beat(rig.instance(), one).worker
    running = one.bundle.tasks.first
    expected = {1: "w", 4: "w", 5: "w"} | {running: "r"}
    assert names(listed(rig, name)) == f"0s 1{expected[1]} 2f 3s 4{expected[4]} 5{expected[5]}"
    for limit in (1, 2, 5):
        assert names(listed(rig, name, f"limit={limit}")) == names(listed(rig, name))
    assert names(listed(rig, name, "state=succeeded&limit=1")) == "0s 3s"
    assert names(listed(rig, name, "state=failed")) == "2f"
    assert [one["worker"] for one in listed(rig, name, "state=running")] == [worker]
    assert len(listed(rig, name, "state=waiting")) == 2
    assert listed(rig, name, "stage=total") == []
    assert listed(rig, name, "state=succeeded")[0]["run_s"] == 0.01


def test_tasks_are_searched_by_number_worker_and_input(rig: Rig) -> None:
    name = rig.submit(job(tasks=5))
    every = sorted(rig.outstanding(name, 5), key=lambda one: one.bundle.tasks.first)
    for one in every[:2]:
        rig.run(measured(rig, one, "north"))
    rig.run(measured(rig, every[2], "south"))
    rig.outstanding(name, 2)
    assert names(listed(rig, name, "search=3")) == "3w"
    assert names(listed(rig, name, "search=map/1")) == "1s"
    assert listed(rig, name, "search=map/1&state=failed") == []
    assert names(listed(rig, name, "search=north&limit=1")) == "0s 1s"
    (found,) = listed(rig, name, "search=h-2.csv")
    assert (found["task"], found["input"], found["cpu_s"], found["memory_bytes"]) == (2, "south-2.csv", 0.25, 3_000)
    assert names(listed(rig, name, "search=.csv&limit=2")) == "0s 1s 2s"
    assert listed(rig, name, "search=nothing") == []


def test_a_search_reads_a_limited_number_of_outcomes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.http.task_list.MAX_SEARCHED", 2)
    monkeypatch.setattr("batchlab.server.http.task_list.MAX_PARALLEL_READS", 1)
    name = rig.submit(job(tasks=5))
    for one in rig.outstanding(name, 5):
        rig.run(measured(rig, one, "east"))
    rig.ended(name)
    first = get(rig, f"/v1/jobs/{name}/tasks?search=-4.csv").json()
    assert (first["tasks"], first["next"]) == ([], "map/2")
    assert names(listed(rig, name, "search=-4.csv")) == "4s"


def test_outcomes_of_a_page_are_read_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = rig.submit(job(tasks=8))
    rig.work(name, 8)
    rig.ended(name)
    reads: list[str] = []
    read = rig.objects.get

    async def counted(key: str, *, limit: int | None = None) -> bytes:
        reads.append(key)
        return await read(key, limit=limit)

    monkeypatch.setattr(rig.objects, "get", counted)
    for _ in range(2):
        assert len(get(rig, f"/v1/jobs/{name}/tasks?limit=3").json()["tasks"]) == 3
    assert len([key for key in reads if object_keys.is_outcome(key)]) == 3


def test_a_retry_lists_its_tasks_again(rig: Rig) -> None:
    name = rig.submit(job(tasks=3))
    rig.work(name, 3, bad=[0, 1])
    rig.ended(name)
    assert names(listed(rig, name)) == "0f 1f 2s"
    rig.client.retry(name)
    rig.outstanding(name, 2)
    assert names(listed(rig, name)) == "0w 1w 2s"
    rig.work(name, 2, bad=[1])
    rig.ended(name)
    assert names(listed(rig, name)) == "0s 1f 2s"


def test_a_rebuilt_ledger_lists_no_task_twice(rig: Rig) -> None:
    name = rig.submit(job(tasks=3))
    rig.work(name, 3)
    rig.ended(name)
    before = listed(rig, name)
    rig.run(rig.manager.rebuild_ledger())
    after = listed(rig, name)
    assert names(after) == "0s 1s 2s"
    assert [{**one, "seq": 0} for one in after] == [{**one, "seq": 0} for one in before]


def test_tasks_of_a_canceled_job_are_canceled(rig: Rig) -> None:
    name = rig.submit(job(tasks=3, after=[TOTAL]))
    rig.work_on(name, 3, [1])
    rig.client.cancel(name)
    rig.ended(name)
    assert names(listed(rig, name, "stage=map")) == "0c 1s 2c"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("after=x", 422),
        ("after=nowhere/1", 422),
        ("after=1", 422),
        ("state=lost", 422),
        ("limit=1000", 422),
        ("search=" + "x" * 201, 422),
        ("search=99999", 200),
        ("stage=nowhere", 200),
        ("after=map/99999", 200),
    ],
)
def test_requests_are_checked(rig: Rig, query: str, status: int) -> None:
    name = rig.submit(job())
    answer = get(rig, f"/v1/jobs/{name}/tasks?{query}")
    assert answer.status_code == status
    assert status != 200 or answer.json() == {"tasks": [], "next": None}
    assert get(rig, "/v1/jobs/nowhere/tasks").status_code == 404


# --- One task -------------------------------------------------------------------------------------


def test_a_task_that_waits_and_runs_has_a_view(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    (one, _) = sorted(rig.outstanding(name, 2), key=lambda one: one.bundle.tasks.first)
    path = f"/v1/jobs/{name}/stages/map/tasks"
    waiting = get(rig, f"{path}/0").json()
    assert (waiting["state"], waiting["seq"], waiting["worker"], waiting["input"]) == ("waiting", 0, "", "data")
    worker = rig.beat(rig.instance(), one).worker
    tail = Tail("map", 0, 1, 0, one.bundle.id, "x", 0, 9, "line <1>\n")
    rig.run(rig.objects.put(object_keys.tail(JobId(name), worker), to_bytes([tail])))
    running = rig.until(lambda: (view := get(rig, f"{path}/0").json())["log"] and view, "the live log")
    assert (running["state"], running["worker"], running["log"]) == ("running", worker, "line <1>\n")
    assert running["started_s"] is not None
    assert running["ended_s"] is None
    rig.work_on(name, 2, [0])
    ended = get(rig, f"{path}/0").json()
    assert (ended["state"], ended["run_s"], ended["log"]) == ("succeeded", 0.01, "task 0, try 1\n")
    for missing in ("map/tasks/2", "nowhere/tasks/0"):
        assert get(rig, f"/v1/jobs/{name}/stages/{missing}").status_code == 404


def test_a_task_between_two_attempts_waits_and_keeps_its_last_attempt(rig: Rig) -> None:
    retry = RetryRule(attempts=2, backoff_s=60.0)
    name = rig.submit(job(tasks=1, retry=retry))
    (one,) = rig.outstanding(name, 1)
    rig.run(rig._work(rig.manager.lives[JobId(name)], [one], [0]))
    rig.until(lambda: any(o.bundle.attempt == 2 for o in rig.outstanding(name, 1)), "the second attempt")
    path = f"/v1/jobs/{name}/stages/map/tasks/0"
    waiting = get(rig, path).json()
    assert (waiting["state"], waiting["attempt"], waiting["seq"]) == ("waiting", 2, 0)
    seq = rig.served.indexes[JobId(name)][1].attempt_seq(StageName("map"), 0, 1)
    assert get(rig, f"{path}?seq={seq}").json()["state"] == "retried"
    assert get(rig, f"{path}?seq={seq + 5}").status_code == 404


# --- Downloads ------------------------------------------------------------------------------------


def test_the_list_of_tasks_is_a_csv_file(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.http.downloads.MAX_LISTED_TASKS", 2)
    name = rig.submit(job(tasks=5))
    one, *others = sorted(rig.outstanding(name, 5), key=lambda one: one.bundle.tasks.first)
    rig.run(measured(rig, one, "w-7", "=1+1"))
    rig.until(lambda: len(rig.manager.lives[JobId(name)].all_outstanding()) == len(others), "the fold")
    answer = get(rig, f"/v1/jobs/{name}/tasks.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}-tasks.csv"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["task"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[0] == {
        "stage": "map",
        "task": "0",
        "state": "succeeded",
        "attempt": "1",
        "run_s": "0.5",
        "cpu_s": "0.25",
        "memory_bytes": "3000",
        "input_bytes": "40",
        "output_bytes": "5",
        # A spreadsheet does not calculate a text that begins with an apostrophe.
        "worker": "w-7",
        "input": "'=1+1-0.csv",
        "mended_sha256": "",
    }
    assert (rows[4]["state"], rows[4]["run_s"], rows[4]["input"]) == ("waiting", "", "")
    filtered = get(rig, f"/v1/jobs/{name}/tasks.csv?state=succeeded").text.splitlines()
    assert filtered[1:] == answer.text.splitlines()[1:2]
    assert get(rig, f"/v1/jobs/{name}/tasks.csv?state=failed").text.splitlines() == filtered[:1]
    assert get(rig, "/v1/jobs/nowhere/tasks.csv").status_code == 404


def test_the_log_of_an_ended_task_is_a_text_file(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.http.downloads.PIECE_BYTES", 5)
    name = rig.submit(job(tasks=3))
    rig.work_on(name, 3, [1])
    path = f"/v1/jobs/{name}/stages/map/tasks"
    answer = get(rig, f"{path}/1/log")
    assert (answer.text, answer.headers["content-type"]) == ("task 1, try 1\n", "text/plain; charset=utf-8")
    assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}-map-1.log"
    assert answer.headers["x-content-type-options"] == "nosniff"
    seq = get(rig, f"{path}/1").json()["seq"]
    assert get(rig, f"{path}/1/log?seq={seq}").text == answer.text
    for missing in (f"1/log?seq={seq + 1}", "0/log", "3/log"):
        assert get(rig, f"{path}/{missing}").status_code == 404
    outcome = rig.run(_outcome_of(rig, name, seq))
    rig.run(rig.objects.delete([outcome.log]))
    assert get(rig, f"{path}/1/log").status_code == 404


async def _outcome_of(rig: Rig, name: str, seq: int) -> Outcome:
    (row,) = await rig.ledger.bundles(JobId(name), after_seq=seq - 1, limit=1)
    key = await rig.manager.ports.keys.key_of((await rig.ledger.job(JobId(name))).job)
    outcome = await committed(rig.objects, row.bundle, rig.manager.ports.patience, key)
    assert outcome
    return outcome


# --- Timeline -------------------------------------------------------------------------------------


def test_a_timeline_has_ended_and_running_bundles(rig: Rig) -> None:
    name = rig.submit(replace(job(tasks=3), tags=()))
    empty = get(rig, f"/v1/jobs/{name}/timeline").json()
    assert (empty["lanes"], empty["workers"]) == ([], 0)
    rig.work_on(name, 3, [0])
    worker = rig.beat(rig.instance(), rig.outstanding(name, 2)[0]).worker
    found = get(rig, f"/v1/jobs/{name}/timeline").json()
    assert [(lane["worker"], [bar["state"] for bar in lane["bars"]]) for lane in found["lanes"]] == [
        ("w", ["succeeded"]),
        (worker, ["running"]),
    ]
    bars = [bar for lane in found["lanes"] for bar in lane["bars"]]
    assert all(found["start_s"] <= bar["started_s"] <= bar["ended_s"] <= found["end_s"] for bar in bars)
    assert get(rig, "/v1/jobs/nowhere/timeline").status_code == 404
