"""Decisions of a group as pure functions: the instances to terminate, and the number of instances to launch.

Scale-in first chooses the market with too many instances, then the zone with the most instances. Each termination
policy of the group then narrows the choice of instances. If several instances remain, AWS terminates a random instance,
and batchlab terminates the instance that was launched first.

Invariant (I5): launches never raise a group above its desired capacity, and scale-in never terminates a protected
instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from batchlab.core.model import LifecycleState, Market, Pool
from batchlab.core.port_retries import doubled_s
from batchlab.fleet import lifecycle_hooks, placement
from batchlab.fleet.api_types import LaunchTemplate, MixedInstancesPolicy
from batchlab.fleet.group_state import STARTING, Asg, Group, Member, weigh
from batchlab.fleet.placement import configuration

HOUR_S = 3600.0
PLAIN = "PendingThenNewest"
"""Name of the termination policy of pools of the Fleet port. AWS does not have this termination policy."""

Policy = Callable[[Asg, Sequence[Member], float], Sequence[Member]]


def pending_then_newest(members: Sequence[Member]) -> Sequence[Member]:
    """Return the unprotected members, Pending before InService, newest before oldest. All instances of a pool of the
    Fleet port are equal, and the newest instance has the least cached state (code, child processes) to lose."""
    unprotected = [member for member in reversed(members) if not member.instance.protected]
    # The stable sort preserves the order by age within each state.
    return sorted(unprotected, key=lambda member: member.state is not LifecycleState.PENDING)


def choose(group: Group, asg: Asg, now_s: float) -> list[Member]:
    """Return the instances of an Auto Scaling group that scale-in terminates, in order. An instance stays if its
    termination would lower the group below desired capacity."""
    staying = group.staying()
    chosen: list[Member] = []
    while True:
        excess = weigh(staying) - group.desired
        candidates = [member for member in staying if not member.instance.protected and member.asg.weight <= excess]
        if excess <= 0 or not candidates:
            return chosen
        victim = _pick(asg, staying, candidates, now_s)
        staying.remove(victim)
        chosen.append(victim)


def take_by_default(asg: Asg, members: Sequence[Member], count: int, now_s: float) -> list[Member]:
    remaining, chosen = list(members), []
    for _ in range(min(count, len(remaining))):
        member = _default(asg, remaining, now_s)[0]
        remaining.remove(member)
        chosen.append(member)
    return chosen


def _pick(asg: Asg, staying: Sequence[Member], candidates: Sequence[Member], now_s: float) -> Member:
    mixed = configuration(asg).mixed_instances_policy
    if mixed is not None:
        market = placement.market_to_remove(mixed.instances_distribution, staying)
        candidates = [m for m in candidates if m.instance.machine.market is market] or candidates
    sizes = Counter(member.instance.machine.zone for member in staying)
    most = max(sizes[member.instance.machine.zone] for member in candidates)
    candidates = [member for member in candidates if sizes[member.instance.machine.zone] == most]
    return narrow(asg, candidates, now_s)


def narrow(asg: Asg, candidates: Sequence[Member], now_s: float) -> Member:
    for name in asg.config.termination_policies or ("Default",):
        candidates = POLICIES[name](asg, candidates, now_s) or candidates
    return candidates[0]


def _default(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    members = _allocation_strategy(asg, members, now_s)
    members = _oldest_template(asg, members, now_s)
    return _closest_to_hour(asg, members, now_s)


def _oldest(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    del asg, now_s
    first = min(member.instance.launched_s for member in members)
    return [member for member in members if member.instance.launched_s == first]


def _newest(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    del asg, now_s
    last = max(member.instance.launched_s for member in members)
    # If several instances were launched in one tick, the last instance in the list is the newest.
    return [m for m in members if m.instance.launched_s == last][-1:]


def _oldest_template(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    """Return the members with a launch configuration. If no member has a launch configuration, return the members with
    another template, or the members with the oldest template version."""
    del now_s
    config = configuration(asg)
    if config.launch_configuration_name:
        return _oldest_configuration(asg, members, 0.0)
    configured = [member for member in members if member.asg.launch_configuration]
    if configured:
        return configured
    mixed = config.mixed_instances_policy
    current = mixed.launch_template if mixed else config.launch_template
    others = [m for m in members if m.asg.template and current and not _same(m, current)]
    if others:
        return others
    versions = [_version(member) for member in members]
    return [m for m in members if _version(m) == min(versions)]


def _same(member: Member, current: LaunchTemplate) -> bool:
    launch_template = member.asg.template
    assert launch_template is not None
    if current.launch_template_id:
        return launch_template.launch_template_id == current.launch_template_id
    return launch_template.launch_template_name == current.launch_template_name


def _version(member: Member) -> int:
    template = member.asg.template
    return int(template.version) if template and template.version.isdigit() else 0


def _oldest_configuration(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    """Return the oldest members whose launch configuration is not the current launch configuration, or all members."""
    current = configuration(asg).launch_configuration_name
    others = [
        member for member in members if member.asg.launch_configuration and member.asg.launch_configuration != current
    ]
    return _oldest(asg, others, now_s) if others else members


def _closest_to_hour(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    """Return the members whose next hour of use starts first, compared in whole seconds."""
    del asg

    def left_s(member: Member) -> int:
        return int(HOUR_S - (now_s - member.instance.launched_s) % HOUR_S)

    least = min(left_s(member) for member in members)
    return [member for member in members if left_s(member) == least]


def _allocation_strategy(asg: Asg, members: Sequence[Member], now_s: float) -> Sequence[Member]:
    """Return the members of the instance type that the allocation strategy would choose last."""
    del now_s
    mixed = configuration(asg).mixed_instances_policy
    if mixed is None or not mixed.overrides:
        return members
    worst = max(_rank(mixed, member, members) for member in members)
    return [member for member in members if _rank(mixed, member, members) == worst]


def _rank(mixed: MixedInstancesPolicy, member: Member, members: Sequence[Member]) -> int:
    machine, shares = member.instance.machine, mixed.instances_distribution
    kinds = [override.instance_type for override in mixed.overrides]
    if machine.type not in kinds:
        return len(kinds) + len(members)
    place = kinds.index(machine.type)
    strategy = shares.spot_allocation_strategy
    if machine.market is Market.ON_DEMAND or strategy == "capacity-optimized-prioritized":
        return place
    # Strategies that spread instances over types terminate an instance of the type with the most instances.
    pools = shares.spot_instance_pools or placement.SPOT_POOLS
    beyond = strategy == "lowest-price" and place >= pools
    alike = sum(other.instance.machine == machine for other in members)
    return len(kinds) + len(members) - 1 if beyond else alike


POLICIES: dict[str, Policy] = {
    "Default": _default,
    "AllocationStrategy": _allocation_strategy,
    "OldestLaunchTemplate": _oldest_template,
    "OldestLaunchConfiguration": _oldest_configuration,
    "ClosestToNextInstanceHour": _closest_to_hour,
    "NewestInstance": _newest,
    "OldestInstance": _oldest,
    PLAIN: lambda _, members, __: pending_then_newest(members)[:1],
}


CRASH_LOOP = 3
"""Number of consecutive failed starts at which a crash loop begins."""
MAX_WAIT_S = 60.0


def clamp(pool: Pool, desired: int) -> int:
    """Return the nearest desired capacity within the pool's limits."""
    return max(pool.min_size, min(pool.max_size, desired))


