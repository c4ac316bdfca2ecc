"""Chromium from Debian, driven by playwright, for the tests of pages.

Invariant: each page has its own browser context, so no test sees the changes of another test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # its import takes too long for every process of tests
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = [Path("/usr/bin") / name for name in ("chromium-headless-shell", "chromium")]
"""Debian's, the first that is there. The shell is the same browser without its window, for two
thirds of the time."""
TIMEOUT_MS = 120_000
ELSEWHERE = "grid.example"
"""A name that is this machine, and that Chromium trusts no more than any other machine's."""
_ARGUMENTS = [
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, absent on a laptop, promised in CI.

    Of a module and not of the session: playwright's loop runs in the thread of the tests for as
    long as the browser is there, and nobody else can call asyncio.run in it. A test that needs a
    server gives it a thread or a process.
    """
    found = next((path for path in CHROMIUM if path.exists()), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI promises chromium, but it is not installed")
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(found), args=_ARGUMENTS, timeout=TIMEOUT_MS)
        try:
            yield chromium
        finally:
            chromium.close()


@dataclass
class Seen:
    """What a page has done so far: errors on its console or thrown, and what it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)


def place_of(page: Page) -> str:
    """The URL below which the page of a grid is, in the session that `page` has."""
    found = re.match(r"https?://[^/]+/ui/s/[0-9a-f]+", page.url)
    assert found, page.url
    return found[0]


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[tuple[Page, Seen]]:
    """A page in a context of its own (`context` as playwright's new_context takes it: viewport,
    color_scheme ...), and what it does from its first request on."""
    place = browser.new_context(**context)
    # Of a busy machine nothing is learnt.
    place.set_default_timeout(TIMEOUT_MS)
    try:
        page, seen = place.new_page(), Seen()
        page.on("console", seen.hear)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(url)
        yield page, seen
    finally:
        place.close()


def offences(page: Page, within: str | None = None, *, without: str = "", rules: Sequence[str] = ()) -> list[str]:
    """What axe-core finds wrong with a page, or with what a selector names, `without` what another
    names, by all `rules` or these alone: a line for each rule, with the elements. Its time follows
    the number of elements."""
    from axe_playwright_python.sync_playwright import Axe

    context: str | dict[str, list[list[str]]] | None = within
    if without:
        context = {"include": [[within or "html"]], "exclude": [[without]]}
    # What is not wrong it need not describe.
    options: dict[str, object] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    is_there = page.evaluate("typeof axe !== 'undefined'")
    axe = Axe(axe_script="") if is_there else Axe()
    found = axe.run(page, context=context, options=options).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: "
        + "; ".join(str(node["target"]) + " " + node["html"][:120] for node in one["nodes"][:5])
        for one in found
    ]


def too_wide(page: Page) -> list[str]:
    """Elements that make the page scroll sideways; none where it does not."""
    found: list[str] = page.evaluate(
        """() => {
          const wide = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= wide) return [];
          return [...document.body.querySelectorAll('*')]
            .filter(one => one.getBoundingClientRect().right > wide + 1)
            .map(one => one.outerHTML.slice(0, 120));
        }"""
    )
    return found


def tab_stops(page: Page, most: int = 200) -> list[str]:
    """What the Tab key comes to, in order, until it comes round: each one's text or label."""
    stops: list[str] = []
    page.evaluate("window.firstStop = null")
    for _ in range(most):
        page.keyboard.press("Tab")
        stop: str | None = page.evaluate(
            """() => {
              const one = document.activeElement;
              if (!one || one === document.body || one === window.firstStop) return null;
              window.firstStop ??= one;
              return (one.getAttribute('aria-label') || one.textContent).trim();
            }"""
        )
        if stop is None:
            break
        stops.append(stop)
    return stops
