"""The stack on MiniStack: created, changed, rolled back, and deleted. Each resource is inspected through its own
service, because a complete stack alone proves nothing.

The template is reduced by `cfn.for_ministack`. MiniStack ignores a group's mixed instances policy and hooks, and the
bucket's lifecycle rules. The group is tested at moto and at batchlab's own endpoint, and the lifecycle rules are given
to S3 directly.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from tests.support.aws import cfn
from tests.support.aws.ministack import ACCOUNT, Plane, Stack, served
from tests.support.aws.stack_shapes import RELEASE

SHAPE: dict[str, Any] = {
    "Release": RELEASE,
    "Ledger": "postgres",
    "Versioning": "on",
    "AttemptDays": 30,
    "PoolMin": 1,
    "PoolPeakMin": 3,
    "AlarmEmail": "ops@example.org",
    "LogDays": 14,
    "PoolWaitAlarmSeconds": 600,
}
WHOLE = cfn.load()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with served(tmp_path_factory.mktemp("plane")) as plane:
        yield plane


@pytest.fixture(scope="module")
def stack(plane: Plane) -> Stack:
    made = Stack(plane)
    status = made.create(cfn.for_ministack(WHOLE, **SHAPE), **SHAPE)
    assert status == "CREATE_COMPLETE", made.failures()
    return made


@pytest.fixture(scope="module")
def ids(stack: Stack) -> dict[str, str]:
    return stack.ids()


def test_all_is_made_that_the_shape_has(ids: dict[str, str]) -> None:
    wanted = cfn.Rendered(cfn.for_ministack(WHOLE, **SHAPE), **SHAPE).resources.keys()
    assert ids.keys() == wanted
    assert wanted == cfn.Rendered(WHOLE, **SHAPE).resources.keys() - cfn.MINISTACK_LACKS.keys()


def test_outputs_name_existing_resources(plane: Plane, stack: Stack, ids: dict[str, str]) -> None:
    outputs = stack.outputs()
    plane.client("s3").head_bucket(Bucket=outputs["Bucket"])
    groups = plane.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    names = {group["AutoScalingGroupName"] for group in groups}
    assert {outputs["ManagerGroup"], *outputs["PoolGroups"].split(",")} == names
    token = plane.client("secretsmanager").describe_secret(SecretId=outputs["TokenSecret"])
    assert token["ARN"] == outputs["TokenSecret"]
    assert outputs["DatabaseHost"].startswith(ids["Database"])
    assert (outputs["DatabasePort"], outputs["DatabaseName"]) == ("5432", "batchlab")


# --- Bucket and queues ---------------------------------------------------------------------------


def test_the_bucket(plane: Plane, ids: dict[str, str]) -> None:
    s3, bucket = plane.client("s3"), ids["Bucket"]
    (rule,) = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    blocked = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
    assert list(blocked.values()) == [True] * 4
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    owned = s3.get_bucket_ownership_controls(Bucket=bucket)["OwnershipControls"]
    assert owned["Rules"] == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
    by_sid = {one["Sid"]: one for one in policy["Statement"]}
    assert by_sid["OnlyByTls"]["Resource"] == [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    outcomes = f"arn:aws:s3:::{bucket}/jobs/*/*/outcomes/*"
    assert outcomes in by_sid["CommitsAreConditional"]["Resource"]


def lifecycle(template: cfn.Template) -> list[dict[str, Any]]:
    """Return the bucket's lifecycle rules in the form of S3's own API."""
    rules = cfn.Rendered(template, **SHAPE).properties("Bucket")["LifecycleConfiguration"]["Rules"]
    told = []
    for rule in rules:
        one = {"ID": rule["Id"], "Status": rule["Status"]}
        one["Filter"] = {"Prefix": rule.get("Prefix", "")}
        if "ExpirationInDays" in rule:
            one["Expiration"] = {"Days": rule["ExpirationInDays"]}
        if rule.get("ExpiredObjectDeleteMarker"):
            one["Expiration"] = {"ExpiredObjectDeleteMarker": True}
        for name in ("AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration"):
            if name in rule:
                one[name] = rule[name]
        told.append(one)
    return told


def test_s3_takes_the_lifecycle_rules(plane: Plane, ids: dict[str, str]) -> None:
    """The rules are given to S3 directly, because MiniStack's CloudFormation loses them."""
    _takes(plane.client("s3"), ids["Bucket"])


