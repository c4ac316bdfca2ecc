"""The shipped stack `backends/aws/stack.yaml`, created by `batchlab deploy` as far as MiniStack supports it, and
inspected. The permissions of a deployer are tested on a MiniStack that enforces IAM."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.checks import check_account
from batchlab.deploy.settings import Settings
from batchlab.runtime import aws_deployment
from batchlab.runtime.home import Home
from tests.support import ROOT
from tests.support.aws import cfn
from tests.support.aws.deploy import REGION, SMALL, client, group, queues, release, stacks, use
from tests.support.aws.ministack import Plane, served
from tests.support.cli import Run, runner

DOCS = ROOT / "docs" / "deploy.md"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """Start a MiniStack that enforces IAM policies for every caller except the root user."""
    with served(tmp_path_factory.mktemp("aws"), enforces=True) as plane:
        yield plane


def test_shipped_stack_with_two_pools_is_created_checked_changed_and_deleted(
    cloud: Plane, deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, cloud.url, cfn.stack_file())
    archive = release(tmp_path)
    pools = ("--pool", "default:0-4x2@m7i.large,m6i.large", "--pool", "gpu-large:0-1x1@m7i.2xlarge")

    # The template with two pools is too large for a request. The template is uploaded to a bucket that exists only
    # during the call.
    code, out, err = deploy("plan", "--json", *pools)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["template_bytes"] > template.MAX_INLINE_BYTES
    # The template does not contain resources whose conditions are false. MiniStack would reject NAT gateways and
    # SimpleDB.
    wanted = {"PoolInstanceTypes": "m7i.large,m6i.large"}
    expected = cfn.Rendered(cfn.load(), **wanted).resources.keys()
    assert {one["id"] for one in plan["changes"] if "GpuLarge" not in one["id"]} == expected
    assert {"PoolTasks", "PoolGpuLargeTasks"} <= {one["id"] for one in plan["changes"]}
    assert client("s3").list_buckets()["Buckets"] == []
    assert stacks() == {}

    code, _, err = deploy("apply", "--yes", "--release", archive)
    assert code == 0, err
    at = aws_deployment.read(home)
    assert at is not None
    assert [(one.name, one.max_size) for one in at.pools] == [("default", 4), ("gpu-large", 1)]
    # Every resource of the stack exists in its own service.
    told = client("cloudformation").list_stack_resources(StackName="batchlab")
    made = {one["LogicalResourceId"]: one["PhysicalResourceId"] for one in told["StackResourceSummaries"]}
    assert [name for name, id_ in made.items() if id_ in ("", "unknown")] == []
    names = ("tasks-default", "tasks-default-dead", "tasks-gpu-large", "tasks-gpu-large-dead")
    assert {f"batchlab-{one}" for one in (*names, "events")} <= set(queues())
    for pool, most in (("default", 4), ("gpu-large", 1)):
        found = group(f"{at.groups_prefix}{pool}")
        assert (found["MinSize"], found["MaxSize"]) == (0, most)
    assert group(at.manager_group)["MaxSize"] == 1
    # The manager's user data contains all pools, and a worker's user data contains only its own pool.
    assert pools_in(f"{at.prefix}manager") == ["default", "gpu-large"]
    assert pools_in(f"{at.groups_prefix}gpu-large") == ["gpu-large"]
    assert client("secretsmanager").get_secret_value(SecretId=at.token_secret)["SecretString"]
    s3 = client("s3")
    assert s3.head_object(Bucket=at.bucket, Key=f"boot/{archive.name}")["ContentLength"]
    assert s3.list_objects_v2(Bucket=at.bucket, Prefix="deploy/")["KeyCount"] == 0
    profiles = client("iam").list_instance_profiles()["InstanceProfiles"]
    assert len([profile for profile in profiles if profile["Roles"]]) == 3  # one for each pool and one for the manager

    code, out, err = deploy("status", "--json")
    assert code == 0, err
    status = json.loads(out)
    assert status["drift"] == []
    assert status["alarms"]
    assert {one["name"] for one in status["groups"]} == {
        at.manager_group,
        *(f"{at.groups_prefix}{pool}" for pool in ("default", "gpu-large")),
    }

    code, _, err = deploy("apply", "--yes", "--release", archive, "--pool", "default:0-8x2@m7i.large")
    assert code == 0, err
    assert not [name for name in queues() if "gpu" in name]
    assert group(f"{at.groups_prefix}default")["MaxSize"] == 8

    code, out, err = deploy("destroy", "--yes", "--delete-data")
    assert code == 0, err
    assert out == ""
    assert stacks() == {}
    assert queues() == []
    assert s3.list_buckets()["Buckets"] == []


def pools_in(name: str) -> list[str]:
    """Return the pools in the user data of a launch template."""
    told = client("ec2").describe_launch_template_versions(LaunchTemplateName=name, Versions=["$Latest"])
    (version,) = told["LaunchTemplateVersions"]
    text = base64.b64decode(version["LaunchTemplateData"]["UserData"]).decode()
    (found,) = re.findall(r'^ *\{"stack": .*?\n', text, re.M | re.S)
    return [load["name"] for load in json.loads(found)["pools"]]


# --- Permissions ---------------------------------------------------------------------------------


def deployer(monkeypatch: pytest.MonkeyPatch, policy: object) -> None:
    """Make all further calls as a user with that policy."""
    iam = client("iam")
    iam.create_user(UserName="eve")
    iam.put_user_policy(UserName="eve", PolicyName="p", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="eve")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])


def test_missing_permission_names_the_action(strict: Plane, deploy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    account = use(monkeypatch, strict.url)
    only_looks = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "cloudformation:Describe*", "Resource": "*"},
            {"Effect": "Allow", "Action": "sts:GetCallerIdentity", "Resource": "*"},
        ],
    }
    deployer(monkeypatch, only_looks)
    code, out, err = deploy("plan")
    assert (code, out) == (3, "")
    assert f"arn:aws:iam::{account}:user/eve may not do cloudformation:CreateChangeSet." in err
    assert "docs/deploy.md" in err
    assert "Traceback" not in err


def documented_policy(account: str) -> dict[str, object]:
    """Return the policy for deployers in docs/deploy.md."""
    (block,) = re.findall(r"```json\n(\{.*?\n\})\n```", DOCS.read_text(), re.S)
    policy: dict[str, object] = json.loads(block.replace("ACCOUNT", account))
    return policy


def test_the_documented_policy_is_enough_for_all_commands(
    strict: Plane, deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test covers the calls of `batchlab deploy` itself. MiniStack does not check the calls that CloudFormation
    makes in the deployer's name."""
    account = use(monkeypatch, strict.url, SMALL)
    deployer(monkeypatch, documented_policy(account))
    archive = release(tmp_path)
    monkeypatch.setattr("batchlab.deploy.plan.MAX_INLINE_BYTES", 100)
    for arguments in (
        ("plan",),
        ("apply", "--yes", "--release", archive),
        ("apply", "--yes", "--release", release(tmp_path, "two")),
        ("status",),
        ("destroy", "--yes", "--delete-data"),
    ):
        code, _, err = deploy(*arguments)
        assert code == 0, (arguments, err)
        assert "may not do" not in err


