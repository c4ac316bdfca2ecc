"""What a group of AWS's kind does by itself as time goes by, in a fixed order."""

from __future__ import annotations

from batchlab.fleet import health, hooks, refresh, schedules, standby, tracking, upkeep, warm
from batchlab.fleet.changes import Changes
from batchlab.fleet.placement import Sources
from batchlab.fleet.sources import Metrics
from batchlab.fleet.state import ENDING, STARTING, Group, weigh


def attend(
    changes: Changes,
    group: Group,
    sources: Sources,
    metrics: Metrics | None,
    alarm_period_s: float,
) -> None:
    """One look at everything that may be due."""
    asg = group.asg
    assert asg is not None
    hooks.expire(changes, group)
    standby.arrive(changes, group)
    upkeep.enforce(changes, group)
    health.replace_unhealthy(changes, group)
    schedules.run_due(changes, group)
    tracking.track(changes, group, asg, metrics, alarm_period_s)
    refresh.roll(changes, group)
    warm.trim(changes, group, asg)
    upkeep.keep_up(changes, group, sources)
    _rest(changes, group)


def _rest(changes: Changes, group: Group) -> None:
    """What ends once all that was wanted has been reached."""
    asg = group.asg
    assert asg is not None
    members = group.members.values()
    now_s = changes.steady.now_s()
    busy = any(member.state in STARTING or member.state in ENDING for member in members)
    if asg.cooling and not busy and weigh(group.staying()) == group.desired:
        asg.cooled_s, asg.cooling = now_s + asg.cooling, 0
        changes.unsaved = True
    if (asg.cause or asg.replacing) and weigh(group.staying()) == group.desired:
        asg.cause, asg.replacing = "", []
        changes.unsaved = True
    if group.failures and any(
        hooks.settled(member, now_s) and (member.bond.in_service_s or 0.0) >= group.stumbled_s
        for member in members
    ):
        group.calm()
