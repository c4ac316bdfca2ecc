"""The zone, market, type, and weight of launched instances, and replacements for balance or age."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from batchlab.core.model import LifecycleState, Machine, Market
from batchlab.fleet.api_types import (
    GroupConfig,
    InstancesDistribution,
    LaunchTemplate,
    MixedInstancesPolicy,
    Override,
    ValidationError,
)
from batchlab.fleet.placement import wanted_on_demand
from tests.support.autoscaling_group import CONFIG, GROUP, ZONES, World, hook, in_aws

OD, SPOT = Market.ON_DEMAND, Market.SPOT


def mixed(*overrides: str | Override, zones: int = 1, **shares: Any) -> GroupConfig:
    kinds = [Override(o) if isinstance(o, str) else o for o in overrides]
    policy = MixedInstancesPolicy(LaunchTemplate("", "workers"), tuple(kinds), InstancesDistribution(**shares))
    return replace(CONFIG, launch_template=None, mixed_instances_policy=policy, availability_zones=ZONES[:zones])


@dataclass(frozen=True)
class PriceList:
    cents: dict[str, float]

    def hourly(self, machine: Machine) -> float | None:
        return self.cents.get(machine.type)


# --- Zones ----------------------------------------------------------------------------------------


@in_aws
async def test_instances_are_spread_over_the_zones(w: World) -> None:
    await w.group(4)
    assert w.zones() == ["a", "a", "b", "c"]
    await w.resize(6)
    assert w.zones() == ["a", "a", "b", "b", "c", "c"]


@in_aws
async def test_launcher_gets_zone_type_and_market(w: World) -> None:
    (name,) = await w.group(1)
    assert w.launcher.machines[name] == Machine("m.large", "us-east-1a", OD)


@in_aws
async def test_a_zone_without_capacity_is_left_out_for_a_while(w: World) -> None:
    w.launcher.exhausted = {("m.large", "us-east-1b")}
    await w.group(3)
    assert w.zones() == ["a", "a", "c"]
    await w.tick(1.0, times=20)
    assert len(w.launcher.launched) == 3, "nothing is moved into a zone that has nothing"
    w.launcher.exhausted.clear()
    await w.tick(300.0, times=4)
    assert w.zones() == ["a", "b", "c"]


@in_aws
async def test_an_unbalanced_group_is_rebalanced_launching_first(w: World) -> None:
    w.launcher.exhausted = {("m.large", "us-east-1b"), ("m.large", "us-east-1c")}
    await w.group(4)
    assert w.zones() == ["a"] * 4
    w.launcher.exhausted.clear()
    await w.tick(300.0)
    await w.tick()
    assert len(w.states()) == 5, "launch before terminate"
    for _ in range(20):
        await w.tick(11.0)
        assert len(w.ids_in(LifecycleState.IN_SERVICE)) >= 4
    assert w.zones() == ["a", "a", "b", "c"]
    told = [a.cause for a in w.activities() if a.description.startswith("Terminating")]
    assert all("in response to an instance rebalancing request" in cause for cause in told)


@in_aws
async def test_without_azrebalance_nothing_is_moved(w: World) -> None:
    w.launcher.exhausted = {("m.large", "us-east-1b"), ("m.large", "us-east-1c")}
    await w.group(4)
    w.asg.suspend_processes(GROUP, ["AZRebalance"])
    w.launcher.exhausted.clear()
    await w.tick(300.0, times=5)
    assert w.zones() == ["a"] * 4
    await w.resize(6)
    assert w.zones() == ["a"] * 4 + ["b", "c"], "scale out still balances"


@in_aws
async def test_a_zone_that_the_group_leaves_is_emptied(w: World) -> None:
    await w.group(3)
    w.asg.update_auto_scaling_group(GROUP, {"availability_zones": ZONES[:2]})
    await w.tick(11.0, times=6)
    assert w.zones() == ["a", "a", "b"]


@in_aws
async def test_protected_instances_are_not_moved(w: World) -> None:
    names = await w.group(2, replace(CONFIG, availability_zones=ZONES[:1]))
    w.asg.set_instance_protection(GROUP, names, protected_from_scale_in=True)
    w.asg.update_auto_scaling_group(GROUP, {"availability_zones": ZONES})
    await w.tick(11.0, times=6)
    assert w.zones() == ["a", "a"]


@in_aws
async def test_group_with_subnets_uses_their_zones(w: World) -> None:
    w.options["zones"] = ZONES[:2]
    w.restart()
    await w.group(2, replace(CONFIG, availability_zones=(), vpc_zone_identifier="subnet-1"))
    assert w.zones() == ["a", "a"]
    assert w.view().config.availability_zones == ZONES[:1]
    w.asg.update_auto_scaling_group(GROUP, {"vpc_zone_identifier": "subnet-1,subnet-2"})
    await w.tick(11.0, times=6)
    assert w.zones() == ["a", "b"]
    assert w.view().config.availability_zones == ZONES[:2]
    with pytest.raises(ValidationError, match="us-east-1c"):
        w.asg.update_auto_scaling_group(GROUP, {"availability_zones": ZONES})


@in_aws
async def test_instances_of_an_earlier_version_without_a_zone_are_not_moved(w: World) -> None:
    """An earlier version launched the instances of a group with subnets in no zone."""
    names = await w.group(3, replace(CONFIG, availability_zones=(), vpc_zone_identifier="subnet-1,subnet-2"))
    saved = w.store.load()
    assert saved is not None
    w.store.save(re.sub(rb'"us-east-1[a-f]"', b'""', saved))
    w.restart()
    await w.tick(11.0, times=10)
    assert w.ids_in(LifecycleState.IN_SERVICE) == names
    await w.resize(5)
    assert [i.availability_zone for i in w.instances()] == ["", "", "", "us-east-1a", "us-east-1b"]


# --- Markets and types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "percentage", "wanted"),
    [(0, 100, [1, 2, 3, 4]), (0, 0, [0, 0, 0, 0]), (0, 50, [1, 1, 2, 2]), (2, 0, [1, 2, 2, 2]), (2, 50, [1, 2, 3, 3])],
)
def test_on_demand_is_the_base_and_a_share_of_the_rest(base: int, percentage: int, wanted: list[int]) -> None:
    shares = InstancesDistribution(on_demand_base_capacity=base, on_demand_percentage_above_base_capacity=percentage)
    assert [wanted_on_demand(shares, n) for n in (1, 2, 3, 4)] == wanted


@in_aws
async def test_the_shares_hold_at_every_size(w: World) -> None:
    config = mixed("m.large", on_demand_base_capacity=1, on_demand_percentage_above_base_capacity=25)
    await w.group(0, config)
    for size, on_demand in ((1, 1), (2, 2), (5, 2), (9, 3), (5, 2), (2, 2), (1, 1)):
        await w.resize(size)
        assert Counter(market for _, market in w.machines())[OD] == on_demand


@in_aws
async def test_on_demand_takes_the_first_type_that_can_be_had(w: World) -> None:
    w.launcher.exhausted = {("m.large", "us-east-1a")}
    await w.group(2, mixed("m.large", "c.large"))
    assert w.machines() == [("c.large", OD)] * 2


@in_aws
async def test_the_lowest_price_decides_where_that_is_the_strategy(w: World) -> None:
    w.options["prices"] = PriceList({"m.large": 9.0, "c.large": 8.0, "c.xlarge": 10.0})
    w.restart()
    big = Override("c.xlarge", weighted_capacity=2)
    small = [Override(kind, weighted_capacity=1) for kind in ("m.large", "c.large")]
    config = mixed(*small, big, on_demand_allocation_strategy="lowest-price")
    await w.group(2, config)
    assert w.machines() == [("c.xlarge", OD)], "5 a unit"


@pytest.mark.parametrize(
    ("strategy", "types"),
    [
        ("lowest-price", {"a.large": 2, "b.large": 2}),
        ("price-capacity-optimized", {"a.large": 2, "b.large": 1, "c.large": 1}),
        ("capacity-optimized", {"a.large": 2, "b.large": 1, "c.large": 1}),
        ("capacity-optimized-prioritized", {"a.large": 4}),
    ],
)
def test_spot_strategies_choose_types(strategy: str, types: dict[str, int]) -> None:
    @in_aws
    async def check(w: World) -> None:
        config = mixed(
            "a.large",
            "b.large",
            "c.large",
            spot_allocation_strategy=strategy,
            on_demand_percentage_above_base_capacity=0,
        )
        await w.group(4, config)
        assert {market for _, market in w.machines()} == {SPOT}
        assert Counter(kind for kind, _ in w.machines()) == types

    check()


@in_aws
async def test_a_template_may_ask_for_spot_by_itself(w: World) -> None:
    w.templates.put(1, instance_type="m.large", market=SPOT)
    await w.group(1)
    assert w.machines() == [("m.large", SPOT)]


@in_aws
async def test_an_override_may_have_its_own_template(w: World) -> None:
    w.templates.put(1, name="special", slots=7)
    special = Override("g.large", launch_template_specification=LaunchTemplate("", "special"))
    (name,) = await w.group(1, mixed(special))
    assert w.launcher.pools[name].slots == 7
    seen = w.one(name).launch_template
    assert seen is not None
    assert seen.launch_template_name == "special"
    gone = Override("g.large", launch_template_specification=LaunchTemplate("", "nothing"))
    with pytest.raises(ValidationError, match="does not exist"):
        w.asg.update_auto_scaling_group(GROUP, {"mixed_instances_policy": mixed(gone).mixed_instances_policy})


# --- Weights --------------------------------------------------------------------------------------


@in_aws
async def test_weights_count_capacity_in_units(w: World) -> None:
    await w.group(5, mixed(Override("m.xlarge", weighted_capacity=2)))
    assert len(w.states()) == 3, "three times two is the least that is five"
    assert w.instances()[0].weighted_capacity == 2
    await w.resize(4)
    assert len(w.states()) == 2
    await w.resize(3)
    assert len(w.states()) == 2, "without one of them there would be too few"


@pytest.mark.parametrize("weights", [(0,), (1_000,), (1, None)])
def test_weights_that_aws_does_not_allow_are_refused(weights: tuple[int | None, ...]) -> None:
    w = World()
    overrides = [Override(f"m.{n}xlarge", weighted_capacity=weight) for n, weight in enumerate(weights)]
    with pytest.raises(ValidationError, match="WeightedCapacity"):
        w.asg.create_auto_scaling_group(mixed(*overrides))


@pytest.mark.parametrize(
    ("strategy", "pools", "described"),
    [
        ("lowest-price", None, 2),
        ("lowest-price", 20, 20),
        ("lowest-price", 21, "between 1 and 20"),
        ("lowest-price", 0, "between 1 and 20"),
        ("capacity-optimized", None, None),
        ("capacity-optimized", 2, "only with the SpotAllocationStrategy lowest-price"),
    ],
)
def test_spot_instance_pools_belong_to_the_strategy_lowest_price(
    strategy: str, pools: int | None, described: int | str | None
) -> None:
    w = World()
    config = mixed("m.large", spot_allocation_strategy=strategy, spot_instance_pools=pools)
    if isinstance(described, str):
        with pytest.raises(ValidationError, match=described):
            w.asg.create_auto_scaling_group(config)
        return
    w.asg.create_auto_scaling_group(config)
    policy = w.view().config.mixed_instances_policy
    assert policy is not None
    assert policy.instances_distribution.spot_instance_pools == described


def test_settings_that_an_earlier_version_accepted_do_not_block_other_changes() -> None:
    w = World()
    w.asg.create_auto_scaling_group(mixed("m.large", "c.large", spot_allocation_strategy="capacity-optimized"))
    saved = json.loads(w.store.load() or b"")
    config = saved["groups"][0]["asg"]["config"]
    config["health_check_type"] = "PING"
    config["mixed_instances_policy"]["instances_distribution"]["spot_instance_pools"] = 4
    config["mixed_instances_policy"]["overrides"][0]["weighted_capacity"] = 1
    w.store.save(json.dumps(saved).encode())
    w.restart()
    before = w.view().config
    w.asg.update_auto_scaling_group(GROUP, {"max_size": 20})
    assert w.view().config == replace(before, max_size=20)
    with pytest.raises(ValidationError, match="HealthCheckType"):
        w.asg.update_auto_scaling_group(GROUP, {"health_check_type": "EC2,PING"})


# --- Age ------------------------------------------------------------------------------------------


@in_aws
async def test_instances_are_replaced_at_the_end_of_their_lifetime_one_at_a_time(w: World) -> None:
    before = await w.group(3, replace(CONFIG, max_instance_lifetime=60))
    w.asg.put_lifecycle_hook(hook())
    await w.tick(60.0, times=1)
    await w.tick(1.0, times=3)
    assert w.states() == ["InService"] * 3 + ["Pending:Wait"], "one at a time, launching first"
    w.asg.delete_lifecycle_hook(GROUP, "boot")
    for _ in range(12):
        await w.tick(1.0)
        assert len(w.ids_in(LifecycleState.IN_SERVICE)) >= 3
    assert not set(before) & set(w.ids_in(*LifecycleState))
    causes = " ".join(w.causes().values())
    assert "in response to the maximum instance lifetime being exceeded" in causes


@in_aws
async def test_protection_and_suspension_put_the_end_of_a_lifetime_off(w: World) -> None:
    first, second = await w.group(2, replace(CONFIG, max_instance_lifetime=60))
    w.asg.set_instance_protection(GROUP, [first], protected_from_scale_in=True)
    w.asg.suspend_processes(GROUP, ["Launch"])
    await w.tick(60.0, times=3)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [first, second]
    w.asg.resume_processes(GROUP)
    await w.tick(1.0, times=4)
    assert first in w.ids_in(LifecycleState.IN_SERVICE)
    assert second not in w.ids_in(LifecycleState.IN_SERVICE)


@in_aws
async def test_replaced_instances_end_at_once_if_the_group_shrinks(w: World) -> None:
    first, second = await w.group(2, replace(CONFIG, max_instance_lifetime=60))
    w.asg.set_instance_protection(GROUP, [second], protected_from_scale_in=True)
    await w.tick(60.0)
    w.asg.set_desired_capacity(GROUP, 1)
    await w.tick(times=3)
    assert w.ids_in(LifecycleState.IN_SERVICE) == [second]
    assert first not in w.ids_in(*LifecycleState)
