"""State of groups as plain data: members, allowed state changes, activities, and Auto Scaling groups.

Invariant: a member changes state only through `move`, which allows only the changes in MOVES. Fields that end in `_s`
are times of the SteadyClock, unless their docstring names another clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol
from uuid import NAMESPACE_URL, uuid5

from batchlab.core.model import Activity, GroupView, Instance, LifecycleState, Pool
from batchlab.fleet.api_types import (
    HEALTHY,
    UNHEALTHY,
    ActivityDetails,
    GroupConfig,
    InstanceDetails,
    InstanceRefresh,
    LaunchTemplate,
    LifecycleHook,
    Process,
    ScalingPolicy,
    ScheduledAction,
    Tag,
    WarmPool,
)


@dataclass(slots=True)
class Alarm:
    """State of the two alarms of a target-tracking policy: the times since which the metric has been above or below the
    thresholds of the alarms."""

    above_since_s: float | None = None
    below_since_s: float | None = None
    acted_s: float | None = None
    """Time of the policy's last change of desired capacity. The policy changes desired capacity at most once per alarm
    period."""


@dataclass(slots=True)
class RefreshProgress:
    """Progress of an active instance refresh."""

    refresh: InstanceRefresh
    warmup: int
    """Seconds in state InService after which a new instance counts as ready."""
    old: set[str] = field(default_factory=set)
    """Instances that the refresh has not replaced yet."""
    before: set[str] = field(default_factory=set)
    """All instances of the group at the start of the refresh. A rollback replaces the instances launched after the
    start of the refresh."""
    warm: set[str] = field(default_factory=set)
    """Instances of the warm pool that the refresh replaces at its end."""
    total: int = 0
    checkpoint: int = 0
    paused_until_s: float = 0.0
    moved_s: float = 0.0
    """Time of the refresh's last progress."""


@dataclass(slots=True)
class Asg:
    """State of one Auto Scaling group. The engine saves all fields."""

    config: GroupConfig
    created_s: float
    tags: dict[str, Tag] = field(default_factory=dict)
    hooks: dict[str, LifecycleHook] = field(default_factory=dict)
    suspended: dict[Process, str] = field(default_factory=dict)
    """Suspended processes with AWS's SuspensionReason."""
    policies: dict[str, ScalingPolicy] = field(default_factory=dict)
    alarms: dict[str, Alarm] = field(default_factory=dict)
    scheduled: dict[str, ScheduledAction] = field(default_factory=dict)
    due_s: dict[str, float] = field(default_factory=dict)
    """Next due time of each scheduled action, in seconds since the epoch."""
    refreshes: list[InstanceRefresh] = field(default_factory=list)
    """Ended instance refreshes, newest first."""
    rolling: RefreshProgress | None = None
    warm_pool: WarmPool | None = None
    deleting: bool = False
    first_activity: int = 0
    """Id of the group's first activity. Earlier activities with the group's name belong to a deleted group."""
    cause: str = ""
    """Reason for the desired capacity in AWS's wording, stored until the group reaches the desired capacity."""
    replacing: list[str] = field(default_factory=list)
    """Reasons for the next launches, one reason for each lost instance."""
    cooling: int = 0
    """Seconds of the cooldown that starts after the activities in progress have ended."""
    cooled_s: float = 0.0
    barren_s: dict[str, float] = field(default_factory=dict)
    """Capacity pools (`type/zone/market`) in which a launch failed or an instance was interrupted. The value is the
    time until which launches avoid the capacity pool."""


S = LifecycleState

