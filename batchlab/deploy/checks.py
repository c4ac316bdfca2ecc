"""Checks of a stack's settings and its account, before `batchlab deploy` creates or changes anything.

Without the checks, AWS would refuse the stack only after minutes, or create a stack whose instances cannot start. A
check raises UsageError if the stack could not work. A check returns a note for the plan if its result is uncertain, or
if AWS does not allow the check.

Invariant: the checks only read.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from batchlab.core.errors import BackendError, Refused, UsageError
from batchlab.deploy import database_ca, release, status
from batchlab.deploy.account import DOCS, Account, Missing, aws_errors
from batchlab.deploy.settings import Settings, from_stack
from batchlab.deploy.stack_records import State

RESERVED = 5
"""Number of addresses of each subnet that AWS reserves."""
NEW_SUBNETS, NEW_SUBNET_BITS = 2, 9
"""Number and size of the subnets for instances in a VPC that the stack creates."""
ENDPOINTS = 12
"""Number of addresses that the interface endpoints of a new VPC use."""
MANAGERS = 2
"""Number of the manager's addresses while AWS replaces the manager's instance."""
DATABASES = 2
"""Number of addresses of a database with a standby."""
MAX_SHOWN = 5
"""Maximum number of missing permissions in a note."""

AWS_KEY = "alias/aws/ebs"
"""Alias of the key of AWS that encrypts disks unless the account has another default key."""
KEY_DOCS = "https://docs.aws.amazon.com/autoscaling/ec2/userguide/key-policy-requirements-EBS-encryption.html"
USABLE = ("Enabled", "Updating")
"""States of a key in which AWS encrypts with the key."""
GRANTED = (
    *("Encrypt", "Decrypt", "ReEncryptFrom", "ReEncryptTo", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext"),
    *("DescribeKey", "CreateGrant"),
)
"""Operations of a grant with which Auto Scaling starts instances with encrypted disks."""

NO_SIMPLEDB = "AWS is reported to have closed SimpleDB to new accounts. Use RDS (--ledger postgres) for a new stack."

CLOSED = "OptInRequired"
"""SimpleDB's error code for an account without access to SimpleDB."""


def check_database_ca(wanted: Settings, archive: Path | None = None) -> None:
    """Raise UsageError if the manager of the stack could not verify its database.

    `archive` is an existing release archive that is deployed instead of a new release.
    """
    if dict(wanted.parameters).get("Ledger") != "postgres":
        return
    if archive is not None:
        content = release.read_member(archive, release.DATABASE_CA, database_ca.MAX_BYTES)
        if content is None:
            raise UsageError(
                f"The release {archive} lacks the certificates of RDS, so the manager could not verify the database.",
                remedy="Deploy a new release: omit --release, and add --database-ca FILE.pem.",
            )
        database_ca.check_bundle(content, f"The release {archive}", wanted.region)
    elif wanted.database_ca:
        database_ca.read(Path(wanted.database_ca), wanted.region)
    else:
        raise UsageError(
            "A ledger in RDS needs the certificates of RDS, with which the manager verifies the database.",
            remedy=database_ca.remedy(wanted.region),
        )


def check_account(
    account: Account, wanted: Settings, parameters: Mapping[str, str], state: State | None
) -> tuple[str, ...]:
    """Check the account before the change of a stack, and return the notes for the plan.

    `parameters` contains the values of all template parameters. Raise UsageError if the stack could not work.
    """
    return (
        *_noted("The number of free addresses", lambda: _check_addresses(account, wanted, parameters, state)),
        *_noted("The permission to use SimpleDB", lambda: _check_simpledb(account, parameters)),
        *_noted("The key that encrypts new disks", lambda: _check_disk_key(account)),
        *_noted(f"The permissions of {account.who}", lambda: _check_permissions(account, wanted.stack, parameters)),
    )


def _noted(what: str, check: Callable[[], Iterable[str] | None]) -> Iterator[str]:
    """Yield the notes of a check, or a note that the check was not possible."""
    try:
        yield from check() or ()
    except (BackendError, Refused) as error:
        yield f"{what} could not be checked: {error.message}"


# --- Addresses of instances ----------------------------------------------------------------------


