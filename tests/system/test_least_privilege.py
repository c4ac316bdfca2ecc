"""The grid under the stack's own roles, which allow every call that the grid makes and no other calls.

MiniStack checks each process against the policies of its role, over TLS. Auto Scaling is batchlab's own endpoint, which
does not check policies, but a proxy records the calls.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from botocore.exceptions import ClientError

from batchlab.core.api_types import NotificationView
from batchlab.core.model import JobId, StageName
from batchlab.core.protocol import object_keys
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home
from tests.support.aws import cfn
from tests.support.aws.account import POOL, Account, opened
from tests.support.aws.ministack import ACCOUNT, REGION, Plane, Stack, served
from tests.support.aws.recording_proxy import RecordingFront
from tests.support.aws.stack_shapes import RELEASE
from tests.support.http_proxy import standing
from tests.support.waiting import until
from tests.system.test_aws_backend import batchlab, job_of, total

TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT}:told"
SHAPE = {"Release": RELEASE, "NotifyTopics": TOPIC}

ELSEWHERE = {
    "logs:CreateLogStream": "the CloudWatch agent, and a boot that fails (test_boot.py)",
    "logs:PutLogEvents": "as logs:CreateLogStream",
    "ssm:UpdateInstanceInformation": "Session Manager's agent",
    "ssmmessages:CreateControlChannel": "Session Manager's agent",
    "ssmmessages:CreateDataChannel": "Session Manager's agent",
    "ssmmessages:OpenControlChannel": "Session Manager's agent",
    "ssmmessages:OpenDataChannel": "Session Manager's agent",
    "s3:AbortMultipartUpload": "a worker whose large upload fails",
    "autoscaling:DeleteScheduledAction": "the manager, after a user has set orphan_s to 0",
    "autoscaling:SetInstanceHealth": "the manager, of an instance that does not answer",
}
"""Allowed actions that only a component outside of this test calls, or that are called only after a failure."""
WORKERS_ELSEWHERE = {"autoscaling:CompleteLifecycleAction": "a worker that drains (test_boot.py)"}


GATED = """\
import pathlib, time

def square(item):
    print("item", item)
    while not pathlib.Path('{gate}').exists():
        time.sleep(0.1)
    return item * item

def total(values):
    return sum(values)
"""


@dataclass
class Trial:
    there: Account
    front: RecordingFront
    scaling: RecordingFront
    access: dict[str, str]
    """The access keys by role."""
    stolen: Plane
    """The account with the credentials of a worker's role."""

    def called(self, role: str) -> set[str]:
        key = self.access[role]
        return self.front.called[key] | self.scaling.called[key]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("least")
    with served(folder / "ministack", enforces=True, tls=True) as root:
        stack = Stack(root)
        status = stack.create(cfn.for_ministack(cfn.load(), **SHAPE), **SHAPE)
        assert status == "CREATE_COMPLETE", stack.failures()
        root.client("sns").create_topic(Name="told")
        planes = {role: root.role(stack.ids()[name]) for role, name in ROLES.items()}
        keys = {role: plane.keys for role, plane in planes.items()}
        front, scaling = RecordingFront(root.url), RecordingFront()
        # The test does not pay for time or requests, so the manager uses short intervals to avoid waiting.
        manager = Home(folder / "account" / "manager")
        manager.make()
        manager.settings_file.write_text("[manager]\ntick_s = 1\nidle_s = 5\n")
        with standing(front) as url:
            at = deployment_of(stack)
            with opened(
                at,
                {"AWS_ENDPOINT_URL": url},
                folder / "account",
                front=scaling,
                keys={role: environment(given) for role, given in keys.items()},
            ) as there:
                there.write_templates(there.hasty_worker(visibility_s=9.0))
                access = {role: given["aws_access_key_id"] for role, given in keys.items()}
                yield Trial(there, front, scaling, access, planes["worker"])


ROLES = {"manager": "ManagerRole", "worker": "PoolRole"}


def environment(keys: Mapping[str, str]) -> dict[str, str]:
    return {name.upper(): value for name, value in keys.items()}


def deployment_of(stack: Stack) -> AwsDeployment:
    outputs = stack.outputs()
    name = stack.name
    return AwsDeployment(
        name, REGION, outputs["Bucket"], f"{name}-", f"{name}-manager", outputs["TokenSecret"], (POOL,)
    )


def allowed(role: str) -> set[str]:
    """Return the actions of the role's policy, in the deployed shape of the template."""
    rendered = cfn.Rendered(cfn.load(), **SHAPE)
    return {
        action
        for statement in cfn.statements(rendered.properties(ROLES[role]))
        if statement["Effect"] == "Allow"
        for action in cfn.as_list(statement["Action"])
    }


def is_busy(there: Account, home: Home) -> bool:
    shown, _ = batchlab(there, "grid", "workers", "--json", "--home", home.path)
    return any(load["busy"] for load in json.loads(shown))


def notified(there: Account, home: Home) -> list[NotificationView]:
    """Return the notifications that are no longer pending."""
    found = json.loads(batchlab(there, "notify", "log", "--json", "--home", home.path)[0])
    return [one for one in found if one["state"] != "pending"]


def came_to(there: Account, home: Home) -> list[str | None]:
    shown, _ = batchlab(there, "schedule", "show", "once", "--json", "--home", home.path)
    return [run["result"] for run in json.loads(shown)["runs"]]


