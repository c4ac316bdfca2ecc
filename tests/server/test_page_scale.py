"""The page of a job with 100,000 tasks and many failures, and of a job with 10,000 bundles.

The tests count the work of a request: the calls of the ledger, the bundles and objects that the request reads, and the
bytes of the answer. Counts do not depend on the load of the machine. `benchmarks/page.py --growth` measures the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from batchlab.server.http.failures import MAX_OUTCOMES_READ
from batchlab.server.http.task_list import MAX_ROWS_AT_ONCE
from tests.support.server.api import TOKEN, Rig
from tests.support.server.large_jobs import BAD, FINE, JOB, SINGLES, add_failed_job, add_fine_job

MOST_CALLS, MOST_BYTES = 12, 200_000
"""Limits of the calls of the ledger and the size of a response."""
READING = "reads the results of"
"""Text of a page that loads itself again, because the manager has not read all bundles yet."""


@pytest.fixture(scope="module")
def counter() -> Counter[str]:
    return Counter()


@pytest.fixture(scope="module")
def rig(counter: Counter[str]) -> Iterator[Rig]:
    with Rig() as made:
        # The manager keeps the methods that it has called, so the methods must be replaced first.
        for name in ("get", "get_range", "get_if_changed", "head"):
            count(made.objects, name, "objects", counter)
        for name in ("job", "jobs", "rows", "bundles", "results"):
            count(made.ledger, name, "calls", counter)
        add_failed_job(made)
        add_fine_job(made)
        yield made


def count(port: Any, name: str, kind: str, counter: Counter[str]) -> None:
    """Count the calls of a method, and the bundles that the method returns."""
    original = getattr(port, name)

    async def counted(*args: Any, **named: Any) -> Any:
        counter[kind] += 1
        result = await original(*args, **named)
        if name in ("bundles", "results"):
            counter["bundles"] += len(result)
        return result

    setattr(port, name, counted)


@pytest.fixture(scope="module")
def page(rig: Rig) -> Iterator[httpx.Client]:
    """Open the page of the grid. The base address of the client contains the session's place."""
    with httpx.Client(base_url=rig.url, trust_env=False, verify=False) as http:
        opened = http.post("/ui/login", data={"word": TOKEN}, headers={"Sec-Fetch-Site": "same-origin"})
        http.base_url = http.base_url.join(opened.headers["location"].removesuffix("/"))
        yield http


@pytest.fixture
def reads(rig: Rig, counter: Counter[str]) -> Counter[str]:
    """Count the objects that are read from now on, the calls of the ledger, and the bundles that these calls return."""
    counter.clear()
    return counter


def asked(rig: Rig, path: str) -> httpx.Response:
    answer = rig.http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return answer


def test_failures_are_read_some_at_a_time(rig: Rig, reads: Counter[str]) -> None:
    path = f"/v1/jobs/{JOB.id}/failures/groups"
    first = asked(rig, path).json()
    assert (reads["objects"], first["read"], first["failed"]) == (MAX_OUTCOMES_READ, MAX_OUTCOMES_READ * BAD, 5000)
    assert not first["is_whole"]
    asked(rig, path)
    whole = asked(rig, path).json()
    assert whole["is_whole"]
    assert sorted(one["count"] for one in whole["groups"]) == [2000, 3000]
    before = reads["objects"]
    assert asked(rig, path).json() == whole
    assert reads["objects"] == before  # no object is read twice


def test_every_failure_is_on_one_page(rig: Rig) -> None:
    found = rig.client.failures(JOB.id, limit=10_000)
    assert len({one["task"] for one in found}) == len(found) == 5000


def check(rig: Rig, page: httpx.Client, reads: Counter[str], path: str) -> int:
    """Load the path, and check the size and the work of each request. Return the number of bundles that all requests
    read.

    A path of the API begins with /v1, and other paths are below the root of the page.
    """
    bundles = 0
    is_reading = True
    for _ in range(10):
        reads.clear()
        answer = asked(rig, path) if path.startswith("/v1") else page.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert len(answer.content) < MOST_BYTES, path
        assert reads["calls"] <= MOST_CALLS, (path, reads)
        assert reads["bundles"] <= MAX_ROWS_AT_ONCE, (path, reads)
        assert reads["objects"] <= MAX_OUTCOMES_READ, (path, reads)
        bundles += reads["bundles"]
        is_reading = READING in answer.text
        if not is_reading:
            break
    assert not is_reading, path
    return bundles


