"""Counters and histograms of one manager process, for the metrics endpoint.

Invariant: a count never decreases. Metric labels do not contain user text except pool names, because a grid has few
pools.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchlab.core.job_definition import StageDef
from batchlab.core.model import Completion, JobState
from batchlab.core.protocol import json_format
from batchlab.core.protocol.messages import CounterReport

MAX_WORKERS = 20_000
"""Maximum number of workers whose last counts are stored. Above MAX_WORKERS, the manager forgets the counts of the
worker that has been silent longest."""
TICK_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DUPLICATE = "duplicate"
WORKER_COUNTERS = frozenset(
    {DUPLICATE, *(f"{what}.{k}" for what in ("retried", "failed") for k in json_format.FAILURE_KINDS)}
)
"""Names of the counts that workers report (see worker/outbox.py). The manager ignores all other names of counts,
because a worker may run a program other than batchlab."""
BEAT = "heartbeat"
UNREADABLE_KINDS = ("event", "unproven event", BEAT, "dead letter", "outcome", "object")
STAGE_KINDS = ("input", "chain", "join", "gather")


def stage_kind(stage: StageDef) -> str:
    """Return the kind of a stage: "input", "chain" (item by item after one stage), "join" (after several stages), or
    "gather" (of all results)."""
    if stage.gather is not None:
        return "gather"
    if stage.chained:
        return "chain"
    return "join" if stage.after else "input"


@dataclass(slots=True)
class Histogram:
    """Histogram of durations, with the number of observations for each upper bound in seconds. The last element of
    `counts` counts the observations above all bounds."""

    bounds_s: tuple[float, ...] = TICK_BOUNDS_S
    counts: list[int] = field(default_factory=list)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class Counters:
    """Counts since the start of the manager process, including all its times as the leader."""

    bundles: int = 0
    """Number of outcomes that the ledger accepted."""
    repeated: int = 0
    """Number of received outcomes that the ledger already had."""
    tasks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of ended tasks by kind of stage and state."""
    jobs: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    attempts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of failed attempts by kind of failure and result ("retried" or "failed"), as reported by workers."""
    duplicates: int = 0
    """Number of bundles that a worker ran although another worker's outcome was committed first."""
    copies: int = 0
    """Number of speculative copies that were sent."""
    copies_won: int = 0
    """Number of speculative copies whose outcome was committed first."""
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of changes of desired capacity, by pool and direction ("out" or "in")."""
    events: int = 0
    lag_s: float = 0.0
    """Age in seconds of the oldest message of the last receive call, or 0 if the last call returned no message."""
    ticks: Histogram = field(default_factory=Histogram)
    skipped: int = 0
    """Number of ticks that ended early because of a backend error."""
    deliveries: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of delivery attempts of notifications, by kind of target and result ("delivered", "failed",
    "given_up")."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Number of unreadable messages and objects by kind (see UNREADABLE_KINDS)."""
    _reported: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def count_fold(self, stage: StageDef, done: Completion) -> None:
        self.bundles += 1
        kind = stage_kind(stage)
        for state, tasks in (("succeeded", done.succeeded), ("failed", done.failed), ("cancelled", done.cancelled)):
            if tasks:
                self.tasks[kind, state] += len(tasks)

    def count_end(self, state: JobState) -> None:
        self.jobs[state.value.lower()] += 1

    def count_decision(self, pool: str, before: int, after: int) -> None:
        if before != after:
            self.decisions[pool, "out" if after > before else "in"] += 1

    def record_worker_counts(self, report: CounterReport) -> None:
        """Add the increase since the worker's last report. Ignore a report that is older than the worker's last
        report."""
        before = self._reported.get(report.worker, {})
        counts = dict(before)
        for name in WORKER_COUNTERS & report.counts.keys():
            more = report.counts[name] - before.get(name, 0)
            if more <= 0:
                continue
            counts[name] = report.counts[name]
            what, _, kind = name.partition(".")
            if what == DUPLICATE:
                self.duplicates += more
            else:
                self.attempts[kind, what] += more
        # The worker moves to the end of the dict, because the limit removes the first worker of the dict.
        self._reported.pop(report.worker, None)
        self._reported[report.worker] = counts
        while len(self._reported) > MAX_WORKERS:
            del self._reported[next(iter(self._reported))]
