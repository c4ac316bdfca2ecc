"""What a pool's Auto Scaling group is made of.

The tags of a grid's instances, by which a worker learns what it is there for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchlab.core.model import Pool

if TYPE_CHECKING:
    from mypy_boto3_autoscaling.type_defs import (
        CreateAutoScalingGroupTypeTypeDef,
        LifecycleHookSpecificationTypeDef,
        TagTypeDef,
    )

POOL_TAG = "batchlab:pool"
SLOTS_TAG = "batchlab:slots"


READY_HOOK = "batchlab-ready"
DRAIN_HOOK = "batchlab-drain"
NOT_THERE = ("is not part of Auto Scaling group", "Instance Id not found")
"""What EC2 Auto Scaling says of an instance that its group no longer has."""
NO_ACTION = "No active Lifecycle Action"
"""What AWS says where an instance does not wait in the hook, or no longer."""
_TIMEOUT_S = (30.0, 7200.0)
"""What AWS allows for a hook."""


@dataclass(frozen=True, slots=True)
class GroupForm:
    """What the groups of a grid have in common. An instance has `boot_s` of its pool and
    `report_s` until its worker must report, and `drain_s` in Terminating:Wait to hand back its
    work; with 0 it does not wait there."""

    template: str
    """Name of the launch template; {pool} in it is the pool's name."""
    version: str = "$Default"
    zones: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    report_s: float = 60.0
    drain_s: float = 120.0

    def request(self, name: str, pool: Pool) -> CreateAutoScalingGroupTypeTypeDef:
        """CreateAutoScalingGroup's parameters for the pool."""
        request: CreateAutoScalingGroupTypeTypeDef = {
            "AutoScalingGroupName": name,
            "LaunchTemplate": {
                "LaunchTemplateName": self.template.replace("{pool}", pool.name),
                "Version": self.version,
            },
            "MinSize": pool.min_size,
            "MaxSize": pool.max_size,
            "DesiredCapacity": pool.min_size,
            # Our own policy has cooldowns.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            # It has the least warm state (code, child processes) to lose.
            "TerminationPolicies": ["NewestInstance"],
            "LifecycleHookSpecificationList": self.hooks(pool),
            "Tags": [
                _tag(POOL_TAG, pool.name),
                _tag(SLOTS_TAG, str(pool.slots)),
            ],
        }
        if self.subnets:
            request["VPCZoneIdentifier"] = ",".join(self.subnets)
        if self.zones:
            request["AvailabilityZones"] = list(self.zones)
        return request

    def hooks(self, pool: Pool) -> list[LifecycleHookSpecificationTypeDef]:
        """The hooks that its instances wait in."""
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
    least_s, most_s = _TIMEOUT_S
    return int(min(most_s, max(least_s, seconds)))


def is_gone(error: Exception) -> bool:
    """Whether the service has refused because it no longer has the instance."""
    return any(words in str(error) for words in NOT_THERE)
