"""Auto Scaling over the wire, as boto3 sees it, on batchlab's endpoint and on moto as a second implementation.

A checked list names the tests that moto cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from batchlab.server.autoscaling_api.launch_templates import template_id
from batchlab.server.autoscaling_api.query_protocol import model
from batchlab.server.autoscaling_api.scheduled_changes import ALL_ACTIONS as ACTIONS
from tests.support.aws.autoscaling_api import TEMPLATE, Thread, Wire, aws, refused

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"

_500 = "moto answers HTTP 500"
MOTO_LACKS = {
    "test_a_name_is_taken_once": "moto puts the new group in place of the old one",
    "test_missing_group_is_refused": _500,
    "test_invalid_limits_are_refused": "moto takes any limits",
    "test_invalid_token_is_refused": _500,
    "test_an_update_changes_only_what_it_names": "moto has no load balancer of that name",
    "test_a_group_with_instances_is_deleted_only_by_force": "moto deletes it with its instances",
    "test_desired_capacity_above_the_maximum_is_refused": "moto takes any number",
    "test_a_cooldown_that_is_honoured_refuses": "moto has no cooldown",
    "test_unknown_instance_is_refused": _500,
    "test_an_unhealthy_instance_is_replaced": "moto notes an instance's health, and leaves it",
    "test_a_process_that_is_suspended_waits": "moto launches all the same",
    "test_activities_are_listed_newest_first": "moto keeps no activities",
}


# --- Groups ---------------------------------------------------------------------------------------


def test_a_group_is_described_as_it_was_created(wire: Wire) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    asked: dict[str, Any] = {
        "MinSize": 0,
        "MaxSize": 3,
        "DesiredCapacity": 0,
        "DefaultCooldown": 7,
        "HealthCheckGracePeriod": 11,
        "TerminationPolicies": ["OldestInstance", "Default"],
        "NewInstancesProtectedFromScaleIn": True,
    }
    tags = [{"Key": "team", "Value": "a & b", "PropagateAtLaunch": True}]
    wire.create(**asked, Tags=tags)
    group = wire.group()
    assert {name: group[name] for name in asked} == asked
    assert [{k: tag[k] for k in tags[0]} for tag in group["Tags"]] == tags
    assert group["Tags"][0]["ResourceId"] == wire.name
    assert before < group["CreatedTime"] < datetime.now(UTC) + timedelta(seconds=2)
    assert wire.name in group["AutoScalingGroupARN"]
    assert group["LaunchTemplate"]["LaunchTemplateName"] == TEMPLATE


def test_a_name_is_taken_once(wire: Wire) -> None:
    wire.create()
    with refused("AlreadyExists"):
        wire.create()


def test_missing_group_is_refused(wire: Wire) -> None:
    with refused("ValidationError", "not found"):
        wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=1)
    with refused("ValidationError", "not found"):
        wire.asg.delete_auto_scaling_group(AutoScalingGroupName=wire.name)


def test_missing_template_is_refused(wire: Wire) -> None:
    with pytest.raises(ClientError) as told:
        wire.create(LaunchTemplate={"LaunchTemplateName": "no-such-template"})
    assert told.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_invalid_limits_are_refused(wire: Wire) -> None:
    with refused("ValidationError"):
        wire.create(MinSize=3, MaxSize=2)


def test_groups_are_paged(wire: Wire) -> None:
    names = [wire.create(f"{wire.name}-{n}") for n in range(5)]
    pages = list(
        wire.asg.get_paginator("describe_auto_scaling_groups").paginate(
            AutoScalingGroupNames=names, PaginationConfig={"PageSize": 2}
        )
    )
    found = [[g["AutoScalingGroupName"] for g in page["AutoScalingGroups"]] for page in pages]
    assert [len(page) for page in found] == [2, 2, 1]
    assert sorted(name for page in found for name in page) == names


def test_invalid_token_is_refused(wire: Wire) -> None:
    with refused("InvalidNextToken"):
        wire.asg.describe_auto_scaling_groups(NextToken="nonsense")


def test_groups_are_found_by_their_tags(wire: Wire) -> None:
    for n in range(3):
        tags = [{"Key": f"run-{wire.name}", "Value": str(n % 2)}]
        wire.create(f"{wire.name}-{n}", Tags=tags)
    filters: Any = [{"Name": f"tag:run-{wire.name}", "Values": ["0", "7"]}]
    found = wire.asg.describe_auto_scaling_groups(Filters=filters)["AutoScalingGroups"]
    assert sorted(g["AutoScalingGroupName"] for g in found) == [f"{wire.name}-0", f"{wire.name}-2"]


def test_tags_are_set_and_described_and_removed(wire: Wire) -> None:
    wire.create()
    tag: dict[str, Any] = {"ResourceId": wire.name, "ResourceType": "auto-scaling-group"}
    pairs = {"a": "1", "b": "2"}
    for key, value in (("a", "0"), *pairs.items()):
        told = {**tag, "Key": key, "Value": value, "PropagateAtLaunch": False}
        wire.asg.create_or_update_tags(Tags=[told])  # type: ignore[list-item]
    filters: Any = [{"Name": "auto-scaling-group", "Values": [wire.name]}]
    found = wire.asg.describe_tags(Filters=filters)["Tags"]
    assert {one["Key"]: one["Value"] for one in found} == pairs
    gone: Any = {**tag, "Key": "a"}
    wire.asg.delete_tags(Tags=[gone])
    assert [one["Key"] for one in wire.group()["Tags"]] == ["b"]


def test_request_with_a_wrong_tag_changes_no_group(our: Wire) -> None:
    first, second = our.create(), our.create(f"{our.name}-2")
    tags = [{"ResourceId": first, "Key": "a", "Value": "1"}, {"ResourceId": second, "Key": "aws:a", "Value": "1"}]
    with refused("ValidationError", "The prefix aws: of a tag key is reserved for AWS"):
        our.asg.create_or_update_tags(Tags=tags)  # type: ignore[arg-type]
    assert our.group(first)["Tags"] == []


def test_desired_capacity_follows_new_limits(wire: Wire) -> None:
    wire.grow(1)
    wire.asg.update_auto_scaling_group(AutoScalingGroupName=wire.name, MinSize=3)
    assert wire.group()["DesiredCapacity"] == 3
    wire.asg.update_auto_scaling_group(AutoScalingGroupName=wire.name, MinSize=0, MaxSize=2)
    assert wire.group()["DesiredCapacity"] == 2
    wire.until(lambda: len(wire.instances()) == 2)


def test_an_update_changes_only_what_it_names(wire: Wire) -> None:
    wire.create(DefaultCooldown=7, TargetGroupARNs=["arn:aws:elasticloadbalancing:x"])
    wire.asg.update_auto_scaling_group(AutoScalingGroupName=wire.name, HealthCheckGracePeriod=9, PlacementGroup="near")
    group = wire.group()
    assert (group["DefaultCooldown"], group["HealthCheckGracePeriod"]) == (7, 9)
    assert group["PlacementGroup"] == "near"
    assert group["TargetGroupARNs"] == ["arn:aws:elasticloadbalancing:x"]


def test_a_group_with_instances_is_deleted_only_by_force(wire: Wire) -> None:
    wire.grow(2)
    with pytest.raises(ClientError) as told:
        wire.asg.delete_auto_scaling_group(AutoScalingGroupName=wire.name)
    assert told.value.response["Error"]["Code"] in ("ResourceInUse", "ScalingActivityInProgress")
    wire.asg.delete_auto_scaling_group(AutoScalingGroupName=wire.name, ForceDelete=True)
    wire.until(lambda: wire.group() is None)


def test_mixed_instances_policy_is_returned_whole(wire: Wire) -> None:
    policy: Any = {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": {"LaunchTemplateName": TEMPLATE, "Version": "$Latest"},
            "Overrides": [
                {"InstanceType": "m7i.large", "WeightedCapacity": "1"},
                {"InstanceType": "m7i.xlarge", "WeightedCapacity": "2"},
            ],
        },
        "InstancesDistribution": {
            "OnDemandBaseCapacity": 1,
            "OnDemandPercentageAboveBaseCapacity": 25,
            "SpotAllocationStrategy": "capacity-optimized",
        },
    }
    asked: dict[str, Any] = {
        "AutoScalingGroupName": wire.name,
        "MinSize": 0,
        "MaxSize": 2,
        "AvailabilityZones": ["us-east-1a"],
        "MixedInstancesPolicy": policy,
    }
    wire.asg.create_auto_scaling_group(**asked)
    wire.made.append(wire.name)
    found = wire.group()["MixedInstancesPolicy"]
    assert found["LaunchTemplate"]["Overrides"] == policy["LaunchTemplate"]["Overrides"]
    shares = found["InstancesDistribution"]
    assert {k: shares[k] for k in policy["InstancesDistribution"]} == policy["InstancesDistribution"]
    wanted = policy["LaunchTemplate"]["LaunchTemplateSpecification"]
    told = found["LaunchTemplate"]["LaunchTemplateSpecification"]
    assert {name: told[name] for name in wanted} == wanted


# --- Capacity and instances -----------------------------------------------------------------------


def test_desired_capacity_makes_instances_and_takes_them(wire: Wire) -> None:
    wire.create()
    for size in (3, 1, 0):
        wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=size)
        wire.until(lambda size=size: len(wire.instances()) == size)  # type: ignore[misc]


def test_desired_capacity_above_the_maximum_is_refused(wire: Wire) -> None:
    wire.create()
    with refused("ValidationError", "above max value 4"):
        wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=5)


def test_a_cooldown_that_is_honoured_refuses(wire: Wire) -> None:
    wire.grow(1, DefaultCooldown=600)
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=2)
    wire.until(lambda: len(wire.instances()) == 2)
    with refused("ScalingActivityInProgress"):
        wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=3, HonorCooldown=True)


def test_instances_are_described_by_themselves(wire: Wire) -> None:
    first, second = wire.grow(2)
    wire.asg.set_instance_protection(AutoScalingGroupName=wire.name, InstanceIds=[second], ProtectedFromScaleIn=True)
    found = wire.asg.describe_auto_scaling_instances(InstanceIds=[first, second])
    told = {one["InstanceId"]: one for one in found["AutoScalingInstances"]}
    assert {one["AutoScalingGroupName"] for one in told.values()} == {wire.name}
    assert {one["LifecycleState"] for one in told.values()} == {"InService"}
    assert not told[first]["ProtectedFromScaleIn"]
    assert told[second]["ProtectedFromScaleIn"]


def test_named_instance_is_terminated(wire: Wire) -> None:
    first, second = wire.grow(2)
    answer = wire.asg.terminate_instance_in_auto_scaling_group(InstanceId=first, ShouldDecrementDesiredCapacity=True)
    assert first in answer["Activity"]["Description"]
    assert answer["Activity"]["AutoScalingGroupName"] == wire.name
    wire.until(lambda: wire.instances() == [second])
    assert wire.group()["DesiredCapacity"] == 1


def test_unknown_instance_is_refused(wire: Wire) -> None:
    with refused("ValidationError"):
        wire.asg.terminate_instance_in_auto_scaling_group(
            InstanceId="i-00000000000000000", ShouldDecrementDesiredCapacity=False
        )
    with refused("ValidationError"):
        wire.asg.set_instance_health(InstanceId="i-00000000000000000", HealthStatus="Unhealthy")


def test_an_instance_that_dies_is_replaced(wire: Wire) -> None:
    first, second = wire.grow(2)
    wire.crash(first)
    wire.until(lambda: len(wire.instances()) == 2 and first not in wire.instances())
    assert second in wire.instances()


def test_an_unhealthy_instance_is_replaced(wire: Wire) -> None:
    (only,) = wire.grow(1)
    wire.asg.set_instance_health(InstanceId=only, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False)
    wire.until(lambda: len(found := wire.instances()) == 1 and only not in found)


def test_protected_instance_is_kept(wire: Wire) -> None:
    before = wire.grow(3)
    wire.asg.set_instance_protection(AutoScalingGroupName=wire.name, InstanceIds=before[:2], ProtectedFromScaleIn=True)
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=2)
    wire.until(lambda: sorted(wire.instances()) == sorted(before[:2]))


def test_standby_takes_an_instance_out_and_back(wire: Wire) -> None:
    first, second = wire.grow(2)
    entered = wire.asg.enter_standby(
        AutoScalingGroupName=wire.name, InstanceIds=[first], ShouldDecrementDesiredCapacity=True
    )
    assert first in entered["Activities"][0]["Description"]
    wire.until(lambda: wire.instances("Standby") == [first])
    assert wire.instances() == [second]
    assert wire.group()["DesiredCapacity"] == 1
    wire.asg.exit_standby(AutoScalingGroupName=wire.name, InstanceIds=[first])
    wire.until(lambda: sorted(wire.instances()) == sorted([first, second]))
    assert wire.group()["DesiredCapacity"] == 2


def test_a_process_that_is_suspended_waits(wire: Wire) -> None:
    wire.create()
    wire.asg.suspend_processes(AutoScalingGroupName=wire.name, ScalingProcesses=["Launch"])
    told = wire.group()["SuspendedProcesses"]
    assert [process["ProcessName"] for process in told] == ["Launch"]
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=1)
    wire.asg.describe_auto_scaling_groups()
    assert wire.group()["Instances"] == []
    wire.asg.resume_processes(AutoScalingGroupName=wire.name)
    wire.until(lambda: len(wire.instances()) == 1)
    assert wire.group()["SuspendedProcesses"] == []


def test_activities_are_listed_newest_first(wire: Wire) -> None:
    (only,) = wire.grow(1)
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=0)

    def told() -> list[Any]:
        pages = wire.asg.get_paginator("describe_scaling_activities").paginate(
            AutoScalingGroupName=wire.name, PaginationConfig={"PageSize": 1}
        )
        return [activity for page in pages for activity in page["Activities"]]

    def ended() -> Any:
        found = told()
        return found if found and found[0]["StatusCode"] == "Successful" else None

    newest, *_, oldest = wire.until(ended)
    assert newest["Description"] == f"Terminating EC2 instance: {only}"
    assert oldest["Description"] == f"Launching a new EC2 instance: {only}"
    assert "increasing the capacity from 0 to 1" in oldest["Cause"]
    assert oldest["StartTime"] <= oldest["EndTime"] <= newest["EndTime"]
    for status, number in (("Successful", len(told())), ("Failed", 0)):
        filters: Any = [{"Name": "Status", "Values": [status]}]
        found = wire.asg.describe_scaling_activities(AutoScalingGroupName=wire.name, Filters=filters)
        assert len(found["Activities"]) == number
    filters = [{"Name": "Colour", "Values": ["red"]}]
    with refused("ValidationError", "Filter type Colour is not correct"):
        wire.asg.describe_scaling_activities(AutoScalingGroupName=wire.name, Filters=filters)


# --- Constant responses ---------------------------------------------------------------------------

FIXED: dict[str, Callable[[Any], Any]] = {
    "describe_account_limits": lambda a: a["MaxNumberOfAutoScalingGroups"] == 500,
    "describe_adjustment_types": lambda a: len(a["AdjustmentTypes"]) == 3,
    "describe_lifecycle_hook_types": lambda a: a["LifecycleHookTypes"] == [LAUNCHING, TERMINATING],
    "describe_metric_collection_types": lambda a: a["Metrics"] == a["Granularities"] == [],
    "describe_scaling_process_types": lambda a: len(a["Processes"]) == 9,
    "describe_termination_policy_types": lambda a: "Default" in a["TerminationPolicyTypes"],
}


@pytest.mark.parametrize("name", FIXED)
def test_choices_of_a_client(name: str, our: Wire) -> None:
    assert FIXED[name](getattr(our.asg, name)())


def test_unsupported_action_is_refused_by_name(our: Wire) -> None:
    with refused("NotImplemented", "This endpoint does not support CreateLaunchConfiguration."):
        our.asg.create_launch_configuration(LaunchConfigurationName="old")


def test_every_action_of_the_table_is_one_of_the_model() -> None:
    assert set(ACTIONS) <= set(model("autoscaling").operation_names)


def test_a_template_may_be_named_by_its_id(our: Wire) -> None:
    our.create(LaunchTemplate={"LaunchTemplateId": template_id(TEMPLATE)}, DesiredCapacity=1)
    our.until(lambda: our.instances())
    assert our.group()["Instances"][0]["LaunchTemplate"]["LaunchTemplateName"] == TEMPLATE


def test_a_description_completes_the_reference_to_a_template(our: Wire) -> None:
    our.create(LaunchTemplate={"LaunchTemplateName": TEMPLATE})
    assert our.group()["LaunchTemplate"] == {"LaunchTemplateId": template_id(TEMPLATE), "LaunchTemplateName": TEMPLATE}
    with refused("ValidationError", "either launchTemplateId or LaunchTemplateName"):
        our.create("both", LaunchTemplate=our.group()["LaunchTemplate"])


def test_a_description_has_the_lists_and_the_role_of_every_group(our: Wire) -> None:
    our.create(PlacementGroup="near")
    group = our.group()
    lists = ("EnabledMetrics", "LoadBalancerNames", "Tags", "TargetGroupARNs", "TrafficSources")
    assert {name: group[name] for name in lists} == {name: [] for name in lists}
    assert group["ServiceLinkedRoleARN"].endswith("autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling")
    own: Any = {"ServiceLinkedRoleARN": "arn:aws:iam::000000000000:role/own", "PlacementGroup": ""}
    our.asg.update_auto_scaling_group(AutoScalingGroupName=our.name, **own)
    assert our.group()["ServiceLinkedRoleARN"] == own["ServiceLinkedRoleARN"]
    assert "PlacementGroup" not in our.group()


def test_an_update_of_a_mixed_instances_policy_changes_only_what_it_names(our: Wire) -> None:
    """AWS's reference of UpdateAutoScalingGroup: "Any properties that you don't specify are not changed"."""

    def update(**properties: Any) -> Any:
        policy: Any = properties
        our.asg.update_auto_scaling_group(AutoScalingGroupName=our.name, MixedInstancesPolicy=policy)
        return our.group()["MixedInstancesPolicy"]

    our.create()
    reference = {**our.group()["LaunchTemplate"], "Version": "1"}
    found = update(InstancesDistribution={"OnDemandBaseCapacity": 1, "SpotMaxPrice": "0.5"})
    assert found["LaunchTemplate"] == {"LaunchTemplateSpecification": reference, "Overrides": []}
    assert "LaunchTemplate" not in our.group()
    overrides = [{"InstanceType": "m7i.large"}, {"InstanceType": "m7i.xlarge"}]
    special: Any = {"LaunchTemplateSpecification": {"LaunchTemplateName": TEMPLATE, "Version": "2"}}
    found = update(LaunchTemplate={"Overrides": [overrides[0], {**overrides[1], **special}]})
    assert found["LaunchTemplate"]["LaunchTemplateSpecification"] == reference
    shares = found["InstancesDistribution"]
    assert (shares["OnDemandBaseCapacity"], shares["SpotMaxPrice"], shares["SpotInstancePools"]) == (1, "0.5", 2)
    found = update(InstancesDistribution={"SpotAllocationStrategy": "capacity-optimized", "SpotMaxPrice": ""})
    assert [one["InstanceType"] for one in found["LaunchTemplate"]["Overrides"]] == ["m7i.large", "m7i.xlarge"]
    assert found["LaunchTemplate"]["Overrides"][1]["LaunchTemplateSpecification"]["Version"] == "2"
    shares = found["InstancesDistribution"]
    assert (shares["OnDemandBaseCapacity"], shares["SpotAllocationStrategy"]) == (1, "capacity-optimized")
    assert not {"SpotMaxPrice", "SpotInstancePools"} & shares.keys()
    newer: Any = {"LaunchTemplateName": TEMPLATE, "Version": "2"}
    found = update(LaunchTemplate={"LaunchTemplateSpecification": newer})
    assert found["LaunchTemplate"]["LaunchTemplateSpecification"] == {**reference, "Version": "2"}
    assert len(found["LaunchTemplate"]["Overrides"]) == 2


