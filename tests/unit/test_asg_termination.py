"""Whom scale-in takes: market, zone, then the termination policies, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.fleet.api import GroupConfig, LaunchTemplate
from batchlab.model import LifecycleState, Market
from tests.asg_rigs import CONFIG, GROUP, ZONES, World, in_aws
from tests.unit.test_asg_placement import mixed

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
    """Who has gone once the group has this size."""
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
    # Their ages are now 3,000, 1,500 and 0 s; 700 s later 3,700, 2,200 and 700 s.
    w.clock.time_s += 700.0
    assert await _gone(w, before, 2) == [before[1]]
    assert await _gone(w, before, 1) == [before[1], before[2]]


@in_aws
async def test_the_oldest_launch_template_is_another_one_then_an_older_version(w: World) -> None:
    w.templates.put(1, name="before", instance_type="m.large")
    other = replace(ONE_ZONE, launch_template=LaunchTemplate("", "before", "1"))
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
    w.asg.update_auto_scaling_group(
        GROUP, {"termination_policies": ("OldestLaunchConfiguration", "NewestInstance")}
    )
    assert await _gone(w, before, 1) == before[:1]


@in_aws
async def test_the_default_takes_configurations_then_old_templates_then_the_hour(w: World) -> None:
    old = replace(ONE_ZONE, launch_template=None, launch_configuration_name="lc-1")
    await _one_by_one(w, old, 1, 10.0)
    w.templates.put(2, instance_type="m.large")
    for version, size in (("2", 2), ("1", 3), ("2", 4)):
        template = LaunchTemplate("", "workers", version)
        w.asg.update_auto_scaling_group(GROUP, {"launch_template": template})
        w.clock.time_s += 100.0
        await w.resize(size)
    before = w.ids_in(LifecycleState.IN_SERVICE)
    assert await _gone(w, before, 3) == before[:1], "of a launch configuration"
    assert await _gone(w, before, 2) == [before[0], before[2]], "of the oldest version"
    # Both left are of version 2; the older one is nearer to the end of its hour.
    assert await _gone(w, before, 1) == before[:3]


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
async def test_the_fullest_zone_comes_before_every_policy(w: World) -> None:
    before = await _one_by_one(w, policies("NewestInstance", config=CONFIG), 4, 10.0)
    zones = [i.availability_zone[-1] for i in w.instances()]
    assert zones == ["a", "b", "c", "a"]
    assert await _gone(w, before, 3) == before[3:]
    w.asg.update_auto_scaling_group(GROUP, {"termination_policies": ("OldestInstance",)})
    assert await _gone(w, before, 2) == [before[0], before[3]]


@in_aws
async def test_a_full_zone_of_protected_instances_is_passed_over(w: World) -> None:
    before = await _one_by_one(w, policies("OldestInstance", config=CONFIG), 4, 10.0)
    w.asg.suspend_processes(GROUP, ["AZRebalance"])
    full = [i.instance_id for i in w.instances() if i.availability_zone.endswith("a")]
    w.asg.set_instance_protection(GROUP, full, protected_from_scale_in=True)
    assert await _gone(w, before, 2) == [name for name in before if name not in full]


@in_aws
async def test_the_market_that_has_too_many_comes_first(w: World) -> None:
    config = mixed("m.large", on_demand_percentage_above_base_capacity=50)
    await w.group(4, policies("NewestInstance", config=config))
    await w.resize(3)
    assert sorted(market for _, market in w.machines()) == [
        Market.ON_DEMAND,
        Market.ON_DEMAND,
        Market.SPOT,
    ]
    await w.resize(2)
    assert sorted(market for _, market in w.machines()) == [Market.ON_DEMAND, Market.SPOT]


@in_aws
async def test_the_allocation_strategys_last_choice_goes_first(w: World) -> None:
    w.launcher.exhausted = {("m.large", "us-east-1a")}
    config = policies("AllocationStrategy", config=mixed("m.large", "c.large"))
    await w.group(1, config)
    w.launcher.exhausted.clear()
    await w.tick(300.0)
    await w.resize(3)
    assert sorted(kind for kind, _ in w.machines()) == ["c.large", "m.large", "m.large"]
    await w.resize(2)
    assert sorted(kind for kind, _ in w.machines()) == ["m.large", "m.large"]
