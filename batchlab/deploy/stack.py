"""CloudFormation operations on one stack: its state, change sets, events, and deletion.

Invariant: AWS may not find a new object right after its creation. So reads of it are repeated for a
while before it counts as missing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.deploy.account import Account, Missing, asked
from batchlab.deploy.stack_records import (
    Cause,
    Change,
    ChangeSet,
    Event,
    Resource,
    State,
    advice,
    change_of,
    event_of,
    root_cause,
    state_of,
)
from batchlab.deploy.template import Template, parse

CAPABILITIES = ("CAPABILITY_NAMED_IAM",)
"""The template creates IAM roles, which the request must confirm. `plan` shows the roles."""
TAG = "batchlab.stack"

SETTLES_S = 60.0
"""Seconds for which AWS may not find a new object."""
POLL_S = 3.0
HERE_POLL_S = 0.1
"""Poll interval with an emulator, which does not limit requests."""

_POINTS_ON = "DescribeEvents"
"""A reason with this text has its details in DescribeEvents."""
_NOTHING_NEW = ("didn't contain changes", "No updates are to be performed")


class Stack:
    """The stack called `name` in an account. `sleep` waits for a number of seconds."""

    def __init__(
        self,
        account: Account,
        name: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.account = account
        self.name = name
        self._sleep = sleep
        self._clock = clock
        self._poll_s = POLL_S if account.is_real else HERE_POLL_S
        self._executed: set[str] = set()

    @property
    def _cloud(self) -> Any:
        return self.account.client("cloudformation")

    # --- As it is --------------------------------------------------------------------------------

    def state(self, stack: str | None = None) -> State | None:
        """Return the stack with this name or id, or None. An id also finds deleted stacks."""
        try:
            with asked("DescribeStacks", _is_missing):
                told = self._cloud.describe_stacks(StackName=stack or self.name)["Stacks"]
        except Missing:
            return None
        if not told or (stack is None and told[0]["StackStatus"] == "DELETE_COMPLETE"):
            return None
        return state_of(told[0])

    def resources(self) -> list[Resource]:
        """Return the resources of the stack. Raises BackendError."""
        told = self.account.pages(
            "cloudformation", "list_stack_resources", "StackResourceSummaries", StackName=self.name
        )
        return [
            Resource(one["LogicalResourceId"], one["ResourceType"], one["PhysicalResourceId"], one["ResourceStatus"])
            for one in told
            # A resource without an id was never created.
            if one["ResourceStatus"] != "DELETE_COMPLETE" and one.get("PhysicalResourceId")
        ]

    def template(self) -> Template:
        """Return the last deployed template."""
        with asked("GetTemplate"):
            told = self._cloud.get_template(StackName=self.name, TemplateStage="Original")
        body = told["TemplateBody"]
        # botocore parses JSON itself.
        return parse(body, self.name) if isinstance(body, str) else dict(body)

    # --- Change sets -----------------------------------------------------------------------------

    def propose(
        self, template: Mapping[str, str], parameters: Sequence[Mapping[str, Any]], *, is_new: bool
    ) -> ChangeSet:
        """Create a change set, and return it once AWS has computed it. It is empty if it changes
        nothing. `template` is TemplateBody or TemplateURL. Raises BackendError with AWS's reason if
        AWS cannot make the changes."""
        with _lacking(), asked("CreateChangeSet"):
            made = self._cloud.create_change_set(
                StackName=self.name,
                ChangeSetName=f"batchlab-{secrets.token_hex(6)}",
                ChangeSetType="CREATE" if is_new else "UPDATE",
                Parameters=list(parameters),
                Capabilities=list(CAPABILITIES),
                Tags=[{"Key": TAG, "Value": self.name}],
                **template,
            )
        change_set = ChangeSet(made["Id"], made["StackId"], ())
        try:
            status, reason = self._worked_out(change_set.id)
            if status == "FAILED" and not any(one in reason for one in _NOTHING_NEW):
                raise self._impossible(change_set.id, reason)
            changes = () if status == "FAILED" else tuple(self._changes(change_set.id))
        except BaseException:
            self.withdraw(change_set, is_new=is_new)
            raise
        return ChangeSet(change_set.id, change_set.stack_id, changes)

    def _impossible(self, change_set: str, reason: str) -> BackendError:
        cause = self._refused(ChangeSetName=change_set) if _POINTS_ON in reason else None
        why = f"{cause.resource} ({cause.type}): {cause.reason}" if cause else reason
        return BackendError(
            f"AWS cannot make these changes: {why.rstrip('.')}.",
            remedy=f"Nothing was changed. {cause.remedy if cause else advice(reason)}",
        )

    # With the stack's name next to a change set's ARN, IAM checks the rights on the stack.

    def _worked_out(self, change_set: str) -> tuple[str, str]:
        begun_s = self._clock()
        while True:
            try:
                with asked("DescribeChangeSet", _is_missing):
                    told = self._cloud.describe_change_set(StackName=self.name, ChangeSetName=change_set)
            except Missing as error:
                if self._clock() - begun_s > SETTLES_S:
                    raise Unreachable(
                        f"CloudFormation does not find the change set that it has created: {error.message}"
                    ) from error
            else:
                if told["Status"] in ("CREATE_COMPLETE", "FAILED"):
                    return told["Status"], told.get("StatusReason", "")
            self._sleep(self._poll_s)

    def _changes(self, change_set: str) -> Iterator[Change]:
        for page in self.account.pages(
            "cloudformation", "describe_change_set", "Changes", StackName=self.name, ChangeSetName=change_set
        ):
            yield change_of(page["ResourceChange"])

    def withdraw(self, change_set: ChangeSet, *, is_new: bool) -> None:
        """Delete the change set, and a stack that was created only for it. AWS deletes an executed
        change set itself."""
        if change_set.id in self._executed:
            return
        try:
            with asked("DeleteChangeSet", _is_missing):
                self._cloud.delete_change_set(StackName=self.name, ChangeSetName=change_set.id)
        except Missing:
            return
        if not is_new:
            return
        state = self.state(change_set.stack_id)
        if state and state.is_new:
            self.delete(change_set.stack_id)
            self._gone(change_set.stack_id)

    def _gone(self, stack_id: str) -> None:
        begun_s = self._clock()
        while (state := self.state(stack_id)) and state.status != "DELETE_COMPLETE":
            if self._clock() - begun_s > SETTLES_S:
                raise Unreachable(f"The empty stack {self.name} is still {state.status}.")
            self._sleep(self._poll_s)

    # --- Operations ------------------------------------------------------------------------------

    def execute(self, change_set: ChangeSet) -> None:
        """Begin to change the stack. `follow` waits for the end."""
        # Set before the call: a stack whose creation may have begun must not be deleted as empty.
        self._executed.add(change_set.id)
        with asked("ExecuteChangeSet"):
            self._cloud.execute_change_set(
                StackName=self.name, ChangeSetName=change_set.id, ClientRequestToken=_token("execute")
            )

    def protect(self, *, on: bool) -> None:
        """Turn termination protection on or off."""
        with asked("UpdateTerminationProtection"):
            self._cloud.update_termination_protection(StackName=self.name, EnableTerminationProtection=on)

    def delete(self, stack_id: str, retain: Sequence[str] = ()) -> None:
        """Begin to delete the stack. `retain` are logical ids to keep, for a stack whose deletion has failed."""
        with asked("DeleteStack"):
            self._cloud.delete_stack(
                StackName=stack_id,
                ClientRequestToken=_token("delete"),
                **({"RetainResources": list(retain)} if retain else {}),
            )

    def resume_rollback(self) -> None:
        """Continue a rollback that has failed."""
        with asked("ContinueUpdateRollback"):
            self._cloud.continue_update_rollback(StackName=self.name, ClientRequestToken=_token("rollback"))

    # --- Events ----------------------------------------------------------------------------------

    def mark(self, stack_id: str) -> str:
        """Return the id of the newest event, from which `follow` continues, or "" without events."""
        return next((event.id for event in self._events(stack_id)), "")

    def last_operation(self, stack_id: str) -> tuple[str, list[Event]]:
        """Return the events of the last operation, oldest first, and the id of the event before
        them, or "" without one. A rollback belongs to the operation that it rolls back."""
        events: list[Event] = []
        for event in self._events(stack_id):
            if events and events[-1].begins_operation:
                return event.id, events[::-1]
            events.append(event)
        return "", events[::-1]

    def events(self, stack_id: str, since: str = "") -> list[Event]:
        """Return the events after the event `since`, oldest first."""
        found = []
        for event in self._events(stack_id):
            if event.id == since:
                break
            found.append(event)
        return found[::-1]

    def cause(self, stack_id: str, events: Sequence[Event]) -> Cause | None:
        """Return the cause of failure of the operation with these events, or None without a failure."""
        cause = root_cause(events)
        if cause and (_POINTS_ON in cause.reason or "alidation fail" in cause.reason):
            # CloudFormation validates some resources before it begins, and reports those errors
            # elsewhere.
            return self._refused(StackName=stack_id) or cause
        return cause

    def _refused(self, **asking: str) -> Cause | None:
        """Return the first error that CloudFormation has found before it began."""
        if not hasattr(self._cloud, "describe_events"):  # This is boto3 from before November 2025.
            return None
        with asked("DescribeEvents"):
            told = self._cloud.describe_events(**asking, Filters={"FailedEvents": True})
        for one in told.get("OperationEvents", ()):
            if reason := one.get("ValidationStatusReason"):
                resource, kind = one.get("LogicalResourceId", ""), one.get("ResourceType", "")
                return Cause(resource, kind, reason, advice(reason))
        return None

    def _events(self, stack_id: str) -> Iterator[Event]:
        """Yield the events, newest first, and none for a stack that AWS does not find yet."""
        pages = self._cloud.get_paginator("describe_stack_events").paginate(StackName=stack_id)
        try:
            with asked("DescribeStackEvents", _is_missing):
                for page in pages:
                    yield from map(event_of, page["StackEvents"])
        except Missing:
            return

    def follow(self, stack_id: str, since: str, see: Callable[[Event], None]) -> State:
        """Wait for the end of the operation that began after the event `since`. `see` receives each
        of its events once, oldest first."""
        last, has_ended = since, False
        while True:
            for event in self.events(stack_id, last):
                last = event.id
                has_ended |= event.is_of_stack and event.ends_operation
                see(event)
            # Read only after the last event: right after the beginning, the state may still be the
            # old one.
            if has_ended:
                state = self.state(stack_id)
                if state and not state.is_moving:
                    return state
            self._sleep(self._poll_s)


@contextmanager
def _lacking() -> Iterator[None]:
    """Add a remedy to an emulator's error about resource types that it lacks."""
    try:
        yield
    except Refused as error:
        if "Unrecognized resource types" not in error.message:
            raise
        raise Refused(
            error.message,
            remedy="The emulator of AWS lacks them: try --egress endpoints, --ledger sqlite and --budget 0 there.",
        ) from error


def _token(what: str) -> str:
    return f"batchlab-{what}-{secrets.token_hex(6)}"


def _is_missing(code: str, message: str) -> bool:
    if code in ("ChangeSetNotFound", "StackNotFound"):
        return True
    return code == "ValidationError" and "does not exist" in message
