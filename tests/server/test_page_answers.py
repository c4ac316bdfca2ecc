"""The answers of the page over HTTP, in which hostile text never becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from batchlab.server.web.security import HEADERS
from tests.support.server.api import TOKEN, Rig, job
from tests.support.server.page import NASTY, OURS, Visitor, rig, stranger, visitor

__all__ = ["rig", "stranger", "visitor"]


# --- What is answered ----------------------------------------------------------------------------


def test_every_answer_carries_the_policy(rig: Rig, visitor: Visitor, stranger: Visitor) -> None:
    paths = ["/", "/grid", "/jobs/nowhere", "/nothing", "/static/page.js", "/static/x", "/login"]
    for who in (visitor, stranger):
        for path in paths:
            answer = who.get(path)
            for name, value in HEADERS.items():
                expected = "no-cache" if name == "Cache-Control" and path == "/static/page.js" else value
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
    one = replace(job(token="nasty", tasks=1), name=NASTY, tags=((NASTY, NASTY),))
    name = rig.submit(one)
    rig.work(name, 1, bad=[0])
    rig.ended(name)
    (group,) = rig.client.failure_groups(name)
    for path in (
        "/",
        "/failures",
        f"/jobs/{name}",
        f"/jobs/{name}/failures",
        f"/jobs/{name}/cancel",
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
        assert str(7919 * 6841) not in text, path


def test_update_is_a_part_of_the_page(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="live"))
    for path in ("/", "/?active=true", f"/jobs/{name}", "/failures", "/schedules", "/grid", "/costs"):
        whole = visitor.get(path)
        found = re.search(r'hx-get="([^"]+)"', whole.text)
        assert found, path
        part = visitor.http.get(found[1].replace("&amp;", "&"), headers={"HX-Request": "true"})
        assert part.status_code == 200
        assert "<html" not in part.text
        assert len(part.content) < len(whole.content)
        assert "<html" in visitor.http.get(found[1].replace("&amp;", "&")).text


def test_jobs_are_paged(rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.web.views.JOBS_PER_PAGE", 2)
    names = [rig.submit(job(token=f"page-{number}")) for number in range(3)]
    first = visitor.get("/").text
    assert [name in first for name in names] == [False, True, True]
    older = re.search(rf'href="{visitor.root}(/\?before=[^"]+)">Older', first)
    assert older
    assert names[0] in visitor.get(older[1]).text


def test_the_root_leads_to_the_page(rig: Rig) -> None:
    answer = rig.http.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")


def test_curves_are_of_what_was_seen(rig: Rig, visitor: Visitor) -> None:
    rig.served.history.record(rig.manager)
    found = visitor.get("/history.json").json()
    assert found == rig.http.get("/v1/grid/history", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    (pool,) = found["pools"]
    assert pool["name"] == "default"
    assert {len(pool[name]) for name in pool if name != "name"} == {len(found["at_s"])}


def test_manager_without_the_lead_answers_with_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.http.common.LEADER_WAIT_S", 0.02)
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
    assert "The schedule is due next at" in one
    assert "The schedule has not been due yet" in one
    assert one.count("<local-time unless=") == 5
    here = visitor.post("/schedules/nightly/pause").headers["location"]
    assert here == f"{visitor.root}/schedules/nightly"
    assert rig.client.schedule("nightly")["state"] == "paused"
    assert "The schedule is paused" in visitor.get("/schedules/nightly").text
    visitor.post("/schedules/nightly/resume")
    assert rig.client.schedule("nightly")["state"] == "active"
    for _ in range(2):  # two identical submissions make one run
        visitor.post("/schedules/nightly/run", token="once")
    (run,) = rig.until(lambda: rig.client.schedule("nightly")["runs"], "the run")
    assert run["by_hand"]
    name = rig.until(lambda: rig.client.schedule("nightly")["runs"][0]["job"], "its job") or ""
    assert f"{visitor.root}/jobs/{name}" in visitor.get("/schedules/nightly").text
    asked = visitor.post("/schedules/nightly/remove")
    assert asked.headers["location"] == f"{visitor.root}/schedules/nightly/remove"
    assert "Remove nightly?" in visitor.get("/schedules/nightly/remove").text
    visitor.post("/schedules/nightly/remove", sure="yes")
    assert "There are no schedules" in visitor.get("/schedules").text
    gone = visitor.get("/schedules/nightly")
    assert gone.status_code == 404
    assert "<h1>Not found</h1>" in gone.text
    rig.ended(name)  # the job's input was never uploaded


@pytest.mark.parametrize(
    ("said", "back"),
    [
        ("{url}{root}/jobs?state=failed", "/jobs?state=failed"),
        ("{url}/elsewhere", "/"),
        ("http://evil.example{root}/jobs", "/"),
        ("{url}//evil.example{root}/", "/"),
        ("", "/"),
    ],
)
def test_error_page_links_back_to_the_requesting_page(rig: Rig, visitor: Visitor, said: str, back: str) -> None:
    gone = visitor.get("/jobs/nowhere", Referer=said.format(url=rig.url, root=visitor.root))
    assert gone.status_code == 404
    assert f'href="{visitor.root}{back}" data-back' in gone.text


def test_a_form_leads_to_any_task(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="any", tasks=2))
    rig.work(name, 2)
    rig.ended(name)
    found = visitor.get(f"/jobs/{name}/task?stage=map&task=1")
    assert found.headers["location"] == f"{visitor.root}/jobs/{name}/stages/map/tasks/1"
    text = visitor.get(f"/jobs/{name}/stages/map/tasks/1").text
    assert "task 1, try 1" in text
    assert "SUCCEEDED" in text
    assert visitor.get(f"/jobs/{name}/task?stage=map&task=-1").status_code == 422
    assert visitor.get("/jobs/nowhere/task?stage=map&task=1").status_code == 404
    elsewhere = visitor.get(f"/jobs/{name}/task?stage=//evil.example&task=1")
    assert elsewhere.headers["location"].startswith(f"{visitor.root}/jobs/{name}/stages/%2F%2Fevil")
