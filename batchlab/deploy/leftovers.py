"""Leftovers of stacks in an account and region, found by AWS's tags and by names.

Invariant: a tag proves the owner of a resource, and a name only suggests it. So a resource known only by its name is
removed only if the user names it.

Removal of single AWS resources: buckets with all versions of their objects, queues, groups, and more.

Invariant: only the given resource is removed, and each failure is reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError, NotFound, Refused
from batchlab.deploy import plan, release
from batchlab.deploy.account import Account, asked
from batchlab.deploy.plan import WITH_SIMPLEDB
from batchlab.deploy.stack import TAG, Stack

BATCH = 1000
"""Maximum of DeleteObjects."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Thing:
    """One resource by its ARN. `kind` is its service and type, as in "sqs:queue"."""

    arn: str
    kind: str
    name: str
    stack: str
    """The value of its tag."""


_NAMED_ALONE = {"s3": "s3:bucket", "sns": "sns:topic", "sqs": "sqs:queue"}
"""Services whose ARNs end in a name, without a type before it."""


def thing_of(arn: str, stack: str) -> Thing:
    """Return the resource of an ARN."""
    service, rest = arn.split(":", 5)[2], arn.split(":", 5)[5]
    if service in _NAMED_ALONE:
        return Thing(arn, _NAMED_ALONE[service], rest, stack)
    if service == "autoscaling":
        return Thing(arn, "autoscaling:group", arn.rpartition("/")[2], stack)
    separator = "/" if "/" in rest and (":" not in rest or rest.find("/") < rest.find(":")) else ":"
    kind, _, name = rest.partition(separator)
    return Thing(arn, f"{service}:{kind}", name.removesuffix(":*"), stack)


def remove(account: Account, thing: Thing, say: Say) -> None:
    """Remove the resource. Raises BackendError if AWS refuses, or if users must remove this kind themselves."""
    remover = _REMOVERS.get(thing.kind)
    if remover is None:
        raise BackendError(f"{thing.arn} is not of a kind that is removed here.", remedy="Remove it in the console.")
    remover(account, thing, say)


OURS = (release.PREFIX, plan.FOLDER)
"""Folders in a stack's bucket that hold no data of its users: releases and templates."""


def has_data(account: Account, bucket: str) -> bool:
    """Return whether the bucket has a version of an object outside `OURS`. A deleted bucket has none."""
    try:
        with asked(f"Bucket {bucket!r}"):
            told = account.client("s3").list_object_versions(Bucket=bucket, Delimiter="/")
    except NotFound:
        return False
    folders = {one["Prefix"] for one in told.get("CommonPrefixes") or ()}
    return bool(told.get("Versions") or told.get("DeleteMarkers") or folders - set(OURS))


def empty(account: Account, bucket: str, say: Say) -> int:
    """Delete every version of every object, report the count after each batch, and return it. A
    deleted bucket has none. Raises BackendError with the first object that cannot be deleted."""
    s3 = account.client("s3")
    count = 0
    with suppress(NotFound), asked(f"Bucket {bucket!r}"):
        pages = s3.get_paginator("list_object_versions").paginate(Bucket=bucket, PaginationConfig={"PageSize": BATCH})
        for page in pages:
            batch = [
                {"Key": one["Key"], "VersionId": one["VersionId"]}
                for kind in ("Versions", "DeleteMarkers")
                for one in page.get(kind) or ()
            ]
            for begin in range(0, len(batch), BATCH):
                some = batch[begin : begin + BATCH]
                _delete(s3, bucket, some)
                count += len(some)
                say(f"{bucket}: {count:,} versions of objects deleted.")
    return count


def _delete(s3: Any, bucket: str, batch: list[dict[str, str]]) -> None:
    told = s3.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
    for failed in told.get("Errors") or ():
        raise BackendError(
            f"Bucket {bucket!r}: {failed['Key']!r} cannot be deleted: "
            f"{failed.get('Message', '').rstrip('.')} ({failed.get('Code', '')})."
        )


def _bucket(account: Account, thing: Thing, say: Say) -> None:
    empty(account, thing.name, say)
    with asked(f"Bucket {thing.name!r}"):
        account.client("s3").delete_bucket(Bucket=thing.name)


def _queue(account: Account, thing: Thing, _say: Say) -> None:
    sqs = account.client("sqs")
    with asked(f"Queue {thing.name!r}"):
        sqs.delete_queue(QueueUrl=sqs.get_queue_url(QueueName=thing.name)["QueueUrl"])


def _group(account: Account, thing: Thing, _say: Say) -> None:
    with asked(f"Auto Scaling group {thing.name!r}"):
        account.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=thing.name, ForceDelete=True)


def _calling(service: str, operation: str, parameter: str, **more: Any) -> Callable[..., None]:
    """Return a remover that makes one call with the resource's name, as a list if the parameter is plural."""

    def call(account: Account, thing: Thing, _say: Say) -> None:
        name = thing.arn if service in ("secretsmanager", "sns") else thing.name
        value = [name] if parameter.endswith("s") else name
        with asked(f"{thing.kind} {thing.name!r}"):
            getattr(account.client(service), operation)(**{parameter: value}, **more)

    return call


_REMOVERS: Mapping[str, Callable[[Account, Thing, Say], None]] = {
    "s3:bucket": _bucket,
    "sqs:queue": _queue,
    "autoscaling:group": _group,
    "cloudwatch:alarm": _calling("cloudwatch", "delete_alarms", "AlarmNames"),
    "ec2:instance": _calling("ec2", "terminate_instances", "InstanceIds"),
    "ec2:launch-template": _calling("ec2", "delete_launch_template", "LaunchTemplateId"),
    "ec2:volume": _calling("ec2", "delete_volume", "VolumeId"),
    "logs:log-group": _calling("logs", "delete_log_group", "logGroupName"),
    "rds:snapshot": _calling("rds", "delete_db_snapshot", "DBSnapshotIdentifier"),
    "sdb:domain": _calling("sdb", "delete_domain", "DomainName"),
    # The secret can be restored for seven days.
    "secretsmanager:secret": _calling("secretsmanager", "delete_secret", "SecretId", RecoveryWindowInDays=7),
    "sns:topic": _calling("sns", "delete_topic", "TopicArn"),
}