MOVES: dict[LifecycleState, frozenset[LifecycleState]] = {
    S.PENDING: frozenset({S.PENDING_WAIT, S.IN_SERVICE, S.TERMINATING}),
    S.PENDING_WAIT: frozenset({S.PENDING_PROCEED, S.TERMINATING}),
    S.PENDING_PROCEED: frozenset({S.IN_SERVICE, S.TERMINATING}),
    S.IN_SERVICE: frozenset({S.ENTERING_STANDBY, S.WARMED_PENDING, S.TERMINATING}),
    S.ENTERING_STANDBY: frozenset({S.STANDBY, S.TERMINATING}),
    S.STANDBY: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_PENDING: frozenset(
        {S.WARMED_PENDING_WAIT, S.WARMED_RUNNING, S.WARMED_STOPPED, S.WARMED_HIBERNATED, S.TERMINATING}
    ),
    S.WARMED_PENDING_WAIT: frozenset({S.WARMED_PENDING_PROCEED, S.TERMINATING}),
    S.WARMED_PENDING_PROCEED: frozenset({S.WARMED_RUNNING, S.WARMED_STOPPED, S.WARMED_HIBERNATED, S.TERMINATING}),
    S.WARMED_RUNNING: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_STOPPED: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_HIBERNATED: frozenset({S.PENDING, S.TERMINATING}),
    # A dead instance also passes through TERMINATING, so that one code path runs termination hooks.
    S.TERMINATING: frozenset({S.TERMINATING_WAIT, S.TERMINATED}),
    S.TERMINATING_WAIT: frozenset({S.TERMINATING_PROCEED, S.TERMINATED}),
    S.TERMINATING_PROCEED: frozenset({S.TERMINATED}),
    S.TERMINATED: frozenset(),
}
STARTING = frozenset({S.PENDING, S.PENDING_WAIT, S.PENDING_PROCEED})
COUNTED = STARTING | {S.IN_SERVICE}
"""Lifecycle states that count towards desired capacity. The group's maximum size limits the number of instances in
COUNTED states (see I5 in `engine`)."""
ENDING = frozenset({S.TERMINATING, S.TERMINATING_WAIT, S.TERMINATING_PROCEED})
ON_STANDBY = frozenset({S.ENTERING_STANDBY, S.STANDBY})
WARMING = frozenset({S.WARMED_PENDING, S.WARMED_PENDING_WAIT, S.WARMED_PENDING_PROCEED})
WARM = frozenset(state for state in S if state.startswith("Warmed:"))

KEEP_ACTIVITIES = 200
KEEP_DELETED = 50
"""Number of deleted groups whose activities are stored."""
FINAL = frozenset({"Successful", "Failed", "Cancelled"})
"""Status codes of ended activities."""


class Store(Protocol):
    """Storage of a fleet's state, as a single value that survives restarts of the manager."""

    def load(self) -> bytes | None:
        """Return the saved value, or None if no value is saved."""

    def save(self, data: bytes) -> None:
        """Replace the saved value atomically. After a crash, `load` returns either the old or the new value."""


@dataclass(slots=True)
class Wait:
    """Lifecycle action that an instance waits for, with times of the SteadyClock."""

    hook: LifecycleHook
    token: str
    until_s: float
    """Time when the lifecycle action times out unless a heartbeat is recorded."""
    at_most_s: float
    """Time when the lifecycle action times out even if heartbeats are recorded."""


@dataclass(slots=True)
class AsgMember:
    """State of an instance that only members of an Auto Scaling group have. The engine saves all fields."""

    template: LaunchTemplate | None = None
    launch_configuration: str = ""
    weight: int = 1
    weighted: bool = False
    """Whether the weight was configured. Descriptions of an instance show only a configured weight."""
    waits: list[Wait] = field(default_factory=list)
    in_service_s: float | None = None
    """Time when the instance became InService."""
    vouched: bool = False
    """Whether a launch hook was completed for the instance, which proves a successful start."""
    leaving: str = ""
    """Reason for terminating the instance after its replacement is InService, or "". `Group.staying` omits an instance
    with such a reason."""
    rebalance_s: float | None = None
    """Time of a rebalance recommendation, in seconds since the epoch."""
    interrupted_by_s: float | None = None
    """Time when a Spot interruption kills the instance."""
    moving: int = 0
    """Id of the activity that moves the instance into or out of Standby, or 0."""
    force: bool = False
    """Whether the engine must kill the instance in any state without a drain time."""
    warm: bool = False
    """Whether the instance is in the warm pool, or has left the warm pool and is not InService yet."""
    resting: bool = False
    """Whether the launcher must stop the instance for the warm pool."""
    asleep: bool = False


@dataclass(slots=True)
class Member:
    """An instance with the data that only its group has. The engine does not save `running`, `end_requested`, `killed`,
    and `since_s`. After a restart, the engine reads the running instances from the launcher, restarts the health check
    grace period, and repeats requests to terminate."""

    instance: Instance
    launch: int
    end: int = 0
    """Id of the instance's termination activity, or 0."""
    ready: bool = False
    """Whether the worker of the instance has reported its readiness."""
    running: bool = False
    end_requested: bool = False
    since_s: float = 0.0
    """Monotonic time of the instance's launch, or of its end for a Terminated instance."""
    killed: bool = False
    asg: AsgMember = field(default_factory=AsgMember)

    @property
    def state(self) -> LifecycleState:
        return self.instance.state

    @property
    def counted_members(self) -> bool:
        return self.instance.state in COUNTED

    @property
    def staying(self) -> bool:
        """Whether the member counts towards desired capacity and does not have a planned replacement."""
        return self.counted_members and not self.asg.leaving

    def move(self, state: LifecycleState, *, note: str) -> None:
        """Change the member's state. Raise ValueError if MOVES does not allow the change, which indicates a bug."""
        if state not in MOVES[self.state]:
            raise ValueError(f"{self.instance.id} cannot go from {self.state} to {state}")
        self.instance = replace(self.instance, state=state, note=note)


