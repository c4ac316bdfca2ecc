"""Command `batchlab deploy apply`, which creates or updates a stack in two phases.

Invariant: `Apply` works from any state of the stack, so a second run continues after an interrupted first run. The
first phase of `batchlab deploy apply` creates all resources without a release, so instances cannot boot yet. The second
phase uploads the release to the stack's own bucket and sets the stack's parameter `Release`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.group_descriptions import END_ACTION
from batchlab.adapters.aws.objects import open_s3
from batchlab.core.errors import BackendError, Refused
from batchlab.deploy import release, settings, status
from batchlab.deploy.account import Missing, aws_errors
from batchlab.deploy.checks import check_database_ca
from batchlab.deploy.plan import BUSY_WORKERS, Plan, create_plan
from batchlab.deploy.settings import BUSY, RELEASE, Settings
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Cause, Event, State, must_be_deleted, next_step, refuse_unchangeable
from batchlab.deploy.template import Template
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.home import Home

REPLACEMENT_S = 600.0
"""Maximum time in seconds for the replacement of the manager's instance, which normally takes three minutes."""
POLL_S = 5.0


class Interface(Protocol):
    """User interface of an operation on a stack, which shows messages, questions, and progress."""

    def say(self, text: str) -> None: ...

    def agrees(self, question: str) -> bool:
        """Ask the user a question before a change of the stack, and return whether the user agrees."""

    def show(self, plan: Plan) -> None: ...

    def watching(self, what: str, total: int) -> AbstractContextManager[Callable[[Event], None]]:
        """Show the events of an operation on `total` resources as the events occur."""


class StackFailed(BackendError):
    """Error for a failed operation on a stack. `cause` is the resource's failure that caused all other failures."""

    def __init__(self, state: State, cause: Cause | None) -> None:
        why = f": {cause.resource} ({cause.type}): {cause.reason.rstrip('.')}" if cause else ""
        remedies = [cause.remedy if cause else "", next_step(state)]
        super().__init__(f"The stack {state.name} is {state.status}{why}.", remedy=" ".join(filter(None, remedies)))
        self.cause = cause


def follow_operation(stack: Stack, interface: Interface) -> State | None:
    """Wait for the end of an operation in progress, and return the state of the stack, or None if the stack does not
    exist.
    """
    state = stack.state()
    if state and state.is_moving:
        interface.say(f"The stack {state.name} is {state.status}. Waiting for the end of this operation.")
        since, _ = stack.last_operation(state.id)
        with interface.watching(state.status, 0) as on_event:
            state = stack.follow(state.id, since, on_event)
    return state


