"""The warm pool: its size, states, and hooks, and the exchange of instances with the group."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from batchlab.core.errors import BackendError
from batchlab.core.model import LifecycleState
from batchlab.fleet.api_types import (
    CONTINUE,
    TERMINATING,
    InstanceDetails,
    InstanceRefreshInProgress,
    ResourceInUse,
    ValidationError,
    WarmPool,
)
from tests.support.autoscaling_group import CONFIG, GROUP, MachineLauncher, World, hook, in_aws

SMALL = replace(CONFIG, max_size=4)
RUNNING = WarmPool(pool_state="Running")


@dataclass
class RestingLauncher(MachineLauncher):
    """A launcher that can stop and start instances."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    stuck: bool = False

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        self.calls.append(("hibernate" if hibernate else "stop", instance))

    async def start(self, instance: str) -> None:
        self.calls.append(("start", instance))
        if self.stuck:
            raise BackendError("it does not start")


def resting() -> World:
    return World(launcher=RestingLauncher())


def pool(w: World) -> Sequence[InstanceDetails]:
    return w.asg.describe_warm_pool(GROUP)[1]


def pool_states(w: World) -> list[str]:
    return [str(one.lifecycle_state) for one in pool(w)]


async def warmed(w: World, size: int, warm_pool: WarmPool = RUNNING, **options: Any) -> None:
    await w.group(size, SMALL, **options)
    w.asg.put_warm_pool(GROUP, warm_pool)
    await w.tick(times=3)


@pytest.mark.parametrize(
    ("warm_pool", "expected"),
    [
        (RUNNING, 3),
        (replace(RUNNING, max_group_prepared_capacity=3), 2),
        (replace(RUNNING, max_group_prepared_capacity=-1), 3),
        (replace(RUNNING, max_group_prepared_capacity=1), 0),
        (replace(RUNNING, max_group_prepared_capacity=2, min_size=2), 2),
    ],
)
def test_the_pool_holds_what_is_prepared_beyond_desired_capacity(warm_pool: WarmPool, expected: int) -> None:
    @in_aws
    async def check(w: World) -> None:
        await warmed(w, 1, warm_pool)
        assert pool_states(w) == ["Warmed:Running"] * expected
        assert w.states() == ["InService"], "the pool's instances are listed apart"
        assert w.view().warm_pool_size == expected

    check()


@in_aws
async def test_the_group_grows_from_the_pool_and_the_pool_shrinks(w: World) -> None:
    await warmed(w, 1)
    first = pool(w)[0].instance_id
    launched = len(w.launcher.launched)
    await w.resize(2)
    assert first in w.ids_in(LifecycleState.IN_SERVICE)
    assert (len(w.launcher.launched), len(pool(w))) == (launched, 2)
    assert f"Launching a new EC2 instance from warm pool: {first}" in w.causes()


@in_aws
async def test_a_pool_that_has_too_many_ends_them(w: World) -> None:
    await warmed(w, 1)
    w.asg.put_warm_pool(GROUP, replace(RUNNING, max_group_prepared_capacity=2))
    await w.tick(times=2)
    assert len(pool(w)) == 1
    await w.tick(times=2)
    assert w.states() == ["InService"]


@in_aws
async def test_a_pool_that_is_used_up_does_not_stop_the_group(w: World) -> None:
    await warmed(w, 1, replace(RUNNING, max_group_prepared_capacity=2))
    await w.resize(4)
    assert w.states() == ["InService"] * 4
    assert pool(w) == []


def test_stopped_instances_are_started_when_the_group_grows() -> None:
    async def check(w: World) -> None:
        await warmed(w, 2, WarmPool())
        assert pool_states(w) == ["Warmed:Stopped"] * 2
        first = pool(w)[0].instance_id
        assert w.asg.metadata(first).target_lifecycle_state == "Warmed:Stopped"
        await w.resize(3)
        launcher = w.launcher
        assert isinstance(launcher, RestingLauncher)
        assert launcher.calls[-1] == ("start", first)
        assert first in w.ids_in(LifecycleState.IN_SERVICE)
        assert w.asg.metadata(first).target_lifecycle_state == "InService"

    _run(check)


