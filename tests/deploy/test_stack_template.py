"""The template of the grid's stack in several shapes, and the requirements of the manager and the workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.ports import MAX_MESSAGE_BYTES, QueueSpec
from batchlab.core.protocol import object_keys
from batchlab.deploy.status import ALARMS
from batchlab.manager.collector import events_queue
from batchlab.runtime import factory
from tests.support import ROOT
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import SHAPES

TEMPLATE = cfn.load()
SHOWN = {name: cfn.Rendered(TEMPLATE, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(params=SHOWN)
def shape(request: pytest.FixtureRequest) -> cfn.Rendered:
    return SHOWN[request.param]


# --- The file ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cfn_lint_finds_nothing() -> None:
    """The exceptions are in .cfnlintrc.yaml and next to the resources."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint"))], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_parameter_is_described_and_in_one_group() -> None:
    parameters = TEMPLATE["Parameters"]
    groups = TEMPLATE["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    grouped = [name for group in groups for name in group["Parameters"]]
    assert sorted(grouped) == sorted(parameters)
    for name, one in parameters.items():
        assert one["Description"].endswith((".", "?")), name
        assert len(one["Description"]) <= 4000, name
        assert "Default" in one, f"{name} must be said"


def test_hourly_costs_are_named() -> None:
    for name in ("Egress", "Ledger", "ManagerInstanceType", "PoolDiskGiB"):
        assert "USD" in TEMPLATE["Parameters"][name]["Description"], name


def test_yaml_aliases_are_not_used() -> None:
    """CloudFormation does not support aliases."""
    assert not re.search(r"(^|[\s\[{,])[&*][A-Za-z]", cfn.stack_file().read_text(), re.MULTILINE)


def test_resources_per_pool_are_marked_and_named() -> None:
    for name, one in TEMPLATE["Resources"].items():
        marked = one.get("Metadata", {}).get("batchlab") == {"per": "pool"}
        assert marked == name.startswith("Pool"), name
    made = {"PoolTasks", "PoolDeadLetters", "PoolGroup", "PoolTemplate", "PoolWaitsTooLong"}
    assert made <= TEMPLATE["Resources"].keys()


def test_no_condition_and_no_parameter_is_left_over() -> None:
    text = cfn.body({k: v for k, v in TEMPLATE.items() if k != "Parameters"})
    for name in TEMPLATE["Parameters"]:
        assert f'"Ref":"{name}"' in text or f"${{{name}}}" in text, name
    used = "".join(text.split('"Resources":')[1:])
    for name in TEMPLATE["Conditions"]:
        assert f'"{name}"' in used or f'"Condition":"{name}"' in text, name


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"VpcId": "vpc-0123456789abcdef0"}, "VpcId needs SubnetIds"),
        ({"SubnetIds": "subnet-0123456789abcdef0"}, "SubnetIds needs VpcId"),
        ({"Ledger": "simpledb"}, "SimpleDB does not have a VPC endpoint"),
        ({"ContainerImage": "me/grid:1"}, "ContainerImage needs Egress nat"),
        ({"PoolImage": "me/tools:1"}, "PoolImage needs Egress nat"),
    ],
)
def test_contradictory_parameters_are_refused(parameters: dict[str, Any], told: str) -> None:
    (broken,) = cfn.Rendered(TEMPLATE, **parameters).broken_rules()
    assert broken.startswith(told)


def test_the_shapes_are_allowed(shape: cfn.Rendered) -> None:
    assert shape.broken_rules() == []


def test_the_shapes_make_every_resource_once() -> None:
    made = {name for one in SHOWN.values() for name in one.resources}
    assert made == TEMPLATE["Resources"].keys()


# --- Queues --------------------------------------------------------------------------------------


def specs() -> list[QueueSpec]:
    """Return the queues that the manager creates with its settings on AWS."""
    settings = factory.load("aws").manager
    dead = QueueSpec(object_keys.dead_letters("default"))
    tasks = QueueSpec(
        object_keys.tasks_queue("default"),
        visibility_s=settings.visibility_s,
        dead_letters=dead.name,
        max_receives=settings.max_receives,
    )
    return [events_queue(settings), dead, tasks]


