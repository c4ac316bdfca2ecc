"""An AWS account with the state that the stack of `--backend aws` creates, on an emulated control plane.

An emulator serves S3 and SQS, and moto serves Secrets Manager. batchlab's own endpoint serves Auto Scaling, and its
instances are processes. Session Manager is a stub, with a program in place of AWS's plugin. The tests check the code of
the backend, which finds the services through environment variables.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.group_descriptions import GroupParameters
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.runtime import aws_deployment
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.emulators import free_port
from tests.support.aws.faulty_proxy import FaultyFront
from tests.support.http_proxy import Answer, Front, Request, standing

STACK = "batchlab-try"
REGION = "eu-central-1"
TOKEN = "a-token-that-only-the-secret-knows"
POOL = Pool("default", 0, 2, 2, boot_s=1.0, instance_type="m7i.large")

PLUGIN = """\
#!{python}
import json, os, socket, sys, threading

granted = json.loads(os.environ[sys.argv[1]])
assert granted["TokenValue"] == "granted", granted
wanted = json.loads(sys.argv[5])
local = int(wanted["Parameters"]["localPortNumber"][0])
assert wanted["Parameters"]["portNumber"] == ["8080"], wanted

def pump(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

with socket.create_server(("127.0.0.1", local)) as listener:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", {port}))
        except OSError:
            near.close()
            continue
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pump, args=pair, daemon=True).start()
"""

_HASTY = """\
import sys
from dataclasses import replace
from pathlib import Path
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.server.worker_service import worker_main

home, visibility_s, pool, slots, instance = sys.argv[1:]
aws = factory.load("aws")
worker_main(
    Home(Path(home)),
    replace(aws, worker=replace(aws.worker, visibility_s=float(visibility_s))),
    pool=pool,
    slots=int(slots),
    instance=instance,
)
"""


class Sessions:
    """A stub of Session Manager with StartSession only, which no emulator has. `targets` are the instances of the
    requested sessions."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def answer(self, request: Request) -> Answer:
        assert request.headers["X-Amz-Target"] == "AmazonSSM.StartSession"
        self.targets.append(json.loads(request.body)["Target"])
        granted = {"SessionId": "s-1", "TokenValue": "granted", "StreamUrl": "wss://127.0.0.1/"}
        kind = ("Content-Type", "application/x-amz-json-1.1")
        return Answer(200, [kind], json.dumps(granted).encode())


@dataclass
class Account:
    """An emulated account. `at` has the outputs of its stack. `env` has the environment variables that point a process
    at the account."""

    at: AwsDeployment
    env: dict[str, str]
    folder: Path
    sessions: list[str]
    port: int
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def aws(self, service: str) -> Any:
        """Return a boto3 client with the credentials of the account's owner."""
        there = "AWS_ENDPOINT_URL_AUTO_SCALING" if service == "autoscaling" else "AWS_ENDPOINT_URL"
        return aws(Endpoint(self.env[there], self.at.region), service)

    def group(self, name: str) -> Any:
        (found,) = self.aws("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name])[
            "AutoScalingGroups"
        ]
        return found

    def manager_pid(self) -> int:
        """Return the pid of the process that simulates the manager's instance."""
        home = Home(self.folder / "manager")
        record = home.record()
        return record.pid if record else 0

    def write_templates(self, worker: Sequence[str] = ()) -> Path:
        """Write the launch templates, which are read at every launch. If `worker` is given, instances of the pool run
        this command instead of a worker."""
        ours = [sys.executable, "-P", "-m", "batchlab"]
        aws = ["--backend", "aws"]
        at = (str(self.folder / "manager"), str(self.folder / "worker"))
        manager = [*ours, "manager", *aws, "--home", at[0], "--port", str(self.port)]
        pool = [*ours, "worker", *aws, "--home", at[1], "--pool", POOL.name]
        pool += ["--slots", "{slots}", "--instance", "{instance}"]
        lines: list[str] = []
        for role, name, command in (("manager", "manager", manager), ("worker", "pool-default", list(worker) or pool)):
            env = ", ".join(f"{k} = {json.dumps(v)}" for k, v in self.keys.get(role, {}).items())
            lines += [f"[[{self.at.prefix}{name}.version]]", 'type = "m7i.large"']
            lines += [f"slots = {POOL.slots}", f"command = {json.dumps(command)}"]
            lines += [f"env = {{ {env} }}"]
        templates = self.folder / "templates.toml"
        fresh = templates.with_suffix(".new")
        fresh.write_text("\n".join(lines))
        return fresh.replace(templates)

    def hasty_worker(self, visibility_s: float) -> list[str]:
        """Return the command of a worker with a short visibility timeout, for `write_templates`. The messages of a
        killed worker become visible again after `visibility_s` instead of AWS's 60 s."""
        words = [sys.executable, "-P", "-c", _HASTY, str(self.folder / "worker")]
        return [*words, str(visibility_s), POOL.name, "{slots}", "{instance}"]

    def worker_pids(self) -> list[int]:
        """Return the pids of the processes that simulate the pool's instances."""
        records = [json.loads(p.read_text()) for p in self.folder.glob("asg/instances/*.json")]
        pool = f"{self.at.groups_prefix}{POOL.name}"
        return [record["pid"] for record in records if record["pool"] == pool and record["pid"] and not record["ended"]]

    def disconnect(self) -> None:
        """End the connection that a failed test has left open."""
        record = Home(self.folder / "laptop").record()
        if record:
            os.kill(record.pid, signal.SIGTERM)

    def home(self, name: str = "laptop") -> Home:
        """Return a home folder that is connected to the stack."""
        home = Home(self.folder / name)
        aws_deployment.write(home, self.at)
        return home


