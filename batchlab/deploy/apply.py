"""`apply`: creates or updates a stack in two phases.

Invariant: it starts from any state of the stack, so a second run continues where the first one
stopped. The first phase creates everything without a release, so no instance can boot yet. The
second phase uploads the release to the stack's own bucket and sets it as the stack's parameter.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.objects import open_s3
from batchlab.core.errors import BackendError, Refused, UsageError
from batchlab.deploy import release, settings, status
from batchlab.deploy.account import Missing, asked
from batchlab.deploy.plan import Plan, planned
from batchlab.deploy.settings import RELEASE, Settings
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Cause, Event, State, must_go, next_step, refuse_unchangeable
from batchlab.deploy.template import Template
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home


class Front(Protocol):
    """The user interface of an operation: messages, questions, and progress."""

    def say(self, text: str) -> None: ...

    def agrees(self, question: str) -> bool:
        """Return whether the user agrees. The question comes before any change."""

    def show(self, plan: Plan) -> None: ...

    def watching(self, what: str, total: int) -> AbstractContextManager[Callable[[Event], None]]:
        """Show the events of an operation on `total` resources as they occur."""


class StackFailed(BackendError):
    """An operation failed. `cause` is the failure that caused all others."""

    def __init__(self, state: State, cause: Cause | None) -> None:
        why = f": {cause.resource} ({cause.type}): {cause.reason.rstrip('.')}" if cause else ""
        remedies = [cause.remedy if cause else "", next_step(state)]
        super().__init__(f"The stack {state.name} is {state.status}{why}.", remedy=" ".join(filter(None, remedies)))
        self.cause = cause


@dataclass(slots=True)
class Apply:
    """One run of `apply`. `archive` returns the release's path, and builds the release on its first call."""

    stack: Stack
    wanted: Settings
    source: Template
    home: Home
    front: Front
    archive: Callable[[], Path]
    is_renewed: bool = field(default=False, init=False)
    """Whether instances of an earlier deployment may exist."""

    def run(self) -> AwsDeployment | None:
        """Apply the settings, and return the deployment, or None if the user declined. Raises
        StackFailed and BackendError."""
        state = self._at_rest()
        if state and must_go(state):
            if not self._cleared(state):
                return None
            state = None
        elif state:
            refuse_unchangeable(state)
        if state is None or state.is_new:
            state = self._created(state)
            if state is None:
                return None
            self.front.say("Everything is there; next is the release, without asking again.")
            state = self._released(state, ask=False)
        else:
            state = self._released(state, ask=True)
        if state is None:
            return None
        found = self._kept(state)
        if self.is_renewed:
            self._refresh(state)
        return found

    # --- Before ----------------------------------------------------------------------------------

    def _at_rest(self) -> State | None:
        """Return the stack once no operation is in progress and no rollback has failed."""
        state = self.stack.state()
        if state and state.is_moving:
            self.front.say(f"The stack {state.name} is {state.status}: following that first.")
            since, _ = self.stack.last_operation(state.id)
            self._followed(state.id, since, state.status, 0, must_succeed=False)
            state = self.stack.state()
        if state and state.status == "UPDATE_ROLLBACK_FAILED":
            self._explain(state)
            if not self.front.agrees("Have the rollback go on?"):
                raise Refused(
                    f"The stack {state.name} stays {state.status}.", remedy="`batchlab deploy apply` asks again."
                )
            since = self.stack.mark(state.id)
            self.stack.resume_rollback()
            state = self._followed(state.id, since, "rolling back", 0, must_succeed=False)
            if state.status == "UPDATE_ROLLBACK_FAILED":
                raise self._failed(state, since)
        return state

    def _cleared(self, state: State) -> bool:
        """Delete a stack that allows no other operation. Return False if the user declined."""
        self._explain(state)
        if state.status != "ROLLBACK_COMPLETE":
            raise Refused(
                f"The stack {state.name} is {state.status}, and may still have parts.", remedy=next_step(state)
            )
        if not self.front.agrees(f"Delete the empty stack {state.name}, to begin anew?"):
            return False
        if state.is_protected:
            self.stack.protect(on=False)
        since = self.stack.mark(state.id)
        self.stack.delete(state.id)
        self._followed(state.id, since, "deleting the empty stack", 0)
        return True

    def _explain(self, state: State) -> None:
        if cause := self.stack.cause(state.id, self.stack.last_operation(state.id)[1]):
            self.front.say(
                f"{state.name} is {state.status}. What failed first: {cause.resource} ({cause.type}): {cause.reason}"
            )

    # --- The two phases --------------------------------------------------------------------------

    def _created(self, state: State | None) -> State | None:
        with planned(self.stack, self.wanted, self.source, state, home=self.home, release="") as plan:
            self.front.show(plan)
            if not self.front.agrees(f"Create the stack {self.stack.name}?"):
                return None
            settings.write(self.home, self.wanted)
            # A release that cannot be built fails here, before anything costs money.
            self.archive()
            made = self._executed(plan, "creating")
        self.stack.protect(on=True)
        return made

    def _released(self, state: State, *, ask: bool) -> State | None:
        archive = self.archive()
        sha = release.release_of(archive)
        with planned(self.stack, self.wanted, self.source, state, home=self.home, release=sha) as plan:
            if ask:
                self.front.show(plan)
            if not plan.changes:
                settings.write(self.home, self.wanted)
                return state
            if ask and not self.front.agrees(f"Update the stack {self.stack.name}?"):
                return None
            settings.write(self.home, self.wanted)
            endpoint = Endpoint(region=self.stack.account.region)
            bucket = open_s3(endpoint, status.of(state, "Bucket"))
            release.upload(bucket, archive, factory.patience(), self.front.say)
            if not state.is_protected and ask:
                self.stack.protect(on=True)
            updated = self._executed(plan, "updating")
        templates = any(change.type == "AWS::EC2::LaunchTemplate" for change in plan.changes)
        self.is_renewed = templates and bool(state.parameters.get(RELEASE))
        return updated

    def _executed(self, plan: Plan, what: str) -> State:
        since = self.stack.mark(plan.change_set.stack_id)
        self.stack.execute(plan.change_set)
        return self._followed(plan.change_set.stack_id, since, what, len(plan.changes))

    def _followed(self, stack_id: str, since: str, what: str, total: int, *, must_succeed: bool = True) -> State:
        with self.front.watching(what, total) as see:
            state = self.stack.follow(stack_id, since, see)
        if must_succeed and not state.has_succeeded:
            raise self._failed(state, since)
        return state

    def _failed(self, state: State, since: str) -> StackFailed:
        return StackFailed(state, self.stack.cause(state.id, self.stack.events(state.id, since)))

    def _refresh(self, state: State) -> None:
        """Replace instances with an older launch template, one after another. Workers may finish their tasks first."""
        scaling = self.stack.account.client("autoscaling")
        groups = [status.of(state, "ManagerGroup"), *status.pool_groups(state)]
        told = self.stack.account.pages(
            "autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups", AutoScalingGroupNames=groups
        )
        for group in told:
            if not group.get("Instances"):
                continue
            name = group["AutoScalingGroupName"]
            # The manager is alone in its group, so it must end before the next one starts.
            healthy = 0 if name == groups[0] else 90
            wishes: dict[str, Any] = {
                "MinHealthyPercentage": healthy,
                "SkipMatching": True,
                "ScaleInProtectedInstances": "Wait",
                "StandbyInstances": "Ignore",
            }
            try:
                with asked(f"Auto Scaling group {name!r}", _is_at_it):
                    scaling.start_instance_refresh(AutoScalingGroupName=name, Preferences=wishes)
            except Missing:
                self.front.say(f"{name}: instances are being replaced already; apply again later.")
            else:
                self.front.say(f"{name}: its instances are being replaced, one after another.")

    # --- After -----------------------------------------------------------------------------------

    def _kept(self, state: State) -> AwsDeployment:
        deployment = status.deployment_of(state, self.stack.account.region, python_of(self.archive()))
        aws_deployment.write(self.home, deployment)
        return deployment


def _is_at_it(code: str, _message: str) -> bool:
    return code.startswith("InstanceRefreshInProgress")


def python_of(archive: Path) -> str:
    """Return the Python version of a release. Raises UsageError if the file is not a release."""
    try:
        with tarfile.open(archive) as opened:
            member = opened.extractfile("version")
            lines = member.read().decode().splitlines() if member else []
    except (tarfile.TarError, KeyError, OSError) as error:
        raise UsageError(
            f"{archive} is not a release: {error}.", remedy="Name an archive from aws/releases in the grid's folder."
        ) from error
    return next((line.partition("=")[2] for line in lines if line.startswith("PYTHON=")), "")
