"""CloudFormation's operations on one stack, for the stack's state, change sets, events, and deletion.

Invariant: a read of a new stack or change set is repeated for some time before the object counts as missing.
CloudFormation may not find a stack or a change set right after its creation.
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
"""CloudFormation capabilities that confirm that the template creates IAM roles. The plan shows the IAM roles to the
user.
"""
TAG = "batchlab.stack"

MAX_SETTLE_S = 60.0
"""Time in seconds after its creation for which AWS may not find a change set or a stack."""
POLL_S = 3.0
LOCAL_POLL_S = 0.1
"""Poll interval in seconds for an emulator, which does not limit the rate of requests."""

_DETAILS_ELSEWHERE = "DescribeEvents"
"""Text in CloudFormation's reason of a failure. Only DescribeEvents returns the details of a failure whose reason
contains the text.
"""
_NO_CHANGES = ("didn't contain changes", "No updates are to be performed")


class Stack:
    """CloudFormation stack with the name `name` in an AWS account. The stack may not exist yet."""

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
        """Call the CloudFormation action with AWS's name `action`.

        Raise Missing if the stack or the change set does not exist.
        """
        with aws_errors(action, _is_missing):
            return getattr(self._cloud, re.sub("(?<!^)([A-Z])", r"_\1", action).lower())(**request)

    def state(self, stack: str | None = None) -> State | None:
        """Return the state of the stack with the name or id `stack`, or None if the stack does not exist. A deleted
        stack is found only by its id.
        """
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
            # CloudFormation has not created a resource without a physical id.
            if part["ResourceStatus"] != "DELETE_COMPLETE" and part.get("PhysicalResourceId")
        ]

    def template(self) -> Template:
        """Return the last deployed template of the stack."""
        body = self._call("GetTemplate", StackName=self.name, TemplateStage="Original")["TemplateBody"]
        # botocore returns a JSON template as a parsed object, and a YAML template as text.
        return parse(body, self.name) if isinstance(body, str) else dict(body)

    # --- Change sets -----------------------------------------------------------------------------

    def propose(
        self, template: Mapping[str, str], parameters: Sequence[Mapping[str, Any]], *, is_new: bool
    ) -> ChangeSet:
        """Create a change set for the stack, and return the change set as soon as AWS has computed the changes.

        If the stack would not change, the returned change set is empty. `template` contains the argument TemplateBody
        or TemplateURL. Raise BackendError with AWS's reason if AWS cannot make the changes.
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
                # The request names the stack in addition to the change set, so that IAM checks the caller's permissions
                # for the stack.
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
        """Delete a change set that was not executed. If the stack was created only for the change set, also delete the
        stack.

        AWS deletes an executed change set itself.
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
        """Start the execution of a change set. `follow` waits for the end of the execution."""
        # Record the change set before the call of ExecuteChangeSet. Even if the call fails, the execution may have
        # begun, so `withdraw` must not delete the stack.
        self._executed.add(change_set.id)
        token = _token("execute")
        self._call("ExecuteChangeSet", StackName=self.name, ChangeSetName=change_set.id, ClientRequestToken=token)

    def protect(self, *, on: bool) -> None:
        """Turn the termination protection of the stack on or off."""
        self._call("UpdateTerminationProtection", StackName=self.name, EnableTerminationProtection=on)

    def delete(self, stack_id: str, retain: Sequence[str] = ()) -> None:
        """Start the deletion of the stack.

        If an earlier deletion failed, `retain` may list the logical ids of resources that CloudFormation must keep.
        """
        more = {"RetainResources": list(retain)} if retain else {}
        self._call("DeleteStack", StackName=stack_id, ClientRequestToken=_token("delete"), **more)

    def resume_rollback(self) -> None:
        """Continue a failed rollback of the stack."""
        self._call("ContinueUpdateRollback", StackName=self.name, ClientRequestToken=_token("rollback"))

    # --- Events ----------------------------------------------------------------------------------

    def mark(self, stack_id: str) -> str:
        """Return the id of the stack's newest event, or "" if the stack does not have an event.

        `follow` reads the events after the event with the returned id.
        """
        return next((event.id for event in self._events(stack_id)), "")

    def last_operation(self, stack_id: str) -> tuple[str, list[Event]]:
        """Return the id of the event before the stack's last operation, and the events of the last operation from the
        oldest to the newest.

        If the last operation is the stack's first operation, the returned id is "". The events of an operation include
        the events of the operation's rollback.
        """
        events: list[Event] = []
        for event in self._events(stack_id):
            if events and events[-1].begins_operation:
                return event.id, events[::-1]
            events.append(event)
        return "", events[::-1]

    def events(self, stack_id: str, since: str = "") -> list[Event]:
        """Return the stack's events after the event with the id `since`, from the oldest to the newest."""
        events = list(takewhile(lambda event: event.id != since, self._events(stack_id)))
        return events[::-1]

    def cause(self, stack_id: str, events: Sequence[Event]) -> Cause | None:
        """Return the cause of a failed operation from the operation's events, or None if no event is a failure."""
        cause = root_cause(events)
        if cause and (_DETAILS_ELSEWHERE in cause.reason or "alidation fail" in cause.reason):
            # CloudFormation validates some resources before an operation. Only the action DescribeEvents returns the
            # errors of this validation.
            return self._validation_error(StackName=stack_id) or cause
        return cause

    def _validation_error(self, **query: str) -> Cause | None:
        """Return the first error of the validation before an operation, or None if the error is unknown."""
        if not hasattr(self._cloud, "describe_events"):  # boto3 offers `describe_events` since November 2025.
            return None
        response = self._call("DescribeEvents", **query, Filters={"FailedEvents": True})
        for event in response.get("OperationEvents", ()):
            if reason := event.get("ValidationStatusReason"):
                resource, kind = event.get("LogicalResourceId", ""), event.get("ResourceType", "")
                return Cause(resource, kind, reason, advice(reason))
        return None

    def _events(self, stack_id: str) -> Iterator[Event]:
        """Yield the events of the stack from the newest to the oldest.

        If AWS does not find the stack yet, the generator does not yield events.
        """
        pages = self._cloud.get_paginator("describe_stack_events").paginate(StackName=stack_id)
        try:
            with aws_errors("DescribeStackEvents", _is_missing):
                for page in pages:
                    yield from map(event_of, page["StackEvents"])
        except Missing:
            return

    def follow(self, stack_id: str, since: str, on_event: Callable[[Event], None]) -> State:
        """Wait for the end of the operation that began after the event with the id `since`, and return the state of the
        stack.

        `on_event` receives each event of the operation once, from the oldest to the newest.
        """
        last, has_ended = since, False
        while True:
            for event in self.events(stack_id, last):
                last = event.id
                has_ended |= event.is_of_stack and event.ends_operation
                on_event(event)
            # Read the stack's state only after the last event of the operation, because AWS may return an old state
            # before the event.
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
