"""The checks of `batchlab deploy` before anything is created, on scripted refusals of AWS. botocore parses the answers
(Stubber)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from batchlab.adapters.clock import WallClock
from batchlab.core.errors import UsageError
from batchlab.deploy import checks, database_ca
from batchlab.deploy.account import Account
from batchlab.deploy.checks import check_account, check_database_ca, creations
from batchlab.deploy.settings import PoolSettings, Settings
from batchlab.deploy.stack_records import State
from tests.deploy.test_stack_policies import known
from tests.support import ROOT
from tests.support.aws import cfn
from tests.support.aws.deploy import rds_bundle, release
from tests.support.certificates import Authority

USER = "arn:aws:iam::123456789012:user/eve"
KEY = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE = "arn:aws:iam::123456789012:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
OWN = {"VpcId": "vpc-1", "SubnetIds": "subnet-a,subnet-b"}
ALLOWED = {"EvalActionName": "any", "EvalDecision": "allowed"}


class Aws:
    """A scripted AWS. A call without a scripted answer is an error."""

    def __init__(self, stubs: ExitStack, who: str) -> None:
        self.account = Account("eu-west-1", "123456789012", who)
        self.stubs: dict[str, Stubber] = {}
        for service in ("cloudformation", "ec2", "kms", "iam", "sdb", "autoscaling"):
            make: Any = boto3.client
            client = make(service, region_name="eu-west-1", aws_access_key_id="a", aws_secret_access_key="b")
            self.stubs[service] = stubs.enter_context(Stubber(client))
            self.account._clients[service] = client

    def answer(self, service: str, method: str, answer: dict[str, Any], asked: dict[str, Any] | None = None) -> None:
        self.stubs[service].add_response(method, answer, asked)

    def refuse(self, service: str, method: str, code: str, message: str) -> None:
        self.stubs[service].add_client_error(method, code, message, http_status_code=400)

    def with_default_key(self) -> None:
        self.answer("ec2", "get_ebs_default_kms_key_id", {"KmsKeyId": "alias/aws/ebs"})

    def with_own_key(self, policy: object, state: str = "Enabled") -> None:
        about = {"KeyId": "1", "Arn": KEY, "KeyManager": "CUSTOMER", "KeyState": state}
        self.answer("ec2", "get_ebs_default_kms_key_id", {"KmsKeyId": KEY})
        self.answer("kms", "describe_key", {"KeyMetadata": about}, {"KeyId": KEY})
        if state in checks.USABLE:
            self.answer("kms", "get_key_policy", {"Policy": json.dumps(policy)})

    def with_subnets(self, cidr: str, free: int) -> None:
        subnets = [{"CidrBlock": cidr, "AvailableIpAddressCount": free} for _ in range(2)]
        self.answer("ec2", "describe_subnets", {"Subnets": subnets}, {"SubnetIds": ["subnet-a", "subnet-b"]})

    def notes(
        self, parameters: Mapping[str, str] = MappingProxyType({}), workers: int = 10, state: State | None = None
    ) -> tuple[str, ...]:
        wanted = Settings("grid", "eu-west-1", (PoolSettings("a", max_size=workers - 1), PoolSettings("b", max_size=1)))
        found = check_account(self.account, wanted, {"Ledger": "sqlite", **parameters}, state)
        for stub in self.stubs.values():
            stub.assert_no_pending_responses()
        return found


@pytest.fixture
def stubs() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def aws(stubs: ExitStack) -> Aws:
    """An account whose caller is the root user, so that the permissions are not checked."""
    return Aws(stubs, "arn:aws:iam::123456789012:root")


# --- Certificates of the database ----------------------------------------------------------------


def postgres(database_ca: Path | str = "") -> Settings:
    return Settings("grid", "eu-west-1", parameters=(("Ledger", "postgres"),), database_ca=str(database_ca))


def test_database_needs_the_certificates_of_its_region(tmp_path: Path) -> None:
    check_database_ca(Settings("grid", "eu-west-1"))
    check_database_ca(postgres(rds_bundle(tmp_path, "eu-west-1")))
    with pytest.raises(UsageError) as refused:
        check_database_ca(postgres())
    assert str(refused.value) == (
        "A ledger in RDS needs the certificates of RDS, with which the manager verifies the database. Download "
        "https://truststore.pki.rds.amazonaws.com/eu-west-1/eu-west-1-bundle.pem, and add "
        "--database-ca eu-west-1-bundle.pem."
    )
    with pytest.raises(UsageError, match="does not contain a certificate of RDS in eu-west-1"):
        check_database_ca(postgres(rds_bundle(tmp_path, "eu-west-2")))


@pytest.mark.parametrize("region", ["us-gov-east-1", "cn-north-1"])
def test_regions_with_other_addresses_of_bundles_have_the_list_of_aws(region: str) -> None:
    remedy = database_ca.remedy(region)
    assert "//truststore.pki.rds.amazonaws.com" not in remedy
    assert f"Download {region}-bundle.pem from the list in {database_ca.BUNDLES}" in remedy


def test_given_release_needs_the_certificates_too(tmp_path: Path) -> None:
    bundle = rds_bundle(tmp_path, "eu-west-1")
    check_database_ca(postgres(), release(tmp_path, database_ca=bundle.read_bytes()))
    with pytest.raises(UsageError, match="lacks the certificates of RDS") as refused:
        check_database_ca(postgres(bundle), release(tmp_path))
    assert "omit --release" in refused.value.remedy
    with pytest.raises(UsageError, match=r"The release .* does not contain a certificate of RDS in eu-west-1"):
        check_database_ca(postgres(), release(tmp_path, database_ca=rds_bundle(tmp_path).read_bytes()))


def test_expired_certificates_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's global bundle contains expired certificates too, so one valid certificate of the region is enough."""
    bundle = rds_bundle(tmp_path, "eu-west-1").read_bytes()
    later_s = WallClock().now_s() + 3 * 86400.0
    monkeypatch.setattr(WallClock, "now_s", lambda _: later_s)
    with pytest.raises(UsageError, match="The certificates of RDS in eu-west-1 in x have expired"):
        database_ca.check_bundle(bundle, "x", "eu-west-1")
    database_ca.check_bundle(bundle, "x")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda _: b"", "does not contain certificates in PEM form"),
        (lambda _: "Zertifikate für RDS".encode(), "does not contain certificates in PEM form"),
        (lambda whole: whole + whole[: len(whole) // 2], "does not contain certificates in PEM form"),
        (lambda whole: whole + whole.replace(b"MII", b"AAA", 1), "does not contain certificates in PEM form"),
        (lambda whole: whole + b"-----BEGIN EC PRIVATE KEY-----\n", "contains a private key"),
        (lambda whole: whole * 2000, "has more than 1,048,576 bytes"),
    ],
)
def test_file_that_is_not_a_bundle_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    bundle = tmp_path / "bundle.pem"
    whole = rds_bundle(tmp_path, "eu-west-1").read_bytes() + Authority(tmp_path, "other").bundle.read_bytes()
    bundle.write_bytes(whole)
    assert database_ca.read(bundle, "eu-west-1") == whole
    bundle.write_bytes(spoil(whole))
    with pytest.raises(UsageError, match=says):
        database_ca.read(bundle, "eu-west-1")
    with pytest.raises(UsageError, match="cannot be read"):
        database_ca.read(tmp_path, "eu-west-1")


