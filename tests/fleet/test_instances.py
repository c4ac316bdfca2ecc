"""Single instances of a group: health, termination, protection, and standby."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import ValidationError
from tests.support.autoscaling_group import CONFIG, GROUP, World, hook, in_aws

# --- Health ---------------------------------------------------------------------------------------


@in_aws
async def test_an_instance_that_died_is_replaced_in_awss_words(w: World) -> None:
    (name,) = await w.group(1)
    w.clock.time_s += 20.0
    w.launcher.crash(name, "exit -9")
    (dead,) = await w.tick()
    assert (dead.id, dead.note) == (name, "exit -9")
    assert w.states() == ["InService"]
    causes = " ".join(w.causes().values())
    assert (
        "an instance was taken out of service in response to an EC2 health check indicating it has"
        " been terminated or stopped (exit -9)." in causes
    )
    assert "launched in response to an unhealthy instance needing to be replaced." in causes


@in_aws
async def test_an_instance_called_unhealthy_is_replaced(w: World) -> None:
    (name,) = await w.group(1)
    w.asg.set_instance_health(name, "Unhealthy")
    assert w.one(name).health_status == "Unhealthy"
    await w.tick(times=2)
    assert name not in w.ids_in(LifecycleState.IN_SERVICE)
    assert "taken out of service in response to a user health-check." in w.causes()[f"Terminating EC2 instance: {name}"]


@in_aws
async def test_instance_set_healthy_in_time_stays(w: World) -> None:
    (name,) = await w.group(1)
    w.asg.set_instance_health(name, "Unhealthy")
    w.asg.set_instance_health(name, "Healthy")
    await w.tick(times=2)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [name]
    with pytest.raises(ValidationError, match="Valid instance health states"):
        w.asg.set_instance_health(name, "Poorly")
    with pytest.raises(ValidationError, match="No managed instance found for instance ID: nobody"):
        w.asg.set_instance_health("nobody", "Healthy")


@in_aws
async def test_unhealthy_within_the_grace_period_counts_only_if_it_is_not_respected(w: World) -> None:
    (name,) = await w.group(1, replace(CONFIG, health_check_grace_period=100))
    await w.tick(99.0)
    w.asg.set_instance_health(name, "Unhealthy")
    assert w.one(name).health_status == "Healthy"
    w.asg.set_instance_health(name, "Unhealthy", should_respect_grace_period=False)
    assert w.one(name).health_status == "Unhealthy"


@in_aws
async def test_unhealthy_after_the_grace_period_counts(w: World) -> None:
    (name,) = await w.group(1, replace(CONFIG, health_check_grace_period=100))
    await w.tick(100.0)
    w.asg.set_instance_health(name, "Unhealthy")
    assert w.one(name).health_status == "Unhealthy"


@in_aws
async def test_grace_period_does_not_keep_a_dead_instance(w: World) -> None:
    (name,) = await w.group(1, replace(CONFIG, health_check_grace_period=1_000))
    w.launcher.crash(name)
    await w.tick()
    assert name not in w.ids_in(*LifecycleState)


@in_aws
async def test_dead_instance_stays_without_health_checks_and_a_custom_check_counts(w: World) -> None:
    dead, called = await w.group(2)
    w.asg.suspend_processes(GROUP, ["HealthCheck"])
    w.launcher.crash(dead)
    w.asg.set_instance_health(called, "Unhealthy")
    await w.tick(times=2)
    assert dead in w.ids_in(LifecycleState.IN_SERVICE)
    assert called not in w.ids_in(LifecycleState.IN_SERVICE)
    w.asg.resume_processes(GROUP, ["HealthCheck"])
    await w.tick(times=2)
    assert dead not in w.ids_in(LifecycleState.IN_SERVICE)


@in_aws
async def test_without_replacement_the_unhealthy_are_marked_and_replaced_later(w: World) -> None:
    dead, called = await w.group(2)
    w.asg.suspend_processes(GROUP, ["ReplaceUnhealthy"])
    w.launcher.crash(dead)
    w.asg.set_instance_health(called, "Unhealthy")
    await w.tick(times=2)
    assert [i.health_status for i in w.instances()] == ["Unhealthy"] * 2
    assert w.states() == ["InService"] * 2
    w.asg.resume_processes(GROUP)
    await w.tick(times=3)
    assert not {dead, called} & set(w.ids_in(*LifecycleState))
    assert w.states() == ["InService"] * 2


@in_aws
async def test_instances_that_die_at_once_make_a_crash_loop(w: World) -> None:
    """Workers do not report readiness in this test, so early deaths are recognized by their time."""
    await w.group(1)
    for _ in range(60):
        for name in w.ids_in(LifecycleState.IN_SERVICE):
            w.launcher.crash(name, "exit 1")
        await w.tick(0.5)
    assert 5 < len(w.launcher.launched) < 12
    (wait, *_) = [a for a in w.activities() if a.description.startswith("Waiting")]
    assert wait.cause.endswith("ended before they were ready, the last: exit 1")
    await w.tick(60.0)
    assert w.states() == ["InService"]
    await w.tick(10.0)
    w.asg.set_desired_capacity(GROUP, 3)
    await w.tick()
    assert len(w.states()) == 3, "one that stayed ends the loop"


@in_aws
async def test_older_healthy_instances_do_not_end_the_crash_loop_of_new_ones(w: World) -> None:
    await w.group(2)
    await w.tick(100.0)
    w.asg.set_desired_capacity(GROUP, 3)
    for _ in range(60):
        await w.tick(0.5)
        for name in w.ids_in(LifecycleState.IN_SERVICE)[2:]:
            w.launcher.crash(name, "exit 1")
    assert 5 < len(w.launcher.launched) < 14


# --- Termination and protection -------------------------------------------------------------------


@in_aws
async def test_named_instance_is_terminated_with_or_without_lower_capacity(w: World) -> None:
    first, second, third = await w.group(3)
    activity = w.asg.terminate_instance_in_auto_scaling_group(first, should_decrement_desired_capacity=True)
    assert activity.description == f"Terminating EC2 instance: {first}"
    assert activity.cause.endswith("in response to a user request, shrinking the capacity from 3 to 2.")
    again = w.asg.terminate_instance_in_auto_scaling_group(first, should_decrement_desired_capacity=True)
    assert again.activity_id == activity.activity_id
    assert w.view().desired_capacity == 2
    w.asg.terminate_instance_in_auto_scaling_group(second, should_decrement_desired_capacity=False)
    await w.tick(times=3)
    assert w.view().desired_capacity == len(w.states()) == 2
    assert third in w.ids_in(LifecycleState.IN_SERVICE)


@in_aws
async def test_capacity_at_the_minimum_is_kept(w: World) -> None:
    (name,) = await w.group(1, replace(CONFIG, min_size=1))
    with pytest.raises(ValidationError, match=r"Currently, desiredSize equals minSize \(1\)"):
        w.asg.terminate_instance_in_auto_scaling_group(name, should_decrement_desired_capacity=True)
    assert w.states() == ["InService"]


@in_aws
async def test_protected_instances_are_not_scaled_in_but_may_be_terminated(w: World) -> None:
    first, second = await w.group(2)
    w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=True)
    await w.resize(0)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [first]
    w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=False)
    assert w.ids_in(LifecycleState.IN_SERVICE) == []
    with pytest.raises(ValidationError, match="is not in InService"):
        w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=True)
    with pytest.raises(ValidationError, match="is not part of Auto Scaling group g"):
        w.asg.set_instance_protection(GROUP, [second], protected_from_scale_in=True)


@in_aws
async def test_instances_are_neither_attached_nor_detached(w: World) -> None:
    (name,) = await w.group(1)
    with pytest.raises(ValidationError, match="no instances but"):
        w.asg.attach_instances(GROUP, ["i-other"])
    with pytest.raises(ValidationError, match="not supported"):
        w.asg.detach_instances(GROUP, [name], should_decrement_desired_capacity=True)
    assert w.states() == ["InService"]


# --- Standby --------------------------------------------------------------------------------------


@in_aws
async def test_standby_with_its_place_lowers_desired_capacity_until_it_returns(w: World) -> None:
    first, second = await w.group(2)
    (out,) = w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=True)
    assert (out.status_code, out.progress) == ("InProgress", 50)
    assert out.cause.endswith(
        f"instance {first} was moved to standby in response to a user request, shrinking the capacity from 2 to 1."
    )
    assert w.states() == ["EnteringStandby", "InService"]
    await w.tick()
    assert (w.states(), w.view().desired_capacity) == (["Standby", "InService"], 1)
    assert w.asg.metadata(first).target_lifecycle_state == "Standby"
    (back,) = w.asg.exit_standby(GROUP, [first])
    assert back.description == f"Moving EC2 instance out of Standby: {first}"
    assert back.cause.endswith("increasing the capacity from 1 to 2.")
    assert (w.states(), w.view().desired_capacity) == (["Pending", "InService"], 2)
    await w.tick()
    assert w.ids_in(LifecycleState.IN_SERVICE) == [first, second]
    assert {a.status_code for a in w.activities()} == {"Successful"}


@in_aws
async def test_standby_without_its_place_is_replaced_and_its_return_is_one_too_many(w: World) -> None:
    first, _ = await w.group(2)
    w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=False)
    await w.tick(times=2)
    assert sorted(w.states()) == ["InService", "InService", "Standby"]
    w.asg.exit_standby(GROUP, [first])
    await w.tick(times=3)
    assert w.view().desired_capacity == 3
    await w.resize(2)
    assert w.states() == ["InService"] * 2


@in_aws
async def test_health_of_a_standby_instance_is_not_checked(w: World) -> None:
    (name,) = await w.group(1)
    w.asg.enter_standby(GROUP, [name], should_decrement_desired_capacity=True)
    await w.tick()
    w.launcher.crash(name)
    await w.tick(times=2)
    assert (w.states(), w.one(name).health_status) == (["Standby"], "Healthy")
    w.asg.exit_standby(GROUP, [name])
    await w.tick(times=2)
    assert name not in w.ids_in(*LifecycleState)
    assert w.states() == ["InService"]


@in_aws
async def test_instance_leaving_standby_runs_no_hook(w: World) -> None:
    (name,) = await w.group(1)
    w.asg.put_lifecycle_hook(hook())
    w.asg.enter_standby(GROUP, [name], should_decrement_desired_capacity=True)
    await w.tick()
    w.asg.exit_standby(GROUP, [name])
    await w.tick()
    assert w.ids_in(LifecycleState.IN_SERVICE) == [name]


@in_aws
async def test_standby_that_makes_no_sense_is_refused(w: World) -> None:
    first, second = await w.group(2, replace(CONFIG, min_size=2, max_size=2))
    with pytest.raises(ValidationError, match="To place into standby 1 instance, please update"):
        w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=True)
    with pytest.raises(ValidationError, match="is not in Standby state"):
        w.asg.exit_standby(GROUP, [first])
    w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=False)
    with pytest.raises(ValidationError, match="is not in InService state"):
        w.asg.enter_standby(GROUP, [second, first], should_decrement_desired_capacity=False)
    await w.tick()
    with pytest.raises(ValidationError, match="To bring out of standby 1 instance"):
        w.asg.exit_standby(GROUP, [first])
    w.asg.suspend_processes(GROUP, ["Launch"])
    with pytest.raises(ValidationError, match="while the Launch process is suspended"):
        w.asg.exit_standby(GROUP, [first])
