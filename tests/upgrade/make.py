"""Store the data that an earlier batchlab has written, for tests that continue with this data.

    python -m tests.upgrade.make COMMIT

runs jobs with the command line of that commit. The program writes the resulting folder of the grid, together with the
commit's output about its jobs, to tests/upgrade/COMMIT.tar.xz. Invariant: an archive does not contain secrets or
data that depends on the machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import ROOT

TOLD = "told.json"
HOME = "home"

JOB = """\
name: NAME
input:
  files: data/*
params: {hold: HELD}
stages:
  - name: square
    python: handlers:square
    timeout: 1h
    retry: 1
    bundle: 1
  - name: total
    python: handlers:total
    gather: all
    timeout: 1h
failure: {max_failures: 1}
"""
HANDLERS = """\
import os
import time

def square(item, ctx):
    number = int(item.read_text())
    while number >= 3 and os.path.exists(ctx.params["hold"]):
        time.sleep(0.05)
    if number == 7:
        raise ValueError("seven")
    ctx.save(f"{number}".encode(), "number.txt")
    return number * number

def total(results):
    return sum(results)
"""
HOLD = Path("/tmp/batchlab-upgrade-hold")
"""While this file exists, most tasks of an unfinished job wait."""
TASKS = 9
TOTAL = sum(number * number for number in range(TASKS) if number != 7)
# `.workers` contains data of the machine.
_LEFT_OUT = (".workers", "token", "scratch", "manager.lock", "manager.json")
WAIT_S = 60.0


class Earlier:
    """The command line of a checkout of that commit."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.folder = folder
        self._env = {**os.environ, "PYTHONPATH": str(checkout), "BATCHLAB_HOME": str(folder / HOME)}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "batchlab", *arguments],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"batchlab {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def knows(self, command: str) -> bool:
        """Return whether that version has this command."""
        return f"\n  {command} " in self("--help")

    def job(self, name: str, *, held: bool) -> str:
        """Submit a job of this name, and return its id."""
        path = self.folder / f"{name}.yaml"
        path.write_text(JOB.replace("NAME", name).replace("HELD", str(HOLD) if held else "''"))
        return self("job", "submit", path.name).strip()

    def wait(self, job: str, until: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the function returns true for the job's view."""
        deadline_s = time.monotonic() + WAIT_S
        while not until(json.loads(self("job", "show", job, "--json"))):
            if time.monotonic() > deadline_s:
                sys.exit(f"{job} is not where it should be after {WAIT_S:.0f} s.")
            time.sleep(0.1)


def _begun(view: dict[str, Any]) -> bool:
    return bool(view["stages"][0]["succeeded"] >= 3)


def _idle(view: dict[str, Any]) -> bool:
    return bool(view["stages"][0]["running"] == 0)


def _ended(view: dict[str, Any]) -> bool:
    return view["ended_s"] is not None


def make(commit: str) -> Path:
    """Write the archive, and return its path."""
    with tempfile.TemporaryDirectory(prefix="batchlab-upgrade-", dir="/tmp") as made:
        checkout, folder = Path(made, "checkout"), Path(made, "folder")
        _git("worktree", "add", "--detach", "--quiet", str(checkout), commit)
        try:
            name = _git("-C", str(checkout), "rev-parse", "--short=7", "HEAD")
            (folder / "data").mkdir(parents=True)
            (folder / "handlers.py").write_text(HANDLERS)
            for number in range(TASKS):
                (folder / "data" / f"{number}.txt").write_text(str(number))
            earlier = Earlier(checkout, folder)
            try:
                told = _run(earlier)
            finally:
                earlier("grid", "down")
                HOLD.unlink(missing_ok=True)
        finally:
            _git("worktree", "remove", "--force", str(checkout))
        path = Path(__file__).with_name(f"{name}.tar.xz")
        _pack(path, folder / HOME, {"commit": name, **told})
        return path


def _run(earlier: Earlier) -> dict[str, Any]:
    """Create an ended, a paused, and a running job, and a schedule and a report if that version supports them."""
    earlier("grid", "up", "--pool", "default:0-2x1")
    ended = earlier.job("ended", held=False)
    earlier.wait(ended, _ended)
    earlier("job", "results", ended, "--out", "results")
    HOLD.touch()
    paused = earlier.job("paused", held=True)
    earlier.wait(paused, _begun)
    earlier("job", "pause", paused)
    HOLD.unlink()  # the running tasks end, and the other tasks have not begun
    earlier.wait(paused, _idle)
    if earlier.knows("report"):
        earlier("report", "write", ended)
    if earlier.knows("schedule"):
        earlier("schedule", "add", "ended.yaml", "--cron", "0 2 1 1 *", "--timezone", "UTC")
    HOLD.touch()
    working = earlier.job("working", held=True)
    earlier.wait(working, _begun)
    return {
        "jobs": json.loads(earlier("job", "list", "--json")),
        "total": (earlier.folder / "results" / "total.jsonl").read_text(),
        "reports": earlier.knows("report"),
        "schedules": earlier.knows("schedule"),
    }


def _pack(path: Path, home: Path, told: dict[str, Any]) -> None:
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file in sorted(home.rglob("*")):
            name = file.relative_to(home)
            if file.is_file() and not _is_left_out(name):
                _add(archive, f"{HOME}/{name.as_posix()}", _of_no_machine(name, file.read_bytes()))
        _add(archive, TOLD, json.dumps(told, indent=1).encode())


def _add(archive: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    archive.addfile(info, io.BytesIO(body))


def _of_no_machine(name: Path, body: bytes) -> bytes:
    """Remove the boot id of the machine, so that the recorded processes count as ended on any machine."""
    if "instances" not in name.parts:
        return body
    return re.sub(rb'("boot": ?)"[^"]*"', rb'\1"00000000-0000-0000-0000-000000000000"', body)


def _is_left_out(name: Path) -> bool:
    return not set(name.parts).isdisjoint(_LEFT_OUT) or name.suffix == ".log"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python -m tests.upgrade.make COMMIT")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    path = make(sys.argv[1])
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
