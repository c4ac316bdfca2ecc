"""`batchlab asg serve` with processes as instances, called by boto3 and the AWS CLI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.core.operating_system.processes import start_mark
from tests.support.aws.autoscaling_api import autoscaling, refused
from tests.support.waiting import until
from tests.system.test_real_clients import client

T = TypeVar("T")

TEMPLATES = """\
[worker]
[[worker.version]]
type = "m7i.large"
slots = 3
env = { GREETING = "hello" }
command = ["/bin/sh", "-c", '''
echo "$GREETING $BATCHLAB_INSTANCE of {group}: {instance}, {slots} slots"
trap 'echo bye; exit 0' TERM
while :; do sleep 0.05; done
''']
"""
NAME = "workers"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "opensesame"}


@dataclass
class Server:
    """The command `batchlab asg serve` on one folder, which a test may start repeatedly."""

    folder: Path
    options: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    url: str = ""
    templates: str = TEMPLATES

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def command(self) -> list[str]:
        (self.folder / "templates.toml").write_text(self.templates)
        argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--state", str(self.state)]
        return [*argv, "--templates", str(self.folder / "templates.toml"), *self.options]

    def start(self) -> None:
        """Start the command, and wait until it has printed its URL."""
        self.process = subprocess.Popen(
            self.command(), env={**os.environ, **self.env}, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url

    def end(self, number: int) -> int:
        """Send the signal, and return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode

    def pids(self) -> dict[str, int]:
        """Return the pids of the running instances, by instance."""
        records = [json.loads(p.read_text()) for p in self.state.glob("instances/*.json")]
        return {
            record["instance"]: record["pid"]
            for record in records
            if record["pid"] and start_mark(record["pid"]) == record["start_ticks"]
        }

    def log(self, instance: str) -> str:
        return (self.state / "logs" / f"{instance}.log").read_text()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.end(signal.SIGTERM)
        for pid in server.pids().values():
            os.killpg(pid, signal.SIGKILL)


def create(asg: Any, desired: int) -> None:
    asg.create_auto_scaling_group(
        AutoScalingGroupName=NAME,
        MinSize=0,
        MaxSize=4,
        DesiredCapacity=desired,
        AvailabilityZones=["us-east-1a"],
        LaunchTemplate={"LaunchTemplateName": "worker"},
    )


def in_service(asg: Any) -> list[str]:
    (group,) = asg.describe_auto_scaling_groups(AutoScalingGroupNames=[NAME])["AutoScalingGroups"]
    return [i["InstanceId"] for i in group["Instances"] if i["LifecycleState"] == "InService"]


def test_the_aws_cli_makes_processes_appear_and_vanish(server: Server) -> None:
    program = client("BATCHLAB_AWSCLI", "aws")
    server.start()

    def aws(*argv: str) -> Any:
        done = subprocess.run(
            [program, "--endpoint-url", server.url, "autoscaling", *argv],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(server.folder),
                "AWS_PAGER": "",
                "AWS_DEFAULT_REGION": "eu-central-1",
                **KEYS,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout and json.loads(done.stdout), done.stderr

    named = ("--auto-scaling-group-name", NAME)
    template = ("--launch-template", "LaunchTemplateName=worker")
    sizes = ("--min-size", "0", "--max-size", "4", "--availability-zones", "eu-central-1a")
    tags = ("--tags", "Key=team,Value=blue,PropagateAtLaunch=true")
    assert aws("create-auto-scaling-group", *named, *sizes, *template, *tags) == (0, "", "")
    assert server.pids() == {}

    assert aws("set-desired-capacity", *named, "--desired-capacity", "3")[0] == 0
    until(lambda: len(server.pids()) == 3, 10.0)
    group = aws("describe-auto-scaling-groups")[1]["AutoScalingGroups"][0]
    assert sorted(i["InstanceId"] for i in group["Instances"]) == sorted(server.pids())
    assert group["Tags"][0]["Value"] == "blue"
    instance = group["Instances"][0]["InstanceId"]
    told = f"hello {instance} of {NAME}: {instance}, 3 slots\n"
    assert until(lambda: server.log(instance), 10.0) == told

    code, _, error = aws("set-desired-capacity", *named, "--desired-capacity", "5")
    assert code != 0
    assert "(ValidationError)" in error
    assert "above max value 4" in error

    assert aws("set-desired-capacity", *named, "--desired-capacity", "0")[0] == 0
    until(lambda: not server.pids(), 10.0)
    assert server.log(instance) == told + "bye\n"
    activities = aws("describe-scaling-activities", *named, "--max-items", "2")[1]["Activities"]
    assert [activity["Description"].partition(":")[0] for activity in activities] == ["Terminating EC2 instance"] * 2


def test_a_server_that_is_killed_leaves_its_instances_to_the_next(server: Server) -> None:
    server.start()
    asg = autoscaling(Endpoint(server.url))
    create(asg, 2)
    until(lambda: len(in_service(asg)) == 2, 10.0)
    before = server.pids()
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    assert server.pids() == before
    server.start()
    asg = autoscaling(Endpoint(server.url))
    assert sorted(in_service(asg)) == sorted(before)
    asg.set_desired_capacity(AutoScalingGroupName=NAME, DesiredCapacity=3)
    until(lambda: len(server.pids()) == 3, 10.0)
    assert before.items() <= server.pids().items()


def test_instances_end_with_the_server(server: Server) -> None:
    server.start()
    asg = autoscaling(Endpoint(server.url))
    create(asg, 2)
    until(lambda: all(server.log(name) for name in server.pids()) and len(server.pids()) == 2, 10.0)
    instances = list(server.pids())
    assert server.end(signal.SIGTERM) == 0
    assert server.pids() == {}
    assert all(server.log(name).endswith("bye\n") for name in instances)


def test_one_server_for_one_folder(server: Server) -> None:
    server.start()
    second = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "Another `batchlab asg serve` uses the folder" in second.stderr


def test_keys_are_required_on_request(server: Server) -> None:
    server.options, server.env = ("--signed",), KEYS
    server.start()
    access_key, secret_key = KEYS.values()
    known = autoscaling(Endpoint(server.url, "eu-west-1", access_key, secret_key))
    assert known.describe_auto_scaling_groups()["AutoScalingGroups"] == []
    with refused("SignatureDoesNotMatch"):
        autoscaling(Endpoint(server.url, "eu-west-1", access_key, "x")).describe_tags()
    with refused("InvalidClientTokenId"):
        autoscaling(Endpoint(server.url)).describe_tags()


def test_invalid_templates_are_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "templates.toml"
    argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--state", str(tmp_path / "state")]
    done = subprocess.run([*argv, "--templates", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {file} cannot be read: No such file or directory.\n  Name an existing file that can be read.\n"
    )
