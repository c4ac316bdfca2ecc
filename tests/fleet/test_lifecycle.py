"""Lifecycle hooks: the waiting instances, the completion of a hook, and its result."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from uuid import UUID

import pytest

from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import ABANDON, CONTINUE, TERMINATING, LimitExceeded, ValidationError
from batchlab.server.autoscaling_api import engine_loop
from tests.support.autoscaling_group import CONFIG, GROUP, World, hook, in_aws

LEAVE = hook("bye", TERMINATING, default_result=CONTINUE)


async def _waiting(w: World, size: int = 1, *hooks: str) -> list[str]:
    await w.group(0, lifecycle_hooks=[hook(name) for name in hooks or ("boot",)])
    await w.resize(size)
    return w.ids_in(LifecycleState.PENDING_WAIT)


@in_aws
async def test_a_launch_hook_holds_the_instance_until_it_is_completed(w: World) -> None:
    (name,) = await _waiting(w)
    (notice,) = w.asg.take_notifications()
    assert (notice.instance_id, notice.hook.lifecycle_hook_name) == (name, "boot")
    assert (notice.origin, notice.destination) == ("EC2", "AutoScalingGroup")
    assert w.asg.take_notifications() == []
    assert (w.activities()[0].status_code, w.activities()[0].progress) == ("MidLifecycleAction", 60)
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, instance_id=name)
    assert w.states() == ["Pending:Proceed"]
    await w.tick()
    assert w.states() == ["InService"]
    assert w.activities()[0].status_code == "Successful"


@in_aws
async def test_server_log_reports_each_waiting_hook_once(w: World) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log, before = engine_loop.log, engine_loop.log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    changed = asyncio.Event()
    keeping = asyncio.create_task(engine_loop._keep(w.asg, changed))
    try:
        (name,) = await _waiting(w)
        async with asyncio.timeout(10):
            while not lines:
                changed.set()
                await asyncio.sleep(0.01)
        changed.set()
        await asyncio.sleep(0.01)
    finally:
        keeping.cancel()
        log.removeHandler(handler)
        log.setLevel(before)
    assert lines == [f"{name} waits in hook boot of {GROUP} (EC2 to AutoScalingGroup)"]


@in_aws
async def test_instances_that_came_up_and_are_killed_make_no_crash_loop(w: World) -> None:
    """An instance with a completed hook has worked, so four such instances that are killed at once are replaced."""
    names = await _waiting(w, 4)
    for name in names:
        w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, instance_id=name)
    await w.tick()
    for name in names:
        w.launcher.crash(name, "exit -9")
    await w.tick(times=2)
    assert len(w.ids_in(LifecycleState.PENDING_WAIT)) == 4


@in_aws
async def test_an_action_can_be_completed_by_its_token(w: World) -> None:
    await _waiting(w)
    (notice,) = w.asg.take_notifications()
    token = notice.lifecycle_action_token
    assert str(UUID(token)) == token
    with pytest.raises(ValidationError, match="No active Lifecycle Action found with token other"):
        w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, lifecycle_action_token="other")
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, lifecycle_action_token=token)
    with pytest.raises(ValidationError, match=f"found with token {token}"):
        w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, lifecycle_action_token=token)


@in_aws
async def test_a_token_of_an_earlier_version_stays_valid(w: World) -> None:
    """An earlier version of the endpoint saved tokens with 22 characters."""
    await _waiting(w)
    token, old = w.asg.take_notifications()[0].lifecycle_action_token, "token-0123456789abcdef"
    saved = w.store.load()
    assert saved is not None
    assert saved.count(token.encode()) == 1
    w.store.save(saved.replace(token.encode(), old.encode()))
    w.restart()
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, lifecycle_action_token=old)
    assert w.states() == ["Pending:Proceed"]


@in_aws
async def test_a_waiting_instance_counts_towards_desired_capacity(w: World) -> None:
    await _waiting(w, 2)
    await w.tick(times=3)
    assert w.states() == ["Pending:Wait"] * 2


@in_aws
async def test_every_hook_of_a_transition_must_be_completed(w: World) -> None:
    (name,) = await _waiting(w, 1, "boot", "more")
    w.asg.complete_lifecycle_action(GROUP, "more", CONTINUE, instance_id=name)
    assert w.states() == ["Pending:Wait"]
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, instance_id=name)
    await w.tick()
    assert w.states() == ["InService"]


@in_aws
async def test_a_launch_that_is_abandoned_is_ended_and_replaced(w: World) -> None:
    (name,) = await _waiting(w, 1, "boot", "more")
    w.asg.complete_lifecycle_action(GROUP, "boot", ABANDON, instance_id=name)
    assert str(w.one(name).lifecycle_state) == "Terminating"
    await w.tick(times=2)
    assert w.states() == ["Pending:Wait"]
    (launch,) = [a for a in w.activities() if a.status_code == "Cancelled"]
    assert launch.status_message.startswith("Instance failed to complete user's Lifecycle Action")
    assert launch.status_message.endswith("abandoned: Lifecycle Action Completed with ABANDON Result")
    with pytest.raises(ValidationError):
        w.asg.complete_lifecycle_action(GROUP, "more", CONTINUE, instance_id=name)


@in_aws
async def test_hooks_that_fail_again_and_again_slow_launches_down(w: World) -> None:
    await _waiting(w, 1)
    for _ in range(30):
        for name in w.ids_in(LifecycleState.PENDING_WAIT):
            w.asg.complete_lifecycle_action(GROUP, "boot", ABANDON, instance_id=name)
        await w.tick(0.5)
    assert len(w.launcher.launched) < 10


@in_aws
async def test_an_action_times_out_with_its_default_result(w: World) -> None:
    (name,) = await _waiting(w)
    await w.tick(3599.0)
    assert w.states() == ["Pending:Wait"]
    await w.tick(1.0)
    assert str(w.one(name).lifecycle_state).startswith("Terminating"), "the default is ABANDON"
    late = [a.status_message for a in w.activities() if a.status_code == "Cancelled"]
    assert late[0].endswith("was abandoned: Heartbeat Timeout")


@in_aws
async def test_an_action_that_times_out_may_also_continue(w: World) -> None:
    slack = hook(default_result=CONTINUE, heartbeat_timeout=30)
    await w.group(1, lifecycle_hooks=[slack])
    await w.tick(30.0, times=2)
    assert w.states() == ["InService"]


@in_aws
async def test_heartbeats_put_the_timeout_off_up_to_the_global_one(w: World) -> None:
    short = hook(heartbeat_timeout=30)
    assert (short.global_timeout, hook(heartbeat_timeout=7200).global_timeout) == (3_000, 172_800)
    await w.group(1, lifecycle_hooks=[short])
    (name,) = w.ids_in(LifecycleState.PENDING_WAIT)
    for _ in range(149):
        await w.tick(20.0)
        w.asg.record_lifecycle_action_heartbeat(GROUP, "boot", instance_id=name)
    assert w.states() == ["Pending:Wait"]
    await w.tick(20.0)
    assert str(w.one(name).lifecycle_state) == "Terminating"


@in_aws
async def test_a_termination_hook_holds_the_instance_before_it_is_ended(w: World) -> None:
    (name,) = await w.group(1, lifecycle_hooks=[LEAVE])
    assert w.asg.metadata(name).target_lifecycle_state == "InService"
    await w.resize(0)
    assert w.states() == ["Terminating:Wait"]
    assert w.asg.metadata(name).target_lifecycle_state == "Terminated"
    assert w.launcher.terminated == []
    assert w.activities()[0].status_code == "MidLifecycleAction"
    (notice,) = w.asg.take_notifications()
    assert (notice.origin, notice.destination) == ("AutoScalingGroup", "EC2")
    w.asg.complete_lifecycle_action(GROUP, "bye", CONTINUE, instance_id=name)
    assert w.states() == ["Terminating:Proceed"]
    await w.tick(times=2)
    assert [one for one, _ in w.launcher.terminated] == [name]
    assert w.states() == []


@in_aws
async def test_abandon_on_termination_only_stops_the_other_hooks(w: World) -> None:
    (name,) = await w.group(1, lifecycle_hooks=[LEAVE, replace(LEAVE, lifecycle_hook_name="log")])
    await w.resize(0)
    w.asg.complete_lifecycle_action(GROUP, "log", ABANDON, instance_id=name)
    await w.tick(times=2)
    assert w.states() == []


@in_aws
async def test_a_termination_hook_times_out(w: World) -> None:
    await w.group(1, lifecycle_hooks=[LEAVE])
    await w.resize(0)
    await w.tick(3_600.0, times=2)
    await w.tick()
    assert w.states() == []


@in_aws
async def test_an_unhealthy_instance_waits_in_the_hook_while_its_successor_starts(w: World) -> None:
    (name,) = await w.group(1, lifecycle_hooks=[LEAVE])
    w.asg.set_instance_health(name, "Unhealthy")
    await w.tick()
    assert w.states() == ["Terminating:Wait", "InService"]


@in_aws
async def test_a_dead_instance_waits_in_no_hook(w: World) -> None:
    (name,) = await w.group(1, lifecycle_hooks=[LEAVE])
    w.launcher.crash(name)
    await w.tick()
    assert name not in w.ids_in(*LifecycleState)
    assert w.asg.take_notifications() == []


@in_aws
async def test_one_that_was_never_in_service_waits_in_no_termination_hook(w: World) -> None:
    await w.group(0, lifecycle_hooks=[hook(), LEAVE])
    await w.resize(1)
    await w.resize(0)
    assert w.states() == []


@in_aws
async def test_force_delete_ends_waiting_instances(w: World) -> None:
    await w.group(2, lifecycle_hooks=[LEAVE])
    await w.resize(1)
    w.asg.delete_auto_scaling_group(GROUP, force_delete=True)
    await w.tick(times=3)
    assert w.asg.describe_auto_scaling_groups() == []


@in_aws
async def test_hooks_are_put_described_and_deleted(w: World) -> None:
    await w.group()
    w.asg.put_lifecycle_hook(hook("b"))
    w.asg.put_lifecycle_hook(hook("a", heartbeat_timeout=60))
    w.asg.put_lifecycle_hook(hook("a", heartbeat_timeout=90))
    names = [(h.lifecycle_hook_name, h.heartbeat_timeout) for h in w.asg.describe_lifecycle_hooks(GROUP)]
    assert names == [("a", 90), ("b", 3600)]
    assert w.asg.describe_lifecycle_hooks(GROUP, ["b", "c"]) == [hook("b")]
    w.asg.delete_lifecycle_hook(GROUP, "a")
    with pytest.raises(ValidationError, match="No Lifecycle Hook found with name: a"):
        w.asg.delete_lifecycle_hook(GROUP, "a")
    for n in range(49):
        w.asg.put_lifecycle_hook(hook(f"n{n}"))
    with pytest.raises(LimitExceeded):
        w.asg.put_lifecycle_hook(hook("one too many"))


@in_aws
async def test_deleting_a_hook_settles_what_waits_in_it(w: World) -> None:
    """The action ABANDON applies to launching instances, and CONTINUE to terminating ones."""
    (name,) = await w.group(1, lifecycle_hooks=[LEAVE])
    w.asg.put_lifecycle_hook(hook(default_result=CONTINUE))
    await w.resize(2)
    (waiting,) = w.ids_in(LifecycleState.PENDING_WAIT)
    w.asg.delete_lifecycle_hook(GROUP, "boot")
    assert str(w.one(waiting).lifecycle_state) == "Terminating"
    await w.tick(times=2)
    w.asg.terminate_instance_in_auto_scaling_group(name, should_decrement_desired_capacity=True)
    assert str(w.one(name).lifecycle_state) == "Terminating:Wait"
    w.asg.delete_lifecycle_hook(GROUP, "bye")
    assert str(w.one(name).lifecycle_state) == "Terminating:Proceed"
    await w.tick(times=2)
    assert w.states() == ["InService"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_timeout": 29},
        {"heartbeat_timeout": 7201},
        {"default_result": "MAYBE"},
        {"transition": "autoscaling:TEST_NOTIFICATION"},
    ],
)
def test_a_hook_that_makes_no_sense_is_refused(wrong: dict[str, str]) -> None:
    w = World()
    w.asg.create_auto_scaling_group(CONFIG)
    with pytest.raises(ValidationError):
        w.asg.put_lifecycle_hook(hook("x", **wrong))


@in_aws
async def test_waiting_survives_a_restart_with_what_is_left_of_its_time(w: World) -> None:
    (name,) = await _waiting(w)
    (notice,) = w.asg.take_notifications()
    await w.tick(3_000.0)
    w.clock.time_s += 500.0
    w.restart()
    await w.tick()
    assert w.states() == ["Pending:Wait"]
    await w.tick(99.0)
    assert w.states() == ["Pending:Wait"]
    w.asg.record_lifecycle_action_heartbeat(GROUP, "boot", lifecycle_action_token=notice.lifecycle_action_token)
    await w.tick(3_599.0)
    assert w.states() == ["Pending:Wait"]
    await w.tick(1.0)
    assert str(w.one(name).lifecycle_state) == "Terminating"