def test_s3_at_localstack_takes_the_lifecycle_rules(localstack: Endpoint) -> None:
    assert localstack.url is not None
    s3 = Plane(localstack.url).client("s3")
    s3.create_bucket(Bucket="batchlab-lifecycle")
    try:
        _takes(s3, "batchlab-lifecycle")
        put = s3.put_object(Bucket="batchlab-lifecycle", Key="logs/j/s/x.log", Body=b"")
        assert 'rule-id="logs-of-tasks"' in put["Expiration"]
        put = s3.put_object(Bucket="batchlab-lifecycle", Key="jobs/j/spec.json", Body=b"")
        assert "Expiration" not in put
    finally:
        for key in ("logs/j/s/x.log", "jobs/j/spec.json"):
            s3.delete_object(Bucket="batchlab-lifecycle", Key=key)
        s3.delete_bucket(Bucket="batchlab-lifecycle")


def _takes(s3: Any, bucket: str) -> None:
    rules = lifecycle(WHOLE)
    assert {rule["ID"] for rule in rules} >= {"files-of-attempts", "logs-of-tasks"}
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})
    kept = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert sorted(kept, key=lambda one: one["ID"]) == sorted(rules, key=lambda one: one["ID"])


def test_the_queues(plane: Plane, ids: dict[str, str]) -> None:
    sqs = plane.client("sqs")
    dead_arn = f"arn:aws:sqs:us-east-1:{ACCOUNT}:batchlab-tasks-default-dead"
    names = {"EventsQueue": "events", "PoolTasks": "tasks-default"}
    for logical, name in {**names, "PoolDeadLetters": "tasks-default-dead"}.items():
        url = sqs.get_queue_url(QueueName=f"batchlab-{name}")["QueueUrl"]
        assert url.rpartition("/")[2] == ids[logical].rpartition("/")[2]
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert found["SqsManagedSseEnabled"] == "true"
        assert found["VisibilityTimeout"] == ("30" if name.endswith("dead") else "60")
        assert found["MessageRetentionPeriod"] == "1209600"
        assert found["MaximumMessageSize"] == "262144"
        (statement,) = json.loads(found["Policy"])["Statement"]
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        assert found["QueueArn"] in cfn.as_list(statement["Resource"])
        if name == "tasks-default":
            redrive = json.loads(found["RedrivePolicy"])
            assert redrive == {"deadLetterTargetArn": dead_arn, "maxReceiveCount": 10}
        assert sqs.list_queue_tags(QueueUrl=url)["Tags"]["batchlab.stack"] == "batchlab"


def test_message_moves_to_the_dead_letter_queue_after_ten_receives(plane: Plane, ids: dict[str, str]) -> None:
    sqs = plane.client("sqs")
    sqs.send_message(QueueUrl=ids["PoolTasks"], MessageBody="poison")
    for _ in range(10):
        got = sqs.receive_message(QueueUrl=ids["PoolTasks"], VisibilityTimeout=0)
        assert [one["Body"] for one in got["Messages"]] == ["poison"]
    assert "Messages" not in sqs.receive_message(QueueUrl=ids["PoolTasks"])
    (dead,) = sqs.receive_message(QueueUrl=ids["PoolDeadLetters"])["Messages"]
    assert dead["Body"] == "poison"
    sqs.delete_message(QueueUrl=ids["PoolDeadLetters"], ReceiptHandle=dead["ReceiptHandle"])


