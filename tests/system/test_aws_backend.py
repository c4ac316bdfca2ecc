"""`--backend aws` on an emulated control plane, with the commands of a user on a laptop."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from tests.support.aws.account import STACK, TOKEN, Account, account
from tests.support.grid.backends import command
from tests.support.waiting import until

WORK = """\
import time

def square(item):
    time.sleep({seconds})
    return item * item

def total(values):
    return sum(values)
"""
JOB = """\
name: squares
input: {files: items.jsonl, split: items}
stages:
  - {name: square, python: work:square, bundle: BUNDLE}
  - {name: total, python: work:total, gather: all}
"""


@pytest.fixture
def there(ministack: Endpoint, moto: Endpoint, tmp_path: Path) -> Iterator[Account]:
    with account(ministack, moto, tmp_path / "account") as found:
        yield found


def batchlab(there: Account, *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run a command on a laptop of that account, and return stdout and stderr."""
    return command(*arguments, env=there.env, code=code)


def job_of(folder: Path, tasks: int, *, seconds: float = 0.01, bundle: object = "auto") -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(WORK.format(seconds=seconds))
    (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(tasks)))
    (folder / "job.yaml").write_text(JOB.replace("BUNDLE", str(bundle)))
    return folder / "job.yaml"


def total(out: Path) -> Any:
    return json.loads((out / "total.jsonl").read_text())["value"]


def test_a_job_runs_on_what_the_stack_has_made(there: Account, tmp_path: Path) -> None:
    home = there.home()
    until(there.manager_pid, 60)
    job = job_of(tmp_path / "job", 60)
    _, said = batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", tmp_path / "out")
    assert f"Connecting to the stack {STACK}" in said
    assert total(tmp_path / "out") == sum(i * i for i in range(60))
    assert "The grid is stopped" not in said, "a stack goes on"
    assert home.record() is None, "the connection ends with its command"
    assert there.manager_pid(), "and the manager does not"
    (target, *_) = there.sessions
    assert target in {i["InstanceId"] for i in there.group(f"{STACK}-manager")["Instances"]}
    assert home.token() == TOKEN
    assert oct((home.path / "token").stat().st_mode & 0o777) == "0o600"


def test_a_connection_outlives_the_managers_instance(there: Account, tmp_path: Path) -> None:
    home = there.home()
    first = until(there.manager_pid, 60)
    batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
    shown, _ = batchlab(there, "grid", "status", "--home", home.path, "--json")
    assert json.loads(shown)["backend"] == "aws"
    os.kill(first, signal.SIGKILL)
    until(lambda: there.manager_pid() not in (0, first), 60)
    job = job_of(tmp_path / "job", 20)
    batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", tmp_path / "out")
    assert total(tmp_path / "out") == sum(i * i for i in range(20))
    _, said = batchlab(there, "grid", "down", "--home", home.path)
    assert "The stack stays" in said
    assert home.record() is None
    assert there.manager_pid()


def test_job_stops_at_its_cap_and_continues_with_a_higher_one(there: Account, tmp_path: Path) -> None:
    home = there.home()
    until(there.manager_pid, 60)
    job = job_of(tmp_path / "job", 20)
    batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
    # The cap is less than the first minute of an m7i.large, which is the billed minimum.
    batchlab(there, "job", "submit", job, "--max-cost", "0.001USD", "--home", home.path)

    def why() -> str:
        return batchlab(there, "job", "why", "last", "--home", home.path)[0]

    answer = until(lambda: said if "may cost" in (said := why()) else "", 60, pause_s=1.0)
    # Until now, the job has caused only the cost of requests.
    assert re.search(r"it may cost 0\.001 USD, has cost 0(\.000\d+)? USD", answer)
    assert "batchlab job cap" in answer
    assert not there.group(f"{STACK}-pool-default")["DesiredCapacity"]
    batchlab(there, "job", "cap", "last", "1USD", "--home", home.path)
    batchlab(there, "job", "watch", "last", "--home", home.path)
    shown, _ = batchlab(there, "cost", "bill", "last", "--json", "--home", home.path)
    assert json.loads(shown)
    batchlab(there, "grid", "down", "--home", home.path)


def test_missing_parts_are_a_clear_error(there: Account, tmp_path: Path) -> None:
    _, said = batchlab(there, "grid", "up", "--backend", "aws", "--home", tmp_path / "h", code=3)
    assert "No stack is recorded" in said
    assert "deploy apply" in said
    home = there.home()
    _, said = batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path, "--pool", "default:0-4x1", code=2)
    assert "has its own pools" in said
    until(there.manager_pid, 60)
    (there.folder / "bin" / "session-manager-plugin").unlink()
    _, said = batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path, code=3)
    assert "session-manager-plugin is not installed" in said