# --- Addresses -----------------------------------------------------------------------------------


def test_more_workers_than_a_new_vpc_has_addresses_are_refused(aws: Aws) -> None:
    most = 2 * (512 - 5) - 12 - 2
    new = {"VpcId": "", "SubnetIds": "", "Egress": "endpoints"}
    aws.with_default_key()
    assert aws.notes(new, most) == ()
    with pytest.raises(UsageError, match=f"may have 1,001 workers, but .* addresses for {most:,} workers") as refused:
        aws.notes(new, most + 1)
    assert "--set SubnetIds=" in refused.value.remedy
    aws.with_default_key()
    assert aws.notes({**new, "Egress": "nat"}, most + 12) == ()
    with pytest.raises(UsageError, match="but the stack's subnets have addresses for 998 workers"):
        aws.notes({**new, "Ledger": "postgres"}, most)


def test_sizes_of_a_new_network_are_those_of_the_template() -> None:
    shape = cfn.Rendered(cfn.load())
    subnets = shape.of_type("AWS::EC2::Subnet")
    endpoints = shape.of_type("AWS::EC2::VPCEndpoint").values()
    assert len(subnets) == checks.NEW_SUBNETS
    prefixes = {int(one["CidrBlock"].partition("/")[2]) for one in subnets.values()}
    assert prefixes == {32 - checks.NEW_SUBNET_BITS}
    assert sum(len(one.get("SubnetIds", ())) for one in endpoints) == checks.ENDPOINTS


def test_more_workers_than_own_subnets_have_addresses_are_refused(aws: Aws) -> None:
    aws.with_subnets("10.0.0.0/28", 11)
    with pytest.raises(UsageError, match="may have 21 workers, but the stack's subnets have addresses for 20 workers"):
        aws.notes(OWN, 21)


