"""Lifecycle hooks and the actions that wait in them."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.fleet import hooks
from batchlab.fleet.api import CONTINUE, LAUNCHING, LifecycleHook
from batchlab.fleet.faults import LimitExceeded, ValidationError
from batchlab.fleet.requests import checks
from batchlab.fleet.requests.base import Requests
from batchlab.fleet.state import Group, Member, Wait

MOST_HOOKS = 50


class HookRequests(Requests):
    """As AWS's API reference says, under the same names."""

    def put_lifecycle_hook(self, hook: LifecycleHook) -> None:
        """Create or replace a hook. Instances that wait in it already keep the old timeouts."""
        _, asg = self._changeable(hook.auto_scaling_group_name)
        checks.hook(hook)
        if hook.lifecycle_hook_name not in asg.hooks and len(asg.hooks) >= MOST_HOOKS:
            raise LimitExceeded(f"A group may have {MOST_HOOKS} lifecycle hooks.")
        asg.hooks[hook.lifecycle_hook_name] = hook
        self._changes.unsaved = True
        self._save()

    def delete_lifecycle_hook(self, name: str, lifecycle_hook_name: str) -> None:
        """Instances that wait in it go on: ABANDON for those that launch, CONTINUE for those that
        terminate."""
        group, asg = self._changeable(name)
        hook = asg.hooks.pop(lifecycle_hook_name, None)
        if hook is None:
            raise ValidationError(
                f"No Lifecycle Hook found with name: {lifecycle_hook_name} and AutoScalingGroup:"
                f" {name}"
            )
        self._changes.unsaved = True
        hooks.drop(self._changes, group, hook)
        self._save()

    def describe_lifecycle_hooks(
        self, name: str, hook_names: Sequence[str] = ()
    ) -> Sequence[LifecycleHook]:
        """By name; names that do not exist are left out."""
        _, asg = self._named(name)
        return [
            asg.hooks[hook] for hook in sorted(asg.hooks) if not hook_names or hook in hook_names
        ]

    def complete_lifecycle_action(
        self,
        name: str,
        lifecycle_hook_name: str,
        lifecycle_action_result: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        """By instance or by token, one of them is needed."""
        checks.result("LifecycleActionResult", lifecycle_action_result)
        group, member, wait = self._action(
            name, lifecycle_hook_name, instance_id, lifecycle_action_token
        )
        how = f"Lifecycle Action Completed with {lifecycle_action_result} Result"
        if lifecycle_action_result == CONTINUE and wait.hook.lifecycle_transition == LAUNCHING:
            member.bond.vouched = True
        hooks.complete(self._changes, group, member, wait, lifecycle_action_result, how)
        self._save()

    def record_lifecycle_action_heartbeat(
        self,
        name: str,
        lifecycle_hook_name: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        """The action has its whole heartbeat timeout again, within the global timeout."""
        _, member, wait = self._action(
            name, lifecycle_hook_name, instance_id, lifecycle_action_token
        )
        hooks.heartbeat(self._changes, member, wait)
        self._save()

    def _action(
        self, name: str, hook: str, instance_id: str | None, token: str | None
    ) -> tuple[Group, Member, Wait]:
        group, _ = self._named(name)
        if not instance_id and not token:
            raise ValidationError(
                "Valid requests must contain either InstanceId or LifecycleActionToken parameter."
            )
        found = hooks.find(group, hook, instance=instance_id, token=token)
        if found is None:
            by = f"token {token}" if token else f"instance ID {instance_id}"
            raise ValidationError(f"No active Lifecycle Action found with {by}")
        return group, *found
