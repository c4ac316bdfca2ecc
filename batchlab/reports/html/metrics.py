"""Figures of a run on which the checks are based.

Invariant: no figure is estimated. A figure that the data does not contain is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from batchlab.reports.html.costs import ZERO, Cost
from batchlab.reports.html.load import BINS, Series
from batchlab.reports.html.source import LEVELS, PLACED, PLACES, Row, Run

TINY_S = 0.1
LONG_ON_SPOT_S = 600.0
TOO_LONG_S = 11 * 3600.0
ALONE, CROWDED = 0.25, 0.75
"""Limits for the busy share of the instance's other slots during a bundle.

Up to the first limit the bundle ran alone, and from the second limit it ran on a busy instance.
"""
LEAST_BUNDLES = 10
"""Minimum number of bundles on each side of the comparison."""


@dataclass(frozen=True, slots=True)
class StageSigns:
    """Figures of one stage.

    Counts include the tasks with a run time. `overhead_s` is the part of the bundles' slot time
    during which no task ran. `alone_s` is the mean time of a task while the other slots of its
    instance were idle. `crowded_s` is the mean time of a task while these slots were busy.
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
class Signs:
    """Figures of the run.

    `slot_s` is the slot time in service, and `busy_s` is the part that the job's bundles used. `starved_s` is the slot
    time that was idle while tasks were ready. `full_s` is the time during which at least 90% of the slots were busy
    while tasks were ready. `tail_s` is the time at the end during which less than half of the peak number of slots were
    busy. `filled` is the busy share of an instance's slots while at least one of them was busy. If no instance is
    recorded, the counts are of workers, and `noun` is "worker".
    """

    span_s: float
    stages: tuple[StageSigns, ...]
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
    compute: Decimal = ZERO
    idle: Decimal = ZERO
    requests: Decimal = ZERO
    total: Decimal = ZERO

    @property
    def pool(self) -> str:
        """Pool with the most work, or "" if nothing ran."""
        most = max(self.stages, key=lambda one: one.took_s, default=None)
        return most.pool if most else ""

    @property
    def wasted_s(self) -> float:
        return self.failed_s + self.lost_s + self.repeated_s


def signs(run: Run, found: Series, cost: Cost | None) -> Signs:
    """Return the figures of a run."""
    part_s = run.span_s / BINS
    running, slots = found.in_flight, found.slots
    filled = run.one(_FILLED)
    fleet = run.one(_INSTANCES)
    waste = run.one(_WASTE)
    full = sum(r >= 0.9 * s and waits >= 1 for r, s, waits in zip(running, slots, found.waiting, strict=True) if s)
    starved = [min(waits, max(0.0, s - r)) for r, s, waits in zip(running, slots, found.waiting, strict=True)]
    return Signs(
        span_s=run.span_s,
        stages=_stages(run),
        slot_s=sum(slots) * part_s,
        busy_s=sum(running) * part_s,
        starved_s=sum(starved) * part_s,
        full_s=full * part_s,
        tail_s=_tail_s(running, part_s),
        peak_slots=max(slots),
        filled=filled["filled"],
        slots_each=int(filled["slots"] or 1),
        instances=fleet["instances"],
        noun="worker" if fleet["unknown"] == fleet["instances"] else "instance",
        unused=fleet["unused"],
        boots=fleet["boots"],
        boot_s=fleet["boot_s"],
        longest_boot_s=fleet["longest_boot_s"],
        first_wait_s=run.one(_FIRST)["wait_s"],
        failed_s=float(run.job["failed_run_s"] or 0.0),
        lost_s=float(run.job["lost_slot_s"] or 0.0),
        repeated_s=float(waste["repeated_s"] or 0.0),
        harmful=int(waste["harmful"] or 0),
        compute=cost.of("compute") if cost else ZERO,
        idle=cost.of("idle") if cost else ZERO,
        requests=cost.of("sqs") + cost.of("s3") if cost else ZERO,
        total=cost.total if cost else ZERO,
    )


def _tail_s(running: list[float], part_s: float) -> float:
    """Return the time from the last interval with at least half of the peak load to the last busy one."""
    busy = [k for k, level in enumerate(running) if level > 0]
    if not busy:
        return 0.0
    half = max(k for k, level in enumerate(running) if level >= max(running) / 2)
    return (busy[-1] - half) * part_s


