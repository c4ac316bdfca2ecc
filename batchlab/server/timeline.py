"""Timeline of a job's bundles by worker.

Invariants: a timeline has at most MAX_LANES lanes, and about MAX_BARS bars, whatever the size of the job. All times are
between the start and the end of the timeline, whatever a worker reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchlab.core.api_types import BarView, LaneView, TimelineView
    from batchlab.server.task_index import RunningBundle, TaskIndex

MAX_LANES = 300
MAX_BARS = 2_000
"""Number of bars above which the bundles of a lane are merged that begin or end in the same time step."""
STEPS = 1_000
"""Number of time steps of a timeline with merged bundles, before the steps become longer."""
MAX_ROWS = 16
"""Maximum number of rows of a lane. A worker has a row for each bundle that the worker runs at the same time."""
_WORST = ("succeeded", "running", "retried", "cancelled", "failed")
"""States of bundles. The last state is the state of merged bundles that have several states."""


@dataclass(frozen=True, slots=True)
class _Bar:
    """A bundle, or several merged bundles, of the worker `worker`."""

    worker: str
    stage: str
    bundle: str
    tasks: int
    attempt: int
    state: str
    begin_s: float
    end_s: float
    bundles: int = 1

    def joined(self, other: _Bar) -> _Bar:
        return replace(
            self,
            stage=self.stage if self.stage == other.stage else "",
            bundle="",
            tasks=self.tasks + other.tasks,
            attempt=max(self.attempt, other.attempt),
            state=max(self.state, other.state, key=_WORST.index),
            end_s=max(self.end_s, other.end_s),
            bundles=self.bundles + other.bundles,
        )


def timeline(
    index: TaskIndex, running: Sequence[RunningBundle], start_s: float, end_s: float, now_s: float
) -> TimelineView:
    """Return the timeline of the bundles from `start_s` to `end_s`. A running bundle has a bar until `now_s`."""
    end_s = max(end_s, start_s + 1e-3)
    bars: dict[str, list[_Bar]] = {}
    for bar in _bars(index, running, now_s):
        begin_s = min(max(bar.begin_s, start_s), end_s)
        cut = replace(bar, begin_s=begin_s, end_s=min(max(bar.end_s, begin_s), end_s))
        bars.setdefault(bar.worker, []).append(cut)
    workers = len(bars)
    for worker in list(bars)[MAX_LANES:]:
        del bars[worker]
    steps, merged_s = STEPS, 0.0
    while sum(map(len, bars.values())) > MAX_BARS and steps >= 1:
        merged_s = (end_s - start_s) / steps
        bars = {worker: _merged(lane, start_s, merged_s) for worker, lane in bars.items()}
        steps //= 2
    lanes = [_lane(worker, lane) for worker, lane in bars.items()]
    return {"start_s": start_s, "end_s": end_s, "workers": workers, "merged_s": merged_s, "lanes": lanes}


def _bars(index: TaskIndex, running: Sequence[RunningBundle], now_s: float) -> Iterator[_Bar]:
    """Yield the ended bundles in the order of their starts, and then the running bundles."""
    for row in index.by_start():
        one = index.bundle(row)
        name = f"{one.first:08d}-{one.last:08d}.{one.round}.{one.attempt}"
        yield _Bar(one.worker, one.stage, name, one.tasks, one.attempt, one.state, one.started_s, one.ended_s)
    for run in sorted(running, key=lambda run: run.since_s):
        bundle, tasks = run.bundle, len(run.bundle.tasks)
        yield _Bar(run.worker, bundle.stage, bundle.id, tasks, bundle.attempt, "running", run.since_s, now_s)


def _merged(lane: Sequence[_Bar], start_s: float, step_s: float) -> list[_Bar]:
    """Merge each bar into the bar before if the two are in the same step or in neighboring steps."""
    merged: list[_Bar] = []
    for bar in sorted(lane, key=lambda bar: bar.begin_s):
        before = merged[-1] if merged else None
        if before and int((bar.begin_s - start_s) / step_s) <= int((before.end_s - start_s) / step_s) + 1:
            merged[-1] = before.joined(bar)
        else:
            merged.append(bar)
    return merged


def _lane(worker: str, lane: Sequence[_Bar]) -> LaneView:
    free_s: list[float] = []
    views: list[BarView] = []
    for bar in sorted(lane, key=lambda bar: bar.begin_s):
        row = next((n for n, until_s in enumerate(free_s) if until_s <= bar.begin_s), len(free_s))
        row = min(row, MAX_ROWS - 1)
        free_s[row : row + 1] = [bar.end_s]
        views.append(
            {
                "stage": bar.stage,
                "bundle": bar.bundle,
                "bundles": bar.bundles,
                "tasks": bar.tasks,
                "attempt": bar.attempt,
                "state": bar.state,
                "started_s": bar.begin_s,
                "ended_s": bar.end_s,
                "row": row,
            }
        )
    return {"worker": worker, "rows": max(1, len(free_s)), "bars": views}