def what_the_page_sends_runs(home: Home, job: Path) -> None:
    """Submit a job through the page. The manager stores its code and its input in the bucket."""
    record = home.record()
    assert record
    files = [("files", (one.name, one.read_bytes())) for one in job.parent.iterdir()]
    with httpx.Client(base_url=record.url, trust_env=False, timeout=60) as http:
        http.headers["Authorization"] = f"Bearer {home.token()}"
        sent = http.post("/v1/jobs/files", files=files)
        assert sent.status_code == 201, sent.text
        path = f"/v1/jobs/{sent.json()['id']}"
        until(lambda: http.get(path).json()["state"] == "SUCCEEDED", 60, pause_s=1.0)
        assert http.get(f"{path}/results").headers["content-type"] == "application/zip"


def test_roles_have_exactly_the_needed_permissions(trial: Trial, tmp_path: Path) -> None:
    there, home = trial.there, trial.there.home()
    until(there.manager_pid, 60)
    job, out, gate = job_of(tmp_path / "job", 8), tmp_path / "out", tmp_path / "gate"
    job.with_name("work.py").write_text(GATED.format(gate=gate))
    job.write_text(job.read_text() + f"notify:\n  - sns: {TOPIC}\n")
    batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
    batchlab(there, "job", "submit", job, "--home", home.path)
    # The task takes longer than the visibility timeout, so its worker must extend the timeout.
    until(lambda: "sqs:ChangeMessageVisibility" in trial.called("worker"), 120, pause_s=0.2)
    # The manager returns the messages of a dead worker.
    os.kill(there.worker_pids()[0], signal.SIGKILL)
    gate.touch()
    shown, _ = batchlab(there, "job", "logs", "last", "--follow", "--home", home.path)
    assert {f"square/{i} | item {i}" for i in range(8)} <= set(shown.splitlines())
    batchlab(there, "job", "results", "last", "--out", out, "--home", home.path)
    assert total(out) == sum(i * i for i in range(8))
    told = until(lambda: notified(there, home), 30, pause_s=0.5)
    assert [(one["target"], one["state"]) for one in told] == [(f"{told[0]['job']}#1", "delivered")]
    what_the_page_sends_runs(home, job)
    batchlab(there, "schedule", "add", job, "--at", "+3s", "--name", "once", "--home", home.path)
    until(lambda: came_to(there, home) == ["SUCCEEDED"], 60, pause_s=1.0)
    batchlab(there, "grid", "activities", "--home", home.path)
    batchlab(there, "grid", "scale", POOL.name, "--max", 3, "--home", home.path)
    batchlab(there, "grid", "rebuild-ledger", "--home", home.path)
    # The manager replaces the definition and deletes the other objects of the job.
    batchlab(there, "job", "delete", told[0]["job"], "--yes", "--home", home.path)
    group = f"{there.at.groups_prefix}{POOL.name}"
    # The job's instances are idle, so the manager terminates them by name.
    until(lambda: not there.group(group)["Instances"], 150, pause_s=1.0)
    ended = there.aws("autoscaling").describe_scaling_activities(AutoScalingGroupName=group)
    unasked = [a["Cause"] for a in ended["Activities"] if "(exit 0)" in a["Cause"]]
    assert not unasked, "no worker leaves by itself"
    batchlab(there, "grid", "down", "--home", home.path)
    ours = {trial.access[role] for role in ROLES}
    assert [one for one in trial.front.denied if one[0] in ours] == []
    for role, elsewhere in (("manager", ELSEWHERE), ("worker", ELSEWHERE | WORKERS_ELSEWHERE)):
        called, may = trial.called(role), allowed(role)
        assert called <= may, (role, sorted(called - may))
        idle = may - called - elsewhere.keys()
        assert not idle, (role, "may and does not", json.dumps(sorted(idle)))


def test_a_stolen_worker_role_reaches_no_secret_and_no_definition(trial: Trial) -> None:
    """Only the manager may read the commit secret and write definitions and finals."""
    bucket, s3 = trial.there.at.bucket, trial.stolen.client("s3")
    for key in (object_keys.COMMIT_SECRET, object_keys.INSTANCES, object_keys.NOTIFICATIONS, object_keys.USE):
        with pytest.raises(ClientError, match="AccessDenied"):
            s3.get_object(Bucket=bucket, Key=key)
    job = JobId("victim-0123456789")
    manifest = object_keys.manifest(job, StageName("map"), 0)
    for key in (
        object_keys.COMMIT_SECRET,
        object_keys.INSTANCES,
        object_keys.spec(job),
        object_keys.control(job),
        object_keys.retry(job, 1),
        object_keys.final(job, 0),
        manifest,
        "code/x.zip",
        object_keys.raw(job) + "x",
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            s3.put_object(Bucket=bucket, Key=key, Body=b"{}")
        with pytest.raises(ClientError, match="AccessDenied"):
            s3.delete_object(Bucket=bucket, Key=key)
    sqs = trial.stolen.client("sqs")
    events = sqs.get_queue_url(QueueName=f"{trial.there.at.prefix}{object_keys.EVENTS}")
    with pytest.raises(ClientError, match="AccessDenied"):
        sqs.receive_message(QueueUrl=events["QueueUrl"])
