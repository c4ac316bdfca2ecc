"""Pages that are marked as runnable, whose commands run one by one and print the shown output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, doc_pages

DOCS = ROOT / "docs"
README_S = 300.0
SHORTER = {
    "python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv sync -q --frozen --no-dev && ": "",
    ".venv/bin/": f"{sys.prefix}/bin/",
    "sim fuzz --seeds 20": "sim fuzz --seeds 2",
    "simulate spot-wave": "simulate poison-batch",
}
"""Replacements of commands in the README. CI runs the installation. Other tests run the same worlds and the same
scenario."""
RUN = ("tutorial-laptop.md", "tutorial-month-end.md", "seventeen.md")


@pytest.mark.parametrize("page", RUN)
def test_a_page_can_be_followed(page: str, tmp_path: Path) -> None:
    """The page runs on the backend `local`, in an empty folder."""
    reader = doc_pages.Reader(tmp_path)
    ran = 0
    try:
        for step in doc_pages.steps((DOCS / page).read_text()):
            if step.file:
                reader.save(step)
            elif not step.not_run:
                code, printed = reader.run(step.text)
                where = f"{page}:\n{step.text}\nprinted, with exit code {code}:\n\n{printed}"
                assert code == step.exits, where
                assert step.prints is None or doc_pages.agrees(step.prints, printed), where
                ran += 1
    finally:
        reader.run(
            "for lock in .batchlab/manager.lock */manager.lock; do\n"
            '  if [ -e "$lock" ]; then batchlab grid down --home "$(dirname "$lock")" || true; fi\n'
            "done"
        )
    assert ran >= 5


def test_the_readme_can_be_followed_in_one_shell(tmp_path: Path) -> None:
    """The commands run in one shell, with the environment of this checkout. CI runs the first two blocks, which install
    this environment and run all tests."""
    followed = [step for step in doc_pages.steps((ROOT / "README.md").read_text()) if "pytest" not in step.text]
    for step in followed:
        if step.file:
            (tmp_path / step.file).write_text(step.text)
    script = "".join(step.text for step in followed if not step.file)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATCHLAB_")}
    for told, shorter in SHORTER.items():
        assert told in script
        script = script.replace(told, shorter)
    shell = ["bash", "-euxo", "pipefail", "-c", script]
    ran = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=README_S)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "totals agree" in ran.stdout
    assert "[0, 1, 4, 9, 16]" in ran.stdout
    assert (tmp_path / "stack.json").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("told", "agrees"),
    [
        ("one\ntwo 3 tasks in 1.5 s\n", True),
        ("one\n…\n", True),
        ("…\ntwo 3 tasks in 26 min 48 s\n", True),
        ("…\none\n…\n", True),
        ("one\n", False),
        ("…\none\n", False),
        ("one\ntwo 4 tasks in 1.5 s\n", False),
        ("…\nthree\n…\n", False),
    ],
)
def test_output_on_a_page_is_compared(told: str, agrees: bool) -> None:
    assert doc_pages.agrees(told, "one\ntwo 3 tasks in 270 ms\n") is agrees


def test_a_page_is_read_as_steps() -> None:
    page = """\
<!-- file: a/b.txt -->
```text
x
```

<!-- exits with 1 -->
```sh
false
```

```text
…
```

<!-- not run: it opens a browser -->
```sh
open
```

*Not run by a test: it needs an account.*

```sh
pay
```
"""
    assert list(doc_pages.steps(page)) == [
        doc_pages.Step("x\n", file="a/b.txt"),
        doc_pages.Step("false\n", exits=1, prints="…\n"),
        doc_pages.Step("open\n", not_run="it opens a browser"),
        doc_pages.Step("pay\n", not_run="it needs an account."),
    ]
