"""Check of the built docs site. Zensical's `--strict` checks only links between pages.

    python -m tests.support.docs_site SITE

Invariant: no page sends a request to another host when a browser opens it (links are allowed). Every link to a page, an
anchor, or a file works when the site is opened from a folder. Every page of `docs` is built.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support import ROOT

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
_IN_CSS = re.compile(r"""(?:@import\s+|url\(\s*)["']?([^"')\s;]+)""")
_SHIM = "vendor/iframe-worker/shim.js"
_SERVED_ONLY = "404.html"
"""Page that only a server shows, so its addresses begin at the top of the site."""


class _Addresses(HTMLParser):
    """Addresses that a browser loads with a page, addresses of links, and anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag in _FETCHED and _FETCHED[tag] in given:
            self.fetched.append(given[_FETCHED[tag]])
        elif tag == "link" and _RELS & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))
        elif tag == "a" and "href" in given:
            self.linked.append(given["href"])
        if "mermaid" in given.get("class", "").split():
            # The theme would load a library for the diagram. The diagrams of this site are SVG files.
            self.fetched.append("https://unpkg.com/mermaid")


def _read(page: str) -> _Addresses:
    found = _Addresses()
    found.feed(page)
    return found


def _is_elsewhere(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


def fetches(page: str) -> list[str]:
    """Return the addresses of other hosts that `page` (HTML) loads when a browser opens it."""
    return [one for one in _read(page).fetched if _is_elsewhere(one)]


def problems(site: Path, docs: Path) -> Iterator[str]:
    """Yield one sentence for each fault of the site that was built from the folder `docs`."""
    pages = {path.relative_to(site).as_posix(): _read(path.read_text()) for path in sorted(site.rglob("*.html"))}
    pages.pop(_SERVED_ONLY, None)
    for source in sorted(docs.rglob("*.md")):
        page = source.relative_to(docs).with_suffix(".html").as_posix()
        if page not in pages:
            yield f"{page} is missing."
    if not (site / "search.js").is_file():
        yield "The index of the search is not a script (search.js), so a page that is opened as a file cannot load it."
    for page, found in pages.items():
        if not any(one.endswith(_SHIM) for one in found.fetched):
            yield f"{page} does not load {_SHIM}, so its search does not work from a folder."
        for address in filter(_is_elsewhere, found.fetched):
            yield f"{page} loads {address} from another host."
        for address in dict.fromkeys([*found.fetched, *found.linked]):
            if not _is_elsewhere(address) and (fault := _fault(site, pages, page, address)):
                yield f"{page} has a link to {address}: {fault}."
    for sheet in sorted(site.rglob("*.css")):
        for address in _IN_CSS.findall(sheet.read_text()):
            if _is_elsewhere(address):
                yield f"{sheet.relative_to(site)} loads {address} from another host."


def _fault(site: Path, pages: dict[str, _Addresses], page: str, address: str) -> str:
    """Return why a browser that has opened `page` from a folder cannot follow `address`, or "" if it can."""
    parts = urlsplit(address)
    if parts.scheme in ("data", "mailto"):
        return ""
    if parts.scheme or parts.path.startswith("/"):
        return "it works only on a server"
    target = os.path.normpath(Path(page).parent / unquote(parts.path)) if parts.path else page
    if not _is_file(site / target):
        return "there is no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "there is no such anchor"
    return ""


@cache
def _is_file(path: Path) -> bool:
    return path.is_file()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "index.html").is_file():
        sys.stderr.write("Name the folder of the built site: python -m tests.support.docs_site site\n")
        return 2
    found = list(problems(Path(arguments[0]), ROOT / "docs"))
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
