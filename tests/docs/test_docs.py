"""The commands, files, and functions in the docs, all of which must exist."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

import batchlab
from batchlab.cli.app import app
from batchlab.jobs.job_file import load
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("examples/*/*.md")]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            calls = re.findall(r"(?:^|&& |bin/)batchlab ([^\n&|]*)", block, re.M)
            found += [(page.relative_to(ROOT).as_posix(), call.strip()) for call in calls]
    return found


@pytest.mark.parametrize(("page", "call"), commands())
def test_every_command_in_the_docs_parses(page: str, call: str) -> None:
    """The command line itself checks the commands and their options."""
    parses(page, call)


def test_every_command_in_a_sentence_parses() -> None:
    for page in PAGES:
        for call in re.findall(r"`batchlab ([a-z-][^`…|]+)", page.read_text()):
            parses(page.relative_to(ROOT).as_posix(), call.strip())


def parses(page: str, call: str) -> None:
    command = get_command(app)
    words = call.split(" #")[0].split()
    while words and hasattr(command, "commands") and not words[0].startswith("--"):
        assert words[0] in command.commands, f"{page}: batchlab {call}"
        command = command.commands[words.pop(0)]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    known.add("--help")
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{page}: batchlab {call}"


def test_imports_in_the_docs_exist() -> None:
    blocks = [
        (page, ast.parse(block))
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    ]
    imports = [
        (page, one.module, name.name)
        for page, block in blocks
        for one in ast.walk(block)
        if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("batchlab")
        for name in one.names
    ]
    assert len(imports) >= 8
    for page, module, name in imports:
        assert hasattr(importlib.import_module(str(module)), name), f"{page}: {module} {name}"


def test_architecture_page_names_existing_code() -> None:
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text()
    for path in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)", page):
        candidates = [ROOT / path, *(ROOT / "batchlab").rglob(path.rsplit("/", 1)[-1])]
        assert any(candidate.exists() and candidate.as_posix().endswith(path) for candidate in candidates), path
    for path, name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py) ([A-Za-z_.]+)`", page):
        modules = [
            one.read_text()
            for one in (ROOT / "batchlab").rglob(path.rsplit("/", 1)[-1])
            if one.as_posix().endswith(f"/{path}")
        ]
        for part in name.split("."):
            has_it = re.compile(rf"(def|class) {part}\b").search
            assert any(map(has_it, modules)), f"{path} {name}"
    for module, name in re.findall(r"`([a-z_]+)\.(?!(?:py|toml)`)([a-z_]+)`", page):
        texts = [one.read_text() for one in (ROOT / "batchlab").rglob(f"{module}.py")]
        assert any(re.search(rf"def {name}\b", text) for text in texts), f"{module}.{name}"


def defined(tree: ast.Module) -> set[str]:
    """Return every function and class of a module, with methods as `Class.method`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = set()
    for one in tree.body:
        if isinstance(one, kinds):
            found.add(one.name)
        if isinstance(one, ast.ClassDef):
            found |= {f"{one.name}.{sub.name}" for sub in one.body if isinstance(sub, kinds)}
    return found


def test_a_tasks_life_has_ten_hops_of_existing_functions() -> None:
    page = (ROOT / "docs" / "contributing" / "a-tasks-life.md").read_text()
    hops = re.split(r"^(?=\d+\. \*\*)", page, flags=re.M)[1:]
    assert [int(hop.partition(".")[0]) for hop in hops] == list(range(1, len(hops) + 1))
    assert len(hops) <= 10
    for hop in hops:
        assert re.search(r"`[a-z_/]+\.py [A-Za-z_.]+`", hop), f"nothing is named: {hop}"
    for path, name in re.findall(r"`([a-z_/]+\.py)(?: ([A-Za-z_.]+))?`", page):
        tree = ast.parse((ROOT / "batchlab" / path).read_text())
        assert not name or name in defined(tree), f"{path} has no {name}"


def test_every_place_names_one_version() -> None:
    """The version is in the package, the lock file, the newest heading of the changelog, and the docs' first page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    version, _, day = headings[headings[0] == "Unreleased"].partition(" — ")
    (told,) = re.findall(r"of release ([\d.]+),", (ROOT / "docs" / "index.md").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert {version, told, project["version"]} == {batchlab.__version__}
    assert [one["version"] for one in lock if one["name"] == "batchlab"] == [version]


def test_the_readmes_job_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one two\n")
    (tmp_path / "handlers.py").write_text("def count(part): ...\ndef total(results): ...\n")
    (tmp_path / "job.yaml").write_text(block)
    assert load(tmp_path / "job.yaml", {}).job.name == "word-count"


def test_start_page_matches_the_readme() -> None:
    """CI runs the README's first two blocks, so these blocks of the page are also tested."""
    readme, start = (
        re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S) for page in ("README.md", "docs/start.md")
    )
    assert readme[0] == start[0]
    assert readme[1] == start[-1]
    assert start[1] in readme[2]
