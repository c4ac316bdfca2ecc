"""What the docs say exists does exist: commands, files, functions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from batchlab.cli.app import app
from batchlab.spec.jobfile import load

ROOT = Path(__file__).resolve().parent.parent.parent
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
    """Names of commands and their options, as the CLI itself knows them."""
    command = get_command(app)
    words = call.split(" #")[0].split()
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"{page}: batchlab {call}"
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{page}: batchlab {call}"


def test_the_architecture_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)", page):
        candidates = [ROOT / path, *(ROOT / "batchlab").rglob(path.rsplit("/", 1)[-1])]
        assert any(one.exists() and one.as_posix().endswith(path) for one in candidates), path
    for path, name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py) ([A-Za-z_.]+)`", page):
        modules = [
            one.read_text()
            for one in (ROOT / "batchlab").rglob(path.rsplit("/", 1)[-1])
            if one.as_posix().endswith(f"/{path}")
        ]
        for part in name.split("."):
            has_it = re.compile(rf"(def|class) {part}\b").search
            assert any(map(has_it, modules)), f"{path} {name}"


def test_the_readmes_job_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one two\n")
    (tmp_path / "handlers.py").write_text("def count(part): ...\ndef total(results): ...\n")
    (tmp_path / "job.yaml").write_text(block)
    assert load(tmp_path / "job.yaml", {}).job.name == "word-count"
