"""Immutable values of a scenario. Forecasts and replays read the same scenario values.

Times are seconds from the start of the scenario, and durations are in seconds, unless the name of a field has another
unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import ceil
from pathlib import Path
from random import Random
from typing import Any, Protocol

from batchlab.core.fair_share import SharePolicy
from batchlab.core.job_definition import Dependency
from batchlab.core.model import Pool
from batchlab.core.retry_rule import RetryRule

TENANT_TAG = "tenant"
"""Key of the job tag that has the name of the job's tenant."""


class Distribution(Protocol):
    """Distribution of numbers of at least 0, as a quantile function.

    The drawn number depends only on the argument `unit`, so a task takes the same time on every machine and in every
    run.
    """

    @property
    def mean(self) -> float: ...

    def at(self, unit: float) -> float:
        """Return the quantile of the distribution at `unit`, which is in [0, 1)."""

    def multiply(self, factor: float) -> Distribution:
        """Return the distribution with all numbers multiplied by `factor`."""


class WorkKind(StrEnum):
    """Kind of work that a stand-in task does during its time."""

    SLEEP = "sleep"
    CPU = "cpu"
    MEMORY = "memory"
    IO = "io"


@dataclass(frozen=True, slots=True)
class StageTemplate:
    """Stage of a job template, with task times instead of code.

    `gather` is None (item by item), "*" (one task of all results), or "key" (one task for each of `groups` groups).
    `fails` is the share of attempts that raise an exception. The first `poison` tasks of each job kill their worker in
    every attempt.
    """

    name: str
    task_s: Distribution
    after: tuple[str, ...] = ()
    gather: str | None = None
    groups: int = 1
    kind: WorkKind = WorkKind.SLEEP
    slots: int = 1
    gpus: int = 0
    memory_bytes: int | None = None
    bundle: int | None = None
    pool: str = "default"
    retry: RetryRule = RetryRule()
    fails: float = 0.0
    poison: int = 0
    speculative_copies: bool = False


