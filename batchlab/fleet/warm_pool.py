"""Warm pool of instances that are launched in advance and wait, running or stopped, for scale-out.

An instance passes through the launch hooks twice, when it enters the warm pool and when it leaves the warm pool. A
launcher that cannot stop instances (see `StoppableLauncher`) supports only a warm pool of running instances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.model import LifecycleState
from batchlab.fleet import lifecycle_hooks
from batchlab.fleet.api_types import LAUNCHING, TERMINATING, Process, WarmPool
from batchlab.fleet.group_state import WARM, WARMING, Asg, Group, Member, weigh
from batchlab.fleet.termination import CRASH_LOOP, take_by_default

if TYPE_CHECKING:
    from batchlab.fleet.changes import Changes

RESTED = {
    "Running": LifecycleState.WARMED_RUNNING,
    "Stopped": LifecycleState.WARMED_STOPPED,
    "Hibernated": LifecycleState.WARMED_HIBERNATED,
}
_TRIM = "the warm pool being larger than it should be"


def members(group: Group) -> list[Member]:
    return [member for member in group.members.values() if member.state in WARM]


def _pool(group: Group) -> WarmPool | None:
    return group.asg.warm_pool if group.asg is not None else None


def size(group: Group) -> int:
    """Return the target size of the warm pool: the group's prepared capacity minus desired capacity."""
    pool = _pool(group)
    if pool is None or pool.status is not None:
        return 0
    prepared = pool.max_group_prepared_capacity
    most = group.pool.max_size if prepared is None else prepared
    return max(pool.min_size, most - group.desired, 0)


def room(group: Group, now_s: float) -> int:
    """Return the number of instances to launch into the warm pool now. During a crash loop, the group launches at most
    one instance after each wait."""
    pool = members(group)
    missing = max(0, size(group) - len(pool))
    if group.failures < CRASH_LOOP:
        return missing
    probing = any(member.state in WARMING for member in pool)
    return 0 if probing or now_s < group.retry_s else min(1, missing)


def trim(changes: Changes, group: Group, asg: Asg) -> None:
    """Terminate unhealthy instances of the warm pool, and surplus instances chosen by the default termination policy.
    Remove a deleted warm pool when the warm pool is empty."""
    if not group.suspended(Process.TERMINATE):
        members_now = members(group)
        for member in members_now:
            if not member.instance.healthy and not group.suspended(Process.REPLACE_UNHEALTHY):
                changes.retire(group, member, why="a user health-check", note="terminated")
        members_now = members(group)
        # Warm instances that the group needs to reach desired capacity are not surplus.
        owed = max(0, group.desired - weigh(group.staying()))
        excess = len(members_now) - owed - size(group)
        for member in take_by_default(asg, members_now, excess, changes.steady.now_s()):
            changes.retire(group, member, why=_TRIM, note=f"terminated: {_TRIM}")
    pool = asg.warm_pool
    if pool is not None and pool.status is not None and not members(group):
        asg.warm_pool, changes.unsaved = None, True


def arrive(changes: Changes, group: Group, member: Member) -> None:
    """Put a running instance into the warm pool after its hooks are completed. An instance that returns from service
    passes through the termination hooks, and other instances pass through the launch hooks."""
    if member.state is LifecycleState.WARMED_PENDING and not member.asg.resting:
        transition = TERMINATING if member.asg.moving else LAUNCHING
        if lifecycle_hooks.begin(changes, group, member, transition):
            changes.move(member, LifecycleState.WARMED_PENDING_WAIT)
            activity = member.asg.moving or member.launch
            changes.mark(group, activity, "MidLifecycleAction")
    pool = _pool(group)
    if member.state is LifecycleState.WARMED_PENDING_WAIT or pool is None:
        return
    if pool.pool_state == "Running":
        mark_stopped(changes, group, member)
    else:
        member.asg.resting = changes.unsaved = True


def mark_stopped(changes: Changes, group: Group, member: Member) -> None:
    """Move an instance to the state of the warm pool, which is running, stopped, or hibernated."""
    # A request may have made the instance Terminating while the launcher stopped the instance.
    if member.state not in WARMING:
        return
    pool = _pool(group)
    member.asg.asleep, member.asg.resting = member.asg.resting, False
    changes.move(member, RESTED[pool.pool_state if pool else "Running"])
    changes.settle(group, member.asg.moving or member.launch, "Successful")
    if not member.asg.moving:
        group.reset_failures()
    member.asg.moving = 0


def hibernates(group: Group) -> bool:
    pool = _pool(group)
    return pool is not None and pool.pool_state == "Hibernated"


def take_for_launch(changes: Changes, group: Group, missing: int) -> list[Member]:
    """Move instances from the warm pool into service for `missing` units of capacity, in order."""
    asg = group.asg
    assert asg is not None
    launched: list[Member] = []
    ready = [m for m in members(group) if m.state not in WARMING and m.instance.healthy]
    for member in ready:
        if missing <= 0:
            break
        growing = "a difference between desired and actual capacity"
        member.launch = changes.note(
            group.pool.name,
            f"Launching a new EC2 instance from warm pool: {member.instance.id}",
            changes.cause_text(asg, f"an instance was started in response to {growing}"),
            "PreInService",
        )
        changes.move(member, LifecycleState.PENDING)
        member.asg.in_service_s = None
        changes.arrive(group, member)
        missing -= member.asg.weight
        launched.append(member)
    return launched


def takes_back(group: Group, member: Member) -> bool:
    """Return whether scale-in returns an instance to the warm pool instead of terminating the instance."""
    pool = _pool(group)
    reuses = pool is not None and pool.reuse_on_scale_in and pool.status is None
    return reuses and member.state is LifecycleState.IN_SERVICE


def take_back(changes: Changes, group: Group, member: Member, why: str) -> None:
    """Move an instance from service back to the warm pool for scale-in."""
    assert group.asg is not None
    member.asg.moving = changes.note(
        group.pool.name,
        f"Moving EC2 instance to warm pool: {member.instance.id}",
        changes.cause_text(group.asg, f"an instance was taken out of service in response to {why}"),
        "InProgress",
    )
    member.asg.warm, member.asg.leaving = True, ""
    changes.move(member, LifecycleState.WARMED_PENDING)
    changes.arrive(group, member)
