"""Auto Scaling groups: create, change, delete, desired capacity, activities, and processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import (
    AlreadyExists,
    Fault,
    GroupConfig,
    LaunchTemplate,
    LimitExceeded,
    MixedInstancesPolicy,
    Override,
    Process,
    RefreshPreferences,
    ResourceInUse,
    ScalingActivityInProgress,
    Tag,
    ValidationError,
    WarmPool,
)
from batchlab.fleet.group_state import KEEP_DELETED
from tests.support.autoscaling_group import CONFIG, GROUP, World, in_aws


@in_aws
async def test_a_new_group_launches_its_desired_capacity(w: World) -> None:
    assert len(await w.group(2)) == 2
    assert w.states() == ["InService"] * 2
    assert w.view().desired_capacity == 2


@in_aws
async def test_desired_capacity_defaults_to_the_minimum(w: World) -> None:
    w.asg.create_auto_scaling_group(replace(CONFIG, min_size=3))
    assert w.view().desired_capacity == 3


@in_aws
async def test_a_name_is_taken_once(w: World) -> None:
    await w.group()
    with pytest.raises(AlreadyExists, match="A group with the name g already exists"):
        w.asg.create_auto_scaling_group(CONFIG)
    assert AlreadyExists.code == "AlreadyExists"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_size": 4, "max_size": 2}, "Max bound, 2, must be greater than or equal to min"),
        ({"availability_zones": ()}, "At least one Availability Zone or VPC Subnet is required"),
        ({"launch_template": None}, "Valid requests must contain either LaunchTemplate"),
        ({"launch_template": LaunchTemplate("", "nobody")}, "launch template does not exist"),
        ({"launch_template": LaunchTemplate("lt-7", "workers")}, "either launchTemplateId or LaunchTemplateName"),
        ({"launch_template": LaunchTemplate(version="1")}, "either launchTemplateId or LaunchTemplateName"),
        ({"termination_policies": ("Youngest",)}, "Youngest"),
        ({"health_check_type": "EC2,PING"}, "Invalid HealthCheckType: PING. Valid values are"),
        ({"max_instance_lifetime": 30}, "MaxInstanceLifetime"),
        ({"health_check_grace_period": -1}, "HealthCheckGracePeriod"),
        ({"auto_scaling_group_name": ""}, "AutoScalingGroupName"),
    ],
)
def test_invalid_request_is_refused_without_effect(wrong: dict[str, Any], message: str) -> None:
    w = World()
    with pytest.raises(ValidationError, match=message):
        w.asg.create_auto_scaling_group(replace(CONFIG, **wrong))
    assert w.asg.describe_auto_scaling_groups() == []
    assert w.store.load() is None


@in_aws
async def test_desired_capacity_outside_the_limits_is_refused(w: World) -> None:
    with pytest.raises(ValidationError, match="Desired capacity:11 must be between"):
        w.asg.create_auto_scaling_group(CONFIG, desired_capacity=11)
    await w.group(2, replace(CONFIG, min_size=1))
    with pytest.raises(ValidationError, match="value 11 is above max value 10"):
        w.asg.set_desired_capacity(GROUP, 11)
    with pytest.raises(ValidationError, match="value 0 is below min value 1"):
        w.asg.set_desired_capacity(GROUP, 0)
    with pytest.raises(ValidationError, match="AutoScalingGroup name not found"):
        w.asg.set_desired_capacity("nobody", 1)
    assert w.view().desired_capacity == 2


@in_aws
async def test_new_limits_move_desired_capacity(w: World) -> None:
    await w.group(2)
    w.asg.update_auto_scaling_group(GROUP, {"min_size": 4})
    assert w.view().desired_capacity == 4
    w.asg.update_auto_scaling_group(GROUP, {"min_size": 0, "max_size": 1})
    assert w.view().desired_capacity == 1
    await w.tick(times=3)
    assert w.states() == ["InService"]


@in_aws
async def test_an_update_changes_only_what_it_names(w: World) -> None:
    await w.group(1)
    mixed = MixedInstancesPolicy(LaunchTemplate("", "workers"))
    w.asg.update_auto_scaling_group(GROUP, {"mixed_instances_policy": mixed, "default_cooldown": 9})
    config = w.view().config
    assert config.launch_template is None
    assert config.mixed_instances_policy is not None
    assert config.mixed_instances_policy.launch_template.launch_template_name == "workers"
    assert (config.default_cooldown, config.max_size) == (9, 10)
    w.asg.update_auto_scaling_group(GROUP, {"default_instance_warmup": -1}, desired_capacity=3)
    assert (w.view().config.default_instance_warmup, w.view().desired_capacity) == (None, 3)


@in_aws
async def test_a_group_with_instances_is_deleted_only_by_force(w: World) -> None:
    names = await w.group(2)
    with pytest.raises(ResourceInUse, match="while there are instances"):
        w.asg.delete_auto_scaling_group(GROUP)
    w.asg.delete_auto_scaling_group(GROUP, force_delete=True)
    assert w.view().status == "Delete in progress"
    with pytest.raises(ValidationError, match="may not be modified while it is pending delete"):
        w.asg.set_desired_capacity(GROUP, 3)
    await w.tick(times=3)
    assert w.asg.describe_auto_scaling_groups() == []
    assert [name for name, _ in w.launcher.terminated] == names


@in_aws
async def test_a_group_that_still_ends_instances_is_not_deleted(w: World) -> None:
    await w.group(1)
    w.launcher.deaf = True
    await w.resize(0)
    with pytest.raises(ScalingActivityInProgress, match="scaling activities in progress"):
        w.asg.delete_auto_scaling_group(GROUP)
    w.launcher.crash(w.launcher.launched[0])
    await w.tick()
    w.asg.delete_auto_scaling_group(GROUP)
    assert w.asg.describe_auto_scaling_groups() == []


@in_aws
async def test_descriptions_complete_the_reference_to_a_template(w: World) -> None:
    await w.group(0, replace(CONFIG, launch_template=LaunchTemplate("", "workers")))
    assert w.view().config.launch_template == LaunchTemplate("lt-7", "workers", "")
    mixed = MixedInstancesPolicy(
        LaunchTemplate("lt-7", "", "$Latest"),
        (Override("m.large", launch_template_specification=LaunchTemplate("", "workers", "1")),),
    )
    w.asg.update_auto_scaling_group(GROUP, {"mixed_instances_policy": mixed})
    found = w.view().config.mixed_instances_policy
    assert found is not None
    assert found.launch_template == LaunchTemplate("lt-7", "workers", "$Latest")
    assert found.overrides[0].launch_template_specification == LaunchTemplate("lt-7", "workers", "1")
    w.asg.update_auto_scaling_group(GROUP, {"default_cooldown": 1})
    assert w.view().config.mixed_instances_policy == found
    with pytest.raises(ValidationError, match="either launchTemplateId or LaunchTemplateName"):
        w.asg.update_auto_scaling_group(GROUP, {"launch_template": LaunchTemplate("lt-7", "workers")})


@in_aws
async def test_a_template_is_read_at_every_launch(w: World) -> None:
    latest = LaunchTemplate("", "workers", "$Latest")
    await w.group(1, replace(CONFIG, launch_template=latest))
    w.templates.put(2, instance_type="m.xlarge", slots=4, env=(("A", "b"),))
    await w.resize(2)
    assert [i.instance_type for i in w.instances()] == ["m.large", "m.xlarge"]
    versions = [i.launch_template.version for i in w.instances() if i.launch_template]
    assert versions == ["1", "2"]
    given = w.launcher.pools[w.instances()[1].instance_id]
    assert (given.name, given.slots, given.env) == (GROUP, 4, (("A", "b"),))


@in_aws
async def test_deleted_template_fails_the_launch_with_its_reason(w: World) -> None:
    await w.group(0)
    w.templates.table.clear()
    await w.resize(1)
    (newest, *_) = [a for a in w.activities() if a.status_code == "Failed"]
    assert "Status Reason: The specified launch template does not exist" in newest.description
    w.templates.put(1, instance_type="m.large")
    await w.tick(61.0, times=2)
    assert w.states() == ["InService"]


@in_aws
async def test_tags_are_added_and_removed(w: World) -> None:
    await w.group(1, tags=[Tag("team", "a", propagate_at_launch=True), Tag("cost", "x")])
    w.asg.create_or_update_tags({GROUP: [Tag("cost", "y")]})
    assert w.view().tags == (Tag("cost", "y"), Tag("team", "a", True))
    assert w.asg.metadata(w.instances()[0].instance_id).tags == (("team", "a"),)
    w.asg.delete_tags(GROUP, ["team", "nothing"])
    assert w.view().tags == (Tag("cost", "y"),)


@pytest.mark.parametrize(
    ("tags", "error", "message"),
    [
        ([Tag("a"), Tag("a", "b")], ValidationError, "only once"),
        ([Tag("aws:cost")], ValidationError, "reserved"),
        ([Tag(f"key{n}") for n in range(51)], LimitExceeded, "50 tags"),
    ],
)
def test_tags_that_aws_does_not_allow_are_refused(tags: list[Tag], error: type[Fault], message: str) -> None:
    w = World()
    with pytest.raises(error, match=message):
        w.asg.create_auto_scaling_group(CONFIG, tags=tags)
    assert w.asg.describe_auto_scaling_groups() == []
    w.asg.create_auto_scaling_group(CONFIG, tags=[Tag(f"key{n}") for n in range(50)])
    with pytest.raises(error, match=message):
        w.asg.create_or_update_tags({GROUP: tags})
    assert len(w.view().tags) == 50


@in_aws
async def test_new_instances_may_be_protected_from_the_start(w: World) -> None:
    await w.group(1, replace(CONFIG, new_instances_protected_from_scale_in=True))
    await w.resize(0)
    assert w.states() == ["InService"]
    assert w.instances()[0].protected_from_scale_in
    told = [a for a in w.activities() if "protected from scale-in" in a.description]
    assert [activity.status_code for activity in told] == ["Cancelled"]


# --- Activities -----------------------------------------------------------------------------------


@in_aws
async def test_activities_speak_as_aws_does(w: World) -> None:
    (name,) = await w.group(1)
    (launch,) = w.activities()
    assert launch.description == f"Launching a new EC2 instance: {name}"
    at = "At 2023-11-14T22:30:00Z"
    assert launch.cause == (
        f"{at} a user request created an AutoScalingGroup changing the desired capacity from 0 to"
        f" 1.  {at} an instance was started in response to a difference between desired and actual"
        " capacity, increasing the capacity from 0 to 1."
    )
    assert (launch.status_code, launch.progress) == ("Successful", 100)
    assert launch.end_time == launch.start_time
    assert launch.details == '{"Availability Zone": "us-east-1a"}'
    await w.resize(0)
    (end, _) = w.activities()
    assert end.description == f"Terminating EC2 instance: {name}"
    assert end.cause == (
        f"{at} a user request explicitly set group desired capacity changing the desired capacity"
        f" from 1 to 0.  {at} an instance was taken out of service in response to a difference"
        " between desired and actual capacity, shrinking the capacity from 1 to 0."
        f"  {at} instance {name} was selected for termination."
    )
    assert w.asg.describe_scaling_activities(activity_ids=[end.activity_id]) == [end]


@in_aws
async def test_cause_of_an_unreachable_capacity_is_bounded(w: World) -> None:
    w.launcher.refuse = "no capacity"
    await w.group(1)
    for n in range(100):
        w.asg.set_desired_capacity(GROUP, 1 + n % 2)
        await w.tick(61.0)
    longest = max(len(activity.cause) for activity in w.activities())
    assert longest < 1_023


@in_aws
async def test_an_activity_under_way_has_no_end(w: World) -> None:
    await w.group(1)
    w.launcher.deaf = True
    await w.resize(0)
    end = w.activities()[0]
    assert (end.status_code, end.progress, end.end_time) == ("InProgress", 50, None)


@in_aws
async def test_failed_launch_gives_its_reason(w: World) -> None:
    w.launcher.refuse = "no capacity in this zone"
    await w.group(1)
    assert w.states() == []
    failed = [a for a in w.activities() if a.status_code == "Failed"]
    assert failed[-1].status_message == "its launch failed: no capacity in this zone"
    assert failed[-1].description.endswith(f".  Status Reason: {failed[-1].status_message}")


@in_aws
async def test_long_reason_is_cut_to_the_limits_of_aws(w: World) -> None:
    w.launcher.refuse = "x" * 2_000
    await w.group(1)
    failed = [a for a in w.activities() if a.status_code == "Failed"][-1]
    assert (len(failed.cause), len(failed.status_message)) == (1_023, 255)
    assert failed.description.endswith(f".  Status Reason: its launch failed: {w.launcher.refuse}")


@in_aws
async def test_activities_of_a_deleted_group_are_listed_on_request(w: World) -> None:
    await w.group(1)
    w.asg.delete_auto_scaling_group(GROUP, force_delete=True)
    await w.tick(times=3)
    assert w.asg.describe_scaling_activities() == []
    kept = w.asg.describe_scaling_activities(GROUP, include_deleted_groups=True)
    assert [activity.auto_scaling_group_state for activity in kept] == ["Deleted"] * 2
    with pytest.raises(ValidationError):
        w.asg.describe_scaling_activities(GROUP)
    await w.group(1)
    (launch,) = w.asg.describe_scaling_activities(GROUP)
    assert launch.auto_scaling_group_state == "InService"
    assert launch.auto_scaling_group_arn == w.view().auto_scaling_group_arn
    assert w.asg.describe_scaling_activities(GROUP, include_deleted_groups=True) == [launch, *kept]


@in_aws
async def test_activities_of_the_newest_deleted_groups_are_stored(w: World) -> None:
    await w.group(1)
    for number in range(KEEP_DELETED + 5):
        name = f"g-{number:03}"
        w.asg.create_auto_scaling_group(replace(CONFIG, auto_scaling_group_name=name), desired_capacity=1)
        await w.tick()
        w.asg.delete_auto_scaling_group(name, force_delete=True)
        await w.tick(times=3)
    w.restart()
    found = w.asg.describe_scaling_activities(include_deleted_groups=True)
    assert {activity.auto_scaling_group_name for activity in found} == {
        GROUP,
        *(f"g-{number:03}" for number in range(5, KEEP_DELETED + 5)),
    }


# --- Processes ------------------------------------------------------------------------------------


@in_aws
async def test_without_launch_nothing_is_launched_until_it_is_resumed(w: World) -> None:
    await w.group(1)
    w.asg.suspend_processes(GROUP, ["Launch"])
    await w.resize(3)
    assert w.states() == ["InService"]
    w.asg.resume_processes(GROUP, ["Launch"])
    await w.tick()
    assert w.states() == ["InService"] * 3


@in_aws
async def test_without_terminate_nothing_is_scaled_in_until_it_is_resumed(w: World) -> None:
    await w.group(2)
    w.asg.suspend_processes(GROUP, ["Terminate"])
    await w.resize(0)
    assert w.states() == ["InService"] * 2
    w.asg.resume_processes(GROUP)
    await w.tick(times=2)
    assert w.states() == []


@in_aws
async def test_without_terminate_force_delete_still_ends_instances(w: World) -> None:
    await w.group(2)
    w.asg.suspend_processes(GROUP)
    w.asg.delete_auto_scaling_group(GROUP, force_delete=True)
    await w.tick(times=3)
    assert w.asg.describe_auto_scaling_groups() == []


@in_aws
async def test_suspended_processes_are_listed_with_their_reason(w: World) -> None:
    await w.group()
    w.asg.suspend_processes(GROUP, ["HealthCheck", "AddToLoadBalancer"])
    reason = "User suspended at 2023-11-14T22:30:00Z"
    assert w.view().suspended_processes == ((Process.ADD_TO_LOAD_BALANCER, reason), (Process.HEALTH_CHECK, reason))
    w.asg.suspend_processes(GROUP)
    assert len(w.view().suspended_processes) == len(Process)
    with pytest.raises(ValidationError, match="Nonsense"):
        w.asg.suspend_processes(GROUP, ["Nonsense"])


# --- Cooldown -------------------------------------------------------------------------------------


@in_aws
async def test_a_cooldown_that_is_honoured_refuses_until_it_is_over(w: World) -> None:
    await w.group(1, replace(CONFIG, default_cooldown=100))
    await w.resize(2)
    w.asg.set_desired_capacity(GROUP, 3)
    with pytest.raises(ScalingActivityInProgress, match="is in progress and blocks this action"):
        w.asg.set_desired_capacity(GROUP, 4, honor_cooldown=True)
    await w.tick(times=3)
    await w.tick(99.0)
    with pytest.raises(ScalingActivityInProgress):
        w.asg.set_desired_capacity(GROUP, 4, honor_cooldown=True)
    await w.tick(2.0)
    w.asg.set_desired_capacity(GROUP, 4, honor_cooldown=True)
    assert w.view().desired_capacity == 4


@in_aws
async def test_cooldown_begins_at_the_end_of_the_activity(w: World) -> None:
    await w.group(1, replace(CONFIG, default_cooldown=100))
    w.launcher.deaf = True
    await w.resize(0)
    await w.tick(1_000.0)
    with pytest.raises(ScalingActivityInProgress):
        w.asg.set_desired_capacity(GROUP, 1, honor_cooldown=True)


# --- A restart ------------------------------------------------------------------------------------


@in_aws
async def test_all_survives_a_restart(w: World) -> None:
    await w.group(3, tags=[Tag("a", "b")])
    w.asg.suspend_processes(GROUP, ["AZRebalance"])
    await w.resize(2)
    before = w.view(), w.activities()
    w.restart()
    assert (w.view(), w.activities()) == before
    assert await w.tick() != [], "the dead are reported again"
    assert (w.view(), w.activities()) == before


@in_aws
async def test_instances_that_died_meanwhile_are_replaced_after_a_restart(w: World) -> None:
    first, _ = await w.group(2)
    w.launcher.crash(first)
    w.restart()
    await w.tick(times=2)
    assert len(w.ids_in(LifecycleState.IN_SERVICE)) == 2
    assert first not in w.ids_in(LifecycleState.IN_SERVICE)


def test_every_fault_is_a_refusal_with_a_code() -> None:
    kinds = Fault.__subclasses__()
    assert len({kind.code for kind in kinds}) == len(kinds) >= 8


@in_aws
async def test_instances_of_one_machine_have_its_gpus_one_after_another(w: World) -> None:
    w.options["one_machine"] = True
    w.restart()
    w.templates.put(1, instance_type="m.large", gpus=1)
    w.templates.put(1, name="plain")
    (first,) = await w.group(2)
    other = replace(CONFIG, auto_scaling_group_name="h")
    w.asg.create_auto_scaling_group(other, desired_capacity=1)
    plain = replace(CONFIG, auto_scaling_group_name="p", launch_template=LaunchTemplate("", "plain", "1"))
    w.asg.create_auto_scaling_group(plain, desired_capacity=3)
    w.launcher.deaf = True
    w.asg.terminate_instance_in_auto_scaling_group(first, should_decrement_desired_capacity=False)
    await w.tick(1.0, times=5)
    assert w.states() == ["Terminating"], "the tasks of the ending instance still use the GPU"
    assert len(w.view("p").instances) == 3, "instances without GPUs do not wait"
    w.launcher.crash(first)
    await w.tick(1.0, times=5)
    alive = [i for name in ("g", "h") for i in w.view(name).instances if i.lifecycle_state != "Terminated"]
    assert [str(i.lifecycle_state) for i in alive] == ["InService"]
    assert alive[0].instance_id != first


async def _with_gpus(w: World, config: GroupConfig = CONFIG) -> str:
    """Create the group with one instance with GPUs on a machine that all instances share, and return the instance."""
    w.options["one_machine"] = True
    w.restart()
    w.templates.put(1, instance_type="m.large", gpus=1)
    (first,) = await w.group(1, config)
    return first


@in_aws
async def test_an_instance_refresh_ends_an_instance_with_gpus_first(w: World) -> None:
    first = await _with_gpus(w)
    preferences = RefreshPreferences(min_healthy_percentage=100, max_healthy_percentage=200)
    w.asg.start_instance_refresh(GROUP, preferences=preferences)
    await w.tick(1.0, times=6)
    (refresh,) = w.asg.describe_instance_refreshes(GROUP)
    assert refresh.status == "Successful"
    assert len(w.ids_in(LifecycleState.IN_SERVICE)) == 1
    assert first not in w.ids_in(LifecycleState.IN_SERVICE)
    assert w.causes()[f"Terminating EC2 instance: {first}"].endswith("in response to an instance refresh.")
    assert not any(activity.status_code == "Failed" for activity in w.activities())


@in_aws
async def test_the_end_of_a_lifetime_ends_an_instance_with_gpus_first(w: World) -> None:
    first = await _with_gpus(w, replace(CONFIG, max_instance_lifetime=60))
    w.asg.suspend_processes(GROUP, ["Launch"])
    await w.tick(60.0, times=3)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [first], "without launches, no instance is replaced"
    w.asg.resume_processes(GROUP)
    await w.tick(1.0, times=6)
    assert len(w.ids_in(LifecycleState.IN_SERVICE)) == 1
    assert first not in w.ids_in(LifecycleState.IN_SERVICE)


@in_aws
async def test_a_launch_that_waits_for_gpus_has_a_reason(w: World) -> None:
    first = await _with_gpus(w)
    w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=False)
    await w.tick(1.0, times=9)
    what = f"Launching a new EC2 instance.  Status Reason: The GPUs of this machine are in use by {first} (Standby)."
    (failed,) = [activity for activity in w.activities() if activity.status_code == "Failed"]
    assert failed.description == what
    assert failed.cause.endswith(f"because the GPUs of this machine are in use by {first} (Standby).")
    with pytest.raises(ValidationError, match="a group with GPUs cannot have a warm pool"):
        w.asg.put_warm_pool(GROUP, WarmPool(pool_state="Running"))
