"""What CloudFormation tells of a stack, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batchlab.deploy.explain import Event

REVIEW = "REVIEW_IN_PROGRESS"


@dataclass(frozen=True, slots=True)
class State:
    """A stack as DescribeStacks tells it. Times are epoch seconds."""

    id: str
    name: str
    status: str
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]
    is_protected: bool
    changed_s: float

    @property
    def is_moving(self) -> bool:
        """Whether an operation is going on; a stack that only awaits a change set is at rest."""
        return self.status.endswith("_IN_PROGRESS") and self.status != REVIEW

    @property
    def is_new(self) -> bool:
        """Whether nothing of it has ever been made."""
        return self.status == REVIEW

    @property
    def has_succeeded(self) -> bool:
        """Whether the last operation did what it was to do."""
        return self.status in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "DELETE_COMPLETE")


@dataclass(frozen=True, slots=True)
class Change:
    """One resource's part in a change set. `replacement` is True, False, Conditional, or empty."""

    action: str
    id: str
    type: str
    replacement: str
    why: tuple[str, ...]
    physical: str


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """One that AWS has worked out; without changes it cannot be executed."""

    id: str
    stack_id: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """A part of a stack that is there."""

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
