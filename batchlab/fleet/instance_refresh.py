"""Instance refresh: the replacement of a group's instances in steps, while enough capacity is ready.

A new instance is ready after the instance has been InService for the warm-up time. If the maximum healthy percentage is
above 100, the group launches replacements first. With a maximum healthy percentage of 100, the group terminates
instances first. The minimum healthy percentage limits the number of instances terminated at a time, but at least one
instance is terminated.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import GroupConfig, InstanceRefresh, Process
from batchlab.fleet.changes import Changes
from batchlab.fleet.group_state import ON_STANDBY, WARM, Asg, Group, Member, RefreshProgress, weigh
from batchlab.fleet.placement import Sources, apply, configuration, template_of

GIVE_UP_S = 3_600.0
"""Seconds without progress after which an instance refresh fails."""
_WHY = "an instance refresh"
_ROLLBACK = "RollbackInProgress"


def matches(member: Member, config: GroupConfig, sources: Sources) -> bool:
    """Return whether an instance has the template and instance type that `config` would launch now."""
    wanted = template_of(config, sources.templates)
    mixed = config.mixed_instances_policy
    kinds = [override.instance_type for override in mixed.overrides] if mixed else []
    return member.asg.template == wanted.reference and member.instance.machine.type in (kinds or [wanted.instance_type])


def step(changes: Changes, group: Group) -> None:
    """Run one step of the group's instance refresh, if a refresh is active."""
    asg = group.asg
    if asg is None or asg.rolling is None:
        return
    rolling, now_s = asg.rolling, changes.steady.now_s()
    required = (Process.INSTANCE_REFRESH, Process.LAUNCH, Process.TERMINATE)
    if rolling.refresh.status == "Cancelling":
        if not _unready(group, rolling, now_s):
            finish(changes, asg, "Cancelled", "Cancelled due to user request.")
        return
    if any(group.suspended(process) for process in required):
        rolling.moved_s = now_s
        return
    if rolling.refresh.status == "Pending":
        _set(changes, rolling, status="InProgress")
    _drop_finished(group, rolling)
    _measure(changes, group, rolling, now_s)
    if now_s < rolling.paused_until_s:
        rolling.moved_s = now_s
    elif _complete(changes, group, asg, rolling, now_s):
        return
    elif now_s - rolling.moved_s > GIVE_UP_S:
        _give_up(changes, group, asg, rolling)
    elif now_s >= rolling.paused_until_s:
        _replace(changes, group, asg, rolling, now_s)


def _drop_finished(group: Group, rolling: RefreshProgress) -> None:
    """Remove instances from the refresh that have ended or that the preferences ignore."""
    preferences = rolling.refresh.preferences
    for name in list(rolling.old):
        member = group.members.get(name)
        ended = member is None or not (member.counted_members or member.state in ON_STANDBY)
        ignored = member is not None and (
            (member.instance.protected and preferences.scale_in_protected_instances == "Ignore")
            or (member.state in ON_STANDBY and preferences.standby_instances == "Ignore")
        )
        if ended or ignored:
            rolling.old.discard(name)


def _unready(group: Group, rolling: RefreshProgress, now_s: float) -> int:
    """Return the units of capacity that are missing, starting, or warming up."""
    new = [m for m in group.staying() if m.instance.id not in rolling.before]
    warming = [m for m in new if not is_ready(m, rolling, now_s)]
    return max(0, group.desired - weigh(group.staying())) + weigh(warming)


def is_ready(member: Member, rolling: RefreshProgress, now_s: float) -> bool:
    """Return whether an instance is InService. A new instance must also have warmed up."""
    since_s = member.asg.in_service_s
    if member.state is not LifecycleState.IN_SERVICE or since_s is None:
        return False
    return member.instance.id in rolling.before or now_s - since_s >= rolling.warmup