_STACK = r"(?P<stack>[A-Za-z][A-Za-z0-9-]*)"
_DOMAIN = re.compile(rf"{_STACK}-LedgerDomain-[0-9A-Za-z]+")
"""CloudFormation's name for the domain of a stack."""
_DATABASE_LOG = re.compile(rf"/aws/rds/instance/(?P<database>{_STACK}-ledger)/(postgresql|upgrade)")
"""RDS's name for the logs of a stack's database."""


@dataclass(frozen=True, slots=True)
class Left:
    """A resource of a stack. `is_used` if its stack exists and has it. `is_guessed` if only its
    name suggests its stack."""

    thing: Thing
    is_used: bool
    is_guessed: bool = False


class Leftovers:
    """Search of one account in one region. Each stack is read once."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._parts: dict[str, list[str] | None] = {}

    def tagged(self) -> Iterator[Left]:
        """Yield the resources with a batchlab stack's tag, from AWS's list of tagged resources. It
        does not contain IAM roles or resources that cannot have tags."""
        for page in self._account.pages(
            "resourcegroupstaggingapi", "get_resources", "ResourceTagMappingList", TagFilters=[{"Key": TAG}]
        ):
            tags = {tag["Key"]: tag["Value"] for tag in page.get("Tags", ())}
            thing = thing_of(page["ResourceARN"], tags.get(TAG, ""))
            if thing.kind != "cloudformation:stack":
                yield Left(thing, _is_used(thing, self._parts_of(thing.stack)))

    def named(self, known: Collection[str], say: Callable[[str], None]) -> Iterator[Left]:
        """Yield the resources without a tag whose names look like a stack's: SimpleDB domains,
        which cannot have tags, and logs of a deleted database. `known` are the names of `tagged`.
        `say` receives a message for each listing that fails."""
        for what, look in (("SimpleDB domains", self._domains), ("RDS's logs", self._logs)):
            try:
                things = [thing for thing in look() if thing.name not in known]
            except BackendError as error:
                say(f"{what} are not listed: {error}")
                continue
            for thing in things:
                yield Left(thing, _is_used(thing, self._parts_of(thing.stack)), is_guessed=True)

    def _domains(self) -> Iterator[Thing]:
        if self._account.is_real and self._account.region not in WITH_SIMPLEDB:
            return
        for name in self._account.pages("sdb", "list_domains", "DomainNames"):
            if match := _DOMAIN.fullmatch(name):
                arn = f"{self._account.arn.format('sdb')}domain/{name}"
                yield Thing(arn, "sdb:domain", name, match["stack"])

    def _logs(self) -> Iterator[Thing]:
        groups = self._account.pages(
            "logs", "describe_log_groups", "logGroups", logGroupNamePrefix="/aws/rds/instance/"
        )
        named = [(group, _DATABASE_LOG.fullmatch(group["logGroupName"])) for group in groups]
        ours = [(one, match) for one, match in named if match]
        if not ours:
            return
        told = self._account.pages("rds", "describe_db_instances", "DBInstances")
        living = {one["DBInstanceIdentifier"] for one in told}
        for one, match in ours:
            # A database with such a name may exist outside batchlab's stacks.
            if match["database"] not in living:
                name = one["logGroupName"]
                yield Thing(str(one.get("arn", name)), "logs:log-group", name, match["stack"])

    def _parts_of(self, name: str) -> list[str] | None:
        """Return the physical ids of the stack's resources, or None if the stack does not exist."""
        if name not in self._parts:
            stack = Stack(self._account, name)
            is_there = bool(name) and stack.state() is not None
            self._parts[name] = [resource.physical for resource in stack.resources()] if is_there else None
        return self._parts[name]


def chosen(found: Sequence[Left], names: Sequence[str]) -> list[Left]:
    """Return the resources to remove. `names` are the user's choice of resources known only by
    name. Raises NotFound or Refused for a name that is not a leftover."""
    guessed: Mapping[str, Left] = {left.thing.name: left for left in found if left.is_guessed}
    for name in names:
        if name not in guessed:
            raise NotFound(
                f"Nothing is called {name} of what is known by its name alone.",
                remedy="`batchlab gc --aws` lists what there is; what has a tag needs no --name.",
            )
        if guessed[name].is_used:
            raise Refused(
                f"{name} is in use by the stack {guessed[name].thing.stack}.",
                remedy="`batchlab deploy destroy --delete-data` ends both.",
            )
    return [left for left in found if not left.is_used and (not left.is_guessed or left.thing.name in names)]


def _is_used(thing: Thing, owned: list[str] | None) -> bool:
    if owned is None:
        return False
    # Instances, volumes, and network interfaces are not listed as resources of a stack. Snapshots
    # of databases outlive it.
    if thing.kind in ("ec2:instance", "ec2:volume", "ec2:network-interface", "rds:snapshot"):
        return thing.kind != "rds:snapshot"
    return any(part in (thing.arn, thing.name) or part.endswith(f"/{thing.name}") for part in owned)


def remove_left(account: Account, left: Left, say: Say) -> str:
    """Remove a leftover. Return "" on success, else the error message."""
    try:
        remove(account, left.thing, say)
    except BackendError as error:
        return error.message
    return ""
