"""The page over HTTP: access and forms."""

from __future__ import annotations

import re
import time

import pytest

from batchlab.server.http import create_app
from batchlab.server.http.authentication import LOCAL_NAMES, SESSION_S
from tests.support.server.api import TOKEN, Rig, job
from tests.support.server.page import OURS, Visitor, other, rig, routes, stranger, visitor

__all__ = ["other", "rig", "stranger", "visitor"]


# --- Access --------------------------------------------------------------------------------------


def test_without_a_session_nothing_answers_but_the_login(rig: Rig, stranger: Visitor) -> None:
    asked = routes(rig)
    assert len(asked) >= 25
    for method, path in asked:
        if path == "/login":
            continue
        for headers in ({}, {"HX-Request": "true"}, {"Accept": "application/json"}):
            answer = stranger.http.request(method, f"/ui{path}", headers={**OURS, **headers})
            is_seen = method == "GET" and not headers
            assert answer.status_code == (303 if is_seen else 401), (method, path)
            assert len(answer.content) < 100
            if answer.status_code == 303:
                assert answer.headers["location"] == "/ui/login"
    parts = stranger.get("/", **{"HX-Request": "true"})
    assert (parts.status_code, parts.headers["HX-Redirect"]) == (401, "/ui/login")


def test_bearer_token_is_not_a_session(stranger: Visitor) -> None:
    assert stranger.get("/", Authorization=f"Bearer {TOKEN}").status_code == 303


def test_the_token_opens_a_session(stranger: Visitor) -> None:
    answer = stranger.log_in()
    assert answer.status_code == 303
    assert re.fullmatch("/ui/s/[0-9a-f]{32}/", answer.headers["location"])
    cookie = answer.headers["set-cookie"]
    assert re.search(rf"; HttpOnly;.*; Path={stranger.root}; SameSite=strict$", cookie)
    assert TOKEN not in cookie
    assert stranger.get("/").status_code == 200


def test_a_code_opens_one_session(rig: Rig, stranger: Visitor, other: Visitor) -> None:
    session = rig.client.open_session()
    assert session["path"] == f"/ui/login#{session['code']}"
    assert session["code"] not in session["name"]
    assert rig.client.code_waits(session["name"])
    assert stranger.log_in(session["code"]).status_code == 303
    assert not rig.client.code_waits(session["name"])
    refused = other.log_in(session["code"])
    assert refused.status_code == 403
    assert "already used" in refused.text


@pytest.mark.parametrize("word", ["", "guess", "x" * 5000, "\x00", "ü"])
def test_a_wrong_word_opens_nothing(stranger: Visitor, word: str) -> None:
    answer = stranger.log_in(word)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_a_session_ends_with_its_time_and_by_logging_out(
    rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = 0.0
    clock = type(rig.manager.ports.clock)
    monkeypatch.setattr(clock, "now_s", lambda _: time.time() + later)
    assert visitor.get("/").status_code == 200
    later = SESSION_S + 1
    assert visitor.get("/").status_code == 303
    later = 0.0
    assert visitor.get("/").status_code == 200
    kept = dict(visitor.http.cookies)
    assert visitor.post("/logout").headers["location"] == "/ui/login"
    for name, value in kept.items():
        visitor.http.cookies.set(name, value)
    assert visitor.get("/").status_code == 303


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:80", 200),
        ("grid.example:9", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example:80@127.0.0.1", 200),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_the_page_answers_to_its_own_names_only(visitor: Visitor, host: str, status: int) -> None:
    """In DNS rebinding, the name of an attacker resolves to this address."""
    assert visitor.get("/", Host=host).status_code == status
    assert visitor.get("/static/page.css", Host=host).status_code == status


def test_a_manager_that_listens_everywhere_does_not_answer_to_that(rig: Rig) -> None:
    _, served = create_app(
        rig.manager, token=TOKEN, backend_name="memory", on_shutdown=lambda: None, hosts=["0.0.0.0", "::"]
    )
    assert served.hosts == LOCAL_NAMES


# --- Forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 303),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "{url}"}, 303),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "{url}.evil.example"}, 403),
        ({}, 403),
    ],
)
def test_form_must_come_from_an_own_page(rig: Rig, visitor: Visitor, headers: dict[str, str], status: int) -> None:
    sent = {name: text.format(url=rig.url) for name, text in headers.items()}
    data = {"form_token": visitor.token()}
    answer = visitor.http.post(f"{visitor.root}/jobs/x/cancel", data=data, headers=sent)
    assert answer.status_code == status


