"""The HTTP API and its client, over a real server and a real manager: authorization and submissions."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from batchlab.client.http import Client
from batchlab.core.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import StageName
from batchlab.core.protocol import json_format
from batchlab.core.retry_rule import RetryRule
from batchlab.runtime.home import listen
from batchlab.server import job_views
from batchlab.server.http import authentication, common
from tests.support.server.api import MAP, TOKEN, Rig, get, job, later, post

# --- Authorization -------------------------------------------------------------------------------


def test_only_health_answers_without_the_token(rig: Rig) -> None:
    described = get(rig, "/openapi.json").json()
    asked = [
        (method, path.format(job="x", pool="x", stage="x", task=0, target="x", name="x"))
        for path, methods in described["paths"].items()
        for method in methods
    ]
    assert len(asked) >= 18
    for method, path in asked:
        for headers in ({}, {"Authorization": "Bearer correct"}, {"Authorization": TOKEN}):
            answer = rig.http.request(method, path, headers=headers)
            expected = 200 if path == "/v1/health" else 401
            assert answer.status_code == expected, path
            assert answer.json().keys() >= ({"status"} if expected == 200 else {"error", "remedy"})
    assert rig.shutdowns == 0


def test_wrong_token_is_reported(rig: Rig) -> None:
    with (
        Client(rig.url, "guess") as client,
        pytest.raises(Unreachable, match="not prove that it is this grid's") as caught,
    ):
        client.jobs()
    assert "another token" in caught.value.remedy


def test_health_names_the_leader(rig: Rig) -> None:
    assert rig.client.health()["leader"]
    assert rig.client.health()["status"] == "ok"


def test_manager_without_the_lead_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LEADER_WAIT_S", 0.02)
    with Rig(lead=False) as rig:
        assert not rig.client.health()["leader"]
        calls: list[Callable[[], object]] = [
            rig.client.jobs,
            rig.client.grid,
            rig.client.activities,
            lambda: rig.client.job("x"),
            lambda: rig.client.submit(job()),
            lambda: rig.client.scale("default", desired=1),
            rig.client.rebuild,
        ]
        for call in calls:
            with pytest.raises(BackendError, match="not the leader") as caught:
                call()
            assert caught.value.remedy


def test_request_shortly_before_the_lead_is_answered_after_it() -> None:
    with Rig(lead=False) as rig:
        answer = later(rig.client.jobs)
        rig._loop.call_soon_threadsafe(rig.manager.is_leader.set)
        assert answer() == []


# --- Submitting ----------------------------------------------------------------------------------


def test_the_same_client_token_makes_one_job(rig: Rig) -> None:
    one = job()
    first = post(rig, "/v1/jobs", {"job": json_format.job_to_json(one)})
    second = post(rig, "/v1/jobs", {"job": json_format.job_to_json(one)})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"] == one.id
    assert [known["id"] for known in rig.client.jobs()] == [one.id]


def test_a_job_arrives_as_it_was_sent(rig: Rig) -> None:
    sent = job(
        after=[StageDef(StageName("sum"), after=(MAP,), gather="*", command=("wc", "{input}"))],
        retry=RetryRule(attempts=5, exceptions=("ValueError",)),
    )
    view = rig.client.job(rig.submit(sent))
    arrived = rig.run(rig.ledger.job(sent.id)).job
    assert arrived.commit_hash, "the manager seals a job"
    assert replace(arrived, commit_hash="") == sent
    assert view["tags"] == {"team": "blue"}
    assert [stage["name"] for stage in view["stages"]] == ["map", "sum"]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a missing field": (lambda doc: doc.pop("name"), "not valid at body.job.name"),
    "a wrong type": (lambda doc: doc["stages"][0].update(slots="many"), "not valid at body.job.stages.0.slots"),
    "an unknown failure kind": (
        lambda doc: doc["stages"][0]["retry"].update(kinds=["bad luck"]),
        "body.job.stages.0.retry.kinds.0",
    ),
    "another version": (lambda doc: doc.update(v=99), "reads jobs of version 1, not 99"),
    "an unknown pool": (
        lambda doc: doc["stages"][0].update(pool="gpu"),
        "names the pool 'gpu', which this grid does not have",
    ),
    "too many slots": (lambda doc: doc["stages"][0].update(slots=3), "asks for 3 slots"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_job_that_is_wrong_is_refused_and_leaves_nothing_behind(rig: Rig, what: str) -> None:
    """The grid must not accept a job that can never run."""
    spoil, message = BAD[what]
    doc = json_format.job_to_json(job())
    doc = {**doc, "stages": [dict(stage) for stage in doc["stages"]]}
    spoil(doc)
    answer = post(rig, "/v1/jobs", {"job": doc})
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert answer.json()["remedy"]
    assert rig.client.jobs() == []


def test_number_of_items_must_match_the_job(rig: Rig) -> None:
    answer = post(rig, "/v1/jobs", {"job": json_format.job_to_json(job()), "items": [1, 2]})
    assert answer.status_code == 422
    assert "has 2 items, which contradicts" in answer.json()["error"]
    assert rig.client.jobs() == []


def test_job_with_items_is_announced_in_the_same_answer(rig: Rig) -> None:
    one = replace(job(), items=2, input=None)
    accepted: list[str] = []

    def note() -> None:
        accepted.append(rig.client.job(one.id)["id"])

    answer = later(lambda: rig.client.submit_and_hear(one, [1, 2], note, wait_s=20.0))
    rig.work(one.id, 2)
    page = answer()
    assert accepted == [one.id]
    assert [list(one) for one in page["outcomes"][0]["tasks"]] == [[0, 1]]
    rig.ended(one.id)
    everything = rig.client.outcomes(one.id)["outcomes"]
    assert page["outcomes"] == everything[: len(page["outcomes"])]
    assert len(everything) == 2
    again = rig.client.submit_and_hear(one, [1, 2], note, wait_s=1.0)
    assert (again["outcomes"], again["ended"]) == (everything, True)
    with pytest.raises(Refused, match="is another one"):
        rig.client.submit_and_hear(one, [1, 3], note, wait_s=1.0)


def test_the_client_raises_a_usage_error_that_lists_the_pools(rig: Rig) -> None:
    with pytest.raises(UsageError, match="Its pools are default"):
        rig.client.submit(job(pool="gpu"))


def test_jobs_are_listed_newest_first_in_pages(rig: Rig) -> None:
    ids = [rig.submit(job(token=str(number))) for number in range(3)]
    first = rig.client.jobs(limit=2)
    rest = rig.client.jobs(limit=2, before=first[-1]["id"])
    assert [view["id"] for view in first + rest] == ids[::-1]
    rig.client.cancel(ids[0])
    rig.ended(ids[0])
    assert {view["id"] for view in rig.client.jobs(active=True)} == set(ids[1:])


# --- Errors --------------------------------------------------------------------------------------


def test_an_unknown_job_is_not_found_in_words(rig: Rig) -> None:
    calls: list[Callable[[str], object]] = [
        rig.client.job,
        rig.client.cancel,
        rig.client.pause,
        rig.client.resume,
        rig.client.retry,
        rig.client.why,
        rig.client.outcomes,
        rig.client.failures,
        rig.client.logs,
    ]
    for call in calls:
        with pytest.raises(NotFound, match="nowhere"):
            call("nowhere")
    with pytest.raises(NotFound):
        rig.client.job("../grid?x=")


def test_unknown_route_has_the_usual_error_form(rig: Rig) -> None:
    for answer in (get(rig, "/v1/nothing"), post(rig, "/v1/health")):
        assert answer.status_code in (404, 405)
        assert "is not an endpoint" in answer.json()["error"]
        assert answer.json()["remedy"]


def test_a_wait_beyond_the_longest_is_refused(rig: Rig) -> None:
    with pytest.raises(UsageError, match=r"query\.wait_s"):
        rig.client.job("x", version=1, wait_s=3600)


def test_a_bug_is_answered_with_a_sentence_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_views, "queue_view", None)
    with pytest.raises(BackendError, match="The manager failed: TypeError"):
        rig.client.grid()


def test_a_silent_manager_is_unreachable() -> None:
    with Client("http://127.0.0.1:1", TOKEN) as client:
        with pytest.raises(Unreachable, match="does not answer") as caught:
            client.health()
        assert caught.value.exit_code == 3


def test_foreign_program_on_the_port_is_detected() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Client(url, TOKEN) as client, pytest.raises(BatchlabError) as caught:
            client.health()
        thread.join(5)
    assert "does not prove that it is this grid's manager" in str(caught.value)


# --- Speed ---------------------------------------------------------------------------------------


def test_answers_over_a_persistent_connection_are_sent_at_once() -> None:
    """Otherwise, each answer waits 40 ms for an acknowledgment."""
    with listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- The description -----------------------------------------------------------------------------


def test_every_answer_is_described(rig: Rig) -> None:
    described = get(rig, "/openapi.json").json()
    operations = [one for path in described["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    for operation in operations:
        good = next(r for code, r in operation["responses"].items() if code.startswith("2"))
        if good["content"].keys() & {"application/zip", "text/csv", "text/plain"}:
            continue
        assert "$ref" in good["content"]["application/json"]["schema"], operation["operationId"]
        assert operation["description"]
    assert "JobDef" in described["components"]["schemas"]


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}])
def test_body_of_an_unauthorized_request_is_not_read(rig: Rig, given: dict[str, str]) -> None:
    """Any page that the operator visits may send such a request."""
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            read.append(b"x")
            yield b"[]"

    async def asked(headers: dict[str, str]) -> int:
        through = httpx.ASGITransport(app=rig.app)
        async with httpx.AsyncClient(transport=through, base_url="http://127.0.0.1") as http:
            return (await http.post("/v1/jobs", content=body(), headers=headers)).status_code

    assert asyncio.run(asked(given)) == 401
    assert read == []
    assert asyncio.run(asked({"Authorization": f"Bearer {TOKEN}"})) == 422
    assert read


def test_a_body_that_is_read_as_a_whole_has_a_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "MAX_BYTES", 2**20)

    def chunks() -> Iterator[bytes]:
        yield from [b"[" * 2**18] * 5

    head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    answer = rig.http.post("/v1/jobs", content=chunks(), headers=head)
    assert answer.status_code == 413
    assert "the limit of a body is 1 MiB" in answer.json()["error"]
    assert post(rig, "/v1/jobs", {"tags": "x" * 2**19}).status_code == 422
