"""Outages of subnets and databases of AWS at moto, which the tests' grids do not have."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.client.http import Client
from batchlab.core.model import Pool
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.aws_deployment import AwsDeployment, Database
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.aws_stack import StackFaults, ZoneOutage, _count_waiting, _Group, _launched_elsewhere
from batchlab.scenarios.faults.target_grid import FaultResult, NothingHit, TargetGrid
from batchlab.scenarios.model.values import Fault, FaultName
from tests.scenarios.test_fault_table import grid
from tests.support.aws.autoscaling_api import aws


class Manager(Client):
    """A manager of a grid with two pools, which records requested rebuilds."""

    def __init__(self, *known: str) -> None:
        self.rebuilds = 0
        self.known = known

    def grid(self) -> Any:
        return grid(wide=[], narrow=[])

    def jobs(self, *, before: str | None = None, **_: object) -> list[Any]:
        return [] if before else [{"id": one} for one in self.known]

    def rebuild(self) -> int:
        self.rebuilds += 1
        return 3


def make(moto: Endpoint) -> tuple[Any, list[str]]:
    """Create two groups: one in two subnets, and one in the first subnet only."""
    ec2, scaling = aws(moto, "ec2"), aws(moto, "autoscaling")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.9.{n}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
        for n, zone in enumerate(("us-east-1a", "us-east-1b"))
    ]
    ec2.create_launch_template(LaunchTemplateName="tpl", LaunchTemplateData={"ImageId": "ami-12c6146b"})
    for name, where in (("wide", subnets), ("narrow", subnets[:1])):
        scaling.create_auto_scaling_group(
            AutoScalingGroupName=f"s-{name}",
            LaunchTemplate={"LaunchTemplateName": "tpl"},
            MinSize=0,
            MaxSize=2,
            VPCZoneIdentifier=",".join(where),
        )
    return scaling, subnets


def test_subnets_of_a_lost_zone_are_taken_and_given_back(moto: Endpoint, tmp_path: Path) -> None:
    scaling, subnets = make(moto)

    def state() -> dict[str, tuple[set[str], list[str]]]:
        ours = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=["s-wide", "s-narrow"])
        return {
            our["AutoScalingGroupName"]: (
                set(our["VPCZoneIdentifier"].split(",")),
                [process["ProcessName"] for process in our["SuspendedProcesses"]],
            )
            for our in ours["AutoScalingGroups"]
        }

    before, meanwhile = state(), []
    killed: list[str] = []

    async def inside(zone: str) -> list[str]:
        meanwhile.append(state())
        return [f"i-{zone}"] if not killed else []

    async def kill(instances: Sequence[str]) -> list[str]:
        killed.extend(instances)
        return [f"{instance}: terminated" for instance in instances]

    async def lose(**more: Any) -> FaultResult:
        scene = TargetGrid(factory.load("aws"), Home(tmp_path), Manager())
        fault = Fault(FaultName.ZONE_LOSS, 0.0, for_s=0.1, **more)
        return await ZoneOutage(moto, prefix="s-").lose(scene, fault, inside=inside, kill=kill)

    try:
        seen = asyncio.run(lose(zone="a"))  # a scenario names the zone in the same form
        assert seen.targets == ("i-us-east-1a",)
        assert meanwhile[0] == {"s-wide": ({subnets[1]}, []), "s-narrow": ({subnets[0]}, ["Launch"])}
        assert state() == before
        assert "launched in us-east-1b only, and then in us-east-1a, us-east-1b again" in seen.evidence
        with pytest.raises(NothingHit, match=r"^No instance was in us-east-1a, and no launch was pending"):
            asyncio.run(lose())
        assert state() == before
        with pytest.raises(NothingHit, match=r"^No group launches in the zone 'f'"):
            asyncio.run(lose(zone="f"))
        assert state() == before
    finally:
        for name in before:
            scaling.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)


def test_launches_during_a_zone_outage_move_or_wait() -> None:
    def group(name: str, *, suspended: bool = False, desired: int = 0, **there: str) -> _Group:
        return _Group(name, ("z-a",), (), suspended, desired, there)

    before = [group("wide", i1="z-b"), group("narrow"), group("shut", suspended=True)]
    now = [
        group("wide", desired=3, i1="z-b", i2="z-b", i3="z-a"),
        group("narrow", suspended=True, desired=2),
        group("shut", suspended=True, desired=7),
    ]
    assert _launched_elsewhere(before, now, "z-a") == {"i2"}
    assert _count_waiting(before, now) == 2
    assert (_launched_elsewhere(before, before, "z-a"), _count_waiting(before, before)) == (set(), 0)


def test_rds_is_rebooted_and_the_ledger_rebuilt(
    moto: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rds = aws(moto, "rds")
    rds.create_db_instance(
        DBInstanceIdentifier="ledger",
        DBInstanceClass="db.t4g.micro",
        Engine="postgres",
        MasterUsername="u",
        MasterUserPassword="p" * 12,
        AllocatedStorage=20,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL_RDS", moto.url or "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    found = rds.describe_db_instances(DBInstanceIdentifier="ledger")["DBInstances"][0]
    host = found["Endpoint"]["Address"]
    home, manager = Home(tmp_path), Manager("j-1", "j-2", "j-3")
    at = AwsDeployment(
        stack="s",
        region="us-east-1",
        bucket="b",
        prefix="s-",
        manager_group="s-manager",
        token_secret="arn",
        pools=(Pool("default"),),
        ledger="postgres",
        database=Database(host, 5432, "batchlab", "arn"),
    )
    aws_deployment.write(home, at)
    there = StackFaults(TargetGrid(factory.load("aws"), home, manager))
    fault = Fault(FaultName.DATABASE_LOSS, 0.0, for_s=0.1)
    empty = StackFaults(TargetGrid(factory.load("aws"), home, Manager()))
    with pytest.raises(NothingHit, match=r"^The ledger had no jobs.$"):
        asyncio.run(empty.lose_database(fault))
    seen = asyncio.run(there.lose_database(fault))
    assert seen.targets == (host,)
    assert seen.evidence.startswith("RDS rebooted ledger: ")
    assert "available" in seen.evidence
    assert "of 3 jobs the ledger had 3 after the loss, and 3 after the rebuild" in seen.evidence
    assert manager.rebuilds == 1
    rds.delete_db_instance(DBInstanceIdentifier="ledger", SkipFinalSnapshot=True)
