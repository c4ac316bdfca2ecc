"""Users with roles: permissions of every route, the audit log, owners of jobs, expiry, and revocation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from batchlab.client.http import Client
from batchlab.core.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.model import JobId
from batchlab.core.ports import ObjectInfo
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.users import OWNER, Role, User
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
    actions = [(one["user"], one["action"], one["object"]) for one in rig.client.audit(action="job", outcome="done")]
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


def test_a_new_role_takes_effect_and_the_token_stays_valid(rig: Rig) -> None:
    token = add(rig, "sam", "view")
    visitor = Visitor(rig)
    made = rig.submit(job())
    with visitor.http, client_of(rig, token) as sam:
        visitor.log_in(token)
        with pytest.raises(Refused, match="The user sam with the role view may not do"):
            sam.pause(made)
        with pytest.raises(Refused, match="may not do `user role`"):
            sam.set_role("sam", "administer")
        assert rig.client.set_role("sam", "operate")["role"] == "operate"
        sam.pause(made)
        assert visitor.get("/").status_code == 200
        with pytest.raises(Refused, match="may not do `user role`"):
            sam.set_role("sam", "administer")
    assert rig.client.users()[0]["role"] == "operate"
    (record,) = rig.client.audit(action="user role", outcome="done")
    assert (record["object"], record["reason"]) == ("sam", "role operate")
    rig.client.revoke_user("sam")
    with pytest.raises(Refused, match=r"The token of the user sam is revoked\."):
        rig.client.set_role("sam", "view")
    with pytest.raises(NotFound, match="The user 'mallory' does not exist"):
        rig.client.set_role("mallory", "view")
    with pytest.raises(UsageError, match="always has the role administer"):
        rig.client.set_role(OWNER, "view")


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
    end_s = records[1]["at_s"]
    assert rig.client.audit(until_s=end_s) == [one for one in records if one["at_s"] < end_s]
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
    (failed, submitted) = rig.client.audit()
    assert (failed["action"], failed["outcome"], failed["reason"][:4]) == ("job cancel", "failed", "503:")
    assert (submitted["action"], submitted["outcome"]) == ("job submit", "done")


def test_one_user_cannot_fill_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_REFUSALS", 3)
    monkeypatch.setattr(audit_log, "REFUSALS_S", 3600.0)
    with client_of(rig, add(rig, "vera", "view")) as vera:
        for _ in range(10):
            with pytest.raises(Refused):
                vera.drain()
    for _ in range(5):
        assert request(rig, "wrong", "POST", "/v1/grid/drain").status_code == 401
    rig.run(rig.audit.close())
    records = rig.client.audit(outcome="refused")
    assert [(one["action"], one["count"]) for one in records] == [("several", 7), *[("grid drain", 1)] * 3]


def test_failed_changes_of_one_user_do_not_fill_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_REFUSALS", 3)
    monkeypatch.setattr(audit_log, "REFUSALS_S", 3600.0)
    made = rig.submit(job())
    token = add(rig, "olga", "operate")
    answers = [request(rig, token, "POST", "/v1/jobs/none/pause") for _ in range(10)]
    assert [answer.status_code for answer in answers] == [404] * 3 + [503] * 7
    problem = answers[-1].json()
    assert problem["error"] == "Too many changes of the user olga have failed: the limit is 3 in 3600 s."
    assert problem["remedy"].startswith("Correct the requests, and try again in ")
    rig.client.pause(made)  # The limit is a limit of one user.
    rig.run(rig.audit.close())
    records = rig.client.audit(user="olga", outcome="failed")
    assert sum(one["count"] for one in records) == 10
    assert len(records) == 7
    objects = [info.key for info in rig.run(listed(rig))]
    # Two objects of the submission and the new user, and two of each change that was not refused.
    assert len(objects) <= 4 + 2 * 4 + 2


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


def outcomes(rig: Rig, **wanted: Any) -> list[tuple[str, str, str, str]]:
    """Return the action, object, outcome, and start of the reason of each record, with the newest first."""
    records = rig.client.audit(**wanted)
    return [(one["action"], one["object"], one["outcome"], one["reason"][:4]) for one in records]


def test_a_change_that_fails_is_not_recorded_as_allowed(rig: Rig) -> None:
    made = rig.submit(job())
    rig.client.cancel(made)
    rig.until(lambda: rig.client.job(made)["ended_s"], "the end of the job")
    before = len(rig.client.audit())
    visitor = Visitor(rig)
    new_input = {"stage": "map", "task": 0, "data": "W10="}
    retries: list[dict[str, Any]] = [{"inputs": [new_input, new_input]}, {"inputs": [new_input]}, {"tasks": {"x": 1}}]
    with visitor.http:
        visitor.log_in()
        assert request(rig, TOKEN, "POST", f"/v1/jobs/{made}/pause").status_code == 409
        assert request(rig, TOKEN, "POST", "/v1/jobs/none/pause").status_code == 404
        assert request(rig, TOKEN, "POST", "/v1/use/cap", json={"max_cost_usd": 1}).status_code == 409
        assert request(rig, TOKEN, "POST", "/v1/shares/policy", json={"reservation": -1}).status_code == 422
        assert request(rig, TOKEN, "POST", "/v1/jobs", json={}).status_code == 422
        for retry in retries:
            assert request(rig, TOKEN, "POST", f"/v1/jobs/{made}/retry", json=retry).status_code in (409, 422)
        assert visitor.post(f"/jobs/{made}/pause").status_code == 409
    records = outcomes(rig)[: len(rig.client.audit()) - before]
    assert sorted(records) == [
        ("grid cap", "", "failed", "409:"),
        ("job pause", "none", "failed", "404:"),
        *[("job pause", made, "failed", "409:")] * 2,
        ("job retry", made, "failed", "409:"),
        *[("job retry", made, "failed", "422:")] * 2,
        ("job submit", "", "failed", "422:"),
        ("share policy", "", "failed", "422:"),
    ]
    assert len(rig.client.audit(outcome="failed")) == 9
    assert outcomes(rig, outcome="done") == [("job cancel", made, "done", ""), ("job submit", made, "done", "")]
    assert outcomes(rig, outcome="allowed") == []


def test_the_result_of_a_change_is_unknown_after_an_error_of_the_grid(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rig.submit(job())

    async def failing(*_: Any) -> None:
        raise BackendError("no database")

    monkeypatch.setattr(rig.manager.job_commands, "pause", failing)
    assert request(rig, TOKEN, "POST", f"/v1/jobs/{made}/pause").status_code == 503
    assert outcomes(rig, action="job pause") == [("job pause", made, "unknown", "503:")]


async def stored_entry(rig: Rig, record: audit_log.AuditRecord) -> audit_log.Entry:
    entry = audit_log.Entry(record)
    await rig.audit.store([entry])
    return entry


def test_failed_changes_are_read_page_by_page(rig: Rig) -> None:
    """Each page ends within or after a moment of the log, some of whose records are corrected later."""

    async def scene() -> None:
        audit = rig.audit
        for number in range(3):
            await asyncio.sleep(0.005)  # Each moment has its own key.
            records = [audit.record("sam", "submit", f"job {number}{letter}") for letter in "abc"]
            stored = await asyncio.gather(*(stored_entry(rig, record) for record in records))
            for entry in stored[number:]:
                audit.correct(entry, audit_log.FAILED, "409: conflict")
            await audit.flush()

    rig.run(scene())
    everything = [(one["action"], one["outcome"]) for one in rig.client.audit(user="sam")]
    assert sorted(everything) == [
        *[(f"job 0{letter}", "failed") for letter in "abc"],
        *[("job 1a", "allowed"), ("job 1b", "failed"), ("job 1c", "failed")],
        *[("job 2a", "allowed"), ("job 2b", "allowed"), ("job 2c", "failed")],
    ]
    assert [action[:5] for action, _ in everything] == [*["job 2"] * 3, *["job 1"] * 3, *["job 0"] * 3]
    for limit in range(1, 10):
        found, sizes = paged(rig, limit)
        assert found == everything
        assert max(sizes) == min(limit, 9)
    assert paged(rig, 2, "failed")[0] == [one for one in everything if one[1] == "failed"]


def paged(rig: Rig, limit: int, outcome: str = "") -> tuple[list[tuple[str, str]], list[int]]:
    """Return all records of sam, and the number of records of each page."""
    found, sizes = [], []
    before: str | None = ""
    while before is not None:
        query = {"limit": limit, "before": before, "outcome": outcome, "user": "sam"}
        page = request(rig, TOKEN, "GET", "/v1/audit", params=query).json()
        found += [(one["action"], one["outcome"]) for one in page["records"]]
        sizes.append(len(page["records"]))
        before = page["next"]
    return found, sizes


def test_records_of_earlier_releases_are_read(rig: Rig) -> None:
    """An earlier release wrote the outcomes allowed and refused, and its cursor named only an object."""
    now_s = rig.manager.ports.clock.now_s()
    old = {"at_s": now_s, "user": "sam", "role": "submit", "action": "job cancel", "object": "j", "later": 1}
    data = json_format.to_bytes({"v": json_format.VERSION, "records": [old, {**old, "outcome": "refused"}]})
    key = object_keys.audit(now_s, "0123456789abcdef")
    rig.run(rig.objects.put(key, data))
    assert [one[2] for one in outcomes(rig)] == ["refused", "allowed"]
    name = key.removeprefix(object_keys.AUDIT)
    assert request(rig, TOKEN, "GET", f"/v1/audit?before={name}").json() == {"records": [], "next": None}


def test_a_damaged_record_does_not_hide_its_correction(rig: Rig) -> None:
    async def scene() -> str:
        entry = await stored_entry(rig, rig.audit.record("sam", "submit", "job pause", "j"))
        rig.audit.correct(entry, audit_log.FAILED, "409: conflict")
        await rig.audit.flush()
        return object_keys.AUDIT + entry.name

    for damage in (b"{", None):
        key = rig.run(scene())
        if damage:
            rig.run(rig.objects.put(key, damage))
        else:
            rig.run(rig.objects.delete([key]))
    assert outcomes(rig, user="sam") == [("job pause", "j", "failed", "409:")] * 2


def test_objects_that_the_manager_did_not_write_do_not_hide_records(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with access to the whole bucket writes objects below the prefix of the log."""
    monkeypatch.setattr(audit_log, "MAX_RECORDS", 3)
    monkeypatch.setattr(audit_log, "MAX_BYTES", 20_000)
    made = rig.submit(job())
    rig.client.pause(made)
    rig.client.audit()
    names = [info.key.removeprefix(object_keys.AUDIT) for info in rig.run(listed(rig))]
    (base,) = {name for name in names if object_keys.corrected_audit(name) == "" and f"{name[:-5]}-" in "".join(names)}
    now_s = rig.manager.ports.clock.now_s()
    valid = {"at_s": now_s, "user": "x", "role": "view", "action": "job pause"}

    def document(*records: Any) -> bytes:
        return json.dumps({"v": json_format.VERSION, "records": records}).encode()

    odd = [{**valid, "at_s": -1}, {**valid, "user": 1}, {**valid, "count": "many"}, {"user": "x"}, 7, None]
    texts = {"user": "u" * 9000, "reason": "r" * 900, "outcome": "lost", "count": -5}
    for name, data in {
        "0": document(valid),
        "x/y.json": document(valid),
        "-1.json": document(valid),
        f"{base[:-5]}-zz.json": document(valid),
        object_keys.audit(now_s + 1, "a")[len(object_keys.AUDIT) :]: document(*odd, {**valid, **texts}),
        object_keys.audit(now_s + 2, "b")[len(object_keys.AUDIT) :]: document(*[valid] * 300),
        object_keys.audit(now_s + 3, "c")[len(object_keys.AUDIT) :]: b"[" * 2000,
        object_keys.audit(now_s + 4, "d")[len(object_keys.AUDIT) :]: b'{"records": 5}',
        **{f"{base[:-5]}-{'f' * 20}{number}.json": document(valid) for number in range(9)},
    }.items():
        rig.run(rig.objects.put(object_keys.AUDIT + name, data))
    found = rig.client.audit(since_s=1.0)
    (long,) = (one for one in found if one["user"].startswith("u"))
    assert (long["outcome"], long["count"]) == ("lost", 1)
    assert (len(long["user"]), len(long["reason"])) == (audit_log.MAX_TEXT, audit_log.MAX_REASON)
    assert [(one["action"], one["outcome"]) for one in found if one["user"] == "owner"] == [
        ("job pause", "done"),
        ("job submit", "done"),
    ]
    assert len([one for one in found if one["user"] == "x"]) <= audit_log.MAX_RECORDS