def test_the_queues_are_what_the_manager_wants(shape: cfn.Rendered) -> None:
    queues = {one["QueueName"]: one for one in shape.of_type("AWS::SQS::Queue").values()}
    assert set(queues) == {f"batchlab-{spec.name}" for spec in specs()}
    for spec in specs():
        made = queues[f"batchlab-{spec.name}"]
        assert made["VisibilityTimeout"] == spec.visibility_s
        assert made["MessageRetentionPeriod"] == spec.retention_s
        assert made["MaximumMessageSize"] == MAX_MESSAGE_BYTES
        assert made["SqsManagedSseEnabled"] is True
        if spec.dead_letters:
            redrive = made["RedrivePolicy"]
            assert redrive["maxReceiveCount"] == spec.max_receives
            assert redrive["deadLetterTargetArn"] == "<PoolDeadLetters.Arn>"
        else:
            assert "RedrivePolicy" not in made
    allowed = queues["batchlab-tasks-default-dead"]["RedriveAllowPolicy"]
    arn = "arn:aws:sqs:us-east-1:123456789012:batchlab-tasks-default"
    assert allowed == {"redrivePermission": "byQueue", "sourceQueueArns": [arn]}


def test_queues_bucket_and_topic_are_reached_by_tls_only(shape: cfn.Rendered) -> None:
    policies = [
        *shape.of_type("AWS::S3::BucketPolicy").values(),
        *shape.of_type("AWS::SQS::QueuePolicy").values(),
        *shape.of_type("AWS::SNS::TopicPolicy").values(),
    ]
    closed: set[str] = set()
    for policy in policies:
        for one in policy["PolicyDocument"]["Statement"]:
            if one.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}:
                assert (one["Effect"], one["Principal"]) == ("Deny", "*")
                closed.update(cfn.as_list(one["Resource"]))
    assert closed == {
        "<Bucket.Arn>",
        "<Bucket.Arn>/*",
        "<EventsQueue.Arn>",
        "<PoolTasks.Arn>",
        "<PoolDeadLetters.Arn>",
        "<AlarmTopic>",
    }


# --- Network -------------------------------------------------------------------------------------


def test_no_inbound_access_from_outside(shape: cfn.Rendered) -> None:
    rules: list[dict[str, Any]] = []
    for one in shape.of_type("AWS::EC2::SecurityGroup").values():
        rules += one.get("SecurityGroupIngress", [])
        assert one["SecurityGroupEgress"], "without a rule AWS allows everything"
        assert all(rule["Description"] for rule in one["SecurityGroupEgress"])
    rules += shape.of_type("AWS::EC2::SecurityGroupIngress").values()
    ours = {"<WorkerSecurityGroup.GroupId>", "<ManagerSecurityGroup.GroupId>"}
    for rule in rules:
        assert rule["SourceSecurityGroupId"] in ours
        assert not {"CidrIp", "CidrIpv6", "SourcePrefixListId"} & rule.keys()
        assert rule["FromPort"] == rule["ToPort"]
    for subnet in shape.of_type("AWS::EC2::Subnet").values():
        assert subnet["MapPublicIpOnLaunch"] is False
    for one in shape.of_type("AWS::EC2::LaunchTemplate").values():
        (card,) = one["LaunchTemplateData"]["NetworkInterfaces"]
        assert card["AssociatePublicIpAddress"] is False


def services(shape: cfn.Rendered) -> set[str]:
    return {one["ServiceName"].rpartition(".")[2] for one in shape.of_type("AWS::EC2::VPCEndpoint").values()}


def test_private_subnets_reach_aws_by_endpoints_or_by_a_nat() -> None:
    by_endpoints, by_nat = SHOWN["endpoints"], SHOWN["postgres"]
    assert services(by_endpoints) == {"s3", "sqs", "autoscaling", "logs", "secretsmanager", "ssm", "ssmmessages"}
    assert by_endpoints.of_type("AWS::EC2::NatGateway") == {}
    assert by_endpoints.of_type("AWS::EC2::Route") == {}
    assert by_endpoints.of_type("AWS::EC2::InternetGateway") == {}
    assert services(by_nat) == {"s3"}
    assert by_nat.properties("NatGateway")["SubnetId"] == "<PublicSubnet>"
    assert by_nat.properties("PrivateRouteOut")["NatGatewayId"] == "<NatGateway>"
    zones = [by_nat.properties(f"PrivateSubnet{zone}")["AvailabilityZone"] for zone in "AB"]
    assert zones == ["us-east-1a", "us-east-1b"]


