"""`batchlab deploy apply` on MiniStack. The tests inspect each created resource, because a complete stack alone proves
nothing. The template is small. test_shipped_stack.py uses the shipped template."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchlab.deploy import apply
from batchlab.deploy.account import Account
from batchlab.deploy.apply import has_old_instances
from batchlab.runtime import aws_deployment
from batchlab.runtime.home import Home
from tests.support.aws.deploy import client, group, queues, release, stacks
from tests.support.cli import Run


def test_apply_creates_the_stack_and_prints_its_outputs(deploy: Run, home: Home, tmp_path: Path) -> None:
    archive = release(tmp_path)
    code, out, err = deploy(
        "apply",
        "--yes",
        "--release",
        archive,
        "--pool",
        "default:0-4x2@m7i.large",
        "--pool",
        "gpu-big:1-2x4@m7i.2xlarge",
    )
    assert code == 0, err
    assert "Create, " in out
    assert "CREATE_COMPLETE PoolGpuBigTasks (AWS::SQS::Queue)" in err
    assert "The stack batchlab is up in us-east-1" in err

    # The second phase of the deployment creates the stack.
    (told,) = client("cloudformation").describe_stacks()["Stacks"]
    assert told["StackStatus"] == "UPDATE_COMPLETE"
    assert told["EnableTerminationProtection"]
    assert {"Key": "batchlab.stack", "Value": "batchlab"} in told["Tags"]
    sha = archive.name.removesuffix(".tar.gz")
    parameters = {one["ParameterKey"]: one["ParameterValue"] for one in told["Parameters"]}
    assert parameters["Release"] == sha

    # The stack has created these resources.
    assert queues() == [
        "batchlab-events",
        "batchlab-tasks-default",
        "batchlab-tasks-default-dead",
        "batchlab-tasks-gpu-big",
        "batchlab-tasks-gpu-big-dead",
    ]
    sqs = client("sqs")
    for pool in ("default", "gpu-big"):
        url = sqs.get_queue_url(QueueName=f"batchlab-tasks-{pool}")["QueueUrl"]
        told = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
        redrive = json.loads(told["Attributes"]["RedrivePolicy"])
        assert redrive["deadLetterTargetArn"].endswith(f":batchlab-tasks-{pool}-dead")
    assert (group("batchlab-pool-default")["MinSize"], group("batchlab-manager")["MinSize"]) == (0, 1)
    big = group("batchlab-pool-gpu-big")
    assert (big["MinSize"], big["MaxSize"]) == (1, 2)
    tags = {one["Key"]: one["Value"] for one in big["Tags"]}
    assert tags["batchlab.stack"] == "batchlab"
    assert (tags["batchlab:pool"], tags["batchlab:slots"]) == ("gpu-big", "4")

    # The home contains the deployment.
    found = aws_deployment.read(home)
    assert found is not None
    assert found.manager_group == "batchlab-manager"
    assert found.groups_prefix == "batchlab-pool-"
    assert found.python == "3.12"
    assert [(one.name, one.max_size, one.slots, one.instance_type) for one in found.pools] == [
        ("default", 4, 2, "m7i.large"),
        ("gpu-big", 2, 4, "m7i.2xlarge"),
    ]
    assert client("secretsmanager").get_secret_value(SecretId=found.token_secret)["SecretString"]
    stored = client("s3").get_object(Bucket=found.bucket, Key=f"boot/{archive.name}")
    assert stored["Body"].read() == archive.read_bytes()


def test_second_apply_changes_nothing_and_pools_are_added_and_removed_alone(
    deploy: Run, home: Home, tmp_path: Path
) -> None:
    archive = release(tmp_path)
    deploy("apply", "--yes", "--release", archive)
    made = client("cloudformation").describe_stacks()["Stacks"][0]["StackId"]
    code, out, err = deploy("apply", "--yes", "--release", archive)
    assert code == 0, err
    assert "No changes" in out
    _, out, _ = deploy("plan")
    assert "No changes" in out

    _, out, _ = deploy("plan", "--json", "--pool", "default:0-10x2", "--pool", "big:0-1x4")
    changes = json.loads(out)["changes"]
    assert {change["id"] for change in changes if change["action"] == "Add"} >= {
        "PoolBigTasks",
        "PoolBigDead",
        "PoolBigGroup",
        "PoolBigTemplate",
    }
    assert not [c for c in changes if c["id"].startswith("Pool") and c["action"] == "Remove"]
    deploy("apply", "--yes", "--release", archive)
    assert "batchlab-tasks-big" in queues()
    sqs = client("sqs")
    url = sqs.get_queue_url(QueueName="batchlab-tasks-big")["QueueUrl"]
    sqs.send_message(QueueUrl=url, MessageBody="kept")

    # The first pool is removed, and the resources of the second pool stay unchanged.
    code, _, err = deploy("apply", "--yes", "--release", archive, "--pool", "big:0-1x4")
    assert code == 0, err
    assert queues() == ["batchlab-events", "batchlab-tasks-big", "batchlab-tasks-big-dead"]
    assert sqs.receive_message(QueueUrl=url)["Messages"][0]["Body"] == "kept"
    assert client("cloudformation").describe_stacks()["Stacks"][0]["StackId"] == made
    found = aws_deployment.read(home)
    assert found is not None
    assert [pool.name for pool in found.pools] == ["big"]


def test_large_template_is_uploaded_to_the_stacks_bucket(
    deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = release(tmp_path)
    deploy("apply", "--yes", "--release", archive)
    monkeypatch.setattr("batchlab.deploy.plan.MAX_INLINE_BYTES", 100)
    code, out, err = deploy("plan", "--json", "--pool", "default:0-20x2")
    assert (code, err) == (0, "")
    assert [load["id"] for load in json.loads(out)["changes"]] == ["PoolGroup"]
    found = aws_deployment.read(home)
    assert found is not None
    assert [bucket["Name"] for bucket in client("s3").list_buckets()["Buckets"]] == [found.bucket]
    left = client("s3").list_objects_v2(Bucket=found.bucket, Prefix="deploy/")
    assert left["KeyCount"] == 0


def test_other_release_is_an_update_that_replaces_instances(deploy: Run, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path, "one"))
    scaling = client("autoscaling")
    scaling.set_desired_capacity(AutoScalingGroupName="batchlab-manager", DesiredCapacity=1)
    assert group("batchlab-manager")["Instances"]
    second = release(tmp_path, "two")
    code, _, err = deploy("apply", "--yes", "--release", second)
    assert code == 0, err
    assert "batchlab-manager: its instances are being replaced" in err
    assert "batchlab-pool-default: its instances" not in err  # the pool does not have instances
    told = scaling.describe_instance_refreshes(AutoScalingGroupName="batchlab-manager")
    assert len(told["InstanceRefreshes"]) == 1
    _, out, _ = deploy("status", "--json")
    assert json.loads(out)["release"] == second.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("is_replaced", [True, False])
def test_an_older_release_removes_the_scheduled_end_after_the_replacement_of_the_manager(
    deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """The manager of an older release does not postpone the action, which would end the workers."""
    deploy("apply", "--yes", "--release", release(tmp_path, "new"))
    scaling = client("autoscaling")
    waits: list[Any] = []
    for name in ("batchlab-end", "peak"):
        scaling.put_scheduled_update_group_action(
            AutoScalingGroupName="batchlab-pool-default",
            ScheduledActionName=name,
            StartTime=datetime.now(UTC) + timedelta(minutes=30 if name == "peak" else 20),
            MaxSize=0,
        )

    def actions() -> list[str]:
        told = scaling.describe_scheduled_actions(AutoScalingGroupName="batchlab-pool-default")
        return sorted(one["ScheduledActionName"] for one in told["ScheduledUpdateGroupActions"])

    def has_old(one: dict[str, Any]) -> bool:
        assert one["AutoScalingGroupName"] == "batchlab-manager"
        assert actions() == ["batchlab-end", "peak"], "the earlier manager would create the action again"
        waits.append(one)
        return not is_replaced or len(waits) < 3

    code, _, err = deploy("apply", "--yes", "--release", release(tmp_path, "newer"))
    assert (code, actions()) == (0, ["batchlab-end", "peak"]), err
    monkeypatch.setattr(apply, "has_old_instances", has_old)
    monkeypatch.setattr(apply, "POLL_S", 0.01)
    monkeypatch.setattr(apply, "REPLACEMENT_S", 60.0 if is_replaced else 0.1)
    code, _, err = deploy("apply", "--yes", "--release", release(tmp_path, "old", ends_fleet=False))
    assert code == 0, err
    assert "does not postpone the scheduled action batchlab-end" in err
    if is_replaced:
        assert "batchlab-pool-default: the scheduled action batchlab-end is deleted." in err
        assert actions() == ["peak"]
    else:
        assert "so batchlab-end still ends the groups batchlab-pool-default within 30 minutes. Apply again" in err
        assert actions() == ["batchlab-end", "peak"]


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record the group and the treatment of busy workers of each started instance refresh."""
    found: list[tuple[str, str]] = []
    real = Account.client

    def started(params: dict[str, Any], **_: object) -> None:
        found.append((params["AutoScalingGroupName"], params["Preferences"]["ScaleInProtectedInstances"]))

    def watched(self: Account, service: str) -> Any:
        made = real(self, service)
        event = "provide-client-params.auto-scaling.StartInstanceRefresh"
        made.meta.events.register(event, started, unique_id="refreshes")
        return made

    monkeypatch.setattr(Account, "client", watched)
    return found


