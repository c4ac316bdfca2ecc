"""Estimate of a job's cost before the job runs: cost lines with ranges, and the assumptions of the estimate.

Invariant: the functions are pure arithmetic. The estimates of the best, the typical, and the worst case use the same
formulas. An estimate lists every number that it assumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Market
from batchlab.core.pricing import request_costs
from batchlab.core.pricing.price_book import (
    GB,
    HOURS_A_MONTH,
    MIN_BILLED_S,
    WORKER_DISK_GB,
    Item,
    PriceBook,
    Usd,
    range_json,
    total,
)
from batchlab.core.pricing.request_costs import Pace, Requests
from batchlab.core.protocol import settlement

BOOT_S = (30.0, 60.0, 180.0)
"""Seconds from an instance's launch to its first bundle in the best, typical, and worst case, for pools without
`boot_s`.
"""
USED = (1.0, 0.9, 0.7)
"""Share of the slots' time that tasks use while the stage has work, in the best, typical, and worst case."""
REQUESTS = (0.75, 1.0, 1.7)
"""Factors for the measured requests of a bundle in the best, typical, and worst case.

A bundle in the best case has few heartbeats and does not read a plan. A bundle in the worst case also writes a log.
"""
SPOT_WASTE = (0.0, 0.02, 0.10)
"""Share of the work that is lost to Spot interruptions in the best, typical, and worst case."""
MEASURED = (0.8, 1.0, 1.25)
"""Factors by which task times may differ from measured task times, in the best, typical, and worst case."""

Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class StageLoad:
    """Work of a stage: the number of tasks and the seconds of each task, in the best, typical, and worst case."""

    name: str
    tasks: Three
    seconds: Three
    slots: int = 1
    bundle: int | None = None
    pool: str = "default"
    chained: str = ""
    """Name of the upstream stage whose results the stage processes item by item, or ""."""
    reads_raw: bool = False
    """Whether each task reads its part of the input from the bucket."""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Configuration of a pool on AWS.

    `spot_share` is the share of Spot Instances in the pool, 0 to 1. `disk_gb` is the size of each instance's gp3 disk.
    """

    name: str
    instance_type: str
    slots: int
    min_size: int = 0
    max_size: int = 2
    boot_s: float = 0.0
    spot_share: float = 0.0
    disk_gb: float = WORKER_DISK_GB
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings of the grid that determine the number of instances and their lifetime."""

    drain_target_s: float = 300.0
    idle_s: float = 60.0
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate for a job: cost lines, duration in seconds, number of instances by pool, and assumptions.

    As in a bill, `further` are costs that are not a part of the job's cost: storage and data transfer.
    """

    items: tuple[Item, ...]
    span_s: Three
    instances: Mapping[str, int]
    bundles: int
    assumed: tuple[str, ...]
    prices: str
    further: tuple[Item, ...] = ()

    @property
    def usd(self) -> Usd:
        """Cost of the job, with the same parts as the sum of a bill."""
        return total(self.items)

    def to_json(self) -> dict[str, object]:
        return {
            "usd": range_json(self.usd),
            "items": [item.to_json() for item in self.items],
            "further": [item.to_json() for item in self.further],
            "span_s": dict(zip(("low", "typical", "high"), self.span_s, strict=True)),
            "instances": dict(self.instances),
            "bundles": self.bundles,
            "assumed": list(self.assumed),
            "prices": self.prices,
        }


def bundles_of(tasks: int, slots: int, mean_s: float, fixed: int | None) -> int:
    """Return the number of bundles of a stage with `tasks` tasks (see `protocol.settlement.bundle_size`)."""
    if tasks <= 0:
        return 0
    first = [] if fixed is not None else settlement.wave(tasks, slots, None, None, tasks)
    remaining, bundles = tasks - sum(first), len(first)
    # While a stage has many remaining tasks, the bundle size depends on the task time alone. Only the last bundles
    # shrink.
    largest = settlement.bundle_size(10**12, slots, mean_s, fixed)
    bulk = max(0, (remaining - largest * slots * settlement.SHARES) // largest)
    remaining, bundles = remaining - bulk * largest, bundles + bulk
    return bundles + len(settlement.wave(remaining, slots, mean_s, fixed, remaining))


def loads(
    stages: Sequence[StageDef], root_tasks: int, seconds: Mapping[str, Three], task_counts: Mapping[str, int]
) -> tuple[list[StageLoad], list[str]]:
    """Return the work of each stage, and the assumptions of the estimate.

    A root stage has `root_tasks` tasks, a chained stage has as many tasks as its upstream stage, and a gather of all
    results has one task. `task_counts` maps stages to numbers of tasks that take precedence. Raise UsageError if the
    task time of a stage is unknown.
    """
    stage_loads: dict[str, StageLoad] = {}
    assumed: list[str] = []
    for stage in stages:
        if stage.name not in seconds:
            raise UsageError(
                f"The time of a task is unknown for stage {stage.name}.",
                remedy=f"Set it with --seconds {stage.name}=2.5, or run the job once.",
            )
        upstream = stage_loads[stage.after[0]].tasks if stage.after else None
        if stage.name in task_counts:
            tasks: Three = (float(task_counts[stage.name]),) * 3
        elif upstream is None:
            tasks = (float(root_tasks),) * 3
        elif stage.gather is None:
            tasks = upstream
        elif stage.gather == "*":
            tasks = (1.0, 1.0, 1.0)
        else:
            tasks = (1.0, math.sqrt(upstream[1]), upstream[2])
            assumed.append(
                f"stage {stage.name} gathers by {stage.gather}: 1 to {upstream[2]:,.0f} tasks, "
                f"unless --tasks {stage.name}=N sets the number"
            )
        stage_loads[stage.name] = StageLoad(
            stage.name,
            tasks,
            seconds[stage.name],
            stage.slots,
            stage.bundle,
            stage.pool,
            stage.after[0] if stage.chained else "",
            reads_raw=not stage.after,
            gpus=stage.gpus,
        )
    return list(stage_loads.values()), assumed


def estimate(
    stages: Sequence[StageLoad],
    pools: Sequence[PoolPlan],
    prices: PriceBook,
    policy: Policy | None = None,
    *,
    input_files: int = 0,
    input_bytes: int = 0,
    result_bytes: int | None = None,
    assumed: Sequence[str] = (),
) -> Estimate:
    """Return the estimated cost of the stages on the pools, in USD at list prices.

    `result_bytes` is the size of the results that are fetched, or None if the size is unknown. Raise UsageError for an
    instance type without a price.
    """
    policy = policy or Policy()
    by_name = {pool.name: pool for pool in pools}
    for stage in stages:
        if stage.pool not in by_name:
            raise UsageError(
                f"Stage {stage.name} runs in pool {stage.pool!r}, and this pool is not described.",
                remedy=f"Describe it with --pool {stage.pool}:0-4x2.",
            )
    used = [pool for pool in pools if any(stage.pool == pool.name for stage in stages)]
    cases = [_Case(which, stages, used, policy, input_files) for which in range(3)]
    items: list[Item] = []
    for pool in used:
        items += _compute(pool, cases, prices)
    requestses = [case.requests() for case in cases]
    items += request_costs.items(requestses, prices, "from measured counts")
    further: list[Item] = []
    if input_bytes:
        month = input_bytes / GB * prices.price("s3", "usd_per_gb_month")
        how = f"{input_bytes / GB:,.2f} GB of input for a month"
        further.append(Item("S3 storage", Usd.exactly(month), how))
    if result_bytes is not None:
        further.append(request_costs.out_of_aws(result_bytes, prices, "results, fetched once"))
    typical = cases[1]
    return Estimate(
        tuple(items),
        (cases[0].span_s, typical.span_s, cases[2].span_s),
        {pool.name: typical.instances[pool.name] for pool in used},
        round(sum(typical.bundles.values())),
        (*assumed, *_assumptions(used, prices, knows_results=result_bytes is not None)),
        prices.source,
        tuple(further),
    )


class _Case:
    """The best, the typical, or the worst case of an estimate, with `which` set to 0, 1, or 2."""

    def __init__(
        self, which: int, stages: Sequence[StageLoad], pools: Sequence[PoolPlan], policy: Policy, input_files: int
    ) -> None:
        self.which = which
        self._stages = stages
        self._policy = policy
        self._input_files = input_files
        self.instances: dict[str, int] = {}
        self.busy_s: dict[str, float] = {}
        """Seconds for which instances run tasks, by pool, including lost work."""
        self.wasted_s: dict[str, float] = {}
        self.idle_s: dict[str, float] = {}
        """Billed seconds for which instances do not run tasks: the boot, the idle end, and the rest of the minimum
        time.
        """
        self.bundles: dict[str, float] = {}
        self.span_s = 0.0
        self._slots: dict[str, int] = {}
        for pool in pools:
            self._size(pool)
        for stage in stages:
            slots = self._slots[stage.pool]
            cut = bundles_of(round(stage.tasks[which]), slots, stage.seconds[which], stage.bundle)
            self.bundles[stage.name] = max(cut, self.bundles.get(stage.chained, 0.0))

    def _size(self, pool: PoolPlan) -> None:
        which, policy = self.which, self._policy
        stage_loads = [stage for stage in self._stages if stage.pool == pool.name]
        gpus = max(1, pool.gpus)
        instance_s = max(
            sum(s.tasks[which] * s.seconds[which] * s.slots for s in stage_loads) / pool.slots,
            sum(s.tasks[which] * s.seconds[which] * s.gpus for s in stage_loads) / gpus,
        )
        # The autoscaler calculates the number of instances with the same formula.
        needed = math.ceil(instance_s / policy.drain_target_s)
        useful = math.ceil(
            max((s.tasks[which] * max(s.slots / pool.slots, s.gpus / gpus) for s in stage_loads), default=0)
        )
        count = max(pool.min_size, min(pool.max_size, max(1, min(needed, useful))))
        wasted = SPOT_WASTE[which] * pool.spot_share
        run_s = instance_s * (1 + wasted)
        busy_s = run_s / USED[which]
        boot_s = pool.boot_s or BOOT_S[which]
        each_s = max(MIN_BILLED_S, busy_s / count + boot_s + policy.idle_s)
        self.instances[pool.name] = count
        self.busy_s[pool.name] = instance_s
        self.wasted_s[pool.name] = instance_s * wasted
        self.idle_s[pool.name] = count * each_s - run_s
        self.span_s += boot_s + busy_s / count
        self._slots[pool.name] = count * pool.slots

    def requests(self) -> Requests:
        """Return the numbers of requests to SQS and S3 in the best, typical, or worst case."""
        requests = request_costs.of_bundles(sum(self.bundles.values())).times(REQUESTS[self.which])
        pace = self._policy.pace
        for stage in self._stages:
            slots = max(1, self._slots[stage.pool])
            worked_s = stage.tasks[self.which] * stage.seconds[self.which] * stage.slots
            # A worker sends one poll for all of its slots.
            per_worker = slots / self.instances[stage.pool]
            bundle_s = worked_s / max(1.0, self.bundles[stage.name])
            requests += request_costs.of_workers(worked_s / per_worker, bundle_s, pace)
            if stage.reads_raw:
                requests += Requests(s3_gets=stage.tasks[self.which])
        for idle_s in self.idle_s.values():
            requests += request_costs.of_idle_workers(idle_s)
        requests += request_costs.of_manager(self.span_s, len(self.instances), pace)
        return requests + Requests(s3_puts=self._input_files + 2, s3_gets=self._input_files)


def _compute(pool: PoolPlan, cases: Sequence[_Case], prices: PriceBook) -> list[Item]:
    """Return the lines of the estimate for a pool's instances."""
    on_demand = prices.instance_usd_h(pool.instance_type)
    spot = prices.instance_usd_h(pool.instance_type, Market.SPOT)
    disk = prices.price("ebs", "gp3_usd_per_gb_month") * pool.disk_gb / HOURS_A_MONTH
    rate = on_demand.times(1 - pool.spot_share) + spot.times(pool.spot_share)
    rates = (rate.low + disk, rate.typical + disk, rate.high + disk)

    def usd(seconds: Sequence[float]) -> Usd:
        return Usd(*(s / 3600 * rate for s, rate in zip(seconds, rates, strict=True)))

    typical = cases[1]
    share = f", {pool.spot_share:.0%} Spot" if pool.spot_share else ""
    what = f"{typical.instances[pool.name]} × {pool.instance_type}{share}"
    busy = [case.busy_s[pool.name] for case in cases]
    idle = [case.idle_s[pool.name] for case in cases]
    wasted = [case.wasted_s[pool.name] for case in cases]
    items = [
        Item(f"compute, pool {pool.name}", usd(busy), f"{busy[1] / 3600:,.2f} h of {what}"),
        Item(
            f"idle, pool {pool.name}",
            usd(idle),
            f"{idle[1] / 3600:,.2f} h of boot, waiting, tail, and the billed minimum of 60 s",
        ),
    ]
    if pool.spot_share:
        how = f"{wasted[1] / 3600:,.2f} h lost to Spot interruptions"
        items.append(Item(f"wasted work, pool {pool.name}", usd(wasted), how))
    return items


def _assumptions(pools: Sequence[PoolPlan], prices: PriceBook, *, knows_results: bool) -> list[str]:
    sentences = [prices.mismatch] if prices.mismatch else []
    sentences += [f"slots are busy {USED[2]:.0%} to {USED[0]:.0%} of the time while there is work"]
    if any(not pool.boot_s for pool in pools):
        sentences.append(f"an instance boots in {BOOT_S[0]:g} to {BOOT_S[2]:g} s")
    if any(pool.spot_share for pool in pools):
        sentences.append(f"Spot interruptions waste up to {SPOT_WASTE[2]:.0%} of the work")
    sentences.append("requests of the tasks themselves to S3 are not included")
    if not knows_results:
        sentences.append(
            f"the download of results is not included ({request_costs.rates(prices, '')}), "
            "because their size is unknown without --results"
        )
    sentences.append(
        "data through the stack's NAT gateway or VPC endpoints is not included, because its size is "
        "unknown before the run, and `batchlab cost bill` shows it afterwards"
    )
    sentences.append("the stack's own cost per hour is not included, `batchlab deploy plan` shows it")
    return sentences
