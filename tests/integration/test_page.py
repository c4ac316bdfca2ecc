"""The page over HTTP: who is let in, what forms may do, and that nothing hostile becomes markup."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount

from batchlab import web
from batchlab.api.sessions import SESSION_S
from batchlab.model import Failure, FailureKind
from batchlab.web.guard import HEADERS, OWN_NAMES, Guard
from tests.integration.api_rig import TOKEN, Rig, job

OURS = {"Sec-Fetch-Site": "same-origin"}
NASTY = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>`{{7*7}}"


def nasty(task: int) -> Failure:
    return Failure(task, FailureKind.EXCEPTION, NASTY, NASTY, f'File "{NASTY}", line 1, in x')


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(failure=nasty) as made:
        yield made


class Visitor:
    """Somebody's browser: keeps its cookies, and says where a request comes from."""

    def __init__(self, rig: Rig) -> None:
        self.http = httpx.Client(base_url=rig.url, trust_env=False, verify=False)
        self.rig = rig

    def log_in(self, word: str = TOKEN) -> httpx.Response:
        return self.http.post("/ui/login", data={"word": word}, headers=OURS)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(f"/ui{path}", headers=headers)

    def token(self) -> str:
        found = re.search(r'name="form_token" value="([^"]+)"', self.get("/").text)
        assert found
        return found[1]

    def post(self, path: str, **data: Any) -> httpx.Response:
        return self.http.post(f"/ui{path}", data={"form_token": self.token(), **data}, headers=OURS)


@pytest.fixture
def stranger(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        yield made


@pytest.fixture
def other(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        yield made


@pytest.fixture
def visitor(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        assert made.log_in().status_code == 303
        yield made


def routes(rig: Rig) -> list[tuple[str, str]]:
    """Every route of the page with its method, names filled in."""
    page = web.page_of(rig.served, None)
    found: list[tuple[str, str]] = []

    def walk(some: Any) -> None:
        for route in some:
            if router := getattr(route, "original_router", None):
                walk(router.routes)
            elif isinstance(route, APIRoute):
                path = re.sub(r"\{(\w+)\}", lambda m: "0" if m[1] == "task" else "x", route.path)
                found.extend((method, path) for method in route.methods or ())

    walk(page.routes)
    return found


# --- Who is let in -------------------------------------------------------------------------------


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


def test_a_bearer_token_is_no_session(stranger: Visitor) -> None:
    assert stranger.get("/", Authorization=f"Bearer {TOKEN}").status_code == 303


def test_the_token_opens_a_session(stranger: Visitor) -> None:
    answer = stranger.log_in()
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")
    cookie = answer.headers["set-cookie"]
    assert re.search(r"; HttpOnly;.*; Path=/ui; SameSite=strict$", cookie)
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
    assert "used before" in refused.text


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
    """DNS rebinding: a name of somebody else's that leads here."""
    assert visitor.get("/", Host=host).status_code == status
    assert visitor.get("/static/page.css", Host=host).status_code == status


def test_a_manager_that_listens_everywhere_does_not_answer_to_that(rig: Rig) -> None:
    app = FastAPI()
    web.mount(app, rig.served, hosts=["0.0.0.0", "::"])
    (guard,) = (one.app for one in app.routes if isinstance(one, Mount))
    assert isinstance(guard, Guard)
    assert guard.hosts == OWN_NAMES


# --- What forms may do ---------------------------------------------------------------------------


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
def test_a_form_comes_from_a_page_of_ours(
    rig: Rig, visitor: Visitor, headers: dict[str, str], status: int
) -> None:
    sent = {name: text.format(url=rig.url) for name, text in headers.items()}
    data = {"form_token": visitor.token()}
    answer = visitor.http.post("/ui/jobs/x/cancel", data=data, headers=sent)
    assert answer.status_code == status


def test_every_form_carries_its_sessions_token(rig: Rig, visitor: Visitor, other: Visitor) -> None:
    posts = [path for method, path in routes(rig) if method == "POST" and path != "/login"]
    assert len(posts) >= 10
    other.log_in()
    for path in posts:
        for data in ({}, {"form_token": ""}, {"form_token": other.token()}):
            answer = visitor.http.post(f"/ui{path}", data={"sure": "yes", **data}, headers=OURS)
            assert answer.status_code == 409, path
            assert "The form" in answer.text
    assert visitor.get("/").status_code == 200  # nobody was logged out


def test_a_form_is_not_long(visitor: Visitor) -> None:
    answer = visitor.post("/logout", more="x" * 2_000_000)
    assert answer.status_code == 422
    assert visitor.get("/").status_code == 200


def test_a_question_is_asked_before_what_cannot_be_taken_back(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="sure"))
    asked = visitor.post(f"/jobs/{name}/cancel")
    assert asked.headers["location"] == f"/ui/jobs/{name}/cancel"
    assert rig.client.job(name)["ended_s"] is None
    question = visitor.get(f"/jobs/{name}/cancel")
    assert "Cancel sums?" in question.text
    assert "<html" in question.text
    assert "<html" not in visitor.get(f"/jobs/{name}/cancel", **{"HX-Request": "true"}).text
    assert visitor.post("/grid/drain").headers["location"] == "/ui/grid/drain"
    assert visitor.post("/grid/drain", pool="a&b").headers["location"] == (
        "/ui/grid/drain?pool=a%26b"
    )
    assert not rig.manager.autoscaler.held
    assert visitor.post(f"/jobs/{name}/cancel", sure="yes").status_code == 303
    assert rig.ended(name)["state"] == "CANCELLED"


def test_forms_do_what_the_api_does(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="forms", tasks=3))
    assert visitor.post(f"/jobs/{name}/pause").headers["location"] == f"/ui/jobs/{name}"
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
        ("/jobs/{job}/retry", {}, "Nothing was ticked"),
        ("/jobs/{job}/retry", {"task": "map"}, "names no tasks"),
        ("/jobs/{job}/retry", {"task": "map/-1"}, "names no tasks"),
        ("/jobs/{job}/retry", {"task": "map/9999"}, "still"),
        ("/jobs/{job}/resume", {}, "not paused"),
        ("/grid/pools/default", {"max": "many"}, "no number of instances"),
        ("/grid/pools/default", {"max": "9" * 50}, "no number of instances"),
        ("/grid/pools/nowhere", {"max": "1"}, "nowhere"),
        ("/costs/cap", {"amount": "5"}, "keeps no account"),
        ("/submit", {}, "No file came along"),
    ],
)
def test_what_is_refused_is_told_on_a_page(
    rig: Rig, visitor: Visitor, path: str, data: dict[str, str], told: str
) -> None:
    name = rig.submit(job(token="refused"))
    answer = visitor.post(path.format(job=name), **data)
    assert answer.status_code in (404, 409, 422), answer.text
    assert told in answer.text
    assert "text/html" in answer.headers["content-type"]


