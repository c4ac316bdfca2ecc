"""Spot interruption notices, rebalance recommendations, and a group's reactions to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core.model import LifecycleState, Market
from batchlab.fleet.api_types import (
    TERMINATING,
    InstancesDistribution,
    LaunchTemplate,
    MixedInstancesPolicy,
    Override,
    ValidationError,
)
from tests.support.autoscaling_group import CONFIG, World, hook, in_aws

SPOT = replace(
    CONFIG,
    launch_template=None,
    mixed_instances_policy=MixedInstancesPolicy(
        LaunchTemplate("", "workers"),
        (Override("m.large"), Override("c.large")),
        InstancesDistribution(on_demand_percentage_above_base_capacity=0),
    ),
)
REBALANCING = replace(SPOT, capacity_rebalance=True)


@in_aws
async def test_interrupted_instance_gets_a_notice_and_is_killed(w: World) -> None:
    (name,) = await w.group(1, SPOT)
    w.asg.interrupt(name)
    seen = w.asg.metadata(name)
    assert seen.instance_life_cycle is Market.SPOT
    assert (seen.spot_action, seen.spot_time) == ("terminate", w.clock.now_s() + 120.0)
    await w.tick(119.0)
    assert (w.states(), w.launcher.terminated) == (["InService"], [])
    await w.tick(1.0)
    assert w.launcher.terminated == [(name, 0.0)]
    await w.tick()
    assert name not in w.ids_in(*LifecycleState)
    assert w.states() == ["InService"], "replaced once its end was seen"


@in_aws
async def test_an_interruption_waits_for_no_hook(w: World) -> None:
    (name,) = await w.group(1, SPOT, lifecycle_hooks=[hook("bye", TERMINATING)])
    w.asg.interrupt(name, notice_s=10.0)
    await w.resize(0)
    assert w.states() == ["Terminating:Wait"]
    await w.tick(10.0)
    await w.tick()
    assert w.states() == []


@in_aws
async def test_capacity_rebalancing_launches_the_replacement_first(w: World) -> None:
    (name,) = await w.group(1, REBALANCING, lifecycle_hooks=[hook("bye", TERMINATING)])
    w.asg.rebalance(name)
    assert w.asg.metadata(name).rebalance_time == w.clock.now_s()
    await w.tick()
    assert w.states() == ["InService"] * 2
    await w.tick()
    assert w.states() == ["Terminating:Wait", "InService"]
    assert w.view().desired_capacity == 1
    assert "an EC2 instance rebalance recommendation" in w.causes()[f"Terminating EC2 instance: {name}"]


@in_aws
async def test_with_capacity_rebalancing_a_notice_is_enough(w: World) -> None:
    (name,) = await w.group(1, REBALANCING)
    w.asg.rebalance(name)
    w.asg.interrupt(name)
    await w.tick(1.0, times=3)
    assert len(w.launcher.launched) == 2
    assert name not in w.ids_in(*LifecycleState)


@in_aws
async def test_a_group_at_its_maximum_is_rebalanced_beyond_it(w: World) -> None:
    (name,) = await w.group(1, replace(REBALANCING, max_size=1))
    w.asg.rebalance(name)
    await w.tick()
    assert len(w.states()) == 2
    await w.tick(times=2)
    assert len(w.states()) == 1


@in_aws
async def test_without_rebalancing_a_recommendation_is_only_shown(w: World) -> None:
    (name,) = await w.group(1, SPOT)
    w.asg.rebalance(name)
    await w.tick(times=3)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [name]


@in_aws
async def test_a_capacity_pool_that_took_an_instance_back_is_avoided(w: World) -> None:
    (name,) = await w.group(1, replace(SPOT, availability_zones=("us-east-1a",)))
    assert w.one(name).instance_type == "m.large"
    w.asg.interrupt(name, notice_s=5.0)
    await w.tick(5.0, times=1)
    await w.tick()
    assert [kind for kind, _ in w.machines()] == ["c.large"]


@in_aws
async def test_only_spot_instances_are_interrupted(w: World) -> None:
    (name,) = await w.group(1)
    assert w.asg.metadata(name).instance_life_cycle is Market.ON_DEMAND
    for wrong in (w.asg.interrupt, w.asg.rebalance):
        with pytest.raises(ValidationError, match="is not a Spot Instance"):
            wrong(name)


@in_aws
async def test_a_notice_survives_a_restart(w: World) -> None:
    (name,) = await w.group(1, SPOT)
    w.asg.interrupt(name)
    w.clock.time_s += 60.0
    w.restart()
    assert w.asg.metadata(name).spot_time == w.clock.now_s() + 60.0
    await w.tick(60.0, times=1)
    assert w.launcher.terminated == [(name, 0.0)]
