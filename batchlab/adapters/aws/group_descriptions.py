"""State of Auto Scaling groups, derived from successive descriptions of the groups, and the parameters of new groups.

EC2 Auto Scaling's description of a group does not list ended instances. The description does not contain the launch
time of an instance or the reason for its end. This module derives the launch and the end of an instance from two
successive descriptions of the group. A worker reads its pool and its number of slots from the tags of its instance,
which are parameters of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from batchlab.core.model import Activity, GroupView, Instance, LifecycleState, Machine, Pool
from batchlab.core.ports import KEEP_TERMINATED_S

if TYPE_CHECKING:
    from mypy_boto3_autoscaling.type_defs import (
        ActivityTypeDef,
        AutoScalingGroupTypeDef,
        CreateAutoScalingGroupTypeTypeDef,
        InstanceTypeDef,
        LifecycleHookSpecificationTypeDef,
        TagTypeDef,
    )

MAX_ACTIVITIES = 500

COUNTED = frozenset({LifecycleState.PENDING, LifecycleState.IN_SERVICE})
_STATES = {
    "Pending": LifecycleState.PENDING,
    "InService": LifecycleState.IN_SERVICE,
    "Terminating": LifecycleState.TERMINATING,
    # A detaching instance keeps running, but no longer belongs to its group.
    "Detaching": LifecycleState.TERMINATING,
    "Terminated": LifecycleState.TERMINATED,
    "Detached": LifecycleState.TERMINATED,
}
_WAITS = "Pending:Wait"
_HEALTH = "health check"
_ABANDONED = "was abandoned"
LEFT_GROUP = "the instance is no longer in its group"
NEVER_UP = "the instance ended before it was in service"
SCALE_IN_S = 60.0
"""Time in seconds after a decrease of the desired capacity.

A Pending instance that ends within `SCALE_IN_S` seconds after the decrease counts as ended by the decrease.
"""


@dataclass(slots=True)
class GroupState:
    """State of one pool's Auto Scaling group at its last description.

    `ends` contains the causes of requested terminations.
    """

    pool: Pool
    desired: int = 0
    instances: dict[str, Instance] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    """Instances that the launch hook holds until their workers report."""
    ends: dict[str, str] = field(default_factory=dict)
    gone_s: dict[str, float] = field(default_factory=dict)
    """Time in epoch seconds at which a Terminated instance was first missing in a description, by instance id."""
    unexplained: set[str] = field(default_factory=set)
    """Ids of the instances that ended for a reason that is not known yet.

    An unexplained instance disappeared between two descriptions, or left its group before the instance was in service.
    """
    served: set[str] = field(default_factory=set)
    """Instances that have been in service, or that may have been in service before the first description."""
    lowered_s: float = 0.0
    """Epoch seconds at which the desired capacity was last seen to fall."""
    suspended: frozenset[str] = frozenset()
    """Names of the group's processes that a user has suspended."""

    def view(self) -> GroupView:
        return GroupView(self.pool, self.desired, tuple(self.instances.values()))

    def is_counted(self, instance: str) -> bool:
        known_instance = self.instances.get(instance)
        return known_instance is not None and known_instance.state in COUNTED

    def update(self, group: AutoScalingGroupTypeDef, now_s: float) -> list[Instance]:
        """Update the state from a description of the group.

        Return the instances that have ended since the previous description.
        """
        if group["DesiredCapacity"] < self.desired:
            self.lowered_s = now_s
        limits = replace(self.pool, min_size=group["MinSize"], max_size=group["MaxSize"])
        self.pool, self.desired = limits, group["DesiredCapacity"]
        self.suspended = frozenset(process["ProcessName"] for process in group.get("SuspendedProcesses", ()))
        self.waiting = set()
        here = set()
        for listed in group.get("Instances", ()):
            if (state := _state(listed["LifecycleState"])) is not None:
                here.add(listed["InstanceId"])
                self._update_instance(listed, state, now_s)
        return self._end_missing(here, now_s)

    def _update_instance(self, listed: InstanceTypeDef, state: LifecycleState, now_s: float) -> None:
        name = listed["InstanceId"]
        if state is not LifecycleState.TERMINATED and self.gone_s.pop(name, None) is not None:
            # The instance was missing in an earlier description of the group, and this description lists the instance
            # again.
            self.instances[name] = replace(self.instances[name], note="")
        old = self.instances.get(name)
        if listed["LifecycleState"] == _WAITS:
            self.waiting.add(name)
        healthy = listed["HealthStatus"] == "Healthy"
        note = old.note if old else ""
        if state is LifecycleState.IN_SERVICE or (old is None and state not in COUNTED):
            self.served.add(name)
        if state is LifecycleState.TERMINATING and not note:
            note = self._why(name, now_s, healthy=healthy)
        self.instances[name] = Instance(
            name,
            self.pool.name,
            state,
            old.launched_s if old else now_s,
            healthy,
            listed["ProtectedFromScaleIn"],
            note,
            Machine(listed.get("InstanceType", ""), listed["AvailabilityZone"]),
        )

    def _why(self, name: str, now_s: float, *, healthy: bool) -> str:
        if cause := self.ends.get(name):
            return f"terminated: {cause}"
        if healthy and name not in self.served:
            self.unexplained.add(name)
            if now_s - self.lowered_s > SCALE_IN_S:
                return NEVER_UP
        return "terminated: scale-in" if healthy else "the instance failed a health check of its group"

    def _end_missing(self, here: set[str], now_s: float) -> list[Instance]:
        """Return the newly ended instances. The description lacks a newly ended instance, or lists it as Terminated."""
        gone = []
        for name, old in list(self.instances.items()):
            if name in self.gone_s:
                if now_s - self.gone_s[name] > KEEP_TERMINATED_S:
                    del self.instances[name], self.gone_s[name]
                    self.ends.pop(name, None)
                    self.served.discard(name)
            elif name not in here or old.state is LifecycleState.TERMINATED:
                note = old.note
                if not note and name in self.ends:
                    note = f"terminated: {self.ends[name]}"
                elif not note:
                    note = self._why(name, now_s, healthy=True) if name not in self.served else LEFT_GROUP
                    self.unexplained.add(name)
                elif note == NEVER_UP:
                    self.unexplained.add(name)
                state = LifecycleState.TERMINATED
                self.instances[name] = replace(old, state=state, note=note)
                self.gone_s[name] = now_s
                gone.append(self.instances[name])
        return gone

    def explain(self, activities: Sequence[ActivityTypeDef]) -> list[Instance]:
        """Return the instances whose end a scaling activity explains, each with the reason for its end."""
        explained = []
        for name in self.unexplained & self.instances.keys():
            own = [activity for activity in activities if name in activity.get("Description", "")]
            if note := _abandonment(own) or _termination(own):
                self.instances[name] = replace(self.instances[name], note=note)
                explained.append(self.instances[name])
        self.unexplained.clear()
        return explained


