"""Launches of instances in a tick, and failed launches."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.model import LifecycleState
from batchlab.fleet import mixed_instances, placement
from batchlab.fleet import warm_pool as warm
from batchlab.fleet.api_types import Process
from batchlab.fleet.changes import Changes
from batchlab.fleet.errors import Fault
from batchlab.fleet.group_state import ENDING, Group, Member, weigh
from batchlab.fleet.placement import Placement, Sources


@dataclass(frozen=True, slots=True)
class Fresh:
    """A member to launch. `place` is None in a plain pool."""

    group: Group
    member: Member
    place: Placement | None = None
    asleep: bool = False
    """The instance is stopped in the warm pool and must be started."""


def admit(
    changes: Changes, group: Group, missing: int, now_s: float, sources: Sources | None
) -> list[Fresh]:
    """Add members for `missing` units of capacity and for the warm pool."""
    if group.asg is None or sources is None:
        size = len(group.counted())
        return [Fresh(group, changes.admit(group, size + n, now_s, None)) for n in range(missing)]
    if group.asg.deleting or group.suspended(Process.LAUNCH):
        return []
    missing -= weigh(warm.leave(changes, group, missing))
    fresh = [
        Fresh(group, member, asleep=True)
        for member in group.members.values()
        if member.state is LifecycleState.PENDING and member.bond.asleep
    ]
    while missing > 0:
        one = admit_one(changes, group, now_s, sources)
        if one is None:
            break
        fresh.append(one)
        missing -= one.member.bond.weight
    for _ in range(warm.room(group, now_s)):
        one = admit_one(changes, group, now_s, sources, warm_pool=True)
        if one is None:
            break
        fresh.append(one)
    return fresh


def admit_one(
    changes: Changes, group: Group, now_s: float, sources: Sources, *, warm_pool: bool = False
) -> Fresh | None:
    """Add one member. If its template does not exist, record a failed activity, return None."""
    assert group.asg is not None
    try:
        place = placement.choose(group, group.asg, sources, changes.steady.now_s(), warm=warm_pool)
    except Fault as fault:
        _no_template(changes, group, fault)
        return None
    size = weigh(group.staying())
    return Fresh(group, changes.admit(group, size, now_s, place), place)


def _no_template(changes: Changes, group: Group, fault: Fault) -> None:
    assert group.asg is not None
    reason = f"{fault.message} Launching EC2 instance failed."
    # Recorded once for every wait of the crash loop, like any failed launch.
    changes.stumble(group, reason)
    what = f"Launching a new EC2 instance.  Status Reason: {reason}"
    changes.note(
        group.pool.name, what, changes.told(group.asg, "an instance was started"), "Failed"
    )


def failed(changes: Changes, fresh: Fresh, error: str) -> None:
    """Record a failed launch, and avoid its capacity pool for a while."""
    group, member = fresh.group, fresh.member
    if group.asg is not None:
        mixed_instances.avoid(group.asg, member.instance.machine, changes.steady.now_s())
    # A request may have made the instance Terminating during its launch.
    if member.state not in ENDING:
        changes.fail_launch(group, member, f"its launch failed: {error}")
