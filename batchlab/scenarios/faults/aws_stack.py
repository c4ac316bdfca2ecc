"""Fault injection, zone outages, and shares of Spot Instances in a stack on AWS, with the caller's permissions.

The faults terminate only instances of the stack's groups, and reboot only the stack's database. Every Auto Scaling
group that a fault has changed gets its original settings back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchlab.adapters.aws.endpoint import Endpoint, client, translate_errors
from batchlab.adapters.aws.group_descriptions import is_missing_instance
from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.core.text import first_of
from batchlab.runtime import compose_deployment, stack_connections
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults import services
from batchlab.scenarios.faults.target_grid import (
    FaultAction,
    FaultResult,
    NothingHit,
    Rollback,
    TargetGrid,
    complete,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName

_LAUNCH = ["Launch"]


@contextmanager
def _calling(endpoint: Endpoint, service: Any, what: str) -> Iterator[Any]:
    """Yield a client of the AWS service, and convert errors of the client's calls.

    `what` is the subject of the error texts.
    """
    with closing(client(endpoint, service, connections=1)) as api, translate_errors(what):
        yield api


def _describe_groups(endpoint: Endpoint, names: Sequence[str]) -> list[dict[str, Any]]:
    with _calling(endpoint, "autoscaling", "The Auto Scaling groups") as scaling:
        groups: list[dict[str, Any]] = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=list(names))[
            "AutoScalingGroups"
        ]
        return groups


@dataclass(frozen=True, slots=True)
class _Group:
    """State of a pool's Auto Scaling group before a zone outage.

    `subnets` lists the subnets of the group's zones, if the group has subnets.
    """

    name: str
    zones: tuple[str, ...]
    subnets: tuple[str, ...]
    suspended: bool
    """Whether the group's launches were already suspended before the outage."""
    desired: int
    instances: Mapping[str, str]
    """Zone of each instance of the group."""


