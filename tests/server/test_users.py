"""Users with roles: permissions of every route, the audit log, owners of jobs, expiry, and revocation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchlab.client.http import Client
from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.core.model import JobId
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.users import Role, User
from batchlab.manager import audit_log, user_directory
from batchlab.server.http import authentication
from batchlab.server.http.authentication import PAGE
from batchlab.server.http.permissions import PAGE_RULES, RULES
from tests.support.server.api import TOKEN, Rig, job
from tests.support.server.page import OURS, Visitor, page_templates, route_templates
from tests.support.server.users import add, changes, client_of, filled, request

PUBLIC = {("GET", "/"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json"), ("GET", "/v1/health")}
PUBLIC_PAGE = {("GET", "/login"), ("POST", "/login")}


def test_every_route_has_a_rule(rig: Rig) -> None:
    assert set(route_templates(rig.app, PAGE)) - PUBLIC == set(RULES)
    assert set(page_templates(rig)) - PUBLIC_PAGE == set(PAGE_RULES)


def test_a_route_without_a_rule_is_refused_to_every_role(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {route: rule for route, rule in RULES.items() if route != ("GET", "/v1/grid/history")}
    monkeypatch.setattr("batchlab.server.http.common.RULES", rules)
    assert request(rig, TOKEN, "GET", "/v1/grid/history").status_code == 403
    assert request(rig, TOKEN, "GET", "/v1/use").status_code != 403


def test_each_role_includes_the_roles_before_it() -> None:
    roles = list(Role)
    for number, role in enumerate(roles):
        assert [role.includes(other) for other in roles] == [at <= number for at in range(len(roles))]


def test_requests_that_a_role_must_not_make_are_refused_and_audited(rig: Rig) -> None:
    """Two users of different roles make every request that their role forbids, and the log has each of them."""
    theirs = rig.submit(job("theirs", "theirs"))
    refused = 0
    for name, role in (("vera", Role.VIEW), ("sam", Role.SUBMIT)):
        token = add(rig, name, role.value)
        forbidden = [(method, path, rule) for method, path, rule in changes(RULES) if not role.includes(rule.role)]
        for method, path, _ in forbidden:
            answer = request(rig, token, method, filled(path, theirs))
            assert answer.status_code == 403, (name, method, path, answer.text)
            problem = answer.json()
            assert problem["error"].startswith(f"The user {name} with the role {role.value} may not do `"), problem
            assert problem["error"].count(". ") == 0
            assert problem["remedy"]
        records = rig.client.audit(user=name, outcome="refused", limit=1000)
        assert sorted((one["action"], one["role"]) for one in records) == sorted(
            (rule.action or f"{method} {path}", role.value) for method, path, rule in forbidden
        )
        refused += len(records)
    assert refused >= 40
    assert rig.shutdowns == 0
    assert rig.client.job(theirs)["ended_s"] is None


def test_page_actions_that_a_role_must_not_make_are_refused(rig: Rig) -> None:
    theirs = rig.submit(job("theirs", "theirs"))
    visitor = Visitor(rig)
    with visitor.http:
        assert visitor.log_in(add(rig, "vera", "view")).status_code == 303
        form = {"form_token": visitor.token(), "sure": "yes"}
        for method, path, _ in changes(PAGE_RULES):
            url = f"{visitor.root}{filled(path, theirs)}"
            data = form if method == "POST" else None
            answer = visitor.http.request(method, url, data=data, headers=OURS)
            assert answer.status_code == 403, (method, path)
            assert "The user vera with the role view may not do" in answer.text
        assert visitor.get("/").status_code == 200
    assert len(rig.client.audit(user="vera", outcome="refused")) == len(changes(PAGE_RULES))


def test_a_user_controls_only_own_jobs(rig: Rig) -> None:
    theirs = rig.submit(job("theirs", "theirs"))
    with client_of(rig, add(rig, "sam", "submit")) as sam:
        own = sam.job(rig.submit(job("own", "own"), sam))
        assert own["owner"] == "sam"
        assert sam.job(theirs)["owner"] == "owner"
        assert sam.pause(own["id"])["state"] == "PAUSED"
        sam.resume(own["id"])
        sam.cancel(own["id"])
        with pytest.raises(Refused, match=r"`job cancel` of theirs.*own jobs, and operate for jobs of others"):
            sam.cancel(theirs)
        with pytest.raises(Refused, match="job cap"):
            sam.cap_job(own["id"], 1.0)
    with client_of(rig, add(rig, "olga", "operate")) as olga:
        olga.cancel(theirs)
        with pytest.raises(Refused, match="user add"):
            olga.add_user("mallory", "administer")
    actions = [(one["user"], one["action"], one["object"]) for one in rig.client.audit(action="job", outcome="allowed")]
    assert ("sam", "job submit", own["id"]) in actions
    assert ("olga", "job cancel", theirs) in actions
    assert ("owner", "job submit", theirs) in actions


def test_the_owner_is_not_taken_from_the_request(rig: Rig) -> None:
    with client_of(rig, add(rig, "sam", "submit")) as sam:
        made = sam.submit(replace(job("own", "own"), owner="olga"))
        assert made["owner"] == "sam"
        spec = json_format.loads(rig.run(rig.objects.get(object_keys.spec(JobId(made["id"])))))
        assert spec["owner"] == "sam"
        assert rig.client.submit(replace(job("other", "other"), owner="sam"))["owner"] == "owner"
        rig.client.rebuild()
        assert rig.client.job(made["id"])["owner"] == "sam"
        # A repeated submission returns the job of the first user, and does not change its owner.
        assert rig.client.submit(job("own", "own"))["owner"] == "sam"
        with pytest.raises(Refused, match="Only an administrator may send a direct call"):
            sam.submit_and_hear(job("direct", "direct"), None, lambda: None, wait_s=0.0, is_sent=True)


def test_a_job_without_users_has_the_definition_of_earlier_releases(rig: Rig) -> None:
    spec = json_format.loads(rig.run(rig.objects.get(object_keys.spec(JobId(rig.submit(job()))))))
    assert "owner" not in spec


def test_the_jobs_of_a_schedule_belong_to_its_user(rig: Rig) -> None:
    with client_of(rig, add(rig, "olga", "operate")) as olga:
        olga.add_schedule({"name": "nightly", "cron": "0 2 * * *"}, job("sums", ""))
        run = olga.run_schedule("nightly", "now")
    made = rig.until(lambda: rig.client.jobs(), "the job of the run")[0]
    assert (made["id"], made["owner"]) == (run["job"], "olga")
    (record,) = rig.client.audit(action="job submit")
    assert (record["user"], record["reason"]) == ("olga", "schedule nightly")


def test_a_revoked_user_has_no_access(rig: Rig) -> None:
    token = add(rig, "sam", "submit")
    visitor = Visitor(rig)
    with visitor.http, client_of(rig, token) as sam:
        visitor.log_in(token)
        assert visitor.get("/").status_code == 200
        sam.jobs()
        assert rig.client.revoke_user("sam")["state"] == "revoked"
        with pytest.raises(Refused, match=r"The token of the user sam is revoked\."):
            sam.jobs()
        assert visitor.get("/").status_code == 303
        assert visitor.log_in(token).status_code == 403
        assert rig.client.revoke_user("sam")["state"] == "revoked"
    (record,) = rig.client.audit(user="sam", outcome="refused")
    assert (record["action"], record["reason"]) == ("GET /v1/jobs", "the token is revoked")
    with client_of(rig, add(rig, "sam", "view")) as again, client_of(rig, token) as before:
        again.jobs()
        with pytest.raises(Refused, match="not valid"):
            before.jobs()


def test_a_revocation_through_another_manager_takes_effect(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_directory, "REREAD_S", 0.0)
    with client_of(rig, add(rig, "sam", "submit")) as sam:
        sam.jobs()
        other = user_directory.UserDirectory(rig.manager.ports, TOKEN)
        rig.run(other.revoke("sam"))
        with pytest.raises(Refused, match="revoked"):
            sam.jobs()


def test_a_token_expires(rig: Rig) -> None:
    now_s = rig.manager.ports.clock.now_s()
    with client_of(rig, add(rig, "sam", "submit", expires_s=now_s + 60)) as sam:
        sam.jobs()

        def expire(users: dict[str, User]) -> dict[str, User]:
            return {name: replace(user, expires_s=now_s) for name, user in users.items()}

        rig.run(rig.served.users._change(expire))
        assert rig.client.users()[0]["state"] == "expired"
        with pytest.raises(Refused, match="expired"):
            sam.jobs()


@pytest.mark.parametrize("name", ["owner", "Sam", "", "a.b", "x" * 41, "../x", "sam\n"])
def test_an_invalid_name_is_refused(rig: Rig, name: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a user"):
        rig.client.add_user(name, "view")


def test_an_existing_user_is_replaced_only_on_request(rig: Rig) -> None:
    rig.client.add_user("sam", "view")
    with pytest.raises(Refused, match="exists already, with the role view"):
        rig.client.add_user("sam", "administer")
    assert rig.client.add_user("sam", "operate", replace=True)["user"]["role"] == "operate"
    with pytest.raises(UsageError, match="already be expired"):
        rig.client.add_user("late", "view", expires_s=1.0)


def test_a_user_sees_only_own_records(rig: Rig) -> None:
    rig.submit(job())
    with client_of(rig, add(rig, "vera", "view")) as vera, client_of(rig, add(rig, "ada", "administer")) as ada:
        with pytest.raises(Refused):
            vera.drain()
        assert {one["user"] for one in vera.audit()} == {"vera"}
        assert [one["name"] for one in vera.users()] == ["vera"]
        with pytest.raises(Refused, match="only their own audit records"):
            vera.audit(user="owner")
        assert {one["user"] for one in ada.audit()} == {"vera", "owner"}
        assert [one["name"] for one in ada.users()] == ["ada", "vera"]
        assert ada.add_user("bob", "view")["user"]["created_by"] == "ada"


def test_the_audit_log_is_read_in_pages(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_SCANNED", 2)
    made = rig.submit(job())
    for verb in (rig.client.pause, rig.client.resume, rig.client.cancel):
        verb(made)
    records = rig.client.audit()
    assert [one["action"] for one in records] == ["job cancel", "job resume", "job pause", "job submit"]
    assert [one["action"] for one in rig.client.audit(limit=2)] == ["job cancel", "job resume"]
    assert [one["action"] for one in rig.client.audit(action="job pause")] == ["job pause"]
    assert rig.client.audit(since_s=records[0]["at_s"] + 1) == []
    assert len({one["request"] for one in records}) == 4


def test_a_change_without_a_record_is_not_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig.submit(job())
    rig.client.audit()
    put = rig.objects.put

    async def failing(key: str, *args: Any, **options: Any) -> str:
        if key.startswith(object_keys.AUDIT):
            raise BackendError("no disk")
        return await put(key, *args, **options)

    monkeypatch.setattr(rig.objects, "put", failing)
    answer = request(rig, TOKEN, "POST", f"/v1/jobs/{made}/cancel")
    assert answer.status_code == 503
    monkeypatch.undo()
    assert rig.client.job(made)["state"] != "CANCELLED"
    assert [one["action"] for one in rig.client.audit()] == ["job submit"]


def test_one_user_cannot_fill_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_REFUSALS", 3)
    with client_of(rig, add(rig, "vera", "view")) as vera:
        for _ in range(10):
            with pytest.raises(Refused):
                vera.drain()
    for _ in range(5):
        assert request(rig, "wrong", "POST", "/v1/grid/drain").status_code == 401
    rig.run(rig.audit.close())
    records = rig.client.audit(outcome="refused")
    assert [(one["action"], one["count"]) for one in records] == [("several", 7), *[("grid drain", 1)] * 3]


def test_old_records_are_removed(rig: Rig) -> None:
    clock = rig.manager.ports.clock
    old = object_keys.audit(clock.now_s() - audit_log.KEEP_S - 60, "x")
    young = object_keys.audit(clock.now_s() - audit_log.KEEP_S + 60, "x")
    for key in (old, young):
        rig.run(rig.objects.put(key, b"{}"))
    rig.client.cancel(rig.submit(job()))
    assert rig.run(rig.objects.head(old)) is None
    assert rig.run(rig.objects.head(young))


def test_a_forged_token_gets_no_signed_answer(rig: Rig) -> None:
    with (
        Client(rig.url, "bl1.sam.0123456789abcdef." + "0" * 64) as forged,
        pytest.raises(Unreachable, match="does not prove"),
    ):
        forged.jobs()


def test_many_logouts_of_a_user_end_only_sessions_of_this_user(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "MAX_CLOSED", 3)
    sessions = rig.served.sessions
    key, other = "sam.0123456789abcdef", "ada.0123456789abcdef"
    before = {one: sessions.start(one) for one in ("", other, key)}
    closed, _ = sessions.start(other)
    sessions.close(closed)
    for _ in range(4):
        sessions.close(sessions.start(key)[0])

    def is_open(session: authentication.Session, cookie: str) -> bool:
        return sessions.find(cookie, sessions.place(session)) is not None

    assert {one: is_open(*session) for one, session in before.items()} == {"": True, other: True, key: False}
    assert is_open(*sessions.start(key))
    assert rig.client.audit() == []
