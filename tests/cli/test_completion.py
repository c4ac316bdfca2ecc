"""Completions that the shells offer at the Tab key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from batchlab.cli import options
from batchlab.core import http_connections
from batchlab.core.http_connections import PROOF
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.cli import runner

Complete = Callable[[str], list[str]]
"""A function that returns bash's completions of a command line."""


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    run = runner(monkeypatch, capsys)

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_BATCHLAB_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        code, out, err = run()
        assert (code, err) == (0, "")
        return out.split()

    return ask


def test_commands_and_options(complete: Complete) -> None:
    assert complete("batchlab sch") == ["schedule", "schema"]
    assert complete("batchlab grid dr") == ["drain"]
    assert complete("batchlab run --max") == ["--max-cost"]


def test_backends_scenarios_and_examples(complete: Complete) -> None:
    assert complete("batchlab run job.yaml --backend local") == ["local", "localstack"]
    assert complete("batchlab scenario faults --backend a") == ["aws"]
    assert complete("batchlab scenario check spot") == ["spot-wave"]
    assert complete("batchlab scenario simulate long-tail --like mini") == ["ministack"]
    assert complete("batchlab report query slow") == ["slowest_tasks"]
    assert complete("batchlab schema s") == ["scenario"]
    assert complete("batchlab init --example ") == ["claims", "media", "sort", "transform"]


def test_jobs_of_a_grid_that_is_down_are_those_of_its_bucket(complete: Complete, tmp_path: Path) -> None:
    for age, name in enumerate(["sums-0000000001", "sums-0000000002", "other-0000000003"]):
        folder = tmp_path / "g" / "objects" / "jobs" / name
        folder.mkdir(parents=True)
        os.utime(folder, (age, age))
    line = f"batchlab job show --home {tmp_path / 'g'} "
    assert complete(f"{line}s") == ["sums-0000000002", "sums-0000000001"]
    assert complete(f"{line}l") == ["last"]
    assert complete(f"batchlab job show --home {tmp_path / 'nowhere'} s") == []
    assert not (tmp_path / "nowhere").exists(), "asking must not make a folder"


class Manager(BaseHTTPRequestHandler):
    """A manager that answers correctly, or with text that is not a valid answer."""

    def do_GET(self) -> None:
        jobs = [{"id": f"sums-000000000{n}"} for n in (2, 1)]
        answers = {
            "jobs": {"jobs": jobs},
            "jobs/sums-0000000002": {"stages": [{"name": "parse"}, {"name": "price"}]},
            "jobs/sums-0000000002/failures": {"failures": [{"stage": "parse", "task": 3}]},
            "schedules": {"schedules": [{"name": "nightly"}]},
            "grid": {"pools": [{"name": "default"}, {"name": "large"}]},
        }
        name = self.path.removeprefix("/v1/").partition("?")[0]
        signed = http_connections.read(self.token, self.headers["Authorization"], "GET", self.path)
        body = json.dumps(answers[name]).encode() if signed else b"no"
        self.send_response(200 if signed else 401)
        if signed:
            self.send_header(PROOF, http_connections.whole_proof(self.token, signed, 200, body))
        self.end_headers()
        self.wfile.write(body)

    token: str

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Start a grid with a fake manager."""
    place = Home(tmp_path / "g")
    handler = type("Handler", (Manager,), {"token": place.token()})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        with place.lock():
            place.write_record(ManagerRecord(url, os.getpid(), "manager-1", "local"))
            yield place
        server.shutdown()
        thread.join()


def test_jobs_and_schedules_of_a_grid_that_is_up(
    complete: Complete, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHLAB_HOME", str(home.path))
    assert complete("batchlab job why sums-") == ["sums-0000000002", "sums-0000000001"]
    assert complete("batchlab report html ") == ["last", "sums-0000000002", "sums-0000000001"]
    assert complete("batchlab schedule pause n") == ["nightly"]
    assert complete("batchlab job show last ") == ["parse/3", "parse/", "price/"]
    assert complete("batchlab job replay-task sums-0000000002 pa") == ["parse/3", "parse/"]
    assert complete("batchlab job logs last parse/") == ["parse/3", "parse/"]
    assert complete("batchlab grid drain l") == ["large"]
    (home.path / "token").write_text("another")
    assert complete("batchlab schedule pause n") == []


def test_completion_does_not_wait_for_a_silent_manager(
    complete: Complete, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "COMPLETION_TIMEOUT_S", 0.01)
    monkeypatch.setattr(Manager, "do_GET", lambda self: threading.Event().wait(0.2))
    monkeypatch.setenv("BATCHLAB_HOME", str(home.path))
    assert complete("batchlab job show s") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_takes_its_script(shell: str, tmp_path: Path) -> None:
    program = tmp_path / "batchlab"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchlab "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    source = subprocess.run(
        ["batchlab"], env={**env, "_BATCHLAB_COMPLETE": f"source_{shell}"}, capture_output=True, text=True, check=True
    ).stdout
    assert f"_BATCHLAB_COMPLETE=complete_{shell}" in source
    if shutil.which(shell) is None:
        return  # the shell is not installed, so it cannot check the script
    read = subprocess.run([shell, "-n"], input=source, text=True, capture_output=True)
    assert not read.returncode, read.stderr
    if shell == "bash":
        ask = "COMP_WORDS=(batchlab scenario check spot); COMP_CWORD=3; _batchlab_completion batchlab"
        told = subprocess.run(
            ["bash", "-c", f"{source}\n{ask}; echo ${{COMPREPLY[@]}}"], env=env, capture_output=True, text=True
        )
        assert told.stdout.split() == ["spot-wave"], told.stderr
