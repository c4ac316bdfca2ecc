"""Faults of a stack on AWS, with the caller's own permissions.

Only instances of the stack's groups are terminated, and only its database is rebooted.

Zone outages and Spot shares by changes of EC2 Auto Scaling groups.

In an outage the groups leave the zone, so nothing is launched there, and its instances are killed.
Spot shares let the pools of a grid in containers launch Spot Instances, which a Spot wave can
interrupt. Every group gets its original settings back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.endpoint import Endpoint, client, translated
from batchlab.adapters.aws.group_descriptions import is_missing_instance
from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.core.text import first_of
from batchlab.runtime import compose_deployment, stack_connections
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults import services
from batchlab.scenarios.faults.target_grid import (
    NO_INSTANCE,
    FaultAction,
    FaultResult,
    Rollback,
    TargetGrid,
    complete,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName

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
                impossible=f"No group launches in the zone {zone!r}: there are {', '.join(every) or 'none'}."
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
            return FaultResult(impossible=f"No instance was in {zone}, and no launch was pending before its return.")
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
        return sorted({zone for group in groups if not group.suspended for zone in group.zones})

    def _leave(self, group: _Group, zone: str, homes: Mapping[str, str]) -> None:
        zones = [one for one in group.zones if one != zone]
        subnets = [subnet for subnet in group.subnets if homes[subnet] != zone]
        scaling = client(self._endpoint, "autoscaling", connections=1)
        with closing(scaling), translated(f"Group {group.name!r}"):
            if not zones:
                scaling.suspend_processes(AutoScalingGroupName=group.name, ScalingProcesses=_LAUNCH)
            else:
                scaling.update_auto_scaling_group(AutoScalingGroupName=group.name, **_placement(zones, subnets))

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
        with closing(client(self._endpoint, "ec2", connections=1)) as ec2, translated("The subnets"):
            told = ec2.describe_subnets(SubnetIds=sorted(set(subnets)))["Subnets"]
        return {one["SubnetId"]: one["AvailabilityZone"] for one in told}


def _find_zone(name: str, zones: Sequence[str]) -> str:
    """Return the zone by its name or last letter; the first zone for an empty name.

    Return the name itself if there is no such zone.
    """
    if not name:
        return zones[0] if zones else ""
    return next((zone for zone in zones if name in (zone, zone[-1])), name)


def _launched_elsewhere(before: Sequence[_Group], now: Sequence[_Group], zone: str) -> set[str]:
    """Return the instances launched in other zones since then."""
    old = {instance for group in before for instance in group.instances}
    return {one for group in now for one, where in group.instances.items() if one not in old and where != zone}


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
    scaling = client(compose_deployment.autoscaling(home, at), "autoscaling", connections=1)
    with closing(scaling):
        groups = _wait_for_groups(scaling, [f"{at.project}-{pool}" for pool in wanted])
        # Every group is restored, even if another one failed.
        with ExitStack() as stack:
            for pool, share in wanted.items():
                name = f"{at.project}-{pool}"
                stack.callback(_update, scaling, name, **_launch_settings(groups[name]))
                _update(scaling, name, MixedInstancesPolicy=_mixed_policy(_template(groups[name]), share))
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
        group.get("LaunchTemplate") or (group["MixedInstancesPolicy"]["LaunchTemplate"]["LaunchTemplateSpecification"])
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


_BOOT_S = 900.0
"""Timeout of the replacement of the manager's instance and of a database reboot."""
_LOOK_S = 1.0
_GOING = ("shutting-down", "terminated")


