"""Classes for CloudFormation's stacks, events, and change sets, and functions for causes of failures and the user's
next step.

The page docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html lists the status codes of stacks.
The pages about ContinueUpdateRollback, RollbackStack, and DeleteStack in CloudFormation's API reference list the states
in which a stack accepts each operation.

Invariant: the reason of a Cause is AWS's text without changes, and the remedy is batchlab's text.
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
"""Pattern of AWS's reason in the event of a resource that CloudFormation canceled because another resource failed."""


@dataclass(frozen=True, slots=True)
class Event:
    """Event of an operation on a stack.

    `at_s` is the time of the event in epoch seconds. `is_of_stack` is true for an event about the stack itself.
    """

    id: str
    at_s: float
    resource: str
    type: str
    status: str
    reason: str = ""
    is_of_stack: bool = False

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
    """Cause of a failed operation on a stack, with AWS's reason and batchlab's remedy."""

    resource: str
    type: str
    reason: str
    remedy: str


_REMEDIES = [
    (
        r"requires capabilities|InsufficientCapabilities",
        "Confirm that the stack creates roles with `--capabilities CAPABILITY_NAMED_IAM`. `batchlab deploy` always "
        "adds this option.",
    ),
    (
        r"InsufficientInstanceCapacity|do not have sufficient .* capacity|"
        r"InsufficientDBInstanceCapacity|no Spot capacity|capacity-not-available",
        "AWS has no free instance of this type at the moment. Add more instance types "
        "(--pool NAME:MIN-MAXxSLOTS@TYPE,TYPE), or apply again later.",
    ),
    (
        r"Cannot find version|Invalid DB engine version|engine version .* (not|unavailable)|"
        r"InvalidParameterCombination.*(RDS does not support|engine)|"
        r"RDS does not support creating a DB instance with the following combination",
        "RDS does not offer this version or this class here. `aws rds describe-orderable-db-instance-options --engine "
        "postgres` lists the offers.",
    ),
    (
        r"LimitExceeded|limit exceeded|exceeded .*(limit|quota)|quota|maximum number of|TooMany|"
        r"VcpuLimit|vCPU",
        "The account has reached a quota. Request a higher quota in the console under Service Quotas, or remove unused "
        "resources (`batchlab gc --aws` lists the leftovers of stacks).",
    ),
    (
        r"AlreadyExists|already exists|already owned by you|BucketAlready|EntityAlreadyExists",
        "Another resource has this name. It may be a leftover of an earlier stack (`batchlab gc --aws` lists these). "
        "Remove it, or deploy the stack under another name with --stack.",
    ),
    (
        r"you must wait .*(60|seconds)|QueueDeletedRecently",
        "A queue with this name was deleted less than 60 seconds ago. Apply again in a minute.",
    ),
    (
        r"signal\(s\)|did not stabilize|NotStabilized|WaitCondition|timed? ?out",
        "An instance or a service did not start in time. The log group of the stack has the log of the boot "
        "(`batchlab deploy status` names it).",
    ),
    (
        r"bucket you tried to delete is not empty|BucketNotEmpty",
        "The bucket has objects. `batchlab deploy destroy --delete-data` empties it first.",
    ),
    (r"Throttling|Rate exceeded", "AWS has throttled requests, which is temporary. To continue, apply again."),
    (
        r"has a dependent object|DependencyViolation|currently in use|is in use",
        "A resource outside of the stack uses it. Remove that first, then repeat the command.",
    ),
    (
        r"AMI|InvalidAMIID|image id|SSM parameter|ParameterNotFound",
        "The image does not exist in this region. Check WorkerImage and ManagerImage.",
    ),
    (
        r"Invalid|ValidationError|Validation failed|Properties validation|Encountered unsupported|"
        r"must (be|have|match)|not (a )?valid|failed validation",
        "The service refuses the value in the reason. Set the parameter with --set NAME=VALUE. `batchlab deploy plan` "
        "checks the new value.",
    ),
]

_DENIED = re.compile(
    r"not authorized to perform:? (?P<action>[\w-]+:\w+)|AccessDenied|UnauthorizedOperation|"
    r"Access Denied|not authorized",
    re.I,
)


def root_cause(events: Iterable[Event]) -> Cause | None:
    """Return the earliest failure of a resource that was not canceled because of another failure. Return None if the
    events do not contain a failure.
    """
    ordered = sorted(events, key=lambda event: event.at_s)
    failed = [event for event in ordered if event.has_failed and not event.is_of_stack]
    own = [event for event in failed if not _FOLLOWS.match(event.reason)]
    # If AWS refuses a stack as a whole, only an event about the stack itself contains the reason.
    of_stack = [event for event in ordered if event.is_of_stack and event.reason]
    refusals = [event for event in of_stack if "FAILED" in event.status or "ROLLBACK" in event.status]
    for event in (*own, *failed, *refusals):
        return Cause(event.resource, event.type, event.reason, advice(event.reason))
    return None


def advice(reason: str) -> str:
    """Return batchlab's remedy for AWS's reason of a failed operation on a stack."""
    if denied := _DENIED.search(reason):
        action = denied["action"] or "the action in the reason"
        return f"Allow the deployer {action}. docs/deploy.md lists all actions of a deployment."
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, reason, re.I):
            return remedy
    return "Correct the problem in the reason, and apply again."


