"""Later actions of a group over the wire: hooks, schedules, policies, refreshes, and warm pools.

A checked list names the tests that moto cannot pass.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.aws.autoscaling_api import TEMPLATE, Thread, Wire, aws, refused

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"

_500 = "moto answers HTTP 500"
_NO_WAIT = "moto's instances never wait in a hook"
_NO_METADATA = "moto does not keep a hook's NotificationMetadata"
MOTO_LACKS = {
    "test_hooks_are_described_as_they_were_put": _NO_METADATA,
    "test_repeated_hook_keeps_omitted_fields": _NO_METADATA,
    "test_an_instance_waits_until_its_launch_is_completed": _NO_WAIT,
    "test_a_launch_that_is_abandoned_is_tried_anew": _NO_WAIT,
    "test_an_instance_waits_until_its_end_is_completed": _NO_WAIT,
    "test_missing_hook_is_refused": _500,
    "test_scheduled_actions_are_stored_and_deleted": "moto forgets what a second put does not name",
    "test_a_recurrence_that_is_put_again_sets_the_next_run": "moto does not tell the next run",
    "test_a_scheduled_action_is_carried_out": "moto's scheduled actions are only kept",
    "test_many_scheduled_actions_are_put_and_removed_at_once": "moto takes any recurrence",
    "test_target_tracking_policy_is_returned_whole": "moto gives no ARN for a policy",
    "test_a_refresh_replaces_every_instance": _500,
    "test_a_warm_pool_is_filled_and_described": "moto's warm pools stay empty",
}


# --- Lifecycle hooks ------------------------------------------------------------------------------


def hook(wire: Wire, name: str, transition: str, **more: Any) -> None:
    asked = {"HeartbeatTimeout": 60, "DefaultResult": "CONTINUE", **more}
    wire.asg.put_lifecycle_hook(
        AutoScalingGroupName=wire.name, LifecycleHookName=name, LifecycleTransition=transition, **asked
    )


def complete(wire: Wire, name: str, instance: str, result: str = "CONTINUE") -> None:
    wire.asg.complete_lifecycle_action(
        AutoScalingGroupName=wire.name, LifecycleHookName=name, InstanceId=instance, LifecycleActionResult=result
    )


def test_hooks_are_described_as_they_were_put(wire: Wire) -> None:
    wire.create()
    hook(wire, "up", LAUNCHING, NotificationMetadata="hello")
    hook(wire, "down", TERMINATING, HeartbeatTimeout=45, DefaultResult="ABANDON")
    found = wire.asg.describe_lifecycle_hooks(AutoScalingGroupName=wire.name)["LifecycleHooks"]
    told = {one["LifecycleHookName"]: one for one in found}
    assert told["up"]["NotificationMetadata"] == "hello"
    assert told["down"]["LifecycleTransition"] == TERMINATING
    assert (told["down"]["HeartbeatTimeout"], told["down"]["GlobalTimeout"]) == (45, 4500)
    assert told["down"]["DefaultResult"] == "ABANDON"
    wire.asg.delete_lifecycle_hook(AutoScalingGroupName=wire.name, LifecycleHookName="up")
    found = wire.asg.describe_lifecycle_hooks(AutoScalingGroupName=wire.name)["LifecycleHooks"]
    assert [one["LifecycleHookName"] for one in found] == ["down"]


def test_repeated_hook_keeps_omitted_fields(wire: Wire) -> None:
    wire.create()
    hook(wire, "up", LAUNCHING, NotificationMetadata="hello")
    wire.asg.put_lifecycle_hook(AutoScalingGroupName=wire.name, LifecycleHookName="up", HeartbeatTimeout=99)
    (found,) = wire.asg.describe_lifecycle_hooks(AutoScalingGroupName=wire.name, LifecycleHookNames=["up"])[
        "LifecycleHooks"
    ]
    assert (found["HeartbeatTimeout"], found["NotificationMetadata"]) == (99, "hello")
    assert found["LifecycleTransition"] == LAUNCHING


def test_an_instance_waits_until_its_launch_is_completed(wire: Wire) -> None:
    spec = {"LifecycleHookName": "up", "LifecycleTransition": LAUNCHING, "HeartbeatTimeout": 60}
    wire.create(DesiredCapacity=1, LifecycleHookSpecificationList=[spec])
    (only,) = wire.until(lambda: wire.instances("Pending:Wait"))
    wire.asg.record_lifecycle_action_heartbeat(AutoScalingGroupName=wire.name, LifecycleHookName="up", InstanceId=only)
    complete(wire, "up", only)
    wire.until(lambda: wire.instances() == [only])
    with refused("ValidationError", f"No active Lifecycle Action found with instance ID {only}"):
        complete(wire, "up", only)


def test_an_action_is_completed_by_its_token(ours: Thread, our: Wire) -> None:
    our.create()
    hook(our, "up", LAUNCHING)
    our.asg.set_desired_capacity(AutoScalingGroupName=our.name, DesiredCapacity=1)
    (only,) = our.until(lambda: our.instances("Pending:Wait"))
    wait = ours.command(lambda engine: engine._groups[our.name].members[only].asg.waits[0])
    action = {"AutoScalingGroupName": our.name, "LifecycleHookName": "up", "LifecycleActionToken": wait.token}
    our.asg.record_lifecycle_action_heartbeat(**action)
    our.asg.complete_lifecycle_action(**action, LifecycleActionResult="CONTINUE")
    our.until(lambda: our.instances() == [only])


def test_a_launch_that_is_abandoned_is_tried_anew(wire: Wire) -> None:
    wire.create()
    hook(wire, "up", LAUNCHING)
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=1)
    (first,) = wire.until(lambda: wire.instances("Pending:Wait"))
    complete(wire, "up", first, "ABANDON")
    (second,) = wire.until(lambda: [name for name in wire.instances("Pending:Wait") if name != first])
    complete(wire, "up", second)
    wire.until(lambda: wire.instances() == [second])


def test_an_instance_waits_until_its_end_is_completed(wire: Wire) -> None:
    (only,) = wire.grow(1)
    hook(wire, "down", TERMINATING)
    wire.asg.set_desired_capacity(AutoScalingGroupName=wire.name, DesiredCapacity=0)
    wire.until(lambda: wire.instances("Terminating:Wait") == [only])
    complete(wire, "down", only)
    wire.until(lambda: wire.group()["Instances"] == [])


def test_missing_hook_is_refused(wire: Wire) -> None:
    (only,) = wire.grow(1)
    with refused("ValidationError"):
        complete(wire, "nothing", only)


# --- Schedules, policies, refreshes, warm pools ---------------------------------------------------


def test_scheduled_actions_are_stored_and_deleted(wire: Wire) -> None:
    wire.create()
    for name, hour, size in (("night", 22, 0), ("day", 9, 1)):
        wire.asg.put_scheduled_update_group_action(
            AutoScalingGroupName=wire.name,
            ScheduledActionName=name,
            Recurrence=f"0 {hour} * * 1-5",
            TimeZone="Europe/Berlin",
            MinSize=size,
        )
    wire.asg.put_scheduled_update_group_action(
        AutoScalingGroupName=wire.name, ScheduledActionName="day", DesiredCapacity=2
    )
    found = wire.asg.describe_scheduled_actions(AutoScalingGroupName=wire.name)
    told = {one["ScheduledActionName"]: one for one in found["ScheduledUpdateGroupActions"]}
    assert sorted(told) == ["day", "night"]
    assert (told["day"]["MinSize"], told["day"]["DesiredCapacity"]) == (1, 2)
    assert told["day"]["Recurrence"] == "0 9 * * 1-5"
    assert told["day"]["TimeZone"] == "Europe/Berlin"
    wire.asg.delete_scheduled_action(AutoScalingGroupName=wire.name, ScheduledActionName="day")
    found = wire.asg.describe_scheduled_actions(AutoScalingGroupName=wire.name)
    assert [a["ScheduledActionName"] for a in found["ScheduledUpdateGroupActions"]] == ["night"]


def test_a_recurrence_that_is_put_again_sets_the_next_run(wire: Wire) -> None:
    wire.create()

    def put(**more: Any) -> datetime:
        wire.asg.put_scheduled_update_group_action(AutoScalingGroupName=wire.name, ScheduledActionName="peak", **more)
        found = wire.asg.describe_scheduled_actions(AutoScalingGroupName=wire.name)
        (one,) = found["ScheduledUpdateGroupActions"]
        start: datetime = one["StartTime"]
        return start

    assert put(Recurrence="0 9 * * *", MinSize=1).hour == 9
    assert put(Recurrence="0 18 * * *").hour == 18
    assert put(MinSize=2).hour == 18
    assert put(TimeZone="Asia/Tokyo").hour == 9, "18:00 in Tokyo is 9:00 UTC"
    once = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    assert put(StartTime=once) == once


def test_a_scheduled_action_is_carried_out(wire: Wire) -> None:
    wire.create()
    wire.asg.put_scheduled_update_group_action(
        AutoScalingGroupName=wire.name,
        ScheduledActionName="soon",
        StartTime=datetime.now(UTC) + timedelta(seconds=2),
        DesiredCapacity=2,
    )
    wire.until(lambda: len(wire.instances()) == 2)


def test_many_scheduled_actions_are_put_and_removed_at_once(wire: Wire) -> None:
    wire.create()
    start = datetime.now(UTC) + timedelta(hours=1)
    failed = wire.asg.batch_put_scheduled_update_group_action(
        AutoScalingGroupName=wire.name,
        ScheduledUpdateGroupActions=[
            {"ScheduledActionName": "good", "StartTime": start, "DesiredCapacity": 1},
            {"ScheduledActionName": "bad", "Recurrence": "whenever", "DesiredCapacity": 1},
        ],
    )["FailedScheduledUpdateGroupActions"]
    assert [one["ScheduledActionName"] for one in failed] == ["bad"]
    failed = wire.asg.batch_delete_scheduled_action(
        AutoScalingGroupName=wire.name, ScheduledActionNames=["good", "bad"]
    )["FailedScheduledActions"]
    assert [one["ScheduledActionName"] for one in failed] == ["bad"]


TRACKING: Any = {
    "TargetValue": 5.0,
    "DisableScaleIn": False,
    "CustomizedMetricSpecification": {
        "MetricName": "Backlog",
        "Namespace": "batchlab",
        "Dimensions": [{"Name": "pool", "Value": "default"}],
        "Statistic": "Average",
    },
}


def test_target_tracking_policy_is_returned_whole(wire: Wire) -> None:
    wire.create()
    put = wire.asg.put_scaling_policy(
        AutoScalingGroupName=wire.name,
        PolicyName="track",
        PolicyType="TargetTrackingScaling",
        TargetTrackingConfiguration=TRACKING,
    )
    found = wire.asg.describe_policies(AutoScalingGroupName=wire.name)["ScalingPolicies"]
    assert found[0]["TargetTrackingConfiguration"] == TRACKING
    assert found[0]["PolicyARN"] == put["PolicyARN"]
    wire.asg.delete_policy(AutoScalingGroupName=wire.name, PolicyName="track")
    assert wire.asg.describe_policies(AutoScalingGroupName=wire.name)["ScalingPolicies"] == []


def test_a_target_tracking_policy_has_two_alarms(our: Wire) -> None:
    our.create()
    put = our.asg.put_scaling_policy(
        AutoScalingGroupName=our.name,
        PolicyName="track",
        PolicyType="TargetTrackingScaling",
        TargetTrackingConfiguration=TRACKING,
    )
    high, low = put["Alarms"]
    assert high["AlarmName"].startswith(f"TargetTracking-{our.name}-AlarmHigh-")
    assert low["AlarmARN"] == f"arn:aws:cloudwatch:us-east-1:000000000000:alarm:{low['AlarmName']}"
    (policy,) = our.asg.describe_policies(AutoScalingGroupName=our.name)["ScalingPolicies"]
    assert policy["Alarms"] == put["Alarms"]


def test_a_metric_that_is_put_in_scales_the_group(ours: Thread, our: Wire) -> None:
    cloudwatch = aws(ours.endpoint, "cloudwatch")
    our.grow(1)
    our.asg.put_scaling_policy(
        AutoScalingGroupName=our.name,
        PolicyName="track",
        PolicyType="TargetTrackingScaling",
        EstimatedInstanceWarmup=0,
        TargetTrackingConfiguration=TRACKING,
    )
    metric = TRACKING["CustomizedMetricSpecification"]
    told = {"MetricName": metric["MetricName"], "Dimensions": metric["Dimensions"], "Value": 14.0}
    cloudwatch.put_metric_data(Namespace=metric["Namespace"], MetricData=[told])
    our.until(lambda: len(our.instances()) >= 3)
    cloudwatch.close()


def test_a_simple_policy_is_executed(wire: Wire) -> None:
    wire.create(DesiredCapacity=1)
    wire.asg.put_scaling_policy(
        AutoScalingGroupName=wire.name,
        PolicyName="more",
        AdjustmentType="ChangeInCapacity",
        ScalingAdjustment=2,
        Cooldown=0,
    )
    wire.asg.execute_policy(AutoScalingGroupName=wire.name, PolicyName="more")
    wire.until(lambda: len(wire.instances()) == 3)


def test_a_refresh_replaces_every_instance(wire: Wire) -> None:
    before = wire.grow(2)
    found = wire.asg.start_instance_refresh(
        AutoScalingGroupName=wire.name,
        Preferences={"MinHealthyPercentage": 0, "InstanceWarmup": 0},
        DesiredConfiguration={"LaunchTemplate": {"LaunchTemplateName": TEMPLATE, "Version": "$Latest"}},
    )["InstanceRefreshId"]

    def ended() -> bool:
        (refresh,) = wire.asg.describe_instance_refreshes(AutoScalingGroupName=wire.name)["InstanceRefreshes"]
        assert refresh["InstanceRefreshId"] == found
        return refresh["Status"] == "Successful"

    wire.until(ended, limit_s=30)
    after = wire.instances()
    assert len(after) == 2
    assert not set(before) & set(after)
    with refused("ActiveInstanceRefreshNotFound"):
        wire.asg.cancel_instance_refresh(AutoScalingGroupName=wire.name)


def test_a_preference_that_is_not_served_is_refused_and_not_dropped(our: Wire) -> None:
    our.grow(1)
    with refused("ValidationError", "not support the preferences AlarmSpecification, BakeTime."):
        our.asg.start_instance_refresh(
            AutoScalingGroupName=our.name, Preferences={"BakeTime": 60, "AlarmSpecification": {"Alarms": ["a"]}}
        )


def test_a_warm_pool_is_filled_and_described(wire: Wire) -> None:
    wire.grow(1)
    wire.asg.put_warm_pool(
        AutoScalingGroupName=wire.name,
        MinSize=1,
        MaxGroupPreparedCapacity=2,
        PoolState="Running",
        InstanceReusePolicy={"ReuseOnScaleIn": True},
    )
    wire.until(lambda: wire.asg.describe_warm_pool(AutoScalingGroupName=wire.name)["Instances"])
    told = wire.asg.describe_warm_pool(AutoScalingGroupName=wire.name)["WarmPoolConfiguration"]
    assert told["PoolState"] == "Running"
    assert told["InstanceReusePolicy"] == {"ReuseOnScaleIn": True}
    assert (told["MinSize"], told["MaxGroupPreparedCapacity"]) == (1, 2)
    wire.asg.delete_warm_pool(AutoScalingGroupName=wire.name, ForceDelete=True)

    def emptied() -> bool:
        answer = wire.asg.describe_warm_pool(AutoScalingGroupName=wire.name)
        return not answer.get("Instances") and "WarmPoolConfiguration" not in answer

    wire.until(emptied)