class StackFaults:
    """Faults of the stack."""

    def __init__(self, scene: TargetGrid) -> None:
        self._scene = scene
        self.at = scene.backend.stack(scene.home)
        self._endpoint = Endpoint(region=self.at.region)

    def _states(self, instances: Sequence[str]) -> dict[str, str]:
        """Return the EC2 state of each instance."""
        with closing(client(self._endpoint, "ec2", connections=1)) as ec2:
            with translated("The instances"):
                told = ec2.describe_instances(InstanceIds=list(instances))
            return {
                one["InstanceId"]: one["State"]["Name"]
                for reservation in told["Reservations"]
                for one in reservation["Instances"]
            }

    def _terminate(self, instances: Sequence[str]) -> None:
        ec2 = client(self._endpoint, "ec2", connections=1)
        with closing(ec2), translated("The instances"):
            # A normal shutdown drains first, which a crash does not.
            ec2.terminate_instances(InstanceIds=list(instances), SkipOsShutdown=True)

    def _lifecycle(self, pools: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return the zone and the lifecycle state of each instance of these pools."""
        names = [self.at.groups_prefix + pool for pool in pools]
        with closing(client(self._endpoint, "autoscaling", connections=1)) as scaling:
            with translated("The Auto Scaling groups"):
                told = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=names)
            return {
                one["InstanceId"]: (one["AvailabilityZone"], one["LifecycleState"])
                for group in told["AutoScalingGroups"]
                for one in group.get("Instances", ())
            }

    async def _instances(self, pool: str) -> dict[str, tuple[str, str]]:
        pools = [one["name"] for one in (await self._scene.grid())["pools"]]
        wanted = [one for one in pools if pool in ("", one)]
        return await asyncio.to_thread(self._lifecycle, wanted)

    async def kill(self, fault: Fault) -> FaultResult:
        hit = await self._scene.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        return FaultResult(tuple(hit), first_of(await self.killed(hit)))

    async def killed(self, instances: Sequence[str]) -> list[str]:
        """Terminate instances and return their EC2 states."""
        if not instances:
            return []
        await complete(in_thread(self._terminate, instances))

        async def look() -> dict[str, str]:
            states = await asyncio.to_thread(self._states, instances)
            return states if all(state in _GOING for state in states.values()) else {}

        states = await wait_for(look, "the end of the instances")
        return [f"{instance}: {states.get(instance, 'gone')}" for instance in instances]

    async def spot_wave(self, fault: Fault) -> FaultResult:
        hit = await self._scene.hit(fault)
        if not hit:
            return FaultResult(impossible=NO_INSTANCE)
        began_s = time.monotonic()
        await asyncio.to_thread(self._ask_to_leave, hit)

        async def leaving() -> dict[str, str]:
            there = await self._instances(fault.pool)
            said = {one: there[one][1] if one in there else "gone" for one in hit}
            told = all(one == "gone" or one.startswith("Terminat") for one in said.values())
            return said if told else {}

        told = await wait_for(leaving, "the notice in the instances' state")
        left = list(hit)
        while left and time.monotonic() - began_s < fault.notice_s:
            if self._scene.over.is_set():
                break
            await self._scene.hold(_LOOK_S)
            there = await self._instances(fault.pool)
            left = [one for one in hit if one in there]
        took_s = time.monotonic() - began_s
        forced = await self.killed(left)
        states = sorted({f"{list(told.values()).count(s)} {s}" for s in told.values()})
        return FaultResult(
            tuple(hit),
            f"told to leave: {', '.join(states)}; {len(hit) - len(left)} of {len(hit)} were gone "
            f"after {took_s:.1f} s of {fault.notice_s:g} s, {len(forced)} were ended by force",
        )

    def _ask_to_leave(self, instances: Sequence[str]) -> None:
        with closing(client(self._endpoint, "autoscaling", connections=1)) as scaling:
            for instance in instances:
                try:
                    with translated(f"Instance {instance}"):
                        scaling.terminate_instance_in_auto_scaling_group(
                            InstanceId=instance, ShouldDecrementDesiredCapacity=False
                        )
                except Refused as error:
                    if not is_missing_instance(error):  # otherwise it ended before the call
                        raise

    async def zone_loss(self, fault: Fault) -> FaultResult:
        async def inside(zone: str) -> list[str]:
            there = await self._instances(fault.pool)
            found = sorted(one for one, (where, _) in there.items() if where == zone)
            if not found:
                return []
            states = await asyncio.to_thread(self._states, found)
            return [one for one in found if states.get(one) not in _GOING]

        zones = ZoneOutage(self._endpoint, prefix=self.at.groups_prefix)
        return await zones.lose(self._scene, fault, inside=inside, kill=self.killed)

    async def crash_manager(self, _: Fault) -> FaultResult:
        owner = (await self._scene.grid())["owner"]
        return FaultResult((owner,), await self._replaced(owner))

    async def _replaced(self, owner: str) -> str:
        """Terminate the manager's instance, wait for another leader, and return the evidence."""
        instance = await asyncio.to_thread(stack_connections.manager_instance, self.at)
        began_s = time.monotonic()
        (said,) = await self.killed([instance])

        async def successor() -> str:
            with suppress(Unreachable):
                found = await asyncio.to_thread(stack_connections.manager_instance, self.at)
                return found if found != instance else ""
            return ""

        other = await wait_for(successor, "another manager's instance", within_s=_BOOT_S)
        leader = await self._scene.leader(after=owner, within_s=_BOOT_S)
        return f"{said}; {leader} on {other} led {time.monotonic() - began_s:.0f} s later, where {owner} had"

    async def lose_database(self, fault: Fault) -> FaultResult:
        """Lose the ledger in the way that its kind allows."""
        if self.at.domain:
            return await services.lose_ledger(self._scene, fault)
        had = await services.count_jobs(self._scene)
        if not had:
            return FaultResult(impossible=services.NO_JOB)
        found: list[int] = []
        async with Rollback(self._scene.over) as undoing:
            services.add_rebuild(self._scene, undoing, found)
            if self.at.database:
                said = await self._rebooted(self.at.database.host)
                target = self.at.database.host
            else:
                # The ledger's file is on the disk of the manager's instance and is lost with it.
                owner = (await self._scene.grid())["owner"]
                said, target = await self._replaced(owner), owner
            away_s = await self._scene.hold(fault.for_s)
            left = await services.count_jobs(self._scene)
        return FaultResult(
            (target,),
            f"{said}; of {had} jobs the ledger knew {left} then, and {found[-1]} once it was "
            f"rebuilt from the bucket {away_s:.1f} s later",
        )

    async def _rebooted(self, host: str) -> str:
        """Reboot the database at this address and return its states."""
        name = await asyncio.to_thread(self._database_at, host)
        began_s = time.monotonic()
        seen: list[str] = []

        def reboot() -> None:
            rds = client(self._endpoint, "rds", connections=1)
            with closing(rds), translated(f"Database {name!r}"):
                told = rds.reboot_db_instance(DBInstanceIdentifier=name)["DBInstance"]
            seen.append(told["DBInstanceStatus"])

        def status() -> str:
            rds = client(self._endpoint, "rds", connections=1)
            with closing(rds), translated(f"Database {name!r}"):
                told = rds.describe_db_instances(DBInstanceIdentifier=name)["DBInstances"]
            return str(told[0]["DBInstanceStatus"])

        await complete(in_thread(reboot))

        async def is_back() -> bool:
            seen.append(await asyncio.to_thread(status))
            return seen[-1] == "available"

        await wait_for(is_back, "the end of the reboot", within_s=_BOOT_S)
        told = ", ".join(dict.fromkeys(seen))
        return f"RDS rebooted {name}: {told} after {time.monotonic() - began_s:.0f} s"

    def _database_at(self, host: str) -> str:
        """Return the name of the DB instance at this address."""
        rds = client(self._endpoint, "rds", connections=1)
        with closing(rds), translated("The databases"):
            for page in rds.get_paginator("describe_db_instances").paginate():
                for one in page["DBInstances"]:
                    if one.get("Endpoint", {}).get("Address") == host:
                        return str(one["DBInstanceIdentifier"])
        raise BackendError(
            f"There is no DB instance at {host}.", remedy="`batchlab deploy status` says what the stack has."
        )


def actions(scene: TargetGrid) -> Mapping[FaultName, FaultAction]:
    """Return the faults that the table declares possible."""
    stack_faults = StackFaults(scene)
    return {
        FaultName.KILL: stack_faults.kill,
        FaultName.SPOT_WAVE: stack_faults.spot_wave,
        FaultName.ZONE_LOSS: stack_faults.zone_loss,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, scene),
        FaultName.SQS_DELAYS: partial(services.delays, scene),
        FaultName.MANAGER_CRASH: stack_faults.crash_manager,
        FaultName.DATABASE_LOSS: stack_faults.lose_database,
    }