@dataclass(slots=True)
class Group:
    """A pool of the Fleet port, or an Auto Scaling group of AWS's API. `members` are in order of launch, the newest
    last. `asg` is None for a pool of the Fleet port. All workers of a pool of the Fleet port are equal and report their
    readiness. The engine does not save the crash-loop fields, because the cause of a crash loop is often fixed before
    the manager is restarted."""

    pool: Pool
    desired: int
    members: dict[str, Member] = field(default_factory=dict)
    stuck: int = 0
    """Number of protected instances above desired capacity at the last report."""
    failures: int = 0
    """Number of consecutive instances that ended without becoming ready."""
    reason: str = ""
    failed: bool = False
    """Whether another instance has failed since the start of the last wait."""
    waits: int = 0
    """Number of waits in the current crash loop. Each wait of a crash loop is twice as long as the previous wait."""
    retry_s: float = 0.0
    """Monotonic time of the next launch during a crash loop."""
    last_failure_s: float = 0.0
    waits_for: str = ""
    """Reported reason why the next launch waits for the GPUs of other instances, or "". The engine does not save it."""
    end_s: float | None = None
    """Epoch seconds at which a scheduled action ends the instances of a pool of the Fleet port."""
    asg: Asg | None = None

    def counted_members(self) -> list[Member]:
        """Return the members that count towards desired capacity, the newest last."""
        return [member for member in self.members.values() if member.counted_members]

    def staying(self) -> list[Member]:
        """Return the counted members without a planned replacement."""
        return [member for member in self.members.values() if member.staying]

    def suspended(self, process: Process) -> bool:
        return self.asg is not None and process in self.asg.suspended

    def view(self) -> GroupView:
        return GroupView(self.pool, self.desired, tuple(member.instance for member in self.members.values()))

    def reset_failures(self) -> None:
        """Reset the fields of the group's crash loop."""
        self.failures, self.reason, self.failed = 0, "", False
        self.waits, self.retry_s = 0, 0.0


def weigh(members: Sequence[Member]) -> int:
    """Return the sum of the members' weights, in units of capacity."""
    return sum(member.asg.weight for member in members)