def _check_addresses(
    account: Account, wanted: Settings, parameters: Mapping[str, str], state: State | None
) -> Iterator[str]:
    """Compare the largest fleet with the IPv4 addresses of the subnets.

    A stack that already has these pools works with fewer workers, so a note is enough.
    """
    workers = _workers(wanted)
    deployed = from_stack(wanted.stack, wanted.region, state.parameters)[0] if state and not state.is_new else None
    needed = workers + MANAGERS + (DATABASES if parameters.get("Ledger") == "postgres" else 0)
    subnets = [name for name in parameters.get("SubnetIds", "").split(",") if name]
    if subnets:
        found = _subnets(account, subnets)
        if any("CidrBlock" not in subnet for subnet in found):
            return  # A subnet with IPv6 only has addresses for any number of workers.
        size = sum(ipaddress.ip_network(subnet["CidrBlock"]).num_addresses - RESERVED for subnet in found)
        # The workers of this stack use some of the addresses that are not free.
        groups = account.groups(status.pool_groups(state)) if state else []
        own = sum(len(group.get("Instances", ())) for group in groups)
        free = sum(subnet["AvailableIpAddressCount"] for subnet in found) + own
    elif parameters.get("VpcId") == "":
        size = NEW_SUBNETS * (2**NEW_SUBNET_BITS - RESERVED)
        size -= ENDPOINTS if parameters.get("Egress") == "endpoints" else 0
        free = size
    else:
        return
    if needed > size:
        message = (
            f"The pools may have {workers:,} workers, but the stack's subnets have addresses for "
            f"{max(0, size - needed + workers):,} workers."
        )
        if deployed and workers <= _workers(deployed):
            yield message
            return
        raise UsageError(
            message,
            remedy="Lower the maximum of a --pool, or name larger subnets of your own with --set VpcId=vpc-… "
            "--set SubnetIds=subnet-…,subnet-….",
        )
    if workers > free:
        yield (
            f"The pools may have {workers:,} workers, but the stack's subnets have free addresses for {free:,} workers "
            "at the moment. AWS cannot start further workers until other resources release addresses."
        )


def _workers(settings: Settings) -> int:
    return sum(pool.max_size for pool in settings.pools)


def _subnets(account: Account, subnets: list[str]) -> list[Any]:
    try:
        with aws_errors("SubnetIds", lambda _, message: "subnet ID" in message):
            found: list[Any] = account.client("ec2").describe_subnets(SubnetIds=subnets)["Subnets"]
    except Missing as error:
        raise UsageError(
            error.message, remedy="Name private subnets of VpcId in this region with --set SubnetIds=subnet-…,subnet-…."
        ) from error
    return found


# --- SimpleDB ------------------------------------------------------------------------------------


def _check_simpledb(account: Account, parameters: Mapping[str, str]) -> Iterator[str]:
    if parameters.get("Ledger") != "simpledb":
        return
    yield NO_SIMPLEDB
    if not account.is_real:
        return
    try:
        with aws_errors("ListDomains", lambda code, _: code == CLOSED):
            account.client("sdb").list_domains(MaxNumberOfDomains=1)
    except Missing as error:
        raise UsageError(
            f"SimpleDB does not accept this account. {error.message}", remedy="Use --ledger postgres or sqlite."
        ) from error


# --- Key of encrypted disks ----------------------------------------------------------------------


def _check_disk_key(account: Account) -> None:
    """Raise UsageError if Auto Scaling may not use the account's default key for disks.

    The disks of a stack are always encrypted. AWS's own key needs no permission, but a customer managed key does.
    Without the permission, AWS terminates each new instance at once. The check is only for AWS, because emulators do
    not have a default key.
    """
    if not account.is_real:
        return
    with aws_errors("GetEbsDefaultKmsKeyId"):
        name = account.client("ec2").get_ebs_default_kms_key_id()["KmsKeyId"]
    if name.endswith(AWS_KEY):
        return
    kms = account.client("kms")
    with aws_errors("DescribeKey"):
        key = kms.describe_key(KeyId=name)["KeyMetadata"]
    if key.get("KeyManager") == "AWS":
        return
    arn = key["Arn"]
    if key.get("KeyState", "Enabled") not in USABLE:
        raise UsageError(
            f"The account encrypts new disks with the key {arn}, which is {key['KeyState']}, so no instance could "
            "start.",
            remedy="Cancel a pending deletion of the key and enable it, or run "
            f"`aws ec2 reset-ebs-default-kms-key-id --region {account.region}`.",
        )
    role = f"{_global_arn(account, 'iam')}role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"
    with aws_errors("GetKeyPolicy"):
        policy = kms.get_key_policy(KeyId=arn, PolicyName="default")["Policy"]
    if _allows(policy, role):
        return
    grants = account.pages("kms", "list_grants", "Grants", KeyId=arn, GranteePrincipal=role)
    if any("CreateGrant" in grant.get("Operations", ()) for grant in grants):
        return
    raise UsageError(
        f"The account encrypts new disks with the key {arn}, which Auto Scaling may not use, so no instance could "
        "start.",
        remedy=f"Run `aws kms create-grant --region {account.region} --key-id {arn} --grantee-principal {role} "
        f"--operations {' '.join(GRANTED)}`, or change the key's policy ({KEY_DOCS}).",
    )


