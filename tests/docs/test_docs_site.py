"""The check of the built docs site. `.ci/run` builds the site and runs the check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.docs_site import fetches, main, problems

SHIM = '<script src="vendor/iframe-worker/shim.js"></script>'


@pytest.mark.parametrize(
    ("page", "fetched"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/css">', 1),
        ('<link rel="preconnect" href="https://fonts.example">', 1),
        ('<img src="http://badge.example/x.svg">', 1),
        ('<pre class="mermaid">a</pre>', 1),
        ('<a href="https://example.com">a link</a><link rel="canonical" href="https://a">', 0),
        ('<script src="assets/x.js"></script><img src="images/x.svg">', 0),
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_found(page: str, fetched: int) -> None:
    assert len(fetches(page)) == fetched


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a site of two pages without a fault, below the folder of its sources."""
    site = tmp_path / "site"
    (site / "vendor" / "iframe-worker").mkdir(parents=True)
    (site / "vendor" / "iframe-worker" / "shim.js").write_text("")
    (site / "search.js").write_text("")
    (site / "style.css").write_text("a { background: url(data:image/svg+xml,x) }")
    (site / "404.html").write_text('<a href="/index.html">Home</a>')
    (site / "a.html").write_text(f'{SHIM}<h1 id="top"><a href="index.html">Home</a></h1>')
    (site / "index.html").write_text(f'{SHIM}<a href="a.html#top">A</a><a href="https://example.com">elsewhere</a>')
    for name in ("index.md", "a.md"):
        (tmp_path / name).write_text("")
    return site


def test_a_site_without_a_fault_passes(site: Path) -> None:
    assert list(problems(site, site.parent)) == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("a.html", f'{SHIM}<h1 id="other"></h1>', "index.html has a link to a.html#top: there is no such anchor."),
        (
            "a.html",
            f'{SHIM}<h1 id="top"></h1><a href="b.md">b</a>',
            "a.html has a link to b.md: there is no such file.",
        ),
        ("a.html", f'{SHIM}<h1 id="top"></h1><img src="x.png">', "a.html has a link to x.png: there is no such file."),
        (
            "a.html",
            f'{SHIM}<h1 id="top"></h1><a href="vendor/">v</a>',
            "a.html has a link to vendor/: there is no such file.",
        ),
        ("a.html", f'{SHIM}<h1 id="top"></h1><a href="/">b</a>', "a.html has a link to /: it works only on a server."),
        ("a.html", f'{SHIM}<h1 id="top"></h1><img src="//b/x">', "a.html loads //b/x from another host."),
        (
            "a.html",
            '<h1 id="top"></h1>',
            "a.html does not load vendor/iframe-worker/shim.js, so its search does not work from a folder.",
        ),
        (
            "style.css",
            '@import "https://fonts.example/a"',
            "style.css loads https://fonts.example/a from another host.",
        ),
        ("../b.md", "", "b.html is missing."),
    ],
)
def test_each_fault_is_found(site: Path, file: str, text: str, problem: str) -> None:
    (site / file).write_text(text)
    assert list(problems(site, site.parent)) == [problem]


def test_a_search_index_that_is_not_a_script_is_found(site: Path) -> None:
    (site / "search.js").unlink()
    (problem,) = problems(site, site.parent)
    assert problem.startswith("The index of the search")


def test_the_command_fails_at_a_fault(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The docs of the project are not in the small site."""
    assert main([str(site)]) == 1
    assert "start.html is missing.\n" in capsys.readouterr().out
    assert main([str(site.parent)]) == 2
    assert main([]) == 2


def test_no_figure_fetches_anything() -> None:
    for path in (ROOT / "docs" / "images").glob("*.svg"):
        assert not re.search(r"(href|src|url\()\s*=?\s*[\"']?(https?:|//)", path.read_text()), path
        assert path.stat().st_size < 200_000
