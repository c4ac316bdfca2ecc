"""A pool's group as the stack writes it, given to Auto Scaling itself: at our own endpoint, where
instances wait in its hooks, and at moto. MiniStack's CloudFormation drops mixed policy and hooks.

CloudFormation's properties of a group are CreateAutoScalingGroup's parameters but for their tags'
owner, the cooldown's name, and what is asked for with another call.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.group_descriptions import DRAIN_HOOK, READY_HOOK
from tests.support.aws import cfn
from tests.support.aws.autoscaling_api import TEMPLATE, ZONE, Behaving, autoscaling, aws, served
from tests.support.aws.stack_shapes import RELEASE
from tests.support.fleet import TableLauncher
from tests.support.waiting import until

SHAPE: dict[str, Any] = {"Release": RELEASE, "PoolOnDemandBase": 1, "PoolOnDemandPercent": 50}


AT_MOTO = "stacked-at-moto"


def request(name: str, template: str) -> dict[str, Any]:
    """CreateAutoScalingGroup's parameters, in a zone in place of subnets."""
    made = dict(cfn.Rendered(cfn.load(), **SHAPE).properties("PoolGroup"))
    for other in ("MetricsCollection", "VPCZoneIdentifier"):
        del made[other]
    made["DefaultCooldown"] = int(made.pop("Cooldown"))
    specification = made["MixedInstancesPolicy"]["LaunchTemplate"]["LaunchTemplateSpecification"]
    assert specification == {"LaunchTemplateId": "<PoolTemplate>", "Version": "<PoolTemplate.LatestVersionNumber>"}
    specification.clear()
    specification |= {"LaunchTemplateName": template, "Version": "$Latest"}
    made["Tags"] = [{**tag, "Value": str(tag["Value"])} for tag in made["Tags"]]
    return {**made, "AutoScalingGroupName": name, "AvailabilityZones": [ZONE]}


def judged(asg: Any, name: str) -> None:
    (group,) = asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"]
    policy = group["MixedInstancesPolicy"]
    types = [one["InstanceType"] for one in policy["LaunchTemplate"]["Overrides"]]
    assert types == ["m7i.large", "m7a.large", "m6i.large", "m6a.large"]
    spread = policy["InstancesDistribution"]
    assert spread["SpotAllocationStrategy"] == "price-capacity-optimized"
    assert spread["OnDemandBaseCapacity"] == 1
    assert spread["OnDemandPercentageAboveBaseCapacity"] == 50
    assert group["CapacityRebalance"] is True
    assert group["TerminationPolicies"] == ["NewestInstance"]
    assert (group["MinSize"], group["MaxSize"]) == (0, 10)
    # moto takes 0 for unset.
    assert group["DefaultCooldown"] == (300 if name == AT_MOTO else 0)
    hooks = {
        hook["LifecycleHookName"]: (hook["LifecycleTransition"], hook["HeartbeatTimeout"], hook["DefaultResult"])
        for hook in asg.describe_lifecycle_hooks(AutoScalingGroupName=name)["LifecycleHooks"]
    }
    wanted = {
        READY_HOOK: ("autoscaling:EC2_INSTANCE_LAUNCHING", 300, "ABANDON"),
        DRAIN_HOOK: ("autoscaling:EC2_INSTANCE_TERMINATING", 120, "CONTINUE"),
    }
    # Nor does it make the hooks that come with a group.
    assert hooks == ({} if name == AT_MOTO else wanted)


def test_our_endpoint_takes_the_group_and_its_instances_wait_in_its_hooks(tmp_path: Path) -> None:
    def act(endpoint: Endpoint) -> list[str]:
        asg = autoscaling(endpoint)
        asg.create_auto_scaling_group(**request("stacked", TEMPLATE))
        judged(asg, "stacked")
        asg.set_desired_capacity(AutoScalingGroupName="stacked", DesiredCapacity=1)

        def states() -> list[str]:
            found = asg.describe_auto_scaling_instances()["AutoScalingInstances"]
            return [one["LifecycleState"] for one in found]

        until(lambda: states() not in ([], ["Pending"]))
        tags = {tag["Key"]: tag["Value"] for tag in asg.describe_tags()["Tags"] if tag["PropagateAtLaunch"]}
        assert (tags["batchlab:pool"], tags["batchlab:slots"]) == ("default", "2")
        return states()

    async def main() -> None:
        launcher = Behaving(TableLauncher())
        async with served(launcher, launcher.changed, tmp_path) as up:
            async with asyncio.timeout(30):
                assert await asyncio.to_thread(act, up.endpoint) == ["Pending:Wait"]

    asyncio.run(main())


def test_moto_takes_the_group_and_the_launch_template(moto: Endpoint) -> None:
    ec2, asg = aws(moto, "ec2"), autoscaling(moto)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    data = cfn.Rendered(cfn.load(), **SHAPE, WorkerImage=image).properties("PoolTemplate")
    data = data["LaunchTemplateData"]
    # References to what this test does not make.
    del data["IamInstanceProfile"], data["NetworkInterfaces"]
    ec2.create_launch_template(LaunchTemplateName=AT_MOTO, LaunchTemplateData=data)
    (version,) = ec2.describe_launch_template_versions(LaunchTemplateName=AT_MOTO)["LaunchTemplateVersions"]
    assert version["LaunchTemplateData"]["MetadataOptions"]["HttpTokens"] == "required"
    asg.create_auto_scaling_group(**request(AT_MOTO, AT_MOTO))
    try:
        judged(asg, AT_MOTO)
        asg.set_desired_capacity(AutoScalingGroupName=AT_MOTO, DesiredCapacity=2)
        (group,) = asg.describe_auto_scaling_groups(AutoScalingGroupNames=[AT_MOTO])["AutoScalingGroups"]
        ids = [one["InstanceId"] for one in group["Instances"]]
        assert ids, "one of the two: moto rounds both shares down"
        for reservation in ec2.describe_instances(InstanceIds=ids)["Reservations"]:
            for instance in reservation["Instances"]:
                tags = {one["Key"]: one["Value"] for one in instance["Tags"]}
                assert tags["batchlab:pool"] == "default"
                assert tags["batchlab.stack"] == "batchlab"
    finally:
        asg.delete_auto_scaling_group(AutoScalingGroupName=AT_MOTO, ForceDelete=True)
        ec2.delete_launch_template(LaunchTemplateName=AT_MOTO)


@pytest.mark.parametrize("name", ["PoolGroup", "ManagerGroup"])
def test_boto3_knows_every_property_of_the_groups(name: str) -> None:
    """CloudFormation's words that are the API's too are spelt as in it."""
    from botocore.session import Session

    shape = Session().get_service_model("autoscaling").operation_model("CreateAutoScalingGroup")
    members = shape.input_shape.members  # type: ignore[union-attr]
    given = set(cfn.Rendered(cfn.load(), **SHAPE).properties(name))
    assert given - members.keys() <= {"Cooldown", "MetricsCollection"}
