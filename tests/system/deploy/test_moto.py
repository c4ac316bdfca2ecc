"""Features that MiniStack does not have, tested on moto: scale-in protection, more protected instances than one call
accepts, and the addresses of subnets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.core.errors import UsageError
from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.destroy import MAX_PROTECTION_CALL, Destroy
from batchlab.deploy.plan import create_plan
from batchlab.deploy.settings import PoolSettings, Settings
from batchlab.deploy.stack import Stack
from tests.support.aws import cfn
from tests.support.aws.deploy import Front, client, stacks, use

TEMPLATE = """
Resources:
  ManagerGroup:
    Type: AWS::AutoScaling::AutoScalingGroup
    Properties: &group
      AutoScalingGroupName: grid-manager
      AvailabilityZones: [us-east-1a]
      MinSize: '0'
      MaxSize: '100'
      DesiredCapacity: '1'
      NewInstancesProtectedFromScaleIn: true
      LaunchTemplate: {LaunchTemplateId: !Ref Template, Version: '1'}
  PoolGroup:
    Type: AWS::AutoScaling::AutoScalingGroup
    Properties:
      <<: *group
      AutoScalingGroupName: grid-pool-default
      DesiredCapacity: '60'
  Template:
    Type: AWS::EC2::LaunchTemplate
    Properties:
      LaunchTemplateName: grid
      LaunchTemplateData: {ImageId: ami-12c6146b, InstanceType: t3.micro}
Outputs:
  PoolGroups: {Value: !Ref PoolGroup}
"""


@pytest.fixture
def calls(moto: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """Record the changing calls of Auto Scaling in order."""
    assert moto.url is not None
    use(monkeypatch, moto.url)
    found: list[tuple[str, Any]] = []
    real = Account.client

    def watched(self: Account, service: str) -> Any:
        made = real(self, service)
        if service == "autoscaling":
            made.meta.events.register(
                "provide-client-params.auto-scaling",
                lambda params, model, **_: found.append((model.name, dict(params))),
                unique_id="seen",
            )
        return made

    monkeypatch.setattr(Account, "client", watched)
    yield found
    client("cloudformation").delete_stack(StackName="grid")


def test_protection_is_removed_and_the_manager_ends_first(calls: list[tuple[str, Any]]) -> None:
    """A running manager would protect and launch instances, and a group with a protected instance cannot be deleted."""
    client("cloudformation").create_stack(StackName="grid", TemplateBody=TEMPLATE)
    scaling = client("autoscaling")

    def instances() -> dict[str, list[Any]]:
        # Other tests use the same server.
        told = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=["grid-manager", "grid-pool-default"])[
            "AutoScalingGroups"
        ]
        return {one["AutoScalingGroupName"]: one["Instances"] for one in told}

    before = instances()
    assert (len(before["grid-manager"]), len(before["grid-pool-default"])) == (1, 60)
    assert all(one["ProtectedFromScaleIn"] for some in before.values() for one in some)

    front = Front()
    with Account.open() as account:
        stays = Destroy(Stack(account, "grid"), front, delete_data=False, sleep=lambda _: None).run()
    assert stays == []
    assert instances() == {}

    changes = [(name, asked) for name, asked in calls if not name.startswith("Describe")]
    resized = [asked for name, asked in changes if name == "UpdateAutoScalingGroup"]
    assert resized[0]["AutoScalingGroupName"] == "grid-manager"
    freed = [asked for name, asked in changes if name == "SetInstanceProtection"]
    assert all(len(one["InstanceIds"]) <= MAX_PROTECTION_CALL for one in freed)
    assert not any(one["ProtectedFromScaleIn"] for one in freed)
    of_pool = [one for one in freed if one["AutoScalingGroupName"] == "grid-pool-default"]
    assert sorted(len(one["InstanceIds"]) for one in of_pool) == [10, 50]
    assert "60 instances are terminating." in front.said


def test_fleet_larger_than_the_subnets_is_refused_before_anything_is_created(
    moto: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moto.url is not None
    use(monkeypatch, moto.url)
    ec2 = client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.7.0.0/24")["Vpc"]["VpcId"]
    subnets = [ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.7.0.{begin}/28")["Subnet"]["SubnetId"] for begin in (0, 16)]
    source = template.load(cfn.stack_file())

    def plan(most: int, subnets: str) -> None:
        wanted = Settings("tight", pools=(PoolSettings("default", max_size=most),))
        wanted = wanted.with_parameters({"VpcId": vpc, "SubnetIds": subnets})
        with Account.open() as account, create_plan(Stack(account, "tight"), wanted, source, None):
            raise AssertionError("a plan was made")

    with pytest.raises(UsageError, match="may have 21 workers, but the stack's subnets have addresses for 20 workers"):
        plan(21, ",".join(subnets))
    with pytest.raises(UsageError, match=r"subnet-0123456789abcdef0.*does not exist"):
        plan(1, "subnet-0123456789abcdef0")
    assert "tight" not in stacks()
    for subnet in subnets:
        ec2.delete_subnet(SubnetId=subnet)
    ec2.delete_vpc(VpcId=vpc)
