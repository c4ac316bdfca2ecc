"""One bad input: what its user does, and what batchlab must answer."""

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
    """`code` is the exit code, `says` a part of what the user reads."""

    name: str
    does: str
    says: str
    make: Callable[[Path], None]
    """Sets the scene in the user's folder, which holds a sound job."""
    command: tuple[str, ...] = CHECK
    code: int = 2


def sound(folder: Path) -> None:
    """A job that nothing is wrong with: job.yaml, work.py and two files of data."""
    (folder / "data").mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    (folder / "work.py").write_text(WORK)
    for name in ("a.csv", "b.csv"):
        (folder / "data" / name).write_text(name)


# --- Scenes --------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """The job stays as it is."""


def swap(old: str, new: str) -> Callable[[Path], None]:
    """In the job file `old` becomes `new`."""

    def make(folder: Path) -> None:
        text = (folder / "job.yaml").read_text()
        assert old in text
        (folder / "job.yaml").write_text(text.replace(old, new))

    return make


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    """The file `name` has this content."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def job(content: str | bytes) -> Callable[[Path], None]:
    """The job file has this content."""
    return put("job.yaml", content)


def link(name: str, target: str) -> Callable[[Path], None]:
    """`name` is a symbolic link to `target`."""

    def make(folder: Path) -> None:
        (folder / name).symlink_to(target)

    return make


def both(*scenes: Callable[[Path], None]) -> Callable[[Path], None]:
    """One after the other."""

    def make(folder: Path) -> None:
        for scene in scenes:
            scene(folder)

    return make


# --- What holds for every one --------------------------------------------------------------------


def check(told: Told, *, code: int, says: str) -> None:
    """The right exit code, the sentence, and what holds for every command that goes wrong."""
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
    """The last complaint is one sentence, and below it what to do. A process of the grid says
    both in one line, for its log."""
    last = lines[-1]
    assert last.endswith((".", "?")), whole
    if not last.startswith("  "):
        assert ". " in last, whole
        return
    assert re.match(r"Error: |/.*: ", lines[-2]), whole
    assert lines[-2].endswith((".", "?")), whole
