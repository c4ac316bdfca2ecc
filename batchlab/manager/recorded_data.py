"""Recorded performance data: a job's part of the data, merges of two recordings, time series, and the instance history.

Invariants: functions on documents are pure. The steps of a time series follow one another without gaps. The length of a
merged step is at most the step's age divided by `FINE`. The size of the instance history is bounded. The first rows
that it drops are rows that no live job needs. A search of the instance history for a job's rows stops at the first row
of an instance that ended, or of a worker that was last seen, before the recording of the job began.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, takewhile
from operator import add
from typing import Any

from batchlab.core.model import GroupView, Instance, JobId, Json, LifecycleState
from batchlab.core.pricing.usage import Account
from batchlab.manager.worker_registry import WorkerRegistry

RecordedData = dict[str, Any]
"""Document that `Recorder` stores. Each pool in `pools` has `slots`, `type`, and the points of its `series`. `scaling`,
`instances`, and `workers` contain rows. A job's part of the document also has `requests` and `duplicates`."""

BEFORE_S = 5.0
"""Maximum time by which a scaling decision may precede the first observation of its job."""


def job_part(doc: RecordedData, job: JobId) -> RecordedData:
    """Return the job's part of the document, which may be empty."""
    own: Mapping[str, Any] | None = doc["jobs"].get(job)
    earlier: RecordedData | None = doc["earlier"].get(job)
    if own is None:
        return earlier or empty_part()
    since_s = own["since_s"]
    pools = {name: pool for name, pool in doc["pools"].items() if name in own["pools"]}
    part = {
        "pools": {
            name: {**pool, "series": pool["series"][bisect_right(pool["series"], since_s, key=_at) :]}
            for name, pool in pools.items()
        },
        "scaling": _decisions(doc["scaling"], pools, since_s - BEFORE_S),
        "instances": {
            name: list(row)
            for name, row in doc["instances"].items()
            if row[0] in pools and (row[6] is None or row[6] >= since_s)
        },
        "workers": {name: list(row) for name, row in doc["workers"].items() if row[1] in pools and row[4] >= since_s},
        "requests": list(own["requests"]),
        "duplicates": {
            stage: {kind: list(counted) for kind, counted in kinds.items()}
            for stage, kinds in own["duplicates"].items()
        },
    }
    return join_rounds(earlier, part) if earlier else part


def _at(point: Sequence[Any]) -> float:
    return float(point[0])


def _decisions(every: Sequence[Sequence[Any]], pools: Collection[str], since_s: float) -> list[list[Any]]:
    recent = takewhile(lambda decision: decision[1] > since_s, reversed(every))
    return [list(decision) for decision in recent if decision[0] in pools][::-1]


def empty_part() -> RecordedData:
    """Return the empty document part of a job that was not recorded."""
    return {"pools": {}, "scaling": [], "instances": {}, "workers": {}, "requests": [], "duplicates": {}}


def join_rounds(a: RecordedData, b: RecordedData) -> RecordedData:
    """Join the recorded parts of two rounds of one job. `b` belongs to a later round than `a`."""
    pools = dict(a["pools"])
    for name, pool in b["pools"].items():
        series = [*pools[name]["series"], *pool["series"]] if name in pools else pool["series"]
        pools[name] = {**pool, "series": series}
    workers = dict(a["workers"])
    for name, worker in b["workers"].items():
        first_s = min(worker[3], workers[name][3]) if name in workers else worker[3]
        workers[name] = [*worker[:3], first_s, worker[4]]
    return {
        "pools": pools,
        "scaling": [*a["scaling"], *(part for part in b["scaling"] if part not in a["scaling"])],
        "instances": {**a["instances"], **b["instances"]},
        "workers": workers,
        "requests": [*a["requests"], *b["requests"]],
        "duplicates": _combine_duplicates(a, b, add),
    }


def _combine_duplicates(a: RecordedData, b: RecordedData, combine: Callable[[float, float], float]) -> RecordedData:
    """Combine the counts of duplicates by stage and kind."""
    duplicates = {stage: dict(kinds) for stage, kinds in a["duplicates"].items()}
    for stage, kinds in b["duplicates"].items():
        counts = duplicates.setdefault(stage, {})
        for kind, counted in kinds.items():
            counts[kind] = [combine(x, y) for x, y in zip(counts.get(kind, [0, 0.0]), counted, strict=True)]
    return duplicates


def merge_parts(a: RecordedData, b: RecordedData) -> RecordedData:
    """Merge two parts of one job, recorded by two leaders that may have observed the same events. The result contains
    all data of both parts, and counts each event once."""
    return {**merge_fleets(a, b), **_merge_own(a, b)}


def _merge_own(a: RecordedData, b: RecordedData) -> RecordedData:
    """Merge the recorded requests and duplicates of a job."""
    requests = _cumulative(_interleave(a["requests"], b["requests"]))
    return {"requests": requests, "duplicates": _combine_duplicates(a, b, max)}