def _measure(changes: Changes, group: Group, rolling: RefreshProgress, now_s: float) -> None:
    remaining = min(rolling.total, len(rolling.old) + _unready(group, rolling, now_s))
    complete = 100 if not rolling.total else 100 * (rolling.total - remaining) // rolling.total
    if (complete, remaining) != (rolling.refresh.percentage_complete, rolling.refresh.instances_to_update):
        rolling.moved_s = now_s
        _set(changes, rolling, percentage_complete=complete, instances_to_update=remaining)


def _complete(changes: Changes, group: Group, asg: Asg, rolling: RefreshProgress, now_s: float) -> bool:
    """Return whether the refresh is complete. At a checkpoint, start the checkpoint's delay."""
    complete = rolling.refresh.percentage_complete
    if not rolling.old and not _unready(group, rolling, now_s):
        _succeed(changes, group, asg, rolling)
        return True
    checkpoints = rolling.refresh.preferences.checkpoint_percentages
    if rolling.checkpoint < len(checkpoints) and complete >= checkpoints[rolling.checkpoint]:
        rolling.checkpoint += 1
        changes.unsaved = True
        if rolling.checkpoint == len(checkpoints):
            _succeed(changes, group, asg, rolling)
            return True
        rolling.paused_until_s = now_s + rolling.refresh.preferences.checkpoint_delay
    return False


def _succeed(changes: Changes, group: Group, asg: Asg, rolling: RefreshProgress) -> None:
    if rolling.refresh.status == _ROLLBACK:
        finish(changes, asg, "RollbackSuccessful", "")
        return
    wanted = rolling.refresh.desired_configuration
    for name in rolling.warm:
        member = group.members.get(name)
        if member is not None and member.state in WARM:
            changes.retire(group, member, why=_WHY, note=f"terminated: {_WHY}")
    if wanted is not None:
        asg.config = apply(asg.config, wanted.launch_template, wanted.mixed_instances_policy)
    finish(changes, asg, "Successful", "")


def has_desired_configuration(rolling: RefreshProgress) -> bool:
    # A rollback clears the desired configuration of its refresh.
    return rolling.refresh.desired_configuration is not None or rolling.refresh.status == _ROLLBACK


def finish(changes: Changes, asg: Asg, status: str, reason: str) -> None:
    assert asg.rolling is not None
    ended = replace(asg.rolling.refresh, status=status, status_reason=reason, end_time=changes.now_s())
    asg.refreshes.insert(0, ended)
    asg.rolling = None
    changes.unsaved = True


def _give_up(changes: Changes, group: Group, asg: Asg, rolling: RefreshProgress) -> None:
    reason = f"No progress for {GIVE_UP_S:g} s: {_obstacles(group, rolling)}"
    refresh = rolling.refresh
    if refresh.preferences.auto_rollback and refresh.desired_configuration is not None:
        roll_back(changes, group, rolling)
        _set(changes, rolling, status_reason=reason)
        return
    finish(changes, asg, "RollbackFailed" if refresh.status == _ROLLBACK else "Failed", reason)


def _obstacles(group: Group, rolling: RefreshProgress) -> str:
    old = [group.members[name] for name in sorted(rolling.old)]
    kinds = {
        "protected from scale-in": [m for m in old if m.instance.protected],
        "on standby": [m for m in old if m.state in ON_STANDBY],
    }
    reasons = [f"{len(members)} instances are {what}" for what, members in kinds.items() if members]
    return " and ".join(reasons) or "new instances do not become ready"


def roll_back(changes: Changes, group: Group, rolling: RefreshProgress) -> None:
    """Replace the new instances with instances of the group's own configuration."""
    new = {m.instance.id for m in group.counted_members() if m.instance.id not in rolling.before}
    rolling.before = {m.instance.id for m in group.counted_members()}
    rolling.old, rolling.total, rolling.checkpoint = new, len(new), 0
    rolling.paused_until_s, rolling.moved_s = 0.0, changes.steady.now_s()
    plain = replace(rolling.refresh.preferences, checkpoint_percentages=(), auto_rollback=False)
    _set(changes, rolling, status=_ROLLBACK, desired_configuration=None, preferences=plain)


