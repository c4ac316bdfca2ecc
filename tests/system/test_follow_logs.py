"""The output of a job as a user follows it on a real grid, while tasks run."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from tests.support.aws.emulators import ministack_python
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.support.waiting import until

HANDLERS = """\
import time
from pathlib import Path


def talk(item, ctx):
    print(f"hello from {item}")
    gate = Path(ctx.params["gates"]) / item
    while not gate.exists():
        time.sleep(0.02)
    print("and good-bye", end="")
    if item == "bad":
        raise ValueError("bad")
    return item
"""
JOB = """\
name: talk
input: {files: items.jsonl, split: items}
params: {gates: ""}
failure: {max_failures: 100%}
stages:
  - {name: talk, python: "handlers:talk", retry: 1, bundle: 1, timeout: 60s}
"""


class Following:
    """A run of `batchlab job logs JOB …` in its own process."""

    def __init__(self, grid: LocalGrid, job: str, *words: str) -> None:
        argv = [sys.executable, "-P", "-u", "-m", "batchlab", "job", "logs", job, *words]
        self._process = subprocess.Popen(
            [*argv, "--home", str(grid.home.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """Return the next line as soon as it is printed."""
        return _of(self._process.stdout).readline().rstrip("\n")

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, Sequence[str], str]:
        """Return the exit code, the other lines, and stderr."""
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out.splitlines(), err


def _of(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@pytest.mark.parametrize("backend", ["local", "ministack"])
def test_output_is_shown_while_tasks_run(bring_up: Bring, tmp_path: Path, backend: str) -> None:
    if backend == "ministack":
        ministack_python()
    (tmp_path / "gates").mkdir()
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "items.jsonl").write_text('"good"\n"bad"\n')
    grid = bring_up(backend=backend)
    job = grid.submit(tmp_path / "job.yaml", gates=str(tmp_path / "gates"))["id"]
    everything, one = Following(grid, job, "--follow"), Following(grid, job, "talk/1", "--follow")
    failed = Following(grid, job, "--failed", "--follow", "--json")
    # Neither task has ended.
    assert {everything.line(), everything.line()} == {"talk/0 | hello from good", "talk/1 | hello from bad"}
    assert one.line() == "talk/1 | hello from bad"
    one.interrupt()
    code, rest, err = one.end()
    assert (code, list(rest)) == (130, [])
    assert "Traceback" not in err
    (tmp_path / "gates" / "bad").touch()
    assert everything.line() == "talk/1 | and good-bye"
    lines = [json.loads(failed.line()) for _ in range(2)]
    assert [line["line"] for line in lines] == ["hello from bad", "and good-bye"]
    ids = {"job": job, "stage": "talk", "task": 1, "attempt": 1, "round": 0}
    assert all(line.items() >= ids.items() for line in lines)
    (tmp_path / "gates" / "good").touch()
    code, rest, err = everything.end()
    assert (code, list(rest)) == (0, ["talk/0 | and good-bye"])
    assert f"{job} is SUCCEEDED." in err
    assert failed.end()[:2] == (0, [])


def test_live_logs_cost_nothing_without_a_follower(bring_up: Bring, tmp_path: Path) -> None:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "good").touch()
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "items.jsonl").write_text('"good"\n')
    grid = bring_up()
    view = grid.run(tmp_path / "job.yaml", gates=str(tmp_path / "gates"))

    async def tails() -> list[str]:
        found = grid.objects.list(object_keys.tails(JobId(view["id"])))
        return [info.key async for page in found for info in page]

    assert asyncio.run(tails()) == []
    told_of = grid.home.objects / "logs" / ".workers"
    told = json.loads(until(lambda: [*told_of.glob("*.json")])[0].read_text())
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "pyyaml" in told["packages"]