def merge_fleets(a: RecordedData, b: RecordedData) -> RecordedData:
    """Merge the recorded pools, scaling decisions, instances, and workers."""
    pools = dict(a["pools"])
    for name, pool in b["pools"].items():
        seen = pools[name]["series"] if name in pools else []
        pools[name] = {**pool, "series": _interleave(seen, pool["series"])}
    scaling = [*a["scaling"], *(decision for decision in b["scaling"] if decision not in a["scaling"])]
    instances = dict(a["instances"])
    for name, instance in b["instances"].items():
        instances[name] = max(instances.get(name, instance), instance, key=_completeness)
    workers = dict(a["workers"])
    for name, worker in b["workers"].items():
        other = workers.get(name, worker)
        workers[name] = [*worker[:3], min(worker[3], other[3]), max(worker[4], other[4])]
    return {
        "pools": pools,
        "scaling": sorted(scaling, key=lambda decision: float(decision[1])),
        "instances": instances,
        "workers": workers,
    }


def _completeness(instance: Sequence[Any]) -> tuple[bool, bool]:
    """Return whether the recorder observed the end of the instance, and whether it observed the instance InService."""
    return instance[6] is not None, instance[5] is not None


def _interleave(a: Sequence[Sequence[Any]], b: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return the points of `a`, and the points of `b` at times that `a` does not cover."""
    points = sorted((list(point) for point in a), key=_at)
    ends = [_at(point) for point in points]
    for point in b:
        end, begin = _at(point), _at(point) - point[1]
        n = bisect_left(ends, end)
        behind = n < len(ends) and (ends[n] == end or ends[n] - points[n][1] < end)
        if not behind and not (n and ends[n - 1] > begin):
            points.insert(n, list(point))
            ends.insert(n, end)
    return points


def _cumulative(points: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return the points with counts raised so that they never decrease, because the points come from two observers."""
    cumulative: list[list[Any]] = []
    for point in points:
        most = cumulative[-1][2:] if cumulative else point[2:]
        cumulative.append([*point[:2], *(max(x, y) for x, y in zip(point[2:], most, strict=True))])
    return cumulative


def merge_documents(a: RecordedData, b: RecordedData) -> RecordedData:
    """Merge two whole documents. For a job in both documents, the live state comes from `b`."""
    jobs = {**a["jobs"], **b["jobs"]}
    for job in a["jobs"].keys() & b["jobs"].keys():
        one, other = a["jobs"][job], b["jobs"][job]
        since_s = min(one["since_s"], other["since_s"])
        jobs[job] = {**other, **_merge_own(one, other), "since_s": since_s}
    earlier = {**a["earlier"], **b["earlier"]}
    return {**merge_fleets(a, b), "jobs": jobs, "earlier": earlier}


FINE = 256
"""Resolution of a time series. The series of a job that has just ended has at least `FINE` steps of similar length. A
series over a month has fewer than five thousand steps."""
EVERY = 64
"""Number of points added to a time series between two attempts to merge points."""

Point = list[Json]
"""Point of a time series: time (seconds since the epoch), duration (seconds), and values."""


class TimeSeries:
    """Series of points, sorted by time. A time series merges older points into longer steps. The function `merge`
    returns the merged values of two neighboring points."""

    def __init__(self, merge: Callable[[Point, Point], Point], points: Sequence[Point] = ()) -> None:
        self._merge = merge
        self.points: list[Point] = [list(point) for point in points]
        self._new = 0

    def add(self, point: Point) -> None:
        self.points.append(point)
        self._new += 1
        if self._new >= EVERY:
            self.thin()

    def thin(self) -> None:
        """Merge neighboring points whose merged step is at most the point's age divided by `FINE`."""
        self._new = 0
        if not self.points:
            return
        now_s = self.points[-1][0]
        merged_points: list[Point] = []
        for point in self.points:
            if merged_points and merged_points[-1][1] + point[1] <= (now_s - point[0]) / FINE:
                merged = self._merge(merged_points[-1], point)
                merged_points[-1] = [point[0], merged_points[-1][1] + point[1], *merged[2:]]
            else:
                merged_points.append(point)
        self.points = merged_points

    def since(self, moment_s: float) -> list[Point]:
        return [point for point in self.points if point[0] > moment_s]

    def forget(self, moment_s: float) -> None:
        self.points = self.since(moment_s)


def merge_pool_points(a: Point, b: Point) -> Point:
    """Merge two points of a pool: maximum of queue and backlog, last state of the fleet, and mean of busy slots."""
    all_s = a[1] + b[1]
    mean = (a[-1] * a[1] + b[-1] * b[1]) / all_s if all_s else b[-1]
    return [*b[:2], *(max(x, y) for x, y in zip(a[2:6], b[2:6], strict=True)), *b[6:-1], mean]


def latest_point(_a: Point, b: Point) -> Point:
    """Return the later of two points of cumulative counts, because the counts never decrease."""
    return b


def request_point(account: Account, now_s: float, step_s: float) -> Point:
    requests = account.requests
    return [
        round(now_s, 3),
        round(step_s, 3),
        requests.sqs,
        requests.sqs_empty,
        requests.s3_puts,
        requests.s3_gets,
        requests.s3_deletes,
    ]


MAX_INSTANCES = 20_000
"""Maximum number of recorded instances, and of recorded workers."""
_GONE = LifecycleState.TERMINATED


class InstanceHistory:
    """History of instances, taken from the groups, and of workers, taken from heartbeats."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self.living: dict[str, list[Any]] = {}
        self.ended: dict[str, list[Any]] = {}
        """Rows of ended instances, sorted by the time of the end."""
        self.workers: dict[str, list[Any]] = {}
        """Rows of workers, sorted so that the most recently seen worker is last."""

    def record_instances(self, views: Iterable[GroupView], now_s: float, since_s: Callable[[], float]) -> None:
        """Record the instances of the groups. `since_s()` returns the start of the recording."""
        described: set[str] = set()
        for view in views:
            for instance in view.instances:
                described.add(instance.id)
                self._record_instance(instance, view, now_s, since_s)
        for name in self.living.keys() - described:
            self.living[name][7] = _GONE.value
            self._end(name, now_s)

    def _record_instance(self, instance: Instance, view: GroupView, now_s: float, since_s: Callable[[], float]) -> None:
        row = self.living.get(instance.id) or self.ended.get(instance.id)
        if row is None:
            if instance.state is _GONE and instance.launched_s < since_s():
                # The instance ended before the recording, because a group still lists ended instances for some time.
                return
            launched_s = round(instance.launched_s, 3)
            row = [instance.pool, "", "", "", launched_s, None, None, "", "", view.pool.slots, view.pool.image]
            self.living[instance.id] = row
        machine = instance.machine
        spot = instance.id in self._registry.spot
        type_ = machine.type or view.pool.instance_type
        row[1:4] = type_, machine.zone, "spot" if spot else machine.market.value
        row[7] = instance.state.value
        row[8] = instance.note or row[8]
        if instance.state is LifecycleState.IN_SERVICE and row[5] is None:
            row[5] = round(now_s, 3)
        if instance.state is _GONE and row[6] is None:
            self._end(instance.id, now_s)

    def _end(self, instance: str, now_s: float) -> None:
        row = self.ended[instance] = self.living.pop(instance)
        row[6] = round(now_s, 3)

    def record_workers(self, now_s: float) -> None:
        for worker_status in self._registry.workers.values():
            beat = worker_status.beat
            row = self.workers.pop(beat.worker, None)
            if row is None:
                row = [beat.instance, beat.pool, beat.slots, round(now_s, 3), 0.0]
            row[4] = round(now_s, 3)
            self.workers[beat.worker] = row

    def rows(self, pools: Collection[str], since_s: float, most: int | None) -> RecordedData:
        """Return rows of instances and workers in `pools` since `since_s`, at most `most` instances and `most`
        workers."""
        ended = takewhile(lambda item: item[1][6] >= since_s, reversed(self.ended.items()))
        lately = takewhile(lambda item: item[1][4] >= since_s, reversed(self.workers.items()))
        instances = chain(self.living.items(), ended)
        return {
            "instances": dict(islice(_in_pools(instances, pools, 0), most)),
            "workers": dict(islice(_in_pools(lately, pools, 1), most)),
        }

    def forget(self, since_s: float) -> None:
        """Drop rows that ended before `since_s`, and the oldest rows above `MAX_INSTANCES`."""
        too_many = len(self.living) + len(self.ended) - MAX_INSTANCES
        for name, instance in list(self.ended.items()):
            if instance[6] < since_s or too_many > 0:
                del self.ended[name]
                too_many -= 1
        beating = {worker_status.beat.worker for worker_status in self._registry.workers.values()}
        silent = [name for name in self.workers if name not in beating]
        too_many = len(self.workers) - MAX_INSTANCES
        for name in silent:
            if self.workers[name][4] < since_s or too_many > 0:
                del self.workers[name]
                too_many -= 1

    def to_doc(self) -> RecordedData:
        return {"instances": {**self.ended, **self.living}, "workers": self.workers}

    @classmethod
    def from_doc(cls, doc: Mapping[str, Any], registry: WorkerRegistry) -> InstanceHistory:
        """Return the instance history from a document that `to_doc` of this or another leader has written."""
        instance_history = cls(registry)
        instance_history.living = {name: list(row) for name, row in doc["instances"].items()}
        ended = sorted((row[6], name) for name, row in instance_history.living.items() if row[6] is not None)
        instance_history.ended = {name: instance_history.living.pop(name) for _, name in ended}
        workers = sorted((row[4], name) for name, row in doc["workers"].items())
        instance_history.workers = {name: list(doc["workers"][name]) for _, name in workers}
        return instance_history


def _in_pools(
    rows: Iterable[tuple[str, list[Any]]], pools: Collection[str], column: int
) -> Iterator[tuple[str, list[Any]]]:
    return (row for row in rows if row[1][column] in pools)
