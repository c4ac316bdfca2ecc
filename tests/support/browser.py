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

if TYPE_CHECKING:  # Importing playwright takes too long for every test process.
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = [Path("/usr/bin") / name for name in ("chromium-headless-shell", "chromium")]
"""Paths of Debian's Chromium. The tests use the first existing path. The headless shell is the same browser without a
window, and needs two thirds of the time."""
TIMEOUT_MS = 120_000
ELSEWHERE = "grid.example"
"""A host name that resolves to 127.0.0.1, but that Chromium does not trust as a local address."""
_ARGUMENTS = [
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium. If Chromium is not installed, skip the test on a laptop, or fail in CI.

    The fixture's scope is the module, not the session. While the browser runs, playwright's event loop occupies the
    thread of the tests, and other tests cannot call asyncio.run. A test that needs a server runs the server in a thread
    or a process.
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
    """The errors and the requests of a page since it was opened."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        # Chromium cancels all requests when a network of the machine changes, for example when another test starts a
        # container.
        if message.type in ("error", "warning") and "net::ERR_NETWORK_CHANGED" not in message.text:
            self.errors.append(message.text)


def place_of(page: Page) -> str:
    """Return the URL prefix of the grid's page in the current session of `page`."""
    found = re.match(r"https?://[^/]+/ui/s/[0-9a-f]+", page.url)
    assert found, page.url
    return found[0]


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[tuple[Page, Seen]]:
    """Open a page in its own browser context, and record its errors and requests. `context` has arguments of
    playwright's new_context, such as viewport and color_scheme."""
    place = browser.new_context(**context)
    # The long timeout allows for a busy machine.
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
    """Return the violations that axe-core finds in a page, one line per rule with the elements. `within` and `without`
    are selectors of elements to include and to exclude, and `rules` limits the check to these rules. The run time grows
    with the number of elements."""
    from axe_playwright_python.sync_playwright import Axe

    context: str | dict[str, list[list[str]]] | None = within
    if without:
        context = {"include": [[within or "html"]], "exclude": [[without]]}
    # Details of passed checks are not needed.
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
    """Return the elements that make the page scroll sideways."""
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
    """Return the text or the label of each element that the Tab key reaches, in order, until the first one is reached
    again."""
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