@pytest.mark.parametrize(
    ("arguments", "treatment", "says"),
    [
        ((), "Wait", "gives up after one hour (BusyWorkers wait)"),
        (("--set", "BusyWorkers=keep"), "Ignore", "AWS replaces only idle workers (BusyWorkers keep)"),
        (("--set", "BusyWorkers=interrupt"), "Refresh", "AWS interrupts busy workers (BusyWorkers interrupt)"),
    ],
)
def test_treatment_of_busy_workers_in_an_upgrade_is_a_setting(
    deploy: Run, tmp_path: Path, refreshes: list[tuple[str, str]], arguments: tuple[str, ...], treatment: str, says: str
) -> None:
    _, out, _ = deploy("apply", "--yes", "--release", release(tmp_path, "one"), *arguments)
    assert "BusyWorkers" not in out, "no instance of the new stack is replaced"
    client("autoscaling").set_desired_capacity(AutoScalingGroupName="batchlab-manager", DesiredCapacity=1)
    code, out, err = deploy("apply", "--yes", "--release", release(tmp_path, "two"))
    assert code == 0, err
    assert says in out
    assert refreshes == [("batchlab-manager", treatment)]


def test_apply_repeats_a_failed_replacement(
    deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refreshes: list[tuple[str, str]]
) -> None:
    """An instance of the pool has an older launch template, because AWS waited for its tasks for an hour in vain."""
    archive = release(tmp_path)
    deploy("apply", "--yes", "--release", archive)
    for group_name in ("batchlab-manager", "batchlab-pool-default"):
        client("autoscaling").set_desired_capacity(AutoScalingGroupName=group_name, DesiredCapacity=1)
    real = Account.groups
    versions = {"batchlab-manager": "2", "batchlab-pool-default": "1"}

    def groups(self: Account, names: list[str]) -> list[Any]:
        found = real(self, names)
        for one in found:
            name = one["AutoScalingGroupName"]
            template = {"LaunchTemplateName": name, "Version": "2"}
            specification = {"LaunchTemplate": {"LaunchTemplateSpecification": template}}
            one |= (
                {"LaunchTemplate": template} if name == "batchlab-manager" else {"MixedInstancesPolicy": specification}
            )
            for instance in one["Instances"]:
                instance["LaunchTemplate"] = {**template, "Version": versions[name]}
        return found

    monkeypatch.setattr(Account, "groups", groups)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: "n")
    code, _, err = deploy("apply", "--release", archive)
    assert code == 0, err
    assert "Instances of batchlab-pool-default have an older launch template. AWS replaces a busy worker when" in err
    assert refreshes == []
    code, out, err = deploy("apply", "--yes", "--release", archive)
    assert code == 0, err
    assert "No changes" in out
    assert refreshes == [("batchlab-pool-default", "Wait")]
    versions["batchlab-pool-default"] = "2"
    code, _, err = deploy("apply", "--yes", "--release", archive)
    assert code == 0, err
    assert len(refreshes) == 1