class ZoneOutage:
    """Zone outage of the Auto Scaling groups whose names begin with `prefix`.

    During a zone outage, the groups do not use the zone, so no instance is launched in the zone, and the zone's
    instances are killed.
    """

    def __init__(self, endpoint: Endpoint, *, prefix: str) -> None:
        self._endpoint = endpoint
        self._prefix = prefix

    async def lose(
        self,
        grid: TargetGrid,
        fault: Fault,
        *,
        inside: Callable[[str], Awaitable[list[str]]],
        kill: Callable[[Sequence[str]], Awaitable[list[str]]],
    ) -> FaultResult:
        """Remove the fault's zone from the groups for the duration of the fault. If the fault does not name a zone,
        remove the first zone of the groups.

        `inside` lists the living instances of a zone, and `kill` ends instances and describes how they ended.
        """
        names = [self._prefix + pool for pool in await grid.pool_names(fault.pool)]
        groups = await asyncio.to_thread(self._groups, names)
        zones = sorted({zone for group in groups for zone in group.zones})
        zone = _find_zone(fault.zone, zones)
        affected = [group for group in groups if zone in group.zones]
        if not affected:
            raise NothingHit(f"No group launches in the zone {zone!r}: there are {', '.join(zones) or 'none'}.")
        ended: dict[str, str] = {}
        moved: set[str] = set()
        waiting, held_s = 0, 0.0
        subnet_zones = await asyncio.to_thread(self._subnet_zones, affected)
        async with Rollback(grid.over) as undoing:
            for group in affected:
                await undoing.breaking(
                    f"the loss of {zone} by the group {group.name!r}",
                    partial(in_thread, self._return, group, zone),
                    partial(in_thread, self._leave, group, zone, subnet_zones),
                )
            during = await asyncio.to_thread(self._groups, names)
            # A launch that began before the outage may still complete in the zone, and then the new instance is killed.
            while True:
                if instances := await inside(zone):
                    ended |= dict(zip(instances, await kill(instances), strict=False))
                now = await asyncio.to_thread(self._groups, [group.name for group in affected])
                moved |= _launched_elsewhere(affected, now, zone)
                waiting = max(waiting, _count_waiting(affected, now))
                if held_s >= fault.for_s or grid.over.is_set():
                    break
                held_s += await grid.hold(min(1.0, fault.for_s - held_s))
        if not (ended or moved or waiting):
            raise NothingHit(f"No instance was in {zone}, and no launch was pending before its return.")
        how = f" ({first_of(list(ended.values()))})" if ended else ""
        after = await asyncio.to_thread(self._groups, names)
        return FaultResult(
            tuple(ended),
            f"{len(ended)} instances of {zone} died{how}; for {held_s:.1f} s its groups launched in "
            f"{_used_zones(during) or 'no zone'} only, and then in {_used_zones(after)} again; meanwhile {len(moved)} "
            f"were launched elsewhere, and at most {waiting} had to wait",
        )

    def _groups(self, names: Sequence[str]) -> list[_Group]:
        return [
            _Group(
                group["AutoScalingGroupName"],
                tuple(group.get("AvailabilityZones", ())),
                tuple(filter(None, group.get("VPCZoneIdentifier", "").split(","))),
                any(process.get("ProcessName") in _LAUNCH for process in group.get("SuspendedProcesses", ())),
                group.get("DesiredCapacity", 0),
                {instance["InstanceId"]: instance["AvailabilityZone"] for instance in group.get("Instances", ())},
            )
            for group in _describe_groups(self._endpoint, names)
        ]

    def _leave(self, group: _Group, zone: str, subnet_zones: Mapping[str, str]) -> None:
        zones = [name for name in group.zones if name != zone]
        subnets = [subnet for subnet in group.subnets if subnet_zones[subnet] != zone]
        with _calling(self._endpoint, "autoscaling", f"Group {group.name!r}") as scaling:
            if not zones:
                scaling.suspend_processes(AutoScalingGroupName=group.name, ScalingProcesses=_LAUNCH)
            else:
                scaling.update_auto_scaling_group(AutoScalingGroupName=group.name, **_placement(zones, subnets))

    def _return(self, group: _Group, zone: str) -> None:
        with _calling(self._endpoint, "autoscaling", f"Group {group.name!r}") as scaling:
            if group.zones != (zone,):
                placement = _placement(group.zones, group.subnets)
                scaling.update_auto_scaling_group(AutoScalingGroupName=group.name, **placement)
            elif not group.suspended:
                scaling.resume_processes(AutoScalingGroupName=group.name, ScalingProcesses=_LAUNCH)

    def _subnet_zones(self, groups: Sequence[_Group]) -> dict[str, str]:
        names = sorted({subnet for group in groups for subnet in group.subnets})
        if not names:
            return {}
        with _calling(self._endpoint, "ec2", "The subnets") as ec2:
            subnets = ec2.describe_subnets(SubnetIds=names)["Subnets"]
        return {subnet["SubnetId"]: subnet["AvailabilityZone"] for subnet in subnets}


def _used_zones(groups: Sequence[_Group]) -> str:
    return ", ".join(sorted({zone for group in groups if not group.suspended for zone in group.zones}))


def _find_zone(name: str, zones: Sequence[str]) -> str:
    """Return the zone with this name or last letter. If `name` is empty, return the first zone. Return an unknown name
    unchanged.
    """
    if not name:
        return zones[0] if zones else ""
    return next((zone for zone in zones if name in (zone, zone[-1])), name)


def _launched_elsewhere(before: Sequence[_Group], now: Sequence[_Group], zone: str) -> set[str]:
    """Return the instances that were launched in zones other than `zone` during the outage of `zone`."""
    old = {instance for group in before for instance in group.instances}
    instances = (item for group in now for item in group.instances.items())
    return {instance for instance, place in instances if instance not in old and place != zone}


def _count_waiting(before: Sequence[_Group], now: Sequence[_Group]) -> int:
    """Count the instances that are missing in groups whose launches the zone outage has suspended."""
    stopped = {group.name for group in now if group.suspended} - {group.name for group in before if group.suspended}
    return sum(max(0, group.desired - len(group.instances)) for group in now if group.name in stopped)


