"""What a manager has counted since its process was started, for whoever watches it (see metrics).

Invariant: a count never goes down, and adding to it is all that is done on the way of a bundle. No
label is a user's text, but for names of pools, of which a grid has few.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchlab.core.job_definition import StageDef
from batchlab.core.model import Completion, JobState
from batchlab.core.protocol import json_format
from batchlab.core.protocol.messages import Told

HEARD_KEPT = 20_000
"""Workers that may still tell what they have done; the longest silent is forgotten first."""
TICK_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DUPLICATE = "duplicate"
DEEDS = frozenset(
    {
        DUPLICATE,
        *(f"{what}.{k}" for what in ("retried", "failed") for k in json_format.FAILURE_KINDS),
    }
)
"""Names of what workers tell of (see worker.deeds); they may be other programs than we think."""
BEAT = "heartbeat"
UNREADABLE_KINDS = ("event", "unproven event", BEAT, "dead letter", "outcome", "object")
STAGE_KINDS = ("input", "chain", "join", "gather")


def stage_kind(stage: StageDef) -> str:
    """What feeds the stage: the job's input, another stage item by item, several, or all of one."""
    if stage.gather is not None:
        return "gather"
    if stage.chained:
        return "chain"
    return "join" if stage.after else "input"


@dataclass(slots=True)
class Histogram:
    """Observations by upper bound, in seconds; the last count is of what is beyond all."""

    bounds_s: tuple[float, ...] = TICK_BOUNDS_S
    counts: list[int] = field(default_factory=list)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class Counts:
    """Since the process was started, whichever manager in it led. All are numbers of things."""

    bundles: int = 0
    """Outcomes that the ledger has taken."""
    repeated: int = 0
    """Outcomes that it had taken before."""
    tasks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """That have come to their end, by kind of stage and state."""
    jobs: Counter[str] = field(default_factory=Counter)
    """That have ended, by state."""
    submitted: int = 0
    attempts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """That failed, by kind of failure and what followed ("retried", "failed"), as workers tell."""
    duplicates: int = 0
    """Bundles that a worker ran for nothing, since another's outcome came first, as they tell."""
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """To change desired capacity, by pool and "out" or "in"."""
    events: int = 0
    """Messages from the events queue."""
    lag_s: float = 0.0
    """Age of the oldest one that was received last, 0 where the last receive brought none."""
    ticks: Histogram = field(default_factory=Histogram)
    skipped: int = 0
    """Ticks that the backend did not let come to their end."""
    deliveries: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Tries to deliver a notification, by kind of target and "delivered", "failed", "given_up"."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Messages and objects that could not be read, by kind (see UNREADABLE_KINDS)."""
    _heard: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def folded(self, stage: StageDef, done: Completion) -> None:
        """The ledger has taken an outcome."""
        self.bundles += 1
        kind = stage_kind(stage)
        for state, tasks in (
            ("succeeded", done.succeeded),
            ("failed", done.failed),
            ("cancelled", done.cancelled),
        ):
            if tasks:
                self.tasks[kind, state] += len(tasks)

    def ended(self, state: JobState) -> None:
        self.jobs[state.value.lower()] += 1

    def decided(self, pool: str, before: int, after: int) -> None:
        if before != after:
            self.decisions[pool, "out" if after > before else "in"] += 1

    def told(self, told: Told) -> None:
        """A worker says what it has done since its start; older news changes nothing."""
        before = self._heard.get(told.worker, {})
        known = dict(before)
        for name in DEEDS & told.counts.keys():
            more = told.counts[name] - before.get(name, 0)
            if more <= 0:
                continue
            known[name] = told.counts[name]
            what, _, kind = name.partition(".")
            if what == DUPLICATE:
                self.duplicates += more
            else:
                self.attempts[kind, what] += more
        self._heard.pop(told.worker, None)  # to the end: one that still tells must not be forgotten
        self._heard[told.worker] = known
        while len(self._heard) > HEARD_KEPT:
            del self._heard[next(iter(self._heard))]
