"""Search for resources that remain from deleted stacks in an AWS account and region, and removal of these resources.

Invariants: batchlab's tag proves that a resource belongs to a stack, and a resource's name only suggests the stack. A
role also needs policies that name the region. A resource without this proof is removed only if the user names the
resource. Each failed removal of a resource is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError, NotFound, Refused
from batchlab.deploy import plan, release
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.plan import WITH_SIMPLEDB
from batchlab.deploy.stack import TAG, Stack

MAX_DELETED_KEYS = 1000
"""Maximum number of keys in one call of DeleteObjects."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AwsResource:
    """AWS resource that may belong to a stack.

    `kind` is the service and the type of the resource, such as "sqs:queue". `stack` is the name of the stack in the
    resource's tag, or else in the resource's name.
    """

    arn: str
    kind: str
    name: str
    stack: str


_NAMED_ALONE = {"s3": "s3:bucket", "sns": "sns:topic", "sqs": "sqs:queue"}
"""Kind of resource by service, for services whose ARNs lack a resource type before the name of the resource."""


def resource_of(arn: str, stack: str) -> AwsResource:
    service, rest = arn.split(":", 5)[2], arn.split(":", 5)[5]
    if service in _NAMED_ALONE:
        return AwsResource(arn, _NAMED_ALONE[service], rest, stack)
    if service == "autoscaling":
        return AwsResource(arn, "autoscaling:group", arn.rpartition("/")[2], stack)
    separator = "/" if "/" in rest and (":" not in rest or rest.find("/") < rest.find(":")) else ":"
    kind, _, name = rest.partition(separator)
    return AwsResource(arn, f"{service}:{kind}", name.removesuffix(":*"), stack)


def is_removable(resource: AwsResource) -> bool:
    """Return whether batchlab can remove this kind of resource."""
    return resource.kind in _REMOVERS


def remove(account: Account, resource: AwsResource, say: Say) -> None:
    """Remove an AWS resource. Raise BackendError if AWS refuses the removal, or if batchlab cannot remove this kind of
    resource.
    """
    remover = _REMOVERS.get(resource.kind)
    if remover is None:
        raise BackendError(f"batchlab cannot remove {resource.arn}.", remedy="Remove this resource in the console.")
    remover(account, resource, say)


OWN_FOLDERS = (release.PREFIX, plan.FOLDER)
"""Folders in a stack's bucket that contain releases and templates instead of data of users."""


def has_data(account: Account, bucket: str) -> bool:
    """Return whether the bucket contains a version of an object outside the folders in `OWN_FOLDERS`.

    For a missing bucket, return False.
    """
    try:
        with aws_errors(f"Bucket {bucket!r}"):
            page = account.client("s3").list_object_versions(Bucket=bucket, Delimiter="/")
    except NotFound:
        return False
    folders = {entry["Prefix"] for entry in page.get("CommonPrefixes") or ()}
    return bool(page.get("Versions") or page.get("DeleteMarkers") or folders - set(OWN_FOLDERS))


def empty(account: Account, bucket: str, say: Say) -> int:
    """Delete all versions of all objects in a bucket, and return the number of deleted versions.

    `say` receives a message with the number of deleted versions after each batch. The function returns 0 for a bucket
    that does not exist. Raise BackendError for the first object that cannot be deleted.
    """
    s3 = account.client("s3")
    count = 0
    with suppress(NotFound), aws_errors(f"Bucket {bucket!r}"):
        pages = s3.get_paginator("list_object_versions").paginate(
            Bucket=bucket, PaginationConfig={"PageSize": MAX_DELETED_KEYS}
        )
        for page in pages:
            versions = [
                {"Key": version["Key"], "VersionId": version["VersionId"]}
                for kind in ("Versions", "DeleteMarkers")
                for version in page.get(kind) or ()
            ]
            for begin in range(0, len(versions), MAX_DELETED_KEYS):
                batch = versions[begin : begin + MAX_DELETED_KEYS]
                response = s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
                for failed in response.get("Errors") or ():
                    reason = f"{failed.get('Message', '').rstrip('.')} ({failed.get('Code', '')})"
                    raise BackendError(f"Bucket {bucket!r}: {failed['Key']!r} cannot be deleted: {reason}.")
                count += len(batch)
                say(f"{bucket}: {count:,} versions of objects deleted.")
    return count


