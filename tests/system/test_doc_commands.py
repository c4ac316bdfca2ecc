"""The commands in the docs, each of which a test runs.

`test_doc_pages.py` runs the commands of pages that a reader follows from beginning to end. The module
test_doc_commands.py runs the commands of all other pages, with shorter durations and example values if a page needs
them. The module lists the commands that another test runs, and the commands that need an AWS account.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.adapters.local.ministack import VERSION
from batchlab.runtime import manager_process
from batchlab.runtime.home import Home
from tests.support import ROOT, doc_commands, doc_pages
from tests.support import doc_commands_table as table
from tests.support.doc_commands import Shell
from tests.support.grid.local_grid import processes_of
from tests.support.waiting import until
from tests.system.test_asg_serve import Server
from tests.system.test_doc_pages import RUN
from tests.system.test_real_clients import client

JOB = """\
name: job
input: {files: items.jsonl, split: items}
stages:
  - {name: parse, python: "work:parse", retry: 1}
  - {name: price, python: "work:price", retry: 1}
"""
WORK = """\
def parse(item, ctx):
    print("looks at", item)
    if item in (3, 7, 8, 9):
        raise ValueError("too much")
    return item

def price(item, ctx):
    if item == 0:
        raise ValueError("nothing")
    return item
"""
NOTIFY = """\
[ops]
command = ["true"]
"""
TOLD = {command for _, command in doc_commands.written()}
PGREP = "pgrep -af"
PEAK = """\
name: peak
about: A small one, to try commands with.
seed: 3
jobs:
  claims: {tasks: 4, task: 30s}
arrivals:
  - {job: claims, at: [0m, 1m]}
pools:
  default: {min: 0, max: 2, slots: 1, boot: 30s, instance_type: m7i.large}
expect:
  lost: 0
"""
PRICES = """\
region,instance_type,linux_on_demand_usd_per_hour
us-east-1,m7i.large,0.1008
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """Return a shell in a folder with the files that the pages expect, and remove the grid afterwards."""
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "items.jsonl").write_text("".join(f"{n}\n" for n in range(10)))
    (tmp_path / "prices.csv").write_text(PRICES)
    (tmp_path / "ci").mkdir()
    for name in ("peak.yaml", "evening.yaml", "ci/month-end.yaml"):
        (tmp_path / name).write_text(PEAK)
    home = Home(tmp_path / ".batchlab")
    yield Shell(tmp_path, monkeypatch)
    manager_process.stop_manager(home)
    until(lambda: not processes_of(home.path), 10)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def newest(shell: Shell, name: str) -> list[str]:
    """Return the jobs of this name, newest first."""
    listed = json.loads(shell.run(["batchlab", "job", "list", "--json"])[1])
    return [one["id"] for one in listed if one["name"] == name]


def test_commands_with_a_standing_grid(shell: Shell) -> None:
    shell.follow(table.FIRST)
    Home(shell.folder / ".batchlab").notify_file.write_text(NOTIFY)
    shell.follow(table.STANDING, port=free_port())
    job, earlier = newest(shell, "job")
    failed = json.loads(shell.run(["batchlab", "job", "failures", job, "--json"])[1])
    (fingerprint,) = {one["fingerprint"] for one in failed if one["stage"] == "parse"}
    (shell.folder / "corrected.csv").write_text("1\n")
    shell.follow(table.FAILURES, job=job, fingerprint=fingerprint)
    shell.follow(table.REPORTS, job=job, earlier=earlier)
    shell.follow(table.SCHEDULES)


def test_commands_for_prices_forecasts_and_plans(shell: Shell) -> None:
    shell.follow(table.PRICES_AND_PEAKS)
    shell.follow(table.COMPARED)


def test_commands_for_random_worlds(shell: Shell) -> None:
    shell.follow(table.SIMULATED)


