"""Health checks, replacements, forced terminations, and moves into and out of Standby.

A `leaving` instance does not count towards desired capacity, so the group launches a replacement. The group terminates
a leaving instance after enough other instances are InService. To balance the zones and to enforce the maximum lifetime,
the group replaces at most 10% of its maximum size at a time, but at least one instance. The group may exceed its
maximum size by the number of leaving instances. If the instances of a machine share its GPUs, a leaving instance with
GPUs is terminated at once, because its replacement can start only after its end.

A Standby instance belongs to the group, but does not count towards desired capacity, and its health is not checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from batchlab.core.model import LifecycleState
from batchlab.fleet import instance_refresh, placement
from batchlab.fleet.api_types import Process
from batchlab.fleet.changes import Changes
from batchlab.fleet.group_state import ENDING, ON_STANDBY, STARTING, Asg, Group, Member, weigh
from batchlab.fleet.placement import Sources, configuration, zones_of
from batchlab.fleet.termination import CRASH_LOOP, narrow

EC2_CHECK = "an EC2 health check indicating it has been terminated or stopped"
USER_CHECK = "a user health-check"
GRACE_S = 60.0
"""Maximum seconds from the launch to the first heartbeat, in addition to the pool's `boot_s`."""
_UNKNOWN = "its launcher does not know it"


def update_from_launcher(changes: Changes, group: Group, instances: Mapping[str, str | None], now_s: float) -> None:
    """Update the group's state from the launcher's list of instances. `now_s` is a monotonic time."""
    grace_s = GRACE_S + group.pool.boot_s
    for name, member in group.members.items():
        ended = instances.get(name, _UNKNOWN)
        if member.state is LifecycleState.TERMINATED:
            continue
        if ended is None:
            member.running = True
            changes.arrive(group, member)
            late = group.asg is None and now_s - member.since_s > grace_s
            if member.state is LifecycleState.PENDING and late:
                silent = f"no beat within {grace_s:g} s of its launch"
                changes.fail(group, member, silent, note=f"terminated: {silent}")
        elif not _is_ignored(changes, group, member):
            _bury(changes, group, member, ended, now_s)


def _bury(changes: Changes, group: Group, member: Member, ended: str, now_s: float) -> None:
    note = f"{member.instance.note} ({ended})"
    working = member.counted_members
    if group.asg is not None:
        working = member.end == 0
    if working:
        note = ended
        why = f"{EC2_CHECK} ({ended})" if group.asg is not None else ""
        changes.fail(group, member, ended, note=ended, why=why, dead=True)
    changes.record_end(group, member, note=note, now_s=now_s)


def _is_ignored(changes: Changes, group: Group, member: Member) -> bool:
    """Return whether the end of an instance is ignored. The end is ignored for a Standby instance, and in a group whose
    health checks or replacements are suspended."""
    if group.asg is None or member.end:
        return False
    if member.state in ON_STANDBY or group.suspended(Process.HEALTH_CHECK):
        return True
    if group.suspended(Process.REPLACE_UNHEALTHY) or group.suspended(Process.TERMINATE):
        mark_unhealthy(changes, member)
        return True
    return False


def mark_unhealthy(changes: Changes, member: Member) -> None:
    if member.instance.healthy:
        member.instance = replace(member.instance, healthy=False)
        changes.unsaved = True


def replace_unhealthy(changes: Changes, group: Group) -> None:
    """Replace instances that are marked as unhealthy, except Standby instances."""
    if group.suspended(Process.REPLACE_UNHEALTHY) or group.suspended(Process.TERMINATE):
        return
    for member in group.members.values():
        if not member.instance.healthy and member.counted_members:
            note = f"terminated: unhealthy: {USER_CHECK}"
            changes.fail(group, member, USER_CHECK, note=note, why=USER_CHECK)


_BALANCE = "an instance rebalancing request"
_AGE = "the maximum instance lifetime being exceeded"


def kill_interrupted(changes: Changes, group: Group) -> None:
    """Kill instances whose Spot notice has expired, regardless of hooks and suspended processes."""
    now_s = changes.steady.now_s()
    for member in group.members.values():
        by_s = member.asg.interrupted_by_s
        living = member.state is not LifecycleState.TERMINATED
        if by_s is not None and now_s >= by_s and living and not member.asg.force:
            member.asg.force = True
            changes.unsaved = True


def continue_replacements(changes: Changes, group: Group, sources: Sources, *, ends_first: bool) -> None:
    """Terminate instances whose replacement is InService, and choose further instances to replace. With `ends_first`,
    terminate an instance before the launch of its replacement."""
    asg = group.asg
    assert asg is not None
    if asg.deleting or group.suspended(Process.TERMINATE):
        return
    _terminate_replaced(changes, group, asg, ends_first=ends_first and not group.suspended(Process.LAUNCH))
    if group.suspended(Process.LAUNCH):
        return
    _retire_old(changes, group, asg)
    if not group.suspended(Process.AZ_REBALANCE):
        _balance(changes, group, asg, zones_of(configuration(asg), sources))


