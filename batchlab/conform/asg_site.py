"""An Auto Scaling group of one check's own, and short words for the calls.

Invariant: no two checks share a group. Instances come and go with time: whatever is waited for has
a deadline, and whatever must not happen is watched for `QUIET_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.conform.check import Answer, Differs, answer, snake

if TYPE_CHECKING:
    from batchlab.conform.site import Site

T = TypeVar("T")

QUIET_S = 2.0
"""What has not happened within this time of what could cause it is taken not to happen."""

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"

IN_SERVICE = "InService"
_MOST = 3


class OwnGroup:
    """A group of one check's own; it need not have been created."""

    def __init__(self, site: Site) -> None:
        self._target = site.target
        self.name = site.new_name()

    def create(self, **more: Any) -> Answer:
        """CreateAutoScalingGroup of 0 to 3 instances from the run's template, unless said
        otherwise."""
        asked = {
            "MinSize": 0,
            "MaxSize": _MOST,
            "AvailabilityZones": [self._target.zone],
            "LaunchTemplate": {"LaunchTemplateName": self._target.template},
            # Only the newest change matters to most checks.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            **more,
        }
        return answer("CreateAutoScalingGroup", lambda: self._target.create_group(self.name, asked))

    def grown(self, size: int, **more: Any) -> list[str]:
        """Create it with so many instances; their ids once all are InService."""
        self.create(DesiredCapacity=size, **more).accepted()
        return self.has(size)

    def call(self, action: str, **request: Any) -> Answer:
        """Any action on this group, named as AWS names it."""
        return self.ask(action, AutoScalingGroupName=self.name, **request)

    def ask(self, action: str, **request: Any) -> Answer:
        """Any action, as it is."""
        method = getattr(self._target.asg, snake(action))
        return answer(action, lambda: method(**request))

    def size(self, desired: int, *, cooldown: bool = False) -> Answer:
        """SetDesiredCapacity; `cooldown` honours it."""
        return self.call("SetDesiredCapacity", DesiredCapacity=desired, HonorCooldown=cooldown)

    def terminate(self, instance: str, *, decrement: bool) -> Answer:
        """TerminateInstanceInAutoScalingGroup."""
        return self.ask(
            "TerminateInstanceInAutoScalingGroup",
            InstanceId=instance,
            ShouldDecrementDesiredCapacity=decrement,
        )

    def protect(self, *instances: str) -> Answer:
        """SetInstanceProtection, on."""
        return self.call(
            "SetInstanceProtection", InstanceIds=list(instances), ProtectedFromScaleIn=True
        )

    def complete(self, hook: str, instance: str) -> Answer:
        """CompleteLifecycleAction with CONTINUE."""
        return self.call(
            "CompleteLifecycleAction",
            LifecycleHookName=hook,
            InstanceId=instance,
            LifecycleActionResult="CONTINUE",
        )

    # --- Looking ----------------------------------------------------------------------------------

    def described(self) -> list[dict[str, Any]]:
        """What DescribeAutoScalingGroups says of groups of this name."""
        found = self.ask("DescribeAutoScalingGroups", AutoScalingGroupNames=[self.name])
        return list(found.accepted().data["AutoScalingGroups"])

    def now(self) -> dict[str, Any]:
        """The group as it is described now."""
        found = self.described()
        if len(found) != 1:
            raise Differs(f"{len(found)} groups of its name are described")
        return found[0]

    @property
    def desired(self) -> int:
        return int(self.now()["DesiredCapacity"])

    def ids(self, state: str = "") -> list[str]:
        """The instances in this state, or in any."""
        some = self.now().get("Instances", ())
        return [one["InstanceId"] for one in some if state in ("", one["LifecycleState"])]

    def until(self, holds: Callable[[], T], otherwise: str) -> T:
        """What `holds` gives as soon as that is true; Differs, saying `otherwise`, where it never
        is."""
        ends_s = time.monotonic() + self._target.appears_s
        while not (found := holds()):
            if time.monotonic() > ends_s:
                raise Differs(otherwise)
            time.sleep(0.1)
        return found

    def has(self, size: int) -> list[str]:
        """The ids once it has so many instances, all of them in service."""

        def all_so() -> bool:
            return len(self.ids()) == len(self.ids(IN_SERVICE)) == size

        self.until(all_so, f"it never has {size} in all, {IN_SERVICE}")
        return self.ids(IN_SERVICE)

    def waits(self, state: str) -> str:
        """The one instance that comes into this state, and is still there after a while."""
        self.until(lambda: self.ids(state), f"no instance reaches {state}")
        time.sleep(QUIET_S)
        found = self.ids(state)
        if len(found) != 1:
            raise Differs(f"it does not stay in {state}")
        return found[0]

    def activities(self) -> Sequence[dict[str, Any]]:
        """DescribeScalingActivities, as it comes."""
        found = self.call("DescribeScalingActivities").accepted().data
        return list(found["Activities"])


def hook(name: str, transition: str) -> dict[str, Any]:
    """A lifecycle hook that outlasts every check."""
    return {
        "LifecycleHookName": name,
        "LifecycleTransition": transition,
        "HeartbeatTimeout": 600,
        "DefaultResult": "CONTINUE",
    }
