"""The routes that answer without the token are the routes in the list of the docs."""

from __future__ import annotations

import re

import httpx

from batchlab.server.http.authentication import PAGE
from tests.support import ROOT
from tests.support.server.api import Rig
from tests.support.server.page import route_templates, routes, with_values

SECURITY = ROOT / "docs" / "security.md"
SIGN = {"Sec-Fetch-Site": "same-origin"}


def listed() -> set[tuple[str, str]]:
    table = SECURITY.read_text().partition("| public route |")[2].partition("\n\n")[0]
    return {(method, path) for method, path in re.findall(r"^\| `(\w+) (\S+)` \|", table, re.M)}


def all_routes(rig: Rig) -> set[tuple[str, str]]:
    """Return every route of the manager with its method, and with values for the names in the path."""
    found = {(method, with_values(path)) for method, path in route_templates(rig.app, PAGE)}
    page = {(method, f"{PAGE}{path}") for method, path in routes(rig)}
    assert len(found) >= 30
    assert len(page) >= 30
    return found | page | {("GET", f"{PAGE}/static/page.css"), ("GET", f"{PAGE}/")}


def is_refused(answer: httpx.Response) -> bool:
    return answer.status_code == 401 or answer.headers.get("location") == f"{PAGE}/login"


def test_public_routes_are_the_listed_ones() -> None:
    """Every other route requires the token or redirects to the login page."""
    with Rig() as rig:
        public = {
            (method, path.replace("page.css", "FILE"))
            for method, path in all_routes(rig)
            if not is_refused(rig.http.request(method, path, headers=SIGN))
        }
        assert rig.shutdowns == 0
    assert {one for one in public if one[0] != "HEAD"} == listed()
