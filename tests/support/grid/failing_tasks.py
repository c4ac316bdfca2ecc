"""A job on a real grid whose tasks fail in every way that `job replay-task` can replay."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import app
from tests.support.aws.emulators import ministack_python
from tests.support.grid.local_grid import LocalGrid

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
"""The rows of the input, two lines per task. The second task fails."""


def write_job(folder: Path) -> Path:
    """Write the job's folder, and return the job file."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "amounts.csv").write_text("\n".join(["name,amount", *ROWS]) + "\n")
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "show.sh").write_text(SHOW)
    (folder / "show.sh").chmod(0o755)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


class Ran:
    """A grid on which the job has run, and the id of the job."""

    def __init__(self, grid: LocalGrid, job: str, home: Path | None = None) -> None:
        self.grid = grid
        self.job = job
        self.home = home or grid.home.path

    def moved(self, home: Path) -> Ran:
        """Return the same job in a home with a copy of the bucket."""
        return Ran(self.grid, self.job, home)

    def named(self, job: str) -> Ran:
        """Return the same grid with another job id."""
        return Ran(self.grid, job, self.home)

    def argv(self, *words: str) -> list[str]:
        """Return a command line of `batchlab job` for this grid."""
        command, *rest = words
        base = [sys.executable, "-P", "-m", "batchlab", "job", command, self.job]
        return [*base, *rest, "--home", str(self.home)]

    def cli(self, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command with the standard input `typed`."""
        return subprocess.run(self.argv(*words), input=typed, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def ran(folder: Path, backend: str) -> Iterator[Ran]:
    """Run the job to its end on that backend, and keep the grid running."""
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
    """Return the digest and the modification time of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = digest, path.stat().st_mtime_ns
    return found


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ran]]:
    """Return a function that runs the job on a grid of a backend. All tests share the grid."""
    with ExitStack() as stack:

        @cache
        def on(backend: str) -> Ran:
            return stack.enter_context(ran(tmp_path_factory.mktemp(backend), backend))

        yield on


@pytest.fixture(params=["local", "ministack"])
def anywhere(request: pytest.FixtureRequest, grids: Callable[[str], Ran]) -> Ran:
    return grids(request.param)


@pytest.fixture
def here(grids: Callable[[str], Ran]) -> Ran:
    return grids("local")


Quick = Callable[..., tuple[int, str, str]]
Verdict = Callable[..., dict[str, Any]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Quick:
    """Return a function that runs a command line in this process, which avoids the start of a process. The function
    returns the exit code, stdout, and stderr."""
    monkeypatch.setattr("batchlab.cli.output.install_signal_handlers", lambda: None)

    def quick(one: Ran, *words: str) -> tuple[int, str, str]:
        argv = one.argv(*words)
        with pytest.raises(SystemExit) as ended:
            app.start(argv[argv.index("job") :])
        told = capfd.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return quick


@pytest.fixture
def verdict(quick: Quick) -> Verdict:
    """Return a function that runs `job replay-task --json`, checks the exit code, and returns the JSON. The output of
    the task is under `stderr`."""

    def verdict(one: Ran, *words: str) -> dict[str, Any]:
        code, out, err = quick(one, "replay-task", *words, "--json")
        found: dict[str, Any] = json.loads(out)
        assert code == (found["verdict"] not in ("succeeded", "not at all"))
        return {**found, "stderr": err}

    return verdict


def at_a_terminal(argv: list[str], typed: list[str], within_s: float = 30.0) -> str:
    """Run a command in a terminal, and return the output. Each line of `typed` is entered when pdb prompts for
    input."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, answered, deadline_s = "", 0, time.monotonic() + within_s
    try:
        while time.monotonic() < deadline_s:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # the other end of the terminal is closed
                    break
                shown += data.decode(errors="replace")
            if shown.count("(Pdb) ") > answered and answered < len(typed):
                os.write(ours, typed[answered].encode())
                answered += 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown
