"""An Auto Scaling group as plain data: members, the table of allowed moves, activities.

Invariant: a member changes state only through `move`, hence only along an arrow of MOVES.

A group's state as AWS's answers show it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol
from uuid import NAMESPACE_URL, uuid5

from batchlab.core.model import Activity, GroupView, Instance, LifecycleState, Pool
from batchlab.fleet.api_types import (
    HEALTHY,
    UNHEALTHY,
    ActivityDetails,
    InstanceDetails,
    LaunchTemplate,
    LifecycleHook,
    Process,
)
from batchlab.fleet.group_features import Asg

S = LifecycleState

MOVES: dict[LifecycleState, frozenset[LifecycleState]] = {
    S.PENDING: frozenset({S.PENDING_WAIT, S.IN_SERVICE, S.TERMINATING}),
    S.PENDING_WAIT: frozenset({S.PENDING_PROCEED, S.TERMINATING}),
    S.PENDING_PROCEED: frozenset({S.IN_SERVICE, S.TERMINATING}),
    S.IN_SERVICE: frozenset({S.ENTERING_STANDBY, S.WARMED_PENDING, S.TERMINATING}),
    S.ENTERING_STANDBY: frozenset({S.STANDBY, S.TERMINATING}),
    S.STANDBY: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_PENDING: frozenset(
        {
            S.WARMED_PENDING_WAIT,
            S.WARMED_RUNNING,
            S.WARMED_STOPPED,
            S.WARMED_HIBERNATED,
            S.TERMINATING,
        }
    ),
    S.WARMED_PENDING_WAIT: frozenset({S.WARMED_PENDING_PROCEED, S.TERMINATING}),
    S.WARMED_PENDING_PROCEED: frozenset(
        {S.WARMED_RUNNING, S.WARMED_STOPPED, S.WARMED_HIBERNATED, S.TERMINATING}
    ),
    S.WARMED_RUNNING: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_STOPPED: frozenset({S.PENDING, S.TERMINATING}),
    S.WARMED_HIBERNATED: frozenset({S.PENDING, S.TERMINATING}),
    # An instance found dead passes through here as well, so that a hook on leaving has one place.
    S.TERMINATING: frozenset({S.TERMINATING_WAIT, S.TERMINATED}),
    S.TERMINATING_WAIT: frozenset({S.TERMINATING_PROCEED, S.TERMINATED}),
    S.TERMINATING_PROCEED: frozenset({S.TERMINATED}),
    S.TERMINATED: frozenset(),
}
STARTING = frozenset({S.PENDING, S.PENDING_WAIT, S.PENDING_PROCEED})
COUNTED = STARTING | {S.IN_SERVICE}
"""The states that count towards desired capacity; I5 bounds their number."""
ENDING = frozenset({S.TERMINATING, S.TERMINATING_WAIT, S.TERMINATING_PROCEED})
ON_STANDBY = frozenset({S.ENTERING_STANDBY, S.STANDBY})
WARMING = frozenset({S.WARMED_PENDING, S.WARMED_PENDING_WAIT, S.WARMED_PENDING_PROCEED})
WARM = frozenset(state for state in S if state.startswith("Warmed:"))

KEEP_ACTIVITIES = 200
FINAL = frozenset({"Successful", "Failed", "Cancelled"})
"""The statuses of activities that have ended."""


class Store(Protocol):
    """Where a fleet keeps its state over a restart of the manager: one value, replaced whole."""

    def load(self) -> bytes | None:
        """What was saved last, None where nothing was."""

    def save(self, data: bytes) -> None:
        """Replace it atomically: after a crash `load` gives the old value or the new one."""


@dataclass(slots=True)
class Wait:
    """A lifecycle action that an instance waits for; moments are those of the SteadyClock."""

    hook: LifecycleHook
    token: str
    until_s: float
    """When it times out unless a heartbeat is recorded."""
    at_most_s: float
    """When it times out whatever is recorded."""


@dataclass(slots=True)
class Bond:
    """What a member of a group of AWS's kind has beyond a plain pool's; all of it is saved."""

    template: LaunchTemplate | None = None
    """With the number of its version."""
    launch_configuration: str = ""
    weight: int = 1
    weighted: bool = False
    """Whether the weight was given, so that it is shown."""
    waits: list[Wait] = field(default_factory=list)
    in_service_s: float | None = None
    """When it came into service, by the SteadyClock."""
    vouched: bool = False
    """Somebody has completed a launch hook for it: it had come up."""
    leaving: str = ""
    """Why it goes as soon as its successor is in service; it counts no longer."""
    rebalance_s: float | None = None
    """When a rebalance was recommended, seconds of the epoch."""
    interrupted_by_s: float | None = None
    """When a Spot interruption ends it by force, seconds of the epoch."""
    moving: int = 0
    """Id of the activity that moves it into standby or out of it, 0 while none does."""
    force: bool = False
    """It is to be ended at once, whatever its state."""
    warm: bool = False
    """It was launched into the warm pool, or returned to it, and has not been in service since."""
    resting: bool = False
    """The launcher is to stop it: its warm pool keeps stopped instances."""
    asleep: bool = False
    """The launcher has stopped it."""


@dataclass(slots=True)
class Member:
    """An instance with what its group alone knows about it.

    The three flags below `ready` and `since_s` do not outlive the manager: the next one asks the
    launcher again, gives the health-check grace period anew and repeats the request to terminate.
    """

    instance: Instance
    launch: int
    """Id of the activity that launched it; `end` of the one that ended it, 0 before."""
    end: int = 0
    ready: bool = False
    """The worker in it has reported for work."""
    running: bool = False
    """The launcher says that it lives."""
    asked: bool = False
    """The launcher was told to terminate it."""
    since_s: float = 0.0
    """Monotonic seconds of its launch or, once Terminated, of its end."""
    killed: bool = False
    """The launcher was told to end it by force."""
    bond: Bond = field(default_factory=Bond)

    @property
    def state(self) -> LifecycleState:
        return self.instance.state

    @property
    def counted(self) -> bool:
        return self.instance.state in COUNTED

    @property
    def staying(self) -> bool:
        """Counted, and not about to be replaced."""
        return self.counted and not self.bond.leaving

    def move(self, state: LifecycleState, *, note: str) -> None:
        """Change state; ValueError where the table has no such arrow, which is a defect."""
        if state not in MOVES[self.state]:
            raise ValueError(f"{self.instance.id} cannot go from {self.state} to {state}")
        self.instance = replace(self.instance, state=state, note=note)


@dataclass(slots=True)
class Group:
    """One Auto Scaling group. `members` are in order of launch, the newest last.

    `asg` is None for a plain pool, whose workers are alike and report that they are ready. The
    crash-loop fields do not outlive the manager: whoever restarts it has often mended the cause
    and should not wait.
    """

    pool: Pool
    desired: int
    members: dict[str, Member] = field(default_factory=dict)
    stuck: int = 0
    """How far above desired capacity scale-in protection held the group when last reported."""
    failures: int = 0
    """Instances in a row that ended before they were ready."""
    reason: str = ""
    """How the last of those ended."""
    failed: bool = False
    """One more did since the wait was last computed."""
    waits: int = 0
    """Waits of this crash loop so far; each is twice as long as the one before."""
    retry_s: float = 0.0
    """Monotonic seconds before which a crash loop launches nothing."""
    stumbled_s: float = 0.0
    """When the last of those ended, by the SteadyClock."""
    asg: Asg | None = None

    def counted(self) -> list[Member]:
        """The members that count towards desired capacity, the newest last."""
        return [member for member in self.members.values() if member.counted]

    def staying(self) -> list[Member]:
        """Those of them that are not about to be replaced."""
        return [member for member in self.members.values() if member.staying]

    def suspended(self, process: Process) -> bool:
        return self.asg is not None and process in self.asg.suspended

    def view(self) -> GroupView:
        return GroupView(
            self.pool, self.desired, tuple(member.instance for member in self.members.values())
        )

    def calm(self) -> None:
        """Forget a crash loop: an instance became ready, or the pool was changed."""
        self.failures, self.reason, self.failed = 0, "", False
        self.waits, self.retry_s = 0, 0.0


def weigh(members: Sequence[Member]) -> int:
    """Their units of capacity."""
    return sum(member.bond.weight for member in members)


class ActivityLog:
    """The last 200 activities of each pool; pool "" stands for the fleet as a whole."""

    def __init__(self) -> None:
        self._next = 1
        self._pools: dict[str, dict[int, Activity]] = {}
        self._written: dict[int, tuple[Activity, str]] = {}

    def add(self, pool: str, at_s: float, description: str, cause: str, status: str) -> int:
        """Record one activity, return its id, which is greater than all before."""
        number, self._next = self._next, self._next + 1
        kept = self._pools.setdefault(pool, {})
        ended_s = at_s if status in FINAL else None
        kept[number] = Activity(number, pool, at_s, description, cause, status, ended_s)
        if len(kept) > KEEP_ACTIVITIES:
            del kept[next(iter(kept))]
        return number

    def settle(
        self, pool: str, number: int, status: str, at_s: float, *, more: str = "", message: str = ""
    ) -> None:
        """Give an activity in progress its final status and add to its cause.

        One that is settled already, or no longer kept, is left alone.
        """
        old = self._pools.get(pool, {}).get(number)
        if old is not None and old.ended_s is None:
            self._pools[pool][number] = replace(
                old, status=status, cause=old.cause + more, ended_s=at_s, message=message
            )

    def mark(self, pool: str, number: int, status: str) -> None:
        """Change what an activity in progress waits for; one that has ended is left alone."""
        old = self._pools.get(pool, {}).get(number)
        if old is not None and old.ended_s is None:
            self._pools[pool][number] = replace(old, status=status)

    def get(self, pool: str, number: int) -> Activity | None:
        """One activity, None where it is no longer kept."""
        return self._pools.get(pool, {}).get(number)

    def newest(self, pool: str | None, limit: int) -> Sequence[Activity]:
        """Up to `limit` activities of one pool, or of all, newest first."""
        if pool is not None:
            return list(self._pools.get(pool, {}).values())[::-1][:limit]
        return sorted(self, key=lambda activity: activity.id, reverse=True)[:limit]

    def written(self, write: Callable[[Activity], str]) -> list[str]:
        """What `write` makes of each, which is kept: of hundreds hardly one is new at a time."""
        before, self._written = self._written, {}
        for one in self:
            known = before.get(one.id)
            self._written[one.id] = known if known and known[0] is one else (one, write(one))
        return [text for _, text in self._written.values()]

    def __iter__(self) -> Iterator[Activity]:
        for kept in self._pools.values():
            yield from kept.values()

    @classmethod
    def restore(cls, activities: Sequence[Activity], following: int) -> ActivityLog:
        """A log with these activities, whose next id is `following`."""
        log = cls()
        for activity in activities:
            log._pools.setdefault(activity.pool, {})[activity.id] = activity
        log._next = following
        return log

    @property
    def following(self) -> int:
        return self._next


_PROGRESS = {"PreInService": 30, "InProgress": 50, "MidLifecycleAction": 60}
"""AWS gives no rule; these are what it is seen to answer."""


def instance_details(group: Group, member: Member) -> InstanceDetails:
    instance, bond = member.instance, member.bond
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
    """Derived, hence the same after a restart."""
    return str(uuid5(NAMESPACE_URL, f"{activity.pool}/{activity.id}"))


def activity_details(activity: Activity, group: Group | None) -> ActivityDetails:
    """AWS's details are the zone of the instance, as JSON text."""
    instance = activity.description.rpartition(": ")[2]
    member = group.members.get(instance) if group else None
    zone = member.instance.machine.zone if member else ""
    description = activity.description
    if activity.message:
        description += f".  Status Reason: {activity.message}"
    return ActivityDetails(
        activity_id=activity_id(activity),
        auto_scaling_group_name=activity.pool,
        description=description,
        cause=activity.cause,
        start_time=activity.at_s,
        status_code=activity.status,
        end_time=activity.ended_s,
        status_message=activity.message,
        progress=100 if activity.status in FINAL else _PROGRESS[activity.status],
        details=json.dumps({"Availability Zone": zone} if zone else {}),
    )
