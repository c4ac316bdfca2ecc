"""The cause of a failed stack, from CloudFormation's recorded events."""

from __future__ import annotations

import re

import pytest

from batchlab.deploy.stack_records import Event, advice, root_cause

STACK = "AWS::CloudFormation::Stack"


def events(*rows: tuple[str, str, str, str], newest_first: bool = True) -> list[Event]:
    """Return events from rows of resource, type, status, and reason in the order of time. The events are listed in
    AWS's order."""
    made = [Event(f"e{n}", float(n), *row, is_of_stack=row[1] == STACK) for n, row in enumerate(rows)]
    return made[::-1] if newest_first else made


ROLLED_BACK = events(
    ("grid", STACK, "CREATE_IN_PROGRESS", "User Initiated"),
    ("Vpc", "AWS::EC2::VPC", "CREATE_IN_PROGRESS", ""),
    ("Bucket", "AWS::S3::Bucket", "CREATE_IN_PROGRESS", ""),
    ("Bucket", "AWS::S3::Bucket", "CREATE_COMPLETE", ""),
    (
        "Database",
        "AWS::RDS::DBInstance",
        "CREATE_FAILED",
        'Resource handler returned message: "Cannot find version 17.99 for postgres (Service: Rds, '
        'Status Code: 400, Request ID: 1-2-3)" (RequestToken: x, HandlerErrorCode: InvalidRequest)',
    ),
    ("Vpc", "AWS::EC2::VPC", "CREATE_FAILED", "Resource creation cancelled"),
    ("PoolTasks", "AWS::SQS::Queue", "CREATE_FAILED", "Resource creation cancelled"),
    (
        "grid",
        STACK,
        "ROLLBACK_IN_PROGRESS",
        "The following resource(s) failed to create: [Database, Vpc, PoolTasks]. Rollback requested by user.",
    ),
    ("Bucket", "AWS::S3::Bucket", "DELETE_COMPLETE", ""),
    ("grid", STACK, "ROLLBACK_COMPLETE", ""),
)


def test_the_cause_is_the_first_failure_that_no_other_has_caused() -> None:
    cause = root_cause(ROLLED_BACK)
    assert cause is not None
    assert (cause.resource, cause.type) == ("Database", "AWS::RDS::DBInstance")
    assert cause.reason.startswith('Resource handler returned message: "Cannot find version 17.99')
    assert "describe-orderable-db-instance-options" in cause.remedy


def test_the_order_in_which_events_are_listed_does_not_matter() -> None:
    assert root_cause(ROLLED_BACK[::-1]) == root_cause(ROLLED_BACK)


def test_a_cancelled_resource_that_is_first_in_time_is_not_the_cause() -> None:
    """A canceled resource may be listed before the resource that caused its cancellation."""
    cause = root_cause(
        events(
            ("A", "AWS::SQS::Queue", "CREATE_FAILED", "Resource creation cancelled"),
            ("B", "AWS::IAM::Role", "CREATE_FAILED", "grid-role already exists in stack x"),
        )
    )
    assert cause is not None
    assert cause.resource == "B"


def test_cause_of_a_failed_update_is_not_the_failed_rollback() -> None:
    cause = root_cause(
        events(
            ("grid", STACK, "UPDATE_IN_PROGRESS", "User Initiated"),
            ("Group", "AWS::AutoScaling::AutoScalingGroup", "UPDATE_FAILED", "quota exceeded"),
            ("Other", "AWS::SQS::Queue", "UPDATE_FAILED", "Resource update cancelled"),
            ("grid", STACK, "UPDATE_ROLLBACK_IN_PROGRESS", "The following … [Group, Other]"),
            ("Group", "AWS::AutoScaling::AutoScalingGroup", "UPDATE_FAILED", "does not exist"),
            ("grid", STACK, "UPDATE_ROLLBACK_FAILED", "The following … [Group]"),
        )
    )
    assert cause is not None
    assert cause.reason == "quota exceeded"


def test_reason_of_the_stack_is_used_without_a_failed_resource() -> None:
    cause = root_cause(
        events(
            ("grid", STACK, "CREATE_IN_PROGRESS", "User Initiated"),
            ("grid", STACK, "ROLLBACK_IN_PROGRESS", "Template validation failed"),
            ("grid", STACK, "ROLLBACK_COMPLETE", ""),
        )
    )
    assert cause is not None
    assert (cause.resource, cause.reason) == ("grid", "Template validation failed")


def test_all_canceled_resources_still_give_a_cause() -> None:
    cause = root_cause(events(("A", "AWS::SQS::Queue", "CREATE_FAILED", "Resource creation cancelled")))
    assert cause is not None
    assert cause.resource == "A"


def test_success_has_no_cause() -> None:
    assert root_cause([]) is None
    assert root_cause(events(("A", "AWS::SQS::Queue", "CREATE_COMPLETE", ""))) is None


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("Requires capabilities : [CAPABILITY_NAMED_IAM]", "CAPABILITY_NAMED_IAM"),
        ("The maximum number of VPCs has been reached. (Service: Ec2, Status Code: 400)", "Service Quotas"),
        ("You have requested more vCPU capacity than your current vCPU limit of 32 allows", "Service Quotas"),
        ("Cannot exceed quota for RolesPerAccount: 1000", "Service Quotas"),
        ("Resource of type 'AWS::Logs::LogGroup' with identifier '/batchlab/g' already exists.", "gc --aws"),
        ("batchlab-role (Service: Iam, HandlerErrorCode: AlreadyExists)", "another name"),
        ("You must wait 60 seconds after deleting a queue before you can create another", "in a minute"),
        (
            "User: arn:aws:iam::1:user/eve is not authorized to perform: ec2:CreateVpc on "
            "resource: * because no identity-based policy allows the ec2:CreateVpc action",
            "Allow the deployer ec2:CreateVpc",
        ),
        ("API: s3:PutBucketPolicy Access Denied", "docs/deploy.md"),
        ("We currently do not have sufficient m7i.large capacity in the Availability Zone", "more instance types"),
        ("InsufficientInstanceCapacity: Insufficient capacity.", "more instance types"),
        (
            "RDS does not support creating a DB instance with the following combination: "
            "DBInstanceClass=db.t2.micro, Engine=postgres, EngineVersion=17.4",
            "describe-orderable-db-instance-options",
        ),
        ("Failed to receive 1 resource signal(s) within the specified duration", "log group"),
        ("Resource timed out waiting for completion", "log group"),
        ("The bucket you tried to delete is not empty (Service: S3)", "--delete-data"),
        ("Rate exceeded (Service: Lambda, Status Code: 429)", "apply again"),
        ("resource sg-1 has a dependent object", "Remove that first"),
        ("Value (m9.huge) for parameter instanceType is invalid.", "--set NAME=VALUE"),
        ("Invalid AMI: InvalidAMIID.NotFound", "WorkerImage"),
        ("Something that nobody has seen before", "the problem in the reason"),
    ],
)
def test_known_failures_have_advice(reason: str, says: str) -> None:
    assert re.search(re.escape(says), advice(reason)), advice(reason)