def _terminate_replaced(changes: Changes, group: Group, asg: Asg, *, ends_first: bool) -> None:
    """Terminate leaving instances whose replacements are InService. During an instance refresh, replacements must also
    have warmed up. With `ends_first`, terminate all leaving instances."""
    in_service = [m for m in group.counted_members() if m.state is LifecycleState.IN_SERVICE]
    rolling, now_s = asg.rolling, changes.steady.now_s()
    ready = [m for m in in_service if rolling is None or instance_refresh.is_ready(m, rolling, now_s)]
    surplus = weigh(in_service) if ends_first else weigh(ready) - group.desired
    for member in in_service:
        if member.asg.leaving and member.asg.weight <= surplus:
            surplus -= member.asg.weight
            why = member.asg.leaving
            changes.retire(group, member, why=why, note=f"terminated: {why}")


def _room(group: Group) -> int:
    leaving = sum(bool(m.asg.leaving) and m.counted_members for m in group.members.values())
    return max(1, group.pool.max_size // 10) - leaving


def _retire_old(changes: Changes, group: Group, asg: Asg) -> None:
    lifetime_s, now_s = asg.config.max_instance_lifetime, changes.steady.now_s()
    if not lifetime_s:
        return
    old = [
        member
        for member in group.staying()
        if member.asg.in_service_s is not None
        and now_s - member.asg.in_service_s >= lifetime_s
        and not member.instance.protected
    ]
    for member in old[: max(0, _room(group))]:
        changes.launch_replacement(group, member, _AGE)


def _balance(changes: Changes, group: Group, asg: Asg, zones: tuple[str, ...]) -> None:
    """Replace one instance to balance the zones, if no other change of the group is in progress. The replaced instance
    is in the fullest zone, or in a zone that the group no longer uses. The replacement is launched in the emptiest
    zone."""
    members = group.members.values()
    busy = any(member.state in STARTING or member.state in ENDING for member in members)
    staying, now_s = group.staying(), changes.steady.now_s()
    usable = set(zones) - placement.avoided_zones(asg, now_s)
    if not usable or busy or group.failures >= CRASH_LOOP or weigh(staying) != group.desired or _room(group) < 1:
        return
    sizes = Counter(member.instance.machine.zone for member in staying)
    least = min(sizes[zone] for zone in usable)

    def excess(member: Member) -> int:
        zone = member.instance.machine.zone
        if not zone:
            return 0  # An earlier version launched the instances of a group with subnets in no zone.
        return sizes[zone] - least if zone in zones else len(staying) + 1

    candidates = [m for m in staying if excess(m) > 1 and not m.instance.protected]
    if candidates:
        worst = max(excess(member) for member in candidates)
        candidates = [member for member in candidates if excess(member) == worst]
        changes.launch_replacement(group, narrow(asg, candidates, now_s), _BALANCE)


def enter_standby(changes: Changes, group: Group, member: Member, *, lower: bool) -> int:
    """Move an instance into Standby, and return the activity's id. Without `lower`, the group launches a replacement
    for the instance."""
    assert group.asg is not None
    size, weight = weigh(group.staying()), member.asg.weight
    change = f", shrinking the capacity from {size} to {size - weight}" * lower
    sentence = f"instance {member.instance.id} was moved to standby in response to a user request"
    member.asg.moving = changes.note(
        group.pool.name,
        f"Moving EC2 instance to Standby: {member.instance.id}",
        changes.cause_text(group.asg, sentence + change),
        "InProgress",
    )
    changes.move(member, LifecycleState.ENTERING_STANDBY)
    if lower:
        changes.resize(group, -weight)
    return member.asg.moving


def finish_standby(changes: Changes, group: Group) -> None:
    """Complete moves into Standby in the next tick, because no load balancer must drain."""
    for member in group.members.values():
        if member.state is LifecycleState.ENTERING_STANDBY:
            changes.move(member, LifecycleState.STANDBY)
            changes.settle(group, member.asg.moving, "Successful")
            member.asg.moving = 0


def leave_standby(changes: Changes, group: Group, member: Member) -> int:
    """Move an instance out of Standby, raise desired capacity by its weight, and return the activity's id. The instance
    is Pending until the next tick finds the instance running."""
    assert group.asg is not None
    size, weight = weigh(group.staying()), member.asg.weight
    change = f", increasing the capacity from {size} to {size + weight}"
    sentence = f"instance {member.instance.id} was moved out of standby in response to a user request"
    member.asg.moving = changes.note(
        group.pool.name,
        f"Moving EC2 instance out of Standby: {member.instance.id}",
        changes.cause_text(group.asg, sentence + change),
        "PreInService",
    )
    changes.move(member, LifecycleState.PENDING)
    member.asg.leaving = ""
    changes.resize(group, weight)
    return member.asg.moving
