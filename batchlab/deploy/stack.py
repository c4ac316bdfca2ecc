"""CloudFormation operations on one stack: its state, change sets, events, and deletion.

Invariant: AWS may not find a new object right after its creation. A read is therefore repeated for
some time before the object counts as missing.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.deploy.account import Account, Missing, aws_errors
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
"""Confirmation in the request that the template creates IAM roles. `plan` shows the roles."""
TAG = "batchlab.stack"

MAX_SETTLE_S = 60.0
"""Time in seconds for which AWS may not find a new object."""
POLL_S = 3.0
LOCAL_POLL_S = 0.1
"""Poll interval in seconds for an emulator, which does not limit requests."""

_DETAILS_ELSEWHERE = "DescribeEvents"
"""Part of a reason whose details are in DescribeEvents."""
_NO_CHANGES = ("didn't contain changes", "No updates are to be performed")


class Stack:
    """The stack called `name` in an account."""

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
        self._poll_s = POLL_S if account.is_real else LOCAL_POLL_S
        self._executed: set[str] = set()

    @property
    def _cloud(self) -> Any:
        return self.account.client("cloudformation")

    def _call(self, action: str, **request: Any) -> Any:
        """Call an action by its AWS name. Raise Missing if the stack or the change set does not exist."""
        with aws_errors(action, _is_missing):
            return getattr(self._cloud, re.sub("(?<!^)([A-Z])", r"_\1", action).lower())(**request)

    def state(self, stack: str | None = None) -> State | None:
        """Return the stack with this name or id, or None. An id also finds deleted stacks."""
        try:
            stacks = self._call("DescribeStacks", StackName=stack or self.name)["Stacks"]
        except Missing:
            return None
        if not stacks or (stack is None and stacks[0]["StackStatus"] == "DELETE_COMPLETE"):
            return None
        return state_of(stacks[0])

    def resources(self) -> list[Resource]:
        """Return the existing resources of the stack."""
        operation, key = "list_stack_resources", "StackResourceSummaries"
        return [
            Resource(
                part["LogicalResourceId"], part["ResourceType"], part["PhysicalResourceId"], part["ResourceStatus"]
            )
            for part in self.account.pages("cloudformation", operation, key, StackName=self.name)
            # A resource without an id was never created.
            if part["ResourceStatus"] != "DELETE_COMPLETE" and part.get("PhysicalResourceId")
        ]

    def template(self) -> Template:
        """Return the last deployed template."""
        body = self._call("GetTemplate", StackName=self.name, TemplateStage="Original")["TemplateBody"]
        # botocore parses a JSON template itself.
        return parse(body, self.name) if isinstance(body, str) else dict(body)

    # --- Change sets -----------------------------------------------------------------------------

    def propose(
        self, template: Mapping[str, str], parameters: Sequence[Mapping[str, Any]], *, is_new: bool
    ) -> ChangeSet:
        """Create a change set, and return it once AWS has computed it. It is empty if it changes nothing.

        `template` is TemplateBody or TemplateURL. Raise BackendError with AWS's reason if AWS cannot make the changes.
        """
        try:
            response = self._call(
                "CreateChangeSet",
                StackName=self.name,
                ChangeSetName=f"batchlab-{secrets.token_hex(6)}",
                ChangeSetType="CREATE" if is_new else "UPDATE",
                Parameters=list(parameters),
                Capabilities=list(CAPABILITIES),
                Tags=[{"Key": TAG, "Value": self.name}],
                **template,
            )
        except Refused as error:
            if "Unrecognized resource types" not in error.message:
                raise
            remedy = "The emulator lacks these types. Use --egress endpoints, --ledger sqlite, and --budget 0."
            raise Refused(error.message, remedy=remedy) from error
        change_set = ChangeSet(response["Id"], response["StackId"], ())
        try:
            status, reason = self._wait_for_change_set(change_set.id)
            if status == "FAILED" and not any(text in reason for text in _NO_CHANGES):
                raise self._failure(change_set.id, reason)
            changes = () if status == "FAILED" else tuple(self._changes(change_set.id))
        except BaseException:
            self.withdraw(change_set, is_new=is_new)
            raise
        return ChangeSet(change_set.id, change_set.stack_id, changes)

    def _failure(self, change_set: str, reason: str) -> BackendError:
        cause = self._validation_error(ChangeSetName=change_set) if _DETAILS_ELSEWHERE in reason else None
        why = f"{cause.resource} ({cause.type}): {cause.reason}" if cause else reason
        return BackendError(
            f"AWS cannot make these changes: {why.rstrip('.')}.",
            remedy=f"Nothing was changed. {cause.remedy if cause else advice(reason)}",
        )

    def _wait_for_change_set(self, change_set: str) -> tuple[str, str]:
        begun_s = self._clock()
        while True:
            try:
                # With the stack's name next to the change set's ARN, IAM checks the rights on the stack.
                description = self._call("DescribeChangeSet", StackName=self.name, ChangeSetName=change_set)
            except Missing as error:
                if self._clock() - begun_s > MAX_SETTLE_S:
                    raise Unreachable(
                        f"CloudFormation does not find the change set that it has created: {error.message}"
                    ) from error
            else:
                if description["Status"] in ("CREATE_COMPLETE", "FAILED"):
                    return description["Status"], description.get("StatusReason", "")
            self._sleep(self._poll_s)

    def _changes(self, change_set: str) -> Iterator[Change]:
        for page in self.account.pages(
            "cloudformation", "describe_change_set", "Changes", StackName=self.name, ChangeSetName=change_set
        ):
            yield change_of(page["ResourceChange"])

    def withdraw(self, change_set: ChangeSet, *, is_new: bool) -> None:
        """Delete the change set, and a stack that was created only for it. AWS deletes an executed
        change set itself.
        """
        if change_set.id in self._executed:
            return
        try:
            self._call("DeleteChangeSet", StackName=self.name, ChangeSetName=change_set.id)
        except Missing:
            return
        if not is_new:
            return
        state = self.state(change_set.stack_id)
        if state and state.is_new:
            self.delete(change_set.stack_id)
            begun_s = self._clock()
            while (state := self.state(change_set.stack_id)) and state.status != "DELETE_COMPLETE":
                if self._clock() - begun_s > MAX_SETTLE_S:
                    raise Unreachable(f"The empty stack {self.name} is still {state.status}.")
                self._sleep(self._poll_s)

    # --- Operations ------------------------------------------------------------------------------

    def execute(self, change_set: ChangeSet) -> None:
        """Start the changes of a change set. `follow` waits for the end."""
        # Record the change set before the call: if its creation may have begun, the stack must not be deleted as empty.
        self._executed.add(change_set.id)
        token = _token("execute")
        self._call("ExecuteChangeSet", StackName=self.name, ChangeSetName=change_set.id, ClientRequestToken=token)

    def protect(self, *, on: bool) -> None:
        """Turn termination protection on or off."""
        self._call("UpdateTerminationProtection", StackName=self.name, EnableTerminationProtection=on)

    def delete(self, stack_id: str, retain: Sequence[str] = ()) -> None:
        """Start the deletion of the stack. After a failed deletion, `retain` lists the logical ids of resources to
        keep.
        """
        more = {"RetainResources": list(retain)} if retain else {}
        self._call("DeleteStack", StackName=stack_id, ClientRequestToken=_token("delete"), **more)

    def resume_rollback(self) -> None:
        """Continue a rollback that has failed."""
        self._call("ContinueUpdateRollback", StackName=self.name, ClientRequestToken=_token("rollback"))

    # --- Events ----------------------------------------------------------------------------------

    def mark(self, stack_id: str) -> str:
        """Return the id of the newest event, from which `follow` continues, or "" without events."""
        return next((event.id for event in self._events(stack_id)), "")

    def last_operation(self, stack_id: str) -> tuple[str, list[Event]]:
        """Return the id of the event before the last operation, or "", and the events of the operation, oldest first.

        A rollback belongs to the operation that it rolls back.
        """
        events: list[Event] = []
        for event in self._events(stack_id):
            if events and events[-1].begins_operation:
                return event.id, events[::-1]
            events.append(event)
        return "", events[::-1]

    def events(self, stack_id: str, since: str = "") -> list[Event]:
        """Return the events after the event `since`, oldest first."""
        events = list(takewhile(lambda event: event.id != since, self._events(stack_id)))
        return events[::-1]

    def cause(self, stack_id: str, events: Sequence[Event]) -> Cause | None:
        """Return the cause of a failed operation from its events, or None without a failure."""
        cause = root_cause(events)
        if cause and (_DETAILS_ELSEWHERE in cause.reason or "alidation fail" in cause.reason):
            # CloudFormation validates some resources before the operation. DescribeEvents has these errors.
            return self._validation_error(StackName=stack_id) or cause
        return cause

    def _validation_error(self, **query: str) -> Cause | None:
        """Return the first error of the validation before the operation."""
        if not hasattr(self._cloud, "describe_events"):  # boto3 has this method since November 2025.
            return None
        response = self._call("DescribeEvents", **query, Filters={"FailedEvents": True})
        for event in response.get("OperationEvents", ()):
            if reason := event.get("ValidationStatusReason"):
                resource, kind = event.get("LogicalResourceId", ""), event.get("ResourceType", "")
                return Cause(resource, kind, reason, advice(reason))
        return None

    def _events(self, stack_id: str) -> Iterator[Event]:
        """Yield the events, newest first. A stack that AWS does not find yet has no events."""
        pages = self._cloud.get_paginator("describe_stack_events").paginate(StackName=stack_id)
        try:
            with aws_errors("DescribeStackEvents", _is_missing):
                for page in pages:
                    yield from map(event_of, page["StackEvents"])
        except Missing:
            return

    def follow(self, stack_id: str, since: str, on_event: Callable[[Event], None]) -> State:
        """Wait for the end of the operation that began after the event `since`, and return the state.

        `on_event` receives each event of the operation once, oldest first.
        """
        last, has_ended = since, False
        while True:
            for event in self.events(stack_id, last):
                last = event.id
                has_ended |= event.is_of_stack and event.ends_operation
                on_event(event)
            # Read the state only after the last event. Before that, AWS may still return the old state.
            if has_ended:
                state = self.state(stack_id)
                if state and not state.is_moving:
                    return state
            self._sleep(self._poll_s)


def _token(what: str) -> str:
    return f"batchlab-{what}-{secrets.token_hex(6)}"


def _is_missing(code: str, message: str) -> bool:
    if code in ("ChangeSetNotFound", "StackNotFound"):
        return True
    return code == "ValidationError" and "does not exist" in message
