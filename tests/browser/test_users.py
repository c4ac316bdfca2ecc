"""The web page in a real browser for two users with different roles of one grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from batchlab.core.fair_share import MAX_DECAY_S
from batchlab.core.users import Role
from batchlab.server.http.permissions import RULES, Rule
from batchlab.server.web import views
from tests.support.browser import Seen, browser, offences, opened, place_of, too_wide
from tests.support.page_looks import WIDTHS, amiss, fit
from tests.support.server.api import TOKEN, Rig, job
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


@pytest.fixture
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
    assert records == [
        ("sam", "job cancel", "allowed"),
        ("sam", "job pause", "allowed"),
        ("sam", "job submit", "allowed"),
    ]
    assert {one["outcome"] for one in rig.client.audit(user="vera")} == {"refused"}


COLUMNS = (
    "Share",
    "Pool",
    "Weight factor",
    "Limit",
    "Use",
    "Slots",
    "Running slots",
    "Waiting bundles",
    "Waiting tasks",
)
LONG = "W" * 255
"""A share identifier of the maximum length, in the widest letter."""


def table_of_shares(page: Page) -> dict[str, dict[str, str]]:
    """Return the visible cells in the table of shares, by share and column."""
    rows: list[list[str]] = page.get_by_role("table", name="Shares").evaluate(
        """(table) => [...table.rows].map(
             (row) => [...row.cells].filter((cell) => cell.checkVisibility()).map((cell) => cell.innerText.trim()))"""
    )
    return {row[0].split("\n")[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_table_of_shares_is_right_and_fits_on_a_phone(
    rig: Rig, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = add(rig, "vera", "view")
    rig.client.set_share({"identifier": "research", "weight": 0.5, "max_slots": 3})
    rig.client.set_share({"identifier": LONG, "weight": 2.0})
    rig.client.set_share_policy({"decay_s": MAX_DECAY_S})
    research = rig.submit(replace(job("research", "research", tasks=9), share="research"))
    long = rig.submit(replace(job("long", "long", tasks=2), share=LONG))
    # The use is 1,234.4 slot seconds, because use decays during the run. It is above 1,233.5 for some minutes.
    rig.work_on(research, 3, [0], took_s=1235.66)
    first, second, third = rig.outstanding(research, 3)
    instance = rig.instance()
    rig.beat(instance, first)
    shown = ("research", "default", "0.5", "3", "1,234", "3", "1", "2", "5")

    with signed_in(rig, browser, viewer) as (page, seen):
        page.goto(f"{place_of(page)}/grid")
        for width in (*WIDTHS.values(), 992):
            fit(page, width)
            assert too_wide(page) == [], width
            assert amiss(page) == [], width
            assert offences(page) == [], width
            rows = table_of_shares(page)
            assert {name[:6] for name in rows} == {"resear", "WWWWWW"}, width
            row = rows["research"]
            names = COLUMNS if width == WIDTHS["desk"] else tuple(row)
            assert {"Share", "Use", "Running slots", "Waiting tasks"} <= set(names), width
            expected = dict(zip(COLUMNS, shown, strict=True))
            assert {name: row[name].split("\n")[0] for name in names} == {name: expected[name] for name in names}, width
        assert page.get_by_text("Use is in slot seconds").count() == 1
        # The table changes without a reload.
        page.evaluate("window.same = true")
        rig.work_on(long, 2, [0])
        rig.beat(instance, second, third)
        page.get_by_role("row", name="research").get_by_role("cell").nth(6).filter(has_text="2").wait_for()
        assert page.evaluate("window.same")

        for name, share in ((research, "research"), (long, LONG)):
            page.goto(f"{place_of(page)}/jobs/{name}")
            for width in WIDTHS.values():
                fit(page, width)
                assert page.locator("#share").inner_text() == share
                assert too_wide(page) == [], width
                assert amiss(page) == [], width
        page.goto(f"{place_of(page)}/")
        fit(page, WIDTHS["phone"])
        assert page.get_by_text("share research").count() == 1
        assert too_wide(page) == []
        assert amiss(page) == []
        assert seen.errors == []

        monkeypatch.setattr(views, "RULES", {**RULES, ("GET", "/v1/shares"): Rule(Role.ADMINISTER)})
        page.goto(f"{place_of(page)}/grid")
        assert page.get_by_role("heading", name="Queues").count() == 1
        assert page.get_by_role("heading", name="Shares").count() == 0
    with signed_in(rig, browser, TOKEN) as (page, _):
        page.goto(f"{place_of(page)}/grid")
        assert "research" in table_of_shares(page)