def test_hibernated_instances_are_put_to_sleep_with_their_memory() -> None:
    async def check(w: World) -> None:
        await warmed(w, 3, WarmPool(pool_state="Hibernated"))
        assert pool_states(w) == ["Warmed:Hibernated"]
        launcher = w.launcher
        assert isinstance(launcher, RestingLauncher)
        assert launcher.calls == [("hibernate", pool(w)[0].instance_id)]

    _run(check)


def test_an_instance_that_does_not_start_again_is_replaced() -> None:
    async def check(w: World) -> None:
        await warmed(w, 3, WarmPool())
        launcher = w.launcher
        assert isinstance(launcher, RestingLauncher)
        launcher.stuck = True
        (broken,) = pool(w)
        await w.resize(4)
        await w.tick(times=2)
        assert w.states() == ["InService"] * 4
        assert broken.instance_id in [name for name, _ in launcher.terminated]

    _run(check)


def test_sleep_survives_a_restart() -> None:
    async def check(w: World) -> None:
        await warmed(w, 3, WarmPool())
        w.asg.set_desired_capacity(GROUP, 4)
        w.restart()
        await w.tick()
        launcher = w.launcher
        assert isinstance(launcher, RestingLauncher)
        assert [call for call, _ in launcher.calls] == ["stop", "start"]
        assert w.states() == ["InService"] * 4

    _run(check)


@in_aws
async def test_hooks_hold_an_instance_on_its_way_in_and_out(w: World) -> None:
    await warmed(w, 0, replace(RUNNING, max_group_prepared_capacity=1), lifecycle_hooks=[hook()])
    (name,) = [one.instance_id for one in pool(w)]
    assert pool_states(w) == ["Warmed:Pending:Wait"]
    (notice,) = w.asg.take_notifications()
    assert (notice.origin, notice.destination) == ("EC2", "WarmPool")
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, instance_id=name)
    assert pool_states(w) == ["Warmed:Pending:Proceed"]
    await w.tick()
    assert pool_states(w) == ["Warmed:Running"]
    await w.resize(1)
    assert w.states() == ["Pending:Wait"]
    (notice,) = w.asg.take_notifications()
    assert (notice.origin, notice.destination) == ("WarmPool", "AutoScalingGroup")
    w.asg.complete_lifecycle_action(GROUP, "boot", CONTINUE, instance_id=name)
    await w.tick()
    assert w.ids_in(LifecycleState.IN_SERVICE) == [name]


@in_aws
async def test_scale_in_returns_instances_to_a_pool_that_reuses_them(w: World) -> None:
    bye = hook("bye", TERMINATING)
    await warmed(w, 4, replace(RUNNING, reuse_on_scale_in=True), lifecycle_hooks=[bye])
    await w.resize(3)
    (back,) = pool(w)
    assert back.lifecycle_state == "Warmed:Pending:Wait"
    (notice,) = w.asg.take_notifications()
    assert (notice.origin, notice.destination) == ("AutoScalingGroup", "WarmPool")
    w.asg.complete_lifecycle_action(GROUP, "bye", CONTINUE, instance_id=back.instance_id)
    await w.tick()
    assert pool_states(w) == ["Warmed:Running"]
    assert w.launcher.terminated == []
    await w.resize(4)
    assert back.instance_id in w.ids_in(LifecycleState.IN_SERVICE)
    assert len(w.launcher.launched) == 4


@in_aws
async def test_without_reuse_scale_in_terminates_and_the_pool_launches_anew(w: World) -> None:
    await warmed(w, 4)
    await w.resize(3)
    await w.tick(times=2)
    assert len(w.launcher.terminated) == 1
    assert (len(w.launcher.launched), pool_states(w)) == (5, ["Warmed:Running"])


