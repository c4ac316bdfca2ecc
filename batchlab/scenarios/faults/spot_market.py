"""The Spot share of a grid in containers: what its pools launch while a scenario runs is bought as
the scenario says, so that there are Spot Instances that a wave can take.

Invariant: every group is left as it was found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.endpoint import client, translated
from batchlab.core.errors import Unreachable
from batchlab.runtime.compose import deployment
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient

_MADE_S = 60.0
"""So long a manager that has just started may take to make its groups."""


@contextmanager
def with_spot_shares(backend: Backend, home: Home, spot: Mapping[str, float]) -> Iterator[None]:
    """In a grid that is up, each of these pools buys that share of what it launches as Spot
    Instances; those that are there stay what they are. Nothing on other backends: processes have
    no market, and a stack on AWS has its own. BackendError."""
    wanted = {pool: share for pool, share in spot.items() if share > 0}
    if not backend.capabilities.sets_spot_share or not wanted:
        yield
        return
    at = backend.deployment(home)
    scaling = client(deployment.autoscaling(home, at), "autoscaling", connections=1)
    with closing(scaling):
        groups = _wait_for_groups(scaling, [f"{at.project}-{pool}" for pool in wanted])
        # Each is given back though another one was not.
        with ExitStack() as stack:
            for pool, share in wanted.items():
                name = f"{at.project}-{pool}"
                stack.callback(_update, scaling, name, **_launch_settings(groups[name]))
                _update(
                    scaling,
                    name,
                    MixedInstancesPolicy=_mixed_policy(_template(groups[name]), share),
                )
            yield


def _wait_for_groups(scaling: AutoScalingClient, names: Sequence[str]) -> dict[str, Any]:
    """The groups, once all are there."""
    give_up_s = time.monotonic() + _MADE_S
    while True:
        with translated("The Auto Scaling groups"):
            told = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=list(names))
        found = {one["AutoScalingGroupName"]: one for one in told["AutoScalingGroups"]}
        if len(found) == len(names):
            return found
        if time.monotonic() > give_up_s:
            missing = min(set(names) - found.keys())
            raise Unreachable(f"The group {missing!r} was not made within {_MADE_S:g} s.")
        time.sleep(0.2)


def _update(scaling: AutoScalingClient, name: str, **changes: Any) -> None:
    with translated(f"Group {name!r}"):
        scaling.update_auto_scaling_group(AutoScalingGroupName=name, **changes)


def _launch_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What it was launched from, as an update takes it."""
    if policy := group.get("MixedInstancesPolicy"):
        return {"MixedInstancesPolicy": policy}
    return {"LaunchTemplate": _template(group)}


def _template(group: Mapping[str, Any]) -> dict[str, str]:
    """By its name: AWS takes name or id, and tells both."""
    found = (
        group.get("LaunchTemplate")
        or (group["MixedInstancesPolicy"]["LaunchTemplate"]["LaunchTemplateSpecification"])
    )
    return {"LaunchTemplateName": found["LaunchTemplateName"], "Version": found["Version"]}


def _mixed_policy(template: Mapping[str, str], share: float) -> dict[str, Any]:
    return {
        "LaunchTemplate": {"LaunchTemplateSpecification": template},
        "InstancesDistribution": {
            "OnDemandBaseCapacity": 0,
            "OnDemandPercentageAboveBaseCapacity": round(100 * (1 - min(1.0, share))),
            "SpotAllocationStrategy": "capacity-optimized",
        },
    }
