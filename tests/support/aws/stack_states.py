"""A model of CloudFormation for one stack, with the operations that AWS documents for each state.

Emulators reach few of these states, and do not reject any operation in them. The modeled stack has only the few
resources that the tests of `batchlab deploy` need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.exceptions import ClientError

ID = "arn:aws:cloudformation:us-east-1:1:stack/grid/1"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)

ENDS = {
    "CREATE_IN_PROGRESS": "CREATE_COMPLETE",
    "ROLLBACK_IN_PROGRESS": "ROLLBACK_COMPLETE",
    "DELETE_IN_PROGRESS": "DELETE_COMPLETE",
    "UPDATE_IN_PROGRESS": "UPDATE_COMPLETE",
    "UPDATE_COMPLETE_CLEANUP_IN_PROGRESS": "UPDATE_COMPLETE",
    "UPDATE_ROLLBACK_IN_PROGRESS": "UPDATE_ROLLBACK_COMPLETE",
    "UPDATE_ROLLBACK_COMPLETE_CLEANUP_IN_PROGRESS": "UPDATE_ROLLBACK_COMPLETE",
    "IMPORT_IN_PROGRESS": "IMPORT_COMPLETE",
    "IMPORT_ROLLBACK_IN_PROGRESS": "IMPORT_ROLLBACK_COMPLETE",
}
"""The final state of each operation that succeeds."""


@dataclass
class Cloud:
    """The methods of a boto3 client for the state of one stack. A started operation ends at the second look after its
    start. The operation ends in the state that `fails` sets, or else in the state of `ENDS`."""

    status: str
    resources: list[tuple[str, str, str, str]] = field(default_factory=list)
    """The logical id, type, physical id, and status of each resource of the stack."""
    kept: frozenset[str] = frozenset()
    """The logical ids of the resources whose DeletionPolicy is Retain."""
    fails: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    protected: bool = True
    _looks: int = 0

    def __post_init__(self) -> None:
        if self.status != "REVIEW_IN_PROGRESS":
            self._tell(self.status if self.status in ENDS else "UPDATE_IN_PROGRESS")
            if self.status not in ENDS:
                self._tell(self.status)

    @property
    def meta(self) -> Any:
        return type("Meta", (), {"endpoint_url": "http://127.0.0.1"})

    def _tell(self, status: str, resource: str = "grid", reason: str = "") -> None:
        is_stack = resource == "grid"
        self.events.insert(
            0,
            {
                "StackId": ID,
                "EventId": f"e{len(self.events)}",
                "LogicalResourceId": resource,
                "PhysicalResourceId": ID if is_stack else resource.lower(),
                "ResourceType": "AWS::CloudFormation::Stack" if is_stack else "AWS::SQS::Queue",
                "Timestamp": BEGAN + timedelta(seconds=len(self.events)),
                "ResourceStatus": status,
                "ResourceStatusReason": reason,
            },
        )

    def _begin(self, status: str) -> None:
        self.status, self._looks = status, 0
        self._tell(status)

    def _refuse(self, operation: str, message: str) -> None:
        error = {"Error": {"Code": "ValidationError", "Message": message}}
        raise ClientError(error, operation)  # type: ignore[arg-type]

    # --- Read calls -----------------------------------------------------------------------------

    def describe_stacks(self, StackName: str) -> dict[str, Any]:  # noqa: N803
        if self.status == "DELETE_COMPLETE" and StackName != ID:
            self._refuse("DescribeStacks", f"Stack with id {StackName} does not exist")
        one = {
            "StackId": ID,
            "StackName": "grid",
            "StackStatus": self.status,
            "CreationTime": BEGAN,
            "EnableTerminationProtection": self.protected,
        }
        return {"Stacks": [one]}

    def get_template(self, **_: str) -> dict[str, Any]:
        declared = {name: {"DeletionPolicy": "Retain"} for name in self.kept}
        return {"TemplateBody": {"Resources": declared}}

    def get_paginator(self, operation: str) -> Any:
        found: dict[str, Any] = {"describe_stack_events": self._events, "list_stack_resources": self._resources}
        return type("Pages", (), {"paginate": lambda _, **__: found[operation]()})()

    def _resources(self) -> Iterator[dict[str, Any]]:
        yield {
            "StackResourceSummaries": [
                {
                    "LogicalResourceId": name,
                    "ResourceType": kind,
                    "ResourceStatus": status,
                    **({"PhysicalResourceId": physical} if physical else {}),
                }
                for name, kind, physical, status in self.resources
            ]
        }

    def _events(self) -> Iterator[dict[str, Any]]:
        self._looks += 1
        if self.status in ENDS and self._looks > 1:
            ended = self.fails.get(self.status, ENDS[self.status])
            if ended.endswith("_FAILED"):
                part = "DELETE_FAILED" if ended == "DELETE_FAILED" else "UPDATE_FAILED"
                self._tell(part, "Queue", "it is in use.")
            if ended == "DELETE_COMPLETE":
                for name in sorted(self.kept):
                    self._tell("DELETE_SKIPPED", name)
            self.status = ended
            self._tell(ended)
        yield {"StackEvents": list(self.events)}

    # --- Write calls ----------------------------------------------------------------------------

    def update_termination_protection(self, EnableTerminationProtection: bool, **_: str) -> None:  # noqa: N803
        self.calls.append("protect" if EnableTerminationProtection else "unprotect")
        self.protected = EnableTerminationProtection

    def delete_stack(self, RetainResources: Sequence[str] = (), **_: str) -> None:  # noqa: N803
        self.calls.append("delete")
        if self.protected:
            self._refuse("DeleteStack", "TerminationProtection is enabled")
        if RetainResources and self.status != "DELETE_FAILED":
            self._refuse("DeleteStack", "only a stack in DELETE_FAILED can retain resources")
        if self.status in ENDS:
            self._refuse("DeleteStack", f"Stack is in {self.status} state and can not be deleted")
        if self.status == "REVIEW_IN_PROGRESS":
            self.status = "DELETE_COMPLETE"
        else:
            self._begin("DELETE_IN_PROGRESS")

    def continue_update_rollback(self, **_: str) -> None:
        self.calls.append("resume")
        if self.status != "UPDATE_ROLLBACK_FAILED":
            self._refuse("ContinueUpdateRollback", f"Stack is in {self.status} state")
        self._begin("UPDATE_ROLLBACK_IN_PROGRESS")

    def close(self) -> None:
        """Do nothing, because the model does not open connections."""