def test_no_answer_needs_much_work(rig: Rig, page: httpx.Client, reads: Counter[str]) -> None:
    job = f"/jobs/{JOB.id}"
    first: Any = asked(rig, f"/v1{job}/failures?limit=1").json()["failures"][0]
    for path in (
        f"/v1{job}",
        f"/v1{job}/why",
        f"/v1{job}/eta",
        "/v1/jobs",
        "/v1/grid",
        "/",
        job,
        f"{job}?part=live",
        f"{job}/tasks",
        f"{job}/tasks?state=failed",
        f"{job}/tasks?stage=sum",
        f"{job}/tasks?search=w",
        f"{job}/timeline",
        f"/v1{job}/tasks?after=map/99000",
        "/failures",
        "/grid",
        "/schedules",
        f"{job}/failures",
        f"{job}/failures/{first['fingerprint']}",
        f"{job}/stages/map/tasks/{first['task']}?seq={first['seq']}",
    ):
        check(rig, page, reads, path)
        assert check(rig, page, reads, path) <= MAX_OUTCOMES_READ, path


TASK_PATHS = {
    "list": "/tasks",
    "filter": "/tasks?state=failed",
    "waiting": "/tasks?state=waiting",
    "worker": "/tasks?search=worker-1",
    "input": "/tasks?search=part-00017",
    "missing input": "/tasks?search=nowhere",
    "number": "/tasks?search=9999",
    "late page": "/tasks?after=map/9900",
    "timeline": "/timeline",
    "task": "/stages/map/tasks/9999",
}


@pytest.mark.parametrize("name", TASK_PATHS)
def test_no_answer_about_many_bundles_needs_much_work(
    rig: Rig, page: httpx.Client, reads: Counter[str], name: str
) -> None:
    """After a start of the manager, the first requests read all bundles once. Later requests read only new bundles, and
    at most the bundle of the shown task."""
    path = f"/jobs/{FINE.id}{TASK_PATHS[name]}"
    shown = int(name == "task")
    rig.served.indexes.clear()
    assert check(rig, page, reads, path) == SINGLES + shown
    assert check(rig, page, reads, path) == shown
    assert check(rig, page, reads, f"/v1{path}") == shown


def test_a_page_reads_many_bundles_part_by_part(rig: Rig, page: httpx.Client) -> None:
    path = f"/jobs/{FINE.id}/tasks"
    rig.served.indexes.clear()
    pages = [page.get(path).text for _ in range(4)]
    assert [READING in text for text in pages] == [True, True, True, False]
    assert [f"{read:,} bundles so far" in text for text, read in zip(pages, (3_000, 6_000, 9_000), strict=False)] == [
        *(True, True, True)
    ]
    assert 'http-equiv="refresh"' in pages[0]
    rig.served.indexes.clear()
    updates = [page.get(f"{path}?part=live", headers={"HX-Request": "true"}) for _ in range(4)]
    assert [one.status_code for one in updates] == [204, 204, 204, 200]
    rig.served.indexes.clear()
    assert asked(rig, f"/v1{path}?limit=1").json()["next"] == "map/1"


def test_many_bundles_are_listed(rig: Rig) -> None:
    path = f"/v1/jobs/{FINE.id}"

    def tasks(query: str) -> list[int]:
        return [one["task"] for one in asked(rig, f"{path}/tasks?{query}").json()["tasks"]]

    assert tasks("after=map/9998") == [9998, 9999, 10_000]
    assert tasks("state=waiting") == [10_000]
    assert tasks("state=failed&limit=3") == [0, 20, 40]
    assert tasks("search=worker-1&limit=3") == [1, 3, 5]
    assert tasks("search=part-00017") == [17]
    found = asked(rig, f"{path}/timeline").json()
    bars = [bar for lane in found["lanes"] for bar in lane["bars"]]
    assert (found["workers"], sum(bar["bundles"] for bar in bars)) == (2, SINGLES)
    assert 500 <= len(bars) <= 1000
    assert {bar["state"] for bar in bars} == {"succeeded", "failed"}