@in_aws
async def test_a_pools_instance_that_dies_or_is_called_unhealthy_is_replaced(w: World) -> None:
    await warmed(w, 2)
    dead, called = (one.instance_id for one in pool(w))
    w.launcher.crash(dead)
    w.asg.set_instance_health(called, "Unhealthy")
    await w.tick(times=3)
    assert pool_states(w) == ["Warmed:Running"] * 2
    assert not {dead, called} & {one.instance_id for one in pool(w)}


@in_aws
async def test_a_pool_that_cannot_launch_tries_less_and_less_often(w: World) -> None:
    await w.group(1, SMALL)
    w.launcher.refuse = "no capacity"
    w.asg.put_warm_pool(GROUP, RUNNING)
    await w.tick(0.5, times=60)
    failed = [a for a in w.activities() if a.status_code == "Failed"]
    assert 5 < len(failed) < 20
    w.launcher.refuse = ""
    await w.tick(60.0)
    assert len(pool(w)) == 1, "one is tried"
    await w.tick()
    assert pool_states(w) == ["Warmed:Running"] * 3


@in_aws
async def test_a_pools_instance_is_not_terminated_by_name(w: World) -> None:
    await warmed(w, 3)
    (name,) = [one.instance_id for one in pool(w)]
    with pytest.raises(ValidationError, match="in a warm pool"):
        w.asg.terminate_instance_in_auto_scaling_group(name, should_decrement_desired_capacity=False)
    assert pool_states(w) == ["Warmed:Running"]


@pytest.mark.parametrize("force", [False, True])
def test_a_deleted_pool_ends_its_instances(force: bool) -> None:
    @in_aws
    async def check(w: World) -> None:
        await warmed(w, 2)
        w.asg.delete_warm_pool(GROUP, force_delete=force)
        left = w.asg.describe_warm_pool(GROUP)[0]
        assert left is None if force else (left and left.status == "PendingDelete")
        await w.tick(times=3)
        assert w.asg.describe_warm_pool(GROUP) == (None, [])
        assert len(w.launcher.terminated) == 2
        with pytest.raises(ValidationError, match="No warm pool found"):
            w.asg.delete_warm_pool(GROUP)

    check()


@in_aws
async def test_a_group_with_a_warm_pool_is_deleted_only_by_force(w: World) -> None:
    await warmed(w, 0)
    with pytest.raises(ResourceInUse):
        w.asg.delete_auto_scaling_group(GROUP)
    w.asg.delete_auto_scaling_group(GROUP, force_delete=True)
    await w.tick(times=3)
    assert w.asg.describe_auto_scaling_groups() == []


@in_aws
async def test_a_refresh_replaces_the_pool_at_its_end(w: World) -> None:
    await warmed(w, 2)
    before = {one.instance_id for one in pool(w)}
    w.asg.start_instance_refresh(GROUP)
    with pytest.raises(InstanceRefreshInProgress):
        w.asg.put_warm_pool(GROUP, RUNNING)
    await w.tick(1.0, times=12)
    assert w.asg.describe_instance_refreshes(GROUP)[0].status == "Successful"
    assert len(pool(w)) == 2
    assert not before & {one.instance_id for one in pool(w)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (WarmPool(), "give the warm pool the PoolState Running"),
        (replace(RUNNING, pool_state="Asleep"), "PoolState"),
        (replace(RUNNING, min_size=-1), "MinSize"),
        (replace(RUNNING, min_size=3, max_group_prepared_capacity=2), "MaxGroupPreparedCapacity"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused(wrong: WarmPool, message: str) -> None:
    w = World()
    w.asg.create_auto_scaling_group(CONFIG)
    with pytest.raises(ValidationError, match=message):
        w.asg.put_warm_pool(GROUP, wrong)
    assert w.asg.describe_warm_pool(GROUP) == (None, [])


def _run(check: Any) -> None:
    asyncio.run(check(resting()))