def test_subnets_in_use_are_a_note_without_the_stacks_own_instances(aws: Aws) -> None:
    aws.with_subnets("10.0.0.0/24", 5)
    aws.with_default_key()
    (note,) = aws.notes(OWN, 20)
    assert "may have 20 workers, but the stack's subnets have free addresses for 10 workers at the moment" in note
    outputs = {"ManagerGroup": "grid-manager", "PoolGroups": "grid-pool-a,grid-pool-b"}
    state = State("id", "grid", "UPDATE_COMPLETE", {}, outputs, True, 0.0)
    aws.with_subnets("10.0.0.0/24", 5)
    aws.with_default_key()
    instance = {
        "InstanceId": "i-1",
        "AvailabilityZone": "a",
        "LifecycleState": "InService",
        "HealthStatus": "Healthy",
        "ProtectedFromScaleIn": False,
    }
    group = {
        "AutoScalingGroupName": "grid-pool-a",
        "MinSize": 0,
        "MaxSize": 9,
        "DesiredCapacity": 0,
        "DefaultCooldown": 0,
        "AvailabilityZones": [],
        "HealthCheckType": "EC2",
        "CreatedTime": 0,
        "Instances": [instance] * 12,
    }
    names = ["grid-pool-a", "grid-pool-b"]
    aws.answer(
        "autoscaling", "describe_auto_scaling_groups", {"AutoScalingGroups": [group]}, {"AutoScalingGroupNames": names}
    )
    assert aws.notes(OWN, 20, state) == ()


def test_existing_stack_with_more_workers_than_addresses_is_a_note(aws: Aws) -> None:
    """An upgrade of a stack must not require other pools."""
    deployed = {"PoolName": "a", "PoolMax": "29", "PoolBName": "b", "PoolBMax": "1"}
    state = State("id", "grid", "UPDATE_COMPLETE", deployed, {}, True, 0.0)
    aws.with_subnets("10.0.0.0/28", 11)
    aws.with_default_key()
    (note,) = aws.notes(OWN, 30, state)
    assert "may have 30 workers, but the stack's subnets have addresses for 20 workers" in note
    aws.with_subnets("10.0.0.0/28", 11)
    with pytest.raises(UsageError, match="may have 31 workers"):
        aws.notes(OWN, 31, state)


def test_subnets_with_ipv6_only_are_not_counted(aws: Aws) -> None:
    subnets = [{"AvailableIpAddressCount": 0, "Ipv6Native": True}, {"CidrBlock": "10.0.0.0/28"}]
    aws.answer("ec2", "describe_subnets", {"Subnets": subnets})
    aws.with_default_key()
    assert aws.notes(OWN, 500) == ()


def test_unknown_subnet_is_refused(aws: Aws) -> None:
    message = "The subnet ID 'subnet-b' does not exist"
    aws.refuse("ec2", "describe_subnets", "InvalidSubnetID.NotFound", message)
    with pytest.raises(UsageError, match=message):
        aws.notes(OWN)


def test_check_that_aws_does_not_allow_is_a_note(aws: Aws) -> None:
    denied = f"You are not authorized to perform this operation. User: {USER} is not authorized to perform: "
    aws.refuse("ec2", "describe_subnets", "UnauthorizedOperation", f"{denied}ec2:DescribeSubnets")
    aws.refuse("ec2", "get_ebs_default_kms_key_id", "UnauthorizedOperation", f"{denied}ec2:GetEbsDefaultKmsKeyId")
    assert aws.notes(OWN) == (
        f"The number of free addresses could not be checked: {USER} may not do ec2:DescribeSubnets.",
        f"The key that encrypts new disks could not be checked: {USER} may not do ec2:GetEbsDefaultKmsKeyId.",
    )


# --- Key of encrypted disks ----------------------------------------------------------------------


def allows(principal: object, action: object = "kms:CreateGrant") -> dict[str, object]:
    whole_account = {"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::123456789012:root"}, "Action": "kms:*"}
    return {"Statement": [whole_account, {"Effect": "Allow", "Principal": principal, "Action": action}]}


def grants(aws: Aws, *grants: dict[str, Any]) -> None:
    # A key may have 50,000 grants, because EBS creates a grant for each attached disk.
    asked = {"KeyId": KEY, "GranteePrincipal": ROLE}
    aws.answer("kms", "list_grants", {"Grants": list(grants), "Truncated": False}, asked)


@pytest.mark.parametrize("principal", [{"AWS": ROLE}, {"AWS": ["arn:aws:iam::1:user/x", ROLE]}, "*", {"AWS": "*"}])
def test_key_whose_policy_names_auto_scaling_is_accepted(aws: Aws, principal: object) -> None:
    aws.with_own_key(allows(principal))
    assert aws.notes() == ()


