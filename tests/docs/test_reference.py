"""The reference is what the code says, and the site has every page."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from batchlab.cli import services as service
from batchlab.cli.app import app
from batchlab.cli.startup import SERVICES
from batchlab.manager.state import ManagerSettings
from batchlab.worker.inflight_message import WorkerSettings
from docs import reference
from docs.reference import __main__, settings
from tests.support import ROOT

DOCS = ROOT / "docs"


@pytest.mark.parametrize("path", reference.PAGES)
def test_generated_page_matches_the_code(path: str) -> None:
    """Made again by `python -m docs.reference docs`."""
    made = reference.PAGES[path](DOCS)
    assert (DOCS / path).read_text() == made, f"docs/{path} is stale; make it again: python -m docs.reference docs"


def test_the_pages_are_written_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "0001-a.md").write_text("# Why a|b\n\nBecause.\n")
    assert __main__.main([]) == 2
    assert __main__.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == list(reference.PAGES)
    assert "[Why a\\|b](0001-a.md)" in (tmp_path / "decisions" / "index.md").read_text()
    (tmp_path / "cli.md").write_text("old")
    assert reference.write(tmp_path) == ["cli.md"]


def test_every_command_and_option_is_in_the_reference() -> None:
    page = (DOCS / "cli.md").read_text()

    def walk(command: Any, path: str) -> None:
        for name, one in getattr(command, "commands", {}).items():
            walk(one, f"{path} {name}")
        if not hasattr(command, "commands"):
            section = page.partition(f"\n## {path}\n")[2].partition("\n## ")[0]
            assert section, path
            for parameter in command.params:
                for option in parameter.opts if not getattr(parameter, "hidden", False) else ():
                    assert not option.startswith("--") or f"`{option}" in section, (path, option)

    walk(get_command(app), "batchlab")


def test_every_option_of_a_service_is_in_the_reference() -> None:
    """Their command lines are read by argparse, so Typer knows none of them."""
    page = (DOCS / "cli.md").read_text()
    services = service.parsers()[1]
    assert set(services) == set(SERVICES)
    for name, parser in services.items():
        section = page.partition(f"\n## batchlab {name}\n")[2].partition("\n## ")[0]
        options = set(re.findall(r"--[a-z-]+", parser.format_usage()))
        assert options
        for option in options:
            assert f"| `{option} " in section, (name, option)


def test_every_setting_has_a_meaning() -> None:
    assert list(settings.MANAGER) == [field.name for field in fields(ManagerSettings)]
    assert list(settings.WORKER) == [field.name for field in fields(WorkerSettings)]


def test_every_environment_variable_is_documented_and_exists() -> None:
    told = {name for part in settings.VARIABLES.values() for name in part}
    sources = [
        *(ROOT / "batchlab").rglob("*.py"),
        *(one for one in (ROOT / "compose").rglob("*") if one.suffix in (".yaml", ".sh")),
    ]
    code = "\n".join(source.read_text() for source in sources)
    read = set(re.findall(r"\bBATCHLAB_[A-Z_]+", code))
    assert read - told - settings.INTERNAL == set(), "tell of them in docs/reference/settings.py"
    assert {name for name in told | settings.INTERNAL if name not in code} <= {
        # What libraries of ours read by themselves.
        "AWS_PROFILE",
        "SSL_CERT_FILE",
        "PIP_CERT",
        "OTEL_EXPORTER_OTLP_HEADERS",
    }


# --- The site ------------------------------------------------------------------------------------


def pages_of(nav: Any) -> Iterator[str]:
    for one in nav:
        target = next(iter(one.values())) if isinstance(one, dict) else one
        if isinstance(target, list):
            yield from pages_of(target)
        else:
            yield target


def test_every_page_is_in_the_navigation_once() -> None:
    """So that `mkdocs build --strict` does not say so only at the end."""
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {one.relative_to(DOCS).as_posix() for one in DOCS.rglob("*.md")}
    decisions = {one for one in there if re.match(r"decisions/\d", one)}
    assert len(listed) == len(set(listed))
    assert set(listed) == there - decisions, "name it in the navigation of mkdocs.yml"


@pytest.fixture(scope="module")
def fetches() -> Callable[[str], list[str]]:
    spec = importlib.util.spec_from_file_location("offline", DOCS / "hooks" / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str], list[str]] = module.fetches
    return found


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
def test_a_page_that_fetches_from_elsewhere_is_found(
    fetches: Callable[[str], list[str]], page: str, fetched: int
) -> None:
    assert len(fetches(page)) == fetched


def test_no_figure_fetches_anything() -> None:
    for path in (DOCS / "images").glob("*.svg"):
        assert not re.search(r"(href|src|url\()\s*=?\s*[\"']?(https?:|//)", path.read_text()), path
        assert path.stat().st_size < 200_000
