"""Leftovers of deleted stacks, found by tag and by name. botocore parses the scripted answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from batchlab.core.errors import NotFound, Refused
from batchlab.deploy.account import Account
from batchlab.deploy.destroy import DataResource, Destroy
from batchlab.deploy.leftovers import AwsResource, Leftover, Leftovers, remove, select_removable
from batchlab.deploy.stack_records import Resource
from tests.support.aws.deploy import Front

ARN = "arn:aws:{}:us-east-1:1:"
DOMAIN = "grid-LedgerDomain-1ABCDEF2GHIJK"


class Cloud:
    """An account whose services return scripted answers in order."""

    def __init__(self, stack: ExitStack, region: str = "us-east-1") -> None:
        self.account = Account(region, "1", "arn:aws:iam::1:user/me")
        self._stubs: dict[str, Stubber] = {}
        for service in ("cloudformation", "ec2", "iam", "logs", "rds", "resourcegroupstaggingapi", "sdb"):
            client: Any = boto3.client(
                service,
                region_name=region if service != "sdb" else "us-east-1",
                aws_access_key_id="a",
                aws_secret_access_key="b",
            )
            self.account._clients[service] = client
            self._stubs[service] = stack.enter_context(Stubber(client))

    def tells(self, service: str, method: str, **answer: Any) -> None:
        self._stubs[service].add_response(method, answer)

    def refuses(self, service: str, method: str, code: str, message: str) -> None:
        self._stubs[service].add_client_error(method, code, message, http_status_code=403)

    def has_logs(self, *names: str) -> None:
        groups = [{"logGroupName": name, "arn": f"{ARN.format('logs')}{name}:*"} for name in names]
        self.tells("logs", "describe_log_groups", logGroups=groups)

    def has_roles(self, *names: str) -> None:
        roles = [
            {
                "Path": "/",
                "RoleName": name,
                "RoleId": "A" * 20,
                "Arn": f"arn:aws:iam::1:role/{name}",
                "CreateDate": datetime(2026, 1, 1, tzinfo=UTC),
            }
            for name in names
        ]
        self.tells("iam", "list_roles", Roles=roles)

    def has_role_policy(self, name: str, region: str) -> None:
        document = f'{{"Resource": "arn:aws:sqs:{region}:1:grid-tasks-*"}}'
        self.tells("iam", "list_role_policies", PolicyNames=["manager"])
        self.tells("iam", "get_role_policy", RoleName=name, PolicyName="manager", PolicyDocument=document)

    def has_role_tag(self, name: str, stack: str | None) -> None:
        role = {
            "Path": "/",
            "RoleName": name,
            "RoleId": "A" * 20,
            "Arn": f"arn:aws:iam::1:role/{name}",
            "CreateDate": datetime(2026, 1, 1, tzinfo=UTC),
            "Tags": [{"Key": "batchlab.stack", "Value": stack}] if stack else [],
        }
        self.tells("iam", "get_role", Role=role)

    def has_domains(self, *names: str) -> None:
        self.tells("sdb", "list_domains", DomainNames=list(names))

    def has_stack(self, name: str, parts: Sequence[str]) -> None:
        one = {
            "StackId": f"{ARN.format('cloudformation')}stack/{name}/1",
            "StackName": name,
            "StackStatus": "CREATE_COMPLETE",
            "CreationTime": datetime(2026, 1, 1, tzinfo=UTC),
        }
        self.tells("cloudformation", "describe_stacks", Stacks=[one])
        summaries = [
            {
                "LogicalResourceId": part,
                "PhysicalResourceId": part,
                "ResourceType": "AWS::X::Y",
                "ResourceStatus": "CREATE_COMPLETE",
                "LastUpdatedTimestamp": datetime(2026, 1, 1, tzinfo=UTC),
            }
            for part in parts
        ]
        self.tells("cloudformation", "list_stack_resources", StackResourceSummaries=summaries)

    def has_no_stack(self) -> None:
        self._stubs["cloudformation"].add_client_error(
            "describe_stacks", "ValidationError", "Stack with id x does not exist"
        )

    def done(self) -> None:
        for stub in self._stubs.values():
            stub.assert_no_pending_responses()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with ExitStack() as stack:
        found = Cloud(stack)
        yield found
        found.done()


def named(cloud: Cloud, *known: str) -> tuple[list[Leftover], list[str]]:
    said: list[str] = []
    return list(Leftovers(cloud.account).named_resources(known, said.append)), said


def test_domain_is_recognized_by_its_cloudformation_name(cloud: Cloud) -> None:
    mine = f"{DOMAIN}-extra"
    cloud.has_domains("customers", "LedgerDomain-1", DOMAIN, mine, "two-LedgerDomain-9Z")
    cloud.has_logs()
    cloud.has_roles()
    cloud.has_stack("grid", ["LedgerDomain", DOMAIN])
    cloud.has_no_stack()
    found, said = named(cloud)
    assert [(one.resource.name, one.resource.stack, one.is_used) for one in found] == [
        (DOMAIN, "grid", True),
        ("two-LedgerDomain-9Z", "two", False),
    ]
    assert all(one.is_guessed for one in found)
    assert found[0].resource.arn == f"arn:aws:sdb:us-east-1:1:domain/{DOMAIN}"
    cloud.tells("sdb", "delete_domain")
    remove(cloud.account, found[0].resource, said.append)
    assert said == []


def test_terminated_instance_is_not_a_leftover(cloud: Cloud) -> None:
    """AWS lists the tags of a terminated instance for about an hour."""
    pages = [
        {"ResourceARN": f"{ARN.format('ec2')}instance/{name}", "Tags": [{"Key": "batchlab.stack", "Value": "grid"}]}
        for name in ("i-1", "i-2")
    ]
    cloud.tells("resourcegroupstaggingapi", "get_resources", ResourceTagMappingList=pages)
    cloud.tells("ec2", "describe_instances", Reservations=[{"Instances": [{"InstanceId": "i-2"}]}])
    cloud.has_no_stack()
    (found,) = Leftovers(cloud.account).tagged_resources()
    assert (found.resource.name, found.is_used) == ("i-2", False)


def test_deleted_nat_gateway_is_not_a_leftover(cloud: Cloud) -> None:
    names = ("nat-1", "nat-2", "nat-3")
    pages = [
        {"ResourceARN": f"{ARN.format('ec2')}natgateway/{name}", "Tags": [{"Key": "batchlab.stack", "Value": "grid"}]}
        for name in names
    ]
    cloud.tells("resourcegroupstaggingapi", "get_resources", ResourceTagMappingList=pages)
    gateways = [{"NatGatewayId": "nat-1", "State": "deleted"}, {"NatGatewayId": "nat-2", "State": "available"}]
    cloud.tells("ec2", "describe_nat_gateways", NatGateways=gateways)
    cloud.has_no_stack()
    (found,) = Leftovers(cloud.account).tagged_resources()
    assert (found.resource.name, found.is_used) == ("nat-2", False)


def test_domain_of_another_stack_generation_is_a_leftover(cloud: Cloud) -> None:
    """The stack was deleted and created again."""
    cloud.has_domains(DOMAIN)
    cloud.has_logs()
    cloud.has_roles()
    cloud.has_stack("grid", ["grid-LedgerDomain-NEWER"])
    (found,), _ = named(cloud)
    assert not found.is_used


def test_logs_of_an_existing_database_are_not_leftovers(cloud: Cloud) -> None:
    cloud.has_domains()
    cloud.has_logs(
        "/aws/rds/instance/gone-ledger/postgresql",
        "/aws/rds/instance/gone-ledger/upgrade",
        "/aws/rds/instance/payments-ledger/postgresql",
        "/aws/rds/instance/shop/postgresql",
        "/aws/rds/instance/tagged-ledger/upgrade",
        "/aws/rds/instance/a-ledger/error",
    )
    cloud.tells("rds", "describe_db_instances", DBInstances=[{"DBInstanceIdentifier": "payments-ledger"}])
    cloud.has_roles()
    cloud.has_no_stack()
    found, said = named(cloud, "/aws/rds/instance/tagged-ledger/upgrade")
    assert [(one.resource.name, one.resource.kind, one.resource.stack) for one in found] == [
        ("/aws/rds/instance/gone-ledger/postgresql", "logs:log-group", "gone"),
        ("/aws/rds/instance/gone-ledger/upgrade", "logs:log-group", "gone"),
    ]
    assert said == []


def test_denied_queries_are_reported_and_the_rest_is_listed(cloud: Cloud) -> None:
    cloud.refuses(
        "sdb", "list_domains", "AuthorizationFailure", "User: eve is not authorized to perform: sdb:ListDomains"
    )
    cloud.has_logs("/aws/rds/instance/gone-ledger/upgrade")
    cloud.tells("rds", "describe_db_instances", DBInstances=[])
    cloud.refuses("iam", "list_roles", "AccessDenied", "User: eve is not authorized to perform: iam:ListRoles")
    cloud.has_no_stack()
    found, (said, of_roles) = named(cloud)
    assert [one.resource.stack for one in found] == ["gone"]
    assert "SimpleDB domains are not listed: eve may not do sdb:ListDomains." in said
    assert "IAM roles are not listed: eve may not do iam:ListRoles." in of_roles


def test_roles_of_the_regions_stacks_are_listed(cloud: Cloud) -> None:
    """A role applies to all regions, and its stack may be in another region."""
    mine, other, used, plain = "gone-ManagerRole-1ABC", "abroad-PoolRole-2DEF", "grid-PoolGpuRole-3GHI", "a-PoolRole-4J"
    cloud.has_domains()
    cloud.has_logs()
    cloud.has_roles("admin", mine, other, used, plain, "gone-ManagerRole-1-x")
    cloud.has_role_policy(mine, "us-east-1")
    cloud.has_role_tag(mine, "gone")
    cloud.has_no_stack()
    cloud.has_role_policy(other, "eu-central-1")
    cloud.has_role_policy(used, "us-east-1")
    cloud.has_role_tag(used, None)
    cloud.has_role_policy(plain, "us-east-1")
    cloud.has_role_tag(plain, "another")
    cloud.has_stack("grid", ["PoolGpuRole", used])
    cloud.has_no_stack()
    found, said = named(cloud)
    assert [(one.resource.kind, one.resource.name, one.resource.stack, one.is_used) for one in found] == [
        ("iam:role", mine, "gone", False),
        ("iam:role", used, "grid", True),
        ("iam:role", plain, "a", False),
    ]
    assert [one.is_guessed for one in found] == [False, True, True]
    assert select_removable(found, []) == found[:1], "the tag proves the stack"
    assert said == []
    cloud.tells("iam", "list_role_policies", PolicyNames=["manager"])
    cloud.tells("iam", "delete_role_policy")
    cloud.tells("iam", "list_attached_role_policies", AttachedPolicies=[])
    cloud.tells("iam", "list_instance_profiles_for_role", InstanceProfiles=[])
    cloud.tells("iam", "delete_role")
    remove(cloud.account, found[0].resource, said.append)


def test_region_without_simpledb_is_not_queried_for_domains() -> None:
    with ExitStack() as stack:
        cloud = Cloud(stack, "eu-central-1")
        cloud.has_logs()
        cloud.has_roles()
        assert named(cloud) == ([], [])
        cloud.done()


# --- Removal -------------------------------------------------------------------------------------


def left(name: str, *, used: bool = False, guessed: bool = False) -> Leftover:
    return Leftover(AwsResource(name, "sdb:domain", name, "grid"), used, guessed)


def test_a_guess_is_removed_only_by_its_name() -> None:
    found = [left("tag"), left("used", used=True), left("a", guessed=True), left("b", guessed=True)]
    assert [one.resource.name for one in select_removable(found, [])] == ["tag"]
    assert [one.resource.name for one in select_removable(found, ["b"])] == ["tag", "b"]


@pytest.mark.parametrize("name", ["tag", "nothing"])
def test_ambiguous_name_is_refused(name: str) -> None:
    with pytest.raises(NotFound, match=f"No leftover that needs --name has the name {name}"):
        select_removable([left("tag"), left("a", guessed=True)], [name])


def test_a_guess_that_is_in_use_is_refused() -> None:
    with pytest.raises(Refused, match="in use by the stack grid"):
        select_removable([left("a", used=True, guessed=True)], ["a"])


# --- Messages about a database -------------------------------------------------------------------


def destroying(cloud: Cloud, fate: str) -> list[str]:
    """Return the output after the deletion of a stack with such a database."""
    from batchlab.deploy.stack import Stack

    database = Resource("Database", "AWS::RDS::DBInstance", "grid-ledger", "CREATE_COMPLETE")
    bucket = Resource("Bucket", "AWS::S3::Bucket", "grid-bucket", "CREATE_COMPLETE")
    front = Front()
    ending = Destroy(Stack(cloud.account, "grid"), front, delete_data=False)
    ending._delete_logs([DataResource(bucket, "kept", "objects"), DataResource(database, fate, "a database")])
    return front.said


@pytest.mark.parametrize("fate", ["snapshot", "deleted"])
def test_late_logs_of_rds_are_deleted_too(cloud: Cloud, fate: str) -> None:
    name = "/aws/rds/instance/grid-ledger/postgresql"
    cloud.has_logs(name)
    cloud.tells("logs", "delete_log_group")
    assert destroying(cloud, fate) == []


def test_retained_database_keeps_its_logs(cloud: Cloud) -> None:
    assert destroying(cloud, "kept") == []


def test_undeletable_logs_are_reported(cloud: Cloud) -> None:
    cloud.has_logs("/aws/rds/instance/grid-ledger/postgresql")
    cloud.refuses(
        "logs",
        "delete_log_group",
        "AccessDeniedException",
        "User: eve is not authorized to perform: logs:DeleteLogGroup",
    )
    (said,) = destroying(cloud, "snapshot")
    assert "Logs below /aws/rds/instance/grid-ledger/ may remain: eve may not do" in said