def test_endpoints_refuse_other_accounts() -> None:
    ours = {"aws:ResourceAccount": "123456789012", "aws:PrincipalAccount": "123456789012"}
    for name, one in SHOWN["endpoints"].of_type("AWS::EC2::VPCEndpoint").items():
        first, *others = one["PolicyDocument"]["Statement"]
        if name == "S3Endpoint":
            assert first["Condition"] == {"StringEquals": ours}
            assert [other["Action"] for other in others] == ["s3:GetObject"]
            assert others[0]["Resource"].startswith("arn:aws:s3:::al2023-repos-us-east-1-")
        else:
            only = {"aws:PrincipalAccount": "123456789012"}
            assert (first["Condition"], others) == ({"StringEquals": only}, [])
    (s3,) = SHOWN["postgres"].of_type("AWS::EC2::VPCEndpoint").values()
    assert "Condition" not in s3["PolicyDocument"]["Statement"][0], "ECR's layers are elsewhere"


def test_in_a_network_of_yours_none_is_made() -> None:
    own = SHOWN["own-network"]
    kinds = {resource["Type"] for resource in own.resources.values()}
    assert not kinds & {f"AWS::EC2::{it}" for it in ("VPC", "Subnet", "VPCEndpoint", "RouteTable")}
    subnets = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
    for name in ("PoolGroup", "ManagerGroup"):
        assert own.properties(name)["VPCZoneIdentifier"] == subnets
    assert own.properties("DatabaseSubnets")["SubnetIds"] == subnets
    assert own.properties("WorkerSecurityGroup")["VpcId"] == "vpc-0123456789abcdef0"


# --- Bucket, store, secret, alarms ---------------------------------------------------------------


def rules_of(shape: cfn.Rendered) -> dict[str, dict[str, Any]]:
    rules = shape.properties("Bucket")["LifecycleConfiguration"]["Rules"]
    return {rule["Id"]: rule for rule in rules}


def test_bucket_expires_logs_and_optionally_files() -> None:
    plain, expiring = rules_of(SHOWN["empty"]), rules_of(SHOWN["postgres"])
    assert "files-of-attempts" not in plain
    assert expiring["files-of-attempts"]["ExpirationInDays"] == 30
    assert plain["logs-of-tasks"]["ExpirationInDays"] == 30
    assert plain["uploads-that-never-ended"]["AbortIncompleteMultipartUpload"]
    for rule in expiring.values():
        if "ExpirationInDays" in rule:
            # The prefix of a deletion rule must not contain commits, code, or raw data.
            assert rule["Prefix"] in ("files/", "logs/")