TEMPLATE = {"LaunchTemplateId": "lt-2", "LaunchTemplateName": "two", "Version": "1"}


@pytest.mark.parametrize(
    ("wanted", "observed", "is_old"),
    [
        (TEMPLATE, TEMPLATE, False),
        (TEMPLATE, {**TEMPLATE, "Version": "2"}, True),
        # A replaced launch template begins at version 1 again.
        (TEMPLATE, {"LaunchTemplateId": "lt-1", "LaunchTemplateName": "one", "Version": "1"}, True),
        ({"LaunchTemplateName": "two", "Version": "1"}, TEMPLATE, False),
        (TEMPLATE, {}, False),
    ],
)
def test_instance_with_another_template_or_version_is_old(
    wanted: dict[str, str], observed: dict[str, str], is_old: bool
) -> None:
    instances = [{"LaunchTemplate": wanted}, {"LaunchTemplate": observed}]
    mixed = {"MixedInstancesPolicy": {"LaunchTemplate": {"LaunchTemplateSpecification": wanted}}}
    for configuration in ({"LaunchTemplate": wanted}, mixed):
        assert has_old_instances({**configuration, "Instances": instances}) is is_old


def test_running_replacement_is_not_a_failure(
    deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path, "one"))
    client("autoscaling").set_desired_capacity(AutoScalingGroupName="batchlab-manager", DesiredCapacity=1)
    real = Account.client

    def busy(**_: object) -> tuple[object, dict[str, Any]]:
        error = {"Code": "InstanceRefreshInProgress", "Message": "An Instance Refresh is already …"}
        return SimpleNamespace(status_code=400), {"Error": error, "ResponseMetadata": {}}

    def answered(self: Account, service: str) -> Any:
        made = real(self, service)
        made.meta.events.register("before-call.auto-scaling.StartInstanceRefresh", busy, unique_id="busy")
        return made

    monkeypatch.setattr(Account, "client", answered)
    code, _, err = deploy("apply", "--yes", "--release", release(tmp_path, "two"))
    assert code == 0, err
    assert "batchlab-manager: an instance refresh is in progress already. Apply again later." in err
    assert aws_deployment.read(home) is not None


def test_without_a_terminal_only_yes_agrees(deploy: Run, tmp_path: Path) -> None:
    code, out, err = deploy("apply", "--release", release(tmp_path))
    assert code == 2
    assert "--yes" in err
    assert "Create, " in out
    assert stacks() == {}


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("", 1), ("y", 0)])
def test_apply_asks_for_confirmation(
    deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: answer)
    found, _, err = deploy("apply", "--release", release(tmp_path))
    assert found == code
    assert "Create the stack batchlab? [y/N]" in err
    assert ("Nothing is changed." in err) == (code == 1)
    assert bool(stacks()) == (code == 0)


def test_a_release_that_is_damaged_is_refused_before_anything_is_made(deploy: Run, tmp_path: Path) -> None:
    archive = release(tmp_path)
    archive.write_bytes(b"x")
    code, _, err = deploy("apply", "--yes", "--release", archive)
    assert code == 2
    assert "is not the SHA-256 of its content" in err
    assert stacks() == {}
