"""CloudFormation as far as one stack needs it: its state, change sets, events, its end.

Invariant: what AWS has not heard of yet, just after it was told, is asked for again for a while,
not taken for missing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.deploy.account import Account, Missing, asked
from batchlab.deploy.failure_cause import Cause, Event, advice, root_cause
from batchlab.deploy.stack_records import (
    Change,
    ChangeSet,
    Resource,
    State,
    change_of,
    event_of,
    state_of,
)
from batchlab.deploy.template import Template, parse

CAPABILITIES = ("CAPABILITY_NAMED_IAM",)
"""That the stack makes roles has to be said in as many words; `plan` shows which."""
TAG = "batchlab.stack"

SETTLES_S = 60.0
"""So long AWS may not know of what it has just been told."""
POLL_S = 3.0
HERE_POLL_S = 0.1
"""With an emulator, which counts no requests."""

_POINTS_ON = "DescribeEvents"
"""Where a reason says this, the reason is there."""
_NOTHING_NEW = ("didn't contain changes", "No updates are to be performed")


class Stack:
    """The stack called `name` in an account. Waiting is done by `sleep`, in seconds."""

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
        """The stack of this name, or of this id, which finds deleted ones too; None where there is
        none."""
        try:
            with asked("DescribeStacks", _is_missing):
                told = self._cloud.describe_stacks(StackName=stack or self.name)["Stacks"]
        except Missing:
            return None
        if not told or (stack is None and told[0]["StackStatus"] == "DELETE_COMPLETE"):
            return None
        return state_of(told[0])

    def resources(self) -> list[Resource]:
        """What it has; BackendError."""
        told = self.account.pages(
            "cloudformation",
            "list_stack_resources",
            "StackResourceSummaries",
            StackName=self.name,
        )
        return [
            Resource(
                one["LogicalResourceId"],
                one["ResourceType"],
                one["PhysicalResourceId"],
                one["ResourceStatus"],
            )
            for one in told
            # One without an id has never come to be.
            if one["ResourceStatus"] != "DELETE_COMPLETE" and one.get("PhysicalResourceId")
        ]

    def template(self) -> Template:
        """The template that was deployed last."""
        with asked("GetTemplate"):
            told = self._cloud.get_template(StackName=self.name, TemplateStage="Original")
        body = told["TemplateBody"]
        # botocore reads JSON by itself.
        return parse(body, self.name) if isinstance(body, str) else dict(body)

    # --- Change sets -----------------------------------------------------------------------------

    def propose(
        self,
        template: Mapping[str, str],
        parameters: Sequence[Mapping[str, Any]],
        *,
        is_new: bool,
    ) -> ChangeSet:
        """A change set, once AWS has worked it out; one that changes nothing is empty. `template`
        is TemplateBody or TemplateURL. BackendError with AWS's reason where it cannot be."""
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
        found = ChangeSet(made["Id"], made["StackId"], ())
        try:
            status, reason = self._worked_out(found.id)
            if status == "FAILED" and not any(one in reason for one in _NOTHING_NEW):
                raise self._impossible(found.id, reason)
            changes = () if status == "FAILED" else tuple(self._changes(found.id))
        except BaseException:
            self.withdraw(found, is_new=is_new)
            raise
        return ChangeSet(found.id, found.stack_id, changes)

    def _impossible(self, change_set: str, reason: str) -> BackendError:
        cause = self._refused(ChangeSetName=change_set) if _POINTS_ON in reason else None
        why = f"{cause.resource} ({cause.type}): {cause.reason}" if cause else reason
        return BackendError(
            f"AWS cannot make these changes: {why.rstrip('.')}.",
            remedy=f"Nothing was changed. {cause.remedy if cause else advice(reason)}",
        )

    # With the stack's name beside a change set's ARN, IAM is asked about the stack.

    def _worked_out(self, change_set: str) -> tuple[str, str]:
        begun_s = self._clock()
        while True:
            try:
                with asked("DescribeChangeSet", _is_missing):
                    told = self._cloud.describe_change_set(
                        StackName=self.name, ChangeSetName=change_set
                    )
            except Missing as error:
                if self._clock() - begun_s > SETTLES_S:
                    raise Unreachable(
                        f"CloudFormation does not find what it has made: {error.message}"
                    ) from error
            else:
                if told["Status"] in ("CREATE_COMPLETE", "FAILED"):
                    return told["Status"], told.get("StatusReason", "")
            self._sleep(self._poll_s)

    def _changes(self, change_set: str) -> Iterator[Change]:
        for one in self.account.pages(
            "cloudformation",
            "describe_change_set",
            "Changes",
            StackName=self.name,
            ChangeSetName=change_set,
        ):
            yield change_of(one["ResourceChange"])

    def withdraw(self, change_set: ChangeSet, *, is_new: bool) -> None:
        """Delete the change set, and with it a stack that was there only for it. One that has been
        executed is AWS's to delete."""
        if change_set.id in self._executed:
            return
        try:
            with asked("DeleteChangeSet", _is_missing):
                self._cloud.delete_change_set(StackName=self.name, ChangeSetName=change_set.id)
        except Missing:
            return
        if not is_new:
            return
        there = self.state(change_set.stack_id)
        if there and there.is_new:
            self.delete(change_set.stack_id)
            self._gone(change_set.stack_id)

    def _gone(self, stack_id: str) -> None:
        begun_s = self._clock()
        while (there := self.state(stack_id)) and there.status != "DELETE_COMPLETE":
            if self._clock() - begun_s > SETTLES_S:
                raise Unreachable(f"The empty stack {self.name} is {there.status} still.")
            self._sleep(self._poll_s)

    # --- Operations ------------------------------------------------------------------------------

    def execute(self, change_set: ChangeSet) -> None:
        """Begin to change the stack; `follow` sees how it goes."""
        # Before it is true: a stack that is perhaps being made must not be deleted as empty.
        self._executed.add(change_set.id)
        with asked("ExecuteChangeSet"):
            self._cloud.execute_change_set(
                StackName=self.name,
                ChangeSetName=change_set.id,
                ClientRequestToken=_token("execute"),
            )

    def protect(self, *, on: bool) -> None:
        """Termination protection."""
        with asked("UpdateTerminationProtection"):
            self._cloud.update_termination_protection(
                StackName=self.name, EnableTerminationProtection=on
            )

    def delete(self, stack_id: str, retain: Sequence[str] = ()) -> None:
        """Begin to delete the stack; `retain` are logical ids that stay, of one whose deletion has
        failed."""
        with asked("DeleteStack"):
            self._cloud.delete_stack(
                StackName=stack_id,
                ClientRequestToken=_token("delete"),
                **({"RetainResources": list(retain)} if retain else {}),
            )

    def resume_rollback(self) -> None:
        """Have a rollback that has failed go on."""
        with asked("ContinueUpdateRollback"):
            self._cloud.continue_update_rollback(
                StackName=self.name, ClientRequestToken=_token("rollback")
            )

    # --- Events ----------------------------------------------------------------------------------

    def mark(self, stack_id: str) -> str:
        """The newest event so far, to `follow` from there; empty where there is none yet."""
        return next((one.id for one in self._events(stack_id)), "")

    def last_operation(self, stack_id: str) -> tuple[str, list[Event]]:
        """The events of the operation that was begun last, oldest first, and the id of the event
        before them, empty where there is none. A rollback is part of what it rolls back."""
        found: list[Event] = []
        for one in self._events(stack_id):
            if found and found[-1].begins_operation:
                return one.id, found[::-1]
            found.append(one)
        return "", found[::-1]

    def events(self, stack_id: str, since: str = "") -> list[Event]:
        """Those after the event `since`, oldest first."""
        found = []
        for one in self._events(stack_id):
            if one.id == since:
                break
            found.append(one)
        return found[::-1]

    def cause(self, stack_id: str, events: Sequence[Event]) -> Cause | None:
        """Why the operation with these events has failed; None where nothing has."""
        found = root_cause(events)
        if found and (_POINTS_ON in found.reason or "alidation fail" in found.reason):
            # Some of what cannot be made CloudFormation sees before it begins, and tells elsewhere.
            return self._refused(StackName=stack_id) or found
        return found

    def _refused(self, **asking: str) -> Cause | None:
        """The first of what CloudFormation has found wrong before it began."""
        if not hasattr(self._cloud, "describe_events"):  # boto3 of before November 2025
            return None
        with asked("DescribeEvents"):
            told = self._cloud.describe_events(**asking, Filters={"FailedEvents": True})
        for one in told.get("OperationEvents", ()):
            if reason := one.get("ValidationStatusReason"):
                resource, kind = one.get("LogicalResourceId", ""), one.get("ResourceType", "")
                return Cause(resource, kind, reason, advice(reason))
        return None

    def _events(self, stack_id: str) -> Iterator[Event]:
        """Newest first; none for a stack that AWS has not heard of yet."""
        pages = self._cloud.get_paginator("describe_stack_events").paginate(StackName=stack_id)
        try:
            with asked("DescribeStackEvents", _is_missing):
                for page in pages:
                    yield from map(event_of, page["StackEvents"])
        except Missing:
            return

    def follow(self, stack_id: str, since: str, see: Callable[[Event], None]) -> State:
        """Wait for the end of the operation that has begun after the event `since`; `see` gets its
        events, oldest first, each once."""
        last, has_ended = since, False
        while True:
            for event in self.events(stack_id, last):
                last = event.id
                has_ended |= event.is_of_stack and event.ends_operation
                see(event)
            # Asked only then: just after the beginning it may still be what it was before.
            if has_ended:
                state = self.state(stack_id)
                if state and not state.is_moving:
                    return state
            self._sleep(self._poll_s)


@contextmanager
def _lacking() -> Iterator[None]:
    """An emulator names the types that it lacks; what to leave out for them is said here."""
    try:
        yield
    except Refused as error:
        if "Unrecognized resource types" not in error.message:
            raise
        raise Refused(
            error.message,
            remedy="What stands in AWS's place lacks them: try --egress endpoints, --ledger "
            "sqlite and --budget 0 there.",
        ) from error


def _token(what: str) -> str:
    return f"batchlab-{what}-{secrets.token_hex(6)}"


def _is_missing(code: str, message: str) -> bool:
    if code in ("ChangeSetNotFound", "StackNotFound"):
        return True
    return code == "ValidationError" and "does not exist" in message