def _placement(zones: Sequence[str], subnets: Sequence[str]) -> dict[str, Any]:
    """Return a group's subnets, or the group's zones if the group does not have subnets. A subnet implies its zone."""
    return {"VPCZoneIdentifier": ",".join(subnets)} if subnets else {"AvailabilityZones": list(zones)}


_GROUPS_TIMEOUT_S = 60.0
"""Time in seconds within which a new manager must create its Auto Scaling groups."""


@contextmanager
def with_spot_shares(backend: Backend, home: Home, spot: Mapping[str, float]) -> Iterator[None]:
    """Set the share of Spot Instances among the future launches of each pool in `spot`, until the block ends.

    The shares apply only on backends with the capability `sets_spot_share`. A stack on AWS has Spot shares of its own,
    which do not change. Raise BackendError if a call of AWS fails or a group is missing.
    """
    shares = {pool: share for pool, share in spot.items() if share > 0}
    if not backend.capabilities.sets_spot_share or not shares:
        yield
        return
    at = backend.deployment(home)
    endpoint = compose_deployment.autoscaling(home, at)
    names = {f"{at.project}-{pool}": share for pool, share in shares.items()}

    def update(name: str, **changes: Any) -> None:
        with _calling(endpoint, "autoscaling", f"Group {name!r}") as scaling:
            scaling.update_auto_scaling_group(AutoScalingGroupName=name, **changes)

    groups = _wait_for_groups(endpoint, list(names))
    # The exit stack restores every group, even if the restore of another group fails.
    with ExitStack() as stack:
        for name, share in names.items():
            template, policy = _template(groups[name]), groups[name].get("MixedInstancesPolicy")
            original = {"MixedInstancesPolicy": policy} if policy else {"LaunchTemplate": template}
            stack.callback(update, name, **original)
            mixed = {
                "LaunchTemplate": {"LaunchTemplateSpecification": template},
                "InstancesDistribution": {
                    "OnDemandBaseCapacity": 0,
                    "OnDemandPercentageAboveBaseCapacity": round(100 * (1 - min(1.0, share))),
                    "SpotAllocationStrategy": "capacity-optimized",
                },
            }
            update(name, MixedInstancesPolicy=mixed)
        yield


def _wait_for_groups(endpoint: Endpoint, names: Sequence[str]) -> dict[str, Any]:
    deadline_s = time.monotonic() + _GROUPS_TIMEOUT_S
    while True:
        groups = {group["AutoScalingGroupName"]: group for group in _describe_groups(endpoint, names)}
        if len(groups) == len(names):
            return groups
        if time.monotonic() > deadline_s:
            missing = min(set(names) - groups.keys())
            raise Unreachable(f"The group {missing!r} was not created within {_GROUPS_TIMEOUT_S:g} s.")
        time.sleep(0.2)


def _template(group: Mapping[str, Any]) -> dict[str, str]:
    """Return a reference by name to the group's launch template.

    AWS returns the name and the id of a launch template, but accepts only the name or the id.
    """
    template = (
        group.get("LaunchTemplate") or (group["MixedInstancesPolicy"]["LaunchTemplate"]["LaunchTemplateSpecification"])
    )
    return {"LaunchTemplateName": template["LaunchTemplateName"], "Version": template["Version"]}


_BOOT_S = 900.0
"""Timeout in seconds of the replacement of the manager's instance, and of a reboot of the database."""
_POLL_S = 1.0
_ENDING = ("shutting-down", "terminated")