def _bucket(account: Account, resource: AwsResource, say: Say) -> None:
    empty(account, resource.name, say)
    with aws_errors(f"Bucket {resource.name!r}"):
        account.client("s3").delete_bucket(Bucket=resource.name)


def _queue(account: Account, resource: AwsResource, _say: Say) -> None:
    sqs = account.client("sqs")
    with aws_errors(f"Queue {resource.name!r}"):
        sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=resource.name)["QueueUrl"])


def _group(account: Account, resource: AwsResource, _say: Say) -> None:
    with aws_errors(f"Auto Scaling group {resource.name!r}"):
        account.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=resource.name, ForceDelete=True)


def _role(account: Account, resource: AwsResource, _say: Say) -> None:
    """Delete a role with its policies and its instance profiles. IAM does not delete a role that has any of these."""
    iam, name = account.client("iam"), resource.name
    with aws_errors(f"Role {name!r}"):
        for policy in list(account.pages("iam", "list_role_policies", "PolicyNames", RoleName=name)):
            iam.delete_role_policy(RoleName=name, PolicyName=policy)
        for policy in list(account.pages("iam", "list_attached_role_policies", "AttachedPolicies", RoleName=name)):
            iam.detach_role_policy(RoleName=name, PolicyArn=policy["PolicyArn"])
        for profile in list(account.pages("iam", "list_instance_profiles_for_role", "InstanceProfiles", RoleName=name)):
            iam.remove_role_from_instance_profile(InstanceProfileName=profile["InstanceProfileName"], RoleName=name)
            iam.delete_instance_profile(InstanceProfileName=profile["InstanceProfileName"])
        iam.delete_role(RoleName=name)


def _calling(service: str, operation: str, parameter: str, **more: Any) -> Callable[..., None]:
    """Return a function that removes a resource with one call of an operation. The argument `parameter` names the
    operation's parameter for the resource.

    If the name of the parameter ends with "s", the parameter gets a list with the resource's name.
    """

    def call(account: Account, resource: AwsResource, _say: Say) -> None:
        name = resource.arn if service in ("secretsmanager", "sns") else resource.name
        value = [name] if parameter.endswith("s") else name
        with aws_errors(f"{resource.kind} {resource.name!r}"):
            getattr(account.client(service), operation)(**{parameter: value}, **more)

    return call


_REMOVERS: Mapping[str, Callable[[Account, AwsResource, Say], None]] = {
    "s3:bucket": _bucket,
    "sqs:queue": _queue,
    "autoscaling:group": _group,
    "cloudwatch:alarm": _calling("cloudwatch", "delete_alarms", "AlarmNames"),
    "iam:role": _role,
    "ec2:instance": _calling("ec2", "terminate_instances", "InstanceIds"),
    "ec2:launch-template": _calling("ec2", "delete_launch_template", "LaunchTemplateId"),
    "ec2:volume": _calling("ec2", "delete_volume", "VolumeId"),
    "logs:log-group": _calling("logs", "delete_log_group", "logGroupName"),
    "rds:snapshot": _calling("rds", "delete_db_snapshot", "DBSnapshotIdentifier"),
    "sdb:domain": _calling("sdb", "delete_domain", "DomainName"),
    # AWS keeps a deleted secret for seven days, so that a user can restore the secret.
    "secretsmanager:secret": _calling("secretsmanager", "delete_secret", "SecretId", RecoveryWindowInDays=7),
    "sns:topic": _calling("sns", "delete_topic", "TopicArn"),
}


_STACK = r"(?P<stack>[A-Za-z][A-Za-z0-9-]*)"
_DOMAIN = re.compile(rf"{_STACK}-LedgerDomain-[0-9A-Za-z]+")
"""Pattern of the names that CloudFormation generates for the SimpleDB domains of stacks."""
_DATABASE_LOG = re.compile(rf"/aws/rds/instance/(?P<database>{_STACK}-ledger)/(postgresql|upgrade)")
"""Pattern of the names that RDS gives to the log groups of stacks' databases."""
_ROLE = re.compile(rf"{_STACK}-(Pool[A-Za-z0-9]*Role|ManagerRole)-[0-9A-Za-z]+")
"""Pattern of the names that CloudFormation generates for the roles of stacks."""
_ROLE_REGION = re.compile(r"arn:aws[a-z-]*:sqs:([a-z0-9-]+):")
"""Region in the policy of a stack's role. A role itself applies to all regions."""


