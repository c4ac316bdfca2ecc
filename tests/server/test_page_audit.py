"""The page of the audit log: records, filters, pages, and what each role sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

import pytest

from batchlab.core.errors import Refused
from batchlab.manager.audit_log import REFUSED
from tests.support.server.api import Rig, job
from tests.support.server.page import NASTY, Visitor, visitor
from tests.support.server.users import add, client_of

__all__ = ["visitor"]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def rows(html: str) -> list[str]:
    """Return the text of each row of the table."""
    body = re.search(r"<tbody>(.*)</tbody>", html, re.DOTALL)
    lines = body[1].split("</tr>")[:-1] if body else []
    return [" ".join(unescape(re.sub(r"<[^>]+>", " ", line)).split()) for line in lines]


def link(html: str, text: str) -> str | None:
    found = re.search(rf'href="[^"?]*(/audit[^"]*)">{text}<', html)
    return unescape(found[1]) if found else None


def test_page_shows_outcomes_objects_and_reasons(rig: Rig, visitor: Visitor) -> None:
    made = rig.submit(job())
    rig.client.scale("default", max=3)
    rig.client.cancel(made)
    rig.until(lambda: rig.client.job(made)["ended_s"], "the end of the job")
    with pytest.raises(Refused):
        rig.client.pause(made)
    with client_of(rig, add(rig, "vera", "view")) as vera, pytest.raises(Refused):
        vera.drain()
    answer = visitor.get("/audit")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert [re.sub(r"^\S+ \S+ UTC ", "", row)[:53] for row in rows(answer.text)] == [
        "vera view grid drain refused –",
        "owner administer user add vera done role view role vi"[:53],
        f"owner administer job pause {made} failed 409: Job"[:53],
        f"owner administer job cancel {made} done –",
        "owner administer grid scale default done max 3 max 3",
        f"owner administer job submit {made} done –",
    ]
    assert f'href="{visitor.root}/jobs/{made}"' in answer.text
    assert f'<a href="{visitor.root}/audit" class="current" aria-current="page">Audit</a>' in answer.text
    assert "<script>" not in answer.text


def test_filters_select_records(rig: Rig, visitor: Visitor) -> None:
    made = rig.submit(job())
    rig.client.pause(made)
    with client_of(rig, add(rig, "vera", "view")) as vera, pytest.raises(Refused):
        vera.drain()

    def found(query: str) -> list[str]:
        return [row.split(" UTC ")[1] for row in rows(visitor.get(f"/audit?{query}").text)]

    assert len(found("")) == len(found("within=3600")) == 4
    assert found("user=vera") == ["vera view grid drain refused –"]
    assert found("outcome=refused") == found("user=vera")
    assert found("action=job&outcome=done&within=86400") == [
        f"owner administer job pause {made} done –",
        f"owner administer job submit {made} done –",
    ]
    assert found("action=job+pause") == [f"owner administer job pause {made} done –"]
    assert "No request matches." in visitor.get("/audit?user=nobody").text
    form = visitor.get("/audit?action=job+pause&outcome=done").text
    assert '<option value="job pause" selected>' in form
    assert "<option selected>done</option>" in form
    for query, status in (("outcome=lost", 409), ("within=1", 422), ("before=../x", 422), (f"user={'x' * 201}", 422)):
        assert visitor.get(f"/audit?{query}").status_code == status, query


def test_records_are_paged_with_links(rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.web.views.RECORDS_PER_PAGE", 2)
    made = rig.submit(job())
    for verb in (rig.client.pause, rig.client.resume, rig.client.pause, rig.client.cancel):
        verb(made)
    path: str | None = "/audit?action=job"
    seen = []
    pages = 0
    while path:
        page = visitor.get(path).text
        seen += [" ".join(row.split()[5:7]) for row in rows(page)]
        assert (link(page, "Newest") is None) is (pages == 0)
        path, pages = link(page, "Older"), pages + 1
    assert seen == ["job cancel", "job pause", "job resume", "job pause", "job submit"]
    assert pages in (3, 4)


def test_a_user_sees_only_own_records_on_the_page(rig: Rig) -> None:
    rig.submit(job("theirs", "theirs"))
    with client_of(rig, add(rig, "sam", "submit")) as sam:
        own = rig.submit(job("own", "own"), sam)
    visitor = Visitor(rig)
    with visitor.http:
        visitor.log_in(add(rig, "sam", "submit"))
        page = visitor.get("/audit")
        assert [row.split(" UTC ")[1] for row in rows(page.text)] == [f"sam submit job submit {own} done –"]
        assert 'name="user"' not in page.text
        assert visitor.get("/audit?user=owner").status_code == 403
        assert visitor.get("/audit?user=sam").status_code == 200
    stranger = Visitor(rig)
    with stranger.http:
        assert stranger.get("/audit").status_code in (303, 401)


def test_hostile_texts_of_records_are_escaped(rig: Rig, visitor: Visitor) -> None:
    """The names in a request may be chosen by an attacker, and the objects of the log may be forged."""

    async def scene() -> None:
        for outcome in (REFUSED, NASTY):
            record = rig.audit.record(NASTY, NASTY, f"job {NASTY}", f"{NASTY}\u202e\x1b[31m", outcome=outcome)
            rig.audit.note(record)
        await rig.audit.flush()

    rig.run(scene())
    for query in ("", f"?user={NASTY}", f"?action={NASTY}"):
        text = visitor.get(f"/audit{query}").text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert len(rows(visitor.get("/audit").text)) == 2


def test_manager_without_an_audit_log_says_so(rig: Rig, visitor: Visitor) -> None:
    rig.manager.audit = None
    page = visitor.get("/audit")
    assert page.status_code == 200
    assert "This manager does not write an audit log." in page.text
