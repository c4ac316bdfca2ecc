"""A hook of MkDocs: a page that would fetch something from elsewhere as it opens is a warning.

Invariant: with `--strict` no site is built whose readers are told of to anybody. Links that a
reader follows are none of it.
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
    """What a page has its browser fetch by itself."""

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
            # The theme would fetch what draws it; diagrams are SVG files here.
            self.found.append("https://unpkg.com/mermaid")


def fetches(page: str) -> list[str]:
    """The addresses of other hosts that `page` (HTML) fetches from as it opens."""
    parser = _Fetches()
    parser.feed(page)
    return [one for one in parser.found if one.startswith(("http:", "https:", "//"))]


def on_post_page(output: str, page: Any, config: Any) -> None:
    for address in fetches(output):
        log.warning("%s would fetch %s", page.file.src_uri, address)
