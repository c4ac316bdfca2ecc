"""Figures of a run on which the checks in `checks.py` are based.

Invariant: the figures are not estimates. A figure that the data does not contain is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from batchlab.core.task_sizes import LONG_ON_SPOT_S, TINY_S, TOO_LONG_S
from batchlab.reports.html.costs import ZERO, Cost
from batchlab.reports.html.load import BINS, Series
from batchlab.reports.html.source import LEVELS, PLACED, PLACES, ReportRun

MAX_ALONE_SHARE, MIN_CROWDED_SHARE = 0.25, 0.75
"""Two busy shares of the other slots of a bundle's instance: the maximum for a bundle that ran alone, and the minimum
for a bundle on a busy instance.
"""
MIN_COMPARED_BUNDLES = 10
"""Minimum number of bundles that ran alone, and of bundles on busy instances, for a comparison of their task times."""


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Figures of one stage.

    Counts include only tasks with a recorded run time. `overhead_s` is the part of the bundles' slot time during which
    no task ran. `alone_s` is the mean time of a task while the other slots of its instance were idle. `crowded_s` is
    the mean time of a task while the other slots of its instance were busy.
    """

    name: str
    pool: str
    tasks: int
    median_s: float
    longest_s: float
    tiny: int
    too_long: int
    long_on_spot: int
    longest_on_spot_s: float
    bundles: int
    took_s: float
    overhead_s: float
    alone_s: float | None = None
    crowded_s: float | None = None

    @property
    def per_bundle(self) -> float:
        return self.tasks / self.bundles if self.bundles else 0.0


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Figures of a whole run.

    `slot_s` is the slot time in service, and `busy_s` is the part that the job's bundles used. `starved_s` is the slot
    time that was idle while tasks were ready. `full_s` is the time during which at least 90% of the slots were busy
    while tasks were ready. `tail_s` is the time at the end during which less than half of the peak number of slots were
    busy. `filled` is the busy share of an instance's slots while at least one of the slots was busy. If instances were
    not recorded, the figures count workers, and `noun` is "worker". `share` is the share that the job names, or "".
    """

    span_s: float
    stages: tuple[StageFigures, ...]
    slot_s: float
    busy_s: float
    starved_s: float
    full_s: float
    tail_s: float
    peak_slots: float
    filled: float | None
    slots_each: int
    instances: int
    noun: str
    unused: int
    boots: int
    boot_s: float | None
    longest_boot_s: float | None
    first_wait_s: float | None
    failed_s: float
    lost_s: float
    repeated_s: float
    harmful: int
    copies: int = 0
    copies_won: int = 0
    share: str = ""
    compute: Decimal = ZERO
    idle: Decimal = ZERO
    requests: Decimal = ZERO
    total: Decimal = ZERO

    @property
    def pool(self) -> str:
        """Pool of the stage with the most work, or "" if the run does not have stages."""
        largest = max(self.stages, key=lambda stage: stage.took_s, default=None)
        return largest.pool if largest else ""

    @property
    def wasted_s(self) -> float:
        return self.failed_s + self.lost_s + self.repeated_s


def run_figures(run: ReportRun, series: Series, cost: Cost | None) -> RunFigures:
    """Compute the figures on which the checks are based."""
    bin_s = run.span_s / BINS
    running, slots = series.in_flight, series.slots
    loads = list(zip(running, slots, series.waiting, strict=True))
    full = sum(busy >= 0.9 * slots and waiting >= 1 for busy, slots, waiting in loads if slots)
    starved = sum(min(waiting, max(0.0, slots - busy)) for busy, slots, waiting in loads)
    busy_bins = [k for k, level in enumerate(running) if level > 0]
    half = max((k for k, level in enumerate(running) if level >= max(running) / 2), default=0)
    costs: dict[str, Any] = {}
    if cost:
        kinds = {kind: cost.of(kind) for kind in ("compute", "idle", "sqs", "s3")}
        costs = {"requests": kinds.pop("sqs") + kinds.pop("s3"), "total": cost.total, **kinds}
    return RunFigures(
        span_s=run.span_s,
        stages=tuple(StageFigures(**row) for row in run.rows(_STAGES)),
        slot_s=sum(slots) * bin_s,
        busy_s=sum(running) * bin_s,
        starved_s=starved * bin_s,
        full_s=full * bin_s,
        tail_s=(busy_bins[-1] - half) * bin_s if busy_bins else 0.0,
        peak_slots=max(slots),
        failed_s=float(run.job["failed_run_s"] or 0.0),
        lost_s=float(run.job["lost_slot_s"] or 0.0),
        share=run.share,
        **run.one(_INSTANCES),
        **run.one(_BUNDLES),
        **run.one(_FILLED),
        **costs,
    )


_BUNDLES = """
SELECT (SELECT greatest(0, min(started_s) - min(ready_s)) FROM bundles
        WHERE job = $job AND started_s IS NOT NULL) AS first_wait_s,
       coalesce(sum(wasted_slot_s), 0.0) AS repeated_s, coalesce(sum(harmful), 0)::BIGINT AS harmful,
       coalesce(sum(seen) FILTER (kind IN ('copy', 'original')), 0)::BIGINT AS copies,
       coalesce(sum(seen) FILTER (kind = 'original'), 0)::BIGINT AS copies_won