def _abandonment(activities: Iterable[ActivityTypeDef]) -> str:
    """Return the reason of an abandoned launch, or "" if the launch was not abandoned."""
    for activity in activities:
        if _ABANDONED in (text := activity.get("StatusMessage") or activity["Description"]):
            return text.partition("Status Reason: ")[2] or text
    return ""


def _termination(activities: Iterable[ActivityTypeDef]) -> str:
    for activity in activities:
        if "erminating" in activity["Description"]:
            cause = activity["Cause"].rstrip(".")
            return cause if _HEALTH in cause else f"terminated: {cause}"
    return ""


def _state(aws_state: str) -> LifecycleState | None:
    """Return the fleet model's state for AWS's lifecycle state.

    Return None for an instance in standby or in a warm pool, because such an instance does not work for its group.
    """
    return _STATES.get(aws_state.partition(":")[0])


class ActivityLog:
    """Scaling activities of EC2 Auto Scaling, and the causes of the requests that this process made.

    EC2 Auto Scaling does not number its activities. The log numbers each activity when the log first receives the
    activity. The numbers are in order of time.
    """

    def __init__(self) -> None:
        self._next = 1
        self._notes: list[Activity] = []
        self._activities: dict[str, Activity] = {}
        """Activities by EC2 Auto Scaling's activity id. The key of a note is the number of the note."""

    def note(self, pool: str, at_s: float, description: str, cause: str) -> None:
        """Record a request of this process and the cause of the request.

        EC2 Auto Scaling does not store the cause of a request.
        """
        self._notes.append(Activity(0, pool, at_s, description, cause))

    def merge(self, described: Mapping[str, Sequence[ActivityTypeDef]]) -> None:
        """Add the described scaling activities of the given pools to this log."""
        new: list[tuple[str, Activity]] = [("", note) for note in self._notes]
        self._notes = []
        for pool, activities in described.items():
            for activity in activities:
                name = activity["ActivityId"]
                if name in self._activities:
                    number = self._activities[name].id
                    self._activities[name] = replace(_activity(pool, activity), id=number)
                else:
                    new.append((name, _activity(pool, activity)))
        for name, entry in sorted(new, key=lambda pair: pair[1].at_s):
            self._activities[name or f"note {self._next}"] = replace(entry, id=self._next)
            self._next += 1
        for name in list(self._activities)[:-MAX_ACTIVITIES]:
            del self._activities[name]

    def newest(self, pool: str | None, limit: int) -> list[Activity]:
        """Return up to `limit` activities of one pool, or of all pools, newest first."""
        newest = sorted(self._activities.values(), key=lambda activity: activity.id, reverse=True)
        return [activity for activity in newest if pool in (None, activity.pool)][:limit]


