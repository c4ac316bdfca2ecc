"""Placement of the next instance of a group: zone, market, type, and template.

Spot capacity is not known in advance. A capacity pool (type, zone, market) that refused a launch or interrupted an
instance is avoided for `AVOID_S`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchlab.core.model import Machine, Market, Pool
from batchlab.fleet.api_types import (
    GroupConfig,
    InstancesDistribution,
    LaunchTemplate,
    MixedInstancesPolicy,
    Override,
    Prices,
    Template,
    Templates,
    ValidationError,
)
from batchlab.fleet.group_state import Asg, AsgMember, Group, Member, weigh

AVOID_S = 300.0
"""Time in seconds for which launches avoid a failed capacity pool. AWS does not document its own time."""


SPOT_POOLS = 2
"""AWS's default of SpotInstancePools."""


def pool_name(machine: Machine) -> str:
    return f"{machine.type}/{machine.zone}/{machine.market}"


def avoid(asg: Asg, machine: Machine, now_s: float) -> None:
    """Avoid the capacity pool of a machine for `AVOID_S` after a failed launch or an interruption."""
    asg.barren_s = {name: until_s for name, until_s in asg.barren_s.items() if until_s > now_s}
    asg.barren_s[pool_name(machine)] = now_s + AVOID_S


def is_avoided(asg: Asg, machine: Machine, now_s: float) -> bool:
    return asg.barren_s.get(pool_name(machine), 0.0) > now_s


def avoided_zones(asg: Asg, now_s: float) -> set[str]:
    return {name.split("/")[1] for name, until_s in asg.barren_s.items() if until_s > now_s}


def wanted_on_demand(shares: InstancesDistribution, capacity: int) -> int:
    """Return the On-Demand units of `capacity`: the On-Demand base capacity plus a percentage of the remaining
    capacity, rounded up."""
    base = min(shares.on_demand_base_capacity, capacity)
    above = (capacity - base) * shares.on_demand_percentage_above_base_capacity
    return base + math.ceil(above / 100)


def market_to_add(shares: InstancesDistribution, members: Sequence[Member]) -> Market:
    wanted = wanted_on_demand(shares, weigh(members) + 1)
    return Market.ON_DEMAND if _on_demand(members) < wanted else Market.SPOT


def market_to_remove(shares: InstancesDistribution, members: Sequence[Member]) -> Market:
    """Return the market to reduce when capacity decreases by one unit."""
    wanted = wanted_on_demand(shares, max(0, weigh(members) - 1))
    return Market.ON_DEMAND if _on_demand(members) > wanted else Market.SPOT


def _on_demand(members: Sequence[Member]) -> int:
    return weigh([m for m in members if m.instance.machine.market is Market.ON_DEMAND])


def preferred_overrides(
    shares: InstancesDistribution,
    market: Market,
    overrides: Sequence[Override],
    members: Sequence[Member],
    *,
    zone: str,
    prices: Prices | None,
) -> list[Override]:
    """Return the overrides in the order of the allocation strategy."""
    if market is Market.ON_DEMAND:
        if shares.on_demand_allocation_strategy == "lowest-price":
            return _cheapest(overrides, zone, market, prices)
        return list(overrides)
    strategy = shares.spot_allocation_strategy
    if strategy == "capacity-optimized-prioritized":
        return list(overrides)
    if strategy == "lowest-price":
        cheap = _cheapest(overrides, zone, market, prices)
        pools = shares.spot_instance_pools or SPOT_POOLS
        return _fewest(cheap[:pools], members) + cheap[pools:]
    if strategy == "price-capacity-optimized":
        return _fewest(_cheapest(overrides, zone, market, prices), members)
    return _fewest(overrides, members)


def _cheapest(overrides: Sequence[Override], zone: str, market: Market, prices: Prices | None) -> list[Override]:
    """Return the overrides sorted by price per unit of capacity. Overrides without a price come last, in their original
    order."""

    def cost(override: Override) -> float:
        machine = Machine(override.instance_type, zone, market)
        price = None if prices is None else prices.hourly(machine)
        return math.inf if price is None else price / (override.weighted_capacity or 1)

    return sorted(overrides, key=cost)


def _fewest(overrides: Sequence[Override], members: Sequence[Member]) -> list[Override]:
    """Return the overrides sorted by the number of Spot Instances of each type, fewest first."""
    spot = [m for m in members if m.instance.machine.market is Market.SPOT]
    have = Counter(member.instance.machine.type for member in spot)
    return sorted(overrides, key=lambda override: have[override.instance_type])


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of an instance: the launcher's arguments and the state of the new member."""

    pool: Pool
    machine: Machine
    asg: AsgMember


@dataclass(frozen=True, slots=True)
class Sources:
    templates: Templates
    prices: Prices | None
    zones: tuple[str, ...]
    """Zones of the subnets of a group that does not name zones."""


def configuration(asg: Asg) -> GroupConfig:
    """Return the configuration for new instances: the target of the active instance refresh, or else the group's own
    configuration."""
    rolling = asg.rolling
    wanted = rolling.refresh.desired_configuration if rolling else None
    if wanted is None:
        return asg.config
    return apply(asg.config, wanted.launch_template, wanted.mixed_instances_policy)


