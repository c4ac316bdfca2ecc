"""The HTTP API and its client, over a real server and a real manager."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from batchlab import viewing
from batchlab.api import common, door, logs
from batchlab.client import Client
from batchlab.errors import (
    BackendError,
    BatchlabError,
    NotFound,
    Refused,
    Unreachable,
    UsageError,
)
from batchlab.jobdef import RetryRule, StageDef
from batchlab.listening import listen
from batchlab.manager.live import LiveJob
from batchlab.model import Control, GroupView, JobId, Pool, StageName
from batchlab.protocol import naming, wire
from batchlab.worker.tails import Tail, to_bytes
from tests.integration.api_rig import MAP, TOKEN, Rig, job, later


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def post(rig: Rig, path: str, body: Any = None) -> httpx.Response:
    return rig.http.post(path, json=body, headers={"Authorization": f"Bearer {TOKEN}"})


def get(rig: Rig, path: str) -> httpx.Response:
    return rig.http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})


# --- Who is answered -----------------------------------------------------------------------------


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


def test_a_wrong_token_is_refused_by_the_client_in_words(rig: Rig) -> None:
    with Client(rig.url, "guess") as client, pytest.raises(Refused, match="token is missing or"):
        client.jobs()


def test_health_tells_who_leads(rig: Rig) -> None:
    assert rig.client.health()["leader"]
    assert rig.client.health()["status"] == "ok"


def test_a_manager_that_does_not_lead_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LEADS_WITHIN_S", 0.02)
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


def test_a_request_that_comes_just_before_the_lead_is_answered_once_there_is_one() -> None:
    with Rig(lead=False) as rig:
        answer = later(rig.client.jobs)
        rig._loop.call_soon_threadsafe(rig.manager.is_leader.set)
        assert answer() == []


# --- Submitting ----------------------------------------------------------------------------------


def test_the_same_client_token_makes_one_job(rig: Rig) -> None:
    one = job()
    first = post(rig, "/v1/jobs", {"job": wire.job_to_json(one)})
    second = post(rig, "/v1/jobs", {"job": wire.job_to_json(one)})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"] == one.id
    assert [known["id"] for known in rig.client.jobs()] == [one.id]


def test_a_job_arrives_as_it_was_sent(rig: Rig) -> None:
    sent = job(
        after=[StageDef(StageName("sum"), after=(MAP,), gather="*", command=("wc", "{input}"))],
        retry=RetryRule(attempts=5, exceptions=("ValueError",)),
    )
    view = rig.client.job(rig.submit(sent))
    assert rig.run(rig.ledger.job(sent.id)).job == sent
    assert view["tags"] == {"team": "blue"}
    assert [stage["name"] for stage in view["stages"]] == ["map", "sum"]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a missing field": (lambda doc: doc.pop("name"), "not valid at body.job.name"),
    "a wrong type": (
        lambda doc: doc["stages"][0].update(slots="many"),
        "not valid at body.job.stages.0.slots",
    ),
    "an unknown failure kind": (
        lambda doc: doc["stages"][0]["retry"].update(kinds=["bad luck"]),
        "body.job.stages.0.retry.kinds.0",
    ),
    "another version": (lambda doc: doc.update(v=99), "reads version 1 of a job, not 99"),
    "an unknown pool": (
        lambda doc: doc["stages"][0].update(pool="gpu"),
        "names the pool 'gpu', which this grid does not have",
    ),
    "too many slots": (lambda doc: doc["stages"][0].update(slots=3), "asks for 3 slots"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_job_that_is_wrong_is_refused_and_leaves_nothing_behind(rig: Rig, what: str) -> None:
    """Answers pain 1: a job that can never run must not be accepted."""
    spoil, message = BAD[what]
    doc = wire.job_to_json(job())
    doc = {**doc, "stages": [dict(stage) for stage in doc["stages"]]}
    spoil(doc)
    answer = post(rig, "/v1/jobs", {"job": doc})
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert answer.json()["remedy"]
    assert rig.client.jobs() == []


def test_items_that_come_along_must_be_as_many_as_the_job_says(rig: Rig) -> None:
    answer = post(rig, "/v1/jobs", {"job": wire.job_to_json(job()), "items": [1, 2]})
    assert answer.status_code == 422
    assert "comes with 2 items, but says otherwise" in answer.json()["error"]
    assert rig.client.jobs() == []


def test_a_job_that_brings_its_items_is_heard_of_in_the_same_answer(rig: Rig) -> None:
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


def test_what_is_not_served_is_answered_in_the_same_form(rig: Rig) -> None:
    for answer in (get(rig, "/v1/nothing"), post(rig, "/v1/health")):
        assert answer.status_code in (404, 405)
        assert "is not served" in answer.json()["error"]
        assert answer.json()["remedy"]


def test_a_wait_beyond_the_longest_is_refused(rig: Rig) -> None:
    with pytest.raises(UsageError, match=r"query\.wait_s"):
        rig.client.job("x", version=1, wait_s=3600)


def test_a_bug_is_answered_with_a_sentence_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "queue_view", None)
    with pytest.raises(BackendError, match="The manager failed: TypeError"):
        rig.client.grid()


def test_a_silent_manager_is_unreachable() -> None:
    with Client("http://127.0.0.1:1", TOKEN) as client:
        with pytest.raises(Unreachable, match="does not answer") as caught:
            client.health()
        assert caught.value.exit_code == 3


def test_another_program_on_the_port_is_told_apart() -> None:
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
    assert "not as a manager does" in str(caught.value)


# --- Watching and steering -----------------------------------------------------------------------


def test_a_long_poll_wakes_with_the_change(rig: Rig) -> None:
    name = rig.submit(job())
    rig.client.pause(name)
    view = rig.client.job(name)
    started_s = time.monotonic()
    answer = later(lambda: rig.client.job(name, version=view["version"], wait_s=30))
    rig.client.resume(name)
    assert answer()["version"] > view["version"]
    assert time.monotonic() - started_s < 8


def test_a_long_poll_without_news_answers_when_its_time_is_up(rig: Rig) -> None:
    name = rig.submit(job())
    rig.client.pause(name)
    view = rig.client.job(name)
    begun_s = time.monotonic()
    again = rig.client.job(name, version=view["version"], wait_s=0.15)
    assert again == view
    assert time.monotonic() - begun_s >= 0.15


def test_a_watcher_with_an_old_version_or_of_an_ended_job_is_answered_at_once(rig: Rig) -> None:
    name = rig.submit(job())
    begun_s = time.monotonic()
    rig.client.job(name, version=1, wait_s=30)
    rig.client.cancel(name)
    ended = rig.ended(name)
    assert ended["version"] == 0
    assert rig.client.job(name, version=0, wait_s=30) == ended
    assert time.monotonic() - begun_s < 8


def test_a_watcher_hears_when_a_worker_begins(rig: Rig) -> None:
    name = rig.submit(job(tasks=1))
    one = rig.outstanding(name, 1)
    (instance,) = rig.instances(1, "Pending")
    rig.beat(instance)
    rig.until(lambda: rig.client.job(name)["state"] == "STARTING", "the start")
    view = rig.client.job(name)
    answer = later(lambda: rig.client.job(name, version=view["version"], wait_s=30))
    rig.beat(instance, *one)
    assert answer()["stages"][0]["running"] == 1
    assert "is running 1 task in 1 bundle on 1 worker" in rig.client.why(name)


def test_a_job_is_followed_to_its_end(rig: Rig) -> None:
    name = rig.submit(job(tasks=3))
    rig.work(name, 3)
    view = rig.ended(name)
    assert (view["state"], view["reason"]) == ("SUCCEEDED", "")
    (stage,) = view["stages"]
    assert (stage["planned"], stage["succeeded"], stage["running"]) == (3, 3, 0)
    assert rig.client.why(name) == "It ended SUCCEEDED: 3 tasks succeeded."


def test_a_cancelled_job_takes_no_second_cancellation(rig: Rig) -> None:
    name = rig.submit(job())
    assert rig.client.cancel(name)["id"] == name
    # The acknowledgement: no worker may start a task any more (I4).
    control = rig.run(rig.objects.get(f"jobs/{name}/control.json"))
    assert wire.word_from_bytes(control).control.value == "cancel"
    assert rig.ended(name)["state"] == "CANCELLED"
    for verb in (rig.client.cancel, rig.client.pause, rig.client.resume):
        with pytest.raises(Refused, match="is not running"):
            verb(name)


def test_a_paused_job_says_so_and_goes_on(rig: Rig) -> None:
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    assert rig.client.pause(name)["state"] == "PAUSED"
    assert "Its user has paused it" in rig.client.why(name)
    assert rig.client.resume(name)["state"] == "RUNNABLE"
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_a_retry_runs_what_failed_and_forgets_its_failures(rig: Rig) -> None:
    """Answers pain 13: which tasks failed, and how to run only those again."""
    name = rig.submit(job(tasks=3))
    with pytest.raises(Refused, match="still"):
        rig.client.retry(name)
    rig.work(name, 3, bad=[0, 2])
    assert rig.ended(name)["state"] == "FAILED"
    failures = rig.client.failures(name)
    assert [one["task"] for one in failures] == [0, 2]
    assert failures[0]["fingerprint"] == failures[1]["fingerprint"]
    assert failures[0] == {
        "seq": failures[0]["seq"],
        "stage": "map",
        "task": 0,
        "attempt": 1,
        "kind": "exception",
        "reason": "task 0 is bad",
        "error": "ValueError",
        "traceback": "Traceback",
        "exit_code": None,
        "fingerprint": failures[1]["fingerprint"],
    }
    assert len(rig.client.failures(name, limit=1)) == 1
    assert "task 0 is bad" in rig.client.why(name)

    assert rig.client.retry(name)["round"] == 1
    rig.work(name, 2, bad=[2])
    assert rig.ended(name)["state"] == "FAILED"
    assert [one["task"] for one in rig.client.failures(name)] == [2]


# --- What came of the tasks ----------------------------------------------------------------------


def test_outcomes_come_in_the_order_of_their_folding_and_once(rig: Rig) -> None:
    name = rig.submit(job(tasks=4))
    rig.work(name, 4, bad=[1])
    rig.ended(name)
    seen: list[Any] = []
    after, ended = None, False
    while not ended:
        page = rig.client.outcomes(name, after=after, limit=3, wait_s=5)
        seen += page["outcomes"]
        after, ended = seen[-1]["seq"], page["ended"]
    assert [one["seq"] for one in seen] == sorted({one["seq"] for one in seen})
    by_task = sorted(seen, key=lambda one: one["bundle"])
    tasks = [(one["tasks"], one["failed"]) for one in by_task]
    assert tasks == [([[0, 1]], 0), ([], 1), ([[2, 3]], 0), ([[3, 4]], 0)]
    outcome = wire.outcome_from_json(wire.loads(rig.run(rig.objects.get(by_task[2]["key"]))))
    assert outcome.values == (2,)
    assert rig.client.outcomes(name, stage="other")["outcomes"] == []


def test_whoever_waits_for_outcomes_is_woken_by_the_next(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    rig.outstanding(name, 2)
    assert rig.client.outcomes(name) == {"outcomes": [], "ended": False}
    answer = later(lambda: rig.client.outcomes(name, wait_s=30))
    rig.work(name, 2)
    page = answer()
    assert page["outcomes"]
    last = rig.client.outcomes(name)["outcomes"][-1]["seq"]
    assert rig.client.outcomes(name, after=last, wait_s=30) == {"outcomes": [], "ended": True}


def test_the_log_of_every_attempt_is_kept(rig: Rig) -> None:
    """Answers pain 13: the log of the attempt that failed, not only of the last one."""
    name = rig.submit(job(tasks=2, retry=RetryRule(attempts=2, backoff_s=0.0)))
    rig.work(name, 2, bad=[1])
    rig.work(name, 1)
    rig.ended(name)
    assert [(log["attempt"], log["text"]) for log in rig.client.logs(name, task=1)] == [
        (1, "task 1, try 1\n"),
        (2, "task 1, try 2\n"),
    ]
    every = rig.client.logs(name, stage="map")
    assert [(log["task"], log["attempt"]) for log in every] == [(0, 1), (1, 1), (1, 2)]
    assert len(rig.client.logs(name, limit=2)) == 2
    assert rig.client.logs(name, failed=True) == []
    assert rig.client.logs(name, since_s=3600.0)
    assert [log["state"] for log in every] == ["SUCCEEDED", "RETRIED", "SUCCEEDED"]


def test_logs_are_handed_out_as_they_come(rig: Rig) -> None:
    name = rig.submit(job(tasks=3, retry=RetryRule(attempts=1)))
    rig.outstanding(name, 3)
    answer = later(lambda: rig.client.logs_after(name, None, wait_s=30))
    rig.work(name, 3, bad=[1])
    first = answer()
    seq, texts = first["seq"], [log["text"] for log in first["logs"]]
    while not (page := rig.client.logs_after(name, seq, wait_s=5))["ended"]:
        texts += [log["text"] for log in page["logs"]]
        seq = page["seq"]
    assert sorted(texts) == [f"task {task}, try 1\n" for task in range(3)]
    failed = rig.client.logs_after(name, None, failed=True)["logs"]
    assert [(log["task"], log["state"]) for log in failed] == [(1, "FAILED")]
    # One task's end is the end, and not only the job's.
    one = rig.client.logs_after(name, None, task=2)
    assert (one["ended"], [log["task"] for log in one["logs"]]) == (True, [2])


def test_an_answer_holds_only_so_much_of_logs_and_says_what_it_leaves_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = rig.submit(job(tasks=4, bundle=2))
    rig.work(name, 2)
    size = len("task 0, try 1\n")
    monkeypatch.setattr(logs, "MOST_BYTES", size * 3)
    texts = {log["task"]: log["text"] for log in rig.client.logs(name)}
    assert [texts[n] for n in (0, 1, 2)] == [f"task {n}, try 1\n" for n in (0, 1, 2)]
    assert "left out" in texts[3]
    monkeypatch.setattr(logs, "MOST_BYTES", size)
    assert [log["text"] for log in rig.client.logs(name, task=3)] == ["task 3, try 1\n"]
    monkeypatch.setattr(logs, "MOST_BYTES", size * 2)
    # Whoever follows gets the rest in the next answer.
    followed: list[str] = []
    seq = None
    while not (page := rig.client.logs_after(name, seq))["ended"] and page["logs"]:
        assert len(page["logs"]) == 2
        followed += [log["text"] for log in page["logs"]]
        seq = page["seq"]
    assert sorted(followed) == [f"task {n}, try 1\n" for n in range(4)]


def test_tails_are_asked_for_by_the_word_that_workers_read(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    bundles = rig.outstanding(name, 2)
    key = naming.control(JobId(name))

    def word() -> wire.Word:
        return wire.word_from_bytes(rig.run(rig.objects.get(key)))

    tails = [
        Tail("map", o.bundle.tasks.first, 1, 0, o.bundle.id, "x", 0, 5, "hello") for o in bundles
    ]
    rig.run(rig.objects.put(naming.tail(JobId(name), "w-1"), to_bytes(tails)))
    rig.until(lambda: rig.client.tails(name)["tails"], "the tails")
    assert replace(word(), tail_s=None) == wire.Word(Control.RUN, tail=1)
    # However many ask, and however often.
    for _ in range(20):
        rig.client.tails(name)
    assert word().tail == 1
    rig.client.pause(name)
    rig.client.resume(name)
    assert word() == wire.Word(Control.RUN)
    # What a worker has stored of a bundle that has ended since is no news.
    rig.work(name, 2)
    rig.ended(name)
    assert rig.client.tails(name)["tails"] == []
    with pytest.raises(NotFound):
        rig.client.tails("nobody-0123456789")


def test_asking_for_tails_never_undoes_a_cancellation(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    rig.outstanding(name, 2)
    key = naming.control(JobId(name))
    # Another leader's, which the ledger does not know of yet.
    cancel = wire.word_to_bytes(wire.Word(Control.CANCEL, reason="enough"))
    rig.run(rig.objects.put(key, cancel))
    rig.client.tails(name)
    assert rig.run(rig.objects.get(key)) == cancel


# --- The grid ------------------------------------------------------------------------------------


def test_the_grid_shows_pools_instances_and_queues(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    bundles = rig.outstanding(name, 2)
    ids = rig.instances(1, "Pending")
    rig.beat(ids[0], bundles[0])
    rig.instances(1)
    grid = rig.client.grid()
    assert (grid["backend"], grid["leader"], grid["owner"]) == ("memory", True, "manager-1")
    (pool,) = grid["pools"]
    assert (pool["name"], pool["min"], pool["max"], pool["slots"]) == ("default", 0, 2, 2)
    assert (pool["backlog_tasks"], pool["held_by_hand"]) == (2, False)
    (instance,) = pool["instances"]
    assert (instance["worker"], instance["busy"], instance["held"]) == (f"w-{ids[0]}", 1, 1)
    depths = {queue["name"]: queue["visible"] for queue in grid["queues"]}
    assert depths.keys() == {"events", "tasks-default", "tasks-default-dead"}
    assert depths["tasks-default"] == 2


def test_capacity_is_held_by_hand_until_it_is_handed_back(rig: Rig) -> None:
    pool = rig.client.scale("default", min=1, max=3, desired=2)
    assert (pool["min"], pool["max"], pool["desired"]) == (1, 3, 2)
    assert pool["held_by_hand"]
    rig.instances(2, "Pending")
    assert not rig.client.scale("default", auto=True)["held_by_hand"]
    assert rig.client.scale("default", auto=False)["held_by_hand"]
    causes = [activity["cause"] for activity in rig.client.activities(pool="default")]
    assert any("a user request" in cause for cause in causes)
    assert len(rig.client.activities(limit=1)) == 1


def test_capacity_outside_of_the_limits_is_refused_and_changes_nothing(rig: Rig) -> None:
    with pytest.raises(Refused, match="outside"):
        rig.client.scale("default", desired=9)
    with pytest.raises(Refused, match="min: 5"):
        rig.client.scale("default", min=5)
    with pytest.raises(UsageError, match="either"):
        rig.client.scale("default", desired=1, auto=True)
    with pytest.raises(NotFound, match="Its pools are default"):
        rig.client.scale("gpu", desired=1)
    assert post(rig, "/v1/grid/pools/default", {"desird": 1}).status_code == 422
    (pool,) = rig.client.grid()["pools"]
    assert (pool["min"], pool["max"], pool["desired"]) == (0, 2, 0)
    assert not pool["held_by_hand"]


def test_a_refused_capacity_leaves_an_earlier_one_held(rig: Rig) -> None:
    rig.client.scale("default", desired=1)
    with pytest.raises(Refused):
        rig.client.scale("default", desired=9)
    assert rig.manager.autoscaler.held == {"default": 1}


def test_draining_ends_busy_instances_too_and_none_comes_back(rig: Rig) -> None:
    name = rig.submit(job(tasks=4))
    bundles = rig.outstanding(name, 4)
    rig.client.scale("default", min=1, desired=2)
    ids = rig.instances(2, "Pending")
    rig.beat(ids[0], bundles[0])
    rig.beat(ids[1])

    def protected() -> bool:
        instances = rig.client.grid()["pools"][0]["instances"]
        return [one["protected"] for one in instances if one["id"] == ids[0]] == [True]

    rig.until(protected, "the protection of the busy")
    (pool,) = rig.client.drain("default")["pools"]
    assert (pool["min"], pool["desired"], pool["held_by_hand"]) == (0, 0, True)
    rig.instances(2, "Terminated")
    answer = rig.client.why(name)
    assert "held at 0 instances by hand" in answer
    rig.client.scale("default", auto=True)
    rig.until(lambda: rig.client.grid()["pools"][0]["desired"], "the policy to ask for capacity")


def test_all_pools_are_drained_where_none_is_named() -> None:
    with Rig(pools=(Pool("a", min_size=1), Pool("b", min_size=1))) as rig:
        assert [pool["desired"] for pool in rig.client.drain()["pools"]] == [0, 0]
        with pytest.raises(NotFound):
            rig.client.drain("c")


def test_a_rebuilt_ledger_knows_every_job(rig: Rig) -> None:
    names = [rig.submit(job(token=token, tasks=1)) for token in "ab"]
    for name in names:
        rig.work(name, 1)
        rig.ended(name)
    before = rig.client.jobs()
    assert rig.client.rebuild() == 2
    assert rig.client.jobs() == before


def test_a_shutdown_is_passed_on_after_its_answer(rig: Rig) -> None:
    rig.client.shutdown()
    rig.until(lambda: rig.shutdowns == 1, "the shutdown")


# --- Why -----------------------------------------------------------------------------------------


def test_why_follows_a_job_through_its_life(rig: Rig) -> None:
    """Answers pain 1: at every moment there is a reason, and it is the right one."""
    last = StageDef(StageName("sum"), after=(MAP,), gather="*", handler="m:g")
    name = rig.submit(
        job(tasks=1, after=[last], retry=RetryRule(attempts=2, backoff_s=600.0, jitter=0.0))
    )
    rig.outstanding(name, 1)
    (instance,) = rig.instances(1, "Pending")
    assert "pool default has 0 of max 2 instances in service, 1 launched" in rig.client.why(name)
    rig.beat(instance)
    rig.instances(1)
    assert "on the way to 1 worker of pool default" in rig.client.why(name)
    rig.work(name, 1, bad=[0])
    answer = rig.client.why(name)
    assert "1 task waits for its retry, next due in 10 min" in answer
    assert "stage sum waits for stage map (0 of 1 tasks ended)" in answer


def test_why_tells_that_instances_cannot_be_launched() -> None:
    """Answers pain 1: a fleet that cannot come up is the reason, not a mystery."""
    with Rig() as rig:
        rig.launcher.refuse = lambda _pool, _instance: "the image is missing"
        name = rig.submit(job(tasks=1))
        answer = rig.until(
            lambda: text if "missing" in (text := rig.client.why(name)) else "", "the failure"
        )
        assert "It is waiting for capacity: workers of pool default do not come up" in answer
        assert "its launch failed: the image is missing" in answer


def test_why_tells_of_a_backend_that_does_not_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> GroupView:
        raise Unreachable("Docker does not answer.")

    monkeypatch.setattr(rig.manager.autoscaler, "scale", broken)
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    rig.until(lambda: "Docker does not answer" in rig.client.why(name), "the trouble")
    live: LiveJob = rig.manager.lives[JobId(name)]
    assert live.trouble == ""


# --- Speed ---------------------------------------------------------------------------------------


def test_answers_over_a_kept_connection_are_sent_at_once() -> None:
    """Else each waits 40 ms for an acknowledgement."""
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
        if "application/zip" in good["content"]:
            continue
        assert "$ref" in good["content"]["application/json"]["schema"], operation["operationId"]
        assert operation["description"]
    assert "JobDef" in described["components"]["schemas"]


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}])
def test_of_a_request_without_the_token_no_body_is_read(rig: Rig, given: dict[str, str]) -> None:
    """Any page that the operator visits may send one."""
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


def test_a_body_that_is_read_as_a_whole_has_a_limit(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MOST_BYTES", 2**20)

    def chunks() -> Iterator[bytes]:
        yield from [b"[" * 2**18] * 5

    head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    answer = rig.http.post("/v1/jobs", content=chunks(), headers=head)
    assert answer.status_code == 413
    assert "up to 1 MiB" in answer.json()["error"]
    assert post(rig, "/v1/jobs", {"tags": "x" * 2**19}).status_code == 422
