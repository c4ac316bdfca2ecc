"""MkDocs hook that warns of pages which load data from another host.

Invariant: with `--strict`, no page of the site sends a request to another host when a browser opens the page. Links are
allowed.
"""

from __future__ import annotations

import logging
from html.parser import HTMLParser
from typing import Any

log = logging.getLogger("mkdocs.hooks.offline")

_FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "use": "href",
}
_RELS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}


class _Fetches(HTMLParser):
    """Addresses that a browser loads when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in _FETCHED:
            self.found.append(given.get(_FETCHED[tag], ""))
        if tag == "link" and _RELS & set(given.get("rel", "").split()):
            self.found.append(given.get("href", ""))
        if "mermaid" in given.get("class", "").split():
            # The theme would load a library for the diagram. The diagrams of this site are SVG files.
            self.found.append("https://unpkg.com/mermaid")


def fetches(page: str) -> list[str]:
    """Return the addresses of other hosts that `page` (HTML) loads when a browser opens it."""
    parser = _Fetches()
    parser.feed(page)
    return [one for one in parser.found if one.startswith(("http:", "https:", "//"))]


def on_post_page(output: str, page: Any, config: Any) -> None:
    for address in fetches(output):
        log.warning("%s would fetch %s", page.file.src_uri, address)
