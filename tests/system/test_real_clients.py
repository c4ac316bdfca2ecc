"""Independent programs that read a grid on `ministack`: the AWS CLI and s3cmd.

The addresses and keys are those that `batchlab grid env` prints, as docs/backends.md tells users.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.aws.emulators import ministack_python
from tests.system.test_command_line import Cli

MINISTACK = ("--backend", "ministack")
TASKS = 6
WORK = """\
def triple(item, ctx):
    content = bytes(range(256)) * 300 + str(item).encode()
    return {"number": item * 3, "file": ctx.save(content, f"{item}.bin")}
"""
JOB = """\
name: seen
input: {files: items.jsonl, split: items}
stages:
  - {name: triple, python: work:triple}
"""


def client(variable: str, name: str) -> str:
    """Return the program that the environment variable or `name` names. If it is not installed, skip the test, or fail
    in CI."""
    program = os.environ.get(variable) or shutil.which(name)
    if program:
        return program
    if os.environ.get("CI"):
        pytest.fail(f"CI promises {name}, but {variable} is not set")
    pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def aws() -> str:
    return client("BATCHLAB_AWSCLI", "aws")


@pytest.fixture(scope="session")
def s3cmd() -> str:
    return client("BATCHLAB_S3CMD", "s3cmd")


class Seen:
    """A running grid with a finished job, and the output of `grid env`."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        code, out, err = cli("grid", "env")
        assert code == 0, err
        self.env = {name: value.strip("'") for name, value in re.findall(r"^export (\w+)=(.*)$", out, re.MULTILINE)}
        self.bucket = self.env["BATCHLAB_BUCKET"]

    def run(self, *argv: str) -> bytes:
        """Run a program with the environment of `grid env` and without the user's own, and return its output."""
        nobody = {"PATH": os.environ["PATH"], "HOME": str(self.cli.folder), "AWS_PAGER": ""}
        here = {"BATCHLAB_HOME": str(self.cli.home.path)}
        done = subprocess.run(argv, cwd=self.cli.folder, env=nobody | here | self.env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    ministack_python()
    cli = Cli(tmp_path_factory.mktemp("seen"))
    (cli.folder / "work.py").write_text(WORK)
    (cli.folder / "items.jsonl").write_text("".join(f"{n}\n" for n in range(TASKS)))
    (cli.folder / "seen.yaml").write_text(JOB)
    try:
        code, _, err = cli("grid", "up", *MINISTACK)
        assert code == 0, err
        code, _, err = cli("run", "seen.yaml", *MINISTACK, "--out", "ran")
        assert code == 0, err
        yield Seen(cli)
    finally:
        cli("grid", "down")
    cli.none_left()


def test_the_aws_cli_lists_the_bucket_and_reads_an_outcome(aws: str, seen: Seen) -> None:
    listing = seen.run(aws, "s3", "ls", "--recursive", f"s3://{seen.bucket}/jobs/").decode()
    keys = [line.split()[3] for line in listing.splitlines()]
    committed = [key for key in keys if "/outcomes/" in key]
    printed = seen.run(aws, "s3", "cp", f"s3://{seen.bucket}/{committed[0]}", "-")
    copied = seen.cli.folder / "copied"
    only = ("--exclude", "*", "--include", "*/outcomes/*")
    seen.run(aws, "s3", "cp", "--recursive", *only, f"s3://{seen.bucket}/", str(copied))
    assert printed == (copied / committed[0]).read_bytes()
    values: dict[int, object] = {}
    for key in committed:
        outcome = json.loads((copied / key).read_bytes())
        tasks = [t for start, stop in outcome["succeeded"] for t in range(start, stop)]
        values |= zip(tasks, (value["number"] for value in outcome["values"]), strict=True)
    assert values == {task: task * 3 for task in range(TASKS)}


def test_the_aws_cli_reads_the_attributes_of_a_queue(aws: str, seen: Seen) -> None:
    def sqs(*argv: str) -> dict[str, object]:
        # Version 1 of the AWS CLI ignores AWS_ENDPOINT_URL here.
        at = ("--endpoint-url", seen.env["AWS_ENDPOINT_URL"], "--output", "json")
        answer: dict[str, object] = json.loads(seen.run(aws, *at, "sqs", *argv))
        return answer

    prefix = seen.env["BATCHLAB_QUEUES"]
    listed = sqs("list-queues", "--queue-name-prefix", prefix)["QueueUrls"]
    assert isinstance(listed, list)
    assert {url.rpartition(prefix)[2] for url in listed} >= {"events", "tasks-default"}
    url = sqs("get-queue-url", "--queue-name", f"{prefix}tasks-default")["QueueUrl"]
    attributes = sqs("get-queue-attributes", "--queue-url", str(url), "--attribute-names", "All")["Attributes"]
    assert isinstance(attributes, Mapping)
    assert attributes["VisibilityTimeout"] == "6", "as backends/ministack says"
    assert attributes["ApproximateNumberOfMessages"] == "0", "the job has ended"
    redrive = json.loads(attributes["RedrivePolicy"])
    assert redrive["deadLetterTargetArn"].endswith(f"{prefix}tasks-default-dead")


def test_s3cmd_fetches_what_job_results_gives(s3cmd: str, seen: Seen, tmp_path: Path) -> None:
    address = seen.env["AWS_ENDPOINT_URL"].removeprefix("http://")
    s3 = [
        s3cmd,
        "--config=/dev/null",
        "--no-ssl",
        f"--host={address}",
        f"--host-bucket={address}",
        f"--access_key={seen.env['AWS_ACCESS_KEY_ID']}",
        f"--secret_key={seen.env['AWS_SECRET_ACCESS_KEY']}",
    ]
    code, _, err = seen.cli("job", "results", "last", "--out", "mine")
    assert code == 0, err
    ours = {file.name: file for file in (seen.cli.folder / "mine" / "files").rglob("*.bin")}
    assert len(ours) == TASKS
    listing = seen.run(*s3, "ls", "--recursive", f"s3://{seen.bucket}/files/").decode()
    theirs = [line.split()[3] for line in listing.splitlines()]
    assert len(theirs) == TASKS
    for url in theirs:
        file = tmp_path / url.rpartition("/")[2]
        seen.run(*s3, "get", url, str(file))
        assert file.read_bytes() == ours[file.name].read_bytes()


def test_the_commands_of_the_docs_work(aws: str, s3cmd: str, seen: Seen) -> None:
    """The test runs the commands under "The AWS CLI, s3cmd and other clients" in order, in one shell."""
    text = (ROOT / "docs" / "backends.md").read_text()
    section = text.partition("\n## The AWS CLI")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    programs = [Path(sys.executable).parent, Path(aws).parent, Path(s3cmd).parent]
    printed = seen.run(
        "bash", "-euo", "pipefail", "-c", f"PATH={':'.join(map(str, programs))}:$PATH\n{''.join(blocks)}"
    ).decode()
    assert "PRE seen-" in printed, "the job, in the listing of the bucket"
    assert '"succeeded"' in printed, "an outcome"
    assert '"ApproximateNumberOfMessages": "0"' in printed
    fetched = (seen.cli.folder / "result").read_bytes()
    ran = (seen.cli.folder / "ran" / "files").rglob("*.bin")
    assert fetched in [file.read_bytes() for file in ran]