def victims(group: Group, now_s: float) -> Sequence[Member]:
    """Return the instances that scale-in terminates, in order. `now_s` is a time of the SteadyClock."""
    if group.asg is None:
        excess = len(group.counted_members()) - group.desired
        return pending_then_newest(group.counted_members())[: max(0, excess)]
    return choose(group, group.asg, now_s)


def shortfall(group: Group, now_s: float, steady_s: float) -> int:
    """Return the units of capacity to launch now. `now_s` is a monotonic time. During a crash loop, the group launches
    one instance after each wait, until an instance is ready."""
    staying = group.staying()
    missing = max(0, group.desired - weigh(staying))
    if group.failures < CRASH_LOOP or not missing:
        return missing
    probing = any(_on_trial(group, member, steady_s) for member in staying)
    return 0 if probing or now_s < group.retry_s else 1


def _on_trial(group: Group, member: Member, steady_s: float) -> bool:
    if member.state in STARTING:
        return True
    new = group.asg is not None and member.state is LifecycleState.IN_SERVICE
    return new and not lifecycle_hooks.has_started(member, steady_s)


def crash_loop_wait_s(waits: int) -> float:
    """Return the duration of the next wait in seconds after `waits` earlier waits. The duration of crash-loop waits
    doubles from 1 s to `MAX_WAIT_S`."""
    return doubled_s(1.0, MAX_WAIT_S, waits)
