"""Auto Scaling group of a single check, with short methods for the calls.

Invariants: checks do not share groups. Every wait has a deadline. An event that must not happen is
watched for `QUIET_S` seconds.
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
"""If an event does not happen within this time in seconds, it counts as not happening."""

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"

IN_SERVICE = "InService"
_MOST = 3


class OwnGroup:
    """Group of a single check. It may not exist yet."""

    def __init__(self, site: Site) -> None:
        self._target = site.target
        self.name = site.new_name()

    def create(self, **more: Any) -> Answer:
        """Call CreateAutoScalingGroup.

        The defaults are 0 to 3 instances from the run's template.
        """
        asked = {
            "MinSize": 0,
            "MaxSize": _MOST,
            "AvailabilityZones": [self._target.zone],
            "LaunchTemplate": {"LaunchTemplateName": self._target.template},
            # A cooldown would delay most checks.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            **more,
        }
        return answer("CreateAutoScalingGroup", lambda: self._target.create_group(self.name, asked))

    def grown(self, size: int, **more: Any) -> list[str]:
        """Create the group with `size` instances. Return their ids when all are InService."""
        self.create(DesiredCapacity=size, **more).accepted()
        return self.has(size)

    def call(self, action: str, **request: Any) -> Answer:
        """Call an action on this group, by its AWS name."""
        return self.ask(action, AutoScalingGroupName=self.name, **request)

    def ask(self, action: str, **request: Any) -> Answer:
        """Call an action with exactly this request."""
        method = getattr(self._target.asg, snake(action))
        return answer(action, lambda: method(**request))

    def size(self, desired: int, *, cooldown: bool = False) -> Answer:
        """Call SetDesiredCapacity. `cooldown` sets HonorCooldown."""
        return self.call("SetDesiredCapacity", DesiredCapacity=desired, HonorCooldown=cooldown)

    def terminate(self, instance: str, *, decrement: bool) -> Answer:
        """Call TerminateInstanceInAutoScalingGroup."""
        return self.ask(
            "TerminateInstanceInAutoScalingGroup",
            InstanceId=instance,
            ShouldDecrementDesiredCapacity=decrement,
        )

    def protect(self, *instances: str) -> Answer:
        """Call SetInstanceProtection to protect the instances."""
        return self.call(
            "SetInstanceProtection", InstanceIds=list(instances), ProtectedFromScaleIn=True
        )

    def complete(self, hook: str, instance: str) -> Answer:
        """Call CompleteLifecycleAction with CONTINUE."""
        return self.call(
            "CompleteLifecycleAction",
            LifecycleHookName=hook,
            InstanceId=instance,
            LifecycleActionResult="CONTINUE",
        )

    # --- Queries ----------------------------------------------------------------------------------

    def described(self) -> list[dict[str, Any]]:
        """Return the groups with this name from DescribeAutoScalingGroups."""
        found = self.ask("DescribeAutoScalingGroups", AutoScalingGroupNames=[self.name])
        return list(found.accepted().data["AutoScalingGroups"])

    def now(self) -> dict[str, Any]:
        """Return the current description of the group."""
        found = self.described()
        if len(found) != 1:
            raise Differs(f"{len(found)} groups of its name are described")
        return found[0]

    @property
    def desired(self) -> int:
        return int(self.now()["DesiredCapacity"])

    def ids(self, state: str = "") -> list[str]:
        """Return the ids of the instances in this state, or of all instances."""
        some = self.now().get("Instances", ())
        return [one["InstanceId"] for one in some if state in ("", one["LifecycleState"])]

    def until(self, holds: Callable[[], T], otherwise: str) -> T:
        """Return the first true value of `holds`.

        Raise Differs(otherwise) if there is none in time.
        """
        ends_s = time.monotonic() + self._target.appears_s
        while not (found := holds()):
            if time.monotonic() > ends_s:
                raise Differs(otherwise)
            time.sleep(0.1)
        return found

    def has(self, size: int) -> list[str]:
        """Wait until the group has exactly `size` instances, all InService. Return their ids."""

        def all_so() -> bool:
            return len(self.ids()) == len(self.ids(IN_SERVICE)) == size

        self.until(all_so, f"it never has {size} in all, {IN_SERVICE}")
        return self.ids(IN_SERVICE)

    def waits(self, state: str) -> str:
        """Return the only instance that reaches this state and stays in it for
        `QUIET_S` seconds.
        """
        self.until(lambda: self.ids(state), f"no instance reaches {state}")
        time.sleep(QUIET_S)
        found = self.ids(state)
        if len(found) != 1:
            raise Differs(f"it does not stay in {state}")
        return found[0]

    def activities(self) -> Sequence[dict[str, Any]]:
        """Return the activities from DescribeScalingActivities."""
        found = self.call("DescribeScalingActivities").accepted().data
        return list(found["Activities"])


def hook(name: str, transition: str) -> dict[str, Any]:
    """Return a lifecycle hook whose timeout is longer than any check."""
    return {
        "LifecycleHookName": name,
        "LifecycleTransition": transition,
        "HeartbeatTimeout": 600,
        "DefaultResult": "CONTINUE",
    }