def laptop(folder: Path, urls: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the account's owner. `urls` are variables with the service addresses, and programs in
    the folder's `bin` precede all others on the path."""
    return {
        **urls,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }


@contextmanager
def account(
    storage: Endpoint, secrets: Endpoint, folder: Path, *, front: FaultyFront | None = None, settings: str = ""
) -> Iterator[Account]:
    """Create the account in `folder` with a running manager, and end both on exit. If `front` is given, the manager
    reaches Auto Scaling through it. `settings` is the content of the manager's settings.toml."""
    assert storage.url
    assert secrets.url
    urls = {"AWS_ENDPOINT_URL": storage.url, "AWS_ENDPOINT_URL_SECRETS_MANAGER": secrets.url}
    if settings:
        Home(folder / "manager").make()
        Home(folder / "manager").settings_file.write_text(settings)
    with opened(made(storage, secrets), urls, folder, front=front) as there:
        yield there


@contextmanager
def opened(
    at: AwsDeployment,
    urls: Mapping[str, str],
    folder: Path,
    *,
    front: Front | None = None,
    keys: Mapping[str, Mapping[str, str]] = {},
) -> Iterator[Account]:
    """Create an account from an existing bucket, queues, and secret at these URLs. `keys` are the credentials of
    "manager" and "worker" if each has a role of its own."""
    sessions = Sessions()
    with standing(sessions) as session_manager:
        port = free_port()
        install_plugin(folder / "bin", port)
        env = laptop(folder, {**urls, "AWS_ENDPOINT_URL_SSM": session_manager})
        there = Account(at, env, folder, sessions.targets, port, keys)
        for name in ("manager", "worker"):
            there.home(name)
        with _auto_scaling(there, front):
            _make_groups(there)
            try:
                yield there
            finally:
                there.disconnect()


def install_plugin(folder: Path, port: int) -> None:
    folder.mkdir(parents=True)
    plugin = folder / "session-manager-plugin"
    plugin.write_text(PLUGIN.format(python=sys.executable, port=port))
    plugin.chmod(0o755)


def made(storage: Endpoint, secrets: Endpoint) -> AwsDeployment:
    """Create the bucket, the queues, and the secret of the stack."""
    here = Endpoint(storage.url, REGION)
    bucket = f"{STACK}-{free_port()}"
    aws(here, "s3").create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    sqs = aws(here, "sqs")
    dead = f"{STACK}-{object_keys.dead_letters(POOL.name)}"
    for name in (dead, f"{STACK}-{object_keys.EVENTS}"):
        url = sqs.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "60"})["QueueUrl"]
        sqs.purge_queue(QueueUrl=url)
    url = sqs.get_queue_url(QueueName=dead)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]
    redrive = {"deadLetterTargetArn": arn["QueueArn"], "maxReceiveCount": 10}
    sqs.create_queue(
        QueueName=f"{STACK}-{object_keys.tasks_queue(POOL.name)}",
        Attributes={"VisibilityTimeout": "60", "RedrivePolicy": json.dumps(redrive)},
    )
    secret = aws(Endpoint(secrets.url, REGION), "secretsmanager").create_secret(
        Name=f"{bucket}/token", SecretString=TOKEN
    )
    return AwsDeployment(STACK, REGION, bucket, f"{STACK}-", f"{STACK}-manager", secret["ARN"], (POOL,))


@contextmanager
def _auto_scaling(there: Account, front: Front | None) -> Iterator[None]:
    """Run the Auto Scaling endpoint. Its instances get the account's environment, and end with the endpoint."""
    templates = there.write_templates()
    url = f"http://127.0.0.1:{(port := free_port())}"
    argv = [sys.executable, "-m", "batchlab", "asg", "serve", "--port", str(port)]
    argv += ["--state", str(there.folder / "asg"), "--templates", str(templates), "--drain", "10"]
    there.env["AWS_ENDPOINT_URL_AUTO_SCALING"] = url
    seen = url
    with ExitStack() as stack:
        if front:
            front.target = url
            seen = stack.enter_context(standing(front))
        env = {**os.environ, **there.env, "AWS_ENDPOINT_URL_AUTO_SCALING": seen}
        with _served(argv, env, url):
            yield


@contextmanager
def _served(argv: Sequence[str], env: Mapping[str, str], url: str) -> Iterator[None]:
    serving = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout
        assert serving.stdout.readline().strip() == url
        yield
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)


def _make_groups(there: Account) -> None:
    scaling = there.aws("autoscaling")
    zones = (f"{there.at.region}a",)
    prefix = there.at.groups_prefix
    # The instances are processes without a metadata service, so they cannot complete a hook on termination.
    form = GroupParameters(f"{prefix}{{pool}}", zones=zones, report_s=29.0, drain_s=0.0)
    scaling.create_auto_scaling_group(**form.request(f"{prefix}default", POOL))
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=there.at.manager_group,
        LaunchTemplate={"LaunchTemplateName": there.at.manager_group},
        MinSize=1,
        MaxSize=1,
        DesiredCapacity=1,
        AvailabilityZones=list(zones),
    )
