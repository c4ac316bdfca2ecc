"""Bundles of a job by worker and time bucket, for timelines with more bundles than a browser can draw.

Invariants: each bundle of the first MAX_LANES workers is in one bucket. At most MAX_BUCKETS buckets exist, whatever the
size of the job. Above the limit, neighboring buckets are merged in pairs, so the mean time to add a bundle is constant.
"""

from __future__ import annotations

RESULTS = ("succeeded", "retried", "cancelled", "failed")
"""Results of bundles, from the best to the worst."""
MAX_LANES = 300
"""Number of workers with buckets."""
MAX_BUCKETS = 1_000
FIRST_STEP_S = 2.0**-7
"""Duration of a bucket in seconds, before buckets are merged."""


class Bucket:
    """Bundles that a worker started in the same time step. `result` is the place of the worst result in RESULTS."""

    __slots__ = ("begin_s", "bundles", "end_s", "result", "tasks")

    def __init__(self, begin_s: float, end_s: float, tasks: int, result: int) -> None:
        self.begin_s = begin_s
        self.end_s = end_s
        self.tasks = tasks
        self.result = result
        self.bundles = 1

    def add(self, begin_s: float, end_s: float, tasks: int, result: int, bundles: int) -> None:
        if begin_s < self.begin_s:
            self.begin_s = begin_s
        if end_s > self.end_s:
            self.end_s = end_s
        if result > self.result:
            self.result = result
        self.tasks += tasks
        self.bundles += bundles


class TimeBuckets:
    """Buckets of a job's bundles. A bucket has a duration of `step_s` seconds."""

    def __init__(self) -> None:
        self.step_s = FIRST_STEP_S
        self._buckets: dict[tuple[int, int], Bucket] = {}

    def add(self, worker: int, begin_s: float, end_s: float, tasks: int, result: int) -> None:
        """Add a bundle of the worker with this number. `result` is the place of the bundle's result in RESULTS."""
        if worker >= MAX_LANES:
            return
        key = worker, int(begin_s // self.step_s)
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.add(begin_s, end_s, tasks, result, 1)
            return
        self._buckets[key] = Bucket(begin_s, end_s, tasks, result)
        if len(self._buckets) > MAX_BUCKETS:
            self._halve()

    def _halve(self) -> None:
        """Merge neighboring buckets in pairs until at most half of MAX_BUCKETS are left."""
        while len(self._buckets) > MAX_BUCKETS // 2:
            self.step_s *= 2
            merged: dict[tuple[int, int], Bucket] = {}
            for (worker, place), bucket in self._buckets.items():
                first = merged.setdefault((worker, place // 2), bucket)
                if first is not bucket:
                    first.add(bucket.begin_s, bucket.end_s, bucket.tasks, bucket.result, bucket.bundles)
            self._buckets = merged

    def by_worker(self) -> dict[int, list[Bucket]]:
        """Return the buckets of each worker in the order of their starts. The worker that started first comes first."""
        lanes: dict[int, list[Bucket]] = {}
        for (worker, _), bucket in sorted(self._buckets.items(), key=lambda item: item[1].begin_s):
            lanes.setdefault(worker, []).append(bucket)
        return lanes
