"""A job whose tasks fail in every way that a task can be brought home for, on a real grid."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.emulators import ministack_python
from tests.integration.local_grid import LocalGrid

HANDLERS = """\
import time


def parse(part, ctx):
    lines = part.read_text().splitlines()
    print(f"parsing {len(lines) - 1} lines of {part.name}")
    total = sum(amount(line) for line in lines[1:])
    return {"total": total, "file": ctx.save(str(total).encode(), "total.txt")}


def amount(line):
    name, _, text = line.partition(",")
    return int(text)


def double(result):
    return result["total"] * 2


def gathered(results):
    return results[0]["total"] / sum(one["total"] - one["total"] for one in results)


def hang(part):
    time.sleep(600)


def die(part):
    os.abort()


def eat(part):
    held = bytearray(400 * 2**20)
    time.sleep(1)
    return len(held)
"""
SHOW = """\
#!/bin/sh
echo "$2" > "$3"
cat "$1" >&2
exit 3
"""
JOB = """\
name: amounts
input: {files: data/*.csv, split: lines, size: 2, header: true}
params: {word: moon}
failure: {max_failures: 100%}
stages:
  - {name: parse, python: "handlers:parse", timeout: 30s, retry: {attempts: 2, backoff: 10ms}}
  - {name: double, python: "handlers:double", after: parse, retry: 1}
  - name: check
    command: [show.sh, "{input}", "{params.word}", "{output:o}"]
    after: parse
    retry: 1
  - {name: gathered, python: "handlers:gathered", after: parse, gather: all, retry: 1}
  - {name: hang, python: "handlers:hang", after: [], timeout: 500ms, retry: 1}
  - {name: die, python: "handlers:die", after: [], retry: 1}
  - {name: eat, python: "handlers:eat", after: [], retry: 1, resources: {memory: 128 MiB}}
"""
ROWS = ["a,1", "b,2", "c,3", "d,four", "e,5"]
"""Two lines a task: the second task fails."""


def write_job(folder: Path) -> Path:
    """The job's folder; its file."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "amounts.csv").write_text("\n".join(["name,amount", *ROWS]) + "\n")
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "show.sh").write_text(SHOW)
    (folder / "show.sh").chmod(0o755)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


class Ran:
    """A grid on which the job has run, and the job's id."""

    def __init__(self, grid: LocalGrid, job: str, home: Path | None = None) -> None:
        self.grid = grid
        self.job = job
        self.home = home or grid.home.path

    def moved(self, home: Path) -> Ran:
        """The same where a copy of its bucket is."""
        return Ran(self.grid, self.job, home)

    def named(self, job: str) -> Ran:
        """The same, with the job by another name."""
        return Ran(self.grid, job, self.home)

    def argv(self, *words: str) -> list[str]:
        """A command line of `batchlab job`, for this grid."""
        command, *rest = words
        base = [sys.executable, "-P", "-m", "batchlab", "job", command, self.job]
        return [*base, *rest, "--home", str(self.home)]

    def cli(self, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Run it, with so much on its standard input."""
        return subprocess.run(
            self.argv(*words), input=typed, capture_output=True, text=True, timeout=30, check=False
        )


@contextmanager
def ran(folder: Path, backend: str) -> Iterator[Ran]:
    """The job, run to its end on that backend; the grid stays up."""
    if backend == "ministack":
        ministack_python()
    grid = LocalGrid(folder / "home", backend=backend)
    try:
        view = grid.run(write_job(folder / "job"))
        assert view["state"] == "SUCCEEDED", view
        yield Ran(grid, view["id"])
    finally:
        grid.stop()


def contents(folder: Path) -> Mapping[str, tuple[str, int]]:
    """Digest and time of change of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = digest, path.stat().st_mtime_ns
    return found
