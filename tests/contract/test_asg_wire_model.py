"""The answers of batchlab's Auto Scaling endpoint to every supported operation, against botocore's model."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from botocore import xform_name

from batchlab.server.autoscaling_api.query_protocol import model
from batchlab.server.autoscaling_api.scheduled_changes import ALL_ACTIONS
from tests.support.aws.autoscaling_api import TEMPLATE, Wire, refused
from tests.support.aws.botocore_shapes import answer_differences

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
REFUSED = {"AttachInstances", "DetachInstances"}
"""Operations that the endpoint always refuses."""

MIXED: Any = {
    "LaunchTemplate": {
        "LaunchTemplateSpecification": {"LaunchTemplateName": TEMPLATE},
        "Overrides": [{"InstanceType": "m7i.large", "WeightedCapacity": "1"}],
    }
}
METRIC: Any = {"MetricName": "Backlog", "Namespace": "batchlab", "Statistic": "Average"}
POLICIES: tuple[dict[str, Any], ...] = (
    {"PolicyName": "simple", "AdjustmentType": "ChangeInCapacity", "ScalingAdjustment": 1},
    {
        "PolicyName": "step",
        "PolicyType": "StepScaling",
        "AdjustmentType": "ChangeInCapacity",
        "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
    },
    {
        "PolicyName": "track",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingConfiguration": {"TargetValue": 5.0, "CustomizedMetricSpecification": METRIC},
    },
)


def test_the_answer_to_every_operation_follows_the_model(our: Wire) -> None:
    """Call every operation on one group. The client checks each answer."""
    asg, name = our.asg, our.name
    for operation in ALL_ACTIONS:
        shape: Any = model("autoscaling").operation_model(operation).input_shape
        if operation.startswith("Describe") and not (shape and shape.required_members):
            getattr(asg, xform_name(operation))()
    first, second = our.grow(
        2,
        CapacityRebalance=True,
        DefaultInstanceWarmup=0,
        HealthCheckType="EC2,ELB",
        MaxInstanceLifetime=86_400,
        PlacementGroup="near",
        Tags=[{"Key": "team", "Value": "a", "PropagateAtLaunch": True}],
        TargetGroupARNs=["arn:aws:elasticloadbalancing:x"],
        VPCZoneIdentifier="subnet-1",
    )
    _tags(our)
    _hooks(our)
    _policies(our)
    _schedules(our)
    _instances(our, first, second)
    _refreshes(our)
    _warm_pool(our)
    asg.suspend_processes(AutoScalingGroupName=name, ScalingProcesses=["AZRebalance"])
    asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    asg.resume_processes(AutoScalingGroupName=name)
    asg.update_auto_scaling_group(AutoScalingGroupName=name, MixedInstancesPolicy=MIXED)
    asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
    our.until(lambda: our.group() is None)
    activities = asg.describe_scaling_activities(AutoScalingGroupName=name, IncludeDeletedGroups=True)["Activities"]
    assert {activity["AutoScalingGroupState"] for activity in activities} == {"Deleted"}
    assert our.answered == set(ALL_ACTIONS) - REFUSED


def _tags(our: Wire) -> None:
    tag: Any = {"ResourceId": our.name, "ResourceType": "auto-scaling-group", "Key": "cost", "Value": "x"}
    our.asg.create_or_update_tags(Tags=[tag])
    assert len(our.asg.describe_tags(Filters=[{"Name": "auto-scaling-group", "Values": [our.name]}])["Tags"]) == 2
    our.asg.delete_tags(Tags=[tag])


def _hooks(our: Wire) -> None:
    asg, name = our.asg, our.name
    hook: Any = {"AutoScalingGroupName": name, "LifecycleHookName": "up"}
    asg.put_lifecycle_hook(**hook, LifecycleTransition=LAUNCHING, HeartbeatTimeout=60, NotificationMetadata="hello")
    assert asg.describe_lifecycle_hooks(AutoScalingGroupName=name)["LifecycleHooks"]
    asg.set_desired_capacity(AutoScalingGroupName=name, DesiredCapacity=3)
    (waiting,) = our.until(lambda: our.instances("Pending:Wait"))
    asg.record_lifecycle_action_heartbeat(**hook, InstanceId=waiting)
    asg.complete_lifecycle_action(**hook, InstanceId=waiting, LifecycleActionResult="CONTINUE")
    our.until(lambda: len(our.instances()) == 3)
    asg.delete_lifecycle_hook(**hook)


def _policies(our: Wire) -> None:
    asg, name = our.asg, our.name
    for policy in POLICIES:
        asg.put_scaling_policy(AutoScalingGroupName=name, **policy)
    assert len(asg.describe_policies(AutoScalingGroupName=name)["ScalingPolicies"]) == 3
    asg.execute_policy(AutoScalingGroupName=name, PolicyName="simple")
    for policy in POLICIES:
        asg.delete_policy(AutoScalingGroupName=name, PolicyName=policy["PolicyName"])


def _schedules(our: Wire) -> None:
    asg: Any = our.asg
    group = {"AutoScalingGroupName": our.name}
    start = datetime.now(UTC) + timedelta(hours=1)
    asg.put_scheduled_update_group_action(**group, ScheduledActionName="once", StartTime=start, MinSize=0, MaxSize=3)
    again: Any = [
        {"ScheduledActionName": "often", "Recurrence": "0 9 * * *", "TimeZone": "Etc/UTC", "DesiredCapacity": 1},
        {"ScheduledActionName": "bad", "Recurrence": "whenever", "DesiredCapacity": 1},
    ]
    asg.batch_put_scheduled_update_group_action(**group, ScheduledUpdateGroupActions=again)
    assert len(asg.describe_scheduled_actions(**group)["ScheduledUpdateGroupActions"]) == 2
    asg.delete_scheduled_action(**group, ScheduledActionName="once")
    asg.batch_delete_scheduled_action(**group, ScheduledActionNames=["often", "bad"])


def _instances(our: Wire, first: str, second: str) -> None:
    asg: Any = our.asg
    group = {"AutoScalingGroupName": our.name}
    asg.set_instance_protection(**group, InstanceIds=[first], ProtectedFromScaleIn=True)
    asg.set_instance_health(InstanceId=first, HealthStatus="Healthy")
    asg.enter_standby(**group, InstanceIds=[second], ShouldDecrementDesiredCapacity=True)
    our.until(lambda: our.instances("Standby") == [second])
    asg.exit_standby(**group, InstanceIds=[second])
    our.until(lambda: second in our.instances())
    assert asg.describe_auto_scaling_instances(InstanceIds=[first, second])["AutoScalingInstances"]
    with refused("ValidationError"):
        asg.attach_instances(**group, InstanceIds=[first])
    with refused("ValidationError"):
        asg.detach_instances(**group, InstanceIds=[first], ShouldDecrementDesiredCapacity=True)
    asg.terminate_instance_in_auto_scaling_group(InstanceId=second, ShouldDecrementDesiredCapacity=True)
    our.crash(first)
    our.until(lambda: first not in our.instances())
    assert len(asg.describe_scaling_activities(**group)["Activities"]) >= 5


def _refreshes(our: Wire) -> None:
    asg: Any = our.asg
    group = {"AutoScalingGroupName": our.name}
    wanted: Any = {"LaunchTemplate": {"LaunchTemplateName": TEMPLATE, "Version": "2"}}
    for end in (asg.rollback_instance_refresh, asg.cancel_instance_refresh):
        asg.set_desired_capacity(**group, DesiredCapacity=1)
        our.until(lambda: len(our.instances()) == 1)
        asg.start_instance_refresh(
            **group,
            Preferences={"InstanceWarmup": 600, "CheckpointPercentages": [50, 100]},
            DesiredConfiguration=wanted,
        )
        assert asg.describe_instance_refreshes(**group)["InstanceRefreshes"][0]["DesiredConfiguration"]
        end(**group)
        asg.set_desired_capacity(**group, DesiredCapacity=0)
        our.until(lambda: "EndTime" in asg.describe_instance_refreshes(**group)["InstanceRefreshes"][0])


def _warm_pool(our: Wire) -> None:
    asg: Any = our.asg
    group = {"AutoScalingGroupName": our.name}
    asg.put_warm_pool(**group, MinSize=1, PoolState="Running", InstanceReusePolicy={"ReuseOnScaleIn": True})
    our.until(lambda: asg.describe_warm_pool(**group)["Instances"])
    asg.delete_warm_pool(**group, ForceDelete=True)
    our.until(lambda: "WarmPoolConfiguration" not in asg.describe_warm_pool(**group))


def test_an_answer_that_differs_from_the_model_is_reported() -> None:
    operation = model("autoscaling").operation_model("TerminateInstanceInAutoScalingGroup")
    body = b"""<TerminateInstanceInAutoScalingGroupResponse><TerminateInstanceInAutoScalingGroupResult><Activity>
        <ActivityId>a</ActivityId><AutoScalingGroupName/><Progress>half</Progress><Progress>5</Progress>
        <StartTime>now</StartTime><StatusCode>Done</StatusCode><Color>red</Color>
        </Activity></TerminateInstanceInAutoScalingGroupResult><ResponseMetadata/>
        </TerminateInstanceInAutoScalingGroupResponse>"""
    place = "TerminateInstanceInAutoScalingGroup.Activity"
    differences = answer_differences(operation, body)
    assert [difference.partition(", not one of")[0] for difference in differences] == [
        f"{place} has no Cause",
        f"{place} has an unknown member Color",
        f"{place} has 2 members Progress",
        f"{place}.AutoScalingGroupName is outside of 1 to 255: 0",
        f"{place}.Progress is 'half', not a integer",
        f"{place}.StartTime is 'now', not a timestamp",
        f"{place}.StatusCode is 'Done'",
    ]
    assert answer_differences(operation, b"<ErrorResponse/>")