# --- What is answered ----------------------------------------------------------------------------


def test_every_answer_carries_the_policy(rig: Rig, visitor: Visitor, stranger: Visitor) -> None:
    paths = ["/", "/grid", "/jobs/nowhere", "/nothing", "/static/page.js", "/static/x", "/login"]
    for who in (visitor, stranger):
        for path in paths:
            answer = who.get(path)
            for name, value in HEADERS.items():
                expected = (
                    "no-cache" if name == "Cache-Control" and path == "/static/page.js" else value
                )
                assert answer.headers[name] == expected, (path, name)
    refused = visitor.get("/", Host="evil.example")
    assert refused.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_only_what_was_shipped_is_a_static_file(visitor: Visitor) -> None:
    assert visitor.get("/static/vendor/htmx.min.js").headers["content-type"].startswith("text/java")
    for path in ("..%2f__init__.py", "vendor/", "", "vendor/htmx.LICENSE", "%2e%2e/guard.py"):
        assert visitor.get(f"/static/{path}").status_code == 404
    assert visitor.http.post("/ui/static/page.css", headers=OURS).status_code == 404


def test_hostile_names_stay_text(rig: Rig, visitor: Visitor) -> None:
    one = replace(
        job(token="nasty", tasks=1),
        name=NASTY,
        tags=((NASTY, NASTY),),
    )
    name = rig.submit(one)
    rig.work(name, 1, bad=[0])
    rig.ended(name)
    (group,) = rig.client.failure_groups(name)
    for path in (
        *("/", "/failures", f"/jobs/{name}", f"/jobs/{name}/failures", f"/jobs/{name}/cancel"),
        f"/jobs/{name}/failures/{group['fingerprint']}",
        f"/jobs/{name}/failures/{NASTY.replace('/', '')}",
        f"/jobs/{name}/stages/map/tasks/0",
        f"/jobs/{name}/stages/{NASTY.replace('/', '')}/tasks/0",
        f"/?before={NASTY}",
        f"/grid/drain?pool={NASTY}",
    ):
        text = visitor.get(path).text
        assert "<script>alert" not in text, path
        assert "<img src=x" not in text, path
        assert "49" not in re.sub(r"[\w.-]*\d{3}[\w.-]*", "", text), path


