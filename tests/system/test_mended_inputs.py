"""A failed task that runs again with a mended input, on a grid of real processes whose manager is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.test_command_line import Cli

HANDLERS = """\
import pathlib, time

def work(item, ctx):
    number = int(item.read_text())
    gate = pathlib.Path(ctx.params["gate"])
    gate.with_name(f"begun-{number}").touch()
    while not gate.exists():
        time.sleep(0.05)
    return {"number": number, "file": item.name}
"""
JOB = """\
name: numbers
input:
  files: data/*
params: {gate: GATE}
stages:
  - name: work
    python: handlers:work
    timeout: 60s
    retry: 1
    bundle: 1
"""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path)
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "job.yaml").write_text(JOB.replace("GATE", str(tmp_path / "gate")))
    yield made
    made.close()


def fail_first(cli: Cli) -> None:
    """Start a grid and run the job until it has failed."""
    (cli.folder / "gate").touch()
    assert cli("grid", "up")[0] == 0
    code, _, err = cli("job", "submit", "job.yaml")
    assert code == 0, err
    assert cli("job", "watch", "last")[0] == 1


def test_a_mended_input_survives_a_killed_manager(cli: Cli) -> None:
    """The task of the retry runs while the manager is killed. The next manager counts the result of the new input."""
    cli.inputs(3)
    (cli.folder / "data/001").write_text("not a number")
    fail_first(cli)
    for task, reason in (("work/0", "has not failed"), ("work/7", "does not have a task work/7")):
        code, _, err = cli("job", "retry", "last", "--task", task, "--input", "data/000")
        assert code == 2
        assert reason in err

    (cli.folder / "gate").unlink()
    new = cli.folder / "new"
    new.write_text("41")
    assert cli("job", "retry", "last", "--task", "work/1", "--input", str(new))[0] == 0
    cli.wait((cli.folder / "begun-41").exists, "start of the task")
    record = cli.home.record()
    assert record
    os.kill(record.pid, signal.SIGKILL)
    code, _, err = cli("grid", "up")
    assert code == 0, err
    (cli.folder / "gate").touch()
    code, _, err = cli("job", "watch", "last")
    assert code == 0, err
    assert cli("job", "results", "last", "--out", "out")[0] == 0
    lines = [json.loads(line)["value"] for line in (cli.folder / "out/work.jsonl").read_text().splitlines()]
    assert lines == [{"number": n, "file": f"{i:03d}"} for i, n in enumerate([0, 41, 2])]

    # The ledger that a rebuild makes is equal, and the audit log names the hash of the new input.
    before = json.loads(cli("job", "show", "last", "--json")[1])
    assert cli("grid", "rebuild-ledger")[0] == 0
    assert json.loads(cli("job", "show", "last", "--json")[1])["stages"] == before["stages"]
    sha256 = hashlib.sha256(b"41").hexdigest()
    assert f"work/1: new input of 2 bytes, SHA-256 {sha256}" in cli("audit", "--json")[1]
    assert (
        f"mended       a retry gave the task a new input, SHA-256 {sha256}" in cli("job", "show", "last", "work/1")[1]
    )

    # The replay of the first attempt has its input, and the replay of the second round has the new input.
    code, out, err = cli("job", "replay-task", "last", "work/1", "--no-debug")
    assert "`--round 1` runs the task with the new input" in out, err
    assert code == 1
    code, out, err = cli("job", "replay-task", "last", "work/1", "--no-debug", "--round", "1", "--json")
    assert f"Running work/1, attempt 1, with the mended input {sha256[:12]}, on this machine" in err
    assert (code, json.loads(out)["mended_sha256"]) == (0, sha256)

    sql = "select task, state, mended_sha256 as mended from tasks order by task"
    rows = json.loads(cli("report", "query", sql, "last", "--json")[1])["rows"]
    assert [row["mended"] for row in rows] == [None, sha256, None]
    sql = "select round, mended_sha256 as mended from attempts where task = 1 order by round"
    assert [r["mended"] for r in json.loads(cli("report", "query", sql, "last", "--json")[1])["rows"]] == [None, sha256]
    assert cli("report", "html", "last", "--out", "report.html")[0] == 0
    assert "1 task has a mended input from a retry" in (cli.folder / "report.html").read_text()
    assert cli("grid", "down")[0] == 0


def test_a_new_input_from_standard_input(cli: Cli) -> None:
    cli.inputs(1)
    (cli.folder / "data/000").write_text("x")
    fail_first(cli)
    command = [sys.executable, "-m", "batchlab", "job", "retry", "last", "--task", "work/0", "--input", "-"]
    environment = {**os.environ, "BATCHLAB_HOME": str(cli.home.path)}
    subprocess.run(command, cwd=cli.folder, env=environment, input=b"7", check=True, capture_output=True)
    assert cli("job", "watch", "last")[0] == 0
    assert cli("job", "results", "last", "--out", "out")[0] == 0
    assert json.loads((cli.folder / "out/work.jsonl").read_text())["value"]["number"] == 7
    assert cli("grid", "down")[0] == 0
