"""Zone outages and Spot shares by changes of EC2 Auto Scaling groups.

In an outage the groups leave the zone, so nothing is launched there, and its instances are killed.
Spot shares let the pools of a grid in containers launch Spot Instances, which a Spot wave can
interrupt. Every group gets its original settings back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.endpoint import Endpoint, client, translated
from batchlab.core.errors import Unreachable
from batchlab.core.text import first_of
from batchlab.runtime.compose import deployment
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.rollback import Rollback, in_thread
from batchlab.scenarios.faults.target_grid import FaultResult, TargetGrid
from batchlab.scenarios.model.values import Fault

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient

_LAUNCH = ["Launch"]


@dataclass(frozen=True, slots=True)
class _Group:
    """A pool's group before the outage. `subnets` are those of its zones, if it has any."""

    name: str
    zones: tuple[str, ...]
    subnets: tuple[str, ...]
    suspended: bool
    """Whether its launches were already suspended."""
    desired: int
    instances: Mapping[str, str]
    """Zone of each instance."""


class ZoneOutage:
    """Zone outage of the groups whose names begin with `prefix`."""

    def __init__(self, endpoint: Endpoint, *, prefix: str) -> None:
        self._endpoint = endpoint
        self._prefix = prefix

    async def lose(
        self,
        scene: TargetGrid,
        fault: Fault,
        *,
        inside: Callable[[str], Awaitable[list[str]]],
        kill: Callable[[Sequence[str]], Awaitable[list[str]]],
    ) -> FaultResult:
        """Remove the fault's zone for its time; without a name, the first zone of the groups.

        `inside` lists the living instances of a zone, and `kill` ends instances and reports how.
        """
        pools = [pool["name"] for pool in (await scene.grid())["pools"]]
        names = [self._prefix + one for one in pools if fault.pool in ("", one)]
        groups = await asyncio.to_thread(self._groups, names)
        every = sorted({zone for group in groups for zone in group.zones})
        zone = _find_zone(fault.zone, every)
        hit = [group for group in groups if zone in group.zones]
        if not hit:
            return FaultResult(
                impossible=f"No group launches in the zone {zone!r}: there are "
                f"{', '.join(every) or 'none'}."
            )
        ended: dict[str, str] = {}
        moved: set[str] = set()
        waited = 0
        homes = await asyncio.to_thread(self._zones_of, hit)
        async with Rollback(scene.over) as undoing:
            for group in hit:
                await undoing.breaking(
                    f"the loss of {zone} by the group {group.name!r}",
                    partial(in_thread, self._return, group, zone),
                    partial(in_thread, self._leave, group, zone, homes),
                )
            left = await asyncio.to_thread(self._groups, names)
            # A launch in progress still completes in the zone, and then its instance is killed.
            waited_s = 0.0
            while True:
                if there := await inside(zone):
                    ended |= dict(zip(there, await kill(there), strict=False))
                now = await asyncio.to_thread(self._groups, [group.name for group in hit])
                moved |= _launched_elsewhere(hit, now, zone)
                waited = max(waited, _count_waiting(hit, now))
                if waited_s >= fault.for_s or scene.over.is_set():
                    break
                waited_s += await scene.hold(min(1.0, fault.for_s - waited_s))
        if not (ended or moved or waited):
            return FaultResult(
                impossible=f"No instance was in {zone}, and no launch was pending before its "
                "return."
            )
        rest = sorted({one for group in left if not group.suspended for one in group.zones})
        how = f" ({first_of(list(ended.values()))})" if ended else ""
        return FaultResult(
            tuple(ended),
            f"{len(ended)} instances of {zone} died{how}; for {waited_s:.1f} s its groups "
            f"launched in {', '.join(rest) or 'no zone'} only, and "
            f"then in {', '.join(await asyncio.to_thread(self._in_use, names))} again; meanwhile "
            f"{len(moved)} were launched elsewhere, and {waited} at the most had to wait",
        )

    def _groups(self, names: Sequence[str]) -> list[_Group]:
        with closing(client(self._endpoint, "autoscaling", connections=1)) as scaling:
            with translated("The Auto Scaling groups"):
                told = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=list(names))
            return [
                _Group(
                    one["AutoScalingGroupName"],
                    tuple(one.get("AvailabilityZones", ())),
                    tuple(filter(None, one.get("VPCZoneIdentifier", "").split(","))),
                    any(p.get("ProcessName") in _LAUNCH for p in one.get("SuspendedProcesses", ())),
                    one.get("DesiredCapacity", 0),
                    {i["InstanceId"]: i["AvailabilityZone"] for i in one.get("Instances", ())},
                )
                for one in told["AutoScalingGroups"]
            ]

    def _in_use(self, names: Sequence[str]) -> list[str]:
        groups = self._groups(names)
        return sorted({zone for one in groups if not one.suspended for zone in one.zones})

    def _leave(self, group: _Group, zone: str, homes: Mapping[str, str]) -> None:
        zones = [one for one in group.zones if one != zone]
        subnets = [one for one in group.subnets if homes[one] != zone]
        scaling = client(self._endpoint, "autoscaling", connections=1)
        with closing(scaling), translated(f"Group {group.name!r}"):
            if not zones:
                scaling.suspend_processes(AutoScalingGroupName=group.name, ScalingProcesses=_LAUNCH)
            else:
                scaling.update_auto_scaling_group(
                    AutoScalingGroupName=group.name, **_placement(zones, subnets)
                )

    def _return(self, group: _Group, zone: str) -> None:
        scaling = client(self._endpoint, "autoscaling", connections=1)
        with closing(scaling), translated(f"Group {group.name!r}"):
            if group.zones != (zone,):
                scaling.update_auto_scaling_group(
                    AutoScalingGroupName=group.name, **_placement(group.zones, group.subnets)
                )
            elif not group.suspended:
                scaling.resume_processes(AutoScalingGroupName=group.name, ScalingProcesses=_LAUNCH)

    def _zones_of(self, groups: Sequence[_Group]) -> dict[str, str]:
        """Return the zone of each subnet of the groups."""
        subnets = [subnet for group in groups for subnet in group.subnets]
        if not subnets:
            return {}
        with (
            closing(client(self._endpoint, "ec2", connections=1)) as ec2,
            translated("The subnets"),
        ):
            told = ec2.describe_subnets(SubnetIds=sorted(set(subnets)))["Subnets"]
        return {one["SubnetId"]: one["AvailabilityZone"] for one in told}