def _living_instances(account: Account) -> set[str]:
    """Return the ids of the instances with batchlab's tag that are not terminated."""
    states = ["pending", "running", "stopping", "stopped"]
    filters = [{"Name": "tag-key", "Values": [TAG]}, {"Name": "instance-state-name", "Values": states}]
    reservations = account.pages("ec2", "describe_instances", "Reservations", Filters=filters)
    return {instance["InstanceId"] for reservation in reservations for instance in reservation["Instances"]}


def _living_nat_gateways(account: Account) -> set[str]:
    """Return the ids of the NAT gateways with batchlab's tag that are not deleted."""
    filters = [{"Name": "tag-key", "Values": [TAG]}]
    gateways = account.pages("ec2", "describe_nat_gateways", "NatGateways", Filter=filters)
    return {gateway["NatGatewayId"] for gateway in gateways if gateway["State"] != "deleted"}


_LIVING: Mapping[str, Callable[[Account], set[str]]] = {
    "ec2:instance": _living_instances,
    "ec2:natgateway": _living_nat_gateways,
}
"""Search for the resources of a kind that still exist, for kinds whose tags AWS lists after the deletion."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Resource that belongs to an existing stack, or remains from a deleted stack.

    `is_used` is true if the stack exists and has the resource. `is_guessed` is true if only the resource's name
    suggests the stack.
    """

    resource: AwsResource
    is_used: bool
    is_guessed: bool = False


class Leftovers:
    """Search for leftovers of stacks in one account and region. The resources of each stack are listed once."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._parts: dict[str, list[str] | None] = {}
        self._proven_roles: set[str] = set()
        """Names of the listed roles whose tag and policies prove the stack and the region."""

    def tagged_resources(self) -> Iterator[Leftover]:
        """Yield the resources in the account and region that have the tag of a batchlab stack.

        AWS's list of tagged resources lacks IAM roles and resources that cannot have tags (see `named_resources`). The
        list has a terminated instance and a deleted NAT gateway for about an hour, so the method skips both.
        """
        living: dict[str, set[str]] = {}
        for page in self._account.pages(
            "resourcegroupstaggingapi", "get_resources", "ResourceTagMappingList", TagFilters=[{"Key": TAG}]
        ):
            tags = {tag["Key"]: tag["Value"] for tag in page.get("Tags", ())}
            resource = resource_of(page["ResourceARN"], tags.get(TAG, ""))
            if search := _LIVING.get(resource.kind):
                if resource.kind not in living:
                    living[resource.kind] = search(self._account)
                if resource.name not in living[resource.kind]:
                    continue
            if resource.kind != "cloudformation:stack":
                yield Leftover(resource, _is_used(resource, self._parts_of(resource.stack)))

    def named_resources(self, known: Collection[str], say: Callable[[str], None]) -> Iterator[Leftover]:
        """Yield the SimpleDB domains, the log groups of deleted databases, and the roles whose names suggest a stack.

        The tag of a role proves the stack, if the role's policies also name the region. The method skips resources
        whose names are in `known`. `say` receives a message for each listing that fails.
        """
        for what, listing in (
            ("SimpleDB domains", self._domains),
            ("RDS's logs", self._logs),
            ("IAM roles", self._roles),
        ):
            try:
                resources = [resource for resource in listing() if resource.name not in known]
            except BackendError as error:
                say(f"{what} are not listed: {error}")
                continue
            for resource in resources:
                is_guessed = resource.name not in self._proven_roles
                yield Leftover(resource, _is_used(resource, self._parts_of(resource.stack)), is_guessed)

    def _domains(self) -> Iterator[AwsResource]:
        if self._account.is_real and self._account.region not in WITH_SIMPLEDB:
            return
        for name in self._account.pages("sdb", "list_domains", "DomainNames"):
            if match := _DOMAIN.fullmatch(name):
                arn = f"{self._account.arn.format('sdb')}domain/{name}"
                yield AwsResource(arn, "sdb:domain", name, match["stack"])

    def _logs(self) -> Iterator[AwsResource]:
        groups = self._account.pages(
            "logs", "describe_log_groups", "logGroups", logGroupNamePrefix="/aws/rds/instance/"
        )
        named = [(group, match) for group in groups if (match := _DATABASE_LOG.fullmatch(group["logGroupName"]))]
        if not named:
            return
        databases = self._account.pages("rds", "describe_db_instances", "DBInstances")
        existing = {database["DBInstanceIdentifier"] for database in databases}
        for group, match in named:
            # The logs of an existing database are not leftovers. The database may belong to another owner.
            if match["database"] not in existing:
                name = group["logGroupName"]
                yield AwsResource(str(group.get("arn", name)), "logs:log-group", name, match["stack"])

    def _roles(self) -> Iterator[AwsResource]:
        """Yield the roles of the region's stacks. AWS's list of tagged resources does not contain roles."""
        for role in self._account.pages("iam", "list_roles", "Roles"):
            name = role["RoleName"]
            if (match := _ROLE.fullmatch(name)) and (region := self._role_region(name)) in ("", self._account.region):
                if region and self._has_tag(name, match["stack"]):
                    self._proven_roles.add(name)
                yield AwsResource(role["Arn"], "iam:role", name, match["stack"])

    def _has_tag(self, name: str, stack: str) -> bool:
        """Return whether the role has batchlab's tag with the stack's name. ListRoles does not return tags."""
        with aws_errors(f"Role {name!r}"):
            role = self._account.client("iam").get_role(RoleName=name)["Role"]
        return {"Key": TAG, "Value": stack} in role.get("Tags", [])

    def _role_region(self, name: str) -> str:
        """Return the region of the stack that has created the role, or "" if the role's policies do not name it."""
        iam = self._account.client("iam")
        for policy in self._account.pages("iam", "list_role_policies", "PolicyNames", RoleName=name):
            with aws_errors(f"Role {name!r}"):
                document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
            if found := _ROLE_REGION.search(json.dumps(document)):
                return found[1]
        return ""

    def _parts_of(self, name: str) -> list[str] | None:
        """Return the physical ids of the stack's resources, or None if the stack does not exist."""
        if name not in self._parts:
            stack = Stack(self._account, name)
            exists = bool(name) and stack.state() is not None
            self._parts[name] = [resource.physical for resource in stack.resources()] if exists else None
        return self._parts[name]