REVIEW = "REVIEW_IN_PROGRESS"


@dataclass(frozen=True, slots=True)
class State:
    """State of a stack from DescribeStacks. `changed_s` is the time of the last update or the creation in epoch
    seconds.
    """

    id: str
    name: str
    status: str
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]
    is_protected: bool
    changed_s: float

    @property
    def is_moving(self) -> bool:
        """Return whether an operation on the stack is in progress.

        The state REVIEW_IN_PROGRESS of a new stack does not count as an operation.
        """
        return self.status.endswith("_IN_PROGRESS") and self.status != REVIEW

    @property
    def is_new(self) -> bool:
        """Whether the stack is new, so that CloudFormation has not created a resource of the stack yet."""
        return self.status == REVIEW

    @property
    def has_succeeded(self) -> bool:
        return self.status in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "DELETE_COMPLETE")


@dataclass(frozen=True, slots=True)
class Change:
    """Change of one resource in a change set. `replacement` is AWS's value "True", "False", or "Conditional", or ""."""

    action: str
    id: str
    type: str
    replacement: str
    why: tuple[str, ...]
    physical: str


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """Change set whose changes AWS has computed. AWS refuses to execute a change set without changes."""

    id: str
    stack_id: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    id: str
    type: str
    physical: str
    status: str


def state_of(response: Mapping[str, Any]) -> State:
    changed: datetime = response.get("LastUpdatedTime") or response["CreationTime"]
    return State(
        response["StackId"],
        response["StackName"],
        response["StackStatus"],
        {entry["ParameterKey"]: entry["ParameterValue"] for entry in response.get("Parameters", ())},
        {entry["OutputKey"]: entry["OutputValue"] for entry in response.get("Outputs", ())},
        bool(response.get("EnableTerminationProtection")),
        changed.timestamp(),
    )


def event_of(response: Mapping[str, Any]) -> Event:
    return Event(
        response["EventId"],
        response["Timestamp"].timestamp(),
        response.get("LogicalResourceId", ""),
        response.get("ResourceType", ""),
        response.get("ResourceStatus", ""),
        response.get("ResourceStatusReason", ""),
        is_of_stack=response.get("PhysicalResourceId") == response["StackId"],
    )


def change_of(response: Mapping[str, Any]) -> Change:
    why: dict[str, set[str]] = {}
    for detail in response.get("Details", ()):
        target = detail.get("Target", {})
        causes = why.setdefault(target.get("Name") or target.get("Attribute", ""), set())
        causes.update(filter(None, [detail.get("CausingEntity")]))
    return Change(
        response["Action"],
        response["LogicalResourceId"],
        response["ResourceType"],
        response.get("Replacement", ""),
        tuple(f"{what} ({', '.join(sorted(causes))})" if causes else what for what, causes in why.items() if what),
        response.get("PhysicalResourceId", ""),
    )


NEXT = {
    "ROLLBACK_COMPLETE": "CloudFormation has deleted the new resources. The next `batchlab deploy apply` deletes the "
    "empty stack and creates it again.",
    "UPDATE_ROLLBACK_COMPLETE": "The stack is as it was before.",
    "UPDATE_ROLLBACK_FAILED": "The next `batchlab deploy apply` continues the rollback. To leave out a resource that "
    "cannot be rolled back, use `aws cloudformation continue-update-rollback --stack-name {stack} "
    "--resources-to-skip ID`.",
    "UPDATE_FAILED": "Another tool has made a change without a rollback. `aws cloudformation rollback-stack "
    "--stack-name {stack}` rolls it back. Then apply again.",
    "IMPORT_ROLLBACK_FAILED": "Another tool has imported a resource into the stack. Correct this in CloudFormation's "
    "console, then apply again.",
    "ROLLBACK_FAILED": "`batchlab deploy destroy` removes the remaining resources. Then apply again.",
    "CREATE_FAILED": "`batchlab deploy destroy` removes the remaining resources. Then apply again.",
    "DELETE_FAILED": "Correct the problem in the reason, then run `batchlab deploy destroy` again. To keep a resource "
    "that cannot be deleted, use `aws cloudformation delete-stack --stack-name {stack} --retain-resources ID`.",
}
"""Text about the user's next step, by the state of the stack after a failed operation."""

_DELETE_ONLY = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED")
_BROKEN = ("UPDATE_ROLLBACK_FAILED", "UPDATE_FAILED", "IMPORT_ROLLBACK_FAILED")


def next_step(state: State) -> str:
    """Return a text about the user's next step after an operation, or "" if the user does not need to act."""
    return NEXT.get(state.status, "").replace("{stack}", state.name)


def must_be_deleted(state: State) -> bool:
    """Return whether CloudFormation accepts only the deletion of the stack in its current state."""
    return state.status in _DELETE_ONLY


def refuse_unchangeable(state: State) -> None:
    """Raise Refused if CloudFormation does not accept an update of a stack in the state `state`."""
    if state.is_moving:
        raise Refused(
            f"The stack {state.name} is {state.status}.",
            remedy="`batchlab deploy apply` waits for the end of the operation and continues.",
        )
    if state.status in (*_DELETE_ONLY, *_BROKEN):
        raise Refused(
            f"The stack {state.name} is {state.status} and cannot be changed.",
            remedy=f"{next_step(state)} `batchlab deploy status` shows the cause.",
        )