async def listed(rig: Rig) -> list[ObjectInfo]:
    return [info async for page in rig.objects.list(object_keys.AUDIT) for info in page]


def test_a_correction_changes_only_the_outcome_and_the_reason(rig: Rig) -> None:
    async def scene() -> None:
        entry = await stored_entry(rig, rig.audit.record("sam", "submit", "job pause", "j", reason="first"))
        forged = replace(entry.record, user="ada", action="job delete", at_s=1.0, outcome="done", reason="second")
        rig.audit._note(audit_log.Entry(forged, entry.name))
        await rig.audit.flush()

    rig.run(scene())
    (record,) = rig.client.audit()
    assert (record["user"], record["action"], record["at_s"] > 1.0) == ("sam", "job pause", True)
    assert (record["outcome"], record["reason"]) == ("done", "second")


def test_many_records_of_one_moment_are_several_objects(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_RECORDS", 2)

    async def scene() -> int:
        await rig.audit.store([audit_log.Entry(rig.audit.record("sam", "submit", f"job {n}")) for n in range(5)])
        return len(await listed(rig))

    assert rig.run(scene()) == 3
    assert sorted(one["action"] for one in rig.client.audit()) == [f"job {n}" for n in range(5)]


def test_the_client_reads_more_records_than_a_page_has(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.client.http.MAX_LISTED", 2)

    async def scene() -> None:
        for number in range(5):
            rig.audit.note(rig.audit.record("sam", "submit", f"job {number}"))

    rig.run(scene())
    assert [one["action"] for one in rig.client.audit(user="sam")] == [f"job {number}" for number in (4, 3, 2, 1, 0)]
    assert [one["action"] for one in rig.client.audit(user="sam", limit=3)] == ["job 4", "job 3", "job 2"]
    assert request(rig, TOKEN, "GET", "/v1/audit?limit=1000000").status_code == 422


def test_changes_have_an_object_values_and_an_outcome(rig: Rig) -> None:
    rig.client.set_share({"identifier": "research", "weight": 0.5})
    rig.client.set_share_policy({"reservation": 10})
    with pytest.raises(UsageError):
        rig.client.remove_share("other")
    rig.client.remove_share("research")
    rig.client.remove_share(None)
    rig.client.scale("default", min=0, max=3, auto=True)
    with pytest.raises(NotFound):
        rig.client.scale("none", max=3)
    rig.client.drain()
    rig.client.drain("default")
    with pytest.raises(NotFound):
        rig.client.drain("none")
    assert [(one["action"], one["object"], one["outcome"], one["reason"][:20]) for one in rig.client.audit()[::-1]] == [
        ("share set", "research", "done", "weight 0.5"),
        ("share policy", "the policy", "done", "reservation 10"),
        ("share remove", "other", "failed", "422: The policy has "),
        ("share remove", "research", "done", ""),
        ("share remove", "the policy", "done", ""),
        ("grid scale", "default", "done", "min 0, max 3, auto t"),
        ("grid scale", "none", "failed", "404: The pool 'none'"),
        ("grid drain", "all pools", "done", ""),
        ("grid drain", "default", "done", ""),
        ("grid drain", "none", "failed", "404: The pool 'none'"),
    ]


def test_actions_of_the_page_have_an_object_and_an_outcome(rig: Rig) -> None:
    made = rig.submit(job())
    visitor = Visitor(rig)
    with visitor.http:
        visitor.log_in()
        assert visitor.post(f"/jobs/{made}/pause").status_code == 303
        assert visitor.post("/grid/pools/default", min="0", max="3", by="auto").status_code == 303
        assert visitor.post("/grid/drain", pool="default").status_code == 303
        assert visitor.post("/grid/drain", pool="default", sure="yes").status_code == 303
        assert visitor.post("/grid/drain", pool="none", sure="yes").status_code == 404
    assert outcomes(rig)[::-1] == [
        ("job submit", made, "done", ""),
        ("job pause", made, "done", ""),
        ("grid scale", "default", "done", "min "),
        ("grid drain", "default", "done", ""),
        ("grid drain", "none", "failed", "404:"),
    ]


def test_a_change_of_a_manager_that_ends_stays_allowed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a change is stored before the change, and its outcome is not known while the change runs."""
    made = rig.submit(job())
    seen: list[tuple[str, str]] = []

    async def looking(*_args: Any) -> None:
        records, _ = await audit_log.AuditLog(rig.manager.ports).page(audit_log.AuditFilter(action="job pause"), 10)
        seen.extend((record.object, record.outcome) for record in records)

    monkeypatch.setattr(rig.manager.job_commands, "pause", looking)
    rig.client.pause(made)
    assert seen == [(made, "allowed")]
    assert outcomes(rig, action="job pause") == [("job pause", made, "done", "")]


def test_the_result_of_a_change_is_unknown_after_a_bug(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig.submit(job())

    async def failing(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rig.manager.job_commands, "pause", failing)
    with pytest.raises(BatchlabError):
        rig.client.pause(made)
    assert outcomes(rig, action="job pause") == [("job pause", made, "unknown", "500:")]


def test_flush_waits_for_a_single_call_that_is_counted_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> int:
        begun, held = asyncio.Event(), asyncio.Event()
        put = rig.objects.put

        async def slow(key: str, *args: Any, **options: Any) -> str:
            if key.startswith(object_keys.AUDIT):
                begun.set()
                await held.wait()
            return await put(key, *args, **options)

        monkeypatch.setattr(rig.objects, "put", slow)
        rig.audit.note(rig.audit.record("sam", "submit", "job pause"))
        first = asyncio.create_task(rig.audit.flush())
        await begun.wait()  # The write of the first record is running.
        rig.audit.note_call(rig.audit.record("sam", "submit", "job submit"))
        second = asyncio.create_task(rig.audit.flush())
        await asyncio.sleep(0)
        rig.audit.note_call(rig.audit.record("sam", "submit", "job submit"))
        held.set()
        await asyncio.gather(first, second)
        records, _ = await rig.audit.page(audit_log.AuditFilter(action="job submit"), 10, before="0")
        return sum(record.count for record in records)

    assert rig.run(scene()) == 2


def test_the_count_of_refusals_does_not_wait_for_the_next_refusal(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_REFUSALS", 1)
    monkeypatch.setattr(audit_log, "REFUSALS_S", 0.5)
    kinds = (audit_log.REFUSED, audit_log.FAILED)

    async def scene() -> None:
        for outcome in kinds:
            for _ in range(100):
                rig.audit.note_refusal(rig.audit.record("vera", "view", "grid drain", outcome=outcome))

    def counts(action: str = "") -> dict[str, int]:
        records = rig.client.audit(action=action)
        return {kind: sum(one["count"] for one in records if one["outcome"] == kind) for kind in kinds}

    rig.run(scene())
    rig.until(lambda: counts() == dict.fromkeys(kinds, 100), "the counts")
    assert min(counts(action="several").values()) >= 90


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
