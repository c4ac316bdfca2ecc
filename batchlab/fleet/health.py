"""What the launcher says of every instance, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from batchlab.fleet.api import Process
from batchlab.fleet.changes import Changes
from batchlab.fleet.state import ON_STANDBY, Group, Member
from batchlab.model import LifecycleState

EC2_CHECK = "an EC2 health check indicating it has been terminated or stopped"
USER_CHECK = "a user health-check"
GRACE_S = 60.0
"""From its launch to its first beat, beside its pool's `boot_s`."""
_UNKNOWN = "its launcher does not know it"


def look(changes: Changes, group: Group, known: Mapping[str, str | None], now_s: float) -> None:
    """Bring the state up to what the launcher says; `now_s` is monotonic."""
    grace_s = GRACE_S + group.pool.boot_s
    for name, member in group.members.items():
        ended = known.get(name, _UNKNOWN)
        if member.state is LifecycleState.TERMINATED:
            continue
        if ended is None:
            member.running = True
            changes.arrive(group, member)
            late = group.asg is None and now_s - member.since_s > grace_s
            if member.state is LifecycleState.PENDING and late:
                silent = f"no beat within {grace_s:g} s of its launch"
                changes.fail(group, member, silent, note=f"terminated: {silent}")
        elif not _overlooked(changes, group, member):
            _bury(changes, group, member, ended, now_s)


def _bury(changes: Changes, group: Group, member: Member, ended: str, now_s: float) -> None:
    note = f"{member.instance.note} ({ended})"
    working = member.counted
    if group.asg is not None:
        working = member.end == 0
    if working:
        note = ended
        why = f"{EC2_CHECK} ({ended})" if group.asg is not None else ""
        changes.fail(group, member, ended, note=ended, why=why, dead=True)
    changes.bury(group, member, note=note, now_s=now_s)


def _overlooked(changes: Changes, group: Group, member: Member) -> bool:
    """Whether nobody looks at this instance: it is on standby, or its group was told not to look
    or not to replace. It stays listed as it is."""
    if group.asg is None or member.end:
        return False
    if member.state in ON_STANDBY or group.suspended(Process.HEALTH_CHECK):
        return True
    if group.suspended(Process.REPLACE_UNHEALTHY) or group.suspended(Process.TERMINATE):
        mark_unhealthy(changes, member)
        return True
    return False


def mark_unhealthy(changes: Changes, member: Member) -> None:
    """It is replaced as soon as ReplaceUnhealthy may."""
    if member.instance.healthy:
        member.instance = replace(member.instance, healthy=False)
        changes.unsaved = True


def replace_unhealthy(changes: Changes, group: Group) -> None:
    """Take out whom somebody has called unhealthy. Those on standby are not looked at."""
    if group.suspended(Process.REPLACE_UNHEALTHY) or group.suspended(Process.TERMINATE):
        return
    for member in group.members.values():
        if not member.instance.healthy and member.counted:
            note = f"terminated: unhealthy: {USER_CHECK}"
            changes.fail(group, member, USER_CHECK, note=note, why=USER_CHECK)