@pytest.mark.parametrize("action", ["kms:*", "*", ["kms:Decrypt", "kms:Create*"]])
def test_key_whose_policy_allows_grants_is_accepted(aws: Aws, action: object) -> None:
    aws.with_own_key(allows({"AWS": ROLE}, action))
    assert aws.notes() == ()


def test_key_whose_policy_allows_auto_scaling_no_grants_is_refused(aws: Aws) -> None:
    aws.with_own_key(allows({"AWS": ROLE}, ["kms:DescribeKey", "kms:Decrypt"]))
    grants(aws)
    with pytest.raises(UsageError, match="which Auto Scaling may not use"):
        aws.notes()


def test_key_with_a_grant_for_auto_scaling_is_accepted(aws: Aws) -> None:
    aws.with_own_key(allows({"AWS": USER}))
    grants(aws, {"Operations": ["Decrypt"]}, {"Operations": list(checks.GRANTED)})
    assert aws.notes() == ()


@pytest.mark.parametrize(
    ("principal", "found"), [({"AWS": USER}, []), ({"Service": "ec2.amazonaws.com"}, [{"Operations": ["Decrypt"]}])]
)
def test_customer_managed_key_without_auto_scaling_is_refused(
    aws: Aws, principal: object, found: list[dict[str, Any]]
) -> None:
    aws.with_own_key(allows(principal))
    grants(aws, *found)
    with pytest.raises(UsageError) as refused:
        aws.notes()
    assert refused.value.message == (
        f"The account encrypts new disks with the key {KEY}, which Auto Scaling may not use, so no instance could "
        "start."
    )
    assert f"create-grant --region eu-west-1 --key-id {KEY} --grantee-principal {ROLE} --o" in refused.value.remedy


@pytest.mark.parametrize("state", ["Disabled", "PendingDeletion"])
def test_key_that_cannot_be_used_is_refused(aws: Aws, state: str) -> None:
    aws.with_own_key({}, state)
    with pytest.raises(UsageError, match=f"which is {state}, so no instance could start"):
        aws.notes()


def test_key_of_several_regions_can_be_used_during_its_update(aws: Aws) -> None:
    aws.with_own_key(allows({"AWS": ROLE}), "Updating")
    assert aws.notes() == ()


def test_key_that_cannot_be_read_is_a_note(aws: Aws) -> None:
    aws.answer("ec2", "get_ebs_default_kms_key_id", {"KmsKeyId": KEY})
    denied = f"User: {USER} is not authorized to perform: kms:DescribeKey on resource: {KEY}"
    aws.refuse("kms", "describe_key", "AccessDeniedException", denied)
    (note,) = aws.notes()
    assert note == f"The key that encrypts new disks could not be checked: {USER} may not do kms:DescribeKey."
    aws.with_own_key("a policy")
    (note,) = aws.notes()
    assert "is not a policy of IAM" in note


# --- SimpleDB ------------------------------------------------------------------------------------


def test_account_without_simpledb_is_refused(aws: Aws) -> None:
    aws.refuse("sdb", "list_domains", "OptInRequired", "The AWS Access Key Id needs a subscription for the service")
    with pytest.raises(UsageError, match=r"SimpleDB does not accept this account\..*needs a subscription") as refused:
        aws.notes({"Ledger": "simpledb"})
    assert refused.value.remedy.startswith("Use --ledger postgres or sqlite")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("AuthorizationFailure", f"User ({USER}) does not have permission to perform (sdb:ListDomains)"),
        ("AccessDenied", f"User: {USER} is not authorized to perform: sdb:ListDomains"),
        ("ServiceUnavailable", "Service Amazon SimpleDB is currently unavailable"),
    ],
)
def test_simpledb_that_cannot_be_asked_is_a_note(aws: Aws, code: str, message: str) -> None:
    aws.refuse("sdb", "list_domains", code, message)
    aws.with_default_key()
    advice, note = aws.notes({"Ledger": "simpledb"})
    assert advice == checks.NO_SIMPLEDB
    assert note.startswith("The permission to use SimpleDB could not be checked: ")


def test_account_with_simpledb_is_advised_to_use_rds(aws: Aws) -> None:
    aws.answer("sdb", "list_domains", {"DomainNames": []})
    aws.with_default_key()
    (note,) = aws.notes({"Ledger": "simpledb"})
    assert "closed SimpleDB to new accounts. Use RDS (--ledger postgres)" in note


# --- Permissions ---------------------------------------------------------------------------------


