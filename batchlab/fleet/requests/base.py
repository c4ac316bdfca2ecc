"""What every kind of request needs: groups and instances by name, or AWS's refusal."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import NAMESPACE_URL, uuid5

from batchlab.fleet.api import LifecycleNotification
from batchlab.fleet.asg import Asg
from batchlab.fleet.details import activity_id
from batchlab.fleet.engine import DRAIN_S, Engine
from batchlab.fleet.faults import ScalingActivityInProgress, ValidationError
from batchlab.fleet.placement import Sources
from batchlab.fleet.sources import Metrics, Prices, Templates
from batchlab.fleet.state import Group, Member, Store
from batchlab.model import LifecycleState
from batchlab.ports import Clock, Ids, Launcher

SHORTEST_LIFETIME_S = 86_400


class Requests(Engine):
    """The parts that all requests share.

    `zones` are used by a group that names only subnets. Without `metrics` no target-tracking policy
    has data; its alarms look every `alarm_period_s`.
    A terminated instance has `drain_s` to stop. `shortest_lifetime_s` is AWS's least
    MaxInstanceLifetime, which a test may lower.
    """

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: Store,
        *,
        templates: Templates,
        metrics: Metrics | None = None,
        prices: Prices | None = None,
        zones: Sequence[str] = (),
        region: str = "us-east-1",
        account: str = "000000000000",
        drain_s: float = DRAIN_S,
        alarm_period_s: float = 60.0,
        shortest_lifetime_s: int = SHORTEST_LIFETIME_S,
    ) -> None:
        self._facts = Sources(templates, prices, tuple(zones))
        super().__init__(
            *(launcher, clock, ids, store),
            drain_s=drain_s,
            sources=self._facts,
            metrics=metrics,
            alarm_period_s=alarm_period_s,
        )
        self._region, self._account = region, account
        self._shortest_lifetime_s = shortest_lifetime_s

    def take_notifications(self) -> Sequence[LifecycleNotification]:
        """Instances that have begun to wait in a hook since the last call, the newest thousand at
        most. They are not saved: who starts anew finds the waiting instances by their state."""
        notices = list(self._changes.notices)
        self._changes.notices.clear()
        return notices

    def _named(self, name: str) -> tuple[Group, Asg]:
        group = self._groups.get(name)
        if group is None or group.asg is None:
            raise ValidationError(
                f"AutoScalingGroup name not found - AutoScalingGroup: {name} not found"
            )
        return group, group.asg

    def _changeable(self, name: str) -> tuple[Group, Asg]:
        group, asg = self._named(name)
        if asg.deleting:
            raise ValidationError(
                "The AutoScaling group may not be modified while it is pending delete"
            )
        return group, asg

    def _instance(self, instance_id: str) -> tuple[Group, Asg, Member]:
        found = self._find(instance_id)
        if found is not None:
            group, member = found
            if group.asg is not None and member.state is not LifecycleState.TERMINATED:
                return group, group.asg, member
        raise ValidationError(
            f"Instance Id not found - No managed instance found for instance ID: {instance_id}"
        )

    def _instances(self, group: Group, instance_ids: Sequence[str]) -> list[Member]:
        """These instances, each once, in the order given."""
        for one in instance_ids:
            member = group.members.get(one)
            if member is None or member.state is LifecycleState.TERMINATED:
                raise ValidationError(
                    f"The instance {one} is not part of Auto Scaling group {group.pool.name}."
                )
        return [group.members[one] for one in dict.fromkeys(instance_ids)]

    def _honour_cooldown(self, group: Group, asg: Asg) -> None:
        if asg.cooling or self._changes.steady.now_s() < asg.cooled_s:
            newest = self._changes.log.newest(group.pool.name, 1)
            which = activity_id(newest[0]) if newest else "of a cooldown"
            raise ScalingActivityInProgress(
                f"Scaling activity {which} is in progress and blocks this action"
            )

    def _arn(self, kind: str, group: str, rest: str) -> str:
        unique = uuid5(NAMESPACE_URL, f"{self._account}/{kind}/{group}/{rest}")
        place = f"arn:aws:autoscaling:{self._region}:{self._account}"
        return f"{place}:{kind}:{unique}:autoScalingGroupName/{group}{rest}"
