"""What a run has cost, or would have on AWS: the grid's own account, its beginning taken away.

Invariant: prices and reckoning are those of `batchlab cost bill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from batchlab.backends import Backend
from batchlab.costs.bill import Bill, PoolFacts, StageUse, bill
from batchlab.costs.meter import Account, Kind
from batchlab.costs.prices import PriceBook
from batchlab.model import Market
from batchlab.scenario.model import PoolPlan
from batchlab.scenario.record import StageRun

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spent:
    """`usd` at list prices with its lines by what they are for."""

    usd: float
    items: Mapping[str, float]


def spent(
    before: Account,
    after: Account,
    stages: Iterable[StageRun],
    pools: Iterable[PoolPlan],
    backend: Backend,
    book: PriceBook,
) -> Spent:
    """What a run came to that began with the account `before` and ended with `after`. But for AWS
    itself, where they are what was bought, instances count as the pools' types and Spot shares."""
    plans = {plan.pool.name: plan for plan in pools}
    used = _difference(before, after)
    if not backend.capabilities.billed:
        used = replace(used, billed_s=_as_bought(used.billed_s, plans))
    found = bill(
        [StageUse(s.stage, s.pool, s.run_s, s.slots) for s in stages],
        used,
        {name: PoolFacts(one.pool.slots, one.pool.instance_type) for name, one in plans.items()},
        book,
        pace=backend.pace,
    )
    return Spent(found.usd.typical, _by_what(found))


def again_s(before: Account, after: Account) -> float:
    """Slot seconds between the two of attempts that failed, and of runs that went with their
    instance."""
    return _again_s(after) - _again_s(before)


def _again_s(account: Account) -> float:
    return sum(account.failed_s.values()) + sum(account.lost_s.values())


def _difference(before: Account, after: Account) -> Account:
    return Account(
        _less(before.billed_s, after.billed_s),
        _less(before.failed_s, after.failed_s),
        _less(before.lost_s, after.lost_s),
        after.requests - before.requests,
        after.bundles - before.bundles,
    )


def _less(before: Mapping[T, float], after: Mapping[T, float]) -> dict[T, float]:
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def _as_bought(billed_s: Mapping[Kind, float], plans: Mapping[str, PoolPlan]) -> dict[Kind, float]:
    """Instance seconds by what the scenario would buy; of what was Spot already, as it was."""
    found: dict[Kind, float] = {}

    def add(kind: Kind, seconds: float) -> None:
        if seconds:
            found[kind] = found.get(kind, 0.0) + seconds

    for kind, seconds in billed_s.items():
        plan = plans.get(kind.pool)
        if plan is None or kind.market is Market.SPOT:
            add(kind, seconds)
            continue
        typed = replace(kind, type=plan.pool.instance_type or kind.type)
        add(replace(typed, market=Market.SPOT), seconds * plan.spot)
        add(typed, seconds * (1 - plan.spot))
    return found


def _by_what(found: Bill) -> dict[str, float]:
    items: dict[str, float] = {}
    for item in found.items:
        items[item.what] = items.get(item.what, 0.0) + item.usd.typical
    return items