class StackFaults:
    """Fault actions of a stack on AWS."""

    def __init__(self, grid: TargetGrid) -> None:
        self._grid = grid
        self.at = grid.backend.stack(grid.home)
        self._endpoint = Endpoint(region=self.at.region)

    def _states(self, instances: Sequence[str]) -> dict[str, str]:
        with _calling(self._endpoint, "ec2", "The instances") as ec2:
            reservations = ec2.describe_instances(InstanceIds=list(instances))["Reservations"]
        described = (instance for reservation in reservations for instance in reservation["Instances"])
        return {instance["InstanceId"]: instance["State"]["Name"] for instance in described}

    def _terminate(self, instances: Sequence[str]) -> None:
        with _calling(self._endpoint, "ec2", "The instances") as ec2:
            # A normal shutdown drains the instance first, but a crash does not.
            ec2.terminate_instances(InstanceIds=list(instances), SkipOsShutdown=True)

    async def _lifecycle(self, pool: str) -> dict[str, tuple[str, str]]:
        """Return the zone and the lifecycle state of each instance of one pool, or of all pools."""
        names = [self.at.groups_prefix + name for name in await self._grid.pool_names(pool)]
        return {
            instance["InstanceId"]: (instance["AvailabilityZone"], instance["LifecycleState"])
            for group in await asyncio.to_thread(_describe_groups, self._endpoint, names)
            for instance in group.get("Instances", ())
        }

    async def kill(self, fault: Fault) -> FaultResult:
        targets = await self._grid.targets(fault)
        return FaultResult(tuple(targets), first_of(await self.kill_instances(targets)))

    async def kill_instances(self, instances: Sequence[str]) -> list[str]:
        """Terminate instances and return their EC2 states."""
        if not instances:
            return []
        await complete(in_thread(self._terminate, instances))

        async def look() -> dict[str, str]:
            states = await asyncio.to_thread(self._states, instances)
            return states if all(state in _ENDING for state in states.values()) else {}

        states = await wait_for(look, "the end of the instances")
        return [f"{instance}: {states.get(instance, 'gone')}" for instance in instances]

    async def spot_wave(self, fault: Fault) -> FaultResult:
        targets = await self._grid.targets(fault)
        began_s = time.monotonic()
        await asyncio.to_thread(self._send_notices, targets)

        async def look() -> dict[str, str]:
            instances = await self._lifecycle(fault.pool)
            states = {name: instances[name][1] if name in instances else "gone" for name in targets}
            is_seen = all(state == "gone" or state.startswith("Terminat") for state in states.values())
            return states if is_seen else {}

        states = list((await wait_for(look, "the notice in the instances' state")).values())
        alive = list(targets)
        while alive and time.monotonic() - began_s < fault.notice_s and not self._grid.over.is_set():
            await self._grid.hold(_POLL_S)
            instances = await self._lifecycle(fault.pool)
            alive = [name for name in targets if name in instances]
        took_s = time.monotonic() - began_s
        killed = await self.kill_instances(alive)
        seen = sorted({f"{states.count(state)} {state}" for state in states})
        return FaultResult(
            tuple(targets),
            f"after the notice: {', '.join(seen)}; {len(targets) - len(alive)} of {len(targets)} were gone after "
            f"{took_s:.1f} s of {fault.notice_s:g} s, {len(killed)} were terminated",
        )

    def _send_notices(self, instances: Sequence[str]) -> None:
        for instance in instances:
            try:
                with _calling(self._endpoint, "autoscaling", f"Instance {instance}") as scaling:
                    scaling.terminate_instance_in_auto_scaling_group(
                        InstanceId=instance, ShouldDecrementDesiredCapacity=False
                    )
            except Refused as error:
                if not is_missing_instance(error):  # an instance that is missing ended before the call
                    raise

    async def zone_loss(self, fault: Fault) -> FaultResult:
        async def inside(zone: str) -> list[str]:
            instances = await self._lifecycle(fault.pool)
            names = sorted(name for name, (place, _) in instances.items() if place == zone)
            states = await asyncio.to_thread(self._states, names) if names else {}
            return [name for name in names if states.get(name) not in _ENDING]

        zones = ZoneOutage(self._endpoint, prefix=self.at.groups_prefix)
        return await zones.lose(self._grid, fault, inside=inside, kill=self.kill_instances)

    async def crash_manager(self, _: Fault) -> FaultResult:
        owner = (await self._grid.grid())["owner"]
        return FaultResult((owner,), await self._replace_manager(owner))

    async def _replace_manager(self, owner: str) -> str:
        """Terminate the manager's instance, wait for another leader, and return the evidence of the change."""
        instance = await asyncio.to_thread(stack_connections.manager_instance, self.at)
        began_s = time.monotonic()
        (end,) = await self.kill_instances([instance])

        async def look() -> str:
            with suppress(Unreachable):
                successor = await asyncio.to_thread(stack_connections.manager_instance, self.at)
                return successor if successor != instance else ""
            return ""

        successor = await wait_for(look, "another manager's instance", within_s=_BOOT_S)
        leader = await self._grid.leader(after=owner, within_s=_BOOT_S)
        took_s = time.monotonic() - began_s
        return f"{end}; {leader} on {successor} led {took_s:.0f} s later, in place of {owner}"

    async def lose_database(self, fault: Fault) -> FaultResult:
        """Destroy the ledger by the method that suits its kind of database."""
        if self.at.domain:
            return await services.lose_ledger(self._grid, fault)
        jobs = await services.count_jobs(self._grid)
        if not jobs:
            raise NothingHit(services.NO_JOB)
        rebuilt: list[int] = []
        async with Rollback(self._grid.over) as undoing:
            services.add_rebuild(self._grid, undoing, rebuilt)
            if self.at.database:
                target = self.at.database.host
                evidence = await self._reboot(target)
            else:
                # The ledger's file is on the disk of the manager's instance and is lost with the instance.
                target = (await self._grid.grid())["owner"]
                evidence = await self._replace_manager(target)
            held_s = await self._grid.hold(fault.for_s)
            after = await services.count_jobs(self._grid)
        return FaultResult(
            (target,),
            f"{evidence}; of {jobs} jobs the ledger had {after} after the loss, and {rebuilt[-1]} after the rebuild "
            f"from the bucket {held_s:.1f} s later",
        )

    async def _reboot(self, host: str) -> str:
        """Reboot the database at the address `host` and return the observed states of the database."""
        name = await asyncio.to_thread(self._database_at, host)
        began_s = time.monotonic()
        states: list[str] = []

        def reboot() -> None:
            with _calling(self._endpoint, "rds", f"Database {name!r}") as rds:
                states.append(rds.reboot_db_instance(DBInstanceIdentifier=name)["DBInstance"]["DBInstanceStatus"])

        def read_state() -> None:
            with _calling(self._endpoint, "rds", f"Database {name!r}") as rds:
                instances = rds.describe_db_instances(DBInstanceIdentifier=name)["DBInstances"]
                states.append(instances[0]["DBInstanceStatus"])

        await complete(in_thread(reboot))

        async def is_available() -> bool:
            await asyncio.to_thread(read_state)
            return states[-1] == "available"

        await wait_for(is_available, "the end of the reboot", within_s=_BOOT_S)
        took_s = time.monotonic() - began_s
        return f"RDS rebooted {name}: {', '.join(dict.fromkeys(states))} after {took_s:.0f} s"

    def _database_at(self, host: str) -> str:
        with _calling(self._endpoint, "rds", "The databases") as rds:
            pages = rds.get_paginator("describe_db_instances").paginate()
            for instance in (instance for page in pages for instance in page["DBInstances"]):
                if instance.get("Endpoint", {}).get("Address") == host:
                    return str(instance["DBInstanceIdentifier"])
        raise BackendError(
            f"No DB instance has the address {host}.", remedy="`batchlab deploy status` shows the parts of the stack."
        )


def actions(grid: TargetGrid) -> Mapping[FaultName, FaultAction]:
    """Return the action of each fault that a stack on AWS supports according to the table of faults."""
    stack = StackFaults(grid)
    return {
        FaultName.KILL: stack.kill,
        FaultName.SPOT_WAVE: stack.spot_wave,
        FaultName.ZONE_LOSS: stack.zone_loss,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, grid),
        FaultName.SQS_DELAYS: partial(services.delays, grid),
        FaultName.MANAGER_CRASH: stack.crash_manager,
        FaultName.DATABASE_LOSS: stack.lose_database,
    }
