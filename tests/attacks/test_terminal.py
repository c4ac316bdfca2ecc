"""Escape sequences in the output and the errors of a task, which never reach the user's terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.grid.fixtures import Bring

pytestmark = pytest.mark.slow

HANDLERS = """\
CODES = "\\x1b[2J\\x1b]0;title\\x07\\x1b]52;c;cm0gLXJm\\x07\\x9b31m\\u202e\\r\\x08"

def work(item):
    print("printed", CODES)
    raise type("Odd" + CODES, (ValueError,), {})("raised " + CODES)
"""
JOB = """\
name: odd
input: {files: "data/*"}
stages: [{name: work, python: "handlers:work", retry: 1}]
"""
HARMLESS = {"\n", "\t"}


def seen_at_a_terminal(home: Path, *arguments: str) -> str:
    """Return the output of a command as a terminal receives it."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchlab", *arguments, "--home", str(home)],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=subprocess.STDOUT,
    )
    os.close(its)
    read = b""
    try:
        while chunk := os.read(ours, 65536):
            read += chunk
    except OSError:  # Linux raises this error at the end of a terminal's output
        pass
    finally:
        os.close(ours)
    assert process.wait(60) in (0, 1)
    return read.decode().replace("\r\n", "\n")  # the terminal adds carriage returns


@pytest.fixture
def home(bring_up: Bring, tmp_path: Path) -> Path:
    for name, text in (("job.yaml", JOB), ("handlers.py", HANDLERS), ("data/1", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    grid = bring_up()
    assert grid.run(tmp_path / "job.yaml")["state"] == "FAILED"
    return grid.home.path


def test_no_escape_sequence_of_a_task_reaches_a_terminal(home: Path) -> None:
    told = ""
    for arguments in (
        ("job", "logs", "last"),
        ("job", "logs", "last", "--follow"),
        ("job", "failures", "last"),
        ("job", "show", "last"),
        ("job", "why", "last"),
        ("job", "list"),
        ("job", "failures", "last", "--json"),
    ):
        seen = seen_at_a_terminal(home, *arguments)
        bad = {c for c in seen if not c.isprintable()} - HARMLESS
        assert not bad, (arguments, bad, seen)
        told += seen
    assert "printed" in told
    assert "raised" in told
