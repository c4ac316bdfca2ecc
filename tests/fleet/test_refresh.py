"""Instance refresh: the number of concurrent replacements, the skipped instances, the pauses, and the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import (
    TERMINATING,
    ActiveInstanceRefreshNotFound,
    DesiredConfiguration,
    InstanceRefresh,
    InstanceRefreshInProgress,
    IrreversibleInstanceRefresh,
    LaunchTemplate,
    RefreshPreferences,
    ValidationError,
)
from tests.support.autoscaling_group import CONFIG, GROUP, World, hook, in_aws

SECOND = DesiredConfiguration(LaunchTemplate("", "workers", "2"))


def state(w: World) -> InstanceRefresh:
    return w.asg.describe_instance_refreshes(GROUP)[0]


def start(w: World, wanted: DesiredConfiguration | None = None, **preferences: Any) -> str:
    return w.asg.start_instance_refresh(
        GROUP, preferences=RefreshPreferences(**preferences), desired_configuration=wanted
    )


def serving(w: World) -> list[str]:
    return w.ids_in(LifecycleState.IN_SERVICE)


async def until_ended(w: World, every_s: float = 1.0, *, at_least: int = 0) -> InstanceRefresh:
    """Tick until the refresh has ended, and check that at least `at_least` instances are always in service."""
    for _ in range(200):
        if (ended := state(w)).end_time is not None:
            return ended
        await w.tick(every_s)
        assert len(serving(w)) >= at_least
    raise AssertionError(f"never ended: {state(w)}")


@in_aws
async def test_every_instance_is_replaced_and_enough_stay_in_service(w: World) -> None:
    before = await w.group(10, lifecycle_hooks=[hook("bye", TERMINATING, heartbeat_timeout=30)])
    which = start(w, min_healthy_percentage=80)
    assert (state(w).status, state(w).instances_to_update) == ("Pending", 10)
    await w.tick()
    assert state(w).status == "InProgress"
    ended = await until_ended(w, 5.0, at_least=8)
    assert (ended.instance_refresh_id, ended.status) == (which, "Successful")
    assert (ended.percentage_complete, ended.instances_to_update) == (100, 0)
    assert not set(before) & set(serving(w))
    assert len(serving(w)) == 10
    causes = " ".join(w.causes().values())
    assert "taken out of service in response to an instance refresh" in causes
    assert "launched in response to an instance refresh" in causes


@in_aws
async def test_next_batch_waits_for_the_warm_up_of_the_previous_one(w: World) -> None:
    await w.group(4, replace(CONFIG, default_instance_warmup=60))
    start(w, min_healthy_percentage=75)
    replaced = []
    for _ in range(22):
        await w.tick(15.0)
        replaced.append(len(w.launcher.launched) - 4)
    assert replaced[:5] == [1, 1, 1, 1, 2]
    assert replaced[-1] == 4
    assert state(w).status == "Successful"


@in_aws
async def test_progress_counts_what_is_replaced_and_warm(w: World) -> None:
    await w.group(4)
    start(w, min_healthy_percentage=75, instance_warmup=10)
    seen = set()
    for _ in range(60):
        await w.tick(2.0)
        seen.add(state(w).percentage_complete)
    assert seen == {0, 25, 50, 75, 100}


@in_aws
async def test_one_at_a_time_at_100_percent_and_all_at_once_at_0(w: World) -> None:
    await w.group(4)
    start(w, min_healthy_percentage=100)
    await until_ended(w, at_least=3)
    start(w, min_healthy_percentage=0)
    w.launcher.refuse = "no"
    await w.tick()
    assert serving(w) == []


@in_aws
async def test_above_100_percent_replacements_launch_first(w: World) -> None:
    await w.group(4)
    start(w, min_healthy_percentage=100, max_healthy_percentage=150, instance_warmup=30)
    await w.tick(1.0, times=5)
    assert len(serving(w)) == 6, "the old ones stay until the new ones have warmed up"
    assert len(w.launcher.launched) == 6, "no more are on their way than the percentage allows"
    await w.tick(30.0)
    assert len(serving(w)) == 4
    ended = await until_ended(w, at_least=4)
    assert ended.status == "Successful"
    assert len(serving(w)) == 4


@in_aws
async def test_the_desired_configuration_is_the_groups_own_once_it_has_succeeded(w: World) -> None:
    await w.group(3)
    w.templates.put(2, instance_type="m.xlarge")
    start(w, SECOND, min_healthy_percentage=60, instance_warmup=30)
    await w.tick()
    w.asg.set_desired_capacity(GROUP, 4)
    await w.tick()
    assert w.machines().count(w.machines()[-1]) >= 2, "new instances have it already"
    assert w.view().config.launch_template == LaunchTemplate("lt-7", "workers", "1")
    await until_ended(w, 10.0)
    assert {kind for kind, _ in w.machines()} == {"m.xlarge"}
    assert w.view().config.launch_template == LaunchTemplate("lt-7", "workers", "2")


@in_aws
async def test_matching_instances_are_skipped(w: World) -> None:
    await w.group(1)
    w.templates.put(2, instance_type="m.xlarge")
    w.asg.update_auto_scaling_group(GROUP, {"launch_template": SECOND.launch_template})
    await w.resize(3)
    old, *kept = serving(w)
    start(w, skip_matching=True)
    assert state(w).instances_to_update == 1
    await until_ended(w)
    assert set(kept) < set(serving(w))
    assert old not in serving(w)
    start(w, skip_matching=True)
    assert (await until_ended(w)).percentage_complete == 100
    assert len(w.launcher.launched) == 4


@in_aws
async def test_checkpoints_pause_it(w: World) -> None:
    await w.group(10)
    start(w, min_healthy_percentage=50, checkpoint_percentages=(20, 50, 100), checkpoint_delay=600)
    await w.tick(1.0, times=5)
    assert state(w).percentage_complete == 20
    await w.tick(590.0)
    assert state(w).percentage_complete == 20
    await w.tick(10.0, times=5)
    assert state(w).percentage_complete == 50
    ended = await until_ended(w, 60.0)
    assert (ended.status, ended.percentage_complete) == ("Successful", 100)


@in_aws
async def test_final_checkpoint_below_100_ends_the_refresh(w: World) -> None:
    before = await w.group(4)
    start(w, min_healthy_percentage=50, checkpoint_percentages=(50,))
    ended = await until_ended(w)
    assert (ended.status, ended.percentage_complete) == ("Successful", 50)
    assert len(set(before) & set(serving(w))) == 2


@in_aws
async def test_refresh_waits_for_protected_instances_and_fails_after_an_hour(w: World) -> None:
    first, _ = await w.group(2)
    w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=True)
    start(w)
    await w.tick(600.0, times=6)
    assert state(w).status == "InProgress"
    ended = await until_ended(w, 600.0)
    assert ended.status == "Failed"
    assert "1 instances are protected from scale-in" in ended.status_reason
    assert first in serving(w)


@in_aws
async def test_the_protected_may_be_left_alone_or_replaced(w: World) -> None:
    first, second = await w.group(2)
    w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=True)
    start(w, scale_in_protected_instances="Ignore")
    await until_ended(w)
    assert first in serving(w)
    assert second not in serving(w)
    start(w, scale_in_protected_instances="Refresh")
    await until_ended(w)
    assert first not in serving(w)


@in_aws
async def test_those_on_standby_may_be_left_alone_or_terminated(w: World) -> None:
    first, _ = await w.group(2)
    w.asg.enter_standby(GROUP, [first], should_decrement_desired_capacity=True)
    await w.tick()
    start(w, standby_instances="Ignore")
    await until_ended(w)
    assert w.one(first).lifecycle_state == "Standby"
    start(w, standby_instances="Terminate", min_healthy_percentage=0)
    await until_ended(w)
    assert first not in w.ids_in(*LifecycleState)


@in_aws
async def test_canceled_refresh_only_finishes_running_replacements(w: World) -> None:
    before = await w.group(4)
    start(w, min_healthy_percentage=75, instance_warmup=30)
    await w.tick()
    which = w.asg.cancel_instance_refresh(GROUP)
    await w.tick(10.0)
    assert (state(w).instance_refresh_id, state(w).status) == (which, "Cancelling")
    await w.tick(30.0)
    assert state(w).status == "Cancelled"
    await w.tick(1.0, times=5)
    assert len(set(before) & set(serving(w))) == 3


@in_aws
async def test_only_one_refresh_runs_and_an_ended_one_cannot_be_canceled(w: World) -> None:
    await w.group(1)
    start(w)
    with pytest.raises(InstanceRefreshInProgress, match="already in progress and blocks"):
        start(w)
    await until_ended(w)
    for ask in (w.asg.cancel_instance_refresh, w.asg.rollback_instance_refresh):
        with pytest.raises(ActiveInstanceRefreshNotFound, match="No in progress or pending"):
            ask(GROUP)
    second = start(w)
    assert [refresh.status for refresh in w.asg.describe_instance_refreshes(GROUP)] == ["Pending", "Successful"]
    assert len(w.asg.describe_instance_refreshes(GROUP, [second])) == 1


@in_aws
async def test_rollback_uses_the_groups_own_template(w: World) -> None:
    await w.group(4)
    w.templates.put(2, instance_type="m.xlarge")
    start(w, SECOND, min_healthy_percentage=75, instance_warmup=30)
    await w.tick(31.0, times=2)
    assert "m.xlarge" in {kind for kind, _ in w.machines()}
    w.asg.rollback_instance_refresh(GROUP)
    assert state(w).status == "RollbackInProgress"
    ended = await until_ended(w, 10.0)
    assert ended.status == "RollbackSuccessful"
    assert {kind for kind, _ in w.machines()} == {"m.large"}
    assert w.view().config.launch_template == LaunchTemplate("lt-7", "workers", "1")


@in_aws
async def test_a_refresh_that_fails_may_roll_back_by_itself(w: World) -> None:
    await w.group(2)
    w.templates.put(2, instance_type="m.xlarge")
    w.launcher.exhausted = {("m.xlarge", f"us-east-1{zone}") for zone in "abc"}
    start(w, SECOND, auto_rollback=True)
    await w.tick(100.0, times=50)
    ended = await until_ended(w, 100.0)
    assert ended.status == "RollbackSuccessful"
    assert [kind for kind, _ in w.machines()] == ["m.large"] * 2


@in_aws
async def test_impossible_rollback_is_refused(w: World) -> None:
    w.templates.put(2, instance_type="m.xlarge")
    latest = LaunchTemplate("", "workers", "$Latest")
    await w.group(1, replace(CONFIG, launch_template=latest))
    start(w, min_healthy_percentage=0, instance_warmup=100)
    with pytest.raises(IrreversibleInstanceRefresh, match="no desired configuration"):
        w.asg.rollback_instance_refresh(GROUP)
    w.asg.cancel_instance_refresh(GROUP)
    await w.tick(times=2)
    start(w, SECOND, instance_warmup=100)
    with pytest.raises(IrreversibleInstanceRefresh, match="Latest"):
        w.asg.rollback_instance_refresh(GROUP)


@in_aws
async def test_template_cannot_change_during_a_refresh_with_a_desired_configuration(w: World) -> None:
    w.templates.put(2, instance_type="m.xlarge")
    await w.group(1)
    change = {"launch_template": LaunchTemplate("", "workers", "2")}
    start(w, min_healthy_percentage=0)
    w.asg.update_auto_scaling_group(GROUP, {"launch_template": LaunchTemplate("", "workers", "1")})
    await until_ended(w)
    start(w, SECOND, instance_warmup=100)
    for roll_back in (False, True):
        if roll_back:
            w.asg.rollback_instance_refresh(GROUP)
        with pytest.raises(ValidationError, match="An active instance refresh with a desired configuration exists"):
            w.asg.update_auto_scaling_group(GROUP, change)
        w.asg.update_auto_scaling_group(GROUP, {"default_cooldown": 1})
    await until_ended(w, 10.0)
    w.asg.update_auto_scaling_group(GROUP, change)


@in_aws
async def test_suspending_instance_refresh_pauses_it(w: World) -> None:
    before = await w.group(2)
    w.asg.suspend_processes(GROUP, ["InstanceRefresh"])
    start(w)
    await w.tick(4_000.0, times=3)
    assert serving(w) == before
    w.asg.resume_processes(GROUP)
    assert (await until_ended(w)).status == "Successful"


@in_aws
async def test_a_refresh_survives_a_restart(w: World) -> None:
    before = await w.group(4)
    start(w, min_healthy_percentage=75, instance_warmup=30)
    await w.tick(1.0, times=2)
    w.restart()
    assert (await until_ended(w, 10.0, at_least=3)).status == "Successful"
    assert not set(before) & set(serving(w))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_healthy_percentage": 101},
        {"min_healthy_percentage": 50, "max_healthy_percentage": 160},
        {"max_healthy_percentage": 90},
        {"checkpoint_percentages": (50, 20)},
        {"standby_instances": "Refresh"},
        {"scale_in_protected_instances": "Terminate"},
        {"auto_rollback": True},
    ],
)
def test_preferences_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    w = World()
    w.asg.create_auto_scaling_group(CONFIG)
    with pytest.raises(ValidationError):
        start(w, **wrong)
    with pytest.raises(ValidationError, match="ReplaceRootVolume"):
        w.asg.start_instance_refresh(GROUP, strategy="ReplaceRootVolume")
    assert w.asg.describe_instance_refreshes(GROUP) == []