def _set(changes: Changes, rolling: RefreshProgress, **facts: Any) -> None:
    refresh = replace(rolling.refresh, **facts)
    if refresh != rolling.refresh:
        rolling.refresh = refresh
        changes.unsaved = True


def _replace(changes: Changes, group: Group, asg: Asg, rolling: RefreshProgress, now_s: float) -> None:
    """Terminate the next instances to replace, or launch the replacements first."""
    preferences = rolling.refresh.preferences
    unready = _unready(group, rolling, now_s)
    replaceable = _replaceable(group, rolling)[: _until_checkpoint(rolling)]
    extra = group.desired * preferences.max_healthy_percentage // 100 - group.desired
    if preferences.max_healthy_percentage > 100:
        leaving = sum(bool(m.asg.leaving) for m in group.counted_members())
        room = max(1, extra) - max(leaving, unready)
        for member in replaceable[: max(0, room)]:
            changes.launch_replacement(group, member, _WHY)
            rolling.old.discard(member.instance.id)
        return
    least = math.ceil(group.desired * preferences.min_healthy_percentage / 100)
    spare = group.desired - unready - least
    for member in replaceable[: max(spare, 0 if unready else 1)]:
        asg.replacing.append(f"an instance was launched in response to {_WHY}")
        changes.retire(group, member, why=_WHY, note=f"terminated: {_WHY}")
        rolling.old.discard(member.instance.id)


def _replaceable(group: Group, rolling: RefreshProgress) -> list[Member]:
    """Return old instances that may be replaced now, oldest first. Standby instances are included only if the
    preferences terminate Standby instances."""
    preferences = rolling.refresh.preferences
    replaceable = []
    for name, member in group.members.items():
        if name not in rolling.old or member.asg.leaving:
            continue
        waits = preferences.scale_in_protected_instances != "Refresh"
        if member.instance.protected and waits:
            continue
        on_standby = member.state in ON_STANDBY and preferences.standby_instances == "Terminate"
        if on_standby or member.state is LifecycleState.IN_SERVICE:
            replaceable.append(member)
    return replaceable


def _until_checkpoint(rolling: RefreshProgress) -> int:
    """Return the number of further instances that may be replaced before the next checkpoint."""
    checkpoints = rolling.refresh.preferences.checkpoint_percentages
    if rolling.checkpoint >= len(checkpoints):
        return rolling.total
    target = math.ceil(rolling.total * checkpoints[rolling.checkpoint] / 100)
    return max(0, target - (rolling.total - len(rolling.old)))


def begin(changes: Changes, group: Group, asg: Asg, refresh: InstanceRefresh, sources: Sources) -> None:
    members = group.members.values()
    counted = [m for m in members if m.counted_members or m.state in ON_STANDBY]
    pool = [m for m in members if m.state in WARM]
    preferences = refresh.preferences
    warmup = preferences.instance_warmup
    if warmup is None:
        default = asg.config.default_instance_warmup
        warmup = asg.config.health_check_grace_period if default is None else default
    rolling = RefreshProgress(refresh, warmup=warmup, moved_s=changes.steady.now_s())
    rolling.before = {m.instance.id for m in counted}
    asg.rolling = rolling
    if preferences.skip_matching:
        config = configuration(asg)
        counted = [m for m in counted if not matches(m, config, sources)]
        pool = [m for m in pool if not matches(m, config, sources)]
    rolling.old, rolling.total = {m.instance.id for m in counted}, len(counted)
    rolling.warm = {m.instance.id for m in pool}
    _set(changes, rolling, instances_to_update=rolling.total)
    changes.unsaved = True


def cancel(changes: Changes, rolling: RefreshProgress) -> None:
    """Stop further replacements of the refresh. The refresh is Cancelled after the started replacements are ready."""
    _set(changes, rolling, status="Cancelling")