def test_every_form_carries_its_sessions_token(rig: Rig, visitor: Visitor, other: Visitor) -> None:
    posts = [path for method, path in routes(rig) if method == "POST" and path != "/login"]
    assert len(posts) >= 10
    other.log_in()
    for path in posts:
        for data in ({}, {"form_token": ""}, {"form_token": other.token()}):
            answer = visitor.http.post(f"{visitor.root}{path}", data={"sure": "yes", **data}, headers=OURS)
            assert answer.status_code == 409, path
            assert "The form" in answer.text
    assert visitor.get("/").status_code == 200  # the session is still valid


def test_a_form_is_not_long(visitor: Visitor) -> None:
    answer = visitor.post("/logout", more="x" * 2_000_000)
    assert answer.status_code == 422
    assert visitor.get("/").status_code == 200


def test_irreversible_action_is_confirmed(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="sure"))
    asked = visitor.post(f"/jobs/{name}/cancel")
    assert asked.headers["location"] == f"{visitor.root}/jobs/{name}/cancel"
    assert rig.client.job(name)["ended_s"] is None
    question = visitor.get(f"/jobs/{name}/cancel")
    assert "Cancel sums?" in question.text
    assert "<html" in question.text
    assert "<html" not in visitor.get(f"/jobs/{name}/cancel", **{"HX-Request": "true"}).text
    assert visitor.post("/grid/drain").headers["location"] == f"{visitor.root}/grid/drain"
    assert visitor.post("/grid/drain", pool="a&b").headers["location"] == (f"{visitor.root}/grid/drain?pool=a%26b")
    assert not rig.manager.autoscaler.user_capacity
    assert visitor.post(f"/jobs/{name}/cancel", sure="yes").status_code == 303
    assert rig.ended(name)["state"] == "CANCELLED"


def test_forms_do_what_the_api_does(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="forms", tasks=3))
    assert visitor.post(f"/jobs/{name}/pause").headers["location"] == f"{visitor.root}/jobs/{name}"
    assert rig.client.job(name)["state"] == "PAUSED"
    visitor.post(f"/jobs/{name}/resume")
    rig.work(name, 3, bad=[0, 1])
    rig.ended(name)
    visitor.post(f"/jobs/{name}/retry", task="map/0")
    rig.work(name, 1)
    assert rig.ended(name)["stages"][0]["failed"] == 1
    (group,) = rig.client.failure_groups(name)
    visitor.post(f"/jobs/{name}/retry", fingerprint=group["fingerprint"])
    rig.work(name, 1, bad=[1])
    rig.ended(name)
    visitor.post(f"/jobs/{name}/retry", which="all")
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"
    visitor.post("/grid/pools/default", min="1", max="3", by="hand", desired="2")
    pool = rig.client.grid()["pools"][0]
    assert (pool["min"], pool["max"], pool["desired"], pool["held_by_hand"]) == (1, 3, 2, True)
    visitor.post("/grid/pools/default", min="0", max="2", by="policy", desired="2")
    assert rig.client.grid()["pools"][0]["held_by_hand"] is False


@pytest.mark.parametrize(
    ("path", "data", "told"),
    [
        ("/jobs/nowhere/pause", {}, "nowhere"),
        ("/jobs/{job}/retry", {}, "No cause and no task is selected"),
        ("/jobs/{job}/retry", {"task": "map"}, "is not a list of tasks"),
        ("/jobs/{job}/retry", {"task": "map/-1"}, "is not a list of tasks"),
        ("/jobs/{job}/retry", {"task": "map/9999"}, "still"),
        ("/jobs/{job}/resume", {}, "not paused"),
        ("/grid/pools/default", {"max": "many"}, "not a number of instances"),
        ("/grid/pools/default", {"max": "9" * 50}, "not a number of instances"),
        ("/grid/pools/nowhere", {"max": "1"}, "nowhere"),
        ("/costs/cap", {"amount": "5"}, "does not record the usage"),
        ("/submit", {}, "The form does not contain files"),
    ],
)
def test_refusal_is_shown_on_a_page(rig: Rig, visitor: Visitor, path: str, data: dict[str, str], told: str) -> None:
    name = rig.submit(job(token="refused"))
    answer = visitor.post(path.format(job=name), **data)
    assert answer.status_code in (404, 409, 422), answer.text
    assert told in answer.text
    assert "text/html" in answer.headers["content-type"]