def _find_zone(name: str, zones: Sequence[str]) -> str:
    """Return the zone by its name or last letter; the first zone for an empty name.

    Return the name itself if there is no such zone.
    """
    if not name:
        return zones[0] if zones else ""
    return next((one for one in zones if name in (one, one[-1])), name)


def _launched_elsewhere(before: Sequence[_Group], now: Sequence[_Group], zone: str) -> set[str]:
    """Return the instances launched in other zones since then."""
    old = {one for group in before for one in group.instances}
    return {
        one
        for group in now
        for one, where in group.instances.items()
        if one not in old and where != zone
    }


def _count_waiting(before: Sequence[_Group], now: Sequence[_Group]) -> int:
    """Count the missing instances of groups that cannot launch without a zone."""
    stopped = {group.name for group in now if group.suspended}
    stopped -= {group.name for group in before if group.suspended}
    return sum(max(0, one.desired - len(one.instances)) for one in now if one.name in stopped)


def _placement(zones: Sequence[str], subnets: Sequence[str]) -> dict[str, Any]:
    """Return zones or subnets as AWS accepts them: only one of both, because a subnet implies its
    zone.
    """
    if subnets:
        return {"VPCZoneIdentifier": ",".join(subnets)}
    return {"AvailabilityZones": list(zones)}


_MADE_S = 60.0
"""Time in which a new manager must create its groups."""


@contextmanager
def with_spot_shares(backend: Backend, home: Home, spot: Mapping[str, float]) -> Iterator[None]:
    """Let each of these pools launch this share as Spot Instances; existing instances stay.

    Do nothing on other backends: processes have no market, and a stack on AWS has its own shares.
    Raise BackendError.
    """
    wanted = {pool: share for pool, share in spot.items() if share > 0}
    if not backend.capabilities.sets_spot_share or not wanted:
        yield
        return
    at = backend.deployment(home)
    scaling = client(deployment.autoscaling(home, at), "autoscaling", connections=1)
    with closing(scaling):
        groups = _wait_for_groups(scaling, [f"{at.project}-{pool}" for pool in wanted])
        # Every group is restored, even if another one failed.
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
    """Wait until all groups exist and return them."""
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
    """Return the group's launch settings as arguments of an update."""
    if policy := group.get("MixedInstancesPolicy"):
        return {"MixedInstancesPolicy": policy}
    return {"LaunchTemplate": _template(group)}


def _template(group: Mapping[str, Any]) -> dict[str, str]:
    """Return the launch template by name. AWS accepts a name or an id, but returns both."""
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
