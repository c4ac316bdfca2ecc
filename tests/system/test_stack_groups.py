"""The group of a pool in the stack template, created directly at batchlab's own endpoint, whose instances wait in
hooks, and at moto. MiniStack's CloudFormation ignores the mixed instances policy and the hooks.

The properties of a group equal the parameters of CreateAutoScalingGroup, except for the owner of tags, the name of the
cooldown, and settings of other calls.
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
    """Return the parameters of CreateAutoScalingGroup, with a zone in place of subnets."""
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
    # moto treats 0 as unset.
    assert group["DefaultCooldown"] == (300 if name == AT_MOTO else 0)
    hooks = {
        hook["LifecycleHookName"]: (hook["LifecycleTransition"], hook["HeartbeatTimeout"], hook["DefaultResult"])
        for hook in asg.describe_lifecycle_hooks(AutoScalingGroupName=name)["LifecycleHooks"]
    }
    wanted = {
        READY_HOOK: ("autoscaling:EC2_INSTANCE_LAUNCHING", 300, "ABANDON"),
        DRAIN_HOOK: ("autoscaling:EC2_INSTANCE_TERMINATING", 120, "CONTINUE"),
    }
    # moto does not create the hooks of a new group either.
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
    # The removed properties refer to resources that this test does not create.
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
    """A property of CloudFormation that the API also has is spelled in the same way."""
    from botocore.session import Session

    shape = Session().get_service_model("autoscaling").operation_model("CreateAutoScalingGroup")
    members = shape.input_shape.members  # type: ignore[union-attr]
    given = set(cfn.Rendered(cfn.load(), **SHAPE).properties(name))
    assert given - members.keys() <= {"Cooldown", "MetricsCollection"}