def select_removable(leftovers: Sequence[Leftover], names: Sequence[str]) -> list[Leftover]:
    """Return the leftovers to remove. `names` contains the chosen resources that only their names assign to a stack.

    Raise NotFound for an unknown name, and Refused for a resource that a stack uses.
    """
    guessed: Mapping[str, Leftover] = {
        leftover.resource.name: leftover for leftover in leftovers if leftover.is_guessed
    }
    for name in names:
        if name not in guessed:
            raise NotFound(
                f"No leftover that needs --name has the name {name}.",
                remedy="`batchlab gc --aws` lists the leftovers. Other leftovers need no --name.",
            )
        if guessed[name].is_used:
            raise Refused(
                f"{name} is in use by the stack {guessed[name].resource.stack}.",
                remedy="`batchlab deploy destroy --delete-data` deletes both.",
            )
    return [
        leftover
        for leftover in leftovers
        if not leftover.is_used and (not leftover.is_guessed or leftover.resource.name in names)
    ]


def _is_used(resource: AwsResource, owned: list[str] | None) -> bool:
    if owned is None:
        return False
    # AWS does not list instances, volumes, and network interfaces as resources of a stack, so they count as used while
    # the stack exists. A snapshot of a database counts as a leftover even while the stack exists.
    if resource.kind in ("ec2:instance", "ec2:volume", "ec2:network-interface", "rds:snapshot"):
        return resource.kind != "rds:snapshot"
    return any(part in (resource.arn, resource.name) or part.endswith(f"/{resource.name}") for part in owned)


def remove_left(account: Account, leftover: Leftover, say: Say) -> str:
    """Remove a leftover of a stack. Return "" on success, or the message of the error."""
    try:
        remove(account, leftover.resource, say)
    except BackendError as error:
        return error.message
    return ""
