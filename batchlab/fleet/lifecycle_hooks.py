"""Lifecycle hooks, in which an instance waits until its lifecycle actions are completed or time out.

An instance waits in all lifecycle hooks of its launch, or of its termination, at the same time. On launch, ABANDON
terminates the instance. On termination, ABANDON ends the wait for the other hooks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import ABANDON, CONTINUE, LAUNCHING, LifecycleHook, LifecycleNotification
from batchlab.fleet.group_state import Group, Member, Wait

if TYPE_CHECKING:
    from batchlab.fleet.changes import Changes

SETTLING_S = 10.0
"""Time in state InService that proves a successful start. An instance that ends earlier counts as a failed start, and
several failed starts in a row start a crash loop. AWS does not have crash loops."""

EC2 = "EC2"
_PROCEED = {
    LifecycleState.PENDING_WAIT: LifecycleState.PENDING_PROCEED,
    LifecycleState.WARMED_PENDING_WAIT: LifecycleState.WARMED_PENDING_PROCEED,
    LifecycleState.TERMINATING_WAIT: LifecycleState.TERMINATING_PROCEED,
}


def has_started(member: Member, now_s: float) -> bool:
    """Return whether an instance started successfully. A successful start requires InService for SETTLING_S, or
    InService with a completed launch hook."""
    since_s = member.asg.in_service_s
    return since_s is not None and (member.asg.vouched or now_s - since_s >= SETTLING_S)


def begin(changes: Changes, group: Group, member: Member, transition: str) -> bool:
    """Open a lifecycle action for every hook of `transition`. Return whether the instance waits for any action."""
    assert group.asg is not None
    now_s = changes.steady.now_s()
    for hook in group.asg.hooks.values():
        if hook.lifecycle_transition != transition:
            continue
        # AWS's model requires a UUID.
        token = str(uuid5(NAMESPACE_URL, changes.ids.fresh("token")))
        until_s = now_s + hook.heartbeat_timeout
        wait = Wait(hook, token, until_s, now_s + hook.global_timeout)
        member.asg.waits.append(wait)
        origin, destination = _ends(member, transition)
        changes.notices.append(
            LifecycleNotification(hook, member.instance.id, token, changes.now_s(), origin, destination)
        )
    return bool(member.asg.waits)


def _ends(member: Member, transition: str) -> tuple[str, str]:
    """Return AWS's origin and destination of the instance's transition."""
    group, pool = "AutoScalingGroup", "WarmPool"
    if member.state is LifecycleState.WARMED_PENDING:
        return (EC2 if transition == LAUNCHING else group), pool
    if transition == LAUNCHING:
        return (pool if member.asg.warm else EC2), group
    return group, EC2


def find(
    group: Group, hook: str, *, instance: str | None = None, token: str | None = None
) -> tuple[Member, Wait] | None:
    """Return the open lifecycle action of a hook, by instance or by token, or None."""
    for member in group.members.values():
        for wait in member.asg.waits:
            matches = wait.token == token if token else member.instance.id == instance
            if matches and wait.hook.lifecycle_hook_name == hook:
                return member, wait
    return None


def heartbeat(changes: Changes, member: Member, wait: Wait) -> None:
    waits = member.asg.waits
    until_s = changes.steady.now_s() + wait.hook.heartbeat_timeout
    waits[waits.index(wait)] = replace(wait, until_s=until_s)
    changes.unsaved = True


def complete(changes: Changes, group: Group, member: Member, wait: Wait, result: str, how: str) -> None:
    """Close a lifecycle action. The instance proceeds after its last action, or after ABANDON."""
    waits = member.asg.waits
    waits.remove(wait)
    changes.unsaved = True
    abandoned = result == ABANDON
    if abandoned and wait.hook.lifecycle_transition == LAUNCHING:
        token = f"Lifecycle Action with token {wait.token}"
        text = f"Instance failed to complete user's Lifecycle Action: {token} was abandoned: {how}"
        changes.abandon(group, member, text)
        return
    if abandoned:
        waits.clear()
    if not waits:
        _go_on(changes, group, member)


def expire(changes: Changes, group: Group) -> None:
    """Close every timed-out lifecycle action with the default result of its hook."""
    now_s = changes.steady.now_s()
    for member in list(group.members.values()):
        # The search starts again after each action, because an abandoned action clears the other actions of its
        # instance.
        while late := next((w for w in member.asg.waits if now_s >= min(w.until_s, w.at_most_s)), None):
            complete(changes, group, member, late, late.hook.default_result, "Heartbeat Timeout")


def drop(changes: Changes, group: Group, hook: LifecycleHook) -> None:
    """Close the lifecycle actions of a deleted hook with ABANDON on launch and CONTINUE on termination."""
    result = ABANDON if hook.lifecycle_transition == LAUNCHING else CONTINUE
    for member in list(group.members.values()):
        action = find(group, hook.lifecycle_hook_name, instance=member.instance.id)
        if action is not None:
            complete(changes, group, member, action[1], result, "Lifecycle Hook Deleted")


def _go_on(changes: Changes, group: Group, member: Member) -> None:
    ending = member.state is LifecycleState.TERMINATING_WAIT
    changes.move(member, _PROCEED[member.state])
    if ending:
        changes.mark(group, member.end, "InProgress")
    else:
        changes.mark(group, member.asg.moving or member.launch, "PreInService")
