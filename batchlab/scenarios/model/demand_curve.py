"""Demand of a scenario over time: jobs and work that arrive, compared with the capacity of its
fleet.

The curve depends only on the scenario and its jobs. Work is in slot seconds: the mean task times
multiplied by the slots of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Job, Scenario

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0
COLUMN_WIDTHS_S = (
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    15.0,
    30.0,
    *(factor * _MINUTE for factor in (1, 2, 5, 10, 15, 30)),
    *(factor * _HOUR for factor in (1, 2, 3, 6, 12)),
    *(factor * _DAY for factor in (1, 2, 7, 14, 30, 90, 365, 3650)),
)
"""Possible column widths: round numbers of seconds, minutes, hours, and days."""


@dataclass(frozen=True, slots=True)
class Column:
    """Arrivals from `at_s` until the next column: jobs, tasks of all stages, and slot seconds per
    pool.
    """

    at_s: float
    jobs: int
    tasks: int
    work_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Load of one pool. `slots` is the capacity of its largest fleet, and `busy` is the work that
    arrives in each column, in busy slots. `behind_s` is the longest delay of work on the largest
    fleet, and `behind_at_s` its time. `idle_from_s` is the time at which all work would be done.
    """

    pool: str
    slots: int
    busy: tuple[float, ...]
    behind_s: float
    behind_at_s: float
    idle_from_s: float

    @property
    def peak(self) -> float:
        return max(self.busy, default=0.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Arrivals over time, in columns of `width_s` from the start of the scenario."""

    width_s: float
    columns: tuple[Column, ...]
    asks: tuple[PoolLoad, ...]

    @property
    def span_s(self) -> float:
        return self.width_s * len(self.columns)

    @property
    def work_s(self) -> float:
        return sum(sum(column.work_s.values()) for column in self.columns)


def build_curve(scenario: Scenario, jobs: Sequence[Job], most: int = 72) -> Curve:
    """Build the curve of `jobs` with at most `most` columns."""
    width_s = column_width_s(_span_s(scenario, jobs), most)
    count = max(1, ceil(_span_s(scenario, jobs) / width_s - 1e-9))
    number, tasks = [0] * count, [0] * count
    work: list[dict[str, float]] = [{} for _ in range(count)]
    for job in jobs:
        i = min(int(job.due_s / width_s), count - 1)
        number[i] += 1
        for name, size, slot_s in _stage_work(job):
            tasks[i] += size
            work[i][name] = work[i].get(name, 0.0) + slot_s
    columns = tuple(Column(i * width_s, number[i], tasks[i], work[i]) for i in range(count))
    asks = []
    for plan in scenario.pools:
        pool = plan.pool
        arriving = [column.work_s.get(pool.name, 0.0) for column in columns]
        slots = pool.max_size * pool.slots
        behind = _backlog(arriving, slots, width_s)
        busy = tuple(one / width_s for one in arriving)
        asks.append(PoolLoad(pool.name, slots, busy, *behind))
    return Curve(width_s, columns, tuple(asks))


def column_width_s(span_s: float, most: int) -> float:
    """Return the smallest width with which at most `most` columns cover `span_s`."""
    return next((one for one in COLUMN_WIDTHS_S if span_s / one <= most + 1e-9), span_s / most)


def _span_s(scenario: Scenario, jobs: Sequence[Job]) -> float:
    """Return the time shortly after the last event of the scenario."""
    ends = [job.due_s * (1 + 1e-9) for job in jobs[-1:]]
    ends += [fault.at_s * (1 + 1e-9) for fault in scenario.faults]
    ends += [one.until_s for one in scenario.prewarm]
    return max([1.0, *ends])


def _backlog(arriving: Sequence[float], slots: int, width_s: float) -> tuple[float, float, float]:
    """Return the longest delay, its time, and the time at which all work is done.

    Work is treated as a fluid.
    """
    left, worst, worst_at_s, idle_s = 0.0, 0.0, 0.0, 0.0
    for i, work in enumerate(arriving):
        before = left
        left = max(0.0, left + work - slots * width_s)
        if left > worst:
            worst, worst_at_s = left, (i + 1) * width_s
        if before + work > 0:
            idle_s = i * width_s + min(width_s, (before + work) / slots) + left / slots
    return worst / slots, worst_at_s, idle_s


def _stage_work(job: Job) -> list[tuple[str, int, float]]:
    """Return (pool, tasks, slot seconds) of each stage."""
    count = expansion.stage_sizes(job.template, job.tasks)
    found = []
    for stage in job.template.stages:
        draw = stage.task_s
        if job.task_s is not None and not stage.after:
            draw = Constant(job.task_s)
        size = count[stage.name]
        found.append((stage.pool, size, size * draw.mean * stage.slots))
    return found