# --- Instances -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "who"), [("Pool", "Worker"), ("Manager", "Manager")])
def test_the_launch_templates(plane: Plane, ids: dict[str, str], name: str, who: str) -> None:
    ec2 = plane.client("ec2")
    answer = ec2.describe_launch_template_versions(LaunchTemplateId=ids[f"{name}Template"])
    (version,) = answer["LaunchTemplateVersions"]
    data = version["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert data["MetadataOptions"]["InstanceMetadataTags"] == "enabled"
    (disk,) = data["BlockDeviceMappings"]
    assert (disk["Ebs"]["Encrypted"], disk["Ebs"]["VolumeType"]) == (True, "gp3")
    (card,) = data["NetworkInterfaces"]
    assert card["AssociatePublicIpAddress"] is False
    assert card["Groups"] == [ids[f"{who}SecurityGroup"]]
    profile = ids[f"{name}Profile"]
    assert data["IamInstanceProfile"]["Arn"].endswith(profile.rpartition("/")[2])
    script = base64.b64decode(data["UserData"]).decode()
    assert script.startswith("#!/bin/bash\n")
    assert len(data["UserData"]) <= 16 * 1024


def test_the_groups(plane: Plane, ids: dict[str, str]) -> None:
    asg = plane.client("autoscaling")
    found = {group["AutoScalingGroupName"]: group for group in asg.describe_auto_scaling_groups()["AutoScalingGroups"]}
    pool, manager = found["batchlab-pool-default"], found["batchlab-manager"]
    assert (pool["MinSize"], pool["MaxSize"]) == (1, 10)
    assert {manager[size] for size in ("MinSize", "MaxSize", "DesiredCapacity")} == {1}
    assert manager["LaunchTemplate"]["LaunchTemplateId"] == ids["ManagerTemplate"]
    assert pool["TerminationPolicies"] == ["NewestInstance"]
    assert pool["HealthCheckGracePeriod"] == pool["DefaultCooldown"] == 0
    subnets = f"{ids['PrivateSubnetA']},{ids['PrivateSubnetB']}"
    assert pool["VPCZoneIdentifier"] == manager["VPCZoneIdentifier"] == subnets
    tags = {one["Key"]: one["Value"] for one in pool["Tags"] if one["PropagateAtLaunch"]}
    assert tags["batchlab:pool"] == "default"
    assert tags["batchlab:slots"] == "2"
    assert tags["batchlab.stack"] == "batchlab"
    scheduled = asg.describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    assert sorted((one["MinSize"], one["Recurrence"]) for one in scheduled) == [(1, "0 18 * * 1-5"), (3, "0 8 * * 1-5")]


# --- Network, roles, and other resources ---------------------------------------------------------


def test_the_network(plane: Plane, ids: dict[str, str]) -> None:
    ec2 = plane.client("ec2")
    ours = [{"Name": "vpc-id", "Values": [ids["Vpc"]]}]
    subnets = ec2.describe_subnets(Filters=ours)["Subnets"]
    assert {subnet["SubnetId"] for subnet in subnets} == {ids["PrivateSubnetA"], ids["PrivateSubnetB"]}
    assert len({subnet["AvailabilityZone"] for subnet in subnets}) == 2
    assert not any(subnet["MapPublicIpOnLaunch"] for subnet in subnets)
    (routes,) = ec2.describe_route_tables(RouteTableIds=[ids["PrivateRoutes"]])["RouteTables"]
    assert [route.get("GatewayId") for route in routes["Routes"]] == ["local"]
    endpoints = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    assert {endpoint["ServiceName"].rpartition(".")[2] for endpoint in endpoints} == {
        "s3",
        "sqs",
        "autoscaling",
        "logs",
        "secretsmanager",
        "ssm",
        "ssmmessages",
    }
    wanted = [ids[name] for name in ids if name.endswith("SecurityGroup")]
    for group in ec2.describe_security_groups(GroupIds=wanted)["SecurityGroups"]:
        for rule in group["IpPermissions"]:
            assert rule["IpRanges"] == []
            assert {one["GroupId"] for one in rule["UserIdGroupPairs"]} <= {
                ids["WorkerSecurityGroup"],
                ids["ManagerSecurityGroup"],
            }


@pytest.mark.parametrize("who", ["Pool", "Manager"])
def test_the_roles(plane: Plane, ids: dict[str, str], who: str) -> None:
    iam, name = plane.client("iam"), ids[f"{who}Role"]
    role = iam.get_role(RoleName=name)["Role"]
    (trusted,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trusted["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"] == []
    policy = "worker" if who == "Pool" else "manager"
    kept = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
    rendered = cfn.Rendered(cfn.for_ministack(WHOLE, **SHAPE), **SHAPE)
    wanted = cfn.statements(rendered.properties(f"{who}Role"))
    assert [one["Sid"] for one in kept["Statement"]] == [one["Sid"] for one in wanted]
    assert [one["Action"] for one in kept["Statement"]] == [one["Action"] for one in wanted]
    assert "<" not in json.dumps(kept), "a reference that nobody has followed"
    profile = iam.get_instance_profile(InstanceProfileName=ids[f"{who}Profile"].rpartition("/")[2])["InstanceProfile"]
    assert [one["RoleName"] for one in profile["Roles"]] == [name]


def test_the_database(plane: Plane, ids: dict[str, str]) -> None:
    rds = plane.client("rds")
    found = rds.describe_db_instances(DBInstanceIdentifier=ids["Database"])["DBInstances"][0]
    assert found["DBInstanceIdentifier"] == "batchlab-ledger"
    assert found["Engine"] == "postgres"
    assert found["PubliclyAccessible"] is False
    assert found["StorageEncrypted"] is True
    assert found["BackupRetentionPeriod"] == 7
    assert found["DeletionProtection"] is True
    (group,) = found["VpcSecurityGroups"]
    assert group["VpcSecurityGroupId"] == ids["DatabaseSecurityGroup"]
    (parameters,) = found["DBParameterGroups"]
    assert parameters["DBParameterGroupName"] == ids["DatabaseParameters"]
    pages = rds.get_paginator("describe_db_parameters").paginate(DBParameterGroupName=ids["DatabaseParameters"])
    values = {p["ParameterName"]: p.get("ParameterValue") for page in pages for p in page["Parameters"]}
    assert values["rds.force_ssl"] == "1"
    (subnets,) = rds.describe_db_subnet_groups(DBSubnetGroupName=ids["DatabaseSubnets"])["DBSubnetGroups"]
    assert len({subnet["SubnetAvailabilityZone"]["Name"] for subnet in subnets["Subnets"]}) == 2


def test_token_logs_and_alarms(plane: Plane, ids: dict[str, str]) -> None:
    secret = plane.client("secretsmanager").get_secret_value(SecretId=ids["TokenSecret"])
    assert len(secret["SecretString"]) == 43
    groups = plane.client("logs").describe_log_groups()["logGroups"]
    assert {group["logGroupName"]: group["retentionInDays"] for group in groups} == {
        "/batchlab/batchlab": 14,
        "/aws/rds/instance/batchlab-ledger/postgresql": 14,
        "/aws/rds/instance/batchlab-ledger/upgrade": 14,
    }
    alarms = {alarm["AlarmName"]: alarm for alarm in plane.client("cloudwatch").describe_alarms()["MetricAlarms"]}
    assert alarms.keys() == {
        "batchlab-pool-default-waits",
        "batchlab-pool-default-dead-letters",
        "batchlab-manager-down",
        "batchlab-manager-does-not-collect",
    }
    waits = alarms["batchlab-pool-default-waits"]
    assert waits["Dimensions"] == [{"Name": "QueueName", "Value": "batchlab-tasks-default"}]
    assert waits["Threshold"] == 600
    assert all(alarm["AlarmActions"] == [ids["AlarmTopic"]] for alarm in alarms.values())
    (mail,) = plane.client("sns").list_subscriptions()["Subscriptions"]
    assert (mail["Endpoint"], mail["TopicArn"]) == ("ops@example.org", ids["AlarmTopic"])


def test_an_alarm_rings_when_dead_letters_wait(plane: Plane, ids: dict[str, str]) -> None:
    """The alarm uses SQS's name of the metric. MiniStack's SQS does not report metrics."""
    cloudwatch = plane.client("cloudwatch")
    name = "batchlab-pool-default-dead-letters"

    def state() -> str:
        (alarm,) = cloudwatch.describe_alarms(AlarmNames=[name])["MetricAlarms"]
        return str(alarm["StateValue"])

    def report(value: float) -> None:
        metric = {
            "MetricName": "ApproximateNumberOfMessagesVisible",
            "Dimensions": [{"Name": "QueueName", "Value": "batchlab-tasks-default-dead"}],
            "Value": value,
        }
        cloudwatch.put_metric_data(Namespace="AWS/SQS", MetricData=[metric])

    report(0)
    assert state() == "OK"
    report(1)
    assert state() == "ALARM"