def _activity(pool: str, described: ActivityTypeDef) -> Activity:
    description = described.get("Description", "")
    if message := described.get("StatusMessage"):
        description = f"{description}: {message}" if description else message
    return Activity(
        0, pool, described["StartTime"].timestamp(), description, described["Cause"], described["StatusCode"]
    )


POOL_TAG = "batchlab:pool"
SLOTS_TAG = "batchlab:slots"
GPUS_TAG = "batchlab:gpus"


READY_HOOK = "batchlab-ready"
DRAIN_HOOK = "batchlab-drain"
END_ACTION = "batchlab-end"
"""Name of the scheduled action that ends a group's instances if no manager postpones the action."""
END_PROCESSES = ("ScheduledActions", "Terminate")
"""Processes of a group without which the scheduled action does not end the group's instances."""
NOT_THERE = ("is not part of Auto Scaling group", "Instance Id not found")
"""Texts of EC2 Auto Scaling's errors for an instance that its group no longer contains."""
NO_ACTION = "No active Lifecycle Action"
"""Text of AWS's error for an instance that is not waiting in the lifecycle hook."""
_TIMEOUT_S = (30.0, 7200.0)
"""Minimum and maximum timeout of a lifecycle hook on AWS, in seconds."""


@dataclass(frozen=True, slots=True)
class GroupParameters:
    """Parameters that all Auto Scaling groups of a grid share.

    After a launch, the worker must report within the pool's `boot_s` plus `report_s`. In Terminating:Wait, the worker
    has `drain_s` to return its work. With `drain_s` 0, the instance does not wait in Terminating:Wait.
    """

    template: str
    """Name of the launch template. "{pool}" in the name of the launch template stands for the pool's name."""
    version: str = "$Default"
    zones: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    report_s: float = 60.0
    drain_s: float = 120.0

    def request(self, name: str, pool: Pool) -> CreateAutoScalingGroupTypeTypeDef:
        """Return the parameters of CreateAutoScalingGroup for the pool."""
        request: CreateAutoScalingGroupTypeTypeDef = {
            "AutoScalingGroupName": name,
            "LaunchTemplate": {
                "LaunchTemplateName": self.template.replace("{pool}", pool.name),
                "Version": self.version,
            },
            "MinSize": pool.min_size,
            "MaxSize": pool.max_size,
            "DesiredCapacity": pool.min_size,
            # The cooldown of the groups is 0, because batchlab's scaling policy has its own cooldowns.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            # Scale-in terminates the newest instance, because the newest instance has the least cached state (code,
            # child processes).
            "TerminationPolicies": ["NewestInstance"],
            "LifecycleHookSpecificationList": self.hooks(pool),
            "Tags": [_tag(POOL_TAG, pool.name), _tag(SLOTS_TAG, str(pool.slots))],
        }
        if pool.gpus:
            request["Tags"] = [*request["Tags"], _tag(GPUS_TAG, str(pool.gpus))]
        if self.subnets:
            request["VPCZoneIdentifier"] = ",".join(self.subnets)
        if self.zones:
            request["AvailabilityZones"] = list(self.zones)
        return request

    def hooks(self, pool: Pool) -> list[LifecycleHookSpecificationTypeDef]:
        """Return the lifecycle hooks of the pool's group."""
        hooks: list[LifecycleHookSpecificationTypeDef] = [
            {
                "LifecycleHookName": READY_HOOK,
                "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING",
                "HeartbeatTimeout": _timeout(pool.boot_s + self.report_s),
                "DefaultResult": "ABANDON",
            }
        ]
        if self.drain_s:
            hooks.append(
                {
                    "LifecycleHookName": DRAIN_HOOK,
                    "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
                    "HeartbeatTimeout": _timeout(self.drain_s),
                    "DefaultResult": "CONTINUE",
                }
            )
        return hooks


def _tag(key: str, value: str) -> TagTypeDef:
    return {"Key": key, "Value": value, "PropagateAtLaunch": True}


def _timeout(seconds: float) -> int:
    min_s, max_s = _TIMEOUT_S
    return int(min(max_s, max(min_s, seconds)))


def is_missing_instance(error: Exception) -> bool:
    """Return whether EC2 Auto Scaling refused a request because the instance no longer exists in its group."""
    return any(words in str(error) for words in NOT_THERE)
