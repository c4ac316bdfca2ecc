"""Replacements that launch before they terminate, and ends that cannot be put off.

An instance that is `leaving` counts no longer, so a successor is launched for it, and it goes as
soon as enough others are in service. For zone balance and for age no more leave at a time than a
tenth of the group's maximum, at least one: by so much the group may be larger than its maximum.
"""

from __future__ import annotations

from collections import Counter

from batchlab.fleet import mix, refresh
from batchlab.fleet.api import Process
from batchlab.fleet.asg import Asg
from batchlab.fleet.changes import Changes
from batchlab.fleet.decisions import CRASH_LOOP
from batchlab.fleet.placement import Sources, configuration, zones_of
from batchlab.fleet.state import ENDING, STARTING, Group, Member, weigh
from batchlab.fleet.termination import narrow
from batchlab.model import LifecycleState

_BALANCE = "an instance rebalancing request"
_AGE = "the maximum instance lifetime being exceeded"


def enforce(changes: Changes, group: Group) -> None:
    """End by force whose Spot notice is over; no hook puts that off, no suspension prevents it."""
    now_s = changes.steady.now_s()
    for member in group.members.values():
        by_s = member.bond.interrupted_by_s
        living = member.state is not LifecycleState.TERMINATED
        if by_s is not None and now_s >= by_s and living and not member.bond.force:
            member.bond.force = True
            changes.unsaved = True


def keep_up(changes: Changes, group: Group, sources: Sources) -> None:
    """Let go who has a successor, and choose who is to have one."""
    asg = group.asg
    assert asg is not None
    if asg.deleting or group.suspended(Process.TERMINATE):
        return
    _release(changes, group, asg)
    if group.suspended(Process.LAUNCH):
        return
    _retire_old(changes, group, asg)
    if not group.suspended(Process.AZ_REBALANCE):
        _balance(changes, group, asg, zones_of(configuration(asg), sources))


def _release(changes: Changes, group: Group, asg: Asg) -> None:
    """During a refresh a successor must have warmed up as well."""
    in_service = [m for m in group.counted() if m.state is LifecycleState.IN_SERVICE]
    rolling, now_s = asg.rolling, changes.steady.now_s()
    able = [m for m in in_service if rolling is None or refresh.is_ready(m, rolling, now_s)]
    surplus = weigh(able) - group.desired
    for member in in_service:
        if member.bond.leaving and member.bond.weight <= surplus:
            surplus -= member.bond.weight
            why = member.bond.leaving
            changes.retire(group, member, why=why, note=f"terminated: {why}")


def _room(group: Group) -> int:
    leaving = sum(bool(m.bond.leaving) and m.counted for m in group.members.values())
    return max(1, group.pool.max_size // 10) - leaving


def _retire_old(changes: Changes, group: Group, asg: Asg) -> None:
    lifetime_s, now_s = asg.config.max_instance_lifetime, changes.steady.now_s()
    if not lifetime_s:
        return
    old = [
        member
        for member in group.staying()
        if member.bond.in_service_s is not None
        and now_s - member.bond.in_service_s >= lifetime_s
        and not member.instance.protected
    ]
    for member in old[: max(0, _room(group))]:
        changes.replace_first(group, member, _AGE)


def _balance(changes: Changes, group: Group, asg: Asg, zones: tuple[str, ...]) -> None:
    """One at a time, once everything else has come to rest: from the fullest zone, or from one that
    the group has left, to the emptiest."""
    members = group.members.values()
    busy = any(member.state in STARTING or member.state in ENDING for member in members)
    staying, now_s = group.staying(), changes.steady.now_s()
    usable = set(zones) - mix.barren_zones(asg, now_s)
    if (
        not usable
        or busy
        or group.failures >= CRASH_LOOP
        or weigh(staying) != group.desired
        or _room(group) < 1
    ):
        return
    sizes = Counter(member.instance.machine.zone for member in staying)
    least = min(sizes[zone] for zone in usable)

    def excess(member: Member) -> int:
        zone = member.instance.machine.zone
        return sizes[zone] - least if zone in zones else len(staying) + 1

    able = [m for m in staying if excess(m) > 1 and not m.instance.protected]
    if able:
        worst = max(excess(member) for member in able)
        able = [member for member in able if excess(member) == worst]
        changes.replace_first(group, narrow(asg, able, now_s), _BALANCE)