def test_what_changes_of_a_page_is_a_part_of_it(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="live"))
    for path in (
        "/",
        "/?active=true",
        f"/jobs/{name}",
        "/failures",
        "/schedules",
        "/grid",
        "/costs",
    ):
        whole = visitor.get(path)
        found = re.search(r'hx-get="([^"]+)"', whole.text)
        assert found, path
        part = visitor.http.get(found[1].replace("&amp;", "&"), headers={"HX-Request": "true"})
        assert part.status_code == 200
        assert "<html" not in part.text
        assert len(part.content) < len(whole.content)
        assert "<html" in visitor.http.get(found[1].replace("&amp;", "&")).text


def test_jobs_come_in_pages(rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.jobs, "A_PAGE", 2)
    names = [rig.submit(job(token=f"page-{number}")) for number in range(3)]
    first = visitor.get("/").text
    assert [name in first for name in names] == [False, True, True]
    older = re.search(r'href="/ui(/\?before=[^"]+)">Older', first)
    assert older
    assert names[0] in visitor.get(older[1]).text


def test_the_root_leads_to_the_page(rig: Rig) -> None:
    answer = rig.http.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")


def test_curves_are_of_what_was_seen(rig: Rig, visitor: Visitor) -> None:
    rig.served.history.look(rig.manager)
    found = visitor.get("/history.json").json()
    assert (
        found
        == rig.http.get("/v1/grid/history", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    )
    (pool,) = found["pools"]
    assert pool["name"] == "default"
    assert {len(pool[name]) for name in pool if name != "name"} == {len(found["at_s"])}


def test_a_manager_that_does_not_lead_says_so_on_a_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchlab.api.common.LEADS_WITHIN_S", 0.02)
    with Rig(lead=False) as rig:
        visitor = Visitor(rig)
        with visitor.http:
            visitor.log_in()
            answer = visitor.get("/")
        assert answer.status_code == 503
        assert "not the leader" in answer.text


# --- Schedules -----------------------------------------------------------------------------------


def test_a_schedule_is_looked_at_paused_resumed_run_and_removed(rig: Rig, visitor: Visitor) -> None:
    assert "There are no schedules" in visitor.get("/schedules").text
    timed = {"name": "nightly", "cron": "0 2 * * 1-5", "timezone": "Europe/Berlin"}
    rig.client.add_schedule(timed, job(token="timed", tasks=1))
    assert "Europe/Berlin" in visitor.get("/schedules").text
    one = visitor.get("/schedules/nightly").text
    assert "It is due next at" in one
    assert "It has not been due yet" in one
    assert one.count("<local-time unless=") == 5
    here = visitor.post("/schedules/nightly/pause").headers["location"]
    assert here == "/ui/schedules/nightly"
    assert rig.client.schedule("nightly")["state"] == "paused"
    assert "It is paused" in visitor.get("/schedules/nightly").text
    visitor.post("/schedules/nightly/resume")
    assert rig.client.schedule("nightly")["state"] == "active"
    for _ in range(2):  # sent twice it is one run
        visitor.post("/schedules/nightly/run", token="once")
    (run,) = rig.until(lambda: rig.client.schedule("nightly")["runs"], "the run")
    assert run["by_hand"]
    name = rig.until(lambda: rig.client.schedule("nightly")["runs"][0]["job"], "its job") or ""
    assert f"/ui/jobs/{name}" in visitor.get("/schedules/nightly").text
    asked = visitor.post("/schedules/nightly/remove")
    assert asked.headers["location"] == "/ui/schedules/nightly/remove"
    assert "Remove nightly?" in visitor.get("/schedules/nightly/remove").text
    visitor.post("/schedules/nightly/remove", sure="yes")
    assert "There are no schedules" in visitor.get("/schedules").text
    gone = visitor.get("/schedules/nightly")
    assert gone.status_code == 404
    assert "<h1>Not found</h1>" in gone.text
    rig.ended(name)  # its input was never uploaded


def test_a_form_leads_to_any_task(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="any", tasks=2))
    rig.work(name, 2)
    rig.ended(name)
    found = visitor.get(f"/jobs/{name}/task?stage=map&task=1")
    assert found.headers["location"] == f"/ui/jobs/{name}/stages/map/tasks/1"
    text = visitor.get(f"/jobs/{name}/stages/map/tasks/1").text
    assert "task 1, try 1" in text
    assert "SUCCEEDED" in text
    assert visitor.get(f"/jobs/{name}/task?stage=map&task=-1").status_code == 422
    assert visitor.get("/jobs/nowhere/task?stage=map&task=1").status_code == 404
    elsewhere = visitor.get(f"/jobs/{name}/task?stage=//evil.example&task=1")
    assert elsewhere.headers["location"].startswith(f"/ui/jobs/{name}/stages/%2F%2Fevil")