class ActivityLog:
    """Log of the last 200 activities of each pool, and of each of the last KEEP_DELETED deleted pools. The pool name ""
    has the activities that do not belong to a group."""

    def __init__(self) -> None:
        self._next = 1
        self._pools: dict[str, dict[int, Activity]] = {}
        self._texts: dict[str, dict[int, str]] = {}
        """Texts of the activities, in the order of `_pools`."""
        self._changed: dict[int, str] = {}
        """Pools of the activities that changed since the last call of `written`, by activity."""

    def add(self, pool: str, at_s: float, description: str, cause: str, status: str) -> int:
        """Record one activity, and return its id. Activity ids increase."""
        number, self._next = self._next, self._next + 1
        activities = self._pools.setdefault(pool, {})
        self._texts.setdefault(pool, {})
        ended_s = at_s if status in FINAL else None
        activities[number] = Activity(number, pool, at_s, description, cause, status, ended_s)
        self._changed[number] = pool
        if len(activities) > KEEP_ACTIVITIES:
            oldest = next(iter(activities))
            del activities[oldest]
            self._texts[pool].pop(oldest, None)
        return number

    def settle(self, pool: str, number: int, status: str, at_s: float, *, more: str = "", message: str = "") -> None:
        """Give an activity in progress its final status, and append `more` to its cause. An activity that has ended or
        is no longer stored stays unchanged."""
        old = self._pools.get(pool, {}).get(number)
        if old is not None and old.ended_s is None:
            self._pools[pool][number] = replace(
                old, status=status, cause=old.cause + more, ended_s=at_s, message=message
            )
            self._changed[number] = pool

    def mark(self, pool: str, number: int, status: str) -> None:
        """Change the status of an activity in progress. An activity that has ended stays unchanged."""
        old = self._pools.get(pool, {}).get(number)
        if old is not None and old.ended_s is None:
            self._pools[pool][number] = replace(old, status=status)
            self._changed[number] = pool

    def forget(self, existing: Collection[str]) -> None:
        """Remove the activities of deleted pools, except the pools with the newest activities."""
        deleted = sorted(
            (pool for pool in self._pools if pool and pool not in existing),
            key=lambda pool: max(self._pools[pool]),
            reverse=True,
        )
        for pool in deleted[KEEP_DELETED:]:
            del self._pools[pool], self._texts[pool]
        self._changed = {number: pool for number, pool in self._changed.items() if pool in self._pools}

    def get(self, pool: str, number: int) -> Activity | None:
        return self._pools.get(pool, {}).get(number)

    def newest(self, pool: str | None, limit: int) -> Sequence[Activity]:
        """Return up to `limit` activities of one pool, or of all pools if `pool` is None, newest first."""
        if pool is not None:
            return list(self._pools.get(pool, {}).values())[::-1][:limit]
        return sorted(self, key=lambda activity: activity.id, reverse=True)[:limit]

    def written(self, write: Callable[[Activity], str]) -> list[str]:
        """Return the text of each activity. The log caches the texts, because few activities change between two
        calls."""
        changed, self._changed = self._changed, {}
        for number, pool in changed.items():
            if activity := self._pools[pool].get(number):
                self._texts[pool][number] = write(activity)
        return [text for texts in self._texts.values() for text in texts.values()]

    def __iter__(self) -> Iterator[Activity]:
        for kept in self._pools.values():
            yield from kept.values()

    @classmethod
    def restore(cls, activities: Sequence[Activity], following: int) -> ActivityLog:
        """Return a log of `activities` with the next id `following`."""
        log = cls()
        for activity in activities:
            log._pools.setdefault(activity.pool, {})[activity.id] = activity
            log._texts.setdefault(activity.pool, {})
            log._changed[activity.id] = activity.pool
        log._next = following
        return log

    @property
    def following(self) -> int:
        return self._next


MAX_CAUSE, MAX_STATUS_MESSAGE = 1_023, 255
"""AWS's limits of the Cause and the StatusMessage of an activity, in characters. The Description is not limited."""
_PROGRESS = {"PreInService": 30, "InProgress": 50, "MidLifecycleAction": 60}
"""Progress percentages of activities, as observed on AWS."""


def instance_details(group: Group, member: Member) -> InstanceDetails:
    instance, bond = member.instance, member.asg
    return InstanceDetails(
        instance_id=instance.id,
        auto_scaling_group_name=group.pool.name,
        instance_type=instance.machine.type,
        availability_zone=instance.machine.zone,
        lifecycle_state=instance.state,
        health_status=HEALTHY if instance.healthy else UNHEALTHY,
        protected_from_scale_in=instance.protected,
        launch_template=bond.template,
        launch_configuration_name=bond.launch_configuration,
        weighted_capacity=bond.weight if bond.weighted else None,
        market=instance.machine.market,
        launched_s=instance.launched_s,
        note=instance.note,
    )


def activity_id(activity: Activity) -> str:
    """Return the id of an activity in AWS's format. The id of an activity is the same after a restart."""
    return str(uuid5(NAMESPACE_URL, f"{activity.pool}/{activity.id}"))


def activity_details(activity: Activity, group: Group | None, group_arn: str) -> ActivityDetails:
    """Return an activity in AWS's format. `group` is the existing group with the name of the activity's group. The
    activity's `details` are the instance's zone as JSON text."""
    instance = activity.description.rpartition(": ")[2]
    member = group.members.get(instance) if group else None
    zone = member.instance.machine.zone if member else ""
    asg = group.asg if group else None
    description = activity.description
    if activity.message:
        description += f".  Status Reason: {activity.message}"
    return ActivityDetails(
        activity_id=activity_id(activity),
        auto_scaling_group_name=activity.pool,
        description=description,
        cause=activity.cause[:MAX_CAUSE],
        start_time=activity.at_s,
        status_code=activity.status,
        end_time=activity.ended_s,
        status_message=activity.message[:MAX_STATUS_MESSAGE],
        progress=100 if activity.status in FINAL else _PROGRESS[activity.status],
        details=json.dumps({"Availability Zone": zone} if zone else {}),
        auto_scaling_group_arn=group_arn,
        auto_scaling_group_state="Deleted" if asg is None or activity.id < asg.first_activity else "InService",
    )