FROM duplicates WHERE job = $job"""

_INSTANCES = f"""
SELECT count(*) AS instances, count(*) FILTER (NOT used AND begin_s < $b) AS unused,
       CASE WHEN bool_or(is_known) THEN 'instance' ELSE 'worker' END AS noun,
       count(boot_s) AS boots, median(boot_s) AS boot_s, max(boot_s) AS longest_boot_s
FROM (
  SELECT used, begin_s, is_known,
         CASE WHEN launched_s >= $a THEN in_service_s - launched_s END AS boot_s
  FROM {PLACES}
)"""

_FILLED = f"""
WITH {LEVELS}
SELECT sum(level * lasts_s) / nullif(sum(places.slots * lasts_s) FILTER (level > 0), 0) AS filled,
       coalesce(nullif(median(places.slots)::INTEGER, 0), 1) AS slots_each
FROM levels JOIN {PLACES} places USING (place)
WHERE places.slots > 1"""

_STAGES = f"""
WITH {LEVELS}, areas AS (
  SELECT place, t, sum(level * lasts_s) OVER (PARTITION BY place ORDER BY t)
                   - level * lasts_s AS area_s
  FROM levels
), beside AS (
  SELECT b.stage, b.run_s, b.succeeded,
         ((e.area_s - s.area_s) / (b.ended_s - b.started_s) - b.slots)
           / (places.slots - b.slots) AS crowd
  FROM {PLACED} b
  JOIN {PLACES} places USING (place)
  JOIN areas s ON s.place = b.place AND s.t = b.started_s
  JOIN areas e ON e.place = b.place AND e.t = b.ended_s
  WHERE b.ended_s > b.started_s AND b.succeeded > 0 AND places.slots > b.slots
), compared AS (
  SELECT stage, least(count(*) FILTER (crowd <= {MAX_ALONE_SHARE}),
                      count(*) FILTER (crowd >= {MIN_CROWDED_SHARE})) AS compared_bundles,
         sum(run_s) FILTER (crowd <= {MAX_ALONE_SHARE})
           / sum(succeeded) FILTER (crowd <= {MAX_ALONE_SHARE}) AS alone_s,
         sum(run_s) FILTER (crowd >= {MIN_CROWDED_SHARE})
           / sum(succeeded) FILTER (crowd >= {MIN_CROWDED_SHARE}) AS crowded_s
  FROM beside GROUP BY stage
), ran AS (
  SELECT t.stage, count(*) AS tasks, median(t.run_s) AS median_s, max(t.run_s) AS longest_s,
         count(*) FILTER (t.run_s < {TINY_S}) AS tiny,
         count(*) FILTER (t.run_s > {TOO_LONG_S}) AS too_long,
         count(*) FILTER (t.run_s > {LONG_ON_SPOT_S} AND i.market = 'spot') AS long_on_spot,
         coalesce(max(t.run_s) FILTER (i.market = 'spot'), 0.0) AS longest_on_spot_s
  FROM tasks t
  LEFT JOIN workers w ON w.job = t.job AND w.worker = t.worker
  LEFT JOIN instances i ON i.job = t.job AND i.instance = w.instance
  WHERE t.job = $job AND t.run_s IS NOT NULL GROUP BY t.stage
), did AS (
  SELECT stage, count(*) AS bundles, sum(took_s) AS took_s,
         sum(greatest(0, took_s - coalesce(run_s, 0) - coalesce(failed_run_s, 0))) AS overhead_s
  FROM bundles WHERE job = $job AND took_s IS NOT NULL GROUP BY stage
)
SELECT s.stage AS name, coalesce(s.pool, '') AS pool, ran.* EXCLUDE (stage),
       coalesce(did.bundles, 0) AS bundles, coalesce(did.took_s, 0.0) AS took_s,
       coalesce(did.overhead_s, 0.0) AS overhead_s,
       CASE WHEN compared_bundles >= {MIN_COMPARED_BUNDLES} THEN alone_s END AS alone_s,
       CASE WHEN compared_bundles >= {MIN_COMPARED_BUNDLES} THEN crowded_s END AS crowded_s
FROM (SELECT * FROM stages WHERE job = $job) s JOIN ran USING (stage)
LEFT JOIN did USING (stage) LEFT JOIN compared USING (stage)
ORDER BY s.position, s.stage"""
