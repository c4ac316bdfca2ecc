"""A scenario as plain values: who submits what and when, to which fleet, what breaks, what holds.

Frozen and pure. The loader makes it from a file; the forecast and the replay read the same values.
Times are seconds from the scenario's beginning, durations seconds, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from pathlib import Path
from random import Random
from typing import Protocol

from batchlab.core.job_definition import RetryRule
from batchlab.core.model import Pool

TENANT_TAG = "tenant"
"""The tag of a job that says whose it is."""


class Distribution(Protocol):
    """A distribution of numbers ≥ 0, by its quantile function: what is drawn depends on nothing
    but the unit handed in, so a task takes the same time wherever and in whichever order it runs.
    """

    @property
    def mean(self) -> float: ...

    def at(self, unit: float) -> float:
        """The quantile of `unit`, which is in [0, 1)."""

    def scaled(self, factor: float) -> Distribution:
        """The same, every number times `factor`."""


class WorkKind(StrEnum):
    """What a stand-in does while its time passes."""

    SLEEP = "sleep"
    CPU = "cpu"
    MEMORY = "memory"
    IO = "io"


@dataclass(frozen=True, slots=True)
class StageTemplate:
    """A stage of a job template; as in a job file, with times in place of code.

    `gather` is None (item by item), "*" (all results make one task) or "key" (one task a group,
    of which there are `groups`). Of all attempts the share `fails` ends in an exception; the first
    `poison` tasks of each job kill their worker whenever they run.
    """

    name: str
    task_s: Distribution
    after: tuple[str, ...] = ()
    gather: str | None = None
    groups: int = 1
    kind: WorkKind = WorkKind.SLEEP
    slots: int = 1
    memory_bytes: int | None = None
    bundle: int | None = None
    pool: str = "default"
    retry: RetryRule = RetryRule()
    fails: float = 0.0
    poison: int = 0


@dataclass(frozen=True, slots=True)
class JobTemplate:
    """What is submitted again and again. `file` is a job file whose real work a replay runs in
    place of stand-ins; its stages are then those of the file. `deadline_s` counts from a job's
    arrival. `max_failures` is a number of tasks, as in a job file."""

    name: str
    stages: tuple[StageTemplate, ...]
    tasks: Distribution
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    max_failures: float = 0
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job that arrives at `at_s`. `tasks` and `task_s` (of each root task) replace what the
    template draws; `label` is its name in the trace; `tenant` replaces the template's."""

    at_s: float
    template: str
    tasks: int | None = None
    task_s: float | None = None
    label: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A record of a trace that was left out or changed: where it is, what is odd, what was done.
    Records that are odd in the same way have the same `what`; `detail` is this one's own."""

    file: str
    line: int
    what: str
    done: str
    detail: str = ""


class Source(Protocol):
    """Where arrivals come from: a synthetic process, or a trace."""

    def arrivals(self, random: Random) -> Iterable[Arrival]:
        """In order of time. Deterministic in the state of `random`."""

    def odd(self) -> Iterable[Anomaly]:
        """What is odd in what it reads; nothing where it reads nothing."""

    def compressed(self, factor: float) -> Source:
        """The same, `factor` times as fast: times and task times divided."""


class FaultName(StrEnum):
    """What a scenario can break. `meaning` says it in words."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> FaultName:
        name = str.__new__(cls, value)
        name._value_ = value
        name.meaning = meaning
        return name

    KILL = "kill", "instances die without a shutdown"
    PAUSE = "pause", "instances freeze for a while"
    PARTITION = "partition", "instances cannot reach any service for a while"
    SPOT_WAVE = "spot-wave", "Spot instances are interrupted after their notice"
    ZONE_LOSS = "zone-loss", "all instances of a zone die, and no new ones can be launched there"
    S3_ERRORS = "s3-errors", "S3 answers a share of all requests with 503"
    SQS_DUPLICATES = "sqs-duplicates", "SQS delivers messages twice"
    SQS_DELAYS = "sqs-delays", "SQS delivers messages late"
    SLOW_DISK = "slow-disk", "the disks of instances are slow for a while"
    MANAGER_CRASH = "manager-crash", "the Job Manager dies and starts again"
    DATABASE_LOSS = "database-loss", "the ledger is lost and rebuilt from S3"


LASTING_FAULTS = frozenset(FaultName) - {FaultName.KILL, FaultName.SPOT_WAVE}
"""Faults that are over after a while."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault on the timeline, from `at_s` for `for_s`.

    Those that hit instances take `share` of the pool's that are in service (rounded up), of all
    pools where `pool` is empty, or `count` where that is set. `rate` is the share of requests or
    messages that s3-errors, sqs-duplicates and sqs-delays hit. `notice_s` is a Spot wave's.
    """

    name: FaultName
    at_s: float
    for_s: float = 60.0
    pool: str = ""
    share: float = 1.0
    count: int | None = None
    rate: float = 0.2
    notice_s: float = 120.0
    zone: str = ""
    """The zone that is lost; empty: the first."""

    def among(self, there: int) -> int:
        """How many of so many instances it takes."""
        # A hair less, or 0.14 × 50, which is a little above 7 in a computer, would be 8.
        wanted = ceil(self.share * there - 1e-9) if self.count is None else self.count
        return min(wanted, there)

    def shares(self, other: Fault) -> bool:
        """Whether both break the same thing, so that the end of one would mend it for the other."""
        apart = self.pool and other.pool and self.pool != other.pool
        alike = self.name is other.name and self.name in LASTING_FAULTS
        return alike and not (apart and self.name is FaultName.PAUSE)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A pool of the scenario's fleet; `spot` is the share of its instances bought as Spot."""

    pool: Pool
    spot: float = 0.0


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Scheduled capacity: at least `min_size` instances from `at_s` until `until_s`."""

    pool: str
    min_size: int
    at_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """The scaling policy and its neighbours, as in ManagerSettings; None: as the backend has it."""

    drain_target_s: float | None = None
    cooldown_in_s: float | None = None
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """That a measure (see scenario.measures) is within [least, most]; `template` "" means of all
    jobs. Times are seconds, money USD."""

    measure: str
    least: float | None = None
    most: float | None = None
    template: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole scenario. `compress` is what a replay divides its times by unless told otherwise;
    `compressed` is what they have been divided by already."""

    name: str
    about: str
    jobs: Mapping[str, JobTemplate]
    arrivals: tuple[Source, ...]
    pools: tuple[PoolPlan, ...]
    seed: int = 1
    policy: Policy = Policy()
    prewarm: tuple[Prewarm, ...] = ()
    faults: tuple[Fault, ...] = ()
    expect: tuple[Expectation, ...] = ()
    zones: int = 1
    compress: float = 1.0
    compressed: float = 1.0
    digest: str = ""
    """sha256 of the file's text."""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One job that a run is to submit: an arrival with everything drawn. `task_s` is that of each
    root task where the trace says so, else the template's draw counts."""

    index: int
    id: str
    """Also its client token: the same scenario, seed and index are the same job."""
    template: JobTemplate
    due_s: float
    tasks: int
    tenant: str = ""
    task_s: float | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All jobs of a scenario in order of time, and what was odd in the traces."""

    jobs: tuple[Job, ...]
    odd: tuple[Anomaly, ...] = ()