def simulate(
    aws: Aws, decide: Callable[[str, str], dict[str, Any]], parameters: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, ...]:
    source = "arn:aws:iam::123456789012:role/ops/deployer" if ":sts:" in aws.account.who else aws.account.who
    for resource, actions in creations(aws.account, "grid", {"Ledger": "sqlite", **parameters}).items():
        results = [{**ALLOWED, **decide(action, resource), "EvalActionName": action} for action in actions]
        asked = {"PolicySourceArn": source, "ActionNames": actions, "ResourceArns": [resource]}
        aws.answer("iam", "simulate_principal_policy", {"EvaluationResults": results}, asked)
    aws.with_default_key()
    return aws.notes(parameters)


def test_missing_permissions_are_noted(stubs: ExitStack) -> None:
    def decide(action: str, resource: str) -> dict[str, Any]:
        denied = action.startswith("route53:") or ":og:" in resource
        return {"EvalDecision": "implicitDeny" if denied else "allowed"}

    network = {"VpcId": "", "SubnetIds": "", "Egress": "endpoints", "Ledger": "postgres"}
    (note,) = simulate(Aws(stubs, USER), decide, network)
    assert note == (
        f"According to IAM's policy simulator, {USER} may not do route53:AssociateVPCWithHostedZone on "
        "arn:aws:route53:::hostedzone/*, rds:CreateDBInstance on arn:aws:rds:eu-west-1:123456789012:og:default:"
        "postgres-17. Allow these actions first; docs/deploy.md lists all actions of a deployment."
    )


def test_permission_with_unknown_conditions_is_not_judged(stubs: ExitStack) -> None:
    unknown = {"EvalDecision": "implicitDeny", "MissingContextValues": ["iam:PassedToService"]}
    assert simulate(Aws(stubs, USER), lambda _, __: unknown) == ()


def test_many_missing_permissions_are_counted(stubs: ExitStack) -> None:
    (note,) = simulate(Aws(stubs, USER), lambda _, __: {"EvalDecision": "explicitDeny"})
    assert note.count(" on arn:aws:") == checks.MAX_SHOWN
    assert re.search(r", and \d+ more\. Allow", note)


def test_permissions_of_a_session_are_those_of_its_role(stubs: ExitStack) -> None:
    aws = Aws(stubs, "arn:aws:sts::123456789012:assumed-role/deployer/eve@example.org")
    role = {
        "Path": "/ops/",
        "RoleName": "deployer",
        "RoleId": "AROAEXAMPLEEXAMPLE",
        "Arn": "arn:aws:iam::123456789012:role/ops/deployer",
        "CreateDate": 0,
    }
    aws.answer("iam", "get_role", {"Role": role}, {"RoleName": "deployer"})
    assert simulate(aws, lambda _, __: {}) == ()


def test_simulator_that_is_not_allowed_is_a_note(stubs: ExitStack) -> None:
    aws = Aws(stubs, USER)
    aws.with_default_key()
    denied = f"User: {USER} is not authorized to perform: iam:SimulatePrincipalPolicy on resource: {USER}"
    aws.refuse("iam", "simulate_principal_policy", "AccessDenied", denied)
    (note,) = aws.notes()
    assert note == f"The permissions of {USER} could not be checked: {USER} may not do iam:SimulatePrincipalPolicy."


def test_documented_policy_allows_what_is_checked_and_what_aws_requires() -> None:
    (block,) = re.findall(r"```json\n(\{.*?\n\})\n```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    statements = json.loads(block.replace("ACCOUNT", "123456789012"))["Statement"]

    def allowed(action: str, resource: str) -> bool:
        return any(
            any(fnmatchcase(action, pattern) for pattern in cfn.as_list(one["Action"]))
            and any(fnmatchcase(resource, pattern) for pattern in cfn.as_list(one["Resource"]))
            for one in statements
        )

    account = Account("eu-west-1", "123456789012", USER)
    shapes = [
        {"VpcId": "", "Egress": "endpoints", "Ledger": "postgres", "BudgetUsd": "50"},
        {"VpcId": "", "Egress": "nat", "Ledger": "simpledb"},
    ]
    found = [
        (action, resource)
        for shape in shapes
        for resource, actions in creations(account, "batchlab", shape).items()
        for action in actions
    ]
    assert [one for one in found if not allowed(*one)] == []
    for action, _ in found:
        service, name = action.split(":")
        assert name.lower() in known()[service], action
    # AWS also checks the option group, which the template does not name.
    parts = {resource.split(":")[5] for action, resource in found if action == "rds:CreateDBInstance"}
    assert parts == {"db", "og", "pg", "subgrp"} <= set(known()["rds"]["createdbinstance"]["Resources"])
