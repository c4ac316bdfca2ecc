"""Bill of a job: the actual or hypothetical cost of the job on AWS, split by purpose.

Invariant: the lines of a bill add up to its total. Every billed instance second counts as exactly one of compute,
wasted work, and idle. Figures of a bill that are calculated and not counted are marked as derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.pricing import request_costs
from batchlab.core.pricing.price_book import (
    AS_IF,
    GB,
    HOURS_A_MONTH,
    MIN_BILLED_S,
    NOTHING,
    WORKER_DISK_GB,
    Item,
    PriceBook,
    Usd,
    range_json,
    total,
)
from batchlab.core.pricing.request_costs import Pace, Requests, TransferredData
from batchlab.core.pricing.usage import Account, Kind

UNUSED = 0.15
"""Assumed idle share of the instance time of a job whose instance time was not counted."""


@dataclass(frozen=True, slots=True)
class StageUse:
    """Useful work of a stage: the run time of tasks that succeeded, and the slots of each task."""

    name: str
    pool: str
    run_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """Slots per instance, instance type, and disk of a pool on AWS."""

    slots: int
    instance_type: str = ""
    disk_gb: float = WORKER_DISK_GB


@dataclass(frozen=True, slots=True)
class Bill:
    """Lines of a bill, notes about the lines, and the source of the prices."""

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    prices: str

    @property
    def usd(self) -> Usd:
        return total(self.items)

    def to_json(self) -> dict[str, object]:
        return {
            "usd": range_json(self.usd),
            "items": [item.to_json() for item in self.items],
            "notes": list(self.notes),
            "prices": self.prices,
        }


@dataclass(frozen=True, slots=True)
class Billed:
    """Billed instance seconds of one pool: the total, the useful part, and the wasted part."""

    all_s: float
    useful_s: float
    wasted_s: float

    @property
    def idle_s(self) -> float:
        return max(0.0, self.all_s - self.useful_s - self.wasted_s)


def bill(
    stages: Sequence[StageUse],
    account: Account | None,
    pools: Mapping[str, PoolFacts],
    book: PriceBook,
    *,
    stored_bytes: int | None = None,
    pace: Pace | None = None,
    moved: TransferredData | None = None,
) -> Bill:
    """Return the bill of one job, at list prices in USD.

    Instance seconds are derived from task times if the job does not have an account, or if the account does not cover
    the whole job. If requests were not counted, as on a backend without S3 and SQS, the number of requests is derived
    from bundles and time. `stored_bytes` is the size of the job's objects in the bucket. `moved` describes the data
    that has left the bucket.
    """
    notes: list[str] = []
    account = account or Account(is_whole=False)
    derived = not account.is_whole
    if derived:
        notes.append(f"not all of its instance time was counted: derived from task times, with {UNUSED:.0%} of it idle")
    used: dict[str, Billed] = {}
    items: list[Item] = []
    for name, facts in pools.items():
        billed = seconds(name, facts, stages, account)
        if not billed.all_s:
            continue
        used[name] = billed
        kinds = {k: s for k, s in account.billed_s.items() if k.pool == name}
        kinds = kinds if kinds and not derived else {Kind(name, facts.instance_type): billed.all_s}
        if any(not kind.type for kind in kinds) and not facts.instance_type:
            notes.append(f"instances of pool {name} count as {AS_IF}")
        items += _lines(name, billed, usd_per_s(kinds, facts, book), _spoken_text(kinds))
    items += _requests(account, used, pace or Pace(), book, notes)
    if stored_bytes is not None:
        month = stored_bytes / GB * book.price("s3", "usd_per_gb_month")
        items.append(Item("S3 storage", Usd.exactly(month), f"{stored_bytes / GB:,.3f} GB for a month"))
    if moved is not None:
        items += _transfer_items(moved, account, book, notes)
    return Bill(tuple(items), tuple(notes), book.source)


def seconds(pool: str, facts: PoolFacts, stages: Sequence[StageUse], account: Account | None) -> Billed:
    """Return the billed seconds of one pool's instances. If some seconds were not counted, the result is derived from
    task times.
    """
    account = account or Account(is_whole=False)
    derived = not account.is_whole
    useful_s = sum(s.run_s * s.slots for s in stages if s.pool == pool) / facts.slots
    wasted_s = (account.failed_s.get(pool, 0.0) + account.lost_s.get(pool, 0.0)) / facts.slots
    all_s = sum(s for kind, s in account.billed_s.items() if kind.pool == pool)
    needed_s = (useful_s + wasted_s) / (1 - UNUSED) if derived else useful_s + wasted_s
    if derived and needed_s:
        needed_s = max(needed_s, MIN_BILLED_S)
    # The work time may exceed the billed time because clocks differ, so return the larger of the work time and the
    # billed time.
    return Billed(max(all_s, needed_s), useful_s, wasted_s)


def usd_per_s(kinds: Mapping[Kind, float], facts: PoolFacts, book: PriceBook) -> Usd:
    """Return the USD per second of an average instance of the pool, including its disk."""
    seconds = sum(kinds.values())
    usd = NOTHING
    for kind, part_s in kinds.items():
        usd += book.rate(kind.type, kind.market, facts.instance_type).times(part_s / seconds)
    disk = book.price("ebs", "gp3_usd_per_gb_month") * facts.disk_gb / HOURS_A_MONTH
    return (usd + Usd.exactly(disk)).times(1 / 3600)


def _spoken_text(kinds: Mapping[Kind, float]) -> str:
    names = [f"{kind.type or AS_IF} {kind.market.value}" for kind in kinds]
    return ", ".join(dict.fromkeys(names))


def _lines(pool: str, billed: Billed, rate: Usd, of: str) -> list[Item]:
    lines = [
        Item(f"compute, pool {pool}", rate.times(billed.useful_s), f"{_hours(billed.useful_s)} {of}"),
        Item(
            f"idle, pool {pool}",
            rate.times(billed.idle_s),
            f"{_hours(billed.idle_s)} boot, waiting, tail, and the billed minimum of 60 s",
        ),
    ]
    if billed.wasted_s:
        how = f"{_hours(billed.wasted_s)} failed attempts, and runs that ended with their instance"
        lines.insert(1, Item(f"wasted work, pool {pool}", rate.times(billed.wasted_s), how))
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3f} h of"


def _requests(
    account: Account, used: Mapping[str, Billed], pace: Pace, book: PriceBook, notes: list[str]
) -> list[Item]:
    counted = account.requests
    if counted:
        return request_costs.items((counted, counted, counted), book, "counted")
    requests = request_costs.of_bundles(account.bundles)
    for billed in used.values():
        each_s = billed.useful_s / max(1, account.bundles)
        requests += request_costs.of_workers(billed.useful_s, each_s, pace)
        requests += request_costs.of_idle_workers(billed.idle_s)
    if requests:
        notes.append("requests are derived from bundles and time, because this backend does not use S3 and SQS")
    return request_costs.items((requests, requests, requests), book, "derived")


def _transfer_items(moved: TransferredData, account: Account, book: PriceBook, notes: list[str]) -> list[Item]:
    items: list[Item] = []
    if moved.fetched_bytes:
        how = "results that were fetched to this machine"
        items.append(request_costs.out_of_aws(moved.fetched_bytes, book, how))
    else:
        notes.append("no results were fetched to this machine, so data out of AWS is not included")
    if item := request_costs.through(moved.egress, account.requests.sqs_bytes, book):
        items.append(item)
    notes += request_costs.not_counted(moved.egress)
    return items


def burn_usd_h(living: Mapping[Kind, int], types: Mapping[str, str], book: PriceBook) -> Usd:
    """Return the cost per hour of the running instances. `living` has the number of instances by kind.

    `types` maps each pool to an instance type for kinds without an instance type.
    """
    usd = NOTHING
    for kind, number in living.items():
        usd += book.rate(kind.type, kind.market, types.get(kind.pool, "")).times(number)
    return usd


def spent_usd(account: Account, types: Mapping[str, str], book: PriceBook) -> Usd:
    """Return the cost of an account so far, for its instances and its counted requests."""
    usd = NOTHING
    for kind, seconds in account.billed_s.items():
        rate = book.rate(kind.type, kind.market, types.get(kind.pool, ""))
        usd += rate.times(seconds / 3600)
    sqs, s3 = request_costs.usd_of(account.requests or Requests(), book)
    return usd + Usd.exactly(sqs + s3)
