"""Timeline of a job's bundles by worker.

Invariants: a timeline has at most MAX_LANES lanes, and at most MAX_BARS bars of ended bundles, whatever the size of the
job. All times are between the start and the end of the timeline, whatever a worker reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from batchlab.server.time_buckets import MAX_BUCKETS, MAX_LANES, RESULTS, Bucket

if TYPE_CHECKING:
    from batchlab.core.api_types import BarView, LaneView, TimelineView
    from batchlab.server.task_index import RunningBundle, TaskIndex

MAX_BARS = MAX_BUCKETS
"""Number of ended bundles above which a bar has all bundles that a worker started in the same time bucket."""
MAX_ROWS = 16
"""Maximum number of rows of a lane. A worker has a row for each bundle that the worker runs at the same time."""


@dataclass(slots=True)
class _Bar:
    """A bundle, or the bundles of a time bucket, whose `bundle` and `stage` are ""."""

    stage: str
    bundle: str
    tasks: int
    attempt: int
    state: str
    begin_s: float
    end_s: float
    bundles: int = 1


def timeline(
    index: TaskIndex, running: Sequence[RunningBundle], start_s: float, end_s: float, now_s: float
) -> TimelineView:
    """Return the timeline of the bundles from `start_s` to `end_s`. A running bundle has a bar until `now_s`."""
    end_s = max(end_s, start_s + 1e-3)
    lanes: dict[str, list[_Bar]] = {}
    merged_s = 0.0
    if len(index) > MAX_BARS:
        merged_s = index.buckets.step_s
        lanes = {index.workers[worker]: list(_bars_of(lane)) for worker, lane in index.buckets.by_worker().items()}
    else:
        for one in sorted(map(index.bundle, range(len(index))), key=lambda one: one.started_s):
            bar = _Bar(one.stage, one.name, one.tasks, one.attempt, one.state, one.started_s, one.ended_s)
            lanes.setdefault(one.worker, []).append(bar)
    for run in sorted(running, key=lambda run: run.since_s):
        bundle, tasks = run.bundle, len(run.bundle.tasks)
        bar = _Bar(bundle.stage, bundle.id, tasks, bundle.attempt, "running", run.since_s, now_s)
        lanes.setdefault(run.worker, []).append(bar)
    workers = len(lanes.keys() | set(index.workers))
    views = [_lane(worker, lane, start_s, end_s) for worker, lane in islice(lanes.items(), MAX_LANES)]
    return {"start_s": start_s, "end_s": end_s, "workers": workers, "merged_s": merged_s, "lanes": views}


def _bars_of(buckets: Sequence[Bucket]) -> Iterator[_Bar]:
    """Yield a bar for each bucket of a worker. A bar ends with its bundles, or at the start of the next bar."""
    busy_s = 0.0
    for place, bucket in enumerate(buckets):
        busy_s = max(busy_s, bucket.end_s)
        end_s = min(busy_s, buckets[place + 1].begin_s) if place + 1 < len(buckets) else busy_s
        yield _Bar("", "", bucket.tasks, 0, RESULTS[bucket.result], bucket.begin_s, end_s, bucket.bundles)


def _lane(worker: str, bars: Iterable[_Bar], start_s: float, end_s: float) -> LaneView:
    free_s: list[float] = []
    views: list[BarView] = []
    for bar in bars:
        begin_s = min(max(bar.begin_s, start_s), end_s)
        stop_s = min(max(bar.end_s, begin_s), end_s)
        row = next((n for n, until_s in enumerate(free_s) if until_s <= begin_s), len(free_s))
        row = min(row, MAX_ROWS - 1)
        free_s[row : row + 1] = [stop_s]
        views.append(
            {
                "stage": bar.stage,
                "bundle": bar.bundle,
                "bundles": bar.bundles,
                "tasks": bar.tasks,
                "attempt": bar.attempt,
                "state": bar.state,
                "started_s": begin_s,
                "ended_s": stop_s,
                "row": row,
            }
        )
    return {"worker": worker, "rows": max(1, len(free_s)), "bars": views}
