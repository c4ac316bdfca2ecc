"""Removal of single AWS resources: buckets with all versions of their objects, queues, groups, and
more.

Invariant: only the given resource is removed, and each failure is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError, NotFound
from batchlab.deploy import plan, release
from batchlab.deploy.account import Account, asked

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
    """Remove the resource. Raises BackendError if AWS refuses, or if users must remove this kind
    themselves."""
    remover = _REMOVERS.get(thing.kind)
    if remover is None:
        raise BackendError(
            f"{thing.arn} is not of a kind that is removed here.",
            remedy="Remove it in the console.",
        )
    remover(account, thing, say)


OURS = (release.PREFIX, plan.FOLDER)
"""Folders in a stack's bucket that hold no data of its users: releases and templates."""


def has_data(account: Account, bucket: str) -> bool:
    """Return whether the bucket has a version of an object outside `OURS`. A deleted bucket has
    none."""
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
        pages = s3.get_paginator("list_object_versions").paginate(
            Bucket=bucket, PaginationConfig={"PageSize": BATCH}
        )
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
            f"{failed.get('Message', '').rstrip('.')} ({failed.get('Code', '')}).",
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
        account.client("autoscaling").delete_auto_scaling_group(
            AutoScalingGroupName=thing.name, ForceDelete=True
        )


def _calling(service: str, operation: str, parameter: str, **more: Any) -> Callable[..., None]:
    """Return a remover that makes one call with the resource's name, as a list if the parameter is
    plural."""

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
    "secretsmanager:secret": _calling(
        "secretsmanager", "delete_secret", "SecretId", RecoveryWindowInDays=7
    ),
    "sns:topic": _calling("sns", "delete_topic", "TopicArn"),
}
