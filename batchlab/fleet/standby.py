"""Into standby and out of it: still of the group, counted no longer, and looked at by no check."""

from __future__ import annotations

from batchlab.fleet.changes import Changes
from batchlab.fleet.state import Group, Member, weigh
from batchlab.model import LifecycleState


def enter(changes: Changes, group: Group, member: Member, *, lower: bool) -> int:
    """The activity's id. Without `lower` the group launches a replacement."""
    assert group.asg is not None
    size, weight = weigh(group.staying()), member.bond.weight
    change = f", shrinking the capacity from {size} to {size - weight}" * lower
    said = f"instance {member.instance.id} was moved to standby in response to a user request"
    member.bond.moving = changes.note(
        group.pool.name,
        f"Moving EC2 instance to Standby: {member.instance.id}",
        changes.told(group.asg, said + change),
        "InProgress",
    )
    changes.move(member, LifecycleState.ENTERING_STANDBY)
    if lower:
        changes.resize(group, -weight)
    return member.bond.moving


def arrive(changes: Changes, group: Group) -> None:
    """Who is entering standby is there by the next tick: no load balancer drains it."""
    for member in group.members.values():
        if member.state is LifecycleState.ENTERING_STANDBY:
            changes.move(member, LifecycleState.STANDBY)
            changes.settle(group, member.bond.moving, "Successful")
            member.bond.moving = 0


def leave(changes: Changes, group: Group, member: Member) -> int:
    """The activity's id; desired capacity grows by the instance, which is Pending until the next
    tick has found it alive."""
    assert group.asg is not None
    size, weight = weigh(group.staying()), member.bond.weight
    change = f", increasing the capacity from {size} to {size + weight}"
    who = f"instance {member.instance.id} was moved out of standby in response to a user request"
    member.bond.moving = changes.note(
        group.pool.name,
        f"Moving EC2 instance out of Standby: {member.instance.id}",
        changes.told(group.asg, who + change),
        "PreInService",
    )
    changes.move(member, LifecycleState.PENDING)
    member.bond.leaving = ""
    changes.resize(group, weight)
    return member.bond.moving