def _allows(policy: str, role: str) -> bool:
    """Return whether a statement of the key's policy allows CreateGrant for the role, or for everyone with conditions.
    Auto Scaling starts instances with encrypted disks through grants.

    A statement for the whole account does not count, because it allows only what the policies of a role allow, and the
    policies of Auto Scaling's role do not allow the use of keys.
    """
    try:
        statements = json.loads(policy)["Statement"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError("The policy of the key is not a policy of IAM.") from error
    for statement in _as_list(statements):
        principal = statement.get("Principal")
        names = _as_list(principal.get("AWS", ()) if isinstance(principal, dict) else principal)
        actions = [str(action).lower() for action in _as_list(statement.get("Action", ()))]
        if (
            statement.get("Effect") == "Allow"
            and any(name in (role, "*") for name in names)
            and ("NotAction" in statement or any(fnmatchcase("kms:creategrant", action) for action in actions))
        ):
            return True
    return False


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# --- Permissions ---------------------------------------------------------------------------------


def _check_permissions(account: Account, stack: str, parameters: Mapping[str, str]) -> Iterator[str]:
    """Ask IAM's policy simulator whether the caller may create the stack's resources.

    The simulator does not decide as AWS in all cases, so a missing permission is a note. The simulator cannot judge a
    permission with a condition on values that it does not know.
    """
    caller = _policy_source(account)
    if not caller:
        return
    iam = account.client("iam")
    missing: list[str] = []
    for resource, actions in creations(account, stack, parameters).items():
        with aws_errors("SimulatePrincipalPolicy"):
            response = iam.simulate_principal_policy(
                PolicySourceArn=caller, ActionNames=actions, ResourceArns=[resource]
            )
        missing += [
            f"{result['EvalActionName']} on {resource}"
            for result in response["EvaluationResults"]
            if result["EvalDecision"] != "allowed" and not result.get("MissingContextValues")
        ]
    if missing:
        more = f", and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
        yield (
            f"According to IAM's policy simulator, {account.who} may not do {', '.join(missing[:MAX_SHOWN])}{more}. "
            f"Allow these actions first; {DOCS} lists all actions of a deployment."
        )


def _policy_source(account: Account) -> str:
    """Return the ARN of the user or role whose policies apply to the caller, or "" if the caller may do everything or
    does not have policies.
    """
    kind, _, name = account.who.rpartition(":")[2].partition("/")
    if kind == "user":
        return account.who
    if kind != "assumed-role":
        return ""
    # The ARN of the session does not contain the path of the role.
    with aws_errors("GetRole"):
        role: str = account.client("iam").get_role(RoleName=name.partition("/")[0])["Role"]["Arn"]
    return role


def creations(account: Account, stack: str, parameters: Mapping[str, str]) -> dict[str, list[str]]:
    """Return actions with which CloudFormation creates the stack in the caller's name, by resource."""
    regional, roles = account.arn.format, _global_arn(account, "iam")
    found = {
        f"{roles}role/{stack}-ManagerRole": ["iam:CreateRole", "iam:PutRolePolicy", "iam:PassRole"],
        f"{roles}instance-profile/{stack}-ManagerProfile": ["iam:CreateInstanceProfile"],
        f"{_global_arn(account, 's3', in_account=False)}{stack}-bucket": ["s3:CreateBucket", "s3:PutBucketPolicy"],
        f"{regional('sqs')}{stack}-events": ["sqs:CreateQueue"],
        f"{regional('sns')}{stack}-AlarmTopic": ["sns:CreateTopic"],
        f"{regional('secretsmanager')}secret:TokenSecret-1": ["secretsmanager:CreateSecret"],
        f"{regional('logs')}log-group:/batchlab/{stack}": ["logs:CreateLogGroup"],
        f"{regional('cloudwatch')}alarm:{stack}-manager-down": ["cloudwatch:PutMetricAlarm"],
        f"{regional('autoscaling')}autoScalingGroup:*:autoScalingGroupName/{stack}-manager": [
            "autoscaling:CreateAutoScalingGroup"
        ],
        f"{regional('ec2')}launch-template/*": ["ec2:CreateLaunchTemplate"],
        f"{regional('ec2')}instance/*": ["ec2:RunInstances"],
    }
    if parameters.get("VpcId") == "":
        found[f"{regional('ec2')}vpc/*"] = ["ec2:CreateVpc"]
        found[f"{regional('ec2')}vpc-endpoint/*"] = ["ec2:CreateVpcEndpoint"]
        if parameters.get("Egress") == "endpoints":
            # EC2 associates a private hosted zone with the VPC for each endpoint, in the caller's name.
            found[f"{_global_arn(account, 'route53', in_account=False)}hostedzone/*"] = [
                "route53:AssociateVPCWithHostedZone"
            ]
        else:
            found[f"{regional('ec2')}natgateway/*"] = ["ec2:CreateNatGateway"]
    if parameters.get("Ledger") == "postgres":
        for part in (f"db:{stack}-ledger", f"subgrp:{stack}-databasesubnets", f"pg:{stack}-databaseparameters"):
            found[f"{regional('rds')}{part}"] = ["rds:CreateDBInstance"]
        found[f"{regional('rds')}og:default:postgres-17"] = ["rds:CreateDBInstance"]
    if parameters.get("Ledger") == "simpledb":
        found[f"{regional('sdb')}domain/{stack}-LedgerDomain"] = ["sdb:CreateDomain"]
    if parameters.get("BudgetUsd", "0") != "0":
        found[f"{_global_arn(account, 'budgets')}budget/{stack}-{account.region}"] = ["budgets:ModifyBudget"]
    return found


def _global_arn(account: Account, service: str, *, in_account: bool = True) -> str:
    """Return the common prefix of the ARNs of a service without regions."""
    partition = account.arn.split(":")[1]
    return f"arn:{partition}:{service}::{account.id if in_account else ''}:"
