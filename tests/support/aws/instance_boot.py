"""An account whose instances are containers that boot with the stack's own user data.

LocalStack serves S3 and SQS. moto serves Secrets Manager, CloudWatch Logs, and ECR's sign-in. batchlab serves Auto
Scaling and the metadata service. The containers run systemd in a network without a route to other networks. Session
Manager is a stub whose plugin carries a connection into the container by `docker exec`.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.group_descriptions import GroupParameters
from batchlab.adapters.docker.engine import Engine
from batchlab.core import installation
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.deploy.release import SUFFIX, build_release, key_of, release_of
from tests.support.aws.account import REGION, STACK, Account, Sessions, laptop, made
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.emulators import LOCALSTACK, Server, free_port, localstack_python
from tests.support.docker.containers import DockerGrid, docker_grid, ensure_network
from tests.support.http_proxy import standing

IMAGE = os.environ.get("BATCHLAB_INSTANCE_IMAGE", "batchlab-offline/instance:trixie")
"""The default image is built by compose/offline/build.sh."""
LOG_GROUP = "/batchlab/try"
USER_DATA = installation.folder("backends") / "aws" / "userdata.sh"

POOL = Pool("default", 0, 1, 2, boot_s=240.0, instance_type="m7i.large")

_HASTY = r"""
mkdir -p /var/lib/batchlab
printf "[manager]\ntick_s = 1\nidle_s = 20\n" > /var/lib/batchlab/settings.toml
"""
"""Commands that the manager's instance runs before the user data of the stack. The tests do not pay for time or
requests, so the manager uses short intervals. With the default idle time of 60 s, a third of the tests would wait."""

_PLUGIN = """\
#!{python}
import json, socket, subprocess, sys, threading

wanted = json.loads(sys.argv[5])
local = int(wanted["Parameters"]["localPortNumber"][0])
there = int(wanted["Parameters"]["portNumber"][0])
carry = '''
import os, socket, sys, threading
far = socket.create_connection(("127.0.0.1", %d))
def back():
    while data := far.recv(65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 65536):
    far.sendall(data)
far.shutdown(socket.SHUT_WR)
threading.Event().wait(30)
''' % there
command = ["docker", "exec", "-i", "batchlab-{grid}-" + wanted["Target"], "python3", "-c", carry]

def serve(near):
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as far:
        def forth():
            while data := near.recv(65536):
                far.stdin.write(data)
                far.stdin.flush()
            far.stdin.close()
        threading.Thread(target=forth, daemon=True).start()
        while data := far.stdout.read1(65536):
            near.sendall(data)
    near.shutdown(socket.SHUT_RDWR)

with socket.create_server(("127.0.0.1", local)) as listener:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=serve, args=(near,), daemon=True).start()
"""


def need_instances() -> str:
    """Return the Python version of the instance image. If the image does not exist, skip the test, or fail in CI."""
    found = _python_of_image()
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"CI promises the image {IMAGE}")
        pytest.skip(f"There is no image {IMAGE}: compose/offline/build.sh makes it.")
    return found


@cache
def _python_of_image() -> str:
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    command = ["docker", "run", "--rm", "--network", "none", IMAGE, "python3", "-c", ask]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def instance_release(factory: pytest.TempPathFactory) -> Path:
    """Build the release of this checkout for the instance image, once for all processes of a test run. If the build is
    not possible, skip the test or fail."""
    python = need_instances()
    place = folder_of_run(factory)
    folder = place / "instance-release"
    # A killed process releases the lock, and its unfinished archive has a different name.
    with (place / "instance-release.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            try:
                build_release(factory.mktemp("release"), python=python).parent.rename(folder)
            except BackendError as error:
                if os.environ.get("CI"):
                    raise
                pytest.skip(f"no release can be made here: {error}")
    (archive,) = folder.glob(f"*{SUFFIX}")
    return archive


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all processes of a test run share."""
    place = factory.getbasetemp()
    return place.parent if os.environ.get("PYTEST_XDIST_WORKER") else place


