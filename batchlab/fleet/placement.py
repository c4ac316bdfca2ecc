"""Placement of the next instance of a group: zone, market, type, and template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchlab.core.model import Machine, Market, Pool
from batchlab.fleet import mixed_instances
from batchlab.fleet.api_types import GroupConfig, LaunchTemplate, MixedInstancesPolicy, Override
from batchlab.fleet.errors import ValidationError
from batchlab.fleet.external_data import Prices, Template, Templates
from batchlab.fleet.group_features import Asg
from batchlab.fleet.group_state import Bond, Group


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of an instance: the launcher's arguments and the state of the new member."""

    pool: Pool
    machine: Machine
    bond: Bond


@dataclass(frozen=True, slots=True)
class Sources:
    """Sources of external data for launches."""

    templates: Templates
    prices: Prices | None
    zones: tuple[str, ...]
    """Zones of a group that does not name any."""


def configuration(asg: Asg) -> GroupConfig:
    """Return the configuration for new instances: the target of a refresh, or the group's own."""
    rolling = asg.rolling
    wanted = rolling.refresh.desired_configuration if rolling else None
    if wanted is None:
        return asg.config
    return apply(asg.config, wanted.launch_template, wanted.mixed_instances_policy)


def apply(
    config: GroupConfig,
    template: LaunchTemplate | None,
    mixed: MixedInstancesPolicy | None,
) -> GroupConfig:
    """Return the configuration with its template or policy replaced."""
    return replace(
        config,
        launch_template=template,
        mixed_instances_policy=mixed,
        launch_configuration_name="",
    )


def template_of(config: GroupConfig, templates: Templates) -> Template:
    """Return the template of the configuration. Raise ValidationError if it does not exist."""
    if config.mixed_instances_policy is not None:
        return templates.template(config.mixed_instances_policy.launch_template)
    if config.launch_template is not None:
        return templates.template(config.launch_template)
    return templates.launch_configuration(config.launch_configuration_name)


def zones_of(config: GroupConfig, sources: Sources) -> tuple[str, ...]:
    return config.availability_zones or sources.zones or ("",)


def choose(group: Group, asg: Asg, sources: Sources, now_s: float, *, warm: bool) -> Placement:
    """Choose the next instance of this group.

    A capacity pool that failed recently is used only if all have failed.
    """
    config = configuration(asg)
    template = template_of(config, sources.templates)
    mixed = config.mixed_instances_policy
    zones = zones_of(config, sources)
    if mixed is None:
        override = Override(template.instance_type)
        options = [(override, zone, template.market) for zone in _emptiest(group, zones)]
    else:
        options = _mixed(group, mixed, template, zones, sources.prices)
    override, zone, market = next(
        (
            o
            for o in options
            if not mixed_instances.is_barren(asg, Machine(o[0].instance_type, *o[1:]), now_s)
        ),
        options[0],
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
        ),
        Machine(override.instance_type or template.instance_type, zone, market),
        Bond(
            template=None if config.launch_configuration_name else template.reference,
            launch_configuration=config.launch_configuration_name,
            weight=override.weighted_capacity or 1,
            weighted=override.weighted_capacity is not None,
            warm=warm,
        ),
    )


def _emptiest(group: Group, zones: Sequence[str], market: Market | None = None) -> list[str]:
    """Sort zones by number of instances, then by instances of this market, fewest first."""
    machines = [member.instance.machine for member in group.staying()]
    total = Counter(machine.zone for machine in machines)
    alike = Counter(machine.zone for machine in machines if machine.market is market)
    return sorted(zones, key=lambda zone: (total[zone], alike[zone]))


def _mixed(
    group: Group,
    mixed: MixedInstancesPolicy,
    template: Template,
    zones: Sequence[str],
    prices: Prices | None,
) -> list[tuple[Override, str, Market]]:
    """Return every capacity pool of the next market, sorted by zone and then by type."""
    members, shares = group.staying(), mixed.instances_distribution
    market = mixed_instances.market_to_add(shares, members)
    overrides = mixed.overrides or (Override(template.instance_type),)
    return [
        (override, zone, market)
        for zone in _emptiest(group, zones, market)
        for override in mixed_instances.preferred(
            shares, market, overrides, members, zone=zone, prices=prices
        )
    ]


def check(config: GroupConfig, sources: Sources) -> None:
    """Raise ValidationError if a template of the configuration does not exist."""
    given = [config.launch_template, config.mixed_instances_policy]
    count = sum(one is not None for one in given) + bool(config.launch_configuration_name)
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