def test_a_new_group_with_a_mixed_instances_policy_needs_a_template(our: Wire) -> None:
    asked: dict[str, Any] = {
        "AutoScalingGroupName": our.name,
        "MinSize": 0,
        "MaxSize": 1,
        "AvailabilityZones": ["us-east-1a"],
        "MixedInstancesPolicy": {"InstancesDistribution": {"OnDemandBaseCapacity": 1}},
    }
    with refused("ValidationError", "either launchTemplateId or LaunchTemplateName"):
        our.asg.create_auto_scaling_group(**asked)


def test_weight_that_is_not_a_number_is_refused(our: Wire) -> None:
    overrides = [{"InstanceType": "m7i.large", "WeightedCapacity": "heavy"}]
    template: Any = {"LaunchTemplateSpecification": {"LaunchTemplateName": TEMPLATE}, "Overrides": overrides}
    our.create()
    with refused("ValidationError", "The weight 'heavy' is not a whole number."):
        our.asg.update_auto_scaling_group(
            AutoScalingGroupName=our.name, MixedInstancesPolicy={"LaunchTemplate": template}
        )


def test_a_tag_may_omit_its_resource_type(our: Wire) -> None:
    our.create()
    tag: Any = {"ResourceId": our.name, "Key": "team", "Value": "a"}
    our.asg.create_or_update_tags(Tags=[tag])
    assert [one["Key"] for one in our.group()["Tags"]] == ["team"]
    with refused("ValidationError", "its ResourceType may only be auto-scaling-group"):
        our.asg.create_or_update_tags(Tags=[tag | {"ResourceType": "instance"}])


def test_the_model_is_checked_where_the_client_does_not(ours: Thread) -> None:
    unchecked: Any = aws(ours.endpoint, "autoscaling", parameter_validation=False)
    with refused("ValidationError", "Value null at 'autoScalingGroupName' failed"):
        unchecked.set_desired_capacity(DesiredCapacity=1)
    unchecked.close()