def test_missing_permissions_are_noted_before_anything_is_created(
    strict: Plane, deploy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiniStack's policy simulator judges the documented policy, and the policy of earlier releases."""
    account = use(monkeypatch, strict.url, SMALL)
    root, policy = client("iam"), documented_policy(account)
    deployer(monkeypatch, policy)
    whole = {"VpcId": "", "Egress": "endpoints", "Ledger": "postgres", "BudgetUsd": "50"}

    def notes(parameters: dict[str, str]) -> list[str]:
        with Account.open() as opened:
            return list(check_account(opened, Settings(), parameters, None))

    assert notes(whole) == []
    assert notes({**whole, "Egress": "nat", "Ledger": "sqlite"}) == []
    earlier = json.dumps(policy).replace('"route53:AssociateVPCWithHostedZone"', '"ec2:RunInstances"')
    earlier = earlier.replace(":og:default:postgres-*", ":og:batchlab-*")
    root.put_user_policy(UserName="eve", PolicyName="p", PolicyDocument=earlier)
    (note,) = notes(whole)
    assert (
        f"{account}:user/eve may not do route53:AssociateVPCWithHostedZone on arn:aws:route53:::hostedzone/*, " in note
    )
    assert f"rds:CreateDBInstance on arn:aws:rds:us-east-1:{account}:og:default:postgres-17. Allow these" in note
    code, out, err = deploy("plan", "--ledger", "sqlite")
    assert code == 0, err
    assert "may not do" not in out


def test_the_documented_policy_reaches_no_other_stack(
    strict: Plane, deploy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = use(monkeypatch, strict.url, SMALL)
    deployer(monkeypatch, documented_policy(account))
    code, _, err = deploy("plan", "--stack", "somebody-elses")
    assert code == 3
    assert "may not do cloudformation:" in err
    with pytest.raises(Exception, match="AccessDenied"):
        client("s3").create_bucket(Bucket="somebody-elses")
    with pytest.raises(Exception, match="AccessDenied"):
        client("iam").create_user(UserName="mallory")


def test_other_machine_finds_the_stack(
    strict: Plane, deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the policy for users in docs/aws-security.md, `deploy status` connects the other machine."""
    account = use(monkeypatch, strict.url, SMALL)
    code, _, err = deploy("apply", "--yes", "--release", release(tmp_path))
    assert code == 0, err
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.with_name("aws-security.md").read_text(), re.DOTALL)
    for name, value in {"ACCOUNT": account, "REGION": REGION, "TOKENSECRET": "*"}.items():
        block = block.replace(name, value)
    deployer(monkeypatch, json.loads(block))
    elsewhere = Home(tmp_path / "another laptop")
    run = runner(monkeypatch, capsys)
    code, out, err = run("deploy", "status", "--home", elsewhere.path)
    assert code == 0, err
    assert f"in {REGION}, account {account}" in out
    known = aws_deployment.read(elsewhere)
    assert known is not None
    assert known.stack == "batchlab"
    code, _, err = deploy("destroy", "--yes")
    assert code == 3
    assert "may not do cloudformation:" in err
