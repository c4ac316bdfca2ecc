"""Costs of a job in lines of a bill, split by stage.

Invariant: the parts of a line of the bill add up to the line, and all parts add up to the bill, exactly to 12 decimal
places. A cost that does not belong to a single stage has the stage None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from batchlab.core.pricing.bill import Bill, Billed, PoolFacts, StageUse, bill, seconds
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage import Account

DIGIT = Decimal("0.000000000001")

_REQUESTS = {"SQS requests": "sqs", "S3 requests": "s3"}

_Line = tuple[str, str | None, float | None, Mapping[str | None, float]]
"""Kind, pool, instance seconds, and weights of the stages of a line of the bill."""


@dataclass(frozen=True, slots=True)
class Part:
    """Row of the cost table: a line of the bill, or a stage's part of a line. `seconds` are instance seconds."""

    line: str
    kind: str
    pool: str | None
    stage: str | None
    seconds: float | None
    cost_usd: Decimal
    how: str


@dataclass(frozen=True, slots=True)
class StageUsage:
    """Usage of one stage of a job.

    `failed_slot_s` is the slot time of failed attempts. `bundles` counts the bundles with an outcome.
    """

    stage: StageUse
    failed_slot_s: float
    bundles: int


def parts(
    uses: Sequence[StageUsage], account: Account | None, pools: Mapping[str, PoolFacts], book: PriceBook, *, pace: Pace
) -> tuple[Bill, list[Part]]:
    """Return the bill of a job, and the bill's lines split by stage.

    The cost of compute is split by run time, the cost of wasted work by failed attempts, and the cost of requests by
    bundles. The cost of work that was lost with instances does not belong to a stage.
    """
    stages = [use.stage for use in uses]
    job_bill = bill(stages, account, pools, book, pace=pace)
    parts: list[Part] = []
    by_bundle: dict[str | None, float] = {use.stage.name: float(use.bundles) for use in uses}
    lines: dict[str, _Line] = {name: (kind, None, None, by_bundle) for name, kind in _REQUESTS.items()}
    for pool, facts in pools.items():
        billed = seconds(pool, facts, stages, account)
        pool_uses = [use for use in uses if use.stage.pool == pool]
        lines |= _of_pool(pool, billed, pool_uses, account)
    for item in job_bill.items:
        kind, pool_, seconds_, weights = lines[item.what]
        usd = Decimal(repr(item.usd.typical)).quantize(DIGIT, ROUND_HALF_EVEN)
        for stage, (share, part) in split(usd, weights).items():
            spent_s = None if seconds_ is None else seconds_ * share
            parts.append(Part(item.what, kind, pool_, stage, spent_s, part, item.how))
    return job_bill, parts


def _of_pool(pool: str, billed: Billed, uses: Sequence[StageUsage], account: Account | None) -> dict[str, _Line]:
    useful: dict[str | None, float] = {use.stage.name: use.stage.run_s * use.stage.slots for use in uses}
    wasted: dict[str | None, float] = {use.stage.name: use.failed_slot_s for use in uses}
    if account and (lost_s := account.lost_s.get(pool, 0.0) + account.repeated_s.get(pool, 0.0)):
        wasted[None] = lost_s
    return {
        f"compute, pool {pool}": ("compute", pool, billed.useful_s, useful),
        f"wasted work, pool {pool}": ("wasted", pool, billed.wasted_s, wasted),
        f"idle, pool {pool}": ("idle", pool, billed.idle_s, {}),
    }


def split(usd: Decimal, weights: Mapping[str | None, float]) -> dict[str | None, tuple[float, Decimal]]:
    """Split `usd` in proportion to the weights, and return the relative weight and the amount of each key.

    The amounts add up to `usd`, because the key with the largest weight receives the rounding difference. If all
    weights are 0, the key None receives the whole amount.
    """
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        return {None: (1.0, usd)}
    whole = sum(positive.values())
    shares = {name: weight / whole for name, weight in positive.items()}
    split_costs = {
        name: (share, (usd * Decimal(repr(share))).quantize(DIGIT, ROUND_HALF_EVEN)) for name, share in shares.items()
    }
    heaviest = max(positive, key=lambda name: positive[name])
    share, part = split_costs[heaviest]
    difference = usd - sum((amount for _, amount in split_costs.values()), Decimal(0))
    split_costs[heaviest] = share, part + difference
    return split_costs
