"""A job's bill split by stage.

Invariant: the rows of a line add up to that line, and all rows to the bill, to the last of twelve
digits; what no stage can be asked for is no stage's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from batchlab.core.pricing.bill import Bill, Billed, PoolFacts, StageUse, bill, seconds
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage_meter import Account

DIGIT = Decimal("0.000000000001")

_REQUESTS = {"SQS requests": "sqs", "S3 requests": "s3"}


@dataclass(frozen=True, slots=True)
class Part:
    """A row: a line of the bill, or a stage's part of one. `seconds` are of instances."""

    line: str
    kind: str
    pool: str | None
    stage: str | None
    seconds: float | None
    cost_usd: Decimal
    how: str


@dataclass(frozen=True, slots=True)
class Use:
    """What a stage has used: `failed_slot_s` of attempts that failed, `bundles` with an outcome."""

    stage: StageUse
    failed_slot_s: float
    bundles: int


def parts(
    uses: Sequence[Use],
    account: Account | None,
    pools: Mapping[str, PoolFacts],
    book: PriceBook,
    *,
    stored_bytes: int,
    pace: Pace,
) -> tuple[Bill, list[Part]]:
    """The bill, and its lines by stage: compute by run time, wasted work by failed attempts (what
    went with an instance is no stage's), requests by bundles."""
    stages = [use.stage for use in uses]
    made = bill(stages, account, pools, book, stored_bytes=stored_bytes, pace=pace)
    found: list[Part] = []
    by_bundle: dict[str | None, float] = {use.stage.name: float(use.bundles) for use in uses}
    lines: dict[str, tuple[str, str | None, float | None, Mapping[str | None, float]]] = {
        name: (kind, None, None, by_bundle) for name, kind in _REQUESTS.items()
    }
    for pool, facts in pools.items():
        billed = seconds(pool, facts, stages, account)
        mine = [use for use in uses if use.stage.pool == pool]
        lines |= _of_pool(pool, billed, mine, account)
    for item in made.items:
        nobody: tuple[str, str | None, float | None, Mapping[str | None, float]]
        nobody = ("storage", None, None, {})
        kind, pool_, seconds_, weights = lines.get(item.what, nobody)
        usd = Decimal(repr(item.usd.typical)).quantize(DIGIT, ROUND_HALF_EVEN)
        for stage, (share, part) in split(usd, weights).items():
            spent_s = None if seconds_ is None else seconds_ * share
            found.append(Part(item.what, kind, pool_, stage, spent_s, part, item.how))
    return made, found


def _of_pool(
    pool: str, billed: Billed, uses: Sequence[Use], account: Account | None
) -> dict[str, tuple[str, str | None, float | None, Mapping[str | None, float]]]:
    useful: dict[str | None, float] = {
        use.stage.name: use.stage.run_s * use.stage.slots for use in uses
    }
    wasted: dict[str | None, float] = {use.stage.name: use.failed_slot_s for use in uses}
    if account and (lost_s := account.lost_s.get(pool)):
        wasted[None] = lost_s
    return {
        f"compute, pool {pool}": ("compute", pool, billed.useful_s, useful),
        f"wasted work, pool {pool}": ("wasted", pool, billed.wasted_s, wasted),
        f"idle, pool {pool}": ("idle", pool, billed.idle_s, {}),
    }


def split(
    usd: Decimal, weights: Mapping[str | None, float]
) -> dict[str | None, tuple[float, Decimal]]:
    """Shares of 1 and of an amount, by these weights; nobody's (None) where there are none. The
    amounts add up to `usd`: the heaviest takes what rounding leaves."""
    some = {name: weight for name, weight in weights.items() if weight > 0}
    if not some:
        return {None: (1.0, usd)}
    whole = sum(some.values())
    shares = {name: weight / whole for name, weight in some.items()}
    found = {
        name: (share, (usd * Decimal(repr(share))).quantize(DIGIT, ROUND_HALF_EVEN))
        for name, share in shares.items()
    }
    heaviest = max(some, key=lambda name: some[name])
    share, part = found[heaviest]
    left = usd - sum((amount for _, amount in found.values()), Decimal(0))
    found[heaviest] = share, part + left
    return found
