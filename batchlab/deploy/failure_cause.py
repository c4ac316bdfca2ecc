"""Cause of a stack's failure: the one event that caused all others, and the remedy.

Invariant: the reason is AWS's, word for word. Only the advice is batchlab's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_FAILED = ("CREATE_FAILED", "UPDATE_FAILED", "DELETE_FAILED", "IMPORT_FAILED")
_BEGINS = ("CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS", "DELETE_IN_PROGRESS")
_FOLLOWS = re.compile(r"^Resource (creation|update|deletion|creation Initiated)? ?cancelled", re.I)
"""CloudFormation's reasons for resources that it stops because another one has failed."""


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a stack's operation. `at_s` is in epoch seconds."""

    id: str
    at_s: float
    resource: str
    type: str
    status: str
    reason: str = ""
    is_of_stack: bool = False
    """Return whether the event is about the stack itself."""

    @property
    def begins_operation(self) -> bool:
        return self.is_of_stack and self.status in _BEGINS

    @property
    def ends_operation(self) -> bool:
        return not self.status.endswith("_IN_PROGRESS")

    @property
    def has_failed(self) -> bool:
        return self.status in _FAILED


@dataclass(frozen=True, slots=True)
class Cause:
    """Cause of a failed operation. `reason` is AWS's, and `remedy` is the next step."""

    resource: str
    type: str
    reason: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        return {
            "resource": self.resource,
            "type": self.type,
            "reason": self.reason,
            "remedy": self.remedy,
        }


_KINDS = [
    (
        r"requires capabilities|InsufficientCapabilities",
        "Acknowledge that the stack makes roles: `--capabilities CAPABILITY_NAMED_IAM`, which "
        "`batchlab deploy` always says.",
    ),
    (
        r"InsufficientInstanceCapacity|do not have sufficient .* capacity|"
        r"InsufficientDBInstanceCapacity|no Spot capacity|capacity-not-available",
        "AWS has no such machine to give at the moment: name more instance types "
        "(--pool NAME:MIN-MAXxSLOTS@TYPE,TYPE), or apply again later.",
    ),
    (
        r"Cannot find version|Invalid DB engine version|engine version .* (not|unavailable)|"
        r"InvalidParameterCombination.*(RDS does not support|engine)|"
        r"RDS does not support creating a DB instance with the following combination",
        "RDS offers neither that version nor that class here: `aws rds "
        "describe-orderable-db-instance-options --engine postgres` lists what it does.",
    ),
    (
        r"LimitExceeded|limit exceeded|exceeded .*(limit|quota)|quota|maximum number of|TooMany|"
        r"VcpuLimit|vCPU",
        "A quota of the account is reached: ask for more in the console under Service Quotas, or "
        "remove what is not needed (`batchlab gc --aws` lists what stacks have left behind).",
    ),
    (
        r"AlreadyExists|already exists|already owned by you|BucketAlready|EntityAlreadyExists",
        "Something else has that name, perhaps left behind by an earlier stack "
        "(`batchlab gc --aws` lists that): remove it, or deploy under another name with --stack.",
    ),
    (
        r"you must wait .*(60|seconds)|QueueDeletedRecently",
        "A queue of that name was deleted less than 60 seconds ago: apply again in a minute.",
    ),
    (
        r"signal\(s\)|did not stabilize|NotStabilized|WaitCondition|timed? ?out",
        "An instance or a service did not come up in time: the log group of the stack has what its "
        "boot said (`batchlab deploy status` names it).",
    ),
    (
        r"bucket you tried to delete is not empty|BucketNotEmpty",
        "The bucket has objects: `batchlab deploy destroy --delete-data` empties it first.",
    ),
    (
        r"Throttling|Rate exceeded",
        "AWS has refused too many requests at once, which passes: apply again.",
    ),
    (
        r"has a dependent object|DependencyViolation|currently in use|is in use",
        "Something outside of the stack uses it: remove that first, then do the same again.",
    ),
    (
        r"AMI|InvalidAMIID|image id|SSM parameter|ParameterNotFound",
        "The image is not there in this region: check WorkerImage and ManagerImage.",
    ),
    (
        r"Invalid|ValidationError|Validation failed|Properties validation|Encountered unsupported|"
        r"must (be|have|match)|not (a )?valid|failed validation",
        "A value is not one that the service takes: the reason names it, `batchlab deploy plan` "
        "checks the next try, and --set NAME=VALUE sets a parameter.",
    ),
]

_DENIED = re.compile(
    r"not authorized to perform:? (?P<action>[\w-]+:\w+)|AccessDenied|UnauthorizedOperation|"
    r"Access Denied|not authorized",
    re.I,
)


def root_cause(events: Iterable[Event]) -> Cause | None:
    """Return the earliest failure of a resource that another failure did not cause, or None without
    a failure."""
    ordered = sorted(events, key=lambda one: one.at_s)
    failed = [one for one in ordered if one.has_failed and not one.is_of_stack]
    own = [one for one in failed if not _FOLLOWS.match(one.reason)]
    # AWS refuses some stacks as a whole, before it begins with any resource.
    whole = [
        one
        for one in ordered
        if one.is_of_stack and one.reason and ("FAILED" in one.status or "ROLLBACK" in one.status)
    ]
    for found in (*own, *failed, *whole):
        return Cause(found.resource, found.type, found.reason, advice(found.reason))
    return None


def advice(reason: str) -> str:
    """Return the remedy for one of AWS's reasons."""
    if denied := _DENIED.search(reason):
        action = f" {denied['action']}" if denied["action"] else " what the reason names"
        return f"Allow the deployer{action}: docs/deploy.md lists all that deploying needs."
    for pattern, remedy in _KINDS:
        if re.search(pattern, reason, re.I):
            return remedy
    return "Change what the reason names, and apply again."
