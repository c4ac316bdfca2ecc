"""Market and instance type of the next instance in a mixed instances group.

Spot capacity is not known in advance. A capacity pool (type, zone, market) that refused a launch or
interrupted an instance is avoided for a while.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from batchlab.core.model import Machine, Market
from batchlab.fleet.api_types import InstancesDistribution, Override
from batchlab.fleet.external_data import Prices
from batchlab.fleet.group_features import Asg
from batchlab.fleet.group_state import Member, weigh

BARREN_S = 300.0
"""Seconds for which a failed capacity pool is avoided. AWS does not document this time."""


def pool_name(machine: Machine) -> str:
    """Return the capacity pool's name in `Asg.barren_s`."""
    return f"{machine.type}/{machine.zone}/{machine.market}"


def avoid(asg: Asg, machine: Machine, now_s: float) -> None:
    """Avoid a capacity pool that failed or interrupted an instance."""
    asg.barren_s = {name: until_s for name, until_s in asg.barren_s.items() if until_s > now_s}
    asg.barren_s[pool_name(machine)] = now_s + BARREN_S


def is_barren(asg: Asg, machine: Machine, now_s: float) -> bool:
    return asg.barren_s.get(pool_name(machine), 0.0) > now_s


def barren_zones(asg: Asg, now_s: float) -> set[str]:
    """Return the zones in which a capacity pool failed recently."""
    return {name.split("/")[1] for name, until_s in asg.barren_s.items() if until_s > now_s}


def wanted_on_demand(shares: InstancesDistribution, capacity: int) -> int:
    """Return the on-demand units of `capacity`: the base, and a percentage of the rest.

    The result is rounded up.
    """
    base = min(shares.on_demand_base_capacity, capacity)
    above = (capacity - base) * shares.on_demand_percentage_above_base_capacity
    return base + math.ceil(above / 100)


def market_to_add(shares: InstancesDistribution, members: Sequence[Member]) -> Market:
    """Return the market of the next instance."""
    wanted = wanted_on_demand(shares, weigh(members) + 1)
    return Market.ON_DEMAND if _on_demand(members) < wanted else Market.SPOT


def market_to_remove(shares: InstancesDistribution, members: Sequence[Member]) -> Market:
    """Return the market to reduce when capacity decreases by one."""
    wanted = wanted_on_demand(shares, max(0, weigh(members) - 1))
    return Market.ON_DEMAND if _on_demand(members) > wanted else Market.SPOT


def _on_demand(members: Sequence[Member]) -> int:
    return weigh([m for m in members if m.instance.machine.market is Market.ON_DEMAND])


def preferred(
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
        pools = shares.spot_instance_pools or 2
        return _fewest(cheap[:pools], members) + cheap[pools:]
    if strategy == "price-capacity-optimized":
        return _fewest(_cheapest(overrides, zone, market, prices), members)
    return _fewest(overrides, members)


def _cheapest(
    overrides: Sequence[Override], zone: str, market: Market, prices: Prices | None
) -> list[Override]:
    """Sort by price per unit. Overrides without a price come last, in their order."""

    def cost(override: Override) -> float:
        machine = Machine(override.instance_type, zone, market)
        price = None if prices is None else prices.hourly(machine)
        return math.inf if price is None else price / (override.weighted_capacity or 1)

    return sorted(overrides, key=cost)


def _fewest(overrides: Sequence[Override], members: Sequence[Member]) -> list[Override]:
    """Sort by the number of Spot instances of each type, fewest first."""
    spot = [m for m in members if m.instance.machine.market is Market.SPOT]
    have = Counter(member.instance.machine.type for member in spot)
    return sorted(overrides, key=lambda override: have[override.instance_type])
