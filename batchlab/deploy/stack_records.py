"""Records of CloudFormation's answers about a stack, and the operations that each stack state
allows.

The states follow AWS's documentation:
docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html (status codes), and
the API reference's pages of ContinueUpdateRollback, RollbackStack, and DeleteStack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batchlab.core.errors import Refused
from batchlab.deploy.failure_cause import Event

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
        """Return whether an operation is in progress. A stack that only awaits a change set is at
        rest."""
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
    """The change of one resource in a change set. `replacement` is True, False, Conditional, or
    empty."""

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
        tuple(
            f"{what} ({', '.join(sorted(causes))})" if causes else what
            for what, causes in why.items()
            if what
        ),
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
