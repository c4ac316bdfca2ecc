"""What a forecast's instances and requests would cost on AWS, by the grid's own meter and bill.

Invariant: an instance second costs what that instance does, by its own type and market.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchlab.core.model import Instance, LifecycleState, Machine, Market, Pool
from batchlab.core.pricing.bill import Bill, PoolFacts, StageUse, bill, usd_per_s
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage_meter import Kind, Meter
from batchlab.manager.settings import ManagerSettings
from batchlab.scenarios.forecast.outcomes import Results
from batchlab.scenarios.verdicts.measures import end_s
from batchlab.scenarios.verdicts.record import InstanceRun, Record, StageRun
from batchlab.worker.settings import WorkerSettings


def compute_bill(
    pools: Mapping[str, Pool],
    instances: Sequence[InstanceRun],
    stages: Sequence[StageRun],
    results: Results,
    book: PriceBook,
    manager: ManagerSettings,
    worker: WorkerSettings,
    over_s: float,
) -> Bill:
    """The bill of a run that was over at `over_s`; instances that still lived then count until
    then."""
    meter = Meter()
    for one in instances:
        last_s = over_s if one.ended_s is None else one.ended_s
        machine = Machine(one.type, one.zone, Market(one.market))
        meter.see(
            pools[one.pool],
            Instance(one.id, one.pool, LifecycleState.IN_SERVICE, 0.0, machine=machine),
            now_s=last_s - one.launched_s,
            monotonic_s=last_s,
            shares={},
            accounts={},
        )
    account = meter.total
    account.bundles = results.bundles
    for pool, failed_s in results.failed_s.items():
        account.fail(pool, failed_s)
    for pool, thrown_s in results.thrown_s.items():
        account.lose(pool, thrown_s)
    uses = [StageUse(one.stage, one.pool, one.run_s, one.slots) for one in stages]
    facts = {name: PoolFacts(pool.slots, pool.instance_type) for name, pool in pools.items()}
    pace = Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)
    return bill(uses, account, facts, book, pace=pace)


def minimum_usd(record: Record, until_s: float, book: PriceBook) -> float:
    """What the pools' minima cost from the run's end until `until_s`. Those that are still there
    stay on, as what they are; what a minimum lacks then is bought on demand."""
    left_s = until_s - end_s(record)
    if left_s <= 0:
        return 0.0
    usd = 0.0
    for pool, (least, _, slots) in record.pools.items():
        mine = [one for one in record.instances if one.pool == pool]
        there = [Kind(pool, one.type, Market(one.market)) for one in mine if one.ended_s is None]
        usual = Kind(pool, mine[0].type if mine else "")
        for kind in [*there, *[usual] * least][:least]:
            usd += usd_per_s({kind: 1.0}, PoolFacts(slots, kind.type), book).typical * left_s
    return usd