_FIRST = """
SELECT greatest(0, min(started_s) - min(ready_s)) AS wait_s FROM bundles
WHERE job = $job AND started_s IS NOT NULL"""

_WASTE = """
SELECT sum(wasted_slot_s) AS repeated_s, sum(harmful) AS harmful FROM duplicates
WHERE job = $job"""

_INSTANCES = f"""
SELECT count(*) AS instances, count(*) FILTER (NOT is_known) AS unknown,
       count(*) FILTER (NOT used AND begin_s < $b) AS unused,
       count(boot_s) AS boots, median(boot_s) AS boot_s, max(boot_s) AS longest_boot_s
FROM (
  SELECT used, begin_s, is_known,
         CASE WHEN launched_s >= $a THEN in_service_s - launched_s END AS boot_s
  FROM {PLACES}
)"""

_FILLED = f"""
WITH {LEVELS}
SELECT sum(level * lasts_s) / nullif(sum(places.slots * lasts_s) FILTER (level > 0), 0) AS filled,
       median(places.slots) AS slots
FROM levels JOIN {PLACES} places USING (place)
WHERE places.slots > 1"""

_BESIDE = f"""
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
)
SELECT stage,
       count(*) FILTER (crowd <= {ALONE}) AS n_alone,
       count(*) FILTER (crowd >= {CROWDED}) AS n_crowded,
       sum(run_s) FILTER (crowd <= {ALONE}) / sum(succeeded) FILTER (crowd <= {ALONE}) AS alone_s,
       sum(run_s) FILTER (crowd >= {CROWDED}) / sum(succeeded) FILTER (crowd >= {CROWDED})
         AS crowded_s
FROM beside GROUP BY stage"""

_TASKS = f"""
SELECT t.stage, count(*) AS tasks, median(t.run_s) AS median_s, max(t.run_s) AS longest_s,
       count(*) FILTER (t.run_s < {TINY_S}) AS tiny,
       count(*) FILTER (t.run_s > {TOO_LONG_S}) AS too_long,
       count(*) FILTER (t.run_s > {LONG_ON_SPOT_S} AND i.market = 'spot') AS long_on_spot,
       max(t.run_s) FILTER (i.market = 'spot') AS longest_on_spot_s
FROM tasks t
LEFT JOIN workers w ON w.job = t.job AND w.worker = t.worker
LEFT JOIN instances i ON i.job = t.job AND i.instance = w.instance
WHERE t.job = $job AND t.run_s IS NOT NULL GROUP BY t.stage"""

_BUNDLES = """
SELECT stage, count(*) AS bundles, sum(took_s) AS took_s,
       sum(greatest(0, took_s - coalesce(run_s, 0) - coalesce(failed_run_s, 0))) AS overhead_s
FROM bundles WHERE job = $job AND took_s IS NOT NULL GROUP BY stage"""


def _stages(run: Run) -> tuple[StageSigns, ...]:
    tasks = {row["stage"]: row for row in run.rows(_TASKS)}
    bundles = {row["stage"]: row for row in run.rows(_BUNDLES)}
    beside = {row["stage"]: row for row in run.rows(_BESIDE)}
    return tuple(
        _stage(row, tasks[row["stage"]], bundles.get(row["stage"]), beside.get(row["stage"]))
        for row in run.stages
        if row["stage"] in tasks
    )


def _stage(stage: Row, tasks: Row, bundles: Row | None, beside: Row | None) -> StageSigns:
    enough = beside is not None and min(beside["n_alone"], beside["n_crowded"]) >= LEAST_BUNDLES
    return StageSigns(
        name=stage["stage"],
        pool=stage["pool"] or "",
        tasks=tasks["tasks"],
        median_s=tasks["median_s"],
        longest_s=tasks["longest_s"],
        tiny=tasks["tiny"],
        too_long=tasks["too_long"],
        long_on_spot=tasks["long_on_spot"],
        longest_on_spot_s=tasks["longest_on_spot_s"] or 0.0,
        bundles=bundles["bundles"] if bundles else 0,
        took_s=float(bundles["took_s"] or 0.0) if bundles else 0.0,
        overhead_s=float(bundles["overhead_s"] or 0.0) if bundles else 0.0,
        alone_s=beside["alone_s"] if enough and beside else None,
        crowded_s=beside["crowded_s"] if enough and beside else None,
    )
