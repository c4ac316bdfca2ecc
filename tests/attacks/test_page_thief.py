"""A program on another port of the same host cannot use the page's session.

The test uses a real grid. The thief listens on 127.0.0.1, as a program of another user may.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from batchlab.runtime import manager_process
from tests.support.browser import browser, opened, place_of
from tests.support.grid.local_grid import LocalGrid
from tests.support.http_proxy import Answer, Request, standing
from tests.support.server.api import Rig
from tests.support.server.page import routes

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

__all__ = ["browser"]

FORGED = {"Sec-Fetch-Site": "same-origin"}


@dataclass
class Thief:
    """A program that answers each request with a page that sends many guessed requests."""

    url: str = ""
    seen: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.seen.append(request)
        paths = ("/ui", "/ui/", "/ui/login", "/ui/s/", f"/ui/s/{'0' * 32}/", "/v1/jobs")
        tags = [f'<img src="{base}{path}">' for base in ("", self.url) for path in paths]
        body = f"<!doctype html><title>thief</title>{''.join(tags)}".encode()
        kind = "text/html" if request.header("Sec-Fetch-Dest") == "document" else "image/png"
        return Answer(200, [("Content-Type", kind)], body)

    def cookies(self) -> list[str]:
        return [
            name
            for request in self.seen
            for name in SimpleCookie(request.header("Cookie"))
            if name.startswith("batchlab-")
        ]


def log_in(grid: LocalGrid) -> tuple[str, str]:
    """Return the cookie of a new session as a browser sends it, and the session's path."""
    code = grid.client.open_session()["code"]
    with httpx.Client(base_url=grid.client.url, trust_env=False) as http:
        answer = http.post("/ui/login", data={"word": code}, headers=FORGED)
    assert answer.status_code == 303
    return answer.headers["set-cookie"].partition(";")[0], answer.headers["location"]


def test_browser_does_not_send_the_cookie_to_another_port(grid: LocalGrid, browser: Browser) -> None:
    """The thief's page requests every path that it can guess."""
    thief = Thief(grid.client.url)
    address = grid.client.url + grid.client.open_session()["path"]
    with standing(thief) as url, opened(browser, address) as (page, _):
        page.wait_for_url("**/ui/s/*/")
        place = place_of(page).removeprefix(grid.client.url)
        for path in ("/", "/ui", "/ui/", "/ui/login", f"/ui/s/{'0' * 32}/"):
            page.goto(url + path)
        assert len(thief.seen) >= 30
        assert thief.cookies() == []
        # A browser sends the cookie to another port only in a request with the session's path.
        page.goto(f"{url}{place}/")
        assert thief.cookies()
        page.goto(f"{grid.client.url}/ui/")
        page.wait_for_url(f"**{place}/")  # a visit without the session's path finds the session again


def test_a_stolen_cookie_reads_and_changes_nothing(grid: LocalGrid) -> None:
    """The attacker has only the cookie, and sends every header that a browser would send."""
    cookie, place = log_in(grid)
    with Rig() as rig:
        asked = routes(rig)
    assert len(asked) >= 30
    headers = {**FORGED, "Cookie": cookie, "Origin": grid.client.url}
    with httpx.Client(base_url=grid.client.url, trust_env=False) as http:
        assert http.get(place, headers=headers).status_code == 200, "the whole session is good"
        for base in ("/ui", f"/ui/s/{'0' * 32}", log_in(grid)[1].removesuffix("/")):
            for method, path in asked:
                if path == "/login":
                    continue
                answer = http.request(method, f"{base}{path}", headers=headers)
                answered = (answer.status_code, answer.headers.get("location"))
                assert answered in ((303, "/ui/login"), (401, None)), (method, path)
        for path in ("/v1/jobs", "/v1/grid", "/metrics"):
            assert http.get(path, headers=headers).status_code == 401
        assert http.post("/v1/shutdown", headers=headers).status_code == 401
    assert grid.client.health()["leader"]


def test_a_stolen_place_reads_and_changes_nothing(grid: LocalGrid) -> None:
    """An address from a clipboard or a history does not work without the cookie."""
    _, place = log_in(grid)
    other, _ = log_in(grid)
    with httpx.Client(base_url=grid.client.url, trust_env=False) as http:
        for cookies in ({}, {"Cookie": other}):
            answer = http.get(place, headers={**FORGED, **cookies})
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
            assert http.post(f"{place}grid/drain", headers={**FORGED, **cookies}).status_code == 401


def test_a_session_ends_with_its_manager(tmp_path: Path) -> None:
    """A program that takes the port of a killed manager receives the requests of an open page. The next manager at the
    same port does not accept this session."""
    grid = LocalGrid(tmp_path / "home")
    try:
        port = int(grid.client.url.rpartition(":")[2])
        cookie, place = log_in(grid)
        manager_process.kill_manager(grid.home)
        record = manager_process.start_manager(grid.home, grid.backend, parent=True, port=port)
        assert record.url.endswith(f":{port}")
        headers = {**FORGED, "Cookie": cookie}
        answer = httpx.get(f"{record.url}{place}", headers=headers, trust_env=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
    finally:
        grid.stop()
