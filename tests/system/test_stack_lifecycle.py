"""The life of a stack on MiniStack: planned, changed, rolled back, deleted, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.support.aws import cfn
from tests.support.aws.ministack import Plane, Stack, served
from tests.support.aws.stack_shapes import RELEASE

WHOLE = cfn.load()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with served(tmp_path_factory.mktemp("plane")) as plane:
        yield plane


def test_release_changes_instances_and_no_stored_data(plane: Plane) -> None:
    stack, asg = Stack(plane, "two-phases"), plane.client("autoscaling")
    empty = cfn.for_ministack(WHOLE)
    assert stack.create(empty) == "CREATE_COMPLETE"
    before = stack.ids()

    def sizes() -> dict[str, tuple[int, int]]:
        names = ["two-phases-manager", "two-phases-pool-default"]
        found = asg.describe_auto_scaling_groups(AutoScalingGroupNames=names)
        return {one["AutoScalingGroupName"]: (one["MinSize"], one["MaxSize"]) for one in found["AutoScalingGroups"]}

    assert set(sizes().values()) == {(0, 0)}
    changes = stack.change_set("release", empty, Release=RELEASE)
    assert set(sizes().values()) == {(0, 0)}, "it is only a plan"
    changed = {change["LogicalResourceId"] for change in changes}
    assert {"ManagerGroup", "PoolGroup"} <= changed
    # MiniStack lists resources that a condition excludes as changed, and omits resources that a condition includes.
    runs = {"ManagerTemplate", "PoolTemplate", "ManagerIsDown", "ManagerDoesNotCollect"}
    assert changed <= {"ManagerGroup", "PoolGroup", "PoolPeakBegins", "PoolPeakEnds", *runs}
    assert {change["Action"] for change in changes} <= {"Add", "Modify"}
    assert stack.execute("release") == "UPDATE_COMPLETE"
    assert sizes() == {"two-phases-manager": (1, 1), "two-phases-pool-default": (0, 10)}
    after = stack.ids()
    assert {name: after[name] for name in before} == before, "nothing was replaced"
    assert stack.update(empty, Release="f" * 64, PoolMax=3, LogDays=7) == "UPDATE_COMPLETE"
    assert sizes()["two-phases-pool-default"] == (0, 3)
    (group,) = plane.client("logs").describe_log_groups(logGroupNamePrefix="/batchlab/two-phases")["logGroups"]
    assert group["retentionInDays"] == 7
    with pytest.raises(ClientError, match="No updates are to be performed"):
        stack.update(empty, Release="f" * 64, PoolMax=3, LogDays=7)


def test_failed_creation_is_rolled_back_with_its_reason(plane: Plane) -> None:
    stack, spoilt = Stack(plane, "spoilt"), deepcopy(cfn.for_ministack(WHOLE))
    spoilt["Resources"]["AlarmTopicPolicy"]["Properties"]["PolicyDocument"]["Id"] = {
        "Fn::GetAtt": ["LogGroup", "Nothing"]
    }
    assert stack.create(spoilt) == "ROLLBACK_COMPLETE"
    assert "Nothing" in stack.failures()["AlarmTopicPolicy"]
    assert_gone(plane, "spoilt")


def test_an_update_that_fails_leaves_the_stack_as_it_was(plane: Plane) -> None:
    stack, template = Stack(plane, "undone"), cfn.for_ministack(WHOLE)
    assert stack.create(template) == "CREATE_COMPLETE"
    before = stack.ids()
    spoilt = deepcopy(template)
    spoilt["Resources"]["PoolTasks"]["Properties"]["VisibilityTimeout"] = 90
    spoilt["Resources"]["AlarmTopicPolicy"]["Properties"]["PolicyDocument"]["Id"] = {
        "Fn::GetAtt": ["LogGroup", "Nothing"]
    }
    assert stack.update(spoilt) == "UPDATE_ROLLBACK_COMPLETE"
    assert stack.ids() == before
    sqs = plane.client("sqs")
    found = sqs.get_queue_attributes(QueueUrl=before["PoolTasks"], AttributeNames=["All"])
    assert found["Attributes"]["VisibilityTimeout"] == "60"


def test_a_stack_that_is_deleted_leaves_its_bucket_and_nothing_else(plane: Plane) -> None:
    stack, s3 = Stack(plane, "ending"), plane.client("s3")
    assert stack.create(cfn.for_ministack(WHOLE)) == "CREATE_COMPLETE"
    bucket = stack.ids()["Bucket"]
    s3.put_object(Bucket=bucket, Key="jobs/j/spec.json", Body=b"{}")
    assert stack.delete() == "DELETE_COMPLETE"
    assert s3.get_object(Bucket=bucket, Key="jobs/j/spec.json")["Body"].read() == b"{}"
    assert_gone(plane, "ending")


def assert_gone(plane: Plane, name: str) -> None:
    """Check that no resource with the stack's name remains, as far as a service can list names."""
    sqs, asg = plane.client("sqs"), plane.client("autoscaling")
    assert sqs.list_queues(QueueNamePrefix=f"{name}-").get("QueueUrls", []) == []
    groups = asg.describe_auto_scaling_groups()["AutoScalingGroups"]
    assert not [group for group in groups if group["AutoScalingGroupName"].startswith(f"{name}-")]
    for prefix in (f"/batchlab/{name}", f"/aws/rds/instance/{name}-"):
        logs = plane.client("logs").describe_log_groups(logGroupNamePrefix=prefix)
        assert logs["logGroups"] == []
    iam = plane.client("iam")
    assert not [r for r in iam.list_roles()["Roles"] if r["RoleName"].startswith(f"{name}-")]
    ec2 = plane.client("ec2")
    templates = ec2.describe_launch_templates()["LaunchTemplates"]
    assert not [template for template in templates if template["LaunchTemplateName"].startswith(f"{name}-")]
    tagged = [{"Name": "tag:batchlab.stack", "Values": [name]}]
    assert ec2.describe_vpcs(Filters=tagged)["Vpcs"] == []
    assert ec2.describe_security_groups(Filters=tagged)["SecurityGroups"] == []
    alarms = plane.client("cloudwatch").describe_alarms(AlarmNamePrefix=f"{name}-")
    assert alarms["MetricAlarms"] == []
    secrets = plane.client("secretsmanager").list_secrets()["SecretList"]
    assert not [secret for secret in secrets if secret["Name"].startswith(f"{name}-")]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"VpcId": "vpc-0123456789abcdef0"}, "VpcId needs SubnetIds"),
        ({"Ledger": "simpledb"}, "SimpleDB does not have a VPC endpoint"),
        ({"Release": "latest"}, "the SHA-256 of a release's archive"),
        ({"PoolName": "x-dead"}, "without the ending -dead"),
        ({"PoolInstanceTypes": "large"}, "one to four instance types"),
        ({"Ledger": "oracle"}, "Ledger"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_with_the_reason(
    plane: Plane, parameters: dict[str, Any], told: str
) -> None:
    with pytest.raises(ClientError, match=told):
        Stack(plane, "refused").create(cfn.for_ministack(WHOLE), **parameters)


def test_ministack_still_lacks_what_the_template_is_reduced_by(plane: Plane) -> None:
    for kind in cfn.MINISTACK_LACKS.values():
        one = {"Resources": {"One": {"Type": kind}}}
        with pytest.raises(ClientError, match="Unrecognized resource types"):
            plane.client("cloudformation").create_stack(StackName="one", TemplateBody=json.dumps(one))