@dataclass(frozen=True, slots=True)
class JobTemplate:
    """Template from which the jobs of a scenario are created.

    If `file` is a job file, a replay runs the real work of the job file, and the template has the stages of the job
    file. `deadline_s` is the time from a job's arrival to its deadline. `max_failures` is a number of tasks, not a
    share.

    `after` names other templates. Each job depends on the latest job of each of these templates that arrives before the
    job or at the same time.
    """

    name: str
    stages: tuple[StageTemplate, ...]
    tasks: Distribution
    tenant: str = ""
    share: str = ""
    """Share identifier of the jobs, or "" for the default share."""
    priority: int = 0
    deadline_s: float | None = None
    max_failures: float = 0
    file: Path | None = None
    after: tuple[Dependency, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """Arrival of one job at `at_s`.

    `tasks` and `task_s` (the time of each root task) replace values that the template would draw. `label` is the job's
    name in the trace, and `tenant` replaces the tenant of the template.
    """

    at_s: float
    template: str
    tasks: int | None = None
    task_s: float | None = None
    label: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Problem in a record of a trace, and the action that the trace's reader took.

    Records with the same problem have the same `what`, and `detail` is specific to the record.
    """

    file: str
    line: int
    what: str
    done: str
    detail: str = ""


class Source(Protocol):
    """Source of arrivals: a synthetic process or a trace."""

    def arrivals(self, random: Random) -> Iterable[Arrival]:
        """Return the arrivals in order of time. The arrivals depend only on the state of `random`."""

    def odd(self) -> Iterable[Anomaly]:
        """Return the problems of the records that the source has read."""

    def compress(self, factor: float) -> Source:
        """Return the source with all times and task times divided by `factor`."""


class FaultName(StrEnum):
    """Faults of a scenario, each with a description."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> FaultName:
        name = str.__new__(cls, value)
        name._value_ = value
        name.meaning = meaning
        return name

    KILL = "kill", "instances die without a shutdown"
    PAUSE = "pause", "instances freeze for a while"
    PARTITION = "partition", "instances cannot reach any service for a while"
    SPOT_WAVE = "spot-wave", "Spot Instances receive an interruption notice and are then interrupted"
    ZONE_LOSS = "zone-loss", "all instances of a zone die, and new instances cannot be launched in the zone"
    S3_ERRORS = "s3-errors", "S3 answers a share of all requests with status 503"
    SQS_DUPLICATES = "sqs-duplicates", "SQS delivers messages twice"
    SQS_DELAYS = "sqs-delays", "SQS delivers messages late"
    SLOW_DISK = "slow-disk", "the disks of instances are slow for a while"
    MANAGER_CRASH = "manager-crash", "the Job Manager dies and starts again"
    DATABASE_LOSS = "database-loss", "the ledger is lost and rebuilt from S3"


LASTING_FAULTS = frozenset(FaultName) - {FaultName.KILL, FaultName.SPOT_WAVE}
"""Faults that have a duration."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault that starts at `at_s` and lasts `for_s` seconds.

    A fault of instances affects the share `share` of the pool's instances in service (rounded up), or `count` instances
    in service. A fault without a pool affects all pools. `rate` is the share of affected requests or messages in the
    faults s3-errors, sqs-duplicates, and sqs-delays. `notice_s` is the time in seconds between the notice and the
    interruption of a Spot wave.
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
    """Name of the lost zone. An empty name means the first zone."""

    def among(self, number: int) -> int:
        """Return the number of instances that the fault affects if `number` instances are in service."""
        # The subtraction corrects the rounding errors of products such as 0.14 × 50, which is slightly above 7 in
        # floating-point arithmetic.
        most = ceil(self.share * number - 1e-9) if self.count is None else self.count
        return min(most, number)

    def shares(self, other: Fault) -> bool:
        """Return whether the end of one of the two faults would also end the other fault."""
        apart = self.pool and other.pool and self.pool != other.pool
        alike = self.name is other.name and self.name in LASTING_FAULTS
        return alike and not (apart and self.name is FaultName.PAUSE)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Pool of the scenario. `spot` is the share of Spot Instances in the pool."""

    pool: Pool
    spot: float = 0.0


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Scheduled capacity: the pool has at least `min_size` instances from `at_s` until `until_s`."""

    pool: str
    min_size: int
    at_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings of the scaling policy, as in ManagerSettings. If a setting is None, the backend's value applies."""

    drain_target_s: float | None = None
    cooldown_in_s: float | None = None
    idle_s: float | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that the scenario defines, by the names of ManagerSettings."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Expectation:
    """Required range of a measure (see scenarios.verdicts).

    An expectation without a template applies to all jobs. Expected times are in seconds, and expected costs are in USD.
    """

    measure: str
    least: float | None = None
    most: float | None = None
    template: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """All values of one scenario.

    By default, a replay divides all times by `compress`. `compressed` is the factor by which the times have already
    been divided.
    """

    name: str
    about: str
    jobs: Mapping[str, JobTemplate]
    arrivals: tuple[Source, ...]
    pools: tuple[PoolPlan, ...]
    seed: int = 1
    policy: Policy = Policy()
    shares: SharePolicy | None = None
    prewarm: tuple[Prewarm, ...] = ()
    faults: tuple[Fault, ...] = ()
    expect: tuple[Expectation, ...] = ()
    zones: int = 1
    compress: float = 1.0
    compressed: float = 1.0
    digest: str = ""
    """SHA-256 of the text of the scenario file."""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a run: an arrival with all of its random values drawn.

    `task_s` is the time of each root task if the trace has task times. `after` names earlier jobs by their ids.
    """

    index: int
    id: str
    """Id of the job, which is also the client token. The same scenario, seed, and index give the same id."""
    template: JobTemplate
    due_s: float
    tasks: int
    tenant: str = ""
    task_s: float | None = None
    label: str = ""
    after: tuple[Dependency, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """All jobs of a scenario in order of time, and the problems in its traces."""

    jobs: tuple[Job, ...]
    odd: tuple[Anomaly, ...] = ()