def rendered(**variables: str) -> str:
    """Return the user data as CloudFormation's Fn::Sub renders it. Fail if a variable does not have a value."""

    def value(found: re.Match[str]) -> str:
        return variables[found[1].replace("::", "_")]

    return re.sub(r"\$\{([^!}][^}]*)\}", value, USER_DATA.read_text())


@dataclass
class Fleet:
    """An account whose instances are containers, with functions to inspect each instance."""

    account: Account
    grid: DockerGrid
    release: str
    env: Mapping[str, str]
    """The environment variables that point an instance at the emulators."""
    templates: dict[str, str] = field(default_factory=dict)

    def pool(self, pool: Pool, size: int = 0, **changes: str) -> str:
        """Create a pool's group and its launch template, and return the group's name. `changes` replace variables of
        the user data, or the `image`."""
        group = f"{STACK}-pool-{pool.name}"
        self.template(group, "worker", pool.slots, **changes)
        form = GroupParameters(group, zones=(f"{REGION}a",))
        scaling = self.account.aws("autoscaling")
        scaling.create_auto_scaling_group(**form.request(group, pool))
        if size:
            self.resize(group, size)
        return group

    def template(self, group: str, role: str, slots: int, **changes: str) -> None:
        """Create the launch template of a group."""
        at = self.account.at
        image = changes.pop("image", IMAGE)
        variables = {
            "Role": role,
            "Group": group,
            "AWS_StackName": STACK,
            "AWS_Region": REGION,
            "Bucket": at.bucket,
            "Release": self.release,
            "LogGroup": LOG_GROUP,
            "ContainerImage": "",
            "OwnImage": "",
            "Gpus": "0",
            "Deployment": json.dumps(at.document()),
        }
        script = rendered(**{**variables, **changes})
        if role == "manager":
            hasty = script.replace("\numask 022\n", f"\numask 022\n{_HASTY}", 1)
            assert hasty != script, "or the manager takes its time"
            script = hasty
        text = script.encode()
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.env.items())
        self.templates[group] = f"""
[[{json.dumps(group)}.version]]
system = true
image = {json.dumps(image)}
network = {json.dumps(self.grid.id)}
type = "m7i.large"
slots = {slots}
role = {{ name = "{role}", access_key = "test", secret_key = "test" }}
env = {{ {table} }}
user_data = "{base64.b64encode(text).decode()}"
"""
        path = templates_in(self.account.folder)
        fresh = path.with_name("fresh")
        fresh.write_text("".join(self.templates.values()))
        fresh.replace(path)

    def resize(self, group: str, size: int) -> None:
        self.account.aws("autoscaling").set_desired_capacity(AutoScalingGroupName=group, DesiredCapacity=size)

    def run(self, instance: str, *command: str) -> str:
        """Run a command in an instance, and return its output."""
        done = subprocess.run(
            ["docker", "exec", self.grid.name(instance), *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + done.stderr

    def is_active(self, instance: str, role: str) -> bool:
        """Return whether the service of a role runs in the instance."""
        return self.run(instance, "systemctl", "is-active", f"batchlab-{role}") == "active\n"

    def instances(self, group: str) -> dict[str, str]:
        """Return the lifecycle state of each instance of a group."""
        found = self.account.group(group)["Instances"]
        return {one["InstanceId"]: one["LifecycleState"] for one in found}

    def activities(self, group: str) -> list[dict[str, Any]]:
        """Return the scaling activities of a group, newest first."""
        answer = self.account.aws("autoscaling").describe_scaling_activities(AutoScalingGroupName=group)
        return list(answer["Activities"])

    def logged(self) -> str:
        """Return everything that instances have written to the log group."""
        logs = aws(Endpoint(self.env["AWS_ENDPOINT_URL_CLOUDWATCH_LOGS"], REGION), "logs")
        found = logs.filter_log_events(logGroupName=LOG_GROUP)["events"]
        return "\n".join(one["message"] for one in found)


def templates_in(folder: Path) -> Path:
    return folder / "templates.toml"


@contextmanager
def fleet(folder: Path, archive: Path) -> Iterator[Fleet]:
    """Create the account in `folder` with that release, start the manager's instance, and remove everything on exit."""
    need_instances()
    python = localstack_python()
    sessions = Sessions()
    with docker_grid(folder / "docker") as grid:
        with Engine() as engine:
            here = ensure_network(engine, grid.id, grid.labels, internal=True)
        storage = _localstack(python, here, folder / "localstack")
        others = _moto(here, folder / "moto")
        try:
            storage.start()
            others.start()
            with standing(sessions) as session_manager, auto_scaling(folder, grid, here) as env:
                env["AWS_ENDPOINT_URL"] = str(storage.endpoint.url)
                for name in ("SECRETS_MANAGER", "CLOUDWATCH_LOGS", "ECR"):
                    env[f"AWS_ENDPOINT_URL_{name}"] = str(others.endpoint.url)
                install_plugin(folder / "bin", grid)
                owner = laptop(folder, {**env, "AWS_ENDPOINT_URL_SSM": session_manager})
                del owner["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
                at = made(storage.endpoint, others.endpoint)
                at = replace(at, log_group=LOG_GROUP, pools=(POOL,))
                account = Account(at, owner, folder, sessions.targets, 0)
                yield _ready(account, grid, archive, env)
        finally:
            storage.kill()
            others.kill()


def _ready(account: Account, grid: DockerGrid, archive: Path, env: Mapping[str, str]) -> Fleet:
    there = Fleet(account, grid, release_of(archive), env)
    logs = aws(Endpoint(env["AWS_ENDPOINT_URL_CLOUDWATCH_LOGS"], REGION), "logs")
    logs.create_log_group(logGroupName=LOG_GROUP)
    with archive.open("rb") as body:
        key = key_of(there.release)
        account.aws("s3").put_object(Bucket=account.at.bucket, Key=key, Body=body)
    there.pool(POOL)
    there.template(account.at.manager_group, "manager", 1)
    account.aws("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName=account.at.manager_group,
        LaunchTemplate={"LaunchTemplateName": account.at.manager_group},
        MinSize=1,
        MaxSize=1,
        DesiredCapacity=1,
        AvailabilityZones=[f"{REGION}a"],
    )
    return there


@contextmanager
def auto_scaling(folder: Path, grid: DockerGrid, here: str) -> Iterator[dict[str, str]]:
    """Run Auto Scaling and the metadata service, and return the environment variables with their addresses."""
    port, metadata_port = free_port(), free_port()
    url = f"http://{here}:{port}"
    templates_in(folder).write_text("")
    argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--launcher", "docker"]
    argv += ["--host", here, "--port", str(port), "--metadata-port", str(metadata_port)]
    argv += ["--state", str(folder / "asg"), "--templates", str(templates_in(folder))]
    argv += ["--grid", grid.id, "--drain", "60"]
    with (folder / "asg.log").open("wb") as log:
        serving = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert serving.stdout
        assert serving.stdout.readline().strip() == url
        yield {
            "AWS_ENDPOINT_URL_AUTO_SCALING": url,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{here}:{metadata_port}",
        }
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=120)


def install_plugin(folder: Path, grid: DockerGrid) -> None:
    folder.mkdir(parents=True)
    plugin = folder / "session-manager-plugin"
    plugin.write_text(_PLUGIN.replace("{python}", sys.executable).replace("{grid}", grid.id))
    plugin.chmod(0o755)


def _localstack(python: str, here: str, folder: Path) -> Server:
    """Start LocalStack on an address that containers can reach. LocalStack uses the same address in queue URLs."""
    port = free_port()
    address = f"{here}:{port}"
    env = {**LOCALSTACK, "GATEWAY_LISTEN": address, "LOCALSTACK_HOST": address}
    return Server([python, "-m", "localstack.runtime.main"], folder, port=port, env=env, host=here)


def _moto(here: str, folder: Path) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", here, "-p", str(port)]
    return Server(command, folder, port=port, host=here)