@dataclass(slots=True)
class Apply:
    """One run of `batchlab deploy apply`.

    The function `archive` returns the path of the release's archive. The first call of `archive` builds the release,
    unless `given` is an existing archive.
    """

    stack: Stack
    wanted: Settings
    source: Template
    home: Home
    interface: Interface
    archive: Callable[[], Path]
    given: Path | None = None
    sleep: Callable[[float], None] = time.sleep
    has_new_templates: bool = field(default=False, init=False)

    def run(self) -> AwsDeployment | None:
        """Apply the wanted settings to the stack, and return the deployment, or None if the user declined.

        Raise StackFailed if CloudFormation fails, BackendError if AWS refuses a call, and UsageError if the stack could
        not work.
        """
        check_database_ca(self.wanted, self.given)
        state = self._wait_until_at_rest()
        if state and must_be_deleted(state):
            if not self._delete_empty(state):
                return None
            state = None
        elif state:
            refuse_unchangeable(state)
        is_new = state is None or state.is_new
        has_instances = state is not None and bool(state.parameters.get(RELEASE))
        if is_new:
            state = self._create(state)
            if state:
                self.interface.say(
                    "The resources of the stack exist. Next, the release is deployed without a question."
                )
        if state:
            state = self._deploy_release(state, ask=not is_new)
        if state is None:
            return None
        deployment = status.deployment_of(state, self.stack.account.region, python_of(self.archive()))
        aws_deployment.write(self.home, deployment)
        if has_instances:
            self._refresh(state)
            self._remove_scheduled_ends(state)
        return deployment

    # --- State of the stack before the change ----------------------------------------------------

    def _wait_until_at_rest(self) -> State | None:
        """Wait for the end of an operation on the stack, and continue a failed rollback if the user agrees. Return the
        stack's state.
        """
        state = follow_operation(self.stack, self.interface)
        if state and state.status == "DELETE_COMPLETE":
            return None
        if state and state.status == "UPDATE_ROLLBACK_FAILED":
            self._explain(state)
            if not self.interface.agrees("Continue the rollback?"):
                raise Refused(
                    f"The stack {state.name} stays {state.status}.", remedy="`batchlab deploy apply` asks again."
                )
            since = self.stack.mark(state.id)
            self.stack.resume_rollback()
            state = self._follow(state.id, since, "rolling back", 0, must_succeed=False)
            if state.status == "UPDATE_ROLLBACK_FAILED":
                raise self._failure(state, since)
        return state

    def _delete_empty(self, state: State) -> bool:
        """Delete an empty stack in a state in which CloudFormation allows only the deletion. Return False if the user
        declined the deletion.
        """
        self._explain(state)
        if state.status != "ROLLBACK_COMPLETE":
            raise Refused(
                f"The stack {state.name} is {state.status}, and may still have resources.", remedy=next_step(state)
            )
        if not self.interface.agrees(f"Delete the empty stack {state.name} and create it again?"):
            return False
        if state.is_protected:
            self.stack.protect(on=False)
        since = self.stack.mark(state.id)
        self.stack.delete(state.id)
        self._follow(state.id, since, "deleting the empty stack", 0)
        return True

    def _explain(self, state: State) -> None:
        if cause := self.stack.cause(state.id, self.stack.last_operation(state.id)[1]):
            self.interface.say(
                f"The stack {state.name} is {state.status}. First failure: {cause.resource} ({cause.type}):"
                f" {cause.reason}"
            )

    # --- First and second phase ------------------------------------------------------------------

    def _create(self, state: State | None) -> State | None:
        with create_plan(self.stack, self.wanted, self.source, state, home=self.home, release="") as plan:
            self.interface.show(plan)
            if not self.interface.agrees(f"Create the stack {self.stack.name}?"):
                return None
            settings.write(self.home, self.wanted)
            # Build the release before the stack is created, because a stack costs money even if the build fails.
            self.archive()
            state = self._execute(plan, "creating")
        self.stack.protect(on=True)
        return state

    def _deploy_release(self, state: State, *, ask: bool) -> State | None:
        archive = self.archive()
        sha = release.release_of(archive)
        with create_plan(
            self.stack, self.wanted, self.source, state, home=self.home, release=sha, is_checked=not ask
        ) as plan:
            if ask:
                self.interface.show(plan)
            if not plan.changes:
                settings.write(self.home, self.wanted)
                return state
            if ask and not self.interface.agrees(f"Update the stack {self.stack.name}?"):
                return None
            settings.write(self.home, self.wanted)
            endpoint = Endpoint(region=self.stack.account.region)
            bucket = open_s3(endpoint, status.output_of(state, "Bucket"))
            release.upload(bucket, archive, factory.patience(), self.interface.say)
            if not state.is_protected and ask:
                self.stack.protect(on=True)
            updated = self._execute(plan, "updating")
        self.has_new_templates = plan.has_new_templates
        return updated

    def _execute(self, plan: Plan, what: str) -> State:
        since = self.stack.mark(plan.change_set.stack_id)
        self.stack.execute(plan.change_set)
        return self._follow(plan.change_set.stack_id, since, what, len(plan.changes))

    def _follow(self, stack_id: str, since: str, what: str, total: int, *, must_succeed: bool = True) -> State:
        with self.interface.watching(what, total) as on_event:
            state = self.stack.follow(stack_id, since, on_event)
        if must_succeed and not state.has_succeeded:
            raise self._failure(state, since)
        return state

    def _failure(self, state: State, since: str) -> StackFailed:
        return StackFailed(state, self.stack.cause(state.id, self.stack.events(state.id, since)))

    def _refresh(self, state: State) -> None:
        """Start the replacement of instances that have an older launch template. AWS replaces the instances one after
        another.

        Instances have an older launch template after a change of the templates, and after a replacement that failed
        because workers were busy for too long. The parameter BusyWorkers selects the treatment of busy workers.
        """
        parameters = {**state.parameters, **dict(self.wanted.parameters)}
        busy = BUSY_WORKERS[parameters.get(BUSY, "wait")]
        scaling = self.stack.account.client("autoscaling")
        groups = [status.output_of(state, "ManagerGroup"), *status.pool_groups(state)]
        names = [
            group["AutoScalingGroupName"]
            for group in self.stack.account.groups(groups)
            if (group.get("Instances") if self.has_new_templates else has_old_instances(group))
        ]
        # The plan of a change has shown the replacement, and the user has agreed. A plan without changes does not.
        if names and not self.has_new_templates:
            question = f"Instances of {', '.join(names)} have an older launch template. {busy.note} Replace them?"
            if not self.interface.agrees(question):
                return
        for name in names:
            preferences: dict[str, Any] = {
                # The group of the manager has a single instance, so the old manager must end before the new manager
                # starts.
                "MinHealthyPercentage": 0 if name == groups[0] else 90,
                "SkipMatching": True,
                "ScaleInProtectedInstances": busy.protected,
                "StandbyInstances": "Ignore",
            }
            try:
                with aws_errors(
                    f"Auto Scaling group {name!r}", lambda code, _: code.startswith("InstanceRefreshInProgress")
                ):
                    scaling.start_instance_refresh(AutoScalingGroupName=name, Preferences=preferences)
            except Missing:
                self.interface.say(f"{name}: an instance refresh is in progress already. Apply again later.")
            else:
                self.interface.say(f"{name}: its instances are being replaced, one after another.")

    def _remove_scheduled_ends(self, state: State) -> None:
        """Delete the groups' scheduled actions if the release's manager does not postpone them (decision 0056).

        The earlier manager would create the actions again, so the function waits until the manager's instance is
        replaced. After `REPLACEMENT_S` seconds, it names the commands for the user instead.
        """
        if release.ENDS_FLEET in version_lines(self.archive()):
            return
        scaling = self.stack.account.client("autoscaling")
        with aws_errors("DescribeScheduledActions"):
            pages = scaling.get_paginator("describe_scheduled_actions").paginate(ScheduledActionNames=[END_ACTION])
            actions = [action for page in pages for action in page["ScheduledUpdateGroupActions"]]
        groups = set(status.pool_groups(state)).intersection(action["AutoScalingGroupName"] for action in actions)
        if not groups:
            return
        manager = status.output_of(state, "ManagerGroup")
        self.interface.say(
            f"The manager of this release does not postpone the scheduled action {END_ACTION}. Waiting for the "
            "replacement of the manager's instance, to delete the action."
        )
        deadline_s = time.monotonic() + REPLACEMENT_S
        while any(has_old_instances(group) for group in self.stack.account.groups([manager])):
            if time.monotonic() > deadline_s:
                names = ", ".join(sorted(groups))
                self.interface.say(
                    f"The manager's instance is not replaced yet, so {END_ACTION} still ends the groups {names} "
                    "within 30 minutes. Apply again, or delete the action as the runbook shows (Upgrade a stack)."
                )
                return
            self.sleep(POLL_S)
        for group in sorted(groups):
            with aws_errors(f"Auto Scaling group {group!r}"):
                scaling.delete_scheduled_action(AutoScalingGroupName=group, ScheduledActionName=END_ACTION)
            self.interface.say(f"{group}: the scheduled action {END_ACTION} is deleted.")


def has_old_instances(group: Mapping[str, Any]) -> bool:
    """Return whether an instance of the Auto Scaling group has another launch template than the group, or another
    version of the template.
    """
    mixed = group.get("MixedInstancesPolicy", {}).get("LaunchTemplate", {}).get("LaunchTemplateSpecification")
    wanted: Mapping[str, Any] = mixed or group.get("LaunchTemplate", {})
    observed = [instance.get("LaunchTemplate", {}) for instance in group.get("Instances", ())]
    return any(template.get(key, value) != value for template in observed for key, value in wanted.items())


def python_of(archive: Path) -> str:
    """Return the Python version of the release in `archive`. Raise UsageError if the file is not a release."""
    return next((line.partition("=")[2] for line in version_lines(archive) if line.startswith("PYTHON=")), "")


def version_lines(archive: Path) -> list[str]:
    """Return the lines of the file `version` of the release. Raise UsageError if the file is not a release."""
    content = release.read_member(archive, "version")
    if content is None:
        raise release.not_a_release(archive, "it lacks the file version")
    return content.decode(errors="replace").splitlines()
