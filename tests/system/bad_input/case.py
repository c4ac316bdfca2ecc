"""One bad input: the user's action, and the required answer of batchlab."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.system.bad_input.shell import SECRET, Told

WORK = """\
from pathlib import Path

def one(item):
    return 1

def size(item):
    return len(Path(item).read_bytes())
"""

JOB = """\
name: bad
input:
  files: data/*
stages:
  - name: one
    python: work:one
  - name: two
    command: [wc, "{input}"]
    after: []
params: {limit: 1}
"""

CHECK = ("job", "check", "job.yaml")


@dataclass(frozen=True, slots=True)
class Case:
    """A bad input. `code` is the expected exit code, and `says` is a part of the expected output."""

    name: str
    does: str
    says: str
    make: Callable[[Path], None]
    """Prepares the bad input in the user's folder, which contains a valid job."""
    command: tuple[str, ...] = CHECK
    code: int = 2


def sound(folder: Path) -> None:
    """Write a valid job: job.yaml, work.py, and two data files."""
    (folder / "data").mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    (folder / "work.py").write_text(WORK)
    for name in ("a.csv", "b.csv"):
        (folder / "data" / name).write_text(name)


# --- Scenes --------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """Leave the job unchanged."""


def swap(old: str, new: str) -> Callable[[Path], None]:
    """Return a function that replaces `old` by `new` in the job file."""

    def make(folder: Path) -> None:
        text = (folder / "job.yaml").read_text()
        assert old in text
        (folder / "job.yaml").write_text(text.replace(old, new))

    return make


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return a function that writes the content to the file `name`."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def job(content: str | bytes) -> Callable[[Path], None]:
    """Return a function that writes the content to the job file."""
    return put("job.yaml", content)


def link(name: str, target: str) -> Callable[[Path], None]:
    """Return a function that makes `name` a symbolic link to `target`."""

    def make(folder: Path) -> None:
        (folder / name).symlink_to(target)

    return make


def both(*scenes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that runs all scenes in order."""

    def make(folder: Path) -> None:
        for scene in scenes:
            scene(folder)

    return make


# --- Common checks -------------------------------------------------------------------------------


def check(told: Told, *, code: int, says: str) -> None:
    """Check the exit code, the expected text, and the rules for every command that fails."""
    whole = f"exit {told.code}\n{told.out}{told.err}"
    assert told.code == code, whole
    assert says in told.out + told.err, whole
    assert "Traceback (most recent call last)" not in told.err, whole
    assert "something unexpected" not in told.err, whole
    assert SECRET not in whole
    lines = told.err.splitlines()
    assert all(line.isprintable() for line in lines), whole
    if code in (2, 3):
        assert told.out == "", whole
        assert len(told.err) < 20_000, whole
        assert max(map(len, lines)) < 1000, whole
        sentence_and_remedy(lines, whole)


def sentence_and_remedy(lines: list[str], whole: str) -> None:
    """Check that the last error is one sentence, followed by a remedy. A process of the grid logs both on one line."""
    last = lines[-1]
    assert last.endswith((".", "?")), whole
    if not last.startswith("  "):
        assert ". " in last, whole
        return
    assert re.match(r"Error: |/.*: ", lines[-2]), whole
    assert lines[-2].endswith((".", "?")), whole