def apply(config: GroupConfig, template: LaunchTemplate | None, mixed: MixedInstancesPolicy | None) -> GroupConfig:
    """Return the configuration with another launch template or mixed instances policy."""
    return replace(config, launch_template=template, mixed_instances_policy=mixed, launch_configuration_name="")


def template_of(config: GroupConfig, templates: Templates) -> Template:
    """Return the template of the configuration. Raise ValidationError if the template does not exist."""
    if config.mixed_instances_policy is not None:
        return templates.template(config.mixed_instances_policy.launch_template)
    if config.launch_template is not None:
        return templates.template(config.launch_template)
    return templates.launch_configuration(config.launch_configuration_name)


def zones_of(config: GroupConfig, sources: Sources) -> tuple[str, ...]:
    """Return the zones of the group. The launcher does not have subnets, so the first subnet of a group is in the first
    zone, the second subnet in the second zone, and so on."""
    subnets = len(set(config.vpc_zone_identifier.split(",")))
    return config.availability_zones or sources.zones[:subnets]


def choose(group: Group, asg: Asg, sources: Sources, now_s: float, *, warm: bool) -> Placement:
    """Return the placement of the group's next instance. The placement uses a recently failed capacity pool only if all
    capacity pools have failed."""
    config = configuration(asg)
    template = template_of(config, sources.templates)
    mixed = config.mixed_instances_policy
    zones = zones_of(config, sources)
    if mixed is None:
        override = Override(template.instance_type)
        options = [(override, zone, template.market) for zone in _emptiest(group, zones)]
    else:
        options = _mix(group, mixed, template, zones, sources.prices)
    override, zone, market = next(
        (o for o in options if not is_avoided(asg, Machine(o[0].instance_type, *o[1:]), now_s)), options[0]
    )
    special = override.launch_template_specification
    if special is not None:
        template = sources.templates.template(special)
    pool = group.pool
    return Placement(
        Pool(
            name=pool.name,
            min_size=pool.min_size,
            max_size=pool.max_size,
            slots=template.slots,
            boot_s=template.boot_s,
            env=template.env,
            gpus=template.gpus,
        ),
        Machine(override.instance_type or template.instance_type, zone, market),
        AsgMember(
            template=None if config.launch_configuration_name else template.reference,
            launch_configuration=config.launch_configuration_name,
            weight=override.weighted_capacity or 1,
            weighted=override.weighted_capacity is not None,
            warm=warm,
        ),
    )


def _emptiest(group: Group, zones: Sequence[str], market: Market | None = None) -> list[str]:
    """Return the zones sorted by number of instances, then by instances of `market`, fewest first."""
    machines = [member.instance.machine for member in group.staying()]
    total = Counter(machine.zone for machine in machines)
    alike = Counter(machine.zone for machine in machines if machine.market is market)
    return sorted(zones, key=lambda zone: (total[zone], alike[zone]))


def _mix(
    group: Group, mixed: MixedInstancesPolicy, template: Template, zones: Sequence[str], prices: Prices | None
) -> list[tuple[Override, str, Market]]:
    """Return every capacity pool of the next instance's market, sorted by zone and then by type."""
    members, shares = group.staying(), mixed.instances_distribution
    market = market_to_add(shares, members)
    overrides = mixed.overrides or (Override(template.instance_type),)
    return [
        (override, zone, market)
        for zone in _emptiest(group, zones, market)
        for override in preferred_overrides(shares, market, overrides, members, zone=zone, prices=prices)
    ]


def resolve(config: GroupConfig, templates: Templates) -> GroupConfig:
    """Return a requested configuration with the id and the name of each launch template. Raise ValidationError if a
    template does not exist, or unless the request contains either its id or its name."""
    template, mixed = config.launch_template, config.mixed_instances_policy
    if template is not None:
        template = _identify(template, templates)
    if mixed is not None:
        mixed = replace(
            mixed,
            launch_template=_identify(mixed.launch_template, templates),
            overrides=tuple(
                override
                if override.launch_template_specification is None
                else replace(
                    override, launch_template_specification=_identify(override.launch_template_specification, templates)
                )
                for override in mixed.overrides
            ),
        )
    return replace(config, launch_template=template, mixed_instances_policy=mixed)


def _identify(reference: LaunchTemplate, templates: Templates) -> LaunchTemplate:
    if bool(reference.launch_template_id) == bool(reference.launch_template_name):
        raise ValidationError("Valid requests must contain either launchTemplateId or LaunchTemplateName")
    # As on AWS, descriptions repeat the version of the request.
    return replace(templates.template(reference).reference, version=reference.version)


def check(config: GroupConfig, sources: Sources) -> None:
    """Raise ValidationError if the configuration does not have exactly one template setting, or if one of its templates
    does not exist."""
    settings = [config.launch_template, config.mixed_instances_policy]
    count = sum(setting is not None for setting in settings) + bool(config.launch_configuration_name)
    if count != 1:
        raise ValidationError(
            "Valid requests must contain either LaunchTemplate, LaunchConfigurationName,"
            " InstanceId or MixedInstancesPolicy parameter."
        )
    template_of(config, sources.templates)
    mixed = config.mixed_instances_policy
    for override in mixed.overrides if mixed else ():
        if override.launch_template_specification is not None:
            sources.templates.template(override.launch_template_specification)