def test_commands_for_an_auto_scaling_endpoint(tmp_path: Path) -> None:
    """The test runs the commands of the page with its templates, and sends a notice to a Spot instance."""
    program = client("BATCHLAB_AWSCLI", "aws")
    page = (ROOT / "docs" / "asg-endpoint.md").read_text()
    (templates,) = re.findall(r"^```toml\n(# templates\.toml\n.*?)^```", page, re.S | re.M)
    (block,) = (one for one in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M) if PGREP in one)
    wait = f"until [ $({PGREP}c 'sleep 1000') -ge 3 ]; do sleep 0.1; done"
    block = block.replace(PGREP, f"{wait}; {PGREP}")
    server = Server(tmp_path, templates=f'{templates}market = "spot"\n')
    try:
        server.start()
        block = block.replace("http://127.0.0.1:4580", server.url)
        said = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env={"PATH": f"{Path(program).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        assert not said.returncode, said.stderr
        assert said.stdout.count("Launching a new EC2 instance") >= 3, said.stdout
        instance = next(iter(server.pids()))
        asked = ["asg", "interrupt", instance, "--notice", "30", "--endpoint", server.url]
        given = subprocess.run([sys.executable, "-m", "batchlab", *asked], capture_output=True, text=True)
        assert (given.returncode, given.stderr) == (0, f"The notice was sent to {instance}.\n")
    finally:
        if server.process is not None and server.process.poll() is None:
            server.end(signal.SIGTERM)


def test_completion_is_installed_for_the_current_shell(tmp_path: Path) -> None:
    reader = doc_pages.Reader(tmp_path)
    code, said = reader.run(f"export HOME={tmp_path}\nbatchlab --install-completion\ntrue")
    assert code == 0, said
    assert "batchlab" in (tmp_path / ".bashrc").read_text()


# --- All commands --------------------------------------------------------------------------------


def followed() -> set[str]:
    """Return the commands of pages that test_doc_pages.py follows."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / page for page in RUN)]
    return {
        command
        for page in pages
        for step in doc_pages.steps(page.read_text())
        if not step.file and not step.not_run
        for command in doc_commands.commands(step.text)
    }


def whole() -> set[str]:
    found: set[str] = set()
    parts = [("docs/asg-endpoint.md", "Try it"), *(tuple(one.split(" ## ")) for one in table.WHOLE)]
    for page, *part in parts:
        text = (ROOT / page).read_text()
        if part:
            text = text.partition(f"\n## {part[0]}")[2].partition("\n## ")[0]
        found |= {
            command
            for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
            for command in doc_commands.commands(block)
        }
    return found


def test_no_command_is_left_out() -> None:
    """A new command in a page fails this test until a test runs it, or until doc_commands_table.py names a test
    for it."""
    given = {one for script in table.HERE for line in doc_commands.lines(script) for one in line.told}
    listed = {*given, *table.ELSEWHERE, *table.DEVELOPERS, *table.IN_TESTS}
    left = TOLD - followed() - listed - whole()
    assert not [one for one in left if not table.NEEDS_ACCOUNT.match(one)], "no test gives these"
    assert not listed - TOLD, "no page has these any more"


@pytest.mark.parametrize("where", sorted({*table.ELSEWHERE.values(), *table.WHOLE.values()}))
def test_named_commands_exist(where: str) -> None:
    file, _, name = where.partition(" ")
    assert re.search(rf"\b{name}", (ROOT / file).read_text()), where


@pytest.mark.parametrize("command", [one for one in table.DEVELOPERS if one in TOLD])
def test_developer_pages_name_existing_code(command: str) -> None:
    command = re.sub(r"-m benchmarks\.(\w+)", r"benchmarks/\1/__main__.py", command)
    for path in re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", command):
        assert (ROOT / path).is_file(), path
        for option in re.findall(r" (--\w+)", command):
            files = [ROOT / path, ROOT / "benchmarks" / "measured.py"]
            assert any(f'"{option}"' in file.read_text() for file in files), option
    for variable in re.findall(r"\bBATCHLAB_\w+", command):
        assert [
            one
            for folder in ("tests", "batchlab", "benchmarks")
            for one in (ROOT / folder).rglob("*.py")
            if variable in one.read_text() and one != Path(__file__)
        ], variable
    for version in re.findall(r"ministack==([\d.]+)", command):
        assert version == VERSION
