"""Timeline of a job's bundles by worker.

Invariants: a timeline has at most MAX_LANES lanes, and about MAX_BARS bars, whatever the size of the job. All times are
between the start and the end of the timeline, whatever a worker reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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
_WORST = {"succeeded": 0, "running": 1, "retried": 2, "cancelled": 3, "failed": 4}
"""States of bundles, from the best to the worst."""


@dataclass(slots=True)
class _Bar:
    """A bundle, or several merged bundles."""

    stage: str
    bundle: str
    tasks: int
    attempt: int
    state: str
    begin_s: float
    end_s: float
    bundles: int = 1

    def merge(self, other: _Bar) -> None:
        if self.stage != other.stage:
            self.stage = ""
        self.bundle = ""
        self.bundles += other.bundles
        self.tasks += other.tasks
        self.attempt = max(self.attempt, other.attempt)
        if _WORST[other.state] > _WORST[self.state]:
            self.state = other.state
        self.end_s = max(self.end_s, other.end_s)


def timeline(
    index: TaskIndex, running: Sequence[RunningBundle], start_s: float, end_s: float, now_s: float
) -> TimelineView:
    """Return the timeline of the bundles from `start_s` to `end_s`. A running bundle has a bar until `now_s`."""
    end_s = max(end_s, start_s + 1e-3)
    lanes: dict[str, list[_Bar]] = {}
    for worker, bar in _bars(index, running, now_s):
        bar.begin_s = min(max(bar.begin_s, start_s), end_s)
        bar.end_s = min(max(bar.end_s, bar.begin_s), end_s)
        lanes.setdefault(worker, []).append(bar)
    workers = len(lanes)
    lanes = dict(islice(lanes.items(), MAX_LANES))
    steps, merged_s = STEPS, 0.0
    while sum(map(len, lanes.values())) > MAX_BARS and steps >= 1:
        merged_s = (end_s - start_s) / steps
        lanes = {worker: _merged(lane, start_s, merged_s) for worker, lane in lanes.items()}
        steps //= 2
    views = [_lane(worker, lane) for worker, lane in lanes.items()]
    return {"start_s": start_s, "end_s": end_s, "workers": workers, "merged_s": merged_s, "lanes": views}


def _bars(index: TaskIndex, running: Sequence[RunningBundle], now_s: float) -> Iterator[tuple[str, _Bar]]:
    """Yield the worker and the bar of each bundle: the ended bundles in the order of their starts, and then the running
    bundles.
    """
    for row in index.by_start():
        one = index.bundle(row)
        yield one.worker, _Bar(one.stage, one.name, one.tasks, one.attempt, one.state, one.started_s, one.ended_s)
    for run in sorted(running, key=lambda run: run.since_s):
        bundle, tasks = run.bundle, len(run.bundle.tasks)
        yield run.worker, _Bar(bundle.stage, bundle.id, tasks, bundle.attempt, "running", run.since_s, now_s)


def _merged(lane: Sequence[_Bar], start_s: float, step_s: float) -> list[_Bar]:
    """Merge each bar into the bar before if the two are in the same step or in neighboring steps."""
    merged: list[_Bar] = []
    for bar in lane:
        if merged and (bar.begin_s - start_s) // step_s <= (merged[-1].end_s - start_s) // step_s + 1:
            merged[-1].merge(bar)
        else:
            merged.append(bar)
    return merged


def _lane(worker: str, lane: Sequence[_Bar]) -> LaneView:
    free_s: list[float] = []
    views: list[BarView] = []
    for bar in lane:
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
