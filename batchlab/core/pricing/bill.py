"""Bill of a job: the actual or hypothetical cost of the job on AWS, split by purpose.

The cost of a job is the cost of the instances with their disks and of the requests that the job used while it ran. The
cost of data that is stored or transferred after the run depends on its user, so it is not a part of the job's cost. The
web page, the bill, reports, replays, and forecasts use this definition.

Invariant: the lines of a bill add up to its total, exactly to 12 decimal places. Every billed instance second counts as
exactly one of compute, wasted work, and idle. Figures of a bill that are calculated and not counted are marked as
derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batchlab.core.pricing import request_costs
from batchlab.core.pricing.price_book import (
    AS_IF,
    DIGITS,
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

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView
    from batchlab.core.api_usage_types import JobUseView

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
    """Lines of a bill, notes about the lines, and the source of the prices.

    `further` are costs that are not a part of the job's cost: a month of storage, and the transfer of data.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    prices: str
    further: tuple[Item, ...] = ()

    @property
    def usd(self) -> Usd:
        """Cost of the job."""
        return _rounded(total(self.items))

    def to_json(self) -> dict[str, object]:
        return {
            "usd": range_json(self.usd),
            "items": [item.to_json() for item in self.items],
            "further": [item.to_json() for item in self.further],
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
    notes = [book.mismatch] if book.mismatch else []
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
    further: list[Item] = []
    if stored_bytes is not None:
        month = stored_bytes / GB * book.price("s3", "usd_per_gb_month")
        further.append(Item("S3 storage", Usd.exactly(month), f"{stored_bytes / GB:,.3f} GB for a month"))
    if moved is not None:
        further += _transfer_items(moved, account, book, notes)
    lines = tuple([replace(item, usd=_rounded(item.usd)) for item in items])
    return Bill(lines, tuple(notes), book.source, tuple(further))


def job_bill(
    job: JobView,
    use: JobUseView,
    book: PriceBook,
    *,
    types: Mapping[str, str] | None = None,
    stored_bytes: int | None = None,
    pace: Pace | None = None,
    moved: TransferredData | None = None,
) -> Bill:
    """Return the bill of a job from the manager's views of the job and of its usage.

    `types` has instance types by pool, which replace the recorded instance types.
    """
    from batchlab.core.api_usage_types import account_of

    types = types or {}
    pools = {
        name: PoolFacts(slots, types.get(name) or use["types"].get(name, "")) for name, slots in use["pools"].items()
    }
    stages = [StageUse(s["name"], s["pool"], s["run_s"], use["slots"].get(s["name"], 1)) for s in job["stages"]]
    account = _retype(account_of(use["account"]), types) if use["account"] else None
    return bill(stages, account, pools, book, stored_bytes=stored_bytes, pace=pace, moved=moved)


def _retype(account: Account, types: Mapping[str, str]) -> Account:
    billed: dict[Kind, float] = {}
    for kind, seconds in account.billed_s.items():
        named = replace(kind, type=types.get(kind.pool) or kind.type)
        billed[named] = billed.get(named, 0.0) + seconds
    return replace(account, billed_s=billed)


def _rounded(usd: Usd) -> Usd:
    return Usd(round(usd.low, DIGITS), round(usd.typical, DIGITS), round(usd.high, DIGITS))


def seconds(pool: str, facts: PoolFacts, stages: Sequence[StageUse], account: Account | None) -> Billed:
    """Return the billed seconds of one pool's instances. If some seconds were not counted, the result is derived from
    task times.
    """
    account = account or Account(is_whole=False)
    derived = not account.is_whole
    # Run times are measured in microseconds. Sums of the same run times in another order differ after the 6th digit.
    useful_s = round(sum(s.run_s * s.slots for s in stages if s.pool == pool), 6) / facts.slots
    wasted = (account.failed_s, account.lost_s, account.repeated_s)
    wasted_s = sum(by_pool.get(pool, 0.0) for by_pool in wasted) / facts.slots
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
    return (usd + _disk_usd_h(book, facts.disk_gb)).times(1 / 3600)


def _disk_usd_h(book: PriceBook, size_gb: float = WORKER_DISK_GB) -> Usd:
    return Usd.exactly(book.price("ebs", "gp3_usd_per_gb_month") * size_gb / HOURS_A_MONTH)


def _spoken_text(kinds: Mapping[Kind, float]) -> str:
    names = [f"{kind.type or AS_IF} {kind.market.value}" for kind in kinds]
    return ", ".join(dict.fromkeys(names))


def _lines(pool: str, billed: Billed, rate: Usd, of: str) -> list[Item]:
    # The three lines add up to the rounded cost of all seconds, however the seconds are split.
    idle, wasted = _rounded(rate.times(billed.idle_s)), _rounded(rate.times(billed.wasted_s))
    rest = _rounded(rate.times(billed.all_s)) + (idle + wasted).times(-1)
    compute = Usd(max(rest.low, 0.0), max(rest.typical, 0.0), max(rest.high, 0.0))
    lines = [
        Item(f"compute, pool {pool}", compute, f"{_hours(billed.useful_s)} {of}"),
        Item(
            f"idle, pool {pool}", idle, f"{_hours(billed.idle_s)} boot, waiting, tail, and the billed minimum of 60 s"
        ),
    ]
    if billed.wasted_s:
        how = f"{_hours(billed.wasted_s)} failed attempts, and runs that ended with their instance"
        lines.insert(1, Item(f"wasted work, pool {pool}", wasted, how))
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
    """Return the cost per hour of the running instances with their disks. `living` has the number of instances by kind.

    `types` maps each pool to an instance type for kinds without an instance type.
    """
    usd = NOTHING
    for kind, number in living.items():
        usd += _instance_usd_h(kind, types, book).times(number)
    return usd


def _instance_usd_h(kind: Kind, types: Mapping[str, str], book: PriceBook) -> Usd:
    return book.rate(kind.type, kind.market, types.get(kind.pool, "")) + _disk_usd_h(book)


def spent_usd(account: Account, types: Mapping[str, str], book: PriceBook) -> Usd:
    """Return the cost of a grid's account so far, for its instances with their disks and its counted requests."""
    usd = NOTHING
    for kind, seconds in account.billed_s.items():
        usd += _instance_usd_h(kind, types, book).times(seconds / 3600)
    sqs, s3 = request_costs.usd_of(account.requests or Requests(), book)
    return usd + Usd.exactly(sqs + s3)