def test_the_bucket_is_private_encrypted_and_outlives_the_stack(shape: cfn.Rendered) -> None:
    bucket = shape.properties("Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
    status = "Enabled" if shape is SHOWN["postgres"] else "Suspended"
    assert bucket["VersioningConfiguration"]["Status"] == status
    assert shape.resources["Bucket"]["DeletionPolicy"] == "RetainExceptOnCreate"
    assert shape.resources["Bucket"]["UpdateReplacePolicy"] == "Retain"


@pytest.mark.parametrize("name", ["postgres", "own-network"])
def test_database_is_private_encrypted_and_retained(name: str) -> None:
    shape = SHOWN[name]
    database = shape.properties("Database")
    assert database["PubliclyAccessible"] is False
    assert database["StorageEncrypted"] is True
    assert database["ManageMasterUserPassword"] is True
    assert "MasterUserPassword" not in database
    assert database["EnableIAMDatabaseAuthentication"] is True
    assert database["BackupRetentionPeriod"] == 7
    assert database["DeletionProtection"] is True
    assert shape.resources["Database"]["DeletionPolicy"] == "Snapshot"
    assert shape.properties("DatabaseParameters")["Parameters"]["rds.force_ssl"] == "1"
    rule = shape.properties("DatabaseFromManager")
    assert rule["SourceSecurityGroupId"] == "<ManagerSecurityGroup.GroupId>"


@pytest.mark.parametrize("name", ["postgres", "own-network"])
def test_database_logs_expire_and_are_deleted_with_the_stack(name: str) -> None:
    """RDS names its log groups after the database, and creates a missing log group without an expiry."""
    shape = SHOWN[name]
    made = shape.properties("Database")
    assert made["DBInstanceIdentifier"] == "batchlab-ledger"
    groups = {
        one: found
        for one, found in shape.of_type("AWS::Logs::LogGroup").items()
        if found["LogGroupName"].startswith("/aws/rds/")
    }
    assert {group["LogGroupName"] for group in groups.values()} == {
        f"/aws/rds/instance/batchlab-ledger/{log}" for log in made["EnableCloudwatchLogsExports"]
    }
    assert set(shape.resources["Database"]["DependsOn"]) == groups.keys(), "they are there first"
    for one, found in groups.items():
        assert found["RetentionInDays"] == shape.properties("LogGroup")["RetentionInDays"]
        assert shape.resources[one]["DeletionPolicy"] == "Delete"


def test_no_parameter_replaces_the_database() -> None:
    """CloudFormation refuses to replace a named resource, and the whole update fails."""
    from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", "AWS::RDS::DBInstance").schema
    fixed = {one.rpartition("/")[2] for one in schema["createOnlyProperties"]}
    properties = TEMPLATE["Resources"]["Database"]["Properties"]
    assert "DBInstanceIdentifier" in fixed & properties.keys()
    for name in fixed & properties.keys():
        text = str(properties[name])
        assert not any(one in text for one in TEMPLATE["Parameters"]), name
    # The subnet group does not have a fixed name, so a change of its subnets does not replace it.
    assert properties["DBSubnetGroupName"] == {"Ref": "DatabaseSubnets"}
    assert "DBSubnetGroupName" not in TEMPLATE["Resources"]["DatabaseSubnets"]["Properties"]


def test_a_store_is_made_for_its_ledger_only() -> None:
    assert "Database" not in SHOWN["simpledb"].resources
    assert "LedgerDomain" in SHOWN["simpledb"].resources
    assert not {"Database", "LedgerDomain"} & SHOWN["endpoints"].resources.keys()


def test_the_token_is_made_up_by_secrets_manager(shape: cfn.Rendered) -> None:
    made = shape.properties("TokenSecret")
    assert made["GenerateSecretString"] == {"PasswordLength": 43, "ExcludePunctuation": True}
    assert "SecretString" not in made


def test_alarms_reach_the_topic(shape: cfn.Rendered) -> None:
    alarms = shape.of_type("AWS::CloudWatch::Alarm")
    assert {"PoolWaitsTooLong", "PoolHasDeadLetters"} <= alarms.keys()
    runs = shape is not SHOWN["empty"]
    assert ({"ManagerIsDown", "ManagerDoesNotCollect"} <= alarms.keys()) == runs
    for alarm in alarms.values():
        assert alarm["AlarmActions"] == alarm["OKActions"] == ["<AlarmTopic>"]
    if "Budget" in shape.resources:
        told = shape.properties("Budget")["NotificationsWithSubscribers"]
        assert {s["Address"] for one in told for s in one["Subscribers"]} == {"<AlarmTopic>"}


NAMES = {
    "Bucket",
    "QueuePrefix",
    "Region",
    "Ledger",
    "BusyWorkers",
    "ManagerGroup",
    "PoolGroups",
    "TokenSecret",
    "LogGroup",
    "AlarmTopic",
}
OF_DATABASE = {"DatabaseHost", "DatabasePort", "DatabaseName", "DatabaseSecret"}


def test_outputs_locate_every_resource(shape: cfn.Rendered) -> None:
    wanted = set(NAMES)
    if "Database" in shape.resources:
        wanted |= OF_DATABASE
    if "LedgerDomain" in shape.resources:
        wanted.add("Domain")
    assert shape.outputs.keys() == wanted
    assert shape.outputs["QueuePrefix"] == "batchlab-"
    assert shape.outputs["PoolGroups"] == "<PoolGroup>"


UNTAGGED = {
    # AWS does not tag these resources, or they are a line in another resource.
    "AWS::S3::BucketPolicy",
    "AWS::SQS::QueuePolicy",
    "AWS::SNS::TopicPolicy",
    "AWS::SNS::Subscription",
    "AWS::IAM::InstanceProfile",
    "AWS::SDB::Domain",
    "AWS::EC2::SubnetRouteTableAssociation",
    "AWS::EC2::Route",
    "AWS::Budgets::Budget",
    "AWS::EC2::VPCGatewayAttachment",
    "AWS::EC2::SecurityGroupIngress",
    "AWS::AutoScaling::ScheduledAction",
    "AWS::CloudWatch::Alarm",
}


def test_taggable_resources_are_tagged_with_the_owner(shape: cfn.Rendered) -> None:
    for name, one in shape.resources.items():
        if one["Type"] in UNTAGGED:
            continue
        found = one["Properties"]
        tags = found.get("Tags") or found["TagSpecifications"][0]["Tags"]
        assert "batchlab" in [t["Value"] for t in tags if t["Key"] == "batchlab.stack"], name


def test_status_uses_the_names_of_the_alarms() -> None:
    for shown in SHOWN.values():
        for alarm in shown.of_type("AWS::CloudWatch::Alarm").values():
            name = alarm["AlarmName"]
            assert name.startswith(("batchlab-pool-default-", "batchlab-manager-"))
            assert name.endswith(tuple(f"-{what}" for what in ALARMS)), name
