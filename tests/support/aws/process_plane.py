"""An account in which `batchlab deploy` creates the shipped stack, and processes are its instances.

MiniStack serves all services of the stack. MiniStack's Auto Scaling groups do not start instances, so batchlab's own
endpoint mirrors each group, with a process for each instance. EC2 ends these processes through a stub, and Session
Manager is a stub. Unlike the instances of `control_plane`, the processes run the batchlab of the tests, and do not
install a release.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from batchlab.deploy.stack_records import state_of
from batchlab.deploy.status import deployment_of
from batchlab.runtime import aws_deployment
from batchlab.runtime.home import Home
from tests.support.aws import instance_boot
from tests.support.aws.account import Account, Sessions, install_plugin, laptop
from tests.support.aws.control_plane import REGION, ControlPlane, mirrored
from tests.support.aws.ec2_stub import Machines
from tests.support.aws.emulators import free_port
from tests.support.aws.ministack import served
from tests.support.docker.containers import DockerGrid
from tests.support.http_proxy import Answer, Request, forward, standing

SETTINGS = "[manager]\ntick_s = 1\nlease_ttl_s = 6\nidle_s = 2\n"
"""The tests do not pay for requests, so the manager uses short intervals to avoid waiting."""
VISIBILITY_S = 10.0

_REFUSED = Answer(
    403,
    [("Content-Type", "text/xml")],
    b"<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>You are not authorized to perform this "
    b"operation.</Message></Error></Errors><RequestID>0</RequestID></Response>",
)


@dataclass
class Ec2:
    """EC2's calls for instances, and MiniStack for all other calls. With `refuses`, a termination is not allowed."""

    machines: Machines
    ministack: str
    refuses: bool = False

    def answer(self, request: Request) -> Answer:
        asked = dict(parse_qsl(request.body.decode()))
        names = [key for key in asked if key.startswith("InstanceId.")]
        if self.refuses and asked.get("Action") == "TerminateInstances":
            return _REFUSED
        return self.machines.answer(request) if names else forward(self.ministack, request)


@dataclass
class ProcessPlane(ControlPlane):
    """An emulated control plane with processes as instances. `broken` is the command of the manager's instances in
    place of a manager."""

    port: int = 0
    ec2: Ec2 | None = None
    broken: list[str] = field(default_factory=list)

    def left(self) -> dict[str, list[str]]:
        """Return the names of all resources in the account that a rehearsal can create."""
        queues = self.aws("sqs").list_queues().get("QueueUrls", [])
        tagged = self.aws("resourcegroupstaggingapi").get_resources()["ResourceTagMappingList"]
        stacks = self.aws("cloudformation").describe_stacks()["Stacks"]
        found = {
            "stacks": [one["StackName"] for one in stacks if one["StackStatus"] != "DELETE_COMPLETE"],
            "queues": [url.rpartition("/")[2] for url in queues],
            "buckets": [one["Name"] for one in self.aws("s3").list_buckets()["Buckets"]],
            "roles": [one["RoleName"] for one in self.aws("iam").list_roles()["Roles"]],
            "secrets": [one["Name"] for one in self.aws("secretsmanager").list_secrets()["SecretList"]],
            "tagged": [one["ResourceARN"] for one in tagged],
            "groups": list(self.groups()),
        }
        return {kind: names for kind, names in found.items() if names}

    def _described(self, stack: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
        deployment = deployment_of(state_of(stack), REGION)
        for role in ("manager", "worker"):
            aws_deployment.write(Home(self.folder / role), deployment)
        return super()._described(stack)

    def _request(self, name: str, one: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
        request = super()._request(name, one, sizes)
        hooks = request["LifecycleHookSpecificationList"]
        # A process does not have a metadata service, so it cannot complete a hook on termination.
        starting = [hook for hook in hooks if hook["LifecycleTransition"].endswith("LAUNCHING")]
        return {**request, "LifecycleHookSpecificationList": starting}

    def _launch_template(self, name: str, slots: str) -> str:
        there = Account(cast(Any, None), self.env, self.folder, [], self.port)
        if "-pool-" in name:
            command = there.hasty_worker(VISIBILITY_S)
        else:
            ours = [sys.executable, "-P", "-m", "batchlab", "manager", "--backend", "aws"]
            command = self.broken or [*ours, "--home", str(self.folder / "manager"), "--port", str(self.port)]
        return f'[[{name}.version]]\ntype = "m7i.large"\nslots = {slots}\ncommand = {json.dumps(command)}\nenv = {{}}\n'


@contextmanager
def process_plane(folder: Path, stack: str) -> Iterator[ProcessPlane]:
    """Create the account in `folder`, whose groups follow the stack named `stack`, and remove the account on exit."""
    port, scaling = free_port(), f"http://127.0.0.1:{(scaling_port := free_port())}"
    Home(folder / "manager").make()
    Home(folder / "manager").settings_file.write_text(SETTINGS)
    instance_boot.templates_in(folder).write_text("")
    install_plugin(folder / "bin", port)
    ledger = aws_deployment.folder(Home(folder / "manager")) / "ledger.sqlite"
    with served(folder / "ministack") as ministack, standing(Sessions()) as session_manager:
        ec2 = Ec2(Machines(folder / "asg", f"{stack}-manager", ledger), ministack.url)
        with standing(ec2) as ec2_url:
            urls = {
                "AWS_ENDPOINT_URL": ministack.url,
                "AWS_ENDPOINT_URL_AUTO_SCALING": scaling,
                "AWS_ENDPOINT_URL_SSM": session_manager,
                "AWS_ENDPOINT_URL_EC2": ec2_url,
            }
            env = laptop(folder, {**urls, "AWS_DEFAULT_REGION": REGION})
            grid = cast(DockerGrid, None)
            plane = ProcessPlane(grid, folder, env, {}, ministack.url, stack, port=port, ec2=ec2)
            with _auto_scaling(plane, scaling_port), mirrored(plane):
                yield plane


@contextmanager
def _auto_scaling(plane: ProcessPlane, port: int) -> Iterator[None]:
    """Run the Auto Scaling endpoint, whose instances inherit its environment and end with it."""
    argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--port", str(port), "--drain", "10"]
    argv += ["--state", str(plane.folder / "asg"), "--templates", str(instance_boot.templates_in(plane.folder))]
    with (plane.folder / "asg.log").open("wb") as log:
        serving = subprocess.Popen(argv, env={**os.environ, **plane.env}, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert serving.stdout
        assert serving.stdout.readline().strip() == plane.env["AWS_ENDPOINT_URL_AUTO_SCALING"]
        yield
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)
