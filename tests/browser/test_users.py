"""The web page in a real browser for two users with different roles of one grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import Seen, browser, offences, opened, place_of
from tests.support.server.api import Rig, job
from tests.support.server.users import add, client_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["browser"]

FORBIDDEN = """
async ([path, token]) => {
    const form = new URLSearchParams({form_token: token, sure: "yes"});
    return (await fetch(path, {method: "POST", body: form, redirect: "manual"})).status;
}
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@contextmanager
def signed_in(rig: Rig, browser: Browser, token: str) -> Iterator[tuple[Page, Seen]]:
    with opened(browser, f"{rig.url}/ui/login") as (page, seen):
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/ui/s/*/")
        yield page, seen


def test_two_users_see_and_may_do_what_their_roles_permit(rig: Rig, browser: Browser) -> None:
    viewer, submitter = add(rig, "vera", "view"), add(rig, "sam", "submit")
    with client_of(rig, submitter) as client:
        own, theirs = rig.submit(job("own", "own"), client), rig.submit(job("theirs", "theirs"))

    with signed_in(rig, browser, viewer) as (page, seen):
        assert page.locator("#user").inner_text() == "vera · view"
        assert page.get_by_role("link", name="Submit", exact=True).count() == 0
        for path in ("/", f"/jobs/{own}", f"/jobs/{theirs}", "/grid"):
            page.goto(f"{place_of(page)}{path}")
            assert page.locator("#pause, #cancel, #drain, #retry, #cap").count() == 0, path
            assert offences(page) == [], path
        page.goto(f"{place_of(page)}/jobs/{own}")
        assert page.locator("#owner").inner_text() == "sam"
        token = page.locator("input[name=form_token]").first.input_value()
        assert seen.errors == []
        for path in (f"/jobs/{own}/cancel", f"/jobs/{own}/pause", "/grid/drain", "/grid/pools/default"):
            assert page.evaluate(FORBIDDEN, [f"{place_of(page)}{path}", token]) == 403, path
        page.goto(f"{place_of(page)}/grid/drain")
        assert "The user vera with the role view may not do" in page.locator("main").inner_text()

    with signed_in(rig, browser, submitter) as (page, seen):
        assert page.locator("#user").inner_text() == "sam · submit"
        assert page.get_by_role("link", name="Submit", exact=True).count() == 1
        page.goto(f"{place_of(page)}/jobs/{theirs}")
        assert page.locator("#pause, #cancel").count() == 0
        page.goto(f"{place_of(page)}/jobs/{own}")
        page.locator("#pause").click()
        page.locator("#resume").wait_for()
        page.locator("#cancel").click()
        page.get_by_role("button", name="Cancel the job").click()
        rig.until(lambda: rig.client.job(own)["ended_s"], "the end of the job")
        assert seen.errors == []
        rig.client.revoke_user("sam")
        page.goto(f"{place_of(page)}/")
        assert page.url.endswith("/ui/login")

    assert rig.client.job(theirs)["ended_s"] is None
    records = [(one["user"], one["action"], one["outcome"]) for one in rig.client.audit(user="sam")]
    assert records == [("sam", "job cancel", "done"), ("sam", "job pause", "done"), ("sam", "job submit", "done")]
    assert {one["outcome"] for one in rig.client.audit(user="vera")} == {"refused"}


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_an_administrator_searches_the_audit_log(rig: Rig, browser: Browser, scripts: bool) -> None:
    """The filters and the pages of the audit log are forms and links, so they do not need JavaScript."""
    with client_of(rig, add(rig, "olga", "operate")) as olga:
        own = rig.submit(job(f"audited-{scripts}", f"audited-{scripts}"), olga)
        for _ in range(26):
            olga.pause(own)
            olga.resume(own)
    token = add(rig, "ada", "administer")
    with opened(browser, f"{rig.url}/ui/login", java_script_enabled=scripts) as (page, seen):
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/ui/s/*/")
        page.get_by_role("link", name="Audit", exact=True).click()
        page.get_by_label("User", exact=True).fill("olga")
        page.get_by_label("Action").select_option("job resume")
        page.get_by_label("Outcome").select_option("done")
        page.get_by_role("button", name="Search").click()
        assert page.locator("tbody tr").count() == 26 * (1 if scripts else 2)
        assert page.locator("tbody tr").first.inner_text().split("\t")[1:3] == ["olga\noperate", f"job resume\n{own}"]
        page.get_by_label("Action").select_option(label="All of job")
        page.get_by_role("button", name="Search").click()
        assert page.locator("tbody tr").count() == 50
        page.get_by_role("link", name="Older").click()
        assert page.locator("tbody tr").count() >= 3
        assert page.get_by_role("link", name="Newest").count() == 1
        page.locator(f"a[href$='/jobs/{own}']").first.click()
        assert page.locator("#owner").inner_text() == "olga"
        assert seen.errors == []
        if scripts:
            page.goto(f"{place_of(page)}/audit")
            assert offences(page) == []
