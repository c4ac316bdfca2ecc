"""Records of CloudFormation's answers about a stack, and the operations that each stack state allows.

The states follow AWS's documentation: docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html
(status codes), and the API reference's pages of ContinueUpdateRollback, RollbackStack, and DeleteStack.

Cause of a stack's failure: the one event that caused all others, and the remedy.

Invariant: the reason is AWS's, word for word. Only the advice is batchlab's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batchlab.core.errors import Refused

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
        return {"resource": self.resource, "type": self.type, "reason": self.reason, "remedy": self.remedy}


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
    (r"Throttling|Rate exceeded", "AWS has refused too many requests at once, which passes: apply again."),
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
    """Return the earliest failure of a resource that another failure did not cause, or None without a failure."""
    ordered = sorted(events, key=lambda one: one.at_s)
    failed = [one for one in ordered if one.has_failed and not one.is_of_stack]
    own = [one for one in failed if not _FOLLOWS.match(one.reason)]
    # AWS refuses some stacks as a whole, before it begins with any resource.
    whole = [
        one
        for one in ordered
        if one.is_of_stack and one.reason and ("FAILED" in one.status or "ROLLBACK" in one.status)
    ]
    for event in (*own, *failed, *whole):
        return Cause(event.resource, event.type, event.reason, advice(event.reason))
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


REVIEW = "REVIEW_IN_PROGRESS"


@dataclass(frozen=True, slots=True)
class State:
    """A stack from DescribeStacks. Times are epoch seconds."""

    id: str
    name: str
    status: str
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]
    is_protected: bool
    changed_s: float

    @property
    def is_moving(self) -> bool:
        """Return whether an operation is in progress. A stack that only awaits a change set is at rest."""
        return self.status.endswith("_IN_PROGRESS") and self.status != REVIEW

    @property
    def is_new(self) -> bool:
        """Return whether no resource of the stack was ever created."""
        return self.status == REVIEW

    @property
    def has_succeeded(self) -> bool:
        """Return whether the last operation succeeded."""
        return self.status in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "DELETE_COMPLETE")


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one resource in a change set. `replacement` is True, False, Conditional, or empty."""

    action: str
    id: str
    type: str
    replacement: str
    why: tuple[str, ...]
    physical: str


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """A computed change set. Without changes it cannot be executed."""

    id: str
    stack_id: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """An existing resource of a stack."""

    id: str
    type: str
    physical: str
    status: str


def state_of(told: Mapping[str, Any]) -> State:
    changed: datetime = told.get("LastUpdatedTime") or told["CreationTime"]
    return State(
        told["StackId"],
        told["StackName"],
        told["StackStatus"],
        {one["ParameterKey"]: one["ParameterValue"] for one in told.get("Parameters", ())},
        {one["OutputKey"]: one["OutputValue"] for one in told.get("Outputs", ())},
        bool(told.get("EnableTerminationProtection")),
        changed.timestamp(),
    )


def event_of(told: Mapping[str, Any]) -> Event:
    return Event(
        told["EventId"],
        told["Timestamp"].timestamp(),
        told.get("LogicalResourceId", ""),
        told.get("ResourceType", ""),
        told.get("ResourceStatus", ""),
        told.get("ResourceStatusReason", ""),
        is_of_stack=told.get("PhysicalResourceId") == told["StackId"],
    )


def change_of(told: Mapping[str, Any]) -> Change:
    why: dict[str, set[str]] = {}
    for detail in told.get("Details", ()):
        target = detail.get("Target", {})
        causes = why.setdefault(target.get("Name") or target.get("Attribute", ""), set())
        causes.update(filter(None, [detail.get("CausingEntity")]))
    return Change(
        told["Action"],
        told["LogicalResourceId"],
        told["ResourceType"],
        told.get("Replacement", ""),
        tuple(f"{what} ({', '.join(sorted(causes))})" if causes else what for what, causes in why.items() if what),
        told.get("PhysicalResourceId", ""),
    )


NEXT = {
    "ROLLBACK_COMPLETE": "What had been made is gone again; the next `batchlab deploy apply` "
    "deletes the empty stack and begins anew.",
    "UPDATE_ROLLBACK_COMPLETE": "The stack is as it was before.",
    "UPDATE_ROLLBACK_FAILED": "The next `batchlab deploy apply` has the rollback go on; what can "
    "never be put back `aws cloudformation continue-update-rollback --stack-name {stack} "
    "--resources-to-skip ID` leaves out.",
    "UPDATE_FAILED": "Somebody has made that change without a rollback: `aws cloudformation "
    "rollback-stack --stack-name {stack}` puts it back, then apply again.",
    "IMPORT_ROLLBACK_FAILED": "Somebody has imported something into it: put that right in "
    "CloudFormation's console, then apply again.",
    "ROLLBACK_FAILED": "`batchlab deploy destroy` removes what is left; then apply again.",
    "CREATE_FAILED": "`batchlab deploy destroy` removes what is left; then apply again.",
    "DELETE_FAILED": "Put right what the reason names, then `batchlab deploy destroy` again; what "
    "can never be deleted `aws cloudformation delete-stack --stack-name {stack} "
    "--retain-resources ID` leaves to you.",
}
"""The next step, by the state in which an operation has left the stack."""

_TO_GO = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED")
_BROKEN = ("UPDATE_ROLLBACK_FAILED", "UPDATE_FAILED", "IMPORT_ROLLBACK_FAILED")


def next_step(state: State) -> str:
    """Return the next step, or "" if none is needed."""
    return NEXT.get(state.status, "").replace("{stack}", state.name)


def must_go(state: State) -> bool:
    """Return whether the stack can only be deleted."""
    return state.status in _TO_GO


def refuse_unchangeable(state: State) -> None:
    """Raise Refused unless CloudFormation accepts an update now."""
    if state.is_moving:
        raise Refused(
            f"The stack {state.name} is {state.status}.",
            remedy="`batchlab deploy apply` follows it to its end and goes on from there.",
        )
    if state.status in (*_TO_GO, *_BROKEN):
        raise Refused(
            f"The stack {state.name} is {state.status}: nothing can be changed in it.",
            remedy=f"{next_step(state)} `batchlab deploy status` says why it is so.",
        )
