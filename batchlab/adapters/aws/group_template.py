"""Parameters of a pool's Auto Scaling group, and the tags of its instances.

A worker reads its pool and its number of slots from the tags.
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
"""Texts of EC2 Auto Scaling's errors for an instance that its group no longer contains."""
NO_ACTION = "No active Lifecycle Action"
"""Text of AWS's error for an instance that does not wait in the hook."""
_TIMEOUT_S = (30.0, 7200.0)
"""Minimum and maximum timeout of a hook on AWS."""


@dataclass(frozen=True, slots=True)
class GroupForm:
    """Common parameters of the groups of a grid.

    After a launch, the worker must report within the pool's `boot_s` plus `report_s`. In
    Terminating:Wait, it has `drain_s` to return its work. With 0 the instance does not wait there.
    """

    template: str
    """Name of the launch template. "{pool}" in it stands for the pool's name."""
    version: str = "$Default"
    zones: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    report_s: float = 60.0
    drain_s: float = 120.0

    def request(self, name: str, pool: Pool) -> CreateAutoScalingGroupTypeTypeDef:
        """Return the pool's parameters of CreateAutoScalingGroup."""
        request: CreateAutoScalingGroupTypeTypeDef = {
            "AutoScalingGroupName": name,
            "LaunchTemplate": {
                "LaunchTemplateName": self.template.replace("{pool}", pool.name),
                "Version": self.version,
            },
            "MinSize": pool.min_size,
            "MaxSize": pool.max_size,
            "DesiredCapacity": pool.min_size,
            # batchlab's scaling policy has its own cooldowns.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            # The newest instance has the least warm state (code, child processes) to lose.
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
    least_s, most_s = _TIMEOUT_S
    return int(min(most_s, max(least_s, seconds)))


def is_gone(error: Exception) -> bool:
    """Return whether the service refused a request because it no longer has the instance."""
    return any(words in str(error) for words in NOT_THERE)
