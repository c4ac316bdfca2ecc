"""Faults of a stack on AWS, with the caller's own permissions.

Only instances of the stack's groups are terminated, and only its database is rebooted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial

from batchlab.adapters.aws.endpoint import Endpoint, client, translated
from batchlab.adapters.aws.group_template import is_gone
from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.core.text import first_of
from batchlab.runtime.aws import session_manager
from batchlab.scenarios.faults import services
from batchlab.scenarios.faults.autoscaling_groups import ZoneOutage
from batchlab.scenarios.faults.rollback import Rollback, complete, in_thread
from batchlab.scenarios.faults.target_grid import (
    NO_INSTANCE,
    FaultAction,
    FaultResult,
    TargetGrid,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName

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
            return states if all(one in _GOING for one in states.values()) else {}

        states = await wait_for(look, "the end of the instances")
        return [f"{one}: {states.get(one, 'gone')}" for one in instances]

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
            for one in instances:
                try:
                    with translated(f"Instance {one}"):
                        scaling.terminate_instance_in_auto_scaling_group(
                            InstanceId=one, ShouldDecrementDesiredCapacity=False
                        )
                except Refused as error:
                    if not is_gone(error):  # otherwise it ended before the call
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
        instance = await asyncio.to_thread(session_manager.manager_instance, self.at)
        began_s = time.monotonic()
        (said,) = await self.killed([instance])

        async def successor() -> str:
            with suppress(Unreachable):
                found = await asyncio.to_thread(session_manager.manager_instance, self.at)
                return found if found != instance else ""
            return ""

        other = await wait_for(successor, "another manager's instance", within_s=_BOOT_S)
        leader = await self._scene.leader(after=owner, within_s=_BOOT_S)
        return (
            f"{said}; {leader} on {other} led {time.monotonic() - began_s:.0f} s later, where "
            f"{owner} had"
        )

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
            f"There is no DB instance at {host}.",
            remedy="`batchlab deploy status` says what the stack has.",
        )


def actions(scene: TargetGrid) -> Mapping[FaultName, FaultAction]:
    """Return the faults that the table declares possible."""
    there = StackFaults(scene)
    return {
        FaultName.KILL: there.kill,
        FaultName.SPOT_WAVE: there.spot_wave,
        FaultName.ZONE_LOSS: there.zone_loss,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, scene),
        FaultName.SQS_DELAYS: partial(services.delays, scene),
        FaultName.MANAGER_CRASH: there.crash_manager,
        FaultName.DATABASE_LOSS: there.lose_database,
    }
