"""The instances that scale-in terminates, chosen by market, zone, and then the termination policies in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from batchlab.core.model import LifecycleState, Market
from batchlab.fleet.api_types import GroupConfig, LaunchTemplate
from tests.fleet.test_placement import mixed
from tests.support.autoscaling_group import CONFIG, GROUP, ZONES, World, in_aws

ONE_ZONE = replace(CONFIG, availability_zones=ZONES[:1])


def policies(*names: str, config: GroupConfig = ONE_ZONE) -> GroupConfig:
    return replace(config, termination_policies=names)


async def _one_by_one(w: World, config: GroupConfig, size: int, every_s: float) -> list[str]:
    await w.group(0, config)
    for n in range(size):
        w.clock.time_s += every_s
        await w.resize(n + 1)
    return w.ids_in(LifecycleState.IN_SERVICE)


async def _gone(w: World, before: Sequence[str], size: int) -> list[str]:
    """Return the instances that are terminated when the group shrinks to `size`."""
    await w.resize(size)
    return [name for name in before if name not in w.ids_in(*LifecycleState)]


@in_aws
async def test_the_oldest_instance(w: World) -> None:
    before = await _one_by_one(w, policies("OldestInstance"), 3, 10.0)
    assert await _gone(w, before, 1) == before[:2]


@in_aws
async def test_the_newest_instance(w: World) -> None:
    before = await _one_by_one(w, policies("NewestInstance"), 3, 10.0)
    assert await _gone(w, before, 1) == before[1:]


@in_aws
async def test_closest_to_the_next_instance_hour(w: World) -> None:
    before = await _one_by_one(w, policies("ClosestToNextInstanceHour"), 3, 1_500.0)
    # The ages of the instances are now 3,000 s, 1,500 s, and 0 s; 700 s later, they are 3,700 s, 2,200 s, and 700 s.
    w.clock.time_s += 700.0
    assert await _gone(w, before, 2) == [before[1]]
    assert await _gone(w, before, 1) == [before[1], before[2]]


@in_aws
async def test_oldest_launch_template_is_another_one_before_an_older_version(w: World) -> None:
    w.templates.put(5, name="before", instance_type="m.large")
    other = replace(ONE_ZONE, launch_template=LaunchTemplate("", "before", "5"))
    before = await _one_by_one(w, policies("OldestLaunchTemplate", config=other), 1, 10.0)
    for version in (2, 1):
        w.templates.put(version, instance_type="m.large")
        template = LaunchTemplate("", "workers", str(version))
        w.asg.update_auto_scaling_group(GROUP, {"launch_template": template})
        await w.resize(len(before) + 1)
        before = w.ids_in(LifecycleState.IN_SERVICE)
    assert await _gone(w, before, 2) == before[:1], "another template first"
    assert await _gone(w, before, 1) == [before[0], before[2]], "then version 1 before version 2"


@in_aws
async def test_the_oldest_launch_configuration(w: World) -> None:
    old = replace(ONE_ZONE, launch_template=None, launch_configuration_name="lc-1")
    await _one_by_one(w, policies("OldestLaunchConfiguration", config=old), 1, 10.0)
    w.asg.update_auto_scaling_group(GROUP, {"launch_configuration_name": "lc-2"})
    await w.resize(2)
    before = w.ids_in(LifecycleState.IN_SERVICE)
    names = [i.launch_configuration_name for i in w.instances()]
    assert names == ["lc-1", "lc-2"]
    w.asg.update_auto_scaling_group(GROUP, {"termination_policies": ("NewestInstance",)})
    w.asg.update_auto_scaling_group(GROUP, {"termination_policies": ("OldestLaunchConfiguration", "NewestInstance")})
    assert await _gone(w, before, 1) == before[:1]


@in_aws
async def test_the_default_takes_configurations_then_old_templates_then_the_hour(w: World) -> None:
    w.templates.put(5, name="before", instance_type="m.large")
    w.templates.put(2, instance_type="m.large")
    other = replace(ONE_ZONE, launch_template=LaunchTemplate("", "before", "5"))
    await _one_by_one(w, other, 1, 10.0)
    w.asg.update_auto_scaling_group(GROUP, {"launch_configuration_name": "lc-1"})
    await w.resize(2)
    for version, size in (("2", 3), ("1", 4), ("2", 5)):
        template = LaunchTemplate("", "workers", version)
        w.asg.update_auto_scaling_group(GROUP, {"launch_template": template})
        w.clock.time_s += 100.0
        await w.resize(size)
    before = w.ids_in(LifecycleState.IN_SERVICE)
    gone = [await _gone(w, before, size) for size in (4, 3, 2)]
    assert gone[0] == [before[1]], "of a launch configuration"
    assert gone[1] == before[:2], "of another template"
    assert gone[2] == [*before[:2], before[3]], "of the oldest version"
    # Both remaining instances have version 2, and the older one is nearer to the end of its billing hour.
    assert await _gone(w, before, 1) == before[:4]


@in_aws
async def test_each_policy_narrows_what_the_one_before_has_left(w: World) -> None:
    both = policies("OldestLaunchTemplate", "NewestInstance")
    before = await _one_by_one(w, both, 3, 10.0)
    assert await _gone(w, before, 2) == before[2:]


@in_aws
async def test_a_plain_pools_policy_may_be_had_by_name(w: World) -> None:
    before = await _one_by_one(w, policies("PendingThenNewest"), 3, 10.0)
    assert await _gone(w, before, 1) == before[1:]


@in_aws
async def test_fullest_zone_comes_before_every_policy(w: World) -> None:
    before = await _one_by_one(w, policies("OldestInstance", config=CONFIG), 3, 10.0)
    w.asg.suspend_processes(GROUP, ["AZRebalance"])
    w.launcher.exhausted = {("m.large", zone) for zone in ZONES[:2]}
    w.clock.time_s += 10.0
    await w.resize(4)
    assert w.zones() == ["a", "b", "c", "c"]
    assert await _gone(w, before, 3) == before[2:], "the oldest of the full zone"
    assert await _gone(w, before, 2) == [before[0], before[2]], "then the oldest of all"


@in_aws
async def test_a_full_zone_of_protected_instances_is_passed_over(w: World) -> None:
    before = await _one_by_one(w, policies("OldestInstance", config=CONFIG), 4, 10.0)
    w.asg.suspend_processes(GROUP, ["AZRebalance"])
    full = [i.instance_id for i in w.instances() if i.availability_zone.endswith("a")]
    w.asg.set_instance_protection(GROUP, full, protected_from_scale_in=True)
    assert await _gone(w, before, 2) == [name for name in before if name not in full]


@in_aws
async def test_market_with_too_many_instances_comes_first(w: World) -> None:
    config = mixed("m.large", on_demand_percentage_above_base_capacity=50)
    await w.group(4, policies("NewestInstance", config=config))
    await w.resize(3)
    assert sorted(market for _, market in w.machines()) == [Market.ON_DEMAND, Market.ON_DEMAND, Market.SPOT]
    await w.resize(2)
    assert sorted(market for _, market in w.machines()) == [Market.ON_DEMAND, Market.SPOT]


@pytest.mark.parametrize("policy", ["AllocationStrategy", "Default"])
def test_last_choice_of_the_allocation_strategy_ends_first(policy: str) -> None:
    @in_aws
    async def check(w: World) -> None:
        await w.group(1, policies(policy, config=mixed("m.large", "c.large")))
        w.launcher.exhausted = {("m.large", "us-east-1a")}
        await w.resize(2)
        w.launcher.exhausted.clear()
        await w.tick(300.0)
        await w.resize(3)
        assert [kind for kind, _ in w.machines()] == ["m.large", "c.large", "m.large"]
        await w.resize(2)
        assert [kind for kind, _ in w.machines()] == ["m.large", "m.large"]

    check()
